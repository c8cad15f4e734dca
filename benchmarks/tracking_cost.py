"""What tracking a live disk costs, beside what is asked of it: nanoseconds a write in the kernel, writes a second with
and without it in turns, CPU-seconds of agent and process server per changed GiB, and memory per TiB tracked.

`make tracking-cost`, as root, with fio; on a file-backed loop device. The last line of stdout is JSON. Exit code 1 if
anything is above what is asked (docs/performance.md). Other work on the machine makes every figure worse.
"""

from __future__ import annotations

import argparse
import enum
import json
import mmap
import operator
import os
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from mobility_agent.disk_reader import LocalDisk
from mobility_agent.tracking import bpf_calls
from mobility_agent.tracking.bitmap import BitmapSource
from mobility_agent.tracking.followed_disk import FollowedDisk
from mobility_agent.tracking.kernel_tracker import KernelTracker
from protocol.vocabulary import FRAME_RAW_BYTES_MAX, DiskId
from runtime.local_directory import LocalDirectory
from tests.live.block_devices import bpf_file_system, loop_device
from tests.live.test_whole_line import protect
from tests.live.tracked import DISK, MIB
from tests.scenarios.site import Site

GIB: Final = 2**30
TIB: Final = 2**40
DELTA_DISK_BYTES: Final = 4 * GIB
NANOSECONDS_A_WRITE_MAX: Final = 400
WRITES_KEPT_MIN: Final = 0.97
RANDOM_DELTA_CPU_SECONDS_MAX: Final = 0.5
"""Of agent and process server, for 1 % of a disk of 4 GiB in random 4 KiB blocks."""
RANDOM_DELTA_BLOCKS: Final = DELTA_DISK_BYTES // 100 // 4096
AGENT_MEMORY_BYTES_MAX: Final = 96 * MIB
BYTES_PER_TIB_MAX: Final = {4096: 128 * MIB, 65536: 16 * MIB}
"""By the size of the blocks that are tracked; between them by how many blocks there are."""
SEQUENTIAL_BYTES: Final = 256 * MIB
QUEUE_DEPTH: Final = 32
PROGRAM_NANOSECONDS_OFFSET: Final = 192
PROGRAM_RUNS_OFFSET: Final = 200
"""In struct bpf_prog_info, since 5.1."""
MEMORY_WRITES: Final = 2000
MEMORY_ROUNDS: Final = 3
IDLE_SECONDS: Final = 6.0
SELDOM: Final = {"heartbeat_seconds": 5, "copy_interval_seconds": 2, "point_interval_seconds": 2}
PARTS: Final = ("kernel", "memory", "delta")


