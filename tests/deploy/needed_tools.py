"""Tools of Debian that some of these tests need: without them a test is skipped and says so, and fails in CI."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def not_here(reason: str) -> None:
    """Skips the test, or fails it in CI."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def need_tool(tool: str, package: str) -> None:
    """Goes on only if the tool is installed."""
    if shutil.which(tool) is None:
        not_here(f"{tool} is not installed: apt-get install {package}")


def run(*command: object, cwd: Path = ROOT) -> str:
    """What the command says, on stdout and stderr together; fails the test with it if the command failed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}"
    return done.stdout
