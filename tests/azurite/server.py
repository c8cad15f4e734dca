"""A real Azurite (the Azure Blob emulator) for the length of a block: own port, own directory, ended by its process.

It is installed by `make azurite` into the ignored directory `.node/`. Where it is not, tests are skipped; in CI they
fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

MAIN = Path(__file__).parents[2] / ".node" / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Azurite's published key, the same for everybody."""

_LISTENS = re.compile(r"successfully listens on (http://127\.0\.0\.1:\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Azurite:
    """origin: `http://127.0.0.1:port`; endpoint: the account's blob service there."""

    origin: str

    @property
    def endpoint(self) -> str:
        return f"{self.origin}/{ACCOUNT}"

    @property
    def connection_string(self) -> str:
        return f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={self.endpoint};"


def reason_to_skip() -> str:
    """Why there is no Azurite here; empty if there is."""
    if shutil.which("node") is None:
        return "Azurite needs node, which is not installed"
    return "" if MAIN.exists() else "Azurite is not installed; `make azurite` does it"


@contextmanager
def running_azurite(location: Path) -> Iterator[Azurite]:
    """Starts Azurite with its data in `location` and waits until it listens. Skips, or in CI fails, if there is
    none.
    """
    if reason := reason_to_skip():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    # why: not through npx, which leaves node behind when it is ended; port 0 is any free one, printed when it listens
    command = ["node", str(MAIN), "--blobHost", "127.0.0.1", "--blobPort", "0", "--location", str(location)]
    command += ["--disableTelemetry", "--skipApiVersionCheck"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if found := _LISTENS.search(line):
                # why: it logs every request to stdout, and would stop when nobody reads
                drain = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
                try:
                    yield Azurite(origin=found[1])
                finally:
                    process.terminate()
                    drain.wait(30)
                return
        pytest.fail(f"Azurite ended with {process.wait()}: {said}")
    finally:
        process.kill()
        process.wait()
