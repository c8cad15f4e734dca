"""Recovery from hand-made vaults: every point byte for byte, and every kind of damage refused by name."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest
from blake3 import blake3

from protocol.vocabulary import DiskId
from recovery.core.instants import instant_text
from recovery.errors import DeviceHalfWritten, NewestPointHidden, PointDamaged, PointDisputed, TargetExists, TargetFull
from recovery.image_writer import open_target
from recovery.opened_vault import OpenedVault, open_vault
from recovery.rebuild import RebuildProgress, plan_recovery, rebuild_disk
from recovery.verification import image_digest
from storage.backends.local_directory import LocalDirectoryStore
from storage.errors import NotAVault, WrongRecoveryKey
from storage.history import UPLOADS_IN_FLIGHT_MAX, DiskHistory
from storage.keys import parse_recovery_key, serialise_recovery_key
from tests.recovery.made_vault import DISK, MadePoint, MadeVault, erase, make_filled_vault, make_vault, noise, write
from tests.storage.segment_writer import new_vault


async def opened(made: MadeVault) -> OpenedVault:
    """Storage and key file as a stranger finds them."""
    key = parse_recovery_key(made.key_path.read_bytes(), path=str(made.key_path), passphrase=None)
    return await open_vault(LocalDirectoryStore(made.directory / "store"), key)


async def recover(made: MadeVault, selector: str, target: Path) -> list[RebuildProgress]:
    vault = await opened(made)
    plan = await plan_recovery(vault, await vault.find_disk(DISK), selector, executor=None)
    progress: list[RebuildProgress] = []
    image = open_target(target, size_bytes=plan.disk_size_bytes, overwrite_device=False)
    await rebuild_disk(vault, plan, image, executor=None, on_progress=progress.append)
    return progress


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


async def test_every_point_is_recovered_byte_for_byte(tmp_path: Path) -> None:
    made = await make_filled_vault(tmp_path)
    for point in made.points:
        target = tmp_path / f"{point.point}.img"
        progress = await recover(made, point.point, target)
        assert target.read_bytes() == point.image
        assert progress[-1].bytes_read == progress[-1].bytes_to_read
        assert progress[-1].bytes_written == progress[-1].bytes_to_write


async def test_latest_is_the_newest_point_and_an_instant_the_newest_before_it(tmp_path: Path) -> None:
    made = await make_filled_vault(tmp_path)
    await recover(made, "latest", tmp_path / "latest.img")
    assert (tmp_path / "latest.img").read_bytes() == made.points[-1].image
    await recover(made, "2025-11-20T00:54:21+00:00", tmp_path / "then.img")
    assert (tmp_path / "then.img").read_bytes() == made.points[1].image


async def test_a_point_is_recovered_onto_a_block_device(tmp_path: Path, loop_device: Path) -> None:
    made = await make_filled_vault(tmp_path)
    vault = await opened(made)
    plan = await plan_recovery(vault, await vault.find_disk(DISK), "latest", executor=None)
    target = open_target(loop_device, size_bytes=plan.disk_size_bytes, overwrite_device=True)
    await rebuild_disk(vault, plan, target, executor=None)
    expected = made.points[-1].image
    assert loop_device.read_bytes()[: len(expected)] == expected
    assert image_digest(loop_device, size_bytes=len(expected)) == blake3(expected).hexdigest()


async def test_a_damaged_segment_says_that_the_device_is_of_no_use(tmp_path: Path, loop_device: Path) -> None:
    made = await make_filled_vault(tmp_path)
    path = made.segment_path(made.points[1].segment)
    flip(path, path.stat().st_size // 2 - 100)
    vault = await opened(made)
    plan = await plan_recovery(vault, await vault.find_disk(DISK), "latest", executor=None)
    target = open_target(loop_device, size_bytes=plan.disk_size_bytes, overwrite_device=True)
    with pytest.raises(DeviceHalfWritten, match=str(made.points[1].segment)):
        await rebuild_disk(vault, plan, target, executor=None)


async def test_holes_stay_holes(tmp_path: Path) -> None:
    made = await make_vault(tmp_path, disk_size_bytes=64 * 2**20)
    await made.change(write(2**20, noise(1, 65536)), write(2**21, bytes(2**18)), point=True)
    await recover(made, "latest", tmp_path / "image")
    assert os.stat(tmp_path / "image").st_blocks * 512 <= 2 * 65536
    assert (tmp_path / "image").read_bytes() == made.points[0].image


async def test_a_disk_that_shrank_and_grew_does_not_get_its_old_bytes_back(tmp_path: Path) -> None:
    made = await make_vault(tmp_path)
    await made.change(write(0, noise(1, 2**19)), write(3 * 2**20, noise(2, 2**19)))
    await made.next_epoch(disk_size_bytes=2**21)
    await made.change(write(4096, noise(3, 4096)), point=True)
    await made.next_epoch(disk_size_bytes=4 * 2**20)
    await made.change(write(2**21, noise(4, 4096)), point=True)
    for point in made.points:
        await recover(made, point.point, tmp_path / point.point)
        assert (tmp_path / point.point).read_bytes() == point.image


async def test_only_frames_that_are_needed_are_read(tmp_path: Path) -> None:
    made = await make_vault(tmp_path)
    await made.change(write(0, noise(1, 2**20)))
    lost = await made.change(write(0, noise(2, 2**20)), point=True)
    assert lost is not None
    vault = await opened(made)
    plan = await plan_recovery(vault, await vault.find_disk(DISK), "latest", executor=None)
    assert len(plan.rebuild.frames) == 1
    assert plan.bytes_to_write == 2**20
    assert 2**20 < plan.bytes_to_read < 2**20 + 1000


def sealed_place(made: MadeVault, point: MadePoint) -> int:
    """A byte in the middle of the only frame of the point's segment."""
    return made.segment_path(point.segment).stat().st_size // 2


