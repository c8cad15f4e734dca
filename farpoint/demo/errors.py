"""What can end a demo before its comparison."""

from __future__ import annotations

from protocol.errors import LocalFault


class DemoFault(LocalFault):
    """Fields: reason."""

    code = "demo-fault"
    message = "{reason}"


class ProgramEnded(DemoFault):
    """A program of the demo ended, or did what it was asked to in vain. Fields: program, status, log."""

    code = "demo-program-ended"
    message = "{program} ended with status {status}; its last words:\n{log}"


class DemoTookTooLong(DemoFault):
    """Fields: what, seconds, log."""

    code = "demo-took-too-long"
    message = "{what} took longer than {seconds} s; what the programs said last:\n{log}"


class NoFreePort(DemoFault):
    """Fields: first, end."""

    code = "demo-no-free-port"
    message = "no port from {first} to {end} is free"


class DirectoryNotEmpty(DemoFault):
    """Fields: path."""

    code = "demo-directory-not-empty"
    message = "{path} is not empty; the demo keeps its results in a directory of its own"


class ImageToolFailed(DemoFault):
    """Fields: tool, status, text."""

    code = "demo-tool-failed"
    message = "{tool} ended with status {status}: {text}"


class AzuriteMissing(DemoFault):
    """Fields: reason."""

    code = "demo-azurite-missing"
    message = "Azurite, the Azure Blob emulator, is not here: {reason}"
    hint = "`make demo ARGS=--azurite` installs it by itself; without --azurite the demo needs none."
