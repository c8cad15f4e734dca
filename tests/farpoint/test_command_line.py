"""The program as a whole: every command can be had, and a recovery does not even import the servers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from farpoint.__main__ import COMMANDS, main
from runtime.exit_codes import ExitCode


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str) -> None:
    shown = CliRunner().invoke(main, [command, "--help"])
    assert shown.exit_code == ExitCode.OK
    assert "Usage" in shown.stdout


def test_the_program_lists_every_command() -> None:
    shown = CliRunner().invoke(main, ["--help"])
    assert all(command in shown.stdout for command in (*COMMANDS, "config"))


def test_an_unknown_command_is_wrong_usage() -> None:
    assert CliRunner().invoke(main, ["recovr"]).exit_code == ExitCode.USAGE


def test_a_recovery_imports_nothing_of_the_servers() -> None:
    program = "import farpoint.recover_command, json, sys; print(json.dumps(sorted(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in json.loads(finished.stdout)}
    assert not packages & {"config_server", "process_server", "mobility_agent", "sqlalchemy", "alembic"}
