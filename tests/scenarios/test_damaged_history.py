"""Something happened to the store: `farpoint recover` names the segment, says what can still be recovered, and that
can be recovered; nothing is ever left at the target that is not the disk.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from protocol.vocabulary import DiskId
from runtime.exit_codes import ExitCode
from tests.scenarios.conftest import replicate_two_points
from tests.scenarios.disks import MEBIBYTE, SourceDisk, are_equal
from tests.scenarios.processes import Finished, call_command
from tests.scenarios.site import Site

POINT = re.compile(r"recovered: ([0-9a-f]{32}) of |still can: ([0-9a-f]{32}) of ")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppedSite:
    """A site whose servers have all stopped, with what its disk held at each point."""

    site: Site
    source: SourceDisk
    first_version: Path
    disk: DiskId
    older: str
    newer: str
    other_disk: DiskId

    def segments(self, store: Path, disk: DiskId | None = None) -> list[Path]:
        return sorted(store.glob(f"vaults/*/disks/{disk or self.disk}/*/*.seg"))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoppedSite]:
    with Site(tmp_path_factory.mktemp("site")) as site:
        agent = site.agent()
        source = SourceDisk(site.root / "source.img", size_bytes=12 * MEBIBYTE, seed=21)
        other = SourceDisk(site.root / "other.img", size_bytes=2 * MEBIBYTE, seed=22)
        disk, other_disk = agent.protect(source, other)
        older = site.wait_for_point(disk, after_ns=source.changed_ns)
        site.wait_for_point(other_disk, after_ns=other.changed_ns)
        first_version = site.root / "first-version.img"
        shutil.copyfile(source.path, first_version)
        source.change()
        newer = site.wait_for_point(disk, after_ns=source.changed_ns)
        site.wait_until("the points are published", lambda: all(point.is_published for point in site.points(disk)))
        site.stop()
        yield StoppedSite(
            site=site,
            source=source,
            first_version=first_version,
            disk=disk,
            older=older,
            newer=newer,
            other_disk=other_disk,
        )


@pytest.fixture
def store(stopped: StoppedSite, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(stopped.site.store_directory, tmp_path / "store")


def recover(stopped: StoppedSite, store: Path, point: str, target: Path) -> Finished:
    return stopped.site.from_storage(
        "recover", "--disk", stopped.disk, "--point", point, "--to", target, "--json", store=store
    )


def segments_of(stopped: StoppedSite, store: Path, point: str) -> list[Path]:
    """Those that the point is made of; its bookmark is in the last."""
    planned = stopped.site.from_storage(
        "recover", "--disk", stopped.disk, "--point", point, "--dry-run", "--json", store=store
    )
    count: int = planned.expect(ExitCode.OK).last_json_line["segments"]
    return stopped.segments(store)[:count]


def changed_segment(stopped: StoppedSite, store: Path) -> Path:
    """The segment that makes the difference between the two points: every point before it is of the first version."""
    between = segments_of(stopped, store, stopped.newer)[len(segments_of(stopped, store, stopped.older)) :]
    return max(between, key=lambda path: path.stat().st_size)


def name_in(store: Path, segment: Path) -> str:
    return segment.relative_to(store).as_posix()


def truncate(segment: Path, stopped: StoppedSite) -> None:
    os.truncate(segment, segment.stat().st_size // 2)


def empty(segment: Path, stopped: StoppedSite) -> None:
    os.truncate(segment, 0)


def flip_in_the_header(segment: Path, stopped: StoppedSite) -> None:
    flip(segment, 40)


def flip_in_the_middle(segment: Path, stopped: StoppedSite) -> None:
    flip(segment, segment.stat().st_size // 2)


def flip_in_the_trailer(segment: Path, stopped: StoppedSite) -> None:
    flip(segment, segment.stat().st_size - 8)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    replace(path, bytes(data))


def replace(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


def take_the_one_before(segment: Path, stopped: StoppedSite) -> None:
    segments = sorted(segment.parent.glob("*.seg"))
    replace(segment, segments[segments.index(segment) - 1].read_bytes())


def take_another_disks(segment: Path, stopped: StoppedSite) -> None:
    store = next(parent for parent in segment.parents if parent.name == "store")
    replace(segment, stopped.segments(store, stopped.other_disk)[0].read_bytes())


def lose(segment: Path, stopped: StoppedSite) -> None:
    segment.unlink()


def lose_all_from_here(segment: Path, stopped: StoppedSite) -> None:
    for path in segment.parent.glob("*.seg"):
        if path >= segment:
            path.unlink()


DAMAGES: list[Callable[[Path, StoppedSite], None]] = [
    truncate,
    empty,
    flip_in_the_header,
    flip_in_the_middle,
    flip_in_the_trailer,
    take_the_one_before,
    take_another_disks,
    lose,
    lose_all_from_here,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_what_it_spares_is_recovered(
    stopped: StoppedSite, store: Path, tmp_path: Path, damage: Callable[[Path, StoppedSite], None]
) -> None:
    segment = changed_segment(stopped, store)
    damage(segment, stopped)
    target = tmp_path / "recovered.img"
    done = recover(stopped, store, stopped.newer, target)
    done.expect(ExitCode.FAILURE, name_in(store, segment))
    assert not list(tmp_path.glob("recovered.img*")), "nothing is left at the target"
    found = POINT.search(done.stderr)
    assert found, done.stderr
    spared = found[1] or found[2]
    recover(stopped, store, spared, target).expect(ExitCode.OK)
    assert are_equal(target, stopped.first_version)
    assert recover(stopped, store, "latest", tmp_path / "latest.img").exit_code == ExitCode.FAILURE, (
        "an older point never passes for the newest"
    )


def test_a_forged_segment_is_refused(stopped: StoppedSite, store: Path, tmp_path: Path) -> None:
    """One of the same disk, epoch and ordinal, whole and signed, under another vault's authority."""
    with Site(_made(tmp_path / "forgery")) as forger:
        made = replicate_two_points(forger)
        forger.stop()
        (forged,) = sorted(forger.store_directory.glob(f"vaults/*/disks/{made.disk}/*/*.seg"))[:1]
        data = forged.read_bytes()
    segment = stopped.segments(store)[0]
    replace(segment, data)
    done = recover(stopped, store, stopped.newer, tmp_path / "recovered.img")
    done.expect(ExitCode.FAILURE, name_in(store, segment), "none")
    assert not list(tmp_path.glob("recovered.img*"))


