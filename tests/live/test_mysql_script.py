"""The script for MySQL and MariaDB against a real server: what it refuses, whom it holds still, and what it tells."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.deploy.needed_tools import not_here
from tests.live.block_devices import run
from tests.live.freezes import SCRIPTS
from tests.scenarios.processes import wait_until

USER = "mysql"
SECONDS_MAX = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class MariadbServer:
    """One that runs."""

    root: Path
    data: Path
    socket: Path

    def ask(self, statement: str) -> str:
        return run("mariadb", f"--socket={self.socket}", "--batch", "--skip-column-names", "--execute", statement)

    def script(self, word: str, *mount_points: str) -> subprocess.CompletedProcess[str]:
        """As the agent runs it."""
        options = self.root / "options"
        options.write_text(f"[client]\nsocket={self.socket}\n")
        environment = {
            "PATH": os.environ["PATH"],
            "FARPOINT_MYSQL_OPTIONS": str(options),
            "FARPOINT_MOUNT_POINTS": "\n".join(mount_points),
            "FARPOINT_RUNTIME_DIRECTORY": str(self.root / "run"),
        }
        with (self.root / "output").open("w+") as output:
            done = subprocess.run(
                [SCRIPTS / "mysql", word],
                env=environment,
                stdout=output,
                stderr=output,
                check=False,
                timeout=SECONDS_MAX,
            )
            output.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, output.read(), "")

    def freeze(self) -> None:
        done = self.script("freeze", mount_point_of(self.data))
        assert done.returncode == 0, done.stdout

    @property
    def holder(self) -> Path:
        """The process that the session which holds the lock lives as long as."""
        return self.root / "run" / "mysql-holder"


def mount_point_of(path: Path) -> str:
    return run("findmnt", "--noheadings", "--output", "TARGET", "--target", path)


@pytest.fixture(scope="module")
def server() -> Iterator[MariadbServer]:
    if os.geteuid() != 0 or shutil.which("mariadbd", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        not_here("the script for MySQL needs root and a server (Debian: mariadb-server)")
    with TemporaryDirectory(prefix="farpoint-") as directory:
        root = Path(directory)
        root.chmod(0o755)
        data, socket = root / "data", root / "socket"
        data.mkdir()
        shutil.chown(data, USER, USER)
        shutil.chown(root, USER)
        run("mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={USER}", "--skip-test-db")
        command = [
            "/usr/sbin/mariadbd",
            "--no-defaults",
            f"--datadir={data}",
            f"--socket={socket}",
            "--skip-networking",
        ]
        with (root / "log").open("w") as log:
            process = subprocess.Popen([*command, f"--user={USER}", f"--pid-file={root}/pid"], stdout=log, stderr=log)
        try:
            made = MariadbServer(root=root, data=data, socket=socket)
            wait_until("it answers", lambda: socket.exists() and _answers(made), seconds=SECONDS_MAX, servers=[])
            made.ask("CREATE DATABASE shop; CREATE TABLE shop.orders (number INT) ENGINE=InnoDB")
            yield made
        finally:
            process.terminate()
            process.wait(SECONDS_MAX)


def _answers(server: MariadbServer) -> bool:
    try:
        return server.ask("SELECT 1") == "1"
    except AssertionError:
        return False


@pytest.fixture
def other_engine(server: MariadbServer) -> Iterator[str]:
    """A table that would not survive a loss of power."""
    server.ask("CREATE TABLE shop.visits (number INT) ENGINE=MyISAM")
    yield "shop.visits"
    server.script("thaw")
    server.ask("DROP TABLE shop.visits")


def insert(server: MariadbServer, table: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["mariadb", f"--socket={server.socket}", "--execute", f"INSERT INTO {table} VALUES (1)"], text=True
    )


def test_with_innodb_alone_nothing_is_locked(server: MariadbServer) -> None:
    server.freeze()
    assert insert(server, "shop.orders").wait(SECONDS_MAX) == 0
    assert not server.holder.exists()
    assert server.script("thaw").returncode == 0


def test_tables_of_other_engines_are_held_until_the_thaw(server: MariadbServer, other_engine: str) -> None:
    server.freeze()
    writer = insert(server, other_engine)
    with pytest.raises(subprocess.TimeoutExpired):
        writer.wait(0.3)
    assert server.script("thaw").returncode == 0
    assert writer.wait(SECONDS_MAX) == 0
    assert not server.holder.exists()


def test_a_lock_that_was_lost_before_the_thaw_is_told(server: MariadbServer, other_engine: str) -> None:
    server.freeze()
    os.kill(int(server.holder.read_text()), signal.SIGKILL)
    assert insert(server, other_engine).wait(SECONDS_MAX) == 0
    done = server.script("thaw")
    assert done.returncode == 1
    assert "ended before the thaw" in done.stdout


def test_a_session_that_the_server_ended_is_told(server: MariadbServer, other_engine: str) -> None:
    server.freeze()
    sessions = server.ask("SELECT id FROM information_schema.processlist WHERE command = 'Sleep'").split()
    for session in sessions:
        server.ask(f"KILL {session}")
    assert sessions
    assert insert(server, other_engine).wait(SECONDS_MAX) == 0
    done = server.script("thaw")
    assert done.returncode == 1
    assert "ended before the thaw" in done.stdout


def test_data_that_is_not_frozen_is_refused(server: MariadbServer) -> None:
    done = server.script("freeze", "/proc")
    assert done.returncode == 1
    assert "is on no protected disk" in done.stdout


def test_a_server_that_is_away_is_told(server: MariadbServer) -> None:
    away = MariadbServer(root=server.root, data=server.data, socket=server.root / "away")
    done = away.script("freeze", mount_point_of(server.data))
    assert done.returncode == 1
    assert "cannot be asked" in done.stdout
