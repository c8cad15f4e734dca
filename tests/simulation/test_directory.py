"""The simulated medium keeps what runtime/directory.py promises over a power loss, and takes the rest away in every
way.
"""

import errno
import random

import pytest

from tests.simulation.directory import Operation, SimulatedDirectory, StorageMedium
from tests.simulation.process import ProcessKilled, SimulatedProcess


def make(seed=1, **options):
    medium = StorageMedium("host", random.Random(seed), **options)
    process = SimulatedProcess("process")
    return medium, process, SimulatedDirectory(medium, process)


def after_power_loss(medium):
    medium.lose_power()
    return SimulatedDirectory(medium, SimulatedProcess("successor"))


def test_what_was_synchronized_survives_power_loss():
    for seed in range(50):
        medium, _, directory = make(seed)
        file = directory.open("a", create=True)
        file.write(0, [b"one", b"two"])
        file.synchronize()
        file.write(6, [b"lost or not"])
        assert after_power_loss(medium).read("a").startswith(b"onetwo")


def test_what_was_not_synchronized_may_be_lost_kept_or_torn_at_sectors():
    outcomes = set()
    for seed in range(200):
        medium, _, directory = make(seed)
        file = directory.open("a", create=True)
        file.write(0, [b"x" * 1024])
        outcomes.add(after_power_loss(medium).read("a"))
    assert {b"", b"x" * 1024, b"x" * 512, bytes(512) + b"x" * 512} <= outcomes
    assert all(set(outcome[:512]) <= {0} or set(outcome[:512]) == {120} for outcome in outcomes)


def test_an_overwrite_that_was_not_synchronized_leaves_the_old_or_the_new_bytes_of_each_sector():
    outcomes = set()
    for seed in range(200):
        medium, _, directory = make(seed)
        file = directory.open("a", create=True)
        file.write(0, [b"old!" * 256])
        file.synchronize()
        file.write(0, [b"new!" * 256])
        outcomes.add(after_power_loss(medium).read("a"))
    assert outcomes == {first * 128 + second * 128 for first in (b"old!", b"new!") for second in (b"old!", b"new!")}


def test_an_unsynchronized_truncation_is_undone_or_kept():
    outcomes = set()
    for seed in range(100):
        medium, _, directory = make(seed)
        file = directory.open("a", create=True)
        file.write(0, [b"0123456789"])
        file.synchronize()
        file.truncate(4)
        outcomes.add(after_power_loss(medium).read("a"))
    assert outcomes == {b"0123", b"0123456789"}


def test_a_killed_process_without_power_loss_loses_nothing_that_it_had_written():
    medium, process, directory = make()
    directory.open("a", create=True).write(0, [b"written"])
    process.kill()
    assert SimulatedDirectory(medium, SimulatedProcess("successor")).read("a") == b"written"


def test_names_created_replaced_and_removed_are_durable_at_once():
    for seed in range(20):
        medium, _, directory = make(seed)
        directory.open("created", create=True)
        directory.replace("replaced", b"contents")
        directory.replace("removed", b"contents")
        directory.remove("removed")
        directory.remove("never there")
        successor = after_power_loss(medium)
        assert successor.names() == ["created", "replaced"]
        assert successor.read("replaced") == b"contents"


def test_after_a_failed_synchronize_a_second_one_proves_nothing():
    lost = 0
    for seed in range(100):
        medium, _, directory = make(seed)
        file = directory.open("a", create=True)
        file.write(0, [b"doomed"])
        medium.fail_next.add(Operation.SYNCHRONIZE)
        with pytest.raises(OSError, match="injected"):
            file.synchronize()
        file.synchronize()
        assert directory.read("a") == b"doomed"
        lost += after_power_loss(medium).read("a") != b"doomed"
    assert lost > 50


