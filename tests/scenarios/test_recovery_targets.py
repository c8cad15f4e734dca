"""Where a disk may be recovered to, and where not: nothing is ever overwritten unasked, nothing half-written passes."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.exit_codes import ExitCode
from tests.scenarios.conftest import ReplicatedSite, replicate_two_points
from tests.scenarios.disks import are_equal
from tests.scenarios.mounts import loop_device, mounted, run_as_root
from tests.scenarios.processes import PROGRAMS, STOP_SECONDS, Finished, clean_environment, wait_until
from tests.scenarios.site import Site


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicatedSite]:
    """All servers have stopped."""
    with Site(tmp_path_factory.mktemp("site")) as site:
        made = replicate_two_points(site)
        site.stop()
        yield made


def full_pipe() -> tuple[int, int]:
    """Reader and writer of a pipe that takes nothing until it is read."""
    reader, writer = os.pipe()
    room_bytes = fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1)
    os.write(writer, bytes(room_bytes))
    return reader, writer


def recover(made: ReplicatedSite, target: Path, *options: str) -> Finished:
    return made.site.from_storage("recover", "--disk", made.disk, "--to", target, *options)


def test_a_file_that_exists_is_kept(replicated: ReplicatedSite, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    recover(replicated, target).expect(ExitCode.FAILURE, "never overwritten")
    recover(replicated, target, "--overwrite-device").expect(ExitCode.FAILURE, "never overwritten")
    assert target.read_text() == "mine"


def test_a_directory_that_is_missing_is_told(replicated: ReplicatedSite, tmp_path: Path) -> None:
    recover(replicated, tmp_path / "nowhere" / "target").expect(ExitCode.NOT_FOUND, "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_device_gets_the_disk_once_it_is_confirmed(replicated: ReplicatedSite, tmp_path: Path) -> None:
    size_bytes = replicated.source.size_bytes
    with loop_device(tmp_path / "device.img", size_bytes=size_bytes) as device:
        recover(replicated, device).expect(ExitCode.USAGE, "--overwrite-device")
        recover(replicated, device, "--overwrite-device").expect(ExitCode.OK)
        assert are_equal(device, replicated.source.path)


def test_a_device_that_is_too_small_is_not_touched(replicated: ReplicatedSite, tmp_path: Path) -> None:
    with loop_device(tmp_path / "device.img", size_bytes=replicated.source.size_bytes // 2) as device:
        recover(replicated, device, "--overwrite-device").expect(ExitCode.FAILURE, "are needed")
        assert not device.read_bytes().strip(b"\0")


def test_a_device_that_is_mounted_is_not_touched(replicated: ReplicatedSite, tmp_path: Path) -> None:
    with loop_device(tmp_path / "device.img", size_bytes=2 * replicated.source.size_bytes) as device:
        run_as_root("mkfs.ext4", "-q", device)
        with mounted(device, tmp_path / "mounted"):
            (tmp_path / "mounted" / "file").write_text("mine")
            recover(replicated, device, "--overwrite-device").expect(ExitCode.LOCKED, "is in use")
            assert (tmp_path / "mounted" / "file").read_text() == "mine"


def test_a_file_system_without_room_is_told_and_nothing_is_left(replicated: ReplicatedSite, tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path / "small", "-t", "tmpfs", "-o", "size=4m"):
        recover(replicated, tmp_path / "small" / "target").expect(ExitCode.FAILURE, "is full")
        assert not list((tmp_path / "small").iterdir())


def test_an_interrupted_recovery_ends_with_130_and_leaves_nothing(replicated: ReplicatedSite, tmp_path: Path) -> None:
    target = tmp_path / "target"
    site = replicated.site
    # why: nobody reads its progress, so that it stands still with its target open until the signal is there
    reader, writer = full_pipe()
    recovering = subprocess.Popen(
        [
            *(PROGRAMS / "farpoint", "recover", "--disk", replicated.disk, "--to", target, "--json"),
            *("--store", site.store_url, "--recovery-key", site.recovery_key),
        ],
        env=clean_environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    os.close(writer)
    try:
        wait_until("it writes", lambda: list(tmp_path.iterdir()), seconds=STOP_SECONDS)
        recovering.send_signal(signal.SIGINT)
        with open(reader, "rb") as progress:
            progress.read()
        _, said = recovering.communicate(timeout=STOP_SECONDS)
    finally:
        recovering.kill()
        recovering.wait()
    assert recovering.returncode == ExitCode.INTERRUPTED, said
    assert "interrupted" in said
    assert not list(tmp_path.iterdir())


def test_an_unknown_disk_or_point_is_not_found(replicated: ReplicatedSite, tmp_path: Path) -> None:
    site, target = replicated.site, tmp_path / "target"
    done = site.from_storage("recover", "--disk", "f" * 32, "--to", target)
    done.expect(ExitCode.NOT_FOUND, replicated.disk)
    recover(replicated, target, "--point", "f" * 32).expect(ExitCode.NOT_FOUND, "nearest")
    recover(replicated, target, "--point", "2001-01-01T00:00:00Z").expect(ExitCode.NOT_FOUND)
    recover(replicated, target, "--point", "the other day").expect(ExitCode.USAGE)
    assert not list(tmp_path.iterdir())
