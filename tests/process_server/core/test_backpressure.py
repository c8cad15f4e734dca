"""Credit never falls, is fair, and is zero before the cache is full."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from process_server.core.backpressure import (
    WINDOW_BYTES_MAX,
    WINDOW_BYTES_MIN,
    ConnectionCredit,
    Load,
    next_credit,
    window_bytes,
)

GIBIBYTE = 2**30
NEW = ConnectionCredit()

amounts = st.integers(0, 2**34)


def load(room: int = GIBIBYTE, memory: int = 64 * 2**20, connections: int = 1, promised: int = 0) -> Load:
    return Load(cache_room_bytes=room, memory_bytes_max=memory, connections=connections, promised_bytes=promised)


def test_one_connection_alone_gets_the_largest_window() -> None:
    assert next_credit(load(), NEW) == WINDOW_BYTES_MAX


def test_memory_is_shared_and_every_connection_gets_at_least_one_full_frame() -> None:
    assert next_credit(load(connections=8), NEW) == 8 * 2**20
    assert next_credit(load(connections=1000, room=2**40), NEW) == WINDOW_BYTES_MIN


def test_no_room_no_credit() -> None:
    assert next_credit(load(room=0), NEW) == 0
    assert next_credit(load(room=WINDOW_BYTES_MIN), NEW) == 0


def test_what_others_were_promised_is_not_promised_again() -> None:
    room = 10 * WINDOW_BYTES_MIN
    assert next_credit(load(room=room, promised=room), NEW) == 0


@given(room=amounts, memory=amounts, connections=st.integers(0, 5000), promised=amounts, granted=amounts, open_=amounts)
def test_the_total_never_falls(
    room: int, memory: int, connections: int, promised: int, granted: int, open_: int
) -> None:
    credit = ConnectionCredit(granted_bytes=granted, released_bytes=max(0, granted - open_))
    total = next_credit(load(room, memory, connections, promised + credit.promised_bytes), credit)
    assert total >= granted


@given(room=amounts, connections=st.integers(1, 64), steps=st.lists(st.integers(0, 63), max_size=200))
def test_promises_of_all_connections_together_fit_into_the_room(room: int, connections: int, steps: list[int]) -> None:
    all_credit = [NEW] * connections
    for step in steps:
        number = step % connections
        promised = sum(credit.promised_bytes for credit in all_credit)
        total = next_credit(load(room, 2**30, connections, promised), all_credit[number])
        all_credit[number] = ConnectionCredit(granted_bytes=total, released_bytes=all_credit[number].released_bytes)
    assert sum(credit.promised_bytes for credit in all_credit) <= room


@given(room=amounts, memory=amounts, connections=st.integers(1, 5000))
def test_a_window_is_nothing_or_holds_a_full_frame(room: int, memory: int, connections: int) -> None:
    window = window_bytes(load(room, memory, connections), NEW)
    assert window == 0 or WINDOW_BYTES_MIN <= window <= WINDOW_BYTES_MAX
