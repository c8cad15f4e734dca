"""`farpoint up`: the first run makes everything, later ones just run, both servers stop together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from farpoint.__main__ import main
from farpoint.demo.programs import free_port
from farpoint.up_directory import UpDirectory
from runtime.exit_codes import ExitCode

WAIT_SECONDS_MAX = 60.0
QUIET = {
    "FARPOINT_CONFIG_SERVER_OBSERVABILITY__ADDRESS": "",
    "FARPOINT_PROCESS_SERVER_OBSERVABILITY__ADDRESS": "",
    "FARPOINT_PROCESS_SERVER_CACHE_BYTES_MAX": "64 MiB",
}


def command(directory: Path, *, port: int, control_port: int) -> list[str]:
    ports = ["--port", str(port), "--control-port", str(control_port), "--host", "127.0.0.1"]
    return [sys.executable, "-m", "farpoint", "up", "--dir", str(directory), *ports]


def ports() -> dict[str, int]:
    taken: set[int] = set()
    return {"port": free_port(29443, taken=taken), "control_port": free_port(28443, taken=taken)}


@contextmanager
def running(directory: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command(directory, **ports()), stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def environment() -> dict[str, str]:
    return os.environ | QUIET


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def wait_for_process_server(directory: Path, process: subprocess.Popen[str]) -> str:
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        listed = run("process-servers", "--dir", directory, "-o", "json")
        if listed.exit_code == ExitCode.OK and any(server["address"] for server in json.loads(listed.stdout)):
            return str(json.loads(listed.stdout)[0]["process_server"])
        time.sleep(0.1)
    raise AssertionError("the process server never reported")


def test_the_first_run_makes_everything_and_later_ones_just_run(tmp_path: Path, environment: dict[str, str]) -> None:
    directory = tmp_path / "up"
    with running(directory, environment) as process:
        identifier = wait_for_process_server(directory, process)
        second = subprocess.run(
            command(directory, **ports()), capture_output=True, text=True, env=environment, check=False
        )
        assert second.returncode == ExitCode.LOCKED, second.stderr
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=WAIT_SECONDS_MAX)
        assert process.returncode == ExitCode.OK, told
    assert "MOVE THEM AWAY" in told
    keys = sorted(path.name for path in (directory / "keys").iterdir())
    assert keys == ["recovery-1.key", "recovery-2.key"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (directory / "keys").iterdir())
    store = f"file://{directory / 'store'}"
    for key in (directory / "keys").iterdir():
        assert run("vault", "check-key", "--store", store, "--recovery-key", key).exit_code == ExitCode.OK
        key.rename(tmp_path / key.name)
    with running(directory, environment) as process:
        assert wait_for_process_server(directory, process) == identifier
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=WAIT_SECONDS_MAX)
        assert process.returncode == ExitCode.INTERRUPTED, told
    assert "MOVE THEM AWAY" not in told


@pytest.mark.parametrize("which", ["port", "control_port"])
def test_a_taken_port_is_named_and_nothing_goes_on_running(
    tmp_path: Path, environment: dict[str, str], which: str
) -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        refused = subprocess.run(
            command(tmp_path / "up", **(ports() | {which: port})),
            capture_output=True,
            text=True,
            env=environment,
            check=False,
            timeout=WAIT_SECONDS_MAX,
        )
    assert refused.returncode == ExitCode.FAILURE
    assert str(port) in refused.stderr
    assert "taken by another program" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_first_run_that_was_cut_off_says_what_to_remove(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "keys").mkdir(parents=True)
    (tmp_path / "keys" / "recovery-1.key").write_text("half")
    refused = subprocess.run(command(tmp_path, **ports()), capture_output=True, text=True, env=environment, check=False)
    assert refused.returncode == ExitCode.FAILURE
    assert "cut off" in refused.stderr
    assert (tmp_path / "keys" / "recovery-1.key").read_text() == "half"


def test_another_store_than_the_known_one_is_refused(tmp_path: Path, environment: dict[str, str]) -> None:
    description = {
        "server_url": "https://localhost:1",
        "store_url": "file:///known",
        "authority_file": "a",
        "admin_token_file": "b",
    }
    (tmp_path / "up.json").write_text(json.dumps(description))
    refused = run("up", "--dir", tmp_path, "--store", "file:///other")
    assert refused.exit_code == ExitCode.USAGE
    assert "file:///known" in refused.stderr


def test_a_later_run_opens_the_store_with_the_last_runs_credentials(tmp_path: Path) -> None:
    directory, credentials = UpDirectory(path=tmp_path), tmp_path / "sas"
    assert directory.store_credentials_file(None) is None
    urls = {"server_url": "https://127.0.0.1:1", "store_url": "azure://account/container"}
    directory.write_description(directory.describe(**urls, store_credentials_file=credentials))
    assert directory.store_credentials_file(None) == credentials
    assert directory.store_credentials_file(tmp_path / "other") == tmp_path / "other"
    directory.write_description(directory.describe(**urls, store_credentials_file=None))
    assert directory.store_credentials_file(None) is None
