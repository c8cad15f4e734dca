"""Command lines: exit codes, errors with hints and without tracebacks, tables and JSON, `config show` and `config
check`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from protocol.errors import DeadlineExceeded, NotPermitted, RefusedByPeer, ReplicationError
from runtime.command_line import ProgramGroup, config_commands, output_option, with_settings
from runtime.errors import SecretExists, StateLocked
from runtime.exit_codes import EXIT_CODE_OF_ERROR, ExitCode, exit_code_of
from runtime.output import Output, notice
from runtime.settings import Loaded, Settings
from storage.errors import ObjectNotFound, StoreMissing, StoreNotPermitted, StoreUrlInvalid

IDENTIFIER = "0123456789abcdef" * 2


class ExampleSettings(Settings):
    server: str = "https://default"
    retries: int = 3
    paths: tuple[str, ...] = ()


@click.group(cls=ProgramGroup)
def program() -> None:
    """An example."""


@program.command()
@click.argument("kind")
def fail(kind: str) -> None:
    errors: dict[str, BaseException] = {
        "locked": StateLocked(path="/state", holder="7"),
        "group": ExceptionGroup("tasks", [ExceptionGroup("inner", [StoreMissing(url="file:///s", reason="gone")])]),
        "os": PermissionError(13, "Permission denied", "/etc/shadow"),
        "unexpected": ZeroDivisionError("a bug"),
        "mixed": ExceptionGroup("tasks", [SecretExists(path="/k"), ZeroDivisionError("a bug")]),
        "interrupt": KeyboardInterrupt(),
        "pipe": BrokenPipeError(),
    }
    raise errors[kind]


@program.command()
def partial() -> ExitCode:
    return ExitCode.PARTIAL


@program.command()
def ask() -> None:
    click.confirm("Sure?", abort=True)


@program.command("list")
@output_option
def list_rows(output: Output) -> None:
    output.rows(
        [
            {"disk": IDENTIFIER, "state": ExitCode.OK, "path": Path("/dev/sda"), "lag_seconds": None, "hidden": [1, 2]},
            {"disk": IDENTIFIER[::-1], "state": ExitCode.LOCKED, "path": Path("/dev/[red]"), "lag_seconds": 1.5},
        ],
        columns={"disk": "Disk", "path": "Path", "lag_seconds": "Lag (s)"},
    )


@program.command()
@output_option
def empty(output: Output) -> None:
    output.rows([])


@program.command()
@click.option("--server")
@click.option("--path", "paths", multiple=True)
@with_settings(ExampleSettings, "process-server", flags={"server": "server", "paths": "paths"})
def run(loaded: Loaded[ExampleSettings]) -> None:
    click.echo(f"{loaded.settings.server} {loaded.settings.retries} {loaded.settings.paths}")


program.add_command(config_commands(ExampleSettings, "process-server"))


def invoke(*arguments: str, **options: object) -> Result:
    return CliRunner().invoke(program, list(arguments), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            ["fail", "locked"],
            ExitCode.LOCKED,
            "error: /state is in use by another process (process id 7)\n  Stop",
        ),
        (["fail", "group"], ExitCode.NOT_FOUND, "error: store file:///s: gone\n  Check the URL"),
        (["fail", "os"], ExitCode.NOT_PERMITTED, "/etc/shadow"),
        (["fail", "interrupt"], ExitCode.INTERRUPTED, "interrupted"),
        (["fail", "pipe"], ExitCode.FAILURE, ""),
        (["partial"], ExitCode.PARTIAL, ""),
        (["ask"], ExitCode.FAILURE, "aborted"),
        (["list"], ExitCode.OK, ""),
        (["unknown"], ExitCode.USAGE, "No such command"),
        (["list", "-o", "yaml"], ExitCode.USAGE, "yaml"),
        (["run", "--set", "retires=3"], ExitCode.USAGE, "Did you mean retries?"),
        (["run", "--set", "retries"], ExitCode.USAGE, "KEY=VALUE"),
        (["run", "--settings", "/missing.toml"], ExitCode.USAGE, "/missing.toml"),
    ],
)
def test_a_program_ends_with_the_documented_code_and_says_why_on_stderr(
    arguments: list[str], code: ExitCode, said: str
) -> None:
    result = invoke(*arguments, input="n\n")
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert not result.stdout.startswith("error")


def test_debug_shows_the_traceback_of_an_expected_error() -> None:
    result = invoke("--debug", "fail", "locked")
    assert result.exit_code == ExitCode.LOCKED
    assert "Traceback" in result.stderr
    assert "error: /state" in result.stderr


@pytest.mark.parametrize("kind", ["unexpected", "mixed"])
def test_an_unexpected_error_is_never_hidden(kind: str) -> None:
    result = invoke("fail", kind)
    assert result.exit_code == 1
    assert result.exception is not None
    assert not isinstance(result.exception, SystemExit)


def test_the_version_is_told() -> None:
    assert invoke("--version").stdout.startswith("program ")


def test_json_on_stdout_is_one_document_with_whole_records() -> None:
    records = json.loads(invoke("list", "-o", "json").stdout)
    assert records[0] == {"disk": IDENTIFIER, "state": 0, "path": "/dev/sda", "lag_seconds": None, "hidden": [1, 2]}
    assert json.loads(invoke("empty", "-o", "json").stdout) == []


def test_a_warning_in_a_command_does_not_get_into_its_json(tmp_path: Path) -> None:
    code = """
