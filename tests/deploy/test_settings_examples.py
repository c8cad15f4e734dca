"""The example settings are good as they stand, and every value that is commented out in them is good too."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests.deploy.needed_tools import DEPLOY, run
from tests.test_tidy import settings_keys

EXAMPLES = sorted((DEPLOY / "settings").glob("*.toml"))
MODULE = {
    "mobility-agent": "mobility_agent",
    "process-server": "process_server",
    "config-server": "config_server",
    "farpoint": "farpoint",
}


def check(example: Path) -> str:
    return run(sys.executable, "-m", MODULE[example.stem], "config", "check", "--settings", example)


def test_there_is_an_example_for_each_program() -> None:
    assert {example.stem for example in EXAMPLES} == set(MODULE)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_a_program_takes_its_example(example: Path) -> None:
    assert "settings are good" in check(example)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_a_program_takes_all_that_is_commented_out_in_its_example(example: Path, tmp_path: Path) -> None:
    whole = tmp_path / example.name
    whole.write_text(re.sub(r"^#(?=[a-z_]+ = )", "", example.read_text("utf-8"), flags=re.MULTILINE))
    assert whole.read_text() != example.read_text()
    assert "settings are good" in check(whole)
    keys = tomllib.loads(whole.read_text())
    flat = {f"{key}.{inner}" for key, value in keys.items() if isinstance(value, dict) for inner in value}
    flat |= {key for key, value in keys.items() if not isinstance(value, dict)}
    assert flat <= {key for program, key in settings_keys() if program == example.stem}
