"""Many seeds over several processes; results come in the order of the seeds."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator
from typing import Final

from tests.simulation.planted import plant
from tests.simulation.world import RunResult, run_seed

SEEDS_PER_WORKER_MAX: Final = 200
"""A worker is replaced then: what a run leaves behind does not pile up."""


def results(
    seeds: range, fault: str | None, *, processes: int, readable: bool = False, is_apart: bool = False
) -> Iterator[RunResult]:
    """Every seed's result. fault: a defect to plant first. With one process everything happens in this one, unless it
    is to stay free of the defect (is_apart)."""
    if processes == 1 and not is_apart:
        prepare_worker(fault)
        for seed in seeds:
            yield run_seed(seed, readable=readable)
            gc.collect()
        return
    # why: a forked child would share the parent's threads' locks; a spawned one also proves that nothing is inherited
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, prepare_worker, (fault,), maxtasksperchild=SEEDS_PER_WORKER_MAX) as pool:
        yield from pool.imap(run_in_worker, seeds)


def prepare_worker(fault: str | None) -> None:
    if fault is not None:
        plant(fault)
    gc.collect()
    gc.freeze()


def run_in_worker(seed: int) -> RunResult:
    result = run_seed(seed)
    gc.collect()
    return result
