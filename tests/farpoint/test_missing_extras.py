"""Where an extra was not installed, its commands say so, and all others work."""

from __future__ import annotations

import sys

import pytest
from click.testing import CliRunner

from farpoint.__main__ import main
from runtime.exit_codes import ExitCode


@pytest.fixture
def without_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the extra `recovery` alone: no SQLAlchemy, and nothing imported that needs it."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("config_server", "farpoint", "sqlalchemy")]:
        if name not in ("farpoint", "farpoint.__main__", "farpoint.errors", "farpoint.settings"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)


@pytest.mark.usefixtures("without_database")
def test_a_command_of_an_extra_that_is_missing_says_what_to_install() -> None:
    done = CliRunner().invoke(main, ["up", "--dir", "somewhere", "--port", "1"])
    assert done.exit_code == ExitCode.FAILURE
    assert "sqlalchemy" in done.stderr
    assert "farpoint[config-server" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("without_database")
def test_the_help_lists_all_commands_and_the_others_work() -> None:
    shown = CliRunner().invoke(main, ["--help"])
    assert shown.exit_code == ExitCode.OK
    assert "up" in shown.stdout
    assert "Not installed here" in shown.stdout
    recover = CliRunner().invoke(main, ["recover", "--help"])
    assert recover.exit_code == ExitCode.OK
    assert "--recovery-key" in recover.stdout


def test_a_module_of_our_own_that_is_missing_is_no_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "farpoint.up_command", raising=False)
    monkeypatch.setitem(sys.modules, "farpoint.up_command", None)
    with pytest.raises(ModuleNotFoundError):
        CliRunner().invoke(main, ["up"], catch_exceptions=False)
