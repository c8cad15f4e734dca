"""Wall clocks may show any year; time goes on."""

from tests.simulation.clock import ServersClock, SimulatedClock, true_now_ns
from tests.simulation.loop import VirtualTimeLoop

YEAR_NS = 365 * 86400 * 10**9


def test_a_wall_clock_is_as_wrong_as_it_was_set_and_the_monotonic_one_never():
    loop = VirtualTimeLoop(seed=1)
    clock = SimulatedClock(loop, skew_ns=-10 * YEAR_NS)
    assert clock.now_ns() == true_now_ns(loop) - 10 * YEAR_NS
    assert clock.monotonic_seconds() == loop.time()
    loop.close()


def test_the_servers_clock_begins_a_span_when_it_is_set_and_goes_on_over_restarts():
    loop = VirtualTimeLoop(seed=1)
    clock = ServersClock(loop)
    begin_ns = true_now_ns(loop)
    assert clock.now_ns() == begin_ns
    clock.set(10 * YEAR_NS)
    assert clock.now_ns() == begin_ns + 10 * YEAR_NS
    clock.set(0)
    assert clock.now_ns() == begin_ns
    clock.restart()
    assert clock.state().generation == 3
    assert not clock.was_right_until(begin_ns)
    assert clock.was_right_until(begin_ns - 1)
    loop.close()


def test_who_heard_it_lately_is_not_out_of_touch_when_it_is_set():
    loop = VirtualTimeLoop(seed=1)
    clock = ServersClock(loop)
    now_ns = true_now_ns(loop)
    clock.set(YEAR_NS)
    assert not clock.was_set_unheard(now_ns - 10**9, now_ns + 10**9)
    assert clock.was_set_unheard(now_ns - 10**9, now_ns + 3600 * 10**9)
    assert not clock.was_set_unheard(now_ns, now_ns + 3600 * 10**9)
    loop.close()
