"""Faults that come together: what one outage makes likely, one after the other and close to each other.

Independent faults seldom meet in the one order that does harm, and the end of one undoes another of its kind. A
campaign sets the order, leaves times, strengths and victims to chance, and has the run to itself until the faults end.
It is drawn from a stream of its own: a seed without one is the run that it was before there were any. Its faults are
decisions like all others, so that it shrinks like all else.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from tests.simulation.script import DRAW_MAX, Decision

HORIZON_SECONDS_MIN: Final = 30.0
"""For less time there is none."""
CAMPAIGN_PROBABILITY: Final = 0.15
FLOOD_CAMPAIGN_PROBABILITY: Final = 0.4
BEGIN_SHARE_MAX: Final = 0.25
"""It begins in this part of the time in which faults come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """kinds: one of them each time. after_seconds, lasting_seconds, times: ranges, both ends included; each time comes
    that long after the one before it."""

    kinds: tuple[str, ...]
    after_seconds: tuple[float, float]
    lasting_seconds: tuple[float, float]
    times: tuple[int, int] = (1, 1)


DEATHS: Final = ("process-server-killed", "process-server-killed-at-a-write", "process-server-power-cut")
CRASH_LOOP: Final = (
    Step(kinds=("store-down",), after_seconds=(0.0, 5.0), lasting_seconds=(30.0, 60.0)),
    Step(kinds=DEATHS, after_seconds=(5.0, 20.0), lasting_seconds=(0.0, 0.0)),
    Step(kinds=DEATHS, after_seconds=(0.2, 4.0), lasting_seconds=(0.0, 0.0), times=(3, 12)),
)
"""The store is away until the cache is full, and the process server with the full cache dies again and again."""

CORRECTED_CLOCK: Final = (
    Step(kinds=("process-server-cut-off",), after_seconds=(0.0, 3.0), lasting_seconds=(6.0, 15.0)),
    Step(kinds=("configuration-server-clock-corrected",), after_seconds=(0.5, 3.0), lasting_seconds=(20.0, 60.0)),
    Step(
        kinds=("store-down", "agent-held", "disk-not-still", "connection-silent", "network-down"),
        after_seconds=(2.0, 7.0),
        lasting_seconds=(8.0, 25.0),
    ),
)
"""The server's clock is set back by seconds while a process server cannot hear of it, and its points come late."""


def draw_campaign(draw: random.Random, *, horizon_seconds: float, is_flood: bool) -> list[Decision]:
    """Its decisions, in the order of time; none for most seeds. What would come after the horizon does not come."""
    probability = FLOOD_CAMPAIGN_PROBABILITY if is_flood else CAMPAIGN_PROBABILITY
    if horizon_seconds < HORIZON_SECONDS_MIN or draw.random() >= probability:
        return []
    at_seconds = draw.random() * BEGIN_SHARE_MAX * horizon_seconds
    decisions = []
    for step in CRASH_LOOP if is_flood else CORRECTED_CLOCK:
        for _ in range(draw.randint(*step.times)):
            at_seconds += draw.uniform(*step.after_seconds)
            decisions.append(
                Decision(
                    at_seconds=round(at_seconds, 3),
                    kind=draw.choice(step.kinds),
                    seconds=round(draw.uniform(*step.lasting_seconds), 3),
                    share=round(draw.random(), 4),
                    draw=draw.randrange(DRAW_MAX),
                )
            )
    return [decision for decision in decisions if decision.at_seconds < horizon_seconds]
