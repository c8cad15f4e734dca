"""What a fuzz target is, and one run of it within its bounds.

A target takes any bytes and returns, or raises one of its refusals; whatever else it raises is a defect, and so is a
run that takes more processor time or memory than the target claims.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

KIBIBYTES_PER_MEBIBYTE: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """run: the parser and the properties of what it gives. refusals: the documented errors, all that it may raise.

    seeds: sound inputs, from which mutations are made. bytes_max: longer inputs are not tried.
    """

    name: str
    run: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]
    seeds: Callable[[], Sequence[bytes]]
    bytes_max: int = 4096
    cpu_seconds_max: float = 2.0
    memory_mib_max: int = 64


class BoundBrokenError(Exception):
    """A run took more than its target claims."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one run: processor time, and by how much the process has grown beyond its highest mark so far."""

    cpu_seconds: float
    memory_mib: float


def run_bounded(target: Target, data: bytes, *, slowdown: float = 1.0) -> Cost:
    """One run. slowdown: of an instrumented process. Raises BoundBrokenError, and whatever is no refusal."""
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    try:
        target.run(data)
    except target.refusals:
        pass
    cpu_seconds = time.process_time() - begun
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before) / KIBIBYTES_PER_MEBIBYTE
    if cpu_seconds > target.cpu_seconds_max * slowdown:
        raise BoundBrokenError(f"{target.name}: {cpu_seconds:.2f} s of processor time for {len(data)} bytes")
    if grown > target.memory_mib_max:
        raise BoundBrokenError(f"{target.name}: {grown:.0f} MiB for {len(data)} bytes")
    return Cost(cpu_seconds=cpu_seconds, memory_mib=grown)
