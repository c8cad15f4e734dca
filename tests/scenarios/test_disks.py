"""A disk shrinks, grows, vanishes, or is another one: that disk stops with its error, and the others go on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from protocol.control import DiskState
from protocol.vocabulary import DiskId
from runtime.exit_codes import ExitCode
from tests.scenarios.disks import MEBIBYTE, SourceDisk
from tests.scenarios.site import Agent, Site

DISK_BYTES = 2 * MEBIBYTE


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine with an intact disk; more disks come and go."""

    site: Site
    agent: Agent
    intact: SourceDisk
    intact_disk: DiskId


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with Site(tmp_path_factory.mktemp("site")) as site:
        agent = site.agent()
        intact = SourceDisk(site.root / "intact.img", size_bytes=DISK_BYTES, seed=40)
        (disk,) = agent.protect(intact)
        yield Machine(site=site, agent=agent, intact=intact, intact_disk=disk)


def shrink(path: Path) -> None:
    os.truncate(path, DISK_BYTES // 2)


def grow(path: Path) -> None:
    os.truncate(path, DISK_BYTES * 2)


def vanish(path: Path) -> None:
    path.rename(path.with_suffix(".away"))


def swap(path: Path) -> None:
    """Another file of the same size takes its name."""
    other = path.with_suffix(".other")
    other.write_bytes(os.urandom(DISK_BYTES))
    path.rename(path.with_suffix(".away"))
    other.rename(path)


MISHAPS: list[tuple[Callable[[Path], None], str]] = [
    (shrink, "disk-resized"),
    (grow, "disk-resized"),
    (vanish, "disk-vanished"),
    (swap, "disk-replaced"),
]


@pytest.mark.parametrize(("mishap", "code"), MISHAPS, ids=[mishap.__name__ for mishap, _ in MISHAPS])
def test_the_disk_stops_with_its_error_and_another_goes_on(
    machine: Machine, tmp_path: Path, mishap: Callable[[Path], None], code: str
) -> None:
    site, agent = machine.site, machine.agent
    source = SourceDisk(tmp_path / f"{mishap.__name__}.img", size_bytes=DISK_BYTES, seed=41)
    (disk,) = agent.protect(source)
    point = site.wait_for_point(disk, after_ns=source.changed_ns)
    before = tmp_path / "before.img"
    before.write_bytes(source.path.read_bytes())
    mishap(source.path)
    row = site.wait_until(f"{mishap.__name__}: the disk stops", lambda: stopped_row(agent, source.path))
    assert row["error"]["code"] == code
    assert str(source.path) in row["error"]["detail"]
    assert row["error"]["hint"]
    status = site.wait_for_state(disk, DiskState.STOPPED)
    assert status.error is not None
    assert status.error.code == code

    machine.intact.change()
    site.wait_for_point(machine.intact_disk, after_ns=machine.intact.changed_ns)
    site.expect_recovered_equal(disk, point, before)
    site.expect_recovered_equal(disk, "latest", before)


def stopped_row(agent: Agent, path: Path) -> dict[str, Any] | None:
    row = agent.disk_at(path)
    return row if row.get("state") == DiskState.STOPPED.value else None


def test_a_disk_that_comes_back_as_it_was_goes_on(machine: Machine, tmp_path: Path) -> None:
    site, agent = machine.site, machine.agent
    source = SourceDisk(tmp_path / "returns.img", size_bytes=DISK_BYTES, seed=42)
    (disk,) = agent.protect(source)
    site.wait_for_point(disk, after_ns=source.changed_ns)
    away = source.path.with_suffix(".away")
    source.path.rename(away)
    site.wait_until("the disk stops", lambda: stopped_row(agent, source.path))
    away.rename(source.path)
    source.change()
    agent.command("scan-now").expect(ExitCode.OK)
    site.wait_until("it is looked at again at once", lambda: not stopped_row(agent, source.path), seconds=10)
    newest = site.wait_for_point(disk, after_ns=source.changed_ns)
    assert agent.gauge("epoch", disk) == 1
    site.expect_recovered_equal(disk, newest, source.path)


def test_what_is_no_disk_cannot_be_protected(machine: Machine, tmp_path: Path) -> None:
    agent = machine.agent
    agent.command("protect", tmp_path / "nowhere.img").expect(ExitCode.NOT_FOUND, "nowhere.img is gone")
    agent.command("protect", tmp_path).expect(ExitCode.FAILURE, "cannot be protected")
    agent.command("protect", "/dev/null").expect(ExitCode.FAILURE, "cannot be protected")
    agent.command("protect").expect(ExitCode.USAGE)
    agent.command("unprotect", tmp_path / "nowhere.img", "--keep").expect(ExitCode.FAILURE, "is not protected")
    agent.command("unprotect", machine.intact.path).expect(ExitCode.USAGE, "--keep or --delete")


def test_a_disk_whose_protection_ends_keeps_its_points(machine: Machine, tmp_path: Path) -> None:
    site, agent = machine.site, machine.agent
    source = SourceDisk(tmp_path / "ended.img", size_bytes=DISK_BYTES, seed=43)
    (disk,) = agent.protect(source)
    point = site.wait_for_point(disk, after_ns=source.changed_ns)
    agent.command("unprotect", source.path, "--keep").expect(ExitCode.OK)
    site.wait_until("it is released", lambda: not agent.disk_at(source.path))
    status = site.wait_until("the server knows", lambda: site.disk(disk))
    assert not status.is_protected
    site.expect_recovered_equal(disk, point, source.path)
