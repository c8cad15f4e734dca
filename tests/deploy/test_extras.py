"""A program's extra brings what the program imports and no more; the lock file holds it all, with hashes."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.packages.locked import PROJECT, closure, read_lock
from deploy.packages.programs import PROGRAMS, Program
from tests.deploy.needed_tools import ROOT
from tests.test_tidy import PRODUCT

USED_BY_NAME = {"aiosqlite": "the database's URL names it"}
"""Distributions that no import shows."""

each_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)


def requirements() -> list[Requirement]:
    """The project's own, as the wheel's metadata will have them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = [Requirement(text) for text in project["dependencies"]]
    for extra, texts in project["optional-dependencies"].items():
        found += [Requirement(f"{text} ; extra == '{extra}'") for text in texts]
    return found


def imports(folder: Path) -> Iterator[str]:
    """Top names of everything that the modules of a folder import, wherever in them."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield node.module.partition(".")[0]


def third_party(package: str) -> set[str]:
    names = set(imports(ROOT / package))
    return {name for name in names if name not in sys.stdlib_module_names and name not in PRODUCT}


def distributions(names: set[str], *, among: set[str]) -> dict[str, set[str]]:
    """By imported name: the distributions that provide it, of those given."""
    providers = importlib.metadata.packages_distributions()
    return {name: {canonicalize_name(one) for one in providers.get(name, [])} & among for name in names}


@each_program
def test_a_programs_extras_bring_all_that_it_imports(program: Program) -> None:
    brought = set(closure(requirements(), program.extras))
    for package in program.packages:
        for name, found in distributions(third_party(package), among=brought).items():
            assert found, f"{package} imports {name}, which {program.extras} do not bring"


@each_program
def test_a_programs_packages_are_all_that_it_imports_of_ours(program: Program) -> None:
    ours = {name for package in program.packages for name in imports(ROOT / package) if name in PRODUCT}
    assert ours <= set(program.packages)


def test_no_requirement_is_there_for_nothing() -> None:
    imported = {name for package in PRODUCT for name in third_party(package)}
    wanted = {
        canonicalize_name(requirement.name)
        for requirement in requirements()
        if not (requirement.marker and "development" in str(requirement.marker))
    } - {PROJECT}
    used = set().union(*distributions(imported, among=wanted).values())
    assert wanted - used == set(USED_BY_NAME)


def test_an_agent_gets_no_server() -> None:
    agent = set(closure(requirements(), ["agent"]))
    assert agent.isdisjoint(
        {"sqlalchemy", "alembic", "aiosqlite", "azure-storage-blob", "azure-identity", "stamina", "msal"}
    )
    assert agent < set(closure(requirements(), ["agent", "process-server", "config-server", "recovery"]))


def test_nobody_gets_what_is_for_development() -> None:
    everything = set(closure(requirements(), ["agent", "process-server", "config-server", "recovery"]))
    assert everything.isdisjoint({"pytest", "hypothesis", "mypy", "ruff", "pip", "setuptools", "cyclonedx-python-lib"})


def test_the_lock_pins_every_distribution_with_its_hashes() -> None:
    pins = read_lock(ROOT / "requirements.lock")
    everything = set(closure(requirements(), ["agent", "process-server", "config-server", "recovery", "development"]))
    assert everything - {PROJECT} <= set(pins)
    for pin in pins.values():
        assert pin.hashes, pin.name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in pin.hashes)


def test_the_lock_and_what_is_installed_here_are_one() -> None:
    pins = read_lock(ROOT / "requirements.lock")
    installed = {name: importlib.metadata.version(name) for name in pins}
    assert installed == {name: pin.version for name, pin in pins.items()}
