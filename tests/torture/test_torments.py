"""The tools of torture do what they say: a cut loses what was not synchronized and nothing else, a proxy cuts at its
byte, a trace kills at its call, a seed gives its schedule.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import pytest

from tests.deploy.needed_tools import not_here
from tests.torture.lane import available_needs
from tests.torture.planted_faults import PLANTED_FAULTS, environment
from tests.torture.power import FileSystem, PowerDisk, PowerSupply, release
from tests.torture.schedule import WEIGHTS, draw_for, torments
from tests.torture.tcp_proxy import Behaviour, TcpProxy, Treatment
from tests.torture.torment import Need
from tests.torture.tracing import Injection, attached, injected_count

SECONDS_MAX = 20.0


def need(*needs: Need) -> None:
    missing = set(needs) - available_needs()
    if missing:
        not_here(f"torture needs {', '.join(need.value for need in missing)}")


@pytest.fixture
def supply(tmp_path: Path) -> Iterator[PowerSupply]:
    need(Need.ROOT, Need.LOOP_DISKS)
    try:
        yield PowerSupply(tmp_path)
    finally:
        release(tmp_path)
        assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize("file_system", list(FileSystem), ids=lambda one: one.name)
def test_a_power_cut_keeps_what_was_synchronized_and_loses_the_rest(
    supply: PowerSupply, tmp_path: Path, file_system: FileSystem
) -> None:
    disk = PowerDisk(supply, tmp_path / "disk", file_system)
    (disk.path / "synchronized").write_bytes(b"kept")
    with open(disk.path / "synchronized", "rb") as file:
        os.fsync(file.fileno())
    directory = os.open(disk.path, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    (disk.path / "only-in-memory").write_bytes(b"lost" * 10_000)
    clone = disk.cut()
    assert (disk.path / "only-in-memory").stat().st_size == 40_000
    disk.come_back(clone)
    assert (disk.path / "synchronized").read_bytes() == b"kept"
    left = disk.path / "only-in-memory"
    assert not left.exists() or not left.read_bytes().strip(b"\0")
    disk.unmount()


WRITER = """
import os, sys
descriptor = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
sys.stdin.readline()
for number in range(6):
    try:
        os.pwrite(descriptor, b"x", number)
        os.fdatasync(descriptor)
        print("done", flush=True)
    except OSError as error:
        print(error.errno, flush=True)
