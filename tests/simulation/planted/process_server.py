"""Defects of the process server and of the configuration server's cores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import config_server.core.grants
import config_server.core.rpo
import config_server.core.server_clock
import process_server.reporting
import process_server.state_file
import process_server.vault_key
from process_server.cache import Cache
from process_server.cache_files import CacheFiles
from process_server.disk_history import DiskHistory
from process_server.sealer import Sealer
from process_server.server_clock import ServerClock
from process_server.service import ProcessServer, ProcessServerPorts
from process_server.uploader import Uploader
from storage.errors import StoreFault
from tests.simulation.planted.seams import SeamMoved, counted, replace, seam_calls


class _LateSynchronize:
    """A file whose synchronize returns at once and happens when the next one is asked for."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._is_due = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, offset_bytes: int, buffers: Any) -> None:
        if self._is_due:
            self._file.synchronize()
        self._file.write(offset_bytes, buffers)

    def synchronize(self) -> None:
        seam_calls["_LateSynchronize.synchronize"] += 1
        self._is_due = True


class _DeafSynchronize(_LateSynchronize):
    """A file whose synchronize says that all is well when it is not."""

    def write(self, offset_bytes: int, buffers: Any) -> None:
        self._file.write(offset_bytes, buffers)

    def synchronize(self) -> None:
        seam_calls["_DeafSynchronize.synchronize"] += 1
        try:
            self._file.synchronize()
        except OSError:
            return


def _wrap_active_file(wrapper: type[_LateSynchronize]) -> None:
    def make(append: Any) -> Any:
        def append_to_wrapped(self: Any, records: Any) -> Any:
            if not hasattr(self, "_active"):
                raise SeamMoved("CacheFiles._active")
            if self._active is not None and not isinstance(self._active, wrapper):
                self._active = wrapper(self._active)
            return append(self, records)

        return append_to_wrapped

    replace(CacheFiles, "append", make)


def acknowledge_before_synchronize() -> None:
    """The cache says that a batch is durable before it is synchronized."""
    _wrap_active_file(_LateSynchronize)


def ignore_failed_synchronize() -> None:
    """A failed synchronize counts as one that succeeded."""
    _wrap_active_file(_DeafSynchronize)


def trust_what_a_kill_left() -> None:
    """What a killed process wrote and did not synchronize is told to agents as it reads."""
    replace(CacheFiles, "make_durable", lambda make: counted(lambda self, file_number, *, end_bytes: None))


def remove_files_in_use() -> None:
    """A file is removed although segments with bytes in it are not committed."""
    replace(Cache, "hold", lambda hold: counted(lambda self, file_number: None))
    replace(Cache, "release", lambda release: counted(lambda self, file_numbers: None))


def commit_out_of_order() -> None:
    """The first upload that ends commits everything before it."""

    def make(commit: Any) -> Any:
        def commit_all_before(self: Uploader, history: DiskHistory) -> None:
            there = [place for place, segment in enumerate(history.waiting) if segment in self._there]
            self._there.update(history.waiting[: max(there, default=-1) + 1])
            commit(self, history)

        return counted(commit_all_before)

    replace(Uploader, "_commit", make)


def try_uploads_once() -> None:
    """An upload that failed is not tried again."""

    def make(carry: Any) -> Any:
        async def carry_once(self: Uploader, history: DiskHistory, segment: Any) -> None:
            try:
                await self._upload(segment)
            except StoreFault:
                return
            self._begun.discard(segment)
            await carry(self, history, segment)

        return counted(carry_once)

    replace(Uploader, "_carry", make)


def state_points_at_durable() -> None:
    """A point is reported as soon as its segment is closed in the cache."""

    def make(segment_closed: Any) -> Any:
        def close_and_state(self: DiskHistory, closed: Any, position: Any) -> None:
            segment_closed(self, closed, position)
            self._add_points(closed.closed.points)

        return counted(close_and_state)

    replace(DiskHistory, "segment_closed", make)


def believe_what_the_disk_says() -> None:
    """The vault's key counts as it reads, whatever the disk made of it."""

    def make(kept: Any) -> Any:
        def read(state: Any, name: str) -> bytes | None:
            if name not in state.names():
                return None
            contents: bytes = state.read(name)[process_server.state_file.DIGEST_BYTES :]
            return contents

        return counted(read)

    replace(process_server.vault_key, "kept", make)


def tell_the_own_clock() -> None:
    """Agents are told the process server's own wall clock."""

    def make(instant_ns: Any) -> Any:
        def own(self: ServerClock) -> int | None:
            return None if instant_ns(self) is None else self._clock.now_ns()

        return counted(own)

    replace(ServerClock, "instant_ns", make)


