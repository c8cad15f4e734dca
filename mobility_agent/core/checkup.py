"""What a machine and its disks are missing to be protected as well as they could be, and what to do about it.

Facts in, findings out. A finding is a problem when points suffer from it now; the rest is told so that nobody is
surprised later.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mobility_agent.core.tracking_choice import SourceChoice

LOCKED_BYTES_MIN: Final = 32 * 2**20
"""What the freezing process locks, with room."""
UNFREEZABLE_KINDS: Final = ("vfat", "msdos", "exfat", "ntfs3", "fuseblk", "udf")
"""Kinds of file systems that Linux cannot freeze."""
PROMISES: Final = {
    "bitmap": "every change is found, also while the agent is stopped; points of undisturbed rounds, else of freezes",
    "scan": "the whole disk is read each round; a point only if nobody wrote to it or had it mounted meanwhile",
}
UNSETTLED_SECONDS_MAX: Final = 1800.0
"""Without a settled round for so long, points are far behind whatever policy there is."""
NO_CHOICE: Final = SourceChoice(source="", reasons=())


class Weight(enum.StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTICE = "notice"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """about: a disk's path, or a part of the agent. advice: what to do, empty where nothing is to be done."""

    about: str
    weight: Weight
    text: str
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """Of the agent's machine."""

    is_enrolled: bool
    is_running: bool
    may_freeze: bool
    """CAP_SYS_ADMIN, as far as this process tells."""
    locked_bytes_max: int | None
    """RLIMIT_MEMLOCK; None: no limit, or none that holds for this process."""
    scripts: Sequence[str] = ()
    script_fault: str = ""
    """Why scripts around freezes would not be run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskFacts:
    """Of one disk."""

    path: str
    is_protected: bool
    fault: str = ""
    """Why it cannot be opened."""
    choice: SourceChoice = NO_CHOICE
    """What it would get if this process opened it as the agent."""
    source_in_use: str = ""
    reason_in_use: str = ""
    """Of a running agent: its source, and why that is no better."""
    is_disconnected: bool = False
    file_systems: Sequence[tuple[str, str]] = ()
    """(mount point, kind) of what is mounted for writing from it."""
    held_elsewhere: Sequence[str] = ()
    error: str = ""
    hint: str = ""
    unsettled_reason: str = ""
    rounds: int = 0
    points: int = 0
    settled_seconds_ago: float | None = None
    """Since its newest settled round; None before the first."""
    freeze_fault: str = ""
    """Why the newest freeze gave less than was wanted."""
    audit_alarms: int = 0
    resyncs: int = 0


def check_machine(facts: MachineFacts) -> list[Finding]:
    """What concerns all disks."""
    checks = (
        (
            not facts.is_enrolled,
            Weight.PROBLEM,
            "enrolment",
            "this machine is a member of no vault",
            "`mobility-agent enroll`",
        ),
        (
            facts.is_enrolled and not facts.is_running,
            Weight.PROBLEM,
            "agent",
            "the agent does not run",
            "`systemctl start farpoint-mobility-agent`, or `mobility-agent run`",
        ),
        (
            not facts.may_freeze,
            Weight.NOTICE,
            "freeze",
            "file systems cannot be frozen: CAP_SYS_ADMIN is missing",
            "busy disks get points only in quiet moments; run the agent by its unit, or as root",
        ),
        (
            facts.locked_bytes_max is not None and facts.locked_bytes_max < LOCKED_BYTES_MIN,
            Weight.NOTICE,
            "freeze",
            f"only {facts.locked_bytes_max} bytes of memory may be locked, and a freeze needs {LOCKED_BYTES_MIN}",
            "LimitMEMLOCK=64M in the unit, or `ulimit -l`",
        ),
        (
            bool(facts.script_fault),
            Weight.PROBLEM,
            "scripts",
            f"application-consistent points fail: {facts.script_fault}",
            "only root may be able to write scripts, and the directories that lead to them",
        ),
        (
            not facts.scripts and not facts.script_fault,
            Weight.NOTICE,
            "scripts",
            "no scripts: points are file-system-consistent at best",
            "application-points.md",
        ),
    )
    found = [
        Finding(about=about, weight=weight, text=text, advice=advice)
        for is_met, weight, about, text, advice in checks
        if is_met
    ]
    return found or [Finding(about="agent", weight=Weight.OK, text=f"runs; scripts: {', '.join(facts.scripts)}")]


def check_disk(facts: DiskFacts) -> list[Finding]:
    """What concerns one disk."""
    if facts.fault:
        return [Finding(about=facts.path, weight=Weight.PROBLEM, text=facts.fault)]
    found = [*_source(facts), *_freezing(facts), *_replication(facts)]
    if not facts.is_protected:
        advice = f"`mobility-agent protect {facts.path}`"
        found.insert(0, Finding(about=facts.path, weight=Weight.NOTICE, text="it is not protected", advice=advice))
    return found


def _source(facts: DiskFacts) -> list[Finding]:
    name = facts.source_in_use or facts.choice.source
    told = f"source {name}{'' if facts.source_in_use else ' would be used'}: {PROMISES.get(name, '')}"
    found = [Finding(about=facts.path, weight=Weight.OK, text=told)]
    reasons = facts.choice.reasons if not facts.source_in_use else (facts.reason_in_use,) if facts.reason_in_use else ()
    for reason in reasons:
        weight = Weight.PROBLEM if facts.choice.is_refused and not facts.source_in_use else Weight.NOTICE
        found.append(Finding(about=facts.path, weight=weight, text=f"no better source: {reason}"))
    if facts.source_in_use and facts.choice.source != facts.source_in_use and not facts.choice.reasons:
        text = f"{facts.choice.source} is possible now, and {facts.source_in_use} is in use"
        advice = "`systemctl restart farpoint-mobility-agent`"
        found.append(Finding(about=facts.path, weight=Weight.NOTICE, text=text, advice=advice))
    return found


def _freezing(facts: DiskFacts) -> list[Finding]:
    """A freeze makes less of a disk on which something is that cannot be frozen, or seen."""
    found = [
        Finding(
            about=facts.path,
            weight=Weight.NOTICE,
            text=f"{place} ({kind}) cannot be frozen: points of this disk are crash-consistent at best",
            advice="mount it read-only, or on demand",
        )
        for place, kind in facts.file_systems
        if kind in UNFREEZABLE_KINDS
    ]
    if facts.held_elsewhere:
        text = f"in use by somebody unknown: {', '.join(facts.held_elsewhere)}; its points are crash-consistent at best"
        advice = "what is mounted in another mount namespace cannot be frozen from here"
        found.append(Finding(about=facts.path, weight=Weight.NOTICE, text=text, advice=advice))
    return found


def _replication(facts: DiskFacts) -> list[Finding]:
    if facts.error:
        return [Finding(about=facts.path, weight=Weight.PROBLEM, text=facts.error, advice=facts.hint)]
    found = []
    if facts.is_disconnected:
        text = "no connection to its process server"
        advice = "its name and port (9443) have to be reachable from here; the agent's log says what it met"
        found.append(Finding(about=facts.path, weight=Weight.PROBLEM, text=text, advice=advice))
    if facts.rounds and not facts.points:
        why = f": {facts.unsettled_reason}" if facts.unsettled_reason else ""
        text = f"no recovery point in {facts.rounds} rounds since the agent began{why}"
        found.append(Finding(about=facts.path, weight=Weight.PROBLEM, text=text, advice="`mobility-agent freeze-now`"))
    elif facts.settled_seconds_ago is not None and facts.settled_seconds_ago > UNSETTLED_SECONDS_MAX:
        text = f"no round has settled for {facts.settled_seconds_ago:.0f} s: {facts.unsettled_reason}"
        found.append(Finding(about=facts.path, weight=Weight.PROBLEM, text=text, advice="`mobility-agent freeze-now`"))
    if facts.freeze_fault:
        text = f"the newest freeze gave less than was wanted: {facts.freeze_fault}"
        found.append(Finding(about=facts.path, weight=Weight.NOTICE, text=text))
    if facts.audit_alarms:
        text = f"tracking missed writes {facts.audit_alarms} times, which were read again"
        found.append(Finding(about=facts.path, weight=Weight.NOTICE, text=text))
    if facts.resyncs:
        text = f"everything was compared {facts.resyncs} times since the agent began; `status -o json` has the causes"
        found.append(Finding(about=facts.path, weight=Weight.NOTICE, text=text))
    return found
