"""Which process server takes a machine: all disks of a machine go to one, the one with the fewest disks.

An assignment stays until somebody changes it: a process server that is silent for a while keeps its machines.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from protocol.vocabulary import ProcessServerId


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessServerLoad:
    """A process server that has said where it listens."""

    process_server: ProcessServerId
    disks: int
    is_silent: bool


def choose_process_server(candidates: Iterable[ProcessServerLoad]) -> ProcessServerId | None:
    """One that is heard before a silent one, then the fewest disks, then by identifier. None if there is none."""
    ranked = sorted(candidates, key=lambda load: (load.is_silent, load.disks, load.process_server))
    return ranked[0].process_server if ranked else None
