"""What stops an installation on a host."""

from __future__ import annotations

from typing import Final

from protocol.errors import LocalFault, PeerFault

LAST_LINES: Final = 15
LINE_LENGTH_MAX: Final = 300
"""What is shown of a remote command's words."""


class PackageMissing(LocalFault):
    """Fields: place."""

    code = "package-missing"
    message = "there is no package of the mobility agent at {place}"
    hint = "Give --package FILE, or run `make dist` in the checkout and this command in it."


class PackageInvalid(LocalFault):
    """Fields: path, reason."""

    code = "package-invalid"
    message = "{path} is no package of the mobility agent: {reason}"


class KnownHostsUnusable(LocalFault):
    """Fields: path, reason."""

    code = "known-hosts-unusable"
    message = "cannot use the known hosts in {path}: {reason}"


class HostUnreachable(PeerFault):
    """Fields: host, port, reason."""

    code = "host-unreachable"
    is_retryable = True
    message = "no SSH connection to {host}, port {port}: {reason}"


class HostKeyUnknown(PeerFault):
    """Fields: host, algorithm, fingerprint."""

    code = "host-key-unknown"
    message = "{host} shows a host key ({algorithm}) that nobody vouches for: {fingerprint}"
    hint = (
        "Compare it, by another way than this network, with what `ssh-keygen -l -f /etc/ssh/ssh_host_…_key.pub` says "
        "on the host. If it is the same, give it as --host-key-fingerprint, or put the key into the known hosts."
    )


class HostKeyChanged(PeerFault):
    """Fields: host, algorithm, fingerprint, known (the fingerprints that were expected)."""

    code = "host-key-changed"
    message = "{host} shows another host key ({algorithm}, {fingerprint}) than the known one: {known}"
    hint = "Either the host was set up anew, or somebody stands between. Find out which before you accept the new key."


class HostKeyRefused(PeerFault):
    """Fields: host, reason."""

    code = "host-key-refused"
    message = "the host key of {host} is refused: {reason}"


class LoginRefused(PeerFault):
    """Fields: host, user."""

    code = "login-refused"
    message = "{host} does not let {user} in with the key that was offered"
    hint = "The key must be in the user's authorized_keys there. Passwords are never asked for."


class HostConnectionLost(PeerFault):
    """Fields: host, step, reason."""

    code = "host-connection-lost"
    is_retryable = True
    message = "{host}: the SSH connection was lost during the step `{step}`: {reason}"
    hint = "Run it again: what is done already is skipped."


class StepTookTooLong(PeerFault):
    """Fields: host, step, seconds."""

    code = "step-took-too-long"
    is_retryable = True
    message = "{host}: the step `{step}` took longer than {seconds:.0f} s"

    @property
    def hint(self) -> str:  # type: ignore[override]
        if self.fields["step"] == "heard":
            return "See `journalctl -u farpoint-mobility-agent` there: does it reach the configuration server?"
        return "Run it again: what is done already is skipped."


class HostUnfit(PeerFault):
    """Fields: host, reason."""

    code = "host-unfit"
    message = "the package cannot be installed on {host}: {reason}"


class RootNeeded(PeerFault):
    """Fields: host, user."""

    code = "root-needed"
    message = "{host}: {user} is not root, and `sudo -n` is refused"
    hint = "Log in as root, or let the user call sudo without a password."


class HostLocked(PeerFault):
    """Fields: host, text."""

    code = "host-locked"
    is_retryable = True
    message = "{host}: another program installs packages there:\n{text}"


class EnrolledElsewhere(PeerFault):
    """Fields: host, machine, server."""

    code = "enrolled-elsewhere"
    message = (
        "{host} is enrolled already, as machine {machine} with {server}, which this configuration server does not know"
    )
    hint = "To move it, purge its package first: its state directory belongs to the other vault."


class RemoteCommandFailed(PeerFault):
    """Fields: host, step, status, text."""

    code = "remote-command-failed"
    message = "{host}: the step `{step}` failed with status {status}:\n{text}"

    @staticmethod
    def _told(fields: dict[str, object]) -> dict[str, object]:
        lines = str(fields["text"]).strip().splitlines()[-LAST_LINES:]
        return fields | {"text": "\n".join(f"  {line[:LINE_LENGTH_MAX]}" for line in lines)}
