"""Cuts the script of a failing run down to a few decisions that still break the same promise (delta debugging).

Every attempt is a whole run. A run with fewer decisions takes another course from the first missing one on, so what is
left is a script of its own that fails, not a part of the run that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from tests.simulation.script import Decision, Script
from tests.simulation.world import RunResult, run_seed

ATTEMPTS_MAX: Final = 400


def invariants_of(result: RunResult) -> list[str]:
    """The broken promises of a run, each once, in the order in which they were noticed."""
    return list(dict.fromkeys(violation.invariant for violation in result.violations))


def shrink(script: Script, invariant: str, *, on_progress: Callable[[int, int], None]) -> Script:
    """The smallest script that was found to break `invariant` too. on_progress: told attempts and decisions left."""
    attempts = 0

    def fails(decisions: Sequence[Decision]) -> bool:
        nonlocal attempts
        attempts += 1
        failed = invariant in invariants_of(run_seed(script.seed, script.having(decisions)))
        on_progress(attempts, len(decisions))
        return failed

    decisions = list(script.decisions)
    if not fails(decisions):
        raise ValueError(f"the script does not break {invariant}")
    if fails([]):
        return script.having([])
    parts = 2
    while len(decisions) > 1 and attempts < ATTEMPTS_MAX:
        size = -(-len(decisions) // parts)
        for first in range(0, len(decisions), size):
            rest = decisions[:first] + decisions[first + size :]
            if rest and fails(rest):
                decisions, parts = rest, max(2, parts - 1)
                break
        else:
            if size == 1:
                break
            parts = min(len(decisions), 2 * parts)
    return script.having(decisions)