def test_what_is_written_after_a_failed_synchronize_and_synchronized_survives():
    for seed in range(50):
        medium, _, directory = make(seed)
        file = directory.open("a", create=True)
        file.write(0, [b"doomed"])
        medium.fail_next.add(Operation.SYNCHRONIZE)
        with pytest.raises(OSError, match="injected"):
            file.synchronize()
        file.write(512, [b"good"])
        file.synchronize()
        assert after_power_loss(medium).read("a")[512:] == b"good"


def test_a_dead_process_changes_nothing_any_more():
    medium, process, directory = make()
    file = directory.open("a", create=True)
    process.kill()
    for call in (
        lambda: file.write(0, [b"x"]),
        file.synchronize,
        lambda: directory.replace("b", b"x"),
        lambda: directory.remove("a"),
        lambda: directory.open("c", create=True),
        directory.names,
    ):
        with pytest.raises(ProcessKilled):
            call()
    assert sorted(medium.files) == ["a"]
    assert not medium.files["a"].contents


def test_a_process_can_be_killed_at_its_nth_durable_operation():
    _, process, directory = make()
    process.kill_after_operations(2)
    directory.replace("a", b"1")
    with pytest.raises(ProcessKilled):
        directory.replace("b", b"2")
    assert not process.is_alive


def test_errors_are_those_of_the_operating_system():
    _, _, directory = make(capacity_bytes=1000)
    directory.open("a", create=True)
    with pytest.raises(FileExistsError):
        directory.open("a", create=True)
    with pytest.raises(FileNotFoundError):
        directory.open("b")
    with pytest.raises(FileNotFoundError):
        directory.read("b")
    with pytest.raises(OSError, match="no space"):
        directory.open("c", create=True, preallocate_bytes=2000)
    with pytest.raises(OSError, match="aligned"):
        directory.open("a", direct=True).write(0, [b"not a whole page"])


@pytest.mark.parametrize("operation", list(Operation))
def test_each_operation_can_be_made_to_fail_once(operation):
    medium, _, directory = make()
    file = directory.open("a", create=True)
    file.write(0, [b"x"])
    calls = {
        Operation.READ: lambda: directory.read("a"),
        Operation.WRITE: lambda: file.write(1, [b"y"]),
        Operation.SYNCHRONIZE: file.synchronize,
        Operation.CREATE: lambda: directory.open("b", create=True),
        Operation.REPLACE: lambda: directory.replace("c", b"z"),
        Operation.REMOVE: lambda: directory.remove("a"),
    }
    reads = []
    medium.on_read_failure = lambda: reads.append(1)
    medium.fail_next.add(operation)
    with pytest.raises(OSError, match="injected") as caught:
        calls[operation]()
    assert caught.value.errno == errno.EIO
    assert bool(reads) is (operation is Operation.READ)
    calls[operation]()


def test_a_full_medium_takes_nothing_but_what_was_preallocated():
    medium, _, directory = make()
    file = directory.open("a", create=True, preallocate_bytes=1024)
    medium.is_full = True
    file.write(0, [bytes(1024)])
    for call in (
        lambda: file.write(1024, [b"x"]),
        lambda: directory.replace("b", b"x"),
        lambda: directory.open("c", create=True, preallocate_bytes=1),
    ):
        with pytest.raises(OSError, match="no space") as caught:
            call()
        assert caught.value.errno == errno.ENOSPC
    assert directory.free_bytes() == 0
    medium.heal()
    directory.replace("b", b"x")


def test_a_flipped_bit_is_there_for_readers_and_after_a_power_loss():
    medium, _, directory = make()
    directory.replace("a.ledger", bytes(64))
    directory.replace("b", bytes(64))
    assert medium.flip_bit(random.Random(1), suffix=".ledger") == "a.ledger"
    assert sum(directory.read("a.ledger")).bit_count() == 1
    assert sum(after_power_loss(medium).read("a.ledger")).bit_count() == 1
    assert directory.read("b") == bytes(64)
    assert medium.flip_bit(random.Random(1), suffix=".nothing") is None
