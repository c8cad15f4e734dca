"""What goes wrong, by kind: each fault has a name and one function that does it, out of its decision alone.

Faults with a duration end by themselves; `heal_everything` ends all of them. What tampers with the store comes after
the run (tampering.py) and is decided here like all else.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from tests.simulation.directory import Operation, StorageMedium
from tests.simulation.hosts import AGENT, PROCESS_SERVERS, Host, ProcessServerHost
from tests.simulation.network import LATENCY_SECONDS_MAX, SLOW_LATENCY_SECONDS_MAX, Connection
from tests.simulation.script import Decision, Script, Swarm, draw_decision, draw_decisions, draw_swarm
from tests.simulation.tampering import TAMPERINGS

if TYPE_CHECKING:
    from tests.simulation.world import World

OPERATIONS_BEFORE_DEATH_MAX: Final = 12
CUT_BYTES_MAX: Final = 2**20
CLOCK_STEP_SECONDS: Final = (20.0, 3600.0, 10 * 365.25 * 86400.0)
"""A clock is set wrong by up to one of these, either way."""
CORRECTION_SECONDS: Final = 12.0
"""Or, having been ahead, set back by up to this."""
STALE_SECONDS_MAX: Final = 30.0
DAYS_AWAY_MAX: Final = 14.0
DAYS_AWAY_PROBABILITY: Final = 0.15
TAMPERINGS_MAX: Final = 3
DAY_SECONDS: Final = 86400.0
AWAY: Final = "configuration-server-away-for-days"
SWITCH: Final = "process-server-switched"
FLOOD_WEIGHTS: Final = {
    "store-down": 3.0,
    "store-flaky": 0.5,
    "process-server-killed": 0.5,
    "process-server-killed-at-a-write": 1.0,
    "process-server-power-cut": 1.0,
    "process-server-stopped": 0.3,
    "process-server-held": 0.3,
    "cache-synchronize-failed": 0.5,
    "cache-disk-full": 0.3,
    "agent-killed-at-a-write": 0.3,
    "connection-cut": 0.3,
}
"""In a flood the store is away more often than not, so that the cache fills up and the process server dies full."""

THEMES: Final = (
    (
        "process-server-killed",
        "process-server-killed-at-a-write",
        "process-server-power-cut",
        "cache-lost",
        "cache-synchronize-failed",
        "cache-write-failed",
        "store-down",
        "store-replies-lost",
    ),
    (
        "agent-killed-at-a-write",
        "agent-power-cut",
        "agent-synchronize-failed",
        "agent-state-failed",
        "cache-lost",
        "connection-cut-at-a-byte",
        "connection-late",
        "store-down",
        "disk-not-still",
    ),
    (
        "process-server-switched",
        "process-server-held",
        "network-partitioned",
        "connection-late",
        "connection-duplicated",
        "store-lists-stale",
        "store-replies-lost",
        "store-down",
        "cache-lost",
    ),
    ("process-server-switched", "store-lists-stale", "cache-lost", "process-server-killed"),
    (
        "configuration-server-clock-stepped",
        "configuration-server-killed",
        "configuration-server-down",
        "process-server-clock-stepped",
        "agent-clock-stepped",
        "process-server-held",
        "process-server-killed",
        "process-server-bit-flipped",
        "store-down",
        "disk-not-still",
    ),
)
"""Kinds that get at one promise together: what is durable, what is dirty, who owns a disk, where an epoch ends, what
time it is."""

Fault = Callable[["World", Decision], None]


def draw_script(
    seed: int, draw: random.Random, *, horizon_seconds: float, is_flood: bool, campaign: Sequence[Decision] = ()
) -> tuple[Swarm, Script]:
    """All that goes wrong with this seed: faults up to the horizon (those of the campaign, if it has one), then, for
    some, days without the configuration server, then tampering with the store."""
    if campaign:
        weights = dict.fromkeys((decision.kind for decision in campaign), 1.0)
        swarm = Swarm(weights=weights, pause_seconds=horizon_seconds / len(campaign))
    elif is_flood:
        swarm = Swarm(weights=dict(FLOOD_WEIGHTS), pause_seconds=draw.choice((1.0, 3.0)))
    else:
        swarm = draw_swarm(draw, sorted(FAULTS.keys() - CAMPAIGN_KINDS), THEMES)
    decisions = list(campaign) or draw_decisions(draw, swarm, end_seconds=horizon_seconds)
    afterwards = [AWAY] if draw.random() < DAYS_AWAY_PROBABILITY else []
    afterwards += [draw.choice(sorted(TAMPERINGS)) for _ in range(draw.randrange(TAMPERINGS_MAX + 1))]
    decisions += [
        draw_decision(draw, kind, at_seconds=horizon_seconds, end_seconds=horizon_seconds) for kind in afterwards
    ]
    return swarm, Script(seed=seed, decisions=tuple(decisions))


async def play(world: World, script: Script) -> None:
    """Every decision of the safety phase, at its time."""
    begin_seconds = world.loop.time()
    for decision in script.decisions:
        if decision.kind in FAULTS:
            await asyncio.sleep(max(0.0, begin_seconds + decision.at_seconds - world.loop.time()))
            world.note_fault(decision.kind)
            FAULTS[decision.kind](world, decision)


def heal_everything(world: World) -> None:
    """The end of all faults: what is dead is restarted by its host, what is cut is connected again by the programs."""
    world.network.heal()
    world.store.heal()
    world.server.heal()
    world.server.clock.set(0)
    for host in world.hosts:
        host.let_go()
        host.clock.skew_ns = 0
        for medium in host.media():
            medium.heal()
    for disk in world.disks:
        disk.heal()


def is_known(kind: str) -> bool:
    return kind in FAULTS or kind in TAMPERINGS or kind == AWAY


# which one it hits


def _a_process_server(world: World, decision: Decision) -> ProcessServerHost:
    running = [host for host in world.process_servers if host.is_running]
    return running[decision.draw % len(running)]


def _a_connection(world: World, decision: Decision) -> list[Connection]:
    """None if there is none, mostly the newest."""
    found = world.network.open_connections()
    return found[-1:] if decision.draw % 4 else found[:1]


def _for_a_while(world: World, decision: Decision, end: Callable[[], object]) -> None:
    world.later(decision.seconds, end)


# what the programs' hosts do


def _on(find: Callable[[World, Decision], Host], act: Callable[[Host, Decision], None]) -> Fault:
    return lambda world, decision: act(find(world, decision), decision)


def _the_agent(world: World, decision: Decision) -> Host:
    return world.agent


def _kill(host: Host, decision: Decision) -> None:
    host.kill()


def _kill_at_a_write(host: Host, decision: Decision) -> None:
    host.kill_after_operations(1 + int(decision.share * OPERATIONS_BEFORE_DEATH_MAX))


def _cut_power(host: Host, decision: Decision) -> None:
    host.cut_power()


def _switch_off(host: Host, decision: Decision) -> None:
    host.switch_off(decision.seconds)


def _stop(host: Host, decision: Decision) -> None:
    host.stop_orderly()


def _hold(host: Host, decision: Decision) -> None:
    host.hold()
    _for_a_while(host.world, decision, host.let_go)


def _step_clock(host: Host, decision: Decision) -> None:
    host.clock.skew_ns = _step_ns(decision)


def _step_ns(decision: Decision) -> int:
    draw = decision.random
    return round(draw.uniform(-1, 1) * draw.choice(CLOCK_STEP_SECONDS) * 1e9)


# what their media do


def _cache(world: World, decision: Decision) -> StorageMedium:
    return _a_process_server(world, decision).cache


def _process_server_state(world: World, decision: Decision) -> StorageMedium:
    return _a_process_server(world, decision).state


def _agent_state(world: World, decision: Decision) -> StorageMedium:
    return world.agent.state


def _fails(find: Callable[[World, Decision], StorageMedium], *operations: Operation) -> Fault:
    def fail(world: World, decision: Decision) -> None:
        find(world, decision).fail_next.add(operations[decision.draw % len(operations)])

    return fail


def _fills_up(find: Callable[[World, Decision], StorageMedium]) -> Fault:
    def fill(world: World, decision: Decision) -> None:
        medium = find(world, decision)
        medium.is_full = True
        _for_a_while(world, decision, lambda: setattr(medium, "is_full", False))

    return fill


def _flip_bit_of_process_server(world: World, decision: Decision) -> None:
    _process_server_state(world, decision).flip_bit(decision.random)


def _flip_bit_of_agent(world: World, decision: Decision) -> None:
    # why: what the agent is to protect it has from nobody else, and says so if it cannot read it
    suffix = (".ledger", ".digests")[decision.draw % 2]
    world.agent.state.flip_bit(decision.random, suffix=suffix)


# what the network does


def _cut_connection(world: World, decision: Decision) -> None:
    for connection in world.network.open_connections():
        connection.cut(decision.random)


def _cut_connection_behind(world: World, decision: Decision) -> None:
    for connection in _a_connection(world, decision):
        connection.cut_behind(1 + int(CUT_BYTES_MAX**decision.share), decision.random)


def _silence_connection(world: World, decision: Decision) -> None:
    for connection in world.network.open_connections():
        connection.fall_silent()


def _silence_one_way(world: World, decision: Decision) -> None:
    for connection in _a_connection(world, decision):
        connection.fall_silent_one_way(decision.random)


def _open_half(world: World, decision: Decision) -> None:
    for connection in _a_connection(world, decision):
        connection.open_half(decision.random)


def _arrive_late(world: World, decision: Decision) -> None:
    """What the agent had sent on a connection that it gives up arrives when it has long made another."""
    for connection in _a_connection(world, decision):
        connection.fall_silent()
        give_up = functools.partial(connection.ends[0].give_up_and_arrive_late, decision.seconds)
        world.later(decision.share * decision.seconds, give_up)


def _make_phantoms(world: World, decision: Decision) -> None:
    """The next connections are made, only that the agent does not hear of it and makes others."""
    world.network.phantoms += 1 + decision.draw % 3
    _cut_connection(world, decision)


def _slow_down(world: World, decision: Decision) -> None:
    latency_seconds = LATENCY_SECONDS_MAX + decision.share * SLOW_LATENCY_SECONDS_MAX
    world.network.slow_latency_seconds = latency_seconds
    for connection in world.network.open_connections():
        connection.slow_down(latency_seconds)
    _for_a_while(world, decision, lambda: setattr(world.network, "slow_latency_seconds", 0.0))


def _take_network_down(world: World, decision: Decision) -> None:
    world.network.is_down = True
    _cut_connection(world, decision)
    _for_a_while(world, decision, lambda: setattr(world.network, "is_down", False))


def _partition(world: World, decision: Decision) -> None:
    """The network falls apart: some of the links are silent, new connections over them are refused."""
    draw = decision.random
    if draw.random() < 0.5:
        world.network.is_down = True
        _silence_connection(world, decision)
        _for_a_while(world, decision, lambda: setattr(world.network, "is_down", False))
    for name in (AGENT, *PROCESS_SERVERS):
        if draw.random() < 0.5:
            world.server.cut_off.add(name)
            _for_a_while(world, decision, lambda name=name: world.server.cut_off.discard(name))  # type: ignore[misc]


# what the store does


def _take_store_down(world: World, decision: Decision) -> None:
    world.store.is_down = True
    _for_a_while(world, decision, lambda: setattr(world.store, "is_down", False))


def _make_store_flaky(world: World, decision: Decision) -> None:
    draw = decision.random
    world.store.failure_probability = draw.random() * 0.5
    world.store.lost_reply_probability = draw.random() * 0.5
    _for_a_while(world, decision, world.store.heal)


def _lose_replies_of_store(world: World, decision: Decision) -> None:
    world.store.lost_reply_probability = 0.5 + decision.share / 2
    _for_a_while(world, decision, lambda: setattr(world.store, "lost_reply_probability", 0.0))


def _make_lists_stale(world: World, decision: Decision) -> None:
    world.store.stale_seconds = decision.share * STALE_SECONDS_MAX
    _for_a_while(world, decision, lambda: setattr(world.store, "stale_seconds", 0.0))


# what the configuration server does


def _take_configuration_server_down(world: World, decision: Decision) -> None:
    world.server.is_down = True
    _for_a_while(world, decision, lambda: setattr(world.server, "is_down", False))


def _kill_configuration_server(world: World, decision: Decision) -> None:
    world.server.is_down = True
    world.server.clock.restart()
    world.later(decision.share, lambda: setattr(world.server, "is_down", False))


def _hold_configuration_server(world: World, decision: Decision) -> None:
    world.server.is_held = True
    _for_a_while(world, decision, lambda: setattr(world.server, "is_held", False))


def _lose_replies_of_configuration_server(world: World, decision: Decision) -> None:
    world.server.lost_reply_probability = 0.5
    _for_a_while(world, decision, lambda: setattr(world.server, "lost_reply_probability", 0.0))


def _step_configuration_servers_clock(world: World, decision: Decision) -> None:
    world.server.clock.set(_step_ns(decision))
    _for_a_while(world, decision, lambda: world.server.clock.set(0))


def _correct_configuration_servers_clock(world: World, decision: Decision) -> None:
    world.server.clock.set(-round(decision.share * CORRECTION_SECONDS * 1e9))
    _for_a_while(world, decision, lambda: world.server.clock.set(0))


def _cut_off_process_server(world: World, decision: Decision) -> None:
    name = _a_process_server(world, decision).name
    world.server.cut_off.add(name)
    _for_a_while(world, decision, lambda: world.server.cut_off.discard(name))


def _switch_process_server(world: World, decision: Decision) -> None:
    world.server.switch_process_server(continues_reported_epoch=decision.share < 0.5)
    if decision.draw % 3 == 0:
        # why: the old owner does not hear of it, and goes on with the grants that it has
        old = next(host for host in world.process_servers if host.member is not world.server.owner)
        world.server.cut_off.add(old.name)
        _for_a_while(world, decision, lambda: world.server.cut_off.discard(old.name))


# what the process server's cache and the source's disks do


def _lose_cache(world: World, decision: Decision) -> None:
    _a_process_server(world, decision).lose_cache()


def _flip_bit_of_cache(world: World, decision: Decision) -> None:
    _a_process_server(world, decision).flip_cache_bit(decision.random)


def _make_disk_unreadable(world: World, decision: Decision) -> None:
    for disk in world.disks:
        disk.read_failure_probability = 0.2
        _for_a_while(world, decision, disk.heal)


def _refuse_stillness(world: World, decision: Decision) -> None:
    for disk in world.disks:
        disk.stillness_refusal_probability = 0.9
        _for_a_while(world, decision, disk.heal)


FAULTS: Final[dict[str, Fault]] = {
    "agent-killed": _on(_the_agent, _kill),
    "agent-killed-at-a-write": _on(_the_agent, _kill_at_a_write),
    "agent-power-cut": _on(_the_agent, _cut_power),
    "agent-off": _on(_the_agent, _switch_off),
    "agent-stopped": _on(_the_agent, _stop),
    "agent-held": _on(_the_agent, _hold),
    "agent-clock-stepped": _on(_the_agent, _step_clock),
    "agent-synchronize-failed": _fails(_agent_state, Operation.SYNCHRONIZE),
    "agent-state-failed": _fails(
        _agent_state, Operation.READ, Operation.WRITE, Operation.CREATE, Operation.REPLACE, Operation.REMOVE
    ),
    "agent-disk-full": _fills_up(_agent_state),
    "agent-bit-flipped": _flip_bit_of_agent,
    "process-server-killed": _on(_a_process_server, _kill),
    "process-server-killed-at-a-write": _on(_a_process_server, _kill_at_a_write),
    "process-server-power-cut": _on(_a_process_server, _cut_power),
    "process-server-off": _on(_a_process_server, _switch_off),
    "process-server-stopped": _on(_a_process_server, _stop),
    "process-server-held": _on(_a_process_server, _hold),
    "process-server-clock-stepped": _on(_a_process_server, _step_clock),
    "process-server-state-failed": _fails(_process_server_state, Operation.READ, Operation.REPLACE),
    "process-server-state-disk-full": _fills_up(_process_server_state),
    "process-server-bit-flipped": _flip_bit_of_process_server,
    "process-server-cut-off": _cut_off_process_server,
    SWITCH: _switch_process_server,
    "cache-lost": _lose_cache,
    "cache-synchronize-failed": _fails(_cache, Operation.SYNCHRONIZE),
    "cache-write-failed": _fails(_cache, Operation.WRITE, Operation.CREATE, Operation.REMOVE),
    "cache-read-failed": _fails(_cache, Operation.READ),
    "cache-disk-full": _fills_up(_cache),
    "cache-bit-flipped": _flip_bit_of_cache,
    "connection-cut": _cut_connection,
    "connection-cut-at-a-byte": _cut_connection_behind,
    "connection-silent": _silence_connection,
    "connection-silent-one-way": _silence_one_way,
    "connection-half-open": _open_half,
    "connection-late": _arrive_late,
    "connection-duplicated": _make_phantoms,
    "network-slow": _slow_down,
    "network-down": _take_network_down,
    "network-partitioned": _partition,
    "store-down": _take_store_down,
    "store-flaky": _make_store_flaky,
    "store-replies-lost": _lose_replies_of_store,
    "store-lists-stale": _make_lists_stale,
    "configuration-server-down": _take_configuration_server_down,
    "configuration-server-killed": _kill_configuration_server,
    "configuration-server-held": _hold_configuration_server,
    "configuration-server-replies-lost": _lose_replies_of_configuration_server,
    "configuration-server-clock-stepped": _step_configuration_servers_clock,
    "configuration-server-clock-corrected": _correct_configuration_servers_clock,
    "disk-unreadable": _make_disk_unreadable,
    "disk-not-still": _refuse_stillness,
}

CAMPAIGN_KINDS: Final = frozenset({"configuration-server-clock-corrected", "process-server-cut-off"})
"""Kinds that only campaigns draw: another kind for the swarm would make another run of every seed."""
