"""The script of one run: every decision about a fault, drawn before it begins, so that it can be cut down and kept.

A run is its seed and its script. All else (sizes, workload, latencies, the order of what is ready) comes from the seed
alone, and a decision carries everything that its fault still draws; so a script without some of its decisions is a
script too, and the same script gives the same run again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

LASTING_PROBABILITY: Final = 0.2
"""A fault with a duration lasts to the end of all faults so often."""
THEME_PROBABILITY: Final = 0.5
DURATION_SECONDS_MAX: Final = 15.0
DRAW_MAX: Final = 2**32
FORMAT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One fault: its kind, the virtual second of the run at which it comes, and all that it may draw from.

    seconds: how long it lasts, where it has a duration. share: in [0, 1), how strong it is, where it has a strength.
    draw: the seed of every smaller choice that it makes.
    """

    at_seconds: float
    kind: str
    seconds: float
    share: float
    draw: int

    @property
    def random(self) -> random.Random:
        """The same choices each time."""
        return random.Random(self.draw)


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What goes wrong in one run, in the order of time."""

    seed: int
    decisions: tuple[Decision, ...]

    def having(self, decisions: Iterable[Decision]) -> Script:
        return Script(seed=self.seed, decisions=tuple(decisions))

    def to_json(self, *, fault: str | None = None, violates: str | None = None) -> str:
        """As it is kept: one line for each decision."""
        lines = ",\n".join("    " + json.dumps(asdict(decision)) for decision in self.decisions)
        body = f"[\n{lines}\n  ]" if lines else "[]"
        return (
            f'{{\n  "format": {FORMAT},\n  "seed": {self.seed},\n  "fault": {json.dumps(fault)},\n'
            f'  "violates": {json.dumps(violates)},\n  "decisions": {body}\n}}'
        )

    @staticmethod
    def from_json(text: str) -> Script:
        """Raises ValueError, KeyError, TypeError for what to_json did not write."""
        fields = json.loads(text)
        if fields["format"] != FORMAT:
            raise ValueError(f"a script of format {fields['format']}; this is format {FORMAT}")
        return Script(seed=int(fields["seed"]), decisions=tuple(Decision(**one) for one in fields["decisions"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Swarm:
    """The kinds that a run knows, each with its weight, and the mean virtual seconds between two faults."""

    weights: dict[str, float]
    pause_seconds: float


def draw_swarm(draw: random.Random, kinds: Sequence[str], themes: Sequence[Sequence[str]]) -> Swarm:
    """Any subset of all kinds, or of those of one theme: a run that knows few kinds gets deeper into them, one that
    knows all mixes what nobody thought of."""
    pool = sorted(draw.choice(themes) if draw.random() < THEME_PROBABILITY else kinds)
    breadth = min(draw.choice((1, 2, 3, 5, 8, 13, len(pool))), len(pool))
    chosen = sorted(draw.sample(pool, breadth))
    weights = {kind: draw.choice((0.1, 0.5, 1.0, 3.0)) for kind in chosen}
    return Swarm(weights=weights, pause_seconds=draw.choice((0.7, 1.5, 3.0, 8.0)))


def draw_decisions(draw: random.Random, swarm: Swarm, *, end_seconds: float) -> list[Decision]:
    """Faults from the run's begin to `end_seconds`."""
    kinds, weights = list(swarm.weights), list(swarm.weights.values())
    decisions = []
    at_seconds = draw.expovariate(1 / swarm.pause_seconds)
    while at_seconds < end_seconds:
        kind = draw.choices(kinds, weights)[0]
        decisions.append(draw_decision(draw, kind, at_seconds=at_seconds, end_seconds=end_seconds))
        at_seconds += draw.expovariate(1 / swarm.pause_seconds)
    return decisions


def draw_decision(draw: random.Random, kind: str, *, at_seconds: float, end_seconds: float) -> Decision:
    """Durations are mostly short; some last until all faults end."""
    is_long = draw.random() < LASTING_PROBABILITY
    seconds = draw.random() ** 2 * DURATION_SECONDS_MAX
    return Decision(
        at_seconds=round(at_seconds, 3),
        kind=kind,
        seconds=round(end_seconds if is_long else seconds, 3),
        share=round(draw.random(), 4),
        draw=draw.randrange(DRAW_MAX),
    )
