"""Every parser, under mutations of what it reads: a value, or one of its own errors, within its bounds."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.mutations import mutate
from tests.fuzz.registry import TARGETS
from tests.fuzz.target import BoundBrokenError, Target, run_bounded

CORPUS = Path(__file__).parent / "corpus"
CORPUS_BYTES_MAX = 2**20


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What the parsers log about each damaged input is not what is looked at here."""
    kept = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    yield
    structlog.configure(**kept)


@pytest.mark.parametrize("name", TARGETS)
def test_a_mutated_input_gives_a_value_or_a_refusal_within_the_bounds(name: str) -> None:
    target = TARGETS[name]
    seeds = target.seeds()

    @settings(max_examples=100, deadline=None)
    @given(number=st.integers(0, 2**64 - 1), count=st.integers(1, 4))
    def run(number: int, count: int) -> None:
        draw = random.Random(number)
        for _ in range(count):
            run_bounded(target, mutate(seeds, draw, bytes_max=target.bytes_max))

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_the_kept_corpus_gives_values_and_refusals_within_the_bounds(name: str) -> None:
    for path in sorted((CORPUS / name).iterdir()):
        run_bounded(TARGETS[name], path.read_bytes())


def test_the_kept_corpus_is_small_and_belongs_to_targets() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < CORPUS_BYTES_MAX


def test_what_is_no_refusal_and_what_takes_too_much_is_told() -> None:
    def spend(data: bytes) -> object:
        if data == b"time":
            return sum(range(10**7))
        if data == b"memory":
            # why: a test before this one may have made the process larger than it is now
            highest_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return bytearray(b"x") * (highest_bytes + 64 * 2**20)
        raise KeyError(data)

    target = Target(
        name="t", run=spend, refusals=(ValueError,), seeds=lambda: [b""], cpu_seconds_max=0.05, memory_mib_max=32
    )
    for data, error in ((b"time", BoundBrokenError), (b"memory", BoundBrokenError), (b"", KeyError)):
        with pytest.raises(error):
            run_bounded(target, data)
