"""`make torture SEED=N MINUTES=M`: the real programs under kills, I/O errors, power cuts, and bad networks.

Several lanes torment a site each, at the same time; SEED decides what each does. Progress goes to stderr; the last line
of stdout is JSON: seed, minutes, counts by kind, violations. Exits 1 on any violation. What this machine lacks is said,
with the kinds that are skipped for it; in CI that is a failure.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

from runtime.exit_codes import ExitCode
from tests.torture.lane import THE_TORTURE_ITSELF, Lane, available_needs
from tests.torture.network import remove_namespaces_of
from tests.torture.planted_faults import PLANTED_FAULTS, environment
from tests.torture.power import release
from tests.torture.schedule import WEIGHTS
from tests.torture.torment import Need, Torment

LANES_PER_CORE: Final = 1.5
"""Much of a torment is waiting."""
ENDING_SECONDS_MAX: Final = 300.0
"""For a lane's last step, beyond its time."""
STOPPING_SECONDS_MAX: Final = 30.0
DETAIL_CHARACTERS_MAX: Final = 500
STOP_LANE: Final = signal.SIGUSR1
"""Not one of those that the commands which a lane runs within itself take for their own."""
_PR_SET_CHILD_SUBREAPER: Final = 36
"""prctl of linux/prctl.h."""


def main() -> int:
    options = _parse()
    available = available_needs()
    chosen = [kind for kind in WEIGHTS if not options.only or kind.kind in options.only]
    kinds = [kind for kind in chosen if kind.needs <= available]
    skipped = {kind.kind: sorted(need.value for need in kind.needs - available) for kind in chosen if kind not in kinds}
    if options.lane is not None:
        return _run_lane(options, kinds, available)
    for kind, missing in skipped.items():
        print(f"skipped: {kind}: this machine has no {', '.join(missing)}", file=sys.stderr)
    began = time.monotonic()
    reports = _run_lanes(options, available) if kinds else []
    counts: Counter[str] = Counter()
    for report in reports:
        counts.update(report["counts"])
    violations = [violation for report in reports for violation in report["violations"]]
    summary = {
        "seed": options.seed,
        "minutes": round((time.monotonic() - began) / 60, 1),
        **_totals(counts),
        "counts": dict(sorted(counts.items())),
        **{name: sum(report[name] for report in reports) for name in ("steps", "sites", "points_recovered")},
        "skipped": skipped,
        "violations": [_shortened(violation) for violation in violations],
        "violation_count": len(violations),
    }
    print(json.dumps(summary))
    is_incomplete = bool(skipped) and os.environ.get("CI") == "true"
    return 1 if violations or is_incomplete or not summary["steps"] else 0


def _totals(counts: Counter[str]) -> dict[str, int]:
    """Whole families of counts: every kill, every cut, every error once."""
    return {
        "kills": sum(count for name, count in counts.items() if name.startswith("kill at ")),
        "power_cuts": counts["power cut"] + counts["power cut after an error"],
        "io_errors": sum(count for name, count in counts.items() if name.startswith(("EIO at ", "ENOSPC at "))),
    }


class Stopped(BaseException):
    """The run is over before its time."""


def _run_lane(options: argparse.Namespace, kinds: list[type[Torment]], available: frozenset[Need]) -> int:
    signal.signal(STOP_LANE, _stop)
    if options.fault:
        os.environ.update(environment(options.fault))
    with tempfile.TemporaryDirectory(prefix="lane-", dir=options.directory, ignore_cleanup_errors=True) as root:
        lane = Lane(
            seed=options.seed,
            number=options.lane,
            seconds=60 * options.minutes,
            root=Path(root),
            kept=options.keep,
            kinds=kinds,
            available=available,
        )
        try:
            lane.run()
        except (Stopped, KeyboardInterrupt):
            print(f"lane {options.lane} was stopped", file=sys.stderr)
        print(json.dumps(lane.report()))
    return 1 if lane.violations else 0


def _stop(number: int, frame: object) -> None:
    raise Stopped