import click, sys
from runtime.command_line import ProgramGroup, output_option
from runtime.secrets import read_secret
@click.group(cls=ProgramGroup)
def program(): pass
@program.command()
@click.argument("path")
@output_option
def show(path, output):
    output.record({"secret": read_secret(path).decode()})
program(sys.argv[1:], "example")
"""
    path = tmp_path / "key"
    path.write_text("for all")
    path.chmod(0o644)
    done = subprocess.run(
        [sys.executable, "-c", code, "show", str(path), "-o", "json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"secret": "for all"}
    told = json.loads(done.stderr)
    assert "everybody on this machine can read" in told["event"]
    assert (told["level"], told["path"], told["program"]) == ("warning", str(path), "example")


def test_a_table_folds_no_identifier_and_reads_no_markup_in_data() -> None:
    lines = invoke("list").stdout.splitlines()
    assert lines[0].split() == ["Disk", "Path", "Lag", "(s)"]
    assert lines[1].split() == [IDENTIFIER, "/dev/sda", "–"]
    assert lines[2].split() == [IDENTIFIER[::-1], "/dev/[red]", "1.5"]


def test_no_escape_sequence_of_somebody_elses_choosing_reaches_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    hostile = "/dev/vda\x1b]0;owned\x07\x9b2J\rfine"
    Output(format="table").rows([{"path": hostile}])
    Output(format="table").record({"path": hostile})
    notice(f"error: {hostile}\n  hint")
    shown = "".join(capsys.readouterr())
    assert not {character for character in shown if not character.isprintable()} - {"\n"}
    assert shown.count("/dev/vda") == 3
    assert "\n  hint" in shown


def test_flags_stand_above_single_settings_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARPOINT_PROCESS_SERVER_RETRIES", "7")
    monkeypatch.setenv("FARPOINT_PROCESS_SERVER_SERVER", "https://environment")
    assert invoke("run").stdout == "https://environment 7 ()\n"
    assert invoke("run", "--set", "server=https://set", "--set", "retries=9").stdout == "https://set 9 ()\n"
    result = invoke("run", "--set", "server=https://set", "--server", "https://flag", "--path", "a", "--path", "b")
    assert result.stdout == "https://flag 7 ('a', 'b')\n"


def test_config_show_tells_values_and_origins(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("retries = 5")
    result = invoke("config", "show", "--origin", "-o", "json", "--settings", str(tmp_path / "settings.toml"))
    assert json.loads(result.stdout) == [
        {"key": "server", "value": "https://default", "origin": "default"},
        {"key": "retries", "value": 5, "origin": f"file {tmp_path / 'settings.toml'}"},
        {"key": "paths", "value": [], "origin": "default"},
    ]
    assert "origin" not in invoke("config", "show").stdout


def test_config_check_fails_on_a_bad_value_and_names_it(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text('retries = "many"')
    result = invoke("config", "check", "--settings", str(tmp_path / "settings.toml"))
    assert result.exit_code == ExitCode.USAGE
    assert "retries" in result.stderr
    assert invoke("config", "check").exit_code == ExitCode.OK


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ReplicationError(), ExitCode.FAILURE),
        (NotPermitted(subject="x", reason="y"), ExitCode.NOT_PERMITTED),
        (StoreNotPermitted(url="u", reason="r"), ExitCode.NOT_PERMITTED),
        (ObjectNotFound(url="u", name="n"), ExitCode.NOT_FOUND),
        (StoreUrlInvalid(url="u", reason="r"), ExitCode.USAGE),
        (DeadlineExceeded(what="w", seconds=1), ExitCode.FAILURE),
        (RefusedByPeer(peer_code="not-permitted", detail="d", retryable=False), ExitCode.NOT_PERMITTED),
        (RefusedByPeer(peer_code="of-the-future", detail="d", retryable=False), ExitCode.FAILURE),
        (FileNotFoundError(), ExitCode.NOT_FOUND),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
        (ZeroDivisionError(), ExitCode.FAILURE),
    ],
)
def test_every_error_has_an_exit_code(error: BaseException, code: ExitCode) -> None:
    assert exit_code_of(error) is code


def test_a_subtype_without_a_row_ends_like_its_nearest_ancestor() -> None:
    class OfItsOwn(NotPermitted):
        code = "of-its-own"

    assert OfItsOwn.code not in EXIT_CODE_OF_ERROR
    assert exit_code_of(OfItsOwn(subject="x", reason="y")) is ExitCode.NOT_PERMITTED


def test_an_interrupted_process_ends_with_130_and_no_traceback() -> None:
    # why: whoever runs these tests as a shell's background job hands an ignored SIGINT down
    code = """
import click, signal, time
from runtime.command_line import ProgramGroup
signal.signal(signal.SIGINT, signal.default_int_handler)
@click.group(cls=ProgramGroup)
def program(): pass
@program.command()
def wait():
    print("waiting", flush=True)
    time.sleep(60)
program(["wait"])
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        os.kill(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == ExitCode.INTERRUPTED
    assert said.strip() == "interrupted"
