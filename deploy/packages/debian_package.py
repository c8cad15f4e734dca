"""A Debian package per program: its own virtual environment at the place where it will lie, made of the checked wheels.

Invariants: nothing is fetched, compiled or written outside the state directory when it is installed or run; the
interpreter and its TLS library are the distribution's, and so are their security updates.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy.packages.errors import BuildFailed
from deploy.packages.locked import PROJECT, Wheel
from deploy.packages.programs import PROGRAMS, Program

PYTHON: Final = f"python{sys.version_info.major}.{sys.version_info.minor}"
SYSTEM_PYTHON: Final = Path("/usr/bin") / PYTHON
HOME: Final = "usr/lib/farpoint"
UNITS: Final = "lib/systemd/system"
TEMPLATES: Final = Path(__file__).parent / "maintainer_scripts"
MAINTAINER: Final = "Farpoint maintainers <maintainers@farpoint.invalid>"
OWN_PACKAGES: Final = frozenset(package for program in PROGRAMS for package in program.packages)

_LAUNCHER = """\
#!/{home}/bin/python3 -I
import sys

from {module}.__main__ import main

sys.exit(main())
"""
_ENVIRONMENT = "home = /usr/bin\ninclude-system-site-packages = false\nversion = {version}\n"
_COPYRIGHT = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: farpoint

Files: *
Copyright: the Farpoint authors
License: Apache-2.0
 The whole text: /usr/share/common-licenses/Apache-2.0
Comment: {home} also holds these works of others, each with its licence in its *.dist-info there:
{others}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The exported commit, the wheels of a program and its bill of materials, and where to work."""

    tree: Path
    wheels: Sequence[Wheel]
    bill_of_materials: str
    stage: Path
    version: str
    epoch_seconds: int


def build_package(program: Program, sources: Sources, destination: Path) -> Path:
    """Makes the package file in `destination`. Raises BuildFailed."""
    root = sources.stage / program.package_name
    home = root / HOME / program.name
    _make_environment(program, sources, home)
    _compile(root, home)
    _add_files(program, sources, root)
    _set_modes(root)
    _write_control(program, sources, root)
    architecture = run("dpkg", "--print-architecture").strip()
    path = destination / f"{program.package_name}_{sources.version}_{architecture}.deb"
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(sources.epoch_seconds)}
    run("dpkg-deb", "--root-owner-group", "-Zzstd", "-z12", "--build", root, path, environment=environment)
    return path


