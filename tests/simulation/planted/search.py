"""Looks for every planted fault: how many seeds does it take until a violation names the invariant that it breaks?"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tests.simulation.planted import PLANTED_FAULTS
from tests.simulation.runs import results


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """seeds: how many it took, or how many were tried. violation: what named it, None if nothing did."""

    fault: str
    invariant: int
    seeds: int
    violation: str | None
    others: tuple[str, ...]
    """Violations of other invariants that came first."""


def look_for(fault: str, *, seeds_max: int, processes: int) -> Found:
    planted = PLANTED_FAULTS[fault]
    others: dict[str, None] = {}
    seed = 0
    seeds = range(1, seeds_max + 1)
    for seed, result in enumerate(results(seeds, fault, processes=processes, is_apart=True), start=1):
        names = [violation.invariant for violation in result.violations]
        if found := next((name for name in names if planted.is_named_by(name)), None):
            return Found(fault=fault, invariant=planted.invariant, seeds=seed, violation=found, others=tuple(others))
        others.update(dict.fromkeys(names))
    return Found(fault=fault, invariant=planted.invariant, seeds=seed, violation=None, others=tuple(others))


def look_for_all(names: Sequence[str], *, seeds_max: int, processes: int) -> int:
    """Every one of `names`, all if it is empty. The last line of stdout is JSON. Returns the exit status."""
    found = []
    begin = time.monotonic()
    for name in names or sorted(PLANTED_FAULTS):
        one = look_for(name, seeds_max=seeds_max, processes=processes)
        found.append(one)
        said = f"seed {one.seeds}: {one.violation}" if one.violation else f"not within {one.seeds} seeds"
        print(f"{time.monotonic() - begin:7.1f} s  invariant {one.invariant:2}  {name}: {said}", file=sys.stderr)
    missing = [one.fault for one in found if one.violation is None]
    print(json.dumps({"seeds_max": seeds_max, "planted": [asdict(one) for one in found], "not_found": missing}))
    return 1 if missing else 0