def _run_lanes(options: argparse.Namespace, available: frozenset[Need]) -> list[dict[str, Any]]:
    """Every lane's report. However it ends, nothing that a lane has started or mounted is left."""
    # why: what a lane that was killed had started becomes ours, and so can be found and ended
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, _stop)
    with tempfile.TemporaryDirectory(prefix="farpoint-torture-", ignore_cleanup_errors=True) as directory:
        command = [sys.executable, "-m", "tests.torture", *_passed_on(options), "--directory", directory]
        lanes = [
            subprocess.Popen(
                [*command, "--lane", str(number)], stdout=subprocess.PIPE, text=True, start_new_session=True
            )
            for number in range(options.lanes)
        ]
        try:
            deadline = time.monotonic() + 60 * options.minutes + ENDING_SECONDS_MAX
            return [_report_of(number, lane, deadline) for number, lane in enumerate(lanes)]
        finally:
            _end(lanes, Path(directory), available)


def _passed_on(options: argparse.Namespace) -> list[str]:
    words = ["--seed", str(options.seed), "--minutes", str(options.minutes), "--keep", str(options.keep)]
    words += ["--fault", options.fault] if options.fault else []
    return words + [word for kind in options.only for word in ("--only", kind)]


def _report_of(number: int, lane: subprocess.Popen[str], deadline: float) -> dict[str, Any]:
    """What it found; that it has no report is what was found, if it has none."""
    try:
        output, _ = lane.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        lane.send_signal(STOP_LANE)
        output = _last_words(lane)
    lines = output.splitlines() or [""]
    if lines[-1].startswith("{"):
        report: dict[str, Any] = json.loads(lines[-1])
        return report
    detail = f"ended with {lane.returncode} and without a report"
    violation = {"invariant": THE_TORTURE_ITSELF, "kind": "none", "lane": number, "detail": detail}
    return {"steps": 0, "sites": 0, "points_recovered": 0, "counts": {}, "violations": [violation]}


def _last_words(lane: subprocess.Popen[str]) -> str:
    """Of a lane that was told to stop."""
    try:
        return lane.communicate(timeout=STOPPING_SECONDS_MAX)[0]
    except subprocess.TimeoutExpired:
        lane.kill()
        return lane.communicate()[0]


def _end(lanes: list[subprocess.Popen[str]], directory: Path, available: frozenset[Need]) -> None:
    for lane in lanes:
        if lane.poll() is None:
            lane.send_signal(STOP_LANE)
    for lane in lanes:
        try:
            lane.wait(STOPPING_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            lane.kill()
            lane.wait()
    for orphan in _children():
        os.kill(orphan, signal.SIGKILL)
        os.waitpid(orphan, 0)
    if {Need.ROOT, Need.LOOP_DISKS} <= available:
        release(directory)
    if Need.NAMESPACES in available:
        for lane in lanes:
            remove_namespaces_of(lane.pid)


def _children() -> list[int]:
    """Of this process; what its lanes left behind has become its own."""
    found = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    return [int(word) for word in found.split()]


def _shortened(violation: dict[str, Any]) -> dict[str, Any]:
    return violation | {"detail": violation["detail"][:DETAIL_CHARACTERS_MAX]}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--lanes", type=int, default=max(1, int(LANES_PER_CORE * (os.cpu_count() or 1))))
    parser.add_argument("--lane", type=int, help="only this one, in this process: to see again what it did")
    kinds = sorted(kind.kind for kind in WEIGHTS)
    parser.add_argument("--only", action="append", default=[], choices=kinds, help="only these kinds; may be repeated")
    parser.add_argument("--fault", choices=sorted(PLANTED_FAULTS), help="plant this defect; it must be found")
    parser.add_argument(
        "--keep", type=Path, default=Path("build/torture").absolute(), help="where sites with a violation are kept"
    )
    parser.add_argument("--directory", type=Path, help="for the lanes' own directories; temporary by default")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Stopped, KeyboardInterrupt):
        print("stopped before the end", file=sys.stderr)
        sys.exit(ExitCode.INTERRUPTED)
