"""One fuzz target in a process of its own: `python -m tests.fuzz.worker NAME DIRECTORY --seconds N`.

Coverage-guided by atheris where it is installed; otherwise by the structured mutations alone. What it found lies in the
directory: report.json, and each offending input in crashes/.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import random
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tests.fuzz.target import Target

PACKAGES: Final = [
    "protocol", "storage", "runtime", "mobility_agent", "process_server", "config_server", "recovery", "tomllib",
]  # fmt: skip
"""What is instrumented."""
SLOWDOWN: Final = 6.0
"""How much longer an instrumented process may take than a target claims, on a machine that does other things too."""
TIMEOUT_SECONDS: Final = 30
MEMORY_MIB_MAX: Final = 1024
REPORT_SECONDS: Final = 1.0
DAMAGE_PREFIX: Final = "damage of "


class Report:
    """Counts runs, keeps the slowest, and writes both now and then: libFuzzer ends the process without a word."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._written_at = 0.0
        self.fields: dict[str, Any] = {"executions": 0, "slowest_cpu_seconds": 0.0, "crashes": [], "is_complete": True}

    def ran(self, cpu_seconds: float) -> None:
        self.fields["executions"] += 1
        if cpu_seconds > self.fields["slowest_cpu_seconds"]:
            self.fields["slowest_cpu_seconds"] = round(cpu_seconds, 4)
        if time.monotonic() - self._written_at > REPORT_SECONDS:
            self.write()

    def crashed(self, name: str, data: bytes, error: BaseException) -> None:
        path = self._directory / "crashes" / hashlib.sha1(data).hexdigest()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        where = traceback.extract_tb(error.__traceback__)[-1]
        self.fields["crashes"].append(
            {
                "target": name,
                "error": f"{type(error).__name__}: {error}"[:300],
                "where": f"{Path(where.filename).name}:{where.lineno}",
                "input": str(path),
            }
        )
        self.write()

    def write(self) -> None:
        self._written_at = time.monotonic()
        self.fields["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        (self._directory / "report.json").write_text(json.dumps(self.fields))


def quiet() -> None:
    """The parsers log each damaged input that they meet."""
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))


def fuzz_guided(name: str, directory: Path, corpus: Path, seconds: float) -> None:
    """Runs until the time is over or an input is no good; does not return."""
    import atheris  # type: ignore[import-not-found]

    with atheris.instrument_imports(include=PACKAGES), contextlib.redirect_stderr(io.StringIO()):
        registry = importlib.import_module("tests.fuzz.registry")
    from tests.fuzz.mutations import mutate
    from tests.fuzz.target import run_bounded

    quiet()
    target: Target = registry.TARGETS[name]
    seeds = list(target.seeds())
    report = Report(directory)

    def run(data: bytes) -> None:
        try:
            cost = run_bounded(target, data, slowdown=SLOWDOWN)
        except Exception as error:
            report.crashed(name, data, error)
            raise
        report.ran(cost.cpu_seconds)

    def alter(data: bytes, bytes_max: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if draw.random() < 0.5:
            altered: bytes = atheris.Mutate(data, bytes_max)
            return altered
        return mutate([data, data, *seeds], draw, bytes_max=bytes_max)

    found, given = directory / "corpus", directory / "seeds"
    for folder in (found, given):
        folder.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds):
        (given / f"seed-{number}").write_bytes(seed[: target.bytes_max])
    report.write()
    options = [
        f"-max_total_time={int(seconds)}", f"-timeout={TIMEOUT_SECONDS}", f"-rss_limit_mb={MEMORY_MIB_MAX}",
        f"-max_len={target.bytes_max}", f"-artifact_prefix={directory}/", "-print_final_stats=1",
    ]  # fmt: skip
    folders = [str(folder) for folder in (found, given, corpus) if folder.is_dir()]
    atheris.Setup([sys.argv[0], *options, *folders], run, custom_mutator=alter)
    atheris.Fuzz()


def fuzz_blindly(name: str, directory: Path, corpus: Path, seconds: float) -> None:
    """The same without coverage. Ends with the first input that is no good."""
    from tests.fuzz.mutations import mutate
    from tests.fuzz.registry import TARGETS
    from tests.fuzz.target import run_bounded

    target = TARGETS[name]
    kept = sorted(corpus.iterdir()) if corpus.is_dir() else []
    seeds = [*target.seeds(), *(path.read_bytes() for path in kept)]
    report, draw = Report(directory), random.Random()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        data = mutate(seeds, draw, bytes_max=target.bytes_max)
        try:
            report.ran(run_bounded(target, data, slowdown=SLOWDOWN).cpu_seconds)
        except Exception as error:
            report.crashed(name, data, error)
            break
    report.write()


def damage(name: str, directory: Path, seconds: float) -> None:
    """Every bit and every length of one small file, as far as the time goes."""
    from tests.fuzz.damage import DAMAGEABLE

    (file,) = (one for one in DAMAGEABLE if one.name == name.removeprefix(DAMAGE_PREFIX))
    report = Report(directory)
    until = time.monotonic() + seconds
    for _, damaged in itertools.chain(file.every_length(), file.every_bit()):
        if time.monotonic() > until:
            report.fields["is_complete"] = False
            break
        begun = time.process_time()
        try:
            file.check(damaged)
        except Exception as error:
            report.crashed(name, damaged, error)
        report.ran(time.process_time() - begun)
    report.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    chosen = parser.parse_args()
    chosen.directory.mkdir(parents=True, exist_ok=True)
    if chosen.name.startswith(DAMAGE_PREFIX):
        quiet()
        damage(chosen.name, chosen.directory, chosen.seconds)
    elif importlib.util.find_spec("atheris"):
        fuzz_guided(chosen.name, chosen.directory, chosen.corpus, chosen.seconds)
    else:
        quiet()
        fuzz_blindly(chosen.name, chosen.directory, chosen.corpus, chosen.seconds)


if __name__ == "__main__":
    main()