"""


@contextmanager
def writer(path: Path, *, before: list[str]) -> Iterator[subprocess.Popen[str]]:
    command = [*before, sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("at_start", [True, False], ids=["started", "attached"])
def test_a_program_is_killed_at_its_third_synchronize(tmp_path: Path, at_start: bool) -> None:
    need(Need.STRACE)
    injection, output = Injection(kind="synchronize", when="3"), tmp_path / "trace"
    if at_start:
        with writer(tmp_path / "file", before=injection.starting(output)) as process:
            said, _ = process.communicate("go\n", timeout=SECONDS_MAX)
    else:
        with writer(tmp_path / "file", before=[]) as process, attached(process.pid, injection, output):
            said, _ = process.communicate("go\n", timeout=SECONDS_MAX)
    assert process.returncode == -signal.SIGKILL
    assert said == "done\n" * 2
    assert (tmp_path / "file").stat().st_size == 3


def test_errors_come_instead_of_the_calls_and_are_counted(tmp_path: Path) -> None:
    need(Need.STRACE)
    injection, output = Injection(kind="write", when="2+2", error=errno.EIO), tmp_path / "trace"
    with writer(tmp_path / "file", before=injection.starting(output)) as process:
        said, _ = process.communicate("go\n", timeout=SECONDS_MAX)
    assert said.split() == ["done", str(errno.EIO)] * 3
    assert injected_count(output) == 3
    assert (tmp_path / "file").read_bytes() == b"x\0x\0x"


@contextmanager
def echo_server() -> Iterator[tuple[str, int]]:
    """Gives back whatever comes, on any number of connections, and ends with them."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    def echo(connection: socket.socket) -> None:
        with connection:
            while data := receive_or_nothing(connection):
                connection.sendall(data)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def receive_or_nothing(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except OSError:
        return b""


@pytest.fixture
def proxied() -> Iterator[tuple[TcpProxy, socket.socket]]:
    with (
        echo_server() as server,
        TcpProxy(host="127.0.0.2", port=server[1], server=server) as proxy,
        socket.create_connection(("127.0.0.2", server[1]), timeout=SECONDS_MAX) as client,
    ):
        yield proxy, client


def receive(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (piece := client.recv(count - len(data))):
        data += piece
    return data


def receive_all(client: socket.socket, lengths: list[int]) -> None:
    while piece := client.recv(100):
        lengths.append(len(piece))


def test_a_proxy_passes_bytes_unchanged_also_in_a_trickle(proxied: tuple[TcpProxy, socket.socket]) -> None:
    proxy, client = proxied
    data = random.Random(1).randbytes(100_000)
    client.sendall(data)
    assert receive(client, len(data)) == data
    proxy.behave(Behaviour(treatment=Treatment.TRICKLE, piece_bytes=3))
    client.sendall(data[:20])
    assert receive(client, 20) == data[:20]


def test_a_proxy_cuts_after_exactly_so_many_bytes(proxied: tuple[TcpProxy, socket.socket]) -> None:
    proxy, client = proxied
    client.sendall(b"before")
    assert receive(client, 6) == b"before"
    proxy.behave(Behaviour(treatment=Treatment.CUT, upward=False, after_bytes=1234))
    client.sendall(bytes(5000))
    received: list[int] = []
    with pytest.raises(ConnectionResetError):
        receive_all(client, received)
    assert sum(received) <= 1234
    assert proxy.cut_count == 1


def test_what_a_proxy_froze_comes_when_it_thaws(proxied: tuple[TcpProxy, socket.socket]) -> None:
    proxy, client = proxied
    client.sendall(b"warm")
    assert receive(client, 4) == b"warm"
    proxy.behave(Behaviour(treatment=Treatment.FREEZE))
    client.sendall(b"cold")
    client.settimeout(0.2)
    with pytest.raises(TimeoutError):
        client.recv(4)
    client.settimeout(SECONDS_MAX)
    proxy.behave(Behaviour())
    assert receive(client, 4) == b"cold"


def test_a_forgotten_server_is_not_told_that_its_client_is_gone(proxied: tuple[TcpProxy, socket.socket]) -> None:
    proxy, client = proxied
    client.sendall(b"hello")
    assert receive(client, 5) == b"hello"
    proxy.behave(Behaviour(treatment=Treatment.FORGET_SERVER))
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert proxy.connection_count == 1


def test_a_seed_gives_the_same_schedule_again_and_every_kind_comes_early() -> None:
    kinds = list(WEIGHTS)
    first, again, other = (list(islice(torments(seed, 0, kinds), 100)) for seed in (1, 1, 2))
    assert first == again != other
    assert set(first[: len(kinds)]) == set(kinds)
    assert draw_for(1, 0, "step 5").random() == draw_for(1, 0, "step 5").random() != draw_for(1, 1, "step 5").random()


@pytest.mark.parametrize("name", sorted(PLANTED_FAULTS))
def test_planted_faults_reach_the_real_programs(name: str) -> None:
    program = "from runtime import local_directory as here; import sys; sys.stdout.write(here.__file__)\n"
    program += "parts = (here.LocalFile.synchronize, here.LocalDirectory.replace, here.write_fully)\n"
    program += "sys.exit(sum(part.__module__ != here.__name__ for part in parts))"
    for planted, expected in ((environment(name), 1), ({}, 0)):
        done = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | planted, capture_output=True, text=True, check=False
        )
        assert done.returncode == expected, done.stderr
