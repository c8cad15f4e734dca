"""Looks, after a run, for what a thief of the store and of all process servers' disks could read (DESIGN §11, 15).

Samples only: what fails here fails for every frame and every segment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from storage.errors import ObjectCorrupt
from storage.keys import DATA_KEY_BYTES, unwrap_data_key, unwrap_vault_key
from storage.object_names import SegmentName, parse
from storage.segment import TRAILER_BYTES, parse_header, parse_trailer

if TYPE_CHECKING:
    from tests.simulation.world import World

OBJECTS_LOOKED_AT_MAX: Final = 6
KEYS_LOOKED_FOR_MAX: Final = 3
INVARIANT: Final = "15-stolen-is-useless"


def check_secrecy(world: World) -> None:
    """Neither contents nor data keys lie anywhere but at the source; no data key seals two segments."""
    names = [name for name in world.store.sorted_names if isinstance(parse(name), SegmentName)]
    sample = names[: OBJECTS_LOOKED_AT_MAX // 2] + names[OBJECTS_LOOKED_AT_MAX // 2 :][-OBJECTS_LOOKED_AT_MAX // 2 :]
    places = {name: world.store.objects[name] for name in sample}
    for host in world.process_servers:
        for medium in host.media():
            places |= {f"{medium.name}/{name}": bytes(stored.contents) for name, stored in medium.files.items()}
    contents = [secret for disk in world.disks for secret in disk.secrets]
    drawn = [one for one in world.invariants.drawn_by_process_servers if len(one) == DATA_KEY_BYTES]
    for name, data in places.items():
        if any(secret in data for secret in contents):
            world.violate(INVARIANT, f"{name} shows what was written to the source")
        if any(key in data for key in drawn[:KEYS_LOOKED_FOR_MAX] + drawn[-KEYS_LOOKED_FOR_MAX:]):
            world.violate(INVARIANT, f"{name} holds a data key as it is")
            return
    _check_data_keys(world, sample)


def _check_data_keys(world: World, names: list[str]) -> None:
    seen: dict[bytes, str] = {}
    private_key = unwrap_vault_key(world.vault.description, world.vault.recovery_key, url="memory:")
    for name in names:
        data = world.store.objects[name]
        trailer = parse_trailer(data[-TRAILER_BYTES:], name=name, object_bytes=len(data))
        opening = parse_header(data[: trailer.header_bytes], name=name).opening
        for wrapped in opening.wrapped_keys:
            try:
                key = unwrap_data_key(
                    wrapped,
                    private_key,
                    name=name,
                    vault=opening.vault,
                    machine=opening.machine,
                    disk=opening.disk,
                    epoch=opening.epoch,
                    ordinal=opening.ordinal,
                )
            except ObjectCorrupt:
                continue  # nobody can open it: recovery will say so
            if key in seen:
                world.violate(INVARIANT, f"{name} and {seen[key]} are sealed with one data key")
            seen[key] = name
