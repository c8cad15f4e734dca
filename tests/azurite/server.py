"""A real Azurite (the Azure Blob emulator) for the length of a block: own port, own directory, ended by its process.

Where it is not installed, tests are skipped; in CI they fail.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from farpoint.demo.azurite import Azurite, azurite_command, running_azurite_of, why_missing


def require_azurite() -> None:
    """Skips, or in CI fails, if there is none."""
    if reason := why_missing():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"did not run without Azurite: {reason}")


@contextmanager
def running_azurite(location: Path) -> Iterator[Azurite]:
    """Starts Azurite with its data in `location` and waits until it listens."""
    require_azurite()
    log_path = location / "azurite.log"
    with open(log_path, "wb") as log:
        process = subprocess.Popen(azurite_command(location, port=0), stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        said = ""
        for line in process.stdout:
            said += line
            if server := running_azurite_of(said):
                yield server
                return
        pytest.fail(f"Azurite ended with {process.wait()}: {said}{log_path.read_text(errors='replace')}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