@pytest.mark.parametrize("place", ["header", "frame", "index", "trailer"])
async def test_a_flipped_byte_is_refused_by_its_segments_name_and_the_newest_sound_point_is_told(
    tmp_path: Path, place: str
) -> None:
    made = await make_filled_vault(tmp_path)
    path = made.segment_path(made.points[1].segment)
    size = path.stat().st_size
    flip(path, {"header": 40, "frame": size // 2 - 100, "index": size - 300, "trailer": size - 20}[place])
    for selector in (made.points[1].point, made.points[2].point, "latest"):
        with pytest.raises(PointDamaged) as caught:
            await recover(made, selector, tmp_path / "image")
        assert caught.value.segment == str(made.points[1].segment)
        assert made.points[0].point in str(caught.value)
        assert not list(tmp_path.glob("image*")), "nothing half-named is left"
    await recover(made, made.points[0].point, tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == made.points[0].image


async def test_every_single_flipped_byte_is_found_or_harmless(tmp_path: Path) -> None:
    made = await make_vault(tmp_path, disk_size_bytes=2**16)
    point = await made.change(write(512, noise(1, 64)), erase(4096, 512), point=True)
    assert point is not None
    path = made.segment_path(point.segment)
    sound = path.read_bytes()
    for place in range(len(sound)):
        flip(path, place)
        with pytest.raises(PointDamaged):
            await recover(made, "latest", tmp_path / "image")
        path.write_bytes(sound)
    await recover(made, "latest", tmp_path / "image")


async def test_a_missing_segment_is_named(tmp_path: Path) -> None:
    made = await make_filled_vault(tmp_path)
    made.segment_path(made.points[1].segment).unlink()
    with pytest.raises(PointDamaged) as caught:
        await recover(made, "latest", tmp_path / "image")
    assert caught.value.segment == str(made.points[1].segment)


async def test_a_missing_newest_segment_is_noticed_by_the_point_record(tmp_path: Path) -> None:
    made = await make_vault(tmp_path)
    await made.change(write(0, noise(1, 4096)), point=True)
    await made.change(write(0, noise(2, 4096)), point=True)
    made.segment_path(made.points[1].segment).unlink()
    with pytest.raises(PointDamaged) as caught:
        await recover(made, "latest", tmp_path / "image")
    assert caught.value.segment == str(made.points[1].segment)
    assert made.points[0].point in str(caught.value)


async def test_swapped_segments_are_refused(tmp_path: Path) -> None:
    made = await make_filled_vault(tmp_path)
    first, second = (made.segment_path(point.segment) for point in made.points[:2])
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(PointDamaged) as caught:
        await recover(made, "latest", tmp_path / "image")
    assert caught.value.segment == str(made.points[0].segment)


async def test_a_damaged_segment_behind_the_newest_point_does_not_make_it_pass_for_the_newest(tmp_path: Path) -> None:
    made = await make_vault(tmp_path)
    await made.change(write(0, noise(1, 4096)), point=True)
    hidden = await made.change(write(0, noise(2, 4096)), point=True, publish=False)
    assert hidden is not None
    flip(made.segment_path(hidden.segment), 60)
    with pytest.raises(NewestPointHidden) as caught:
        await recover(made, "latest", tmp_path / "image")
    assert caught.value.segment == str(hidden.segment)
    await recover(made, made.points[0].point, tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == made.points[0].image


async def test_damage_behind_the_next_point_does_not_stand_in_the_way_of_an_instant(tmp_path: Path) -> None:
    made = await make_vault(tmp_path)
    await made.change(write(0, noise(1, 4096)), point=True)
    await made.change(write(0, noise(2, 4096)), point=True)
    hidden = await made.change(write(0, noise(3, 4096)), point=True, publish=False)
    assert hidden is not None
    flip(made.segment_path(hidden.segment), 60)
    await recover(made, instant_text(made.points[0].instant_ns), tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == made.points[0].image
    with pytest.raises(NewestPointHidden):
        await recover(made, instant_text(made.points[1].instant_ns), tmp_path / "newer")


@pytest.mark.parametrize("later", [1, UPLOADS_IN_FLIGHT_MAX])
async def test_only_a_gap_that_uploads_under_way_explain_is_passed_over(tmp_path: Path, later: int) -> None:
    """A lost segment whose points have no records hides them; one that is on its way was never committed."""
    made = await make_vault(tmp_path)
    await made.change(write(0, noise(1, 4096)), point=True)
    lost = await made.change(write(0, noise(2, 4096)), point=True, publish=False)
    assert lost is not None
    for number in range(later):
        await made.change(write(0, noise(3 + number, 4096)), point=True, publish=False)
    made.segment_path(lost.segment).unlink()
    if later < UPLOADS_IN_FLIGHT_MAX:
        await recover(made, "latest", tmp_path / "image")
    else:
        with pytest.raises(NewestPointHidden) as caught:
            await recover(made, "latest", tmp_path / "image")
        assert caught.value.segment == str(lost.segment)
        await recover(made, made.points[0].point, tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == made.points[0].image


async def test_a_segment_lost_from_an_epoch_that_was_closed_hides_what_followed(tmp_path: Path) -> None:
    made = await make_vault(tmp_path)
    await made.change(write(0, noise(1, 4096)), point=True)
    lost = await made.change(write(0, noise(2, 4096)), point=True, publish=False)
    assert lost is not None
    await made.next_epoch()
    await made.change(write(0, noise(3, 4096)), point=True, publish=False)
    made.segment_path(lost.segment).unlink()
    with pytest.raises(NewestPointHidden) as caught:
        await recover(made, "latest", tmp_path / "image")
    assert caught.value.segment == str(lost.segment)


async def test_a_point_record_that_contradicts_the_history_is_refused(tmp_path: Path) -> None:
    made = await make_vault(tmp_path)
    point = await made.change(write(0, noise(1, 4096)), point=True, publish=False)
    await made.change(write(0, noise(2, 4096)))
    assert point is not None
    await made.publish_point(point, sequence=2)
    with pytest.raises(PointDisputed):
        await recover(made, "latest", tmp_path / "image")


async def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    made = await make_filled_vault(tmp_path)
    vault = await opened(made)
    plan = await plan_recovery(vault, await vault.find_disk(DISK), "latest", executor=None)
    target = open_target(tmp_path / "image", size_bytes=plan.disk_size_bytes, overwrite_device=False)
    (tmp_path / "image").write_text("mine")
    with pytest.raises(TargetExists):
        await rebuild_disk(vault, plan, target, executor=None)
    assert (tmp_path / "image").read_text() == "mine"
    assert not (tmp_path / "image.partial").exists()


async def test_a_cancelled_rebuild_leaves_nothing(tmp_path: Path) -> None:
    made = await make_filled_vault(tmp_path)
    vault = await opened(made)
    plan = await plan_recovery(vault, await vault.find_disk(DISK), "latest", executor=None)
    target = open_target(tmp_path / "image", size_bytes=plan.disk_size_bytes, overwrite_device=False)

    def cancel(progress: RebuildProgress) -> None:
        running.cancel()

    async with asyncio.TaskGroup() as group:
        running = group.create_task(rebuild_disk(vault, plan, target, executor=None, on_progress=cancel))
    assert running.cancelled()
    assert not list(tmp_path.glob("image*"))


async def test_writes_that_fail_together_are_told_once_and_none_is_left_to_the_loop(tmp_path: Path) -> None:
    """Found by torture: ENOSPC at all writes of a recovery ended with its error, and a traceback beside it."""
    made = await make_vault(tmp_path)
    for number in range(3):
        await made.change(write(number * 2**20, noise(number, 2**20)), point=True)
    vault = await opened(made)
    plan = await plan_recovery(vault, await vault.find_disk(DISK), "latest", executor=None)
    loop = asyncio.get_running_loop()
    told: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: told.append(context))
    target = FailingTarget(loop)
    with ThreadPoolExecutor() as executor, pytest.raises(TargetFull):
        await rebuild_disk(vault, plan, target, executor=executor)
    assert target.failures > 1
    gc.collect()
    assert not told


class FailingTarget:
    """The first write fails at once, every other when the first one's failure has ended the rebuild."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.failures = 0
        self._loop = loop
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def prepare(self, holes: object, *, data_bytes: int) -> None:
        return

    def write(self, offset_bytes: int, data: memoryview) -> None:
        with self._lock:
            self.failures += 1
            is_first = self.failures == 1
        while not is_first and not self._is_ending():
            continue
        raise TargetFull(path=Path("nowhere"), needed_bytes=1)

    def finish(self) -> None:
        raise AssertionError("nothing was written")

    def _is_ending(self) -> bool:
        asked: Future[bool] = Future()
        self._loop.call_soon_threadsafe(
            lambda: asked.set_result(any(task.cancelling() for task in asyncio.all_tasks(self._loop)))
        )
        return asked.result()


async def test_a_point_that_is_committed_while_the_vault_is_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by torture: a recovery of `latest` beside running replication called the newest point damaged."""
    made = await make_filled_vault(tmp_path)
    newest = made.points[-1].point
    vault = await opened(made)
    read_history = vault.archive.history

    async def history(disk: DiskId) -> DiskHistory:
        found = await read_history(disk)
        await made.change(write(0, noise(9, 4096)), point=True)
        return found

    monkeypatch.setattr(vault.archive, "history", history)
    assert (await vault.catalogue(DISK)).choose("latest").point == newest
    assert (await vault.catalogue(DISK)).choose("latest").point != newest


async def test_another_vaults_key_and_a_revoked_key_are_refused(tmp_path: Path) -> None:
    made = await make_filled_vault(tmp_path)
    stranger = new_vault.__wrapped__()
    made.key_path.write_bytes(serialise_recovery_key(stranger.recovery_keys[0], passphrase=None))
    with pytest.raises(NotAVault):
        await opened(made)


async def test_a_key_that_the_vault_was_never_wrapped_to_is_refused(tmp_path: Path) -> None:
    made = await make_filled_vault(tmp_path)
    text = serialise_recovery_key(new_vault.__wrapped__().recovery_keys[0], passphrase=None).decode()
    theirs = parse_recovery_key(text.encode(), path="-", passphrase=None).authority_fingerprint
    made.key_path.write_text(text.replace(theirs, new_vault().description.authority_fingerprint))
    with pytest.raises(WrongRecoveryKey):
        await opened(made)