def test_the_list_of_points_tells_of_damage(stopped: StoppedSite, store: Path) -> None:
    lose(changed_segment(stopped, store), stopped)
    done = stopped.site.from_storage("points", "--disk", stopped.disk, "-o", "json", store=store)
    done.expect(ExitCode.PARTIAL, "damage:")
    recoverable = {row["point"]: row["recoverable"] for row in done.json}
    assert recoverable[stopped.older] is True
    assert recoverable[stopped.newer] is False


def test_a_damaged_point_record_does_not_stand_in_the_way(stopped: StoppedSite, store: Path, tmp_path: Path) -> None:
    (record,) = store.glob(f"vaults/*/points/{stopped.newer}.point")
    flip(record, record.stat().st_size // 2)
    done = recover(stopped, store, stopped.newer, tmp_path / "recovered.img")
    assert done.exit_code == ExitCode.OK, done.stderr
    assert are_equal(tmp_path / "recovered.img", stopped.source.path)


# keys and stores


def test_the_recovery_key_of_another_vault_opens_nothing(stopped: StoppedSite, store: Path, tmp_path: Path) -> None:
    other = make_vault(tmp_path / "other", tmp_path / "other.key")
    other.expect(ExitCode.OK)
    done = stopped.site.from_storage("disks", store=store, key=tmp_path / "other.key")
    done.expect(ExitCode.NOT_FOUND, "holds no vault of this recovery key")
    assert not done.stdout


def make_vault(store: Path, key: Path, *more: object) -> Finished:
    return call_command(
        *("farpoint", "vault", "init", "--store", f"file://{store}", "--recovery-key", key, "--single-recovery-key"),
        *("--authority-key", key.with_suffix(".authority"), *more),
    )


def test_a_passphrase_is_needed_and_must_be_right(tmp_path: Path) -> None:
    right, wrong, key = tmp_path / "right", tmp_path / "wrong", tmp_path / "recovery.key"
    right.write_text("open sesame\n")
    wrong.write_text("open barley\n")
    make_vault(tmp_path / "store", key, "--passphrase-file", right).expect(ExitCode.OK)

    def check(*arguments: object) -> Finished:
        store = f"file://{tmp_path / 'store'}"
        return call_command("farpoint", "vault", "check-key", "--store", store, "--recovery-key", key, *arguments)

    check("--passphrase-file", right).expect(ExitCode.OK)
    check("--passphrase-file", wrong).expect(ExitCode.FAILURE, "recovery key", "passphrase")
    check().expect(ExitCode.USAGE, "needs its passphrase")


def test_a_damaged_recovery_key_is_refused(stopped: StoppedSite, store: Path, tmp_path: Path) -> None:
    key = tmp_path / "recovery.key"
    for data in (b"", b"not a key\n", stopped.site.recovery_key.read_bytes()[:-20]):
        key.write_bytes(data)
        stopped.site.from_storage("disks", store=store, key=key).expect(ExitCode.FAILURE, "recovery key")
    stopped.site.from_storage("disks", store=store, key=tmp_path / "none").expect(ExitCode.NOT_FOUND)


def test_a_vault_is_never_made_over_another(stopped: StoppedSite, tmp_path: Path) -> None:
    key = stopped.site.recovery_key
    before = key.read_bytes()
    make_vault(tmp_path / "new", key).expect(ExitCode.FAILURE, "never overwritten")
    assert key.read_bytes() == before


def test_a_store_that_is_missing_is_not_found(stopped: StoppedSite, tmp_path: Path) -> None:
    done = recover(stopped, tmp_path / "nowhere", "latest", tmp_path / "recovered.img")
    done.expect(ExitCode.NOT_FOUND, "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "empty").mkdir()
    recover(stopped, tmp_path / "empty", "latest", tmp_path / "recovered.img").expect(ExitCode.NOT_FOUND)


def test_a_vault_of_a_newer_format_is_left_alone(stopped: StoppedSite, store: Path, tmp_path: Path) -> None:
    (vault,) = store.glob("vaults/*/vault.json")
    replace(vault, re.sub(rb'"version":\s*1\b', b'"version": 2', vault.read_bytes(), count=1))
    done = recover(stopped, store, "latest", tmp_path / "recovered.img")
    done.expect(ExitCode.FAILURE, "format version 2", "newer Farpoint")


def _made(path: Path) -> Path:
    path.mkdir()
    return path
