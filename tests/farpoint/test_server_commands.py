"""The commands of `farpoint` that ask a configuration server, with one that really runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from farpoint.__main__ import main
from farpoint.demo.programs import free_port
from farpoint.server_connection import UP_FILE, UpDescription
from protocol.join_token import JoinToken
from runtime.exit_codes import ExitCode

START_SECONDS_MAX = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    url: str
    state: Path

    @property
    def options(self) -> list[str]:
        token, authority = self.state / "admin-token", self.state / "authority.pem"
        return ["--server", self.url, "--ca", str(authority), "--token-file", str(token)]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    directory = tmp_path_factory.mktemp("server")
    state, key = directory / "state", directory / "authority.key"
    keys = ("--recovery-key", directory / "one", "--recovery-key", directory / "two", "--authority-key", key)
    assert run("vault", "init", "--store", f"file://{directory / 'store'}", *keys).exit_code == ExitCode.OK
    program = [sys.executable, "-m", "config_server"]
    subprocess.run([*program, "init", "--dir", state, "--authority-key", key], check=True, stdout=subprocess.DEVNULL)
    port = free_port(18443, taken=set())
    options = ["--dir", state, "--listen", f"127.0.0.1:{port}", "--set", "observability.address="]
    with subprocess.Popen([*program, "run", *options], stderr=subprocess.DEVNULL) as process:
        running = RunningServer(url=f"https://127.0.0.1:{port}", state=state)
        deadline = time.monotonic() + START_SECONDS_MAX
        while run("machines", *running.options).exit_code != ExitCode.OK:
            assert process.poll() is None
            assert time.monotonic() < deadline
        yield running
        process.terminate()
        assert process.wait(timeout=30) == ExitCode.OK


@pytest.mark.parametrize("role", ["agent", "process-server", "recovery-worker"])
def test_a_join_token_is_printed_alone_on_stdout(server: RunningServer, role: str) -> None:
    made = run("token", "create", "--role", role, "--expires-in", "10 min", *server.options)
    assert made.exit_code == ExitCode.OK, made.output
    JoinToken.parse(made.stdout.strip())
    assert "good for one" in made.stderr


def test_a_join_token_goes_into_a_file_of_its_own(server: RunningServer, tmp_path: Path) -> None:
    path = tmp_path / "agent.token"
    command = ("token", "create", "--role", "agent", "--output", path, *server.options)
    assert run(*command).exit_code == ExitCode.OK
    JoinToken.parse(path.read_text().strip())
    assert path.stat().st_mode & 0o777 == 0o600
    before = path.read_text()
    assert run(*command).exit_code == ExitCode.FAILURE
    assert path.read_text() == before


@pytest.mark.parametrize("lifetime", ["soon", "0", "30 d"])
def test_a_lifetime_that_is_none_is_wrong_usage(server: RunningServer, lifetime: str) -> None:
    made = run("token", "create", "--role", "agent", "--expires-in", lifetime, *server.options)
    assert made.exit_code == ExitCode.USAGE


@pytest.mark.parametrize("command", ["machines", "disks", "points", "process-servers"])
def test_a_new_server_has_nothing_to_list(server: RunningServer, command: str) -> None:
    listed = run(command, "-o", "json", *server.options)
    assert listed.exit_code == ExitCode.OK
    assert json.loads(listed.stdout) == []
    assert run(command, *server.options).exit_code == ExitCode.OK


def test_the_directory_of_up_stands_for_the_three_options(server: RunningServer, tmp_path: Path) -> None:
    description = UpDescription(
        server_url=server.url,
        store_url="file:///nowhere",
        authority_file=server.state / "authority.pem",
        admin_token_file=server.state / "admin-token",
    )
    (tmp_path / UP_FILE).write_bytes(description.serialise())
    assert run("machines", "--dir", tmp_path).exit_code == ExitCode.OK
    assert run("machines", "--dir", tmp_path / "elsewhere").exit_code == ExitCode.NOT_FOUND


def test_the_environment_stands_for_options_and_unknown_names_fail(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARPOINT_SERVER", server.url)
    monkeypatch.setenv("FARPOINT_CA", str(server.state / "authority.pem"))
    monkeypatch.setenv("FARPOINT_TOKEN_FILE", str(server.state / "admin-token"))
    assert run("machines").exit_code == ExitCode.OK
    monkeypatch.setenv("FARPOINT_SERVR", "x")
    refused = run("machines")
    assert refused.exit_code == ExitCode.USAGE
    assert "server" in refused.stderr


def test_a_wrong_admin_token_is_not_permitted(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("wrong")
    options = ["--server", server.url, "--ca", server.state / "authority.pem", "--token-file", tmp_path / "token"]
    assert run("machines", *options).exit_code == ExitCode.NOT_PERMITTED


def test_what_is_missing_is_named() -> None:
    refused = run("machines")
    assert refused.exit_code == ExitCode.USAGE
    assert "--server" in refused.stderr


def test_a_server_that_is_away_is_a_failure(server: RunningServer) -> None:
    options = ["--ca", server.state / "authority.pem", "--token-file", server.state / "admin-token"]
    away = run("machines", "--server", "https://127.0.0.1:1", *options)
    assert away.exit_code == ExitCode.FAILURE
    assert "cannot be reached" in away.stderr


def with_token(server: RunningServer, path: Path) -> list[str]:
    return [*server.options[:-1], str(path)]


def test_an_operator_gets_a_token_uses_it_and_loses_it(server: RunningServer, tmp_path: Path) -> None:
    path = tmp_path / "ada.token"
    made = run("operators", "create", "ada", "--role", "viewer", "--output", path, *server.options)
    assert made.exit_code == ExitCode.OK, made.output
    assert path.stat().st_mode & 0o777 == 0o600
    assert run("machines", *with_token(server, path)).exit_code == ExitCode.OK
    refused = run("token", "create", "--role", "agent", *with_token(server, path))
    assert refused.exit_code == ExitCode.NOT_PERMITTED
    assert run("audit", "list", *with_token(server, path)).exit_code == ExitCode.NOT_PERMITTED

    def ada() -> dict[str, object]:
        listed = json.loads(run("operators", "list", "-o", "json", *server.options).stdout)
        return next(one for one in listed if one["name"] == "ada")  # type: ignore[no-any-return]

    assert (ada()["role"], ada()["state"]) == ("viewer", "valid")
    assert run("operators", "revoke", ada()["token"], *server.options).exit_code == ExitCode.OK
    assert ada()["state"] == "revoked"
    assert run("operators", "revoke", "ada", *server.options).exit_code == ExitCode.NOT_FOUND
    refused = run("machines", *with_token(server, path))
    assert refused.exit_code == ExitCode.NOT_PERMITTED
    assert "revoked" in refused.stderr
    assert "farpoint operators create" in refused.stderr
    for unknown in ("0" * 32, "../certificates/AB"):
        assert run("operators", "revoke", unknown, *server.options).exit_code == ExitCode.NOT_FOUND


def test_no_token_is_made_for_a_file_that_is_there(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    before = run("operators", "list", "-o", "json", *server.options).stdout
    command = ("operators", "create", "bo", "--role", "viewer", "--output", tmp_path / "there", *server.options)
    assert run(*command).exit_code == ExitCode.FAILURE
    assert run("operators", "list", "-o", "json", *server.options).stdout == before


@pytest.mark.parametrize("contents", [b"one\ntwo\n", b"\xff\xfe", b""])
def test_a_file_that_holds_no_token_is_named(server: RunningServer, tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "token").write_bytes(contents)
    refused = run("machines", *with_token(server, tmp_path / "token"))
    assert refused.exit_code == ExitCode.FAILURE
    assert "one token" in refused.stderr


@pytest.mark.parametrize("wrong", [["--role", "viewer", "--expires-in", "367 d"], ["--role", "king"], []])
def test_an_operator_token_that_cannot_be_is_wrong_usage(server: RunningServer, wrong: list[str]) -> None:
    assert run("operators", "create", "eve", *wrong, *server.options).exit_code == ExitCode.USAGE


def test_the_audit_log_is_listed_and_holds(server: RunningServer, tmp_path: Path) -> None:
    path = tmp_path / "auditor.token"
    assert run("operators", "create", "max", "--role", "auditor", "--output", path, *server.options).exit_code == 0
    options = with_token(server, path)
    entries = json.loads(run("audit", "list", "-o", "json", *options).stdout)
    newest = entries[-1]
    assert (newest["action"], newest["actor_kind"]) == ("create operator token", "administrator")
    assert newest["details"]["name"] == "max"
    assert "max" in run("audit", "list", *options).stdout
    after = json.loads(run("audit", "list", "--after", newest["number"] - 1, "-o", "json", *options).stdout)
    assert after == [newest]
    kept = tmp_path / "kept.json"
    for known in (None, newest["number"]):
        found = run("audit", "verify", "--remember", kept, "-o", "json", *options)
        assert json.loads(found.stdout) == {
            "entries": newest["number"],
            "hash": newest["hash"],
            "is_whole": True,
            "remembered_entries": known,
        }
    remembered = json.loads(kept.read_text())
    for changed, told in (
        ({"number": newest["number"] + 1}, "when it was last verified"),
        ({"hash": "0" * 64}, "another one"),
    ):
        kept.write_text(json.dumps(remembered | changed))
        broken = run("audit", "verify", "--remember", kept, *options)
        assert broken.exit_code == ExitCode.FAILURE
        assert told in broken.stderr
        assert json.loads(kept.read_text()) == remembered | changed
    for changed in ({"vault": "0" * 32}, {"number": "many"}, {"number": -5}, {"hash": "x"}):
        kept.write_text(json.dumps(remembered | changed))
        assert run("audit", "verify", "--remember", kept, *options).exit_code == ExitCode.FAILURE


def test_a_policy_is_made_edited_and_deleted(server: RunningServer) -> None:
    made = run("policies", "create", "gold", "--rpo-threshold", "20 min", "--points-every", "1 min", *server.options)
    assert made.exit_code == ExitCode.OK, made.output
    assert run("policies", "create", "gold", *server.options).exit_code == ExitCode.FAILURE

    def gold() -> dict[str, object]:
        (one,) = json.loads(run("policies", "list", "-o", "json", *server.options).stdout)
        return one  # type: ignore[no-any-return]

    assert (gold()["rpo_threshold_seconds"], gold()["point_interval_seconds"], gold()["version"]) == (1200, 60, 1)
    assert run("policies", "edit", "gold", "--copy-every", "15 min", *server.options).exit_code == ExitCode.OK
    assert (gold()["copy_interval_seconds"], gold()["rpo_threshold_seconds"], gold()["version"]) == (900, 1200, 2)
    assert run("policies", "edit", "gold", *server.options).exit_code == ExitCode.USAGE
    assert run("policies", "edit", "gold", "--name", "", *server.options).exit_code == ExitCode.USAGE
    assert run("policies", "edit", "gold", "--name", "silver", *server.options).exit_code == ExitCode.OK
    assert "silver" in run("policies", "list", *server.options).stdout
    assert run("policies", "delete", "gold", *server.options).exit_code == ExitCode.NOT_FOUND
    assert run("policies", "delete", "silver", *server.options).exit_code == ExitCode.OK
    assert json.loads(run("policies", "list", "-o", "json", *server.options).stdout) == []


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--copy-every", "1 min"], "--copy-every"),
        (["--rpo-threshold", "soon"], "soon"),
        (["--points-every", "2 h"], "--points-every"),
        (["--rpo-threshold", "5 min", "--points-every", "4 min"], "twice --points-every"),
    ],
)
def test_terms_that_no_policy_may_have_are_named_by_their_option(
    server: RunningServer, wrong: list[str], told: str
) -> None:
    refused = run("policies", "create", "wrong", *wrong, *server.options)
    assert refused.exit_code == ExitCode.USAGE
    assert told in refused.stderr


def test_a_machine_that_nobody_knows_gets_no_policy(server: RunningServer) -> None:
    assert run("machines", "set-policy", "db-9", "--none", *server.options).exit_code == ExitCode.NOT_FOUND
    assert run("machines", "release", "db-9", *server.options).exit_code == ExitCode.NOT_FOUND
    assert run("machines", "set-policy", "db-9", *server.options).exit_code == ExitCode.USAGE
    assert run("machines", "set-policy", "db-9", "x", "--none", *server.options).exit_code == ExitCode.USAGE
