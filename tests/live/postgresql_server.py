"""A PostgreSQL server of the tests' own, as the user postgres, in a directory that may lie on a protected disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.deploy.needed_tools import not_here
from tests.scenarios.site import free_port

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
USER = "postgres"
STOP_SECONDS_MAX = 60


def need_postgresql() -> Path:
    """Where its programs are."""
    if not PROGRAMS or not (PROGRAMS[-1] / "pg_amcheck").exists():
        not_here("PostgreSQL under load needs its server (Debian: postgresql, postgresql-contrib)")
    return PROGRAMS[-1]


class PostgresqlServer:
    """One cluster. Reached over a socket in `sockets`."""

    def __init__(self, data: Path, sockets: Path) -> None:
        self.data = data
        self.sockets = sockets
        self.port = free_port()
        self._programs = need_postgresql()

    @property
    def environment(self) -> dict[str, str]:
        """With which its clients find it."""
        return {"PGHOST": str(self.sockets), "PGPORT": str(self.port), "PGUSER": USER, "PGDATABASE": "postgres"}

    def make(self) -> None:
        self.data.mkdir(mode=0o700)
        shutil.chown(self.data, USER, USER)
        self.call("initdb", "--data-checksums", "--auth=trust", "--no-sync", "--pgdata", str(self.data))

    @contextmanager
    def running(self) -> Iterator[None]:
        settings = [f"-c unix_socket_directories={self.sockets}", "-c listen_addresses=''", f"-p {self.port}"]
        settings += ["-c shared_buffers=16MB", "-c max_wal_size=64MB", "-c min_wal_size=32MB", "-c wal_recycle=off"]
        log = self.sockets / f"{self.port}.log"
        start = ["--pgdata", str(self.data), "--log", str(log), "--wait", "--timeout", "120"]
        self.call("pg_ctl", "start", *start, "--options", " ".join(settings))
        try:
            yield
        finally:
            self.call("pg_ctl", "stop", "--pgdata", str(self.data), "--mode=fast", "--wait")

    def ask(self, statement: str) -> str:
        return self.call("psql", "-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-c", statement)

    def call(self, program: str, *arguments: str) -> str:
        """A program of PostgreSQL as its user; what it writes."""
        done = subprocess.run(
            ["runuser", "-u", USER, "--", str(self._programs / program), *arguments],
            env={**os.environ, **self.environment},
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{program}: {done.stdout}"
        return done.stdout.strip()


class Client(threading.Thread):
    """Inserts 1, 2, 3… and knows which was acknowledged last."""

    def __init__(self, server: PostgresqlServer, number: int) -> None:
        super().__init__(name=f"client-{number}")
        self.number = number
        self.acknowledged = 0
        self.fault = ""
        self._ended = threading.Event()
        self._session = subprocess.Popen(
            [str(need_postgresql() / "psql"), "-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1"],
            env={**os.environ, **server.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def run(self) -> None:
        session = self._session
        assert session.stdin is not None
        assert session.stdout is not None
        while not self._ended.is_set():
            count = self.acknowledged + 1
            session.stdin.write(f"INSERT INTO ledger VALUES ({self.number}, {count}) RETURNING count;\n")
            answer = session.stdout.readline().strip()
            if answer != str(count):
                self.fault = f"client {self.number}: {answer!r} instead of {count}"
                return
            self.acknowledged = count

    def end(self) -> None:
        self._ended.set()
        self.join(STOP_SECONDS_MAX)
        assert self._session.stdin is not None
        self._session.stdin.close()
        self._session.wait(STOP_SECONDS_MAX)
        assert self._session.stdout is not None
        self._session.stdout.close()
        assert not self.fault, self.fault


@contextmanager
def load(server: PostgresqlServer, *, clients: int) -> Iterator[list[Client]]:
    """pgbench's own load, and clients that keep a ledger."""
    server.call("pgbench", "--initialize", "--quiet", "--scale=2")
    server.ask("CREATE TABLE ledger (client int, count int, PRIMARY KEY (client, count))")
    server.ask("CREATE EXTENSION amcheck")
    bench = subprocess.Popen(
        ["runuser", "-u", USER, "--", str(need_postgresql() / "pgbench"), "--time=36000", "--client=4", "--no-vacuum"],
        env={**os.environ, **server.environment},
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    writing = [Client(server, number) for number in range(clients)]
    try:
        for client in writing:
            client.start()
        yield writing
    finally:
        for client in writing:
            client.end()
        bench.terminate()
        bench.wait(STOP_SECONDS_MAX)


def fault_of_copy(data: Path, sockets: Path, *, before: dict[int, int], after: dict[int, int]) -> str:
    """Starts a copy of the cluster and looks into it: why it is not sound, empty if it is.

    before, after: by client, what had been acknowledged before and after the copy's instant.
    """
    (data / "postmaster.pid").unlink(missing_ok=True)
    copy = PostgresqlServer(data, sockets)
    with copy.running():
        copy.call("pg_amcheck", "--all", "--heapallindexed")
        rows = copy.ask("SELECT client, count(*), max(count) FROM ledger GROUP BY client").splitlines()
    copy.call("pg_checksums", "--check", "--pgdata", str(data))
    found = {client: (count, newest) for client, count, newest in (map(int, row.split("|")) for row in rows)}
    for client, acknowledged in before.items():
        count, newest = found.get(client, (0, 0))
        if count != newest:
            return f"client {client}: {count} transactions up to {newest}"
        if not acknowledged <= newest <= after[client] + 1:
            return f"client {client}: up to {newest}, and {acknowledged} before, {after[client]} after"
    return ""
