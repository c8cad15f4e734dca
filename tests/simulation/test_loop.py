"""The loop of the simulation: virtual time, seeded order within asyncio's promises, inline executors."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.simulation.channels import context_of
from tests.simulation.loop import SimulationStuck, StepLimitExceeded, VirtualTimeLoop
from tests.simulation.process import RUNNING_PROCESS, ProcessKilled, SimulatedProcess


def run(main, seed=1, **options):
    loop = VirtualTimeLoop(seed=seed, **options)
    try:
        return loop.run_until_complete(main(loop))
    finally:
        loop.close()


async def order_of_tasks(loop, count=6, rounds=3):
    seen = []

    async def step(number):
        for _ in range(rounds):
            seen.append(number)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(step(number))
    return seen


def test_a_year_of_sleep_takes_no_time():
    async def main(loop):
        before = loop.time()
        await asyncio.sleep(365 * 86400)
        return loop.time() - before

    assert run(main) == pytest.approx(365 * 86400, abs=0.01)


def test_tasks_run_in_another_order_under_another_seed():
    orders = {tuple(run(order_of_tasks, seed)) for seed in range(20)}
    assert len(orders) > 10


def test_tasks_run_in_the_same_order_under_the_same_seed():
    assert run(order_of_tasks, 7) == run(order_of_tasks, 7)


def test_plain_callbacks_keep_their_order_under_every_seed():
    async def main(loop):
        seen = []
        for number in range(10):
            loop.call_soon(seen.append, number)
        await order_of_tasks(loop)
        return seen

    for seed in range(20):
        assert run(main, seed) == list(range(10))


def test_a_callback_and_a_task_may_overtake_each_other():
    async def main(loop):
        seen = []

        async def step():
            seen.append("task")

        async with asyncio.TaskGroup() as group:
            loop.call_soon(seen.append, "callback")
            group.create_task(step())
        return tuple(seen)

    assert len({run(main, seed) for seed in range(20)}) == 2


def test_a_run_with_nothing_left_to_do_is_stuck_and_says_so():
    async def main(loop):
        await loop.create_future()

    with pytest.raises(SimulationStuck):
        run(main)


def test_a_run_that_spins_is_ended_by_the_step_limit():
    async def main(loop):
        while True:
            await asyncio.sleep(0)

    with pytest.raises(StepLimitExceeded):
        run(main, steps_max=1000)


def test_an_executor_call_runs_after_the_call_and_before_its_result_arrives():
    async def main(loop):
        seen = []
        future = loop.run_in_executor(None, seen.append, "ran")
        seen.append("called")
        await future
        seen.append("delivered")
        return seen

    for seed in range(20):
        assert run(main, seed) == ["called", "ran", "delivered"]


def test_an_executor_with_one_worker_keeps_the_order_and_one_with_two_need_not():
    def order(executor, seed):
        async def main(loop):
            finished = []

            async def call(number):
                await loop.run_in_executor(executor, int, number)
                finished.append(number)

            async with asyncio.TaskGroup() as group:
                for number in range(2):
                    group.create_task(call(number))
            return tuple(finished)

        return run(main, seed)

    async def starts(loop):
        started = []
        executor = ThreadPoolExecutor(1)
        await asyncio.gather(*(loop.run_in_executor(executor, started.append, number) for number in range(20)))
        return started

    assert {order(ThreadPoolExecutor(2), seed) for seed in range(40)} == {(0, 1), (1, 0)}
    for seed in range(20):
        assert run(starts, seed) == list(range(20))


def test_an_executor_call_that_was_cancelled_before_it_began_never_runs():
    async def main(loop):
        seen = []
        loop.run_in_executor(None, seen.append, 1).cancel()
        await asyncio.sleep(1)
        return seen

    assert run(main) == []


def test_an_exception_in_an_executor_call_reaches_whoever_awaits_it():
    async def main(loop):
        await loop.run_in_executor(None, int, "nonsense")

    with pytest.raises(ValueError, match="nonsense"):
        run(main)


def test_an_exception_that_nobody_takes_is_a_failure_of_the_run():
    async def main(loop):
        loop.call_soon(int, "nonsense")
        await asyncio.sleep(1)
        return loop.failures

    assert len(run(main)) == 1


def test_a_killed_process_runs_no_executor_call_any_more():
    async def main(loop):
        process = SimulatedProcess("agent")
        seen = []

        async def work():
            RUNNING_PROCESS.set(process)
            future = loop.run_in_executor(None, seen.append, 1)
            process.kill()
            await future

        async with asyncio.TaskGroup() as group:
            task = group.create_task(work())
            await asyncio.wait([task])
            assert isinstance(task.exception(), ProcessKilled)
            raise ProcessKilled
        return seen

    with pytest.raises(BaseExceptionGroup) as caught:
        run(main)
    assert caught.group_contains(ProcessKilled)


def test_sets_of_tasks_iterate_in_the_order_of_their_making():
    async def main(loop):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(asyncio.sleep(1)) for _ in range(50)]
            return list(set(tasks)) == tasks

    assert run(main)


def test_nothing_of_a_held_process_runs_until_it_is_let_go_and_all_of_it_then():
    async def main(loop):
        process = SimulatedProcess("held")
        seen = []

        async def work():
            for number in range(3):
                seen.append(number)
                await asyncio.sleep(1)

        async with asyncio.TaskGroup() as group:
            group.create_task(work(), context=context_of(process))
            await asyncio.sleep(0.5)
            loop.hold(process)
            await asyncio.sleep(100)
            held = list(seen)
            loop.let_go(process)
        return held, seen, loop.time()

    held, seen, end = run(main)
    assert held == [0]
    assert seen == [0, 1, 2]
    assert 1101 < end < 1103