def never_follow_a_clock_back() -> None:
    """Once the server's clock was far ahead, agents are told that until it is true."""

    def make(heard: Any) -> Any:
        def hear(self: ServerClock, now_ns: int) -> None:
            told_ns = self._told_ns
            heard(self, now_ns)
            self._told_ns = told_ns

        return counted(hear)

    replace(ServerClock, "heard", make)


def date_no_further_than_the_last_tick() -> None:
    """What a process server went on telling when the clock was set back is taken for the new clock's."""
    replace(config_server.core.server_clock, "FLYWHEEL_NS", lambda flywheel_ns: 0)


def compare_instants_of_different_clocks() -> None:
    """The RPO takes any instant for one of the present clock's."""

    def make(evaluate: Any) -> Any:
        def evaluate_blindly(clock: Any, *, newest: Any, **options: Any) -> Any:
            if newest is not None:
                newest = type(newest)(instant_ns=newest.instant_ns, generation=clock.generation)
            return evaluate(clock, newest=newest, **options)

        return counted(evaluate_blindly)

    replace(config_server.core.rpo, "evaluate_rpo", make)


def give_the_cache_no_limit() -> None:
    """A new cache file is begun whatever the cache holds already."""

    def make(next_file_bytes: Any) -> Any:
        def unlimited(self: Cache, checkpoint: Any, length_bytes: int, *, has_frames: bool) -> int:
            size_bytes: int | None = next_file_bytes(self, checkpoint, length_bytes, has_frames=has_frames)
            return size_bytes or self._file_bytes

        return counted(unlimited)

    replace(Cache, "_next_file_bytes", make)
    replace(Cache, "fits", lambda fits: counted(lambda self, length_bytes, *, has_frames: True))
    replace(Cache, "room_bytes", lambda room: counted(lambda self: 4 * self._file_bytes))


def remove_no_files() -> None:
    """What is committed stays in the cache."""

    async def keep(self: Cache) -> None:
        return

    replace(Cache, "remove_unused", lambda remove: counted(keep))


def give_away_the_kept_room() -> None:
    """Frames get the room that is kept for closing and committing segments."""

    def make(next_file_bytes: Any) -> Any:
        def for_frames_too(self: Cache, checkpoint: Any, length_bytes: int, *, has_frames: bool) -> int | None:
            size_bytes: int | None = next_file_bytes(self, checkpoint, length_bytes, has_frames=False)
            return size_bytes

        return counted(for_frames_too)

    def make_fitting(fits: Any) -> Any:
        return counted(lambda self, length_bytes, *, has_frames: fits(self, length_bytes, has_frames=False))

    replace(Cache, "_next_file_bytes", make)
    replace(Cache, "fits", make_fitting)
    replace(Cache, "room_bytes", lambda room: counted(lambda self: max(0, self._bytes_max - self.used_bytes)))


def keep_no_grants() -> None:
    """A process server keeps no grants for a start without the configuration server."""
    replace(process_server.reporting, "save_grants", lambda save: counted(lambda state, signed: None))


def keep_no_clock() -> None:
    """A process server does not know the time after a start without the configuration server."""
    replace(process_server.reporting, "save_clock", lambda save: counted(lambda state, instant_ns: None))


def grant_no_spare() -> None:
    """The configuration server gives the epoch in use, and nothing for while it is away."""

    def make(wanted: Callable[[int], tuple[int, ...]]) -> Any:
        return counted(lambda newest_used_epoch: wanted(newest_used_epoch)[:1])

    replace(config_server.core.grants, "wanted_epochs", make)


def use_one_data_key() -> None:
    """Every segment is sealed with the same data key."""

    def make(begin_segment: Any) -> Any:
        def begin_with_the_same(self: Sealer, *arguments: Any, **options: Any) -> Any:
            self._random_bytes = lambda count: b"k" * count
            return begin_segment(self, *arguments, **options)

        return counted(begin_with_the_same)

    replace(Sealer, "begin_segment", make)


def keep_data_keys() -> None:
    """A process server keeps its newest data key, to go on with the segment after a restart."""

    def make(initialize: Any) -> Any:
        def initialize_keeping(self: ProcessServer, ports: ProcessServerPorts, limits: Any) -> None:
            def draw_and_keep(count: int) -> bytes:
                drawn = ports.random_bytes(count)
                ports.state.replace("data-key", drawn)
                return drawn

            initialize(self, dataclasses.replace(ports, random_bytes=draw_and_keep), limits)

        return counted(initialize_keeping)

    replace(ProcessServer, "__init__", make)