class MoreCommands(enum.IntEnum):
    ENABLE_STATISTICS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table."""

    name: str
    found: float
    asked: float | None = None
    is_minimum: bool = False

    @property
    def is_met(self) -> bool:
        if self.asked is None:
            return True
        return self.found >= self.asked if self.is_minimum else self.found <= self.asked


def at_random(device: Path, *, seconds: float, reads: bool = False) -> tuple[int, float]:
    """(writes, writes a second), or reads, of 4 KiB past the page cache, QUEUE_DEPTH at a time."""
    what = "randread" if reads else "randwrite"
    words = f"--direct=1 --rw={what} --bs=4k --ioengine=libaio --iodepth={QUEUE_DEPTH} --time_based"
    done = run_fio(device, *words.split(), "--norandommap", "--randrepeat=0", f"--runtime={seconds}")
    return int(done["total_ios"]), float(done["iops"])


def run_fio(device: Path, *words: str) -> dict[str, Any]:
    command = ["fio", "--name=tracking-cost", f"--filename={device}", "--output-format=json", *words]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    job = json.loads(told[told.index("{") :])["jobs"][0]
    found: dict[str, Any] = job["write"] if job["write"]["total_ios"] else job["read"]
    return found


@contextmanager
def followed(device: Path, at: Path) -> Iterator[tuple[KernelTracker, FollowedDisk]]:
    """The device, with its writes being marked."""
    with bpf_file_system(at) as pins:
        tracker = KernelTracker(pins)
        tracker.open()
        size_bytes = int(Path(f"/sys/class/block/{device.name}/size").read_text()) * 512
        disk = tracker.follow(DISK, device=os.stat(device).st_rdev, size_bytes=size_bytes)
        try:
            yield tracker, disk
        finally:
            disk.close()
            tracker.close()


def run_nanoseconds(tracker: KernelTracker, offset: int = PROGRAM_NANOSECONDS_OFFSET) -> dict[str, int]:
    """By program: how long it has run since statistics were enabled, or with the other offset how often."""
    return {
        name.removeprefix("program_"): struct.unpack_from("<Q", bpf_calls._info(descriptor), offset)[0]
        for name, descriptor in tracker._descriptors.items()
        if name.startswith("program_")
    }


def kernel_cost(device: Path, at: Path, *, rounds: int, seconds: float) -> list[Figure]:
    """Of the round in which a write cost least, by program. The programs return from a read at once: what that costs
    is mostly the kernel's own measuring."""
    statistics_descriptor = bpf_calls.call(MoreCommands.ENABLE_STATISTICS, bytes(4))[0]  # type: ignore[arg-type]
    try:
        found: list[dict[str, float]] = []
        with followed(device, at) as (tracker, _):
            for _ in range(rounds):
                before = run_nanoseconds(tracker)
                writes, _ = at_random(device, seconds=seconds)
                found.append({name: (ns - before[name]) / writes for name, ns in run_nanoseconds(tracker).items()})
            runs, before = run_nanoseconds(tracker, PROGRAM_RUNS_OFFSET), run_nanoseconds(tracker)
            at_random(device, seconds=seconds, reads=True)
            more = {name: now - runs[name] for name, now in run_nanoseconds(tracker, PROGRAM_RUNS_OFFSET).items()}
            floor = sum(
                (ns - before[name]) / more[name]
                for name, ns in run_nanoseconds(tracker).items()
                if more[name] > sum(more.values()) / 10
            )
    finally:
        os.close(statistics_descriptor)
    least = min(found, key=lambda costs: sum(costs.values()))
    figures = [Figure(name=f"ns a write in {name}", found=round(ns)) for name, ns in least.items() if round(ns)]
    total = round(sum(least.values()))
    return [
        *figures,
        Figure(name="ns a write in all programs", found=total, asked=NANOSECONDS_A_WRITE_MAX),
        Figure(name="ns a read in all programs, which do nothing then", found=round(floor)),
    ]


class Turn(enum.Enum):
    """What is done to a device while it is written to."""

    PLAIN = "not tracked"
    TRACKED = "tracked"
    ANOTHER_TRACKED = "with another disk tracked"
    """The programs are run at each write, and return at once."""
    AGAIN = "not tracked, again"
    """What the machine itself makes of the same."""


