"""Which third-party distributions a program takes, by the lock file and by what is installed from it; their wheels.

Invariant: every wheel was checked against a hash of the lock file before anything is made of it.
"""

from __future__ import annotations

import email
import hashlib
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from deploy.packages.errors import BuildFailed

PROJECT: Final = "farpoint"
_PIN = re.compile(r"(?P<requirement>[A-Za-z0-9][^\\\n]*?==[^\\\n]*?)\s*\\\n(?P<hashes>(?:\s+--hash=\S+(?: \\)?\n)+)")
_HASH = re.compile(r"--hash=(sha256:[0-9a-f]{64})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A distribution as the lock file fixes it: its version and the hashes of every file that it may be."""

    name: str
    version: str
    hashes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A wheel file; requires: names of the distributions that it needs here, among those of the program."""

    name: str
    version: str
    path: Path
    requires: tuple[str, ...]
    licence: str
    summary: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @property
    def requirement(self) -> str:
        """A line of a requirements file that only this wheel satisfies."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n"


def read_lock(path: Path) -> dict[str, Pin]:
    """The pins that count for this interpreter, by canonical name. Raises BuildFailed."""
    pins: dict[str, Pin] = {}
    for found in _PIN.finditer(path.read_text("utf-8")):
        requirement = Requirement(found["requirement"])
        if requirement.marker is None or requirement.marker.evaluate():
            name = canonicalize_name(requirement.name)
            (specifier,) = requirement.specifier
            hashes = tuple(_HASH.findall(found["hashes"]))
            pins[name] = Pin(name=name, version=specifier.version, hashes=hashes)
    if not pins:
        raise BuildFailed(f"{path} pins nothing")
    return pins


def requirements_of(wheel: Path) -> list[Requirement]:
    """What a wheel's metadata asks for."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        metadata = email.message_from_bytes(archive.read(name))
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def closure(root: Iterable[Requirement], extras: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Names of all that a project with these requirements takes with these extras; by name what each itself takes.

    Reads the metadata of what is installed here. The project's own name stands for itself in requirements among its
    extras. Raises BuildFailed if something is not installed.
    """
    own = list(root)
    taken: dict[str, set[str]] = {PROJECT: set()}
    seen: set[tuple[str, str]] = set()
    waiting = [(PROJECT, extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for requirement in own if name == PROJECT else _installed_requirements(name):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            needed = canonicalize_name(requirement.name)
            taken.setdefault(needed, set())
            if needed != name:
                taken[name].add(needed)
            waiting += [(needed, wanted) for wanted in ("", *requirement.extras)]
    return {name: tuple(sorted(needs)) for name, needs in sorted(taken.items())}


def _installed_requirements(name: str) -> list[Requirement]:
    try:
        return [Requirement(text) for text in importlib.metadata.requires(name) or ()]
    except importlib.metadata.PackageNotFoundError as error:
        raise BuildFailed(f"{name} is needed, but not installed here; call `make environment`") from error


def download(names: Iterable[str], pins: Mapping[str, Pin], directory: Path) -> dict[str, Path]:
    """Fetches the wheel of each pin for this interpreter; pip checks the hashes. Raises BuildFailed."""
    chosen = [pins[name] for name in sorted(names)]
    lines = [" ".join([f"{pin.name}=={pin.version}", *(f"--hash={value}" for value in pin.hashes)]) for pin in chosen]
    directory.mkdir(parents=True, exist_ok=True)
    requirements = directory.parent / "download.txt"
    requirements.write_text("\n".join(lines) + "\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
    command += ["--no-deps", "--require-hashes", "--dest", str(directory), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildFailed(f"pip did not fetch the locked wheels:\n{done.stderr.strip()}")
    return {parse_wheel_filename(path.name)[0]: path for path in directory.glob("*.whl")}


def describe(path: Path, needs: Mapping[str, tuple[str, ...]]) -> Wheel:
    """A wheel file with what its metadata says. Raises BuildFailed."""
    name, version, _, _ = parse_wheel_filename(path.name)
    with zipfile.ZipFile(path) as archive:
        (metadata_name,) = (one for one in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", one))
        metadata = email.message_from_bytes(archive.read(metadata_name))
    classifiers = [text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier", []) if "License" in text]
    licence = metadata["License-Expression"] or _short(metadata["License"]) or " OR ".join(classifiers)
    if not licence:
        raise BuildFailed(f"{path.name} does not say under what licence it is")
    summary = metadata["Summary"] or ""
    return Wheel(name=name, version=str(version), path=path, requires=needs[name], licence=licence, summary=summary)


def _short(licence: str | None) -> str:
    """A licence's name; some put its whole text there."""
    return licence if licence and len(licence) < 100 and "\n" not in licence else ""
