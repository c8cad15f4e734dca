"""The site that is tormented: real programs, their directories on disks whose power can be cut, the agent in a network
of its own, a proxy before each server, and a source whose every version is known.

Invariants: what an operator was ever told stays in `stated`, and what the agent was ever told in `acknowledged`; all
processes, mounts and namespaces of the site end with it.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from protocol.vocabulary import DiskId
from tests.scenarios.disks import MEBIBYTE, SourceDisk
from tests.scenarios.processes import POLL_SECONDS, Server
from tests.scenarios.site import Agent, Site, free_port
from tests.torture.network import Loopback, Namespace
from tests.torture.power import FileSystem, PowerDisk, PowerSupply
from tests.torture.tcp_proxy import TcpProxy
from tests.torture.tracing import end_tracers_of, tasks_of

SOURCE_BYTES_MIN: Final = 8 * MEBIBYTE
SOURCE_BYTES_MAX: Final = 24 * MEBIBYTE
WRITES_PER_CHANGE: Final = 6
PAUSE_SECONDS_MIN: Final = 0.05
PAUSE_SECONDS_MAX: Final = 0.6
"""Between two changes of the busy source: some rounds find it still, others do not."""

PROCESS_SERVER_SETTINGS: Final = {
    "cache_bytes_max": 32 * MEBIBYTE,
    "cache_file_bytes": MEBIBYTE,
    "segment_stored_bytes_due": MEBIBYTE // 2,
    "idle_seconds_max": 5,
    "stop_seconds_max": 5,
}
"""Small files, so that torments meet their beginnings and ends; short deadlines, so that healing takes seconds."""
AGENT_SETTINGS: Final = {"progress_seconds_max": 10, "change_set_bytes": MEBIBYTE}
STOPPING_SECONDS: Final = 2.0

PROGRAM_NAMES: Final = ("agent", "process-server", "config-server")
DISK_NAMES: Final = ("agent", "process-server", "config-server", "store")
USER_OF_DISK: Final = {
    "agent": "agent",
    "process-server": "process-server",
    "config-server": "config-server",
    "store": "process-server",
}
"""Which program has files of a disk open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What this machine offers. Either may be missing, and with it the torments that need it."""

    supply: PowerSupply | None
    network: Namespace | Loopback


class TorturedSite(AbstractContextManager["TorturedSite"]):
    """`with TorturedSite(...) as site` sets it up and waits for its first recovery point."""

    def __init__(self, root: Path, surroundings: Surroundings, draw: random.Random) -> None:
        self.root = root
        self.network = surroundings.network
        self.disks = {
            name: PowerDisk(surroundings.supply, root / name, draw.choice(list(FileSystem)))
            for name in DISK_NAMES
            if surroundings.supply is not None
        }
        port = free_port()
        self.site = Site(
            root,
            process_server_settings=PROCESS_SERVER_SETTINGS
            | {"listen": f"127.0.0.1:{port}", "host": self.network.process_host},
            config_server_settings={"server_names": f'["{self.network.config_host}"]'},
        )
        config_port = int(self.site.server_url.rpartition(":")[2])
        self.site.members_url = f"https://{self.network.config_host}:{config_port}"
        self.site.agent_host = self.network.agent_host
        self.site.agents_inside = self.network.agents_inside
        self.site.agent_settings = AGENT_SETTINGS
        self.proxies = {
            name: TcpProxy(host=host, port=at, server=("127.0.0.1", at))
            for name, host, at in (
                ("process-server", self.network.process_host, port),
                ("config-server", self.network.config_host, config_port),
            )
        }
        self.source = SourceDisk(
            root / "source.img",
            size_bytes=draw.randrange(SOURCE_BYTES_MIN, SOURCE_BYTES_MAX, 512),
            seed=draw.getrandbits(32),
        )
        self.agent: Agent
        self.disk: DiskId
        self.acknowledged = (0, 0)
        self.stated: set[str] = set()
        self.abrupt_ends = 0
        """Of programs, by kill or loss of power."""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for proxy in self.proxies.values():
                stack.enter_context(proxy)
            stack.enter_context(self.site)
            self.agent = self.site.agent()
            (self.disk,) = self.agent.protect(self.source)
            self.site.wait_for_point(self.disk, after_ns=self.source.changed_ns)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self.site.running:
            end_tracers_of(server.process_id)
        self._stack.close()

    @property
    def programs(self) -> dict[str, Server]:
        return {
            "agent": self.agent.server,
            "process-server": self.site.process_server,
            "config-server": self.site.config_server,
        }

    def look(self) -> None:
        """Notes what the agent and the operator have been told by now."""
        if self.agent.server.is_running:
            told = (self.agent.gauge("epoch", self.disk), self.agent.gauge("durable_sequence", self.disk))
            self.acknowledged = max(self.acknowledged, told)
        self.stated |= {point.point for point in self.site.points(self.disk)}

    @contextmanager
    def busy(self, draw: random.Random) -> Iterator[None]:
        """The source changes again and again for the length of the block."""
        pauses = random.Random(draw.random())
        is_over = threading.Event()

        def write() -> None:
            while not is_over.wait(pauses.uniform(PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX)):
                self.source.change(writes=WRITES_PER_CHANGE)

        with ThreadPoolExecutor(1) as executor:
            writing = executor.submit(write)
            try:
                yield
            finally:
                is_over.set()
                writing.result()

    def kill(self, name: str) -> None:
        """kill -9, if it runs."""
        server = self.programs[name]
        if server.is_running:
            self._kill(server)

    def _kill(self, server: Server) -> None:
        server.signal(signal.SIGKILL)
        end_tracers_of(server.process_id)
        server.dispose()
        self.abrupt_ends += 1

    def start_what_ended(self) -> None:
        """All that does not run; each answers on return. The configuration server first, as the others ask it."""
        for name in reversed(PROGRAM_NAMES):
            if not self.programs[name].is_running:
                self.programs[name].start()

    def cut_power(self, names: Sequence[str]) -> None:
        """Of these disks, at one instant; their programs end there, the others go on. The disks are back on return.

        Nothing that a program has said can be later than the instant: they stand still before it.
        """
        servers = [self.programs[name] for name in sorted({USER_OF_DISK[name] for name in names})]
        running = [server for server in servers if server.is_running]
        for server in running:
            server.signal(signal.SIGSTOP)
        wait_until_still(running)
        clones = {name: self.disks[name].cut() for name in names}
        for server in running:
            self._kill(server)
        for name, clone in clones.items():
            self.disks[name].come_back(clone)


def wait_until_still(servers: Sequence[Server]) -> None:
    """Until no thread can run any code of its program: stopped, or in the middle of a call that ends stopped."""
    deadline = time.monotonic() + STOPPING_SECONDS
    while not all(_state(task) in "TtDXZ" for server in servers for task in tasks_of(server.process_id)):
        assert time.monotonic() < deadline, "stopped programs still run"
        time.sleep(POLL_SECONDS / 10)


def _state(task: Path) -> str:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"