def run(*command: object, environment: dict[str, str] | None = None) -> str:
    """What the command says on stdout. Raises BuildFailed with what it says on stderr."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise BuildFailed(f"{' '.join(words[:4])}… failed:\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout


def _make_environment(program: Program, sources: Sources, home: Path) -> None:
    site = home / "lib" / PYTHON / "site-packages"
    site.mkdir(parents=True)
    (home / "bin").mkdir()
    (home / "bin" / "python3").symlink_to(SYSTEM_PYTHON)
    (home / "pyvenv.cfg").write_text(_ENVIRONMENT.format(version=PYTHON.removeprefix("python")))
    requirements = sources.stage / f"{program.name}.txt"
    requirements.write_text("".join(wheel.requirement for wheel in sources.wheels))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", home / "bin" / "python3", "install"]
    pip += ["--quiet", "--no-index", "--no-deps", "--no-compile", "--require-hashes", "--requirement", requirements]
    run(*pip, *(f"--find-links={folder}" for folder in sorted({wheel.path.parent for wheel in sources.wheels})))
    for entry in (home / "bin").iterdir():
        if entry.name != "python3":
            entry.unlink()
    for package in OWN_PACKAGES - set(program.packages):
        shutil.rmtree(site / package)
    _tidy_metadata(site)
    launcher = home / "bin" / program.command
    launcher.write_text(_LAUNCHER.format(home=f"{HOME}/{program.name}", module=program.module))
    launcher.chmod(0o755)


def _tidy_metadata(site: Path) -> None:
    """Records list what is there, and nothing tells where this was built."""
    for information in site.glob("*.dist-info"):
        for name in ("direct_url.json", "REQUESTED"):
            (information / name).unlink(missing_ok=True)
        record = information / "RECORD"
        rows = [row for row in csv.reader(record.open(newline="")) if (site / row[0]).exists()]
        with record.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(sorted(rows))


def _compile(root: Path, home: Path) -> None:
    """Byte code that is never checked against its source nor written again: dpkg owns both."""
    options = ["-q", "-s", root, "-p", "/", "--invalidation-mode", "unchecked-hash"]
    run(SYSTEM_PYTHON, "-I", "-m", "compileall", *options, home / "lib")


def _add_files(program: Program, sources: Sources, root: Path) -> None:
    documents = root / "usr/share/doc" / program.package_name
    commands = root / "usr/bin"
    for folder in (documents, commands, root / "etc/farpoint"):
        folder.mkdir(parents=True)
    (commands / program.command).symlink_to(f"/{HOME}/{program.name}/bin/{program.command}")
    shutil.copy(
        sources.tree / "deploy/settings" / f"{program.command}.toml", root / "etc/farpoint" / f"{program.command}.toml"
    )
    for name in ("installation.md", "settings.md", "metrics.md", "limits.md", *program.documents):
        if (sources.tree / "docs" / name).exists():
            shutil.copy(sources.tree / "docs" / name, documents / name)
    (documents / "farpoint.cdx.json").write_text(sources.bill_of_materials, "utf-8")
    others = [f" {wheel.name} {wheel.version}: {wheel.licence}" for wheel in sources.wheels if wheel.name != PROJECT]
    copyright_text = _COPYRIGHT.format(home=f"/{HOME}/{program.name}", others="\n".join(others))
    (documents / "copyright").write_text(copyright_text, "utf-8")
    if program.has_service:
        units = root / UNITS
        units.mkdir(parents=True)
        for unit in program.units:
            shutil.copy(sources.tree / "deploy/systemd" / unit, units / unit)
        drop_ins = sources.tree / "deploy/systemd" / f"{program.unit}.d"
        if drop_ins.exists():
            shutil.copytree(drop_ins, documents / "examples" / drop_ins.name)
    for name in program.examples:
        shutil.copytree(sources.tree / "deploy" / name, documents / "examples" / name)


def _set_modes(root: Path) -> None:
    for folder, _, files in os.walk(root):
        Path(folder).chmod(0o755)
        for name in files:
            path = Path(folder, name)
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def _write_control(program: Program, sources: Sources, root: Path) -> None:
    control = root / "DEBIAN"
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    size = sum(path.stat().st_size for path in files)
    sums = [
        f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {path.relative_to(root)}\n"
        for path in files
    ]
    control.mkdir()
    (control / "md5sums").write_text("".join(sums))
    (control / "conffiles").write_text(f"/etc/farpoint/{program.command}.toml\n")
    fields = {
        "Package": program.package_name,
        "Version": sources.version,
        "Architecture": run("dpkg", "--print-architecture").strip(),
        "Maintainer": MAINTAINER,
        "Installed-Size": str(size // 1024 + 1),
        "Depends": ", ".join(_depends(program, sources.wheels)),
        "Recommends": "e2fsprogs" if program.name == "recovery" else "",
        "Section": "admin",
        "Priority": "optional",
        "Description": f"{program.summary}\n {program.description}",
    }
    (control / "control").write_text("".join(f"{key}: {value}\n" for key, value in fields.items() if value), "utf-8")
    if program.has_service:
        for name in ("postinst", "prerm", "postrm"):
            text = (TEMPLATES / name).read_text("utf-8")
            values = {
                "NAME": program.name,
                "UNIT": program.unit,
                "UNITS": " ".join(program.units),
                "USER": program.user,
            }
            for name_of_value, value in values.items():
                text = text.replace(f"@{name_of_value}@", value)
            (control / name).write_text(text, "utf-8")
            (control / name).chmod(0o755)


def _depends(program: Program, wheels: Iterable[Wheel]) -> list[str]:
    c_library = max([(2, 17), *(oldest_c_library(wheel.path.name) for wheel in wheels)])
    depends = [PYTHON, f"libc6 (>= {c_library[0]}.{c_library[1]})"]
    if program.has_service:
        depends += ["init-system-helpers (>= 1.51)", "passwd"]
    return depends


def oldest_c_library(wheel_name: str) -> tuple[int, int]:
    """The oldest glibc on which a wheel runs, by its name's tags; (0, 0) if it holds no machine code."""
    found = [(int(major), int(minor)) for major, minor in re.findall(r"manylinux_(\d+)_(\d+)", wheel_name)]
    if "manylinux2014" in wheel_name:
        found.append((2, 17))
    return min(found, default=(0, 0))
