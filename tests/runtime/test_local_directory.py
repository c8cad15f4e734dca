"""The local file system passes the contract, and keeps what it says about modes, whole replacement and its own
leftovers.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from runtime import local_directory
from runtime.local_directory import LocalDirectory, LocalFile, write_fully
from tests.runtime.directory_contract import DurableDirectoryContract


@pytest.fixture
def directory(tmp_path: Path) -> LocalDirectory:
    return LocalDirectory(tmp_path / "state")


class TestLocalDirectoryKeepsTheContract(DurableDirectoryContract):
    pass


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_directories_and_files_are_for_their_owner_only(tmp_path: Path) -> None:
    directory = LocalDirectory(tmp_path / "one" / "two")
    directory.replace("replaced", b"x")
    directory.open("opened", create=True).close()
    directory.open("direct", create=True, direct=True).close()
    assert [mode_of(tmp_path / name) for name in ("one", "one/two")] == [0o700, 0o700]
    assert [mode_of(tmp_path / "one" / "two" / name) for name in directory.names()] == [0o600] * 3


def test_an_unfinished_replacement_is_not_listed_and_the_next_one_takes_its_place(directory: LocalDirectory) -> None:
    (directory.path / ".state.new").write_bytes(b"torn, and longer than what follows")
    assert directory.names() == []
    directory.replace("state", b"whole")
    assert directory.read("state") == b"whole"
    assert os.listdir(directory.path) == ["state"]


def test_a_failed_replacement_leaves_the_old_contents(
    directory: LocalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory.replace("state", b"old")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="injected"):
        directory.replace("state", b"new")
    monkeypatch.undo()
    assert directory.read("state") == b"old"


def test_what_is_durable_on_return_was_synchronized_in_order(
    directory: LocalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def record(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object, **options: object) -> object:
            target = arguments[0]
            kind = "directory" if isinstance(target, int) and stat.S_ISDIR(os.fstat(target).st_mode) else "file"
            calls.append(f"{name} {kind}" if name == "fsync" else name)
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, call)

    for name in ("pwritev", "fsync", "rename", "unlink", "fdatasync"):
        record(name)
    directory.replace("state", b"x")
    assert calls == ["pwritev", "fsync file", "rename", "fsync directory"]
    calls.clear()
    file = directory.open("log", create=True, preallocate_bytes=4096)
    assert calls == ["fsync file", "fsync directory"]
    calls.clear()
    file.write(0, [b"x"])
    file.synchronize()
    assert calls == ["pwritev", "fdatasync"]
    file.close()
    calls.clear()
    directory.remove("log")
    assert calls == ["unlink", "fsync directory"]


def test_a_creation_without_space_leaves_no_file(directory: LocalDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="no space"):
        directory.open("log", create=True, preallocate_bytes=4096)
    assert os.listdir(directory.path) == []


def test_a_file_system_without_direct_io_is_written_buffered(
    directory: LocalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse_direct(path: object, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            os.close(real(path, flags & ~os.O_DIRECT, mode))  # as Linux does: the file is made, then refused
            raise OSError(errno.EINVAL, "no direct I/O")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse_direct)
    file = directory.open("log", create=True, direct=True)
    assert isinstance(file, LocalFile)
    assert not file.is_direct
    file.write(0, [b"x" * 4096])
    assert file.size_bytes() == 4096
    file.close()


def test_a_symbolic_link_is_not_followed(directory: LocalDirectory, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"secret")
    (directory.path / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="symbolic"):
        directory.read("link")
    assert directory.names() == []


def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    monkeypatch.setattr(
        local_directory.os,
        "pwritev",
        lambda descriptor, views, offset: real(descriptor, [b"".join(views)[:7]], offset),
    )
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    write_fully(descriptor, 3, [b"0123", b"", b"456789abcdef", b"g"])
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"\0\0\x000123456789abcdefg"
