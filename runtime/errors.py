"""What can go wrong around a program rather than in replication: its state directory, membership, secrets, settings,
addresses, signals."""

from __future__ import annotations

from protocol.errors import LocalFault


class StateLocked(LocalFault):
    """Another process holds the state directory. Fields: path, holder (a process id, or "unknown")."""

    code = "state-locked"
    message = "{path} is in use by another process (process id {holder})"
    hint = "Stop the other process, or give this one a state directory of its own."


class NotEnrolled(LocalFault):
    """Fields: directory, program (the command that enrols)."""

    code = "not-enrolled"
    message = "{directory} holds no enrolled identity"

    @property
    def hint(self) -> str:  # type: ignore[override]
        return f"Run `{self.fields['program']} enroll --server URL --token-file FILE --dir DIR` first."


class AlreadyEnrolled(LocalFault):
    """Fields: directory."""

    code = "already-enrolled"
    message = "{directory} holds an enrolled identity already"
    hint = "To enrol anew, use another directory: the keys and the state in this one may still be needed."


class SecretExists(LocalFault):
    """A secret is never overwritten. Fields: path."""

    code = "secret-exists"
    message = "{path} exists; a secret is never overwritten"
    hint = "Choose another path, or move the existing file away first."


class SecretMissing(LocalFault):
    """Fields: path."""

    code = "secret-missing"
    message = "there is no file {path}"
    hint = "Check the path of the secret file."


class SecretUnreadable(LocalFault):
    """Fields: path, reason."""

    code = "secret-unreadable"
    message = "cannot use the secret file {path}: {reason}"


class SettingsFileInvalid(LocalFault):
    """The settings file is missing, unreadable, or not TOML. Fields: path, reason."""

    code = "settings-file-invalid"
    message = "settings file {path}: {reason}"


class SettingUnknown(LocalFault):
    """Fields: key, origin, nearest (a known key, or an empty text)."""

    code = "setting-unknown"
    message = "unknown setting {key} from {origin}"

    @property
    def hint(self) -> str:  # type: ignore[override]
        nearest = self.fields["nearest"]
        return f"Did you mean {nearest}?" if nearest else "`config show` lists the known settings."


class SettingInvalid(LocalFault):
    """Fields: key, origin, reason."""

    code = "setting-invalid"
    message = "setting {key} from {origin}: {reason}"
    hint = "`config check` shows whether the settings are good; `config show --origin` where each value comes from."


class StopDeadlineExceeded(LocalFault):
    """An orderly stop did not end in time and was cut short. Nothing acknowledged is lost by that. Fields: seconds."""

    code = "stop-deadline-exceeded"
    message = "the program did not stop within {seconds} s and was cut short"
