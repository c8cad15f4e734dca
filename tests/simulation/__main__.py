"""`python -m tests.simulation --seeds N --first-seed K [--fault NAME]`: many seeds over all cores, in seed order.

Progress goes to stderr. The last line of stdout is JSON: seeds, events, faults by kind, points_recovered,
violations. Exits 1 on any violation. `--trace` prints every event of every seed, in this process: for one failing seed.
`--shrink SEED` prints the smallest script that still fails, `--script FILE` plays one, `--planted` looks for every
planted fault.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from tests.simulation.planted import EARLIER_NAMES, PLANTED_FAULTS, plant
from tests.simulation.planted.search import look_for_all
from tests.simulation.runs import results
from tests.simulation.script import Script
from tests.simulation.shrinking import invariants_of, shrink
from tests.simulation.world import RunResult, Violation, run_seed

VIOLATIONS_SHOWN_MAX = 20
DETAIL_CHARACTERS_MAX = 300


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.shrink is not None:
        return _shrink(options)
    if options.planted:
        return look_for_all(options.planted_name or [], seeds_max=options.seeds, processes=options.processes)
    return _run(options, options.seeds if options.script is None else 1)


def _run(options: argparse.Namespace, seeds: int) -> int:
    totals: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    violations: list[dict[str, object]] = []
    begin = time.monotonic()
    done = 0
    for done, result in enumerate(_results(options), start=1):
        totals.update(events=result.events, points_recovered=result.points_recovered)
        faults.update(result.faults)
        if result.violations:
            _show_failure(result, options)
            violations.extend(_summary_of(violation) for violation in result.violations)
        if options.hashes:
            print(f"{result.seed} {result.trace}", file=sys.stderr)
        if done % 25 == 0 or done == seeds:
            rate = done / (time.monotonic() - begin)
            print(f"{done}/{seeds} seeds, {rate:.1f} a second, {len(violations)} violations", file=sys.stderr)
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


def _results(options: argparse.Namespace) -> Iterator[RunResult]:
    if options.script is not None:
        if options.fault is not None:
            plant(options.fault)
        script = Script.from_json(options.script.read_text())
        return iter([run_seed(script.seed, script, readable=options.trace)])
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    processes = 1 if options.trace else options.processes
    return results(seeds, options.fault, processes=processes, readable=options.trace)


def _shrink(options: argparse.Namespace) -> int:
    """Prints the smallest script; the way there goes to stderr."""
    if options.fault is not None:
        plant(options.fault)
    result = run_seed(options.shrink)
    broken = invariants_of(result)
    if not broken:
        print(f"seed {options.shrink} breaks nothing", file=sys.stderr)
        return 1

    def progress(attempts: int, decisions: int) -> None:
        print(f"attempt {attempts}: {decisions} decisions", file=sys.stderr)

    script = shrink(result.script, broken[0], on_progress=progress)
    print(f"{len(result.script.decisions)} decisions shrank to {len(script.decisions)}", file=sys.stderr)
    print(script.to_json(fault=options.fault, violates=broken[0]))
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=_positive, default=100)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument(
        "--fault",
        type=lambda name: EARLIER_NAMES.get(name, name),
        choices=sorted(PLANTED_FAULTS),
        help="plant this defect; it must be found",
    )
    parser.add_argument("--processes", type=_positive, default=os.cpu_count() or 1)
    parser.add_argument("--trace", action="store_true", help="print every event to stderr, in one process")
    parser.add_argument("--hashes", action="store_true", help="print every seed's trace hash to stderr")
    parser.add_argument("--stop-at-first", action="store_true", help="end with the first failing seed")
    parser.add_argument("--shrink", type=int, metavar="SEED", help="print the smallest script of this seed that fails")
    parser.add_argument("--script", type=Path, metavar="FILE", help="play this script instead of seeds")
    parser.add_argument(
        "--planted", action="store_true", help="look for every planted fault, over at most --seeds seeds each"
    )
    parser.add_argument(
        "--planted-name", action="append", choices=sorted(PLANTED_FAULTS), help="with --planted: only this one"
    )
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
    print(f"its swarm: {', '.join(result.swarm.weights)}", file=sys.stderr)
    fault = f" --fault {options.fault}" if options.fault else ""
    print(f"again: python -m tests.simulation --seeds 1 --first-seed {result.seed}{fault} --trace", file=sys.stderr)
    print(f"smaller: python -m tests.simulation --shrink {result.seed}{fault}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
