"""What can go wrong between a program and the configuration server: `ControlFault` and its kinds.

A refusal travels as problem+json with the error's code and fields and is raised as the same type at the caller: server
and client share this one list. A code that is not known here becomes `RefusedByServer`.
"""

from __future__ import annotations

from typing import Final

from protocol.errors import CertificateRefused, LocalFault, NotPermitted, PeerFault, ReplicationError


class ControlFault(ReplicationError):
    """Root of this module."""

    code = "control-fault"
    message = "configuration server: {reason}"


class ServerUnreachable(ControlFault):
    """No answer: connection refused, name unknown, timed out, cut off. Fields: server, reason."""

    code = "server-unreachable"
    is_retryable = True
    message = "configuration server {server} cannot be reached: {reason}"
    hint = "Check the URL, the network and that `config-server run` is up. Replication goes on meanwhile."


class ServerNotTrusted(ControlFault):
    """Its authority is not the one that was pinned, or its certificate is not for this name. Fields: server, reason."""

    code = "server-not-trusted"
    message = "configuration server {server} is not trusted: {reason}"
    hint = "The token must come from this very server; the URL must use a name or address of its certificate."


class CertificateTimeInvalid(ControlFault):
    """A certificate is not yet or no longer valid by this machine's clock. Fields: server, reason."""

    code = "certificate-time-invalid"
    message = "configuration server {server}: a certificate does not fit this machine's clock: {reason}"
    hint = "Compare the clocks of both machines (`timedatectl`); if they are right, enrol again with a new join token."


class AnswerMalformed(ControlFault):
    """The server's answer is not of this protocol. Fields: server, reason."""

    code = "answer-malformed"
    message = "configuration server {server} gave an answer that cannot be understood: {reason}"
    hint = "Check that the URL is a configuration server's; compare the versions on both sides."


class RefusedByServer(ControlFault):
    """A refusal of a kind that this program does not know. Fields: peer_code, detail, peer_hint, retryable, status."""

    code = "refused-by-server"
    message = "the configuration server refused: {peer_code}: {detail}"

    @property
    def hint(self) -> str:  # type: ignore[override]
        return str(self.fields["peer_hint"])

    @property
    def is_retryable(self) -> bool:  # type: ignore[override]
        return bool(self.fields["retryable"])


class ServerUnwell(ControlFault):
    """The server failed inside, or is too busy. Fields: reason."""

    code = "server-unwell"
    is_retryable = True
    message = "the configuration server failed to answer: {reason}"
    hint = "Its log names the cause; the request is repeated."


class RequestInvalid(PeerFault):
    """The request breaks the rules of its message. Fields: reason."""

    code = "request-invalid"
    message = "the request is not valid: {reason}"
    hint = "Compare the versions on both sides."


class RequestTooLarge(PeerFault):
    """Fields: limit_bytes."""

    code = "request-too-large"
    message = "the request is larger than {limit_bytes} bytes"


class ResourceNotFound(PeerFault):
    """Fields: what, identifier."""

    code = "not-found"
    message = "there is no {what} {identifier}"


class MethodNotAllowed(PeerFault):
    """The resource has other methods than this one. Fields: method, path, allowed."""

    code = "method-not-allowed"
    message = "{path} has no {method}, only {allowed}"


class CredentialMissing(PeerFault):
    """The route needs a certificate or token that was not presented. Fields: needs."""

    code = "credential-missing"
    message = "this needs {needs}"
    hint = "Operators present a token of `farpoint operators create`, or the admin token; programs their certificate."


class TooManyAttempts(PeerFault):
    """This address has tried too many wrong join tokens. Fields: wait_seconds."""

    code = "too-many-attempts"
    is_retryable = True
    message = "too many wrong join tokens came from this address; the next is looked at in {wait_seconds} s"
    hint = "Wait; if that was not you, find out who tries from there."


class IdempotencyKeyReused(PeerFault):
    """The caller has used this Idempotency-Key for another request. Fields: none."""

    code = "idempotency-key-reused"
    message = "this Idempotency-Key was used for another request"
    hint = "Choose a new key for each change, and the same one only to repeat that change."


class RequestRepeated(PeerFault):
    """A request with this Idempotency-Key was carried out, and its answer cannot be given again. Fields: action,
    subject."""

    code = "request-repeated"
    message = "this was carried out already: {action} {subject}"
    hint = "If the answer was lost and held a secret, revoke that one and ask anew."


class OperatorTokenRefused(PeerFault):
    """Why is told only to who has the token. Fields: token (its public part), reason."""

    code = "operator-token-refused"
    message = "operator token {token} is refused: {reason}"
    hint = "Ask an administrator for a new one: `farpoint operators create`."


