"""The whole line's cost beside the sum of its stages: CPU-seconds per GiB of non-zero data, in one run on one image.

Runs the demo (everything real: three processes, TLS, durable cache, store, recovery and comparison), then each stage's
bare call on the very image that was replicated. `python -m benchmarks.line [--size BYTES] [--output FILE]`; the last
line of stdout is JSON. Exit code 1 if what was recovered is not identical.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.stages import GIB, StageCost, measure, non_zero_bytes

SIZE_TEXT_DEFAULT: Final = "2 GiB"
INITIAL: Final = "initial_replication"


def run_demo(directory: Path, size: str) -> dict[str, Any]:
    """The last line of `farpoint demo --json`. Raises CalledProcessError unless it ended well."""
    command = [sys.executable, "-m", "farpoint", "demo", "--json", "--keep", str(directory), "--size", size]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def figures(demo: dict[str, Any], stages: list[StageCost], *, data_bytes: int) -> dict[str, Any]:
    """What the run says, per GiB of non-zero data."""
    initial = demo["phases"][INITIAL]
    stage_sum = sum(stage.cpu_seconds_per_gib for stage in stages)
    line = initial["cpu_seconds"] * GIB / data_bytes
    recovery = demo["recovered"][0]
    return {
        "identical": demo["identical"],
        "data_bytes": data_bytes,
        "initial_cpu_seconds_per_gib": round(line, 2),
        "stage_sum_cpu_seconds_per_gib": round(stage_sum, 2),
        "initial_cpu_vs_stage_sum": round(line / stage_sum, 2),
        "initial_seconds": initial["seconds"],
        "recovery_seconds": recovery["seconds"],
        "stages": {stage.stage: round(stage.cpu_seconds_per_gib, 3) for stage in stages},
    }


def print_table(result: dict[str, Any]) -> None:
    table = Table(title=f"CPU-seconds per GiB of {result['data_bytes'] / GIB:.2f} GiB non-zero data")
    table.add_column("stage")
    table.add_column("CPU s/GiB", justify="right")
    for name, cost in result["stages"].items():
        table.add_row(name, f"{cost:.3f}")
    table.add_section()
    table.add_row("sum of the stages", f"{result['stage_sum_cpu_seconds_per_gib']:.2f}")
    table.add_row("the whole line, agent and process server", f"{result['initial_cpu_seconds_per_gib']:.2f}")
    table.add_row("ratio", f"{result['initial_cpu_vs_stage_sum']:.2f}")
    Console(stderr=True).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default=SIZE_TEXT_DEFAULT, help="of the image")
    parser.add_argument("--output", type=Path, help="where the JSON is written as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="farpoint-bench-") as temporary:
        kept = Path(temporary) / "demo"
        demo = run_demo(kept, options.size)
        image = kept / "source-1.img"
        stages = measure(image, directory=Path(temporary))
        result = figures(demo, stages, data_bytes=non_zero_bytes(image))
    print_table(result)
    text = json.dumps(result)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)
    return 0 if result["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
