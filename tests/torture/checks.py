"""What must hold after every torment, once everything runs again; DESIGN's numbers of the invariants are in brackets.

Invariant: a check asks only what an operator could ask, and recovers with the store and a recovery key alone.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from runtime.exit_codes import ExitCode
from tests.scenarios.disks import are_equal, digest_of
from tests.scenarios.processes import Server
from tests.torture.tortured_site import PROGRAM_NAMES, TorturedSite

ACKNOWLEDGED_SURVIVES: Final = "acknowledged-survives"
"""[1] Nothing that a process server acknowledged is lost, nor does an epoch end for it."""
POINT_IS_EXACT: Final = "point-is-exact"
"""[3] A recovery point is the source as it was at one time, no earlier than it says."""
POINTS_ARE_KEPT: Final = "points-are-kept"
"""[8, 11] A point that was ever stated can be recovered."""
BACKLOG_DRAINS: Final = "backlog-drains"
"""[13] When the torment is over there is a point of the newest version before long."""
LIMITS_HOLD: Final = "limits-hold"
"""[13] The cache stays within its limit, and files that crashes left do not pile up."""
ENDS_IN_ORDER: Final = "ends-in-order"
"""A program ends by a kill, or with a documented exit code; it logs no traceback, and starts again."""

HEALING_SECONDS_MAX: Final = 120.0
"""Four times the longest pause that any program makes before it tries again by itself."""
UNFINISHED_PER_END_MAX: Final = 8
"""Uploads that one process server may have had under way when it was killed."""
EXPIRED_SECONDS: Final = 2 * 3600.0
"""Older than anything that a store keeps of unfinished files."""


class InvariantBroken(AssertionError):
    """What was found, by the name of what must hold."""

    def __init__(self, invariant: str, detail: str) -> None:
        self.invariant = invariant
        super().__init__(detail)


def require(invariant: str, holds: bool, detail: str) -> None:
    if not holds:
        raise InvariantBroken(invariant, detail)


@contextmanager
def breaks(invariant: str) -> Iterator[None]:
    """What fails in the block breaks this invariant, unless it says which."""
    try:
        yield
    except InvariantBroken:
        raise
    except AssertionError as error:
        raise InvariantBroken(invariant, str(error)) from error


class Checks:
    """Of one site, again and again."""

    def __init__(self, site: TorturedSite) -> None:
        self._site = site
        self._logs_seen = dict.fromkeys(PROGRAM_NAMES, 0)
        self.recovered = 0
        """Points that were rebuilt and found equal."""

    def heal(self) -> None:
        """Starts what has ended, after a look at how; on return all programs answer."""
        for name in PROGRAM_NAMES:
            expect_orderly_end(self._site.programs[name])
        with breaks(ENDS_IN_ORDER):
            self._site.start_what_ended()

    def run(self, draw: random.Random) -> None:
        """Everything, on a site whose torment is over and whose programs run. Raises InvariantBroken."""
        site = self._site
        with breaks(BACKLOG_DRAINS):
            site.source.change(writes=draw.randint(1, 30))
            newest = self._wait_for_newest()
            wait = site.site.wait_until
            wait("the cache drains", lambda: site.agent.is_committed(site.disk), seconds=HEALING_SECONDS_MAX)
        before = site.acknowledged
        site.look()
        require(
            ACKNOWLEDGED_SURVIVES,
            site.acknowledged[0] == 1,
            f"epoch {site.acknowledged[0]} began after {before} was acknowledged",
        )
        with breaks(POINTS_ARE_KEPT):
            stored = {row["point"]: row for row in site.site.stored_points(site.disk)}
        self._check_stated(stored)
        with breaks(POINT_IS_EXACT):
            self._recover(stored[newest], exactly=site.source.path)
            older = sorted(stored.keys() & site.stated - {newest})
            if older:
                self._recover(stored[draw.choice(older)])
        self._check_logs()
        self._check_limits()

    def _wait_for_newest(self) -> str:
        """The first stated point since the source's last change."""
        site = self._site

        def found() -> str:
            new = [one for one in site.site.points(site.disk) if one.instant_ns >= site.source.changed_ns]
            return new[-1].point if new else ""

        return site.site.wait_until("a point of the newest version", found, seconds=HEALING_SECONDS_MAX)

    def _check_stated(self, stored: dict[str, dict[str, Any]]) -> None:
        site = self._site
        missing = sorted(site.stated - stored.keys())
        require(POINTS_ARE_KEPT, not missing, f"{len(missing)} stated points are not in storage: {missing[:3]}")
        known = {point.point for point in site.site.points(site.disk)}
        forgotten = sorted(site.stated - known)
        require(POINTS_ARE_KEPT, not forgotten, f"the configuration server has forgotten {forgotten[:3]}")
        status = site.site.disk(site.disk)
        newest_ns = max(row["instant_ns"] for row in site.site.stored_points(site.disk))
        require(
            POINTS_ARE_KEPT,
            status is not None and (status.newest_point_instant_ns or 0) <= newest_ns,
            f"status states a point of {status and status.newest_point_instant_ns}; storage's newest is of {newest_ns}",
        )

    def _recover(self, row: dict[str, Any], *, exactly: Path | None = None) -> None:
        """The point is what the disk held at one time: no older than the version that was whole at its instant."""
        site = self._site
        target = site.root / f"recovered-{row['point']}"
        target.unlink(missing_ok=True)
        site.site.recover(site.disk, str(row["point"]), target)
        if exactly is not None:
            require(POINT_IS_EXACT, are_equal(target, exactly), f"{row} differs from the source: {target}")
        fitting = fitting_digests(site, row["instant_ns"])
        require(POINT_IS_EXACT, digest_of(target) in fitting, f"{row} is no version of its instant or later: {target}")
        target.unlink()
        self.recovered += 1

    def _check_logs(self) -> None:
        for name, server in self._site.programs.items():
            log = server.log_path.read_bytes()
            fresh = log[self._logs_seen[name] :]
            self._logs_seen[name] = len(log)
            place = fresh.find(b"Traceback")
            shown = fresh[max(0, place - 200) : place + 3000].decode("utf-8", "replace")
            require(ENDS_IN_ORDER, place < 0, f"{name} logged a traceback: {shown}")

    def _check_limits(self) -> None:
        site = self._site
        limit = int(site.site.process_endpoint.metric("farpoint_process_server_cache_limit_bytes"))
        used = sum(path.stat().st_blocks * 512 for path in (site.site.process_directory / "cache").iterdir())
        require(LIMITS_HOLD, used <= limit, f"the cache occupies {used} bytes of {limit}")
        unfinished, most = len(self._unfinished()), UNFINISHED_PER_END_MAX * (site.abrupt_ends + 1)
        require(LIMITS_HOLD, unfinished <= most, f"{unfinished} unfinished files after {site.abrupt_ends} abrupt ends")
        partial = [path.name for path in site.root.rglob("*.partial")]
        require(LIMITS_HOLD, not partial, f"recoveries left {partial}")

    def _unfinished(self) -> list[Path]:
        directory = self._site.site.store_directory / ".unfinished"
        return list(directory.iterdir()) if directory.is_dir() else []

    def run_last(self, draw: random.Random) -> None:
        """Before a site ends: what crashes left is swept when it has become old, and everything stops in order."""
        site, expired = self._site, time.time() - EXPIRED_SECONDS
        for path in self._unfinished():
            os.utime(path, (expired, expired))
        old = {path.name for path in self._unfinished()}
        with breaks(ENDS_IN_ORDER):
            site.site.process_server.restart()
        self.run(draw)
        left = old & {path.name for path in self._unfinished()}
        require(LIMITS_HOLD, not left, f"{len(left)} old unfinished files were not swept")
        with breaks(ENDS_IN_ORDER):
            site.site.stop()


def expect_orderly_end(server: Server) -> None:
    """Running, never started, killed, or ended with a documented exit code."""
    status = server.ended_with
    if status is None or status == -9:
        return
    require(
        ENDS_IN_ORDER,
        status in ExitCode.__members__.values() and status != ExitCode.USAGE,
        f"{server.name} ended with {status}\n{server.log_tail()}",
    )


def fitting_digests(site: TorturedSite, instant_ns: int) -> set[str]:
    """Of every version that a point of this instant may hold."""
    versions = site.source.versions
    first = max((number for number, one in enumerate(versions) if one.since_ns <= instant_ns), default=0)
    return {one.digest for one in versions[first:]}
