"""What can go wrong inside the configuration server itself; refusals of callers are in protocol.control_errors."""

from __future__ import annotations

from protocol.errors import LocalFault


class ConfigServerFault(LocalFault):
    """Root of this module."""

    code = "config-server-fault"


class AlreadyInitialised(ConfigServerFault):
    """Fields: path."""

    code = "already-initialised"
    message = "{path} holds a configuration server already; nothing was changed"
    hint = "Use another directory, or `config-server run` with this one."


class NotInitialised(ConfigServerFault):
    """Fields: path."""

    code = "not-initialised"
    message = "{path} holds no configuration server"
    hint = "Make one: `config-server init --dir DIR --authority-key FILE`."


class InstallationDamaged(ConfigServerFault):
    """Fields: path, reason."""

    code = "installation-damaged"
    message = "the configuration server's directory {path} is damaged: {reason}"
    hint = "Restore it from a backup. The vault's history in storage is not affected."


class DatabaseTooNew(ConfigServerFault):
    """Fields: revision, supported."""

    code = "database-too-new"
    message = "the database has schema {revision}; this program knows up to {supported}"
    hint = "Use the newer Farpoint that last ran with it."


class DatabaseFault(ConfigServerFault):
    """Fields: reason."""

    code = "database-fault"
    message = "database: {reason}"
    hint = "Check free space and permissions of the state directory; nothing that was answered is lost."