def writes_kept(
    device: Path, other: Path, at: Path, *, rounds: int, seconds: float, where: str, is_asked: bool
) -> list[Figure]:
    """The median over turns side by side, whose order changes: what else the machine does falls upon all."""
    followed_device = {Turn.TRACKED: device, Turn.ANOTHER_TRACKED: other}
    found: dict[Turn, list[float]] = {turn: [] for turn in Turn}
    for number in range(rounds):
        for turn in reversed(Turn) if number % 2 else Turn:
            with followed(followed_device[turn], at) if turn in followed_device else ExitStack():
                found[turn].append(at_random(device, seconds=seconds)[1])
    rates = [
        Figure(name=f"writes a second {where}, {turn.value}", found=round(statistics.median(found[turn])))
        for turn in (Turn.PLAIN, Turn.TRACKED)
    ]

    def share(turn: Turn, of: Turn) -> float:
        return round(statistics.median(map(operator.truediv, found[turn], found[of])), 3)

    shares = [
        Figure(
            name=f"share of writes kept {where}, {turn.value}",
            found=share(turn, Turn.PLAIN),
            asked=WRITES_KEPT_MIN if is_asked and turn is Turn.TRACKED else None,
            is_minimum=True,
        )
        for turn in (Turn.TRACKED, Turn.ANOTHER_TRACKED, Turn.AGAIN)
    ]
    of_what_is_left = Figure(
        name=f"share of writes kept {where}, of those with another disk tracked",
        found=share(Turn.TRACKED, Turn.ANOTHER_TRACKED),
    )
    return [*rates, *shares, of_what_is_left]


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(process: int) -> int:
    line = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def delta_cost(root: Path) -> list[Figure]:
    """Through the whole system; what the programs use anyway in that time is taken off."""
    figures = []
    with (
        bpf_file_system(root / "bpf") as pins,
        loop_device(root / "disk.img", size_bytes=DELTA_DISK_BYTES) as device,
        Site(root, config_server_settings=SELDOM) as site,
    ):
        site.agent_settings = {"tracking": "bitmap", "tracking_directory": pins}
        agent = site.agent()
        disk = protect(site, agent, device)
        site.wait_for_point(disk, after_ns=0)
        random = ("--rw=randwrite", "--bs=4k", f"--number_ios={RANDOM_DELTA_BLOCKS}")
        sequential = ("--rw=write", "--bs=1m", f"--size={SEQUENTIAL_BYTES}")
        for name, words, changed_bytes, asked in (
            ("random 4 KiB", random, RANDOM_DELTA_BLOCKS * 4096, RANDOM_DELTA_CPU_SECONDS_MAX),
            ("sequential", sequential, SEQUENTIAL_BYTES, None),
        ):
            spent = spent_on_delta(site, disk, device, words)
            what = f"CPU-s of a delta of {changed_bytes // MIB} MiB, {name}"
            figures.append(Figure(name=what, found=round(spent, 2), asked=asked))
            figures.append(Figure(name=f"CPU-s per changed GiB, {name}", found=round(spent * GIB / changed_bytes, 2)))
        memory = resident_bytes(agent.server.process_id) // MIB
    return [*figures, Figure(name="MiB resident of the agent", found=memory, asked=AGENT_MEMORY_BYTES_MAX // MIB)]


def spent_on_delta(site: Site, disk: DiskId, device: Path, words: Sequence[str]) -> float:
    """CPU-seconds of agent and process server. The agent is held while the disk is written to: it is one delta."""
    (agent,) = site.agents.values()
    processes = [server.process_id for server in (agent.server, site.process_server)]

    def spent() -> float:
        return sum(map(cpu_seconds, processes))

    began, before = time.monotonic(), spent()
    time.sleep(IDLE_SECONDS)
    idle_share = (spent() - before) / (time.monotonic() - began)
    os.kill(processes[0], signal.SIGSTOP)
    try:
        run_fio(device, "--direct=1", "--ioengine=libaio", f"--iodepth={QUEUE_DEPTH}", *words)
        began, before, written_ns = time.monotonic(), spent(), time.time_ns()
    finally:
        os.kill(processes[0], signal.SIGCONT)
    site.wait_for_point(disk, after_ns=written_ns)
    return spent() - before - idle_share * (time.monotonic() - began)


def memory_cost(root: Path, size_bytes: int) -> list[Figure]:
    """Of one disk's maps in the kernel, and of the agent's part for it at the end of a round over writes everywhere."""
    with ExitStack() as stack:
        device = stack.enter_context(loop_device(root / "disk.img", size_bytes=size_bytes))
        _, maps = stack.enter_context(followed(device, root / "bpf"))
        disk = LocalDisk(str(device), expected=None)
        stack.callback(disk.close)
        before = anonymous_bytes()
        source = BitmapSource(
            disk=DISK, source=disk, directory=LocalDirectory(root), draw_random=os.urandom, follow=lambda: maps
        )
        source.enter_epoch(1, parent_sequence=None, is_base_empty=True)
        maps.pending[:] = 0  # as if the initial replication had ended
        buffers = [memoryview(mmap.mmap(-1, FRAME_RAW_BYTES_MAX)) for _ in range(2)]
        most = 0
        for sequence in range(1, MEMORY_ROUNDS + 1):
            run_fio(device, "--direct=1", "--rw=randwrite", "--bs=4k", f"--number_ios={MEMORY_WRITES}", "--norandommap")
            current = source.begin_round(first_bytes=0)
            while not current.is_exhausted:
                frames = current.read(*buffers)
                source.sent(sequence, [frame.receipt for frame in frames])
            current.end()
            most = max(most, anonymous_bytes() - before)
        block_bytes, map_bytes = maps.layout.block_bytes, sum(len(shared.memory) for shared in maps._maps.values())
    name = f"MiB of a disk of {size_bytes // TIB} TiB in blocks of {block_bytes // 1024} KiB"
    return [
        Figure(name=name, found=round((map_bytes + most) / MIB), asked=asked_bytes(size_bytes, block_bytes) // MIB),
        Figure(name=f"{name}, of it maps", found=round(map_bytes / MIB)),
    ]


def asked_bytes(size_bytes: int, block_bytes: int) -> int:
    """Between the two block sizes for which it is asked: in proportion to the number of blocks."""
    fine, coarse = BYTES_PER_TIB_MAX
    share = (fine / block_bytes - fine / coarse) / (1 - fine / coarse)
    per_tib = BYTES_PER_TIB_MAX[coarse] + share * (BYTES_PER_TIB_MAX[fine] - BYTES_PER_TIB_MAX[coarse])
    return round(per_tib * size_bytes / TIB)


def anonymous_bytes() -> int:
    """Of this process, without what it shares: the kernel's maps."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measure(root: Path, *, rounds: int, seconds: float, parts: Sequence[str]) -> list[Figure]:
    figures: list[Figure] = []
    if "kernel" in parts:
        with (
            loop_device(root / "disk.img", size_bytes=GIB) as device,
            loop_device(root / "other", size_bytes=GIB) as other,
        ):
            at_random(device, seconds=seconds)  # so that its file has been written to before
            figures += kernel_cost(device, root / "bpf", rounds=rounds, seconds=seconds)
            figures += writes_kept(
                device, other, root / "bpf", rounds=rounds, seconds=seconds, where="in memory", is_asked=False
            )
        with (
            loop_device(root / "disk.img", size_bytes=GIB, is_direct=True) as device,
            loop_device(root / "other", size_bytes=GIB) as other,
        ):
            run_fio(device, "--direct=1", "--rw=write", "--bs=1m")
            figures += writes_kept(
                device, other, root / "bpf", rounds=rounds, seconds=seconds, where="on a disk", is_asked=True
            )
    if "memory" in parts:
        for tebibytes in (1, 4):
            with tempfile.TemporaryDirectory(dir=root) as place:
                figures += memory_cost(Path(place), tebibytes * TIB)
    if "delta" in parts:
        with tempfile.TemporaryDirectory(dir=root) as place:
            figures += delta_cost(Path(place))
    return figures


def print_table(figures: Sequence[Figure]) -> None:
    table = Table(title="What tracking costs")
    for heading in ("", "found", "asked"):
        table.add_column(heading, justify="left" if not heading else "right")
    for one in figures:
        asked = "" if one.asked is None else f"{'≥' if one.is_minimum else '≤'} {one.asked:g}"
        table.add_row(one.name, f"{one.found:g}", asked, style=None if one.is_met else "bold")
    Console(stderr=True).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21, help="of each measurement that is taken in turns")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each turn")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; can be given again")
    options = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("fio") is None:
        print("make tracking-cost needs root, and fio: apt-get install fio", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="farpoint-tracking-cost-") as root:
        figures = measure(Path(root), rounds=options.rounds, seconds=options.seconds, parts=options.part or list(PARTS))
    print_table(figures)
    result = {one.name: one.found for one in figures}
    print(json.dumps({"figures": result, "not_met": [one.name for one in figures if not one.is_met]}))
    return int(not all(one.is_met for one in figures))


if __name__ == "__main__":
    sys.exit(main())
