"""The one tree of errors: every failure that Farpoint can name is a `ReplicationError`.

Errors carry fields, not prose; `str(error)` makes the sentence for the log and `hint` tells the operator what to do.
A local fault (`LocalFault`) and a fault of the peer (`PeerFault`) are different types: the first is ours to mend, the
second is told to the peer and never trusted further.
"""

from __future__ import annotations

import reprlib
from typing import ClassVar, Final

_SHOWN: Final = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother, _SHOWN.maxlong = 3, 200, 200, 200


class ReplicationError(Exception):
    """The root. Subclasses set `code` (stable, kebab-case, goes over the wire and into metrics) and pass fields by
    keyword.

    Fields become attributes. `message` is a format string over the fields.
    """

    code: ClassVar[str] = "replication-error"
    is_retryable: ClassVar[bool] = False
    message: ClassVar[str] = "replication failed"
    hint: ClassVar[str] = ""

    def __init__(self, /, **fields: object) -> None:
        # why positional only: a refusal of another version may have a field of any name, "self" too.
        self.fields = fields
        super().__init__(self.message.format_map(self._told(fields)))

    @staticmethod
    def _told(fields: dict[str, object]) -> dict[str, object]:
        """The fields as the message shows them."""
        return fields

    def __getattr__(self, name: str) -> object:
        fields = self.__dict__.get("fields", {})
        if name in fields:
            return fields[name]
        raise AttributeError(name)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.fields))


def _rebuild(kind: type[ReplicationError], fields: dict[str, object]) -> ReplicationError:
    return kind(**fields)


class LocalFault(ReplicationError):
    """Something on this machine: its disk, its memory, its settings, its clock."""

    code = "local-fault"


class PeerFault(ReplicationError):
    """The other side sent what the protocol forbids, or what it may not send."""

    code = "peer-fault"


class MalformedInput(PeerFault):
    """Bytes that are not a message of this format: wrong type, over a limit, not canonical."""

    code = "malformed-input"
    message = "malformed {what}: {reason}"
    hint = "The peer speaks another version or the bytes were damaged; compare the versions on both sides."


class LimitExceeded(MalformedInput):
    """A named limit was passed. Fields: what, value, limit."""

    code = "limit-exceeded"
    message = "{what} is {value}, more than the limit {limit}"


class SequenceGap(PeerFault):
    """A change set did not follow its predecessor: a gap or a repeat. Fields: disk, expected, received."""

    code = "sequence-gap"
    message = "disk {disk}: change set {received} where {expected} was expected"
    hint = "The sender resumes from the durable position in the next welcome by itself."


class FrameGap(SequenceGap):
    """A frame did not follow its predecessor within the change set. Fields: disk, sequence, expected, received."""

    code = "frame-gap"
    message = "disk {disk}: frame {received} of change set {sequence} where {expected} was expected"


class CreditExceeded(PeerFault):
    """More body bytes than were granted, or a grant that falls. Fields: total, granted."""

    code = "credit-exceeded"
    message = "{total} body bytes on this connection, where {granted} were granted"


class ImpossiblePositions(PeerFault):
    """Positions that fall, or that name change sets which were never sent. Fields: disk, reason."""

    code = "impossible-positions"
    message = "disk {disk}: impossible positions: {reason}"


class EventNotAllowed(PeerFault):
    """A message that the state machine's table has no row for. Fields: state, event."""

    code = "event-not-allowed"
    message = "{event} is not allowed in state {state}"


class NotPermitted(PeerFault):
    """The certificate does not give the right to this. Fields: subject, reason."""

    code = "not-permitted"
    message = "{subject} is not permitted: {reason}"
    hint = "Check the role of the certificate or token, and that the disk is registered for this machine."


class CertificateRefused(NotPermitted):
    """The peer's certificate does not hold, or ours does not in the peer's eyes. Fields: subject, reason."""

    code = "certificate-refused"
    message = "certificate of {subject} refused: {reason}"
    hint = (
        "Check that both sides were enrolled with the same vault, that neither certificate has expired or been "
        "revoked, and that both clocks are right; enrolling again gives a new certificate."
    )


class TlsFault(PeerFault):
    """The peer does not speak TLS 1.3 as we ask for. Fields: peer, reason."""

    code = "tls-fault"
    message = "TLS with {peer} failed: {reason}"
    hint = "Check that the port is a process server's and that nothing between the two rewrites the connection."


class NoGrant(PeerFault):
    """The process server holds no grant for the disk (yet). Fields: disk. Retryable: grants arrive by the
    configuration server."""

    code = "no-grant"
    is_retryable = True
    message = "no grant for disk {disk}"
    hint = "The process server gets it from the configuration server; check that both are reachable."


class StaleEpoch(PeerFault):
    """The epoch is closed or was never granted here. Fields: disk, epoch, current."""

    code = "stale-epoch"
    message = "disk {disk}: epoch {epoch} is not current (current: {current})"


class VersionNotSupported(PeerFault):
    """Fields: what, version, supported."""

    code = "version-not-supported"
    message = "{what} has version {version}; this program supports {supported}"
    hint = "Upgrade the older side."


class RefusedByPeer(ReplicationError):
    """The peer refused with a typed error of its own. Fields: peer_code, detail, retryable."""

    code = "refused-by-peer"
    message = "the peer refused: {peer_code}: {detail}"


class DeadlineExceeded(LocalFault):
    """Fields: what, seconds."""

    code = "deadline-exceeded"
    is_retryable = True
    message = "{what} took longer than {seconds} s"


class ConnectionLost(LocalFault):
    """Fields: peer, reason."""

    code = "connection-lost"
    is_retryable = True
    message = "connection to {peer} lost: {reason}"
    hint = "It is tried again with growing pauses; nothing is lost meanwhile."


class SendNotAllowed(LocalFault):
    """We were about to send what the protocol forbids: a bug of ours, caught before the peer saw it. Fields: event,
    reason."""

    code = "send-not-allowed"
    message = "this program must not send {event}: {reason}"
    hint = "This is a defect in Farpoint; report it with the log."


class CertificateUnusable(LocalFault):
    """Our own certificate, key, authority or revocation list cannot be used. Fields: path, reason."""

    code = "certificate-unusable"
    message = "{path} cannot be used: {reason}"
    hint = "Enrolling again writes new certificate files."


class CannotListen(LocalFault):
    """Fields: host, port, reason."""

    code = "cannot-listen"
    message = "cannot listen on {host} port {port}: {reason}"
    hint = "Choose an address of this machine and a port above 1023, or give the service the right to use the port."


class PortTaken(CannotListen):
    """Another program listens there. Fields: host, port."""

    code = "port-taken"
    message = "port {port} on {host} is taken by another program"
    hint = "Stop the other program (`ss -ltnp` names it) or choose another port in the settings."


class InvalidValue(LocalFault):
    """A value broke a rule of its type when it was made. Fields: what, value, rule."""

    code = "invalid-value"
    message = "{what} is {value}: {rule}"

    @staticmethod
    def _told(fields: dict[str, object]) -> dict[str, object]:
        # why: a value may be nested so deeply that its repr fails, or longer than anybody reads.
        return {**fields, "value": _SHOWN.repr(fields["value"])}
