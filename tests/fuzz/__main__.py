"""`make fuzz MINUTES=N`: every target in turn with an equal share of the time, and every damage to the small files.

The last line of stdout is JSON. Exit status 1 for any crash, timeout, broken bound, or damage that went unnoticed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.fuzz.damage import DAMAGEABLE
from tests.fuzz.registry import TARGETS
from tests.fuzz.worker import DAMAGE_PREFIX, TIMEOUT_SECONDS

CORPUS: Final = Path(__file__).parent / "corpus"
KEPT_FILE_BYTES_MAX: Final = 4096
KEPT_BYTES_PER_TARGET_MAX: Final = 20 * 1024
DAMAGE_SHARE: Final = 0.25
"""Of the time, for all damage to small files; what it does not need is left over."""
GRACE_SECONDS: Final = 3 * TIMEOUT_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a worker reported. crashes include a timeout, a memory breach, and a worker that died."""

    name: str
    executions: int
    slowest_cpu_seconds: float
    peak_memory_mib: int
    crashes: list[dict[str, str]]
    is_complete: bool


def run_worker(name: str, directory: Path, seconds: float) -> Outcome:
    """Blocks for about `seconds`."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    command = [sys.executable, "-m", "tests.fuzz.worker", name, str(directory), "--seconds", str(seconds)]
    with open(directory / "log", "wb") as log:
        try:
            status = subprocess.run(
                [*command, "--corpus", str(CORPUS / name)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                timeout=seconds + GRACE_SECONDS,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
    report_path = directory / "report.json"
    report: dict[str, Any] = json.loads(report_path.read_bytes()) if report_path.exists() else {}
    crashes = report.get("crashes", [])
    if status and not crashes:
        artifacts = [str(path) for path in directory.glob("*-*") if path.is_file()]
        crashes = [{"target": name, "error": f"ended with status {status}", "where": str(directory / "log"),
                    "input": ", ".join(artifacts)}]  # fmt: skip
    outcome = Outcome(
        name=name,
        executions=report.get("executions", 0),
        slowest_cpu_seconds=report.get("slowest_cpu_seconds", 0.0),
        peak_memory_mib=report.get("peak_memory_mib", 0),
        crashes=crashes,
        is_complete=report.get("is_complete", False),
    )
    print(
        f"{name:32} {outcome.executions:9} runs, slowest {outcome.slowest_cpu_seconds:.3f} s, "
        f"{outcome.peak_memory_mib} MiB{', CRASHED' if crashes else ''}",
        file=sys.stderr,
        flush=True,
    )
    return outcome


def keep(name: str, directory: Path) -> None:
    """Takes what a run found over into the kept corpus: the smallest inputs that reach all that was reached."""
    merged = directory / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir()
    found = [directory / "corpus", directory / "seeds", CORPUS / name]
    sources = [str(folder) for folder in found if folder.is_dir()]
    subprocess.run(
        [sys.executable, "-m", "tests.fuzz.merge", name, "-set_cover_merge=1", str(merged), *sources],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    # why: parsers without a line of Python in them have no coverage, and nothing to merge by
    chosen = merged if any(merged.iterdir()) else directory / "seeds"
    if not any(chosen.iterdir()):
        return
    shutil.rmtree(CORPUS / name, ignore_errors=True)
    (CORPUS / name).mkdir(parents=True)
    room = KEPT_BYTES_PER_TARGET_MAX
    for path in sorted(chosen.iterdir(), key=lambda one: one.stat().st_size):
        size = path.stat().st_size
        if size <= min(room, KEPT_FILE_BYTES_MAX):
            shutil.copyfile(path, CORPUS / name / path.name)
            room -= size


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="for all of it together")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this one; may be repeated")
    parser.add_argument("--damage", action="store_true", help="only the damage to small files")
    parser.add_argument("--directory", type=Path, default=Path("build/fuzz"), help="where logs and crashes go")
    parser.add_argument("--keep", action="store_true", help="take new inputs over into tests/fuzz/corpus")
    chosen = parser.parse_args()
    workers = os.process_cpu_count() if sys.version_info >= (3, 13) else len(os.sched_getaffinity(0))
    total_seconds = 60 * chosen.minutes * (workers or 1)
    names = chosen.target or ([] if chosen.damage else list(TARGETS))
    damaged = [] if chosen.target else [DAMAGE_PREFIX + file.name for file in DAMAGEABLE]
    damage_share = 1.0 if not names else DAMAGE_SHARE if damaged else 0.0
    target_seconds = total_seconds * (1 - damage_share) / max(1, len(names))
    # why: the cache's three files take nearly all of it, the others what is left of a moment
    damage_seconds = total_seconds * damage_share / 3
    begun = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        runs = [
            pool.submit(run_worker, name, chosen.directory / name.replace(" ", "-"), seconds)
            for group, seconds in ((reversed(damaged), damage_seconds), (names, target_seconds))
            for name in group
        ]
        outcomes = [run.result() for run in runs]
    seconds = time.monotonic() - begun
    if chosen.keep:
        for name in names:
            keep(name, chosen.directory / name)
    print(json.dumps(summary(outcomes, seconds)))
    return 1 if any(outcome.crashes for outcome in outcomes) else 0


def summary(outcomes: list[Outcome], seconds: float) -> dict[str, object]:
    """What the last line says."""
    fuzzed = [outcome for outcome in outcomes if not outcome.name.startswith(DAMAGE_PREFIX)]
    damaged = [outcome for outcome in outcomes if outcome.name.startswith(DAMAGE_PREFIX)]
    slowest = max(outcomes, key=lambda outcome: outcome.slowest_cpu_seconds)
    return {
        "engine": "atheris" if importlib.util.find_spec("atheris") else "mutations",
        "targets": len(fuzzed),
        "executions": sum(outcome.executions for outcome in fuzzed),
        "seconds": round(seconds, 1),
        "crashes": [crash for outcome in fuzzed for crash in outcome.crashes],
        "damage": {
            "files": len(damaged),
            "tries": sum(outcome.executions for outcome in damaged),
            "undetected_or_crashed": [crash for outcome in damaged for crash in outcome.crashes],
            "incomplete": [outcome.name for outcome in damaged if not outcome.is_complete],
        },
        "slowest": {"target": slowest.name, "cpu_seconds": slowest.slowest_cpu_seconds},
        "peak_memory_mib": max(outcome.peak_memory_mib for outcome in outcomes),
    }


if __name__ == "__main__":
    sys.exit(main())