class AuditChainBroken(LocalFault):
    """The audit log is not what was written. Fields: number, reason."""

    code = "audit-chain-broken"
    message = "the audit log is broken at entry {number}: {reason}"
    hint = "Somebody changed the database by hand, or restored an older one. Compare it with a backup; find out who."


class MachineQuarantined(PeerFault):
    """Two agents have reported as this machine. Fields: machine."""

    code = "machine-quarantined"
    is_retryable = True
    message = "machine {machine} is in quarantine: a copy of its agent has reported as well"
    hint = "Stop the copy and remove its state directory, then say `farpoint machines release MACHINE`."


class PolicyNameTaken(PeerFault):
    """Fields: name."""

    code = "policy-name-taken"
    message = "there is a replication policy {name} already"
    hint = "Choose another name, or edit that one: `farpoint policies edit`."


class PolicyChanged(PeerFault):
    """Somebody else edited it meanwhile. Fields: policy, version."""

    code = "policy-changed"
    message = "replication policy {policy} has been changed meanwhile; it is at version {version}"
    hint = "Look at it again, and repeat what you want changed."


class PolicyInUse(PeerFault):
    """Fields: policy, machines (their number)."""

    code = "policy-in-use"
    message = "replication policy {policy} holds for {machines} machines"
    hint = "Give them another one first: `farpoint machines set-policy`."


class AuditFormatUnknown(LocalFault):
    """Written by a newer program: it may be whole. Fields: number, format."""

    code = "audit-format-unknown"
    message = "entry {number} of the audit log has format {format}, which this program does not know"
    hint = "Verify it with the newest `farpoint`."


class JoinTokenMalformed(LocalFault):
    """The text is not a join token. Fields: reason. Never holds the token itself."""

    code = "join-token-malformed"
    message = "this is not a join token: {reason}"
    hint = "Copy the whole line that `farpoint token create` printed."


class JoinTokenWrong(PeerFault):
    """No such token, or its secret was not proved. Fields: token."""

    code = "join-token-wrong"
    message = "join token {token} is not known here, or its secret is wrong"
    hint = "Copy the whole token again, or make a new one: `farpoint token create`."


class JoinTokenExpired(PeerFault):
    """Fields: token."""

    code = "join-token-expired"
    message = "join token {token} has expired"
    hint = "Make a new one: `farpoint token create`."


class JoinTokenUsed(PeerFault):
    """Fields: token."""

    code = "join-token-used"
    message = "join token {token} has been used already"
    hint = "A token enrols one program. Make a new one: `farpoint token create`."


class JoinTokenForAnotherRole(PeerFault):
    """Fields: token, token_role, asked_role."""

    code = "join-token-for-another-role"
    message = "join token {token} is for the role {token_role}, not {asked_role}"
    hint = "Make one for this role: `farpoint token create --role ROLE`."


class CertificateRequestInvalid(PeerFault):
    """Fields: reason."""

    code = "certificate-request-invalid"
    message = "the certificate request cannot be granted: {reason}"


class DiskOfAnotherMachine(PeerFault):
    """The disk's world-wide name is that of a disk which another machine protects. Fields: mark."""

    code = "disk-of-another-machine"
    message = "the disk {mark} is protected by another machine"
    hint = "End its protection there first. A shared disk is protected from one machine only."


class DiskChanged(PeerFault):
    """A protected disk comes back with another size or sector size. Fields: disk, reason."""

    code = "disk-changed"
    message = "disk {disk} is not what it was: {reason}"
    hint = "If that is meant: `mobility-agent unprotect PATH --keep`, then protect it again; its history begins anew."


class TooManyDisks(PeerFault):
    """Fields: limit."""

    code = "too-many-disks"
    message = "this machine protects {limit} disks already, the most that one may"


REFUSALS: Final[dict[str, type[ReplicationError]]] = {
    kind.code: kind
    for kind in (
        CertificateRefused,
        ServerUnwell,
        RequestInvalid,
        RequestTooLarge,
        ResourceNotFound,
        CredentialMissing,
        OperatorTokenRefused,
        TooManyAttempts,
        RequestRepeated,
        IdempotencyKeyReused,
        MethodNotAllowed,
        MachineQuarantined,
        PolicyNameTaken,
        PolicyChanged,
        PolicyInUse,
        JoinTokenWrong,
        JoinTokenExpired,
        JoinTokenUsed,
        JoinTokenForAnotherRole,
        CertificateRequestInvalid,
        DiskOfAnotherMachine,
        DiskChanged,
        TooManyDisks,
        NotPermitted,
    )
}
"""The refusals that travel by type, keyed by code."""
