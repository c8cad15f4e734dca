"""The documented exit codes of all programs, and which error ends with which.

Invariant: the table is keyed by `ReplicationError.code`; a type without a row of its own takes that of its nearest
ancestor.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

from protocol.errors import RefusedByPeer, ReplicationError


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


EXIT_CODE_OF_ERROR: dict[str, ExitCode] = {
    "replication-error": ExitCode.FAILURE,
    "object-not-found": ExitCode.NOT_FOUND,
    "store-missing": ExitCode.NOT_FOUND,
    "not-a-vault": ExitCode.NOT_FOUND,
    "secret-missing": ExitCode.NOT_FOUND,
    "machine-not-found": ExitCode.NOT_FOUND,
    "disk-not-found": ExitCode.NOT_FOUND,
    "point-not-found": ExitCode.NOT_FOUND,
    "not-found": ExitCode.NOT_FOUND,
    "state-locked": ExitCode.LOCKED,
    "not-permitted": ExitCode.NOT_PERMITTED,
    "store-not-permitted": ExitCode.NOT_PERMITTED,
    "setting-unknown": ExitCode.USAGE,
    "setting-invalid": ExitCode.USAGE,
    "settings-file-invalid": ExitCode.USAGE,
    "store-url-invalid": ExitCode.USAGE,
}


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit code of an error, of the first of a group, or of what a peer refused with."""
    if isinstance(error, BaseExceptionGroup):
        return exit_code_of(error.exceptions[0])
    if isinstance(error, RefusedByPeer):
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
