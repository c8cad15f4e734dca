"""Two processes never share a state directory; a secret is written once, for its owner only, and read with typed
errors.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from runtime import secrets
from runtime.errors import SecretExists, SecretMissing, SecretUnreadable, StateLocked
from runtime.exit_codes import ExitCode, exit_code_of
from runtime.locks import exclusive_lock
from runtime.secrets import SECRET_BYTES_MAX, read_secret, write_secret

HOLD = """
import sys
from runtime.locks import exclusive_lock
with exclusive_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_that_another_process_holds_is_told_with_its_process_id(tmp_path: Path) -> None:
    path = tmp_path / "state" / ".lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StateLocked) as caught, exclusive_lock(path):
            pytest.fail("two processes hold the lock")
        assert caught.value.holder == str(holder.pid)
        assert exit_code_of(caught.value) is ExitCode.LOCKED
        holder.kill()
        holder.wait()
    with exclusive_lock(path):
        assert path.read_text() == f"{os.getpid()}\n"


def test_a_lock_is_exclusive_within_a_process_too_and_ends_with_its_block(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with exclusive_lock(path), pytest.raises(StateLocked), exclusive_lock(path):
        pytest.fail("held twice")
    with exclusive_lock(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_secret_is_for_its_owner_only_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_secret(tmp_path / "key", b"secret")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert read_secret(tmp_path / "key") == b"secret"


@pytest.mark.parametrize(("mode", "is_told"), [(0o600, False), (0o440, False), (0o644, True)])
def test_a_secret_that_everybody_can_read_is_told(
    tmp_path: Path, mode: int, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # why: a logger keeps the configuration of its first use, in whichever test that was
    monkeypatch.setattr(secrets, "log", structlog.get_logger())
    path = tmp_path / "key"
    write_secret(path, b"secret")
    path.chmod(mode)
    with capture_logs() as logs:
        assert read_secret(path) == b"secret"
    assert [entry.get("path") for entry in logs] == [str(path)] * is_told


def test_a_secret_is_never_overwritten_nor_written_through_a_link(tmp_path: Path) -> None:
    write_secret(tmp_path / "key", b"first")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("key", "link"):
        with pytest.raises(SecretExists):
            write_secret(tmp_path / name, b"second")
    assert read_secret(tmp_path / "key") == b"first"
    assert not (tmp_path / "elsewhere").exists()


def test_a_secret_that_cannot_be_written_whole_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(SecretUnreadable, match="no space"):
            write_secret(tmp_path / "key", b"secret")
    write_secret(tmp_path / "key", b"secret")


def test_a_secret_in_a_directory_that_is_missing_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(SecretUnreadable):
        write_secret(tmp_path / "missing" / "key", b"secret")


def test_reading_a_missing_large_or_impossible_secret_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(SecretMissing):
        read_secret(tmp_path / "missing")
    (tmp_path / "large").write_bytes(bytes(SECRET_BYTES_MAX + 1))
    with pytest.raises(SecretUnreadable, match="larger"):
        read_secret(tmp_path / "large")
    with pytest.raises(SecretUnreadable):
        read_secret(tmp_path)
