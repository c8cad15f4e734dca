"""The documented exit codes of all programs, and which error ends with which.

Invariant: the table is keyed by `ReplicationError.code`; a type without a row of its own takes that of its nearest
ancestor.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Final

from protocol.errors import ReplicationError


class ExitCode(enum.IntEnum):
    """What a program's exit status means."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    PARTIAL = 3
    """Part of the work was done, or a recovery point objective is missed."""
    NOT_FOUND = 10
    LOCKED = 11
    NOT_PERMITTED = 12
    INTERRUPTED = 130


_ENDS_WITH: dict[ExitCode, tuple[str, ...]] = {
    ExitCode.FAILURE: ("replication-error",),
    ExitCode.USAGE: (
        "setting-unknown", "setting-invalid", "settings-file-invalid", "store-url-invalid", "join-token-malformed",
        "point-selector-invalid", "point-ambiguous", "disk-ambiguous", "passphrase-missing", "passphrase-empty",
        "device-not-confirmed", "package-invalid", "known-hosts-unusable",
    ),
    ExitCode.NOT_FOUND: (
        "not-found", "object-not-found", "disk-not-found", "point-not-found", "position-not-found", "disk-vanished",
        "store-missing", "target-missing", "secret-missing", "not-a-vault", "not-enrolled", "not-initialised",
        "package-missing",
    ),
    ExitCode.LOCKED: ("state-locked", "target-in-use", "host-locked"),
    ExitCode.NOT_PERMITTED: (
        "not-permitted", "store-not-permitted", "disk-permission-denied", "disk-of-another-machine",
        "credential-missing", "operator-token-refused", "join-token-wrong", "join-token-used", "join-token-expired",
        "join-token-for-another-role", "host-key-unknown", "host-key-changed", "host-key-refused", "login-refused",
        "root-needed",
    ),
}  # fmt: skip

EXIT_CODE_OF_ERROR: Final = {code: exit_code for exit_code, codes in _ENDS_WITH.items() for code in codes}


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit code of an error, of the first of a group, or of what a peer refused with."""
    if isinstance(error, BaseExceptionGroup):
        return exit_code_of(error.exceptions[0])
    if isinstance(error, ReplicationError) and "peer_code" in error.fields:
        return EXIT_CODE_OF_ERROR.get(str(error.fields["peer_code"]), ExitCode.FAILURE)
    if isinstance(error, ReplicationError):
        codes = (kind.code for kind in type(error).__mro__ if issubclass(kind, ReplicationError))
        return next(EXIT_CODE_OF_ERROR[code] for code in codes if code in EXIT_CODE_OF_ERROR)
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if isinstance(error, FileNotFoundError):
        return ExitCode.NOT_FOUND
    if isinstance(error, PermissionError):
        return ExitCode.NOT_PERMITTED
    return ExitCode.FAILURE


def expected_errors(error: BaseException) -> Iterator[ReplicationError | OSError]:
    """The typed errors and OSErrors in an error or (nested) group of errors; the rest of a group is left out."""
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from expected_errors(member)
    elif isinstance(error, ReplicationError | OSError):
        yield error


def is_expected(error: BaseException) -> bool:
    """Whether an error, or all of a group, are of the kinds that an operator is told without a traceback."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_expected(member) for member in error.exceptions)
    return isinstance(error, ReplicationError | OSError)
