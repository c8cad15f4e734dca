"""One lane: torment after torment on one site after another, until its time is over.

Invariants: a site on which an invariant broke is kept and never tormented again; whatever happens, all that a lane has
mounted, made or started is gone when it ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.torture.checks import BACKLOG_DRAINS, ENDS_IN_ORDER, Checks, InvariantBroken, breaks
from tests.torture.network import Loopback, Namespace, free_namespace
from tests.torture.power import PowerSupply, release
from tests.torture.schedule import draw_for, torments
from tests.torture.torment import Need, Torment
from tests.torture.tortured_site import Surroundings, TorturedSite

STEPS_PER_SITE: Final = 24
"""A history grows, and with it the time that each recovery takes."""
POINTS_PER_SITE_MAX: Final = 600
"""The configuration server names the newest thousand at once."""
SHORT_SECONDS_MAX: Final = 8.0
LONG_SECONDS_MAX: Final = 150.0
LONG_SHARE: Final = 1 / 40
"""Of the run: no torment lasts longer."""
VIOLATIONS_MAX: Final = 5
"""After so many a lane ends: each keeps a site, and more of them say nothing new."""
THE_TORTURE_ITSELF: Final = "the-torture-itself"
"""Not an invariant: the step could not be done or judged. It counts as a violation, since nothing was shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """directory: where the site was kept."""

    invariant: str
    kind: str
    seed: int
    lane: int
    step: int
    what: str
    detail: str
    directory: str


@dataclass(slots=True, kw_only=True)
class Lane:
    """What it is to do, and what came of it."""

    seed: int
    number: int
    seconds: float
    root: Path
    """Existing and empty; all of it goes into it but what is kept."""
    kept: Path
    kinds: Sequence[type[Torment]]
    available: frozenset[Need]
    steps: int = 0
    sites: int = 0
    recovered: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    violations: list[Violation] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "sites": self.sites,
            "points_recovered": self.recovered,
            "counts": dict(+self.counts),
            "violations": [asdict(violation) for violation in self.violations],
        }

    def run(self) -> None:
        end = time.monotonic() + self.seconds
        schedule = torments(self.seed, self.number, self.kinds)
        while time.monotonic() < end and len(self.violations) < VIOLATIONS_MAX:
            self.sites += 1
            directory = self.root / f"site-{self.sites}"
            directory.mkdir()
            try:
                with self._surroundings(directory) as surroundings:
                    self._torment_site(directory, surroundings, schedule, end)
            finally:
                if self._has_disks:
                    release(directory)
                shutil.rmtree(directory, ignore_errors=True)

    @property
    def _has_disks(self) -> bool:
        return {Need.ROOT, Need.LOOP_DISKS} <= self.available

    @contextmanager
    def _surroundings(self, directory: Path) -> Iterator[Surroundings]:
        network = free_namespace() if {Need.ROOT, Need.NAMESPACES} <= self.available else Loopback()
        try:
            yield Surroundings(supply=PowerSupply(directory) if self._has_disks else None, network=network)
        finally:
            network.remove()

    def _torment_site(
        self, directory: Path, surroundings: Surroundings, schedule: Iterator[type[Torment]], end: float
    ) -> None:
        step_of_site = "the site's beginning"
        kind = "none"
        try:
            with contextlib.ExitStack() as stack:
                site = TorturedSite(directory, surroundings, draw_for(self.seed, self.number, f"site {self.sites}"))
                stack.enter_context(site)
                checks = Checks(site)
                for _ in range(STEPS_PER_SITE):
                    if time.monotonic() >= end or len(site.stated) > POINTS_PER_SITE_MAX:
                        break
                    self.steps += 1
                    torment = next(schedule)(
                        site, draw_for(self.seed, self.number, f"step {self.steps}"), seconds_max=self._seconds_max()
                    )
                    kind, step_of_site = torment.kind, torment.arrange()
                    self._step(torment, step_of_site, checks)
                kind, step_of_site = "none", "the site's end"
                checks.run_last(draw_for(self.seed, self.number, f"end {self.sites}"))
        except InvariantBroken as broken:
            self._note(broken.invariant, kind, step_of_site, str(broken), directory)
        except Exception:
            self._note(THE_TORTURE_ITSELF, kind, step_of_site, traceback.format_exc(), directory)

    def _step(self, torment: Torment, words: str, checks: Checks) -> None:
        began = time.monotonic()
        recovered = checks.recovered
        try:
            with breaks(ENDS_IN_ORDER):
                torment.run()
            ran = time.monotonic()
            checks.heal()
            torment.verify()
            with breaks(BACKLOG_DRAINS):
                checks.run(torment.draw)
        finally:
            self.counts.update(torment.counts)
            self.counts[f"step: {torment.kind}"] += 1
            self.recovered += checks.recovered - recovered
        self._say(f"{torment.kind}: {words}: {ran - began:.1f} s, healed in {time.monotonic() - ran:.1f} s")

    def _seconds_max(self) -> float:
        return min(LONG_SECONDS_MAX, max(SHORT_SECONDS_MAX, self.seconds * LONG_SHARE))

    def _note(self, invariant: str, kind: str, words: str, detail: str, directory: Path) -> None:
        kept = self.kept / f"seed-{self.seed}-lane-{self.number}-step-{self.steps}"
        shutil.copytree(directory, kept, symlinks=True, ignore=_without_images, dirs_exist_ok=True)
        (kept / "violation.txt").write_text(f"{invariant}\n{kind}\n{words}\n{detail}\n")
        self.violations.append(
            Violation(
                invariant=invariant,
                kind=kind,
                seed=self.seed,
                lane=self.number,
                step=self.steps,
                what=words,
                detail=detail,
                directory=str(kept),
            )
        )
        self._say(f"VIOLATION of {invariant} by {kind}: {words}\n{detail}\nkept: {kept}")

    def _say(self, text: str) -> None:
        print(f"lane {self.number} step {self.steps}: {text}", file=sys.stderr, flush=True)


def _without_images(directory: str, names: list[str]) -> list[str]:
    """What the loop devices lie on; the disks' contents are copied from where they are mounted, sockets not at all."""
    return [
        name
        for name in names
        if name in ("memory", "backing") or not ((path := Path(directory, name)).is_file() or path.is_dir())
    ]


def available_needs() -> frozenset[Need]:
    """What this machine has, tried out."""
    found = set()
    if os.geteuid() == 0:
        found.add(Need.ROOT)
    if shutil.which("strace"):
        found.add(Need.STRACE)
    tools = {"losetup", "mkfs.ext4", "mkfs.xfs", "mount", "umount"}
    if all(shutil.which(tool) for tool in tools) and "xfs" in Path("/proc/filesystems").read_text():
        found.add(Need.LOOP_DISKS)
    if shutil.which("ip") and shutil.which("nsenter") and Need.ROOT in found:
        with contextlib.suppress(Exception):
            made: Namespace = free_namespace()
            made.remove()
            found.add(Need.NAMESPACES)
    return frozenset(found)
