"""`python -m tests.simulation --seeds N --first-seed K [--fault NAME]`: many seeds over all cores, in seed order.

Progress goes to stderr. The last line of stdout is JSON: seeds, events, faults by kind, points_recovered,
violations. Exits 1 on any violation. `--trace` prints every event of every seed, in this process: for one failing seed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict

from tests.simulation.planted_faults import PLANTED_FAULTS
from tests.simulation.runs import results
from tests.simulation.world import RunResult, Violation

VIOLATIONS_SHOWN_MAX = 20
DETAIL_CHARACTERS_MAX = 300


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    totals: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    violations: list[dict[str, object]] = []
    begin = time.monotonic()
    for done, result in enumerate(
        results(seeds, options.fault, processes=1 if options.trace else options.processes, readable=options.trace),
        start=1,
    ):
        totals.update(events=result.events, points_recovered=result.points_recovered)
        faults.update(result.faults)
        if result.violations:
            _show_failure(result, options)
            violations.extend(_summary_of(violation) for violation in result.violations)
        if options.hashes:
            print(f"{result.seed} {result.trace}", file=sys.stderr)
        if done % 25 == 0 or done == len(seeds):
            rate = done / (time.monotonic() - begin)
            print(f"{done}/{len(seeds)} seeds, {rate:.1f} a second, {len(violations)} violations", file=sys.stderr)
        if options.stop_at_first and violations:
            break
    summary = {
        "seeds": done,
        "events": totals["events"],
        "faults": dict(sorted(faults.items())),
        "points_recovered": totals["points_recovered"],
        "violations": violations[:VIOLATIONS_SHOWN_MAX],
        "violation_count": len(violations),
    }
    print(json.dumps(summary))
    return 1 if violations else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=_positive, default=100)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--fault", choices=sorted(PLANTED_FAULTS), help="plant this defect; it must be found")
    parser.add_argument("--processes", type=_positive, default=os.cpu_count() or 1)
    parser.add_argument("--trace", action="store_true", help="print every event to stderr, in one process")
    parser.add_argument("--hashes", action="store_true", help="print every seed's trace hash to stderr")
    parser.add_argument("--stop-at-first", action="store_true", help="end with the first failing seed")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _summary_of(violation: Violation) -> dict[str, object]:
    fields = asdict(violation)
    fields["detail"] = violation.detail.splitlines()[0][:DETAIL_CHARACTERS_MAX]
    return fields


def _show_failure(result: RunResult, options: argparse.Namespace) -> None:
    for violation in result.violations[:VIOLATIONS_SHOWN_MAX]:
        print(
            f"seed {result.seed} at {violation.at_seconds} s: {violation.invariant}: {violation.detail}",
            file=sys.stderr,
        )
    fault = f" --fault {options.fault}" if options.fault else ""
    print(f"again: python -m tests.simulation --seeds 1 --first-seed {result.seed}{fault} --trace", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
