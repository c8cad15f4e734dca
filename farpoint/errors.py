"""What the command line itself can find wrong."""

from __future__ import annotations

from protocol.errors import LocalFault


class OptionMissing(LocalFault):
    """Fields: option, purpose."""

    code = "setting-invalid"
    message = "{option} must be given: {purpose}"
    hint = "As a flag, as FARPOINT_… in the environment, or in /etc/farpoint/farpoint.toml."


class TooFewRecoveryKeys(LocalFault):
    """Fields: count."""

    code = "setting-invalid"
    message = "{count} recovery key would be the only way into the vault"
    hint = "Give --recovery-key twice, for two safe places; or --single-recovery-key if you accept the risk."


class PassphraseMissing(LocalFault):
    """Fields: path."""

    code = "passphrase-missing"
    message = "recovery key {path} needs its passphrase"
    hint = "Give --passphrase-file, or run it on a terminal."


class PassphraseEmpty(LocalFault):
    """Fields: path."""

    code = "passphrase-empty"
    message = "the passphrase in {path} is empty"


class ExtraMissing(LocalFault):
    """Fields: command, module."""

    code = "not-installed"
    message = "`farpoint {command}` is not installed here: it needs the module {module}"
    hint = "Install Farpoint with all its extras: pip install 'farpoint[config-server,process-server,recovery]'."


class DirectoryNotUp(LocalFault):
    """Fields: path."""

    code = "not-found"
    message = "{path} is no directory of `farpoint up`"
    hint = "Run `farpoint up --dir DIR` first, or give --server, --ca and --token-file."


class FirstRunCutOff(LocalFault):
    """Fields: path."""

    code = "first-run-cut-off"
    message = "{path} holds keys, but no configuration server was made: the first run was cut off"
    hint = "Nobody can have been enrolled yet: remove the directory of `farpoint up`, and its store, and begin again."


class StoreChanged(LocalFault):
    """Fields: path, known, wanted."""

    code = "setting-invalid"
    message = "{path} was made for the store {known}, not for {wanted}"
    hint = "Leave --store out, or use another directory."
