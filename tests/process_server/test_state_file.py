"""What a process server keeps for a start without others: a bit that the disk turned over is noticed, and survived."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from process_server.errors import StateUnreadable
from process_server.state_file import keep, kept
from process_server.vault_key import VAULT_KEY_FILE, VaultKey
from runtime.local_directory import LocalDirectory
from storage.errors import StoreUnavailable

KEY = X25519PrivateKey.from_private_bytes(b"v" * 32).public_key()


class Archive:
    """Of which only the vault's key is asked."""

    def __init__(self, *, is_away: bool = False) -> None:
        self.is_away = is_away
        self.reads = 0

    async def read_vault(self) -> Any:
        self.reads += 1
        await asyncio.sleep(0)
        if self.is_away:
            raise StoreUnavailable(url="file:///away", reason="away")
        return type("Description", (), {"vault_key": KEY.public_bytes_raw()})


def vault_key(archive: Archive, state: LocalDirectory) -> bytes:
    with ThreadPoolExecutor(1) as executor:
        key = asyncio.run(VaultKey(cast(Any, archive), state, executor).get())
    return key.public_bytes_raw()


def test_what_was_kept_comes_back_and_no_flipped_bit_of_it_does(tmp_path: Path) -> None:
    state = LocalDirectory(tmp_path)
    assert kept(state, "name") is None
    keep(state, "name", b"contents")
    assert kept(state, "name") == b"contents"
    sound = state.read("name")
    for bit in range(8 * len(sound)):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        state.replace("name", bytes(damaged))
        with pytest.raises(StateUnreadable):
            kept(state, "name")
    for length in range(len(sound)):
        state.replace("name", sound[:length])
        with pytest.raises(StateUnreadable):
            kept(state, "name")


def test_the_vaults_key_is_read_from_the_store_once_and_then_from_the_state(tmp_path: Path) -> None:
    state, archive = LocalDirectory(tmp_path), Archive()
    assert vault_key(archive, state) == KEY.public_bytes_raw()
    archive.is_away = True
    assert vault_key(archive, state) == KEY.public_bytes_raw()
    assert archive.reads == 1


async def test_disks_that_begin_at_once_keep_the_key_once(tmp_path: Path) -> None:
    """Guest: two would write the one file, one of them found it gone, and its disk was refused."""
    archive = Archive()
    with ThreadPoolExecutor(4) as executor:
        key = VaultKey(cast(Any, archive), LocalDirectory(tmp_path), executor)
        async with asyncio.TaskGroup() as group:
            found = [group.create_task(key.get()) for _ in range(8)]
    assert {task.result().public_bytes_raw() for task in found} == {KEY.public_bytes_raw()}
    assert archive.reads == 1


def test_nothing_is_ever_sealed_to_a_key_with_a_flipped_bit(tmp_path: Path) -> None:
    """Simulation: any 32 bytes are a key; all that was sealed after a restart could never have been opened."""
    state, archive = LocalDirectory(tmp_path), Archive()
    vault_key(archive, state)
    damaged = bytearray(state.read(VAULT_KEY_FILE))
    damaged[-1] ^= 1
    state.replace(VAULT_KEY_FILE, bytes(damaged))
    archive.is_away = True
    with pytest.raises(StoreUnavailable):
        vault_key(archive, state)
    archive.is_away = False
    assert vault_key(archive, state) == KEY.public_bytes_raw()
