"""What goes wrong, when: a schedule drawn from the seed. Every fault has a name, a weight, and one function that
does it.

A profile picks which kinds a run knows and how often they come, so that some runs are calm, some see one kind only,
and some see everything at once. Faults with a duration heal by themselves; `heal_everything` ends all of them at the
horizon.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tests.simulation.world import World

OPERATIONS_BEFORE_DEATH_MAX: Final = 12
OUTAGE_SECONDS_MAX: Final = 15.0
CLOCK_JUMP_SECONDS_MAX: Final = 3600.0
FLOOD_WEIGHTS: Final = {
    "store-down": 3.0,
    "store-flaky": 0.5,
    "process-server-killed": 0.5,
    "process-server-killed-at-a-write": 1.0,
    "process-server-power-cut": 1.0,
    "process-server-stopped": 0.3,
    "cache-synchronize-failed": 0.5,
    "agent-killed-at-a-write": 0.3,
    "connection-cut": 0.3,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultProfile:
    """Kinds with their weights, and the mean virtual seconds between two faults."""

    weights: dict[str, float]
    pause_seconds: float


def draw_profile(draw: random.Random, *, is_flood: bool) -> FaultProfile:
    """A third of the runs know every kind, a third a few, a third one.

    In a flood the store is away more often than not, so that the cache fills up and the process server dies full.
    """
    if is_flood:
        return FaultProfile(weights=dict(FLOOD_WEIGHTS), pause_seconds=draw.choice((1.0, 3.0)))
    kinds = sorted(FAULTS)
    breadth = draw.choice((1, 3, len(kinds)))
    chosen = draw.sample(kinds, breadth)
    return FaultProfile(
        weights={kind: draw.uniform(0.2, 1.0) for kind in sorted(chosen)}, pause_seconds=draw.choice((1.0, 3.0, 8.0))
    )


async def run_faults(world: World, profile: FaultProfile) -> None:
    """Brings faults until cancelled."""
    kinds = list(profile.weights)
    weights = list(profile.weights.values())
    while True:
        await asyncio.sleep(world.draw.expovariate(1 / profile.pause_seconds))
        kind = world.draw.choices(kinds, weights)[0]
        world.note_fault(kind)
        FAULTS[kind](world)


def heal_everything(world: World) -> None:
    """The end of all faults: what is dead is restarted by its host, what is cut is connected again by the programs."""
    world.network.is_down = False
    _heal_store(world)
    world.server.is_down = False
    world.server.lost_reply_probability = 0.0
    for disk in world.disks:
        disk.read_failure_probability = 0.0
        disk.stillness_refusal_probability = 0.0


def _outage_seconds(world: World) -> float:
    """Mostly short; one in five lasts until everything is healed."""
    if world.draw.random() < 0.2:
        return world.horizon_seconds
    return world.draw.random() ** 2 * OUTAGE_SECONDS_MAX


def _kill_agent(world: World) -> None:
    world.agent.kill()


def _cut_power_of_agent(world: World) -> None:
    world.agent.cut_power()


def _kill_process_server(world: World) -> None:
    world.process_server.kill()


def _cut_power_of_process_server(world: World) -> None:
    world.process_server.cut_power()


def _kill_agent_at_a_write(world: World) -> None:
    world.agent.kill_after_operations(world.draw.randrange(1, OPERATIONS_BEFORE_DEATH_MAX))


def _kill_process_server_at_a_write(world: World) -> None:
    world.process_server.kill_after_operations(world.draw.randrange(1, OPERATIONS_BEFORE_DEATH_MAX))


def _stop_agent(world: World) -> None:
    world.agent.stop_orderly()


def _stop_process_server(world: World) -> None:
    world.process_server.stop_orderly()


def _cut_connection(world: World) -> None:
    for connection in world.network.open_connections():
        connection.cut(world.draw)


def _silence_connection(world: World) -> None:
    for connection in world.network.open_connections():
        connection.fall_silent()


def _take_network_down(world: World) -> None:
    world.network.is_down = True
    _cut_connection(world)
    world.later(_outage_seconds(world), lambda: setattr(world.network, "is_down", False))


def _take_store_down(world: World) -> None:
    world.store.is_down = True
    world.later(_outage_seconds(world), lambda: setattr(world.store, "is_down", False))


def _make_store_flaky(world: World) -> None:
    world.store.failure_probability = world.draw.random() * 0.5
    world.store.lost_reply_probability = world.draw.random() * 0.5
    world.later(_outage_seconds(world), lambda: _heal_store(world))


def _heal_store(world: World) -> None:
    world.store.is_down = False
    world.store.failure_probability = 0.0
    world.store.lost_reply_probability = 0.0


def _take_configuration_server_down(world: World) -> None:
    world.server.is_down = True
    world.later(_outage_seconds(world), lambda: setattr(world.server, "is_down", False))


def _lose_replies_of_configuration_server(world: World) -> None:
    world.server.lost_reply_probability = 0.5
    world.later(_outage_seconds(world), lambda: setattr(world.server, "lost_reply_probability", 0.0))


def _lose_cache(world: World) -> None:
    world.process_server.lose_cache()


def _fail_cache_synchronize(world: World) -> None:
    world.process_server.cache.fail_next_synchronize = True


def _fail_agent_synchronize(world: World) -> None:
    world.agent.state.fail_next_synchronize = True


def _jump_agent_clock(world: World) -> None:
    world.agent.clock.skew_ns = round(world.draw.uniform(-1, 1) * CLOCK_JUMP_SECONDS_MAX * 1e9)


def _jump_process_server_clock(world: World) -> None:
    world.process_server.clock.skew_ns = round(world.draw.uniform(-1, 1) * CLOCK_JUMP_SECONDS_MAX * 1e9)


def _make_disk_unreadable(world: World) -> None:
    for disk in world.disks:
        disk.read_failure_probability = 0.2
    world.later(_outage_seconds(world), lambda: _heal_disks(world))


def _refuse_stillness(world: World) -> None:
    for disk in world.disks:
        disk.stillness_refusal_probability = 0.9
    world.later(_outage_seconds(world), lambda: _heal_disks(world))


def _heal_disks(world: World) -> None:
    for disk in world.disks:
        disk.read_failure_probability = 0.0
        disk.stillness_refusal_probability = 0.0


FAULTS: Final[dict[str, Callable[[World], None]]] = {
    "agent-killed": _kill_agent,
    "agent-killed-at-a-write": _kill_agent_at_a_write,
    "agent-power-cut": _cut_power_of_agent,
    "agent-stopped": _stop_agent,
    "agent-synchronize-failed": _fail_agent_synchronize,
    "agent-clock-jumped": _jump_agent_clock,
    "process-server-killed": _kill_process_server,
    "process-server-killed-at-a-write": _kill_process_server_at_a_write,
    "process-server-power-cut": _cut_power_of_process_server,
    "process-server-stopped": _stop_process_server,
    "process-server-clock-jumped": _jump_process_server_clock,
    "cache-lost": _lose_cache,
    "cache-synchronize-failed": _fail_cache_synchronize,
    "connection-cut": _cut_connection,
    "connection-silent": _silence_connection,
    "network-down": _take_network_down,
    "store-down": _take_store_down,
    "store-flaky": _make_store_flaky,
    "configuration-server-down": _take_configuration_server_down,
    "configuration-server-replies-lost": _lose_replies_of_configuration_server,
    "disk-unreadable": _make_disk_unreadable,
    "disk-not-still": _refuse_stillness,
}
