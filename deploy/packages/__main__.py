"""`make dist`: everything that is installed anywhere, into dist/, from the commit that is checked out."""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from deploy.packages.bill_of_materials import bill_of_materials
from deploy.packages.debian_package import SYSTEM_PYTHON, Sources, build_package, run
from deploy.packages.errors import BuildFailed
from deploy.packages.locked import PROJECT, Wheel, closure, describe, download, read_lock, requirements_of
from deploy.packages.offline_bundle import build_bundle
from deploy.packages.programs import PROGRAMS

ROOT: Final = Path(__file__).parents[2]
TOOLS: Final = {
    "git": "git",
    "dpkg": "dpkg",
    "dpkg-deb": "dpkg",
    str(SYSTEM_PYTHON): SYSTEM_PYTHON.name,
}
CHECKSUMS: Final = "SHA256SUMS"
COMMIT: Final = "COMMIT"


def main() -> int:
    """Builds, or says in one line why not."""
    parser = argparse.ArgumentParser(prog="make dist", description=__doc__)
    parser.add_argument("--destination", type=Path, default=ROOT / "dist", help="emptied first; dist/ by default")
    destination = parser.parse_args().destination
    os.umask(0o022)
    try:
        with tempfile.TemporaryDirectory(prefix="farpoint-dist-") as work:
            build(Path(work), destination)
    except BuildFailed as error:
        print(f"make dist: {error}", file=sys.stderr)
        return 1
    for path in sorted(destination.iterdir()):
        print(f"{path.stat().st_size / 2**20:8.1f} MiB  {path.name}")
    return 0


def build(work: Path, destination: Path) -> None:
    """Fills the destination, which is complete once its checksums are there. Raises BuildFailed."""
    check_tools()
    tree, commit, epoch_seconds = export(work / "tree")
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir(parents=True)
    own = build_wheel(tree, destination, epoch_seconds)
    pins = read_lock(tree / "requirements.lock")
    wanted = requirements_of(own)
    by_program = {program.name: closure(wanted, program.extras) for program in PROGRAMS}
    names = set().union(*by_program.values()) - {PROJECT}
    files = download({*names, "pip"}, pins, work / "wheels") | {PROJECT: own}

    def wheels_of(needs: dict[str, tuple[str, ...]]) -> list[Wheel]:
        return [describe(files[name], needs) for name in sorted(needs)]

    version = describe(own, {PROJECT: ()}).version
    for program in PROGRAMS:
        wheels = wheels_of(by_program[program.name])
        bill = bill_of_materials(wheels, extras=program.extras, epoch_seconds=epoch_seconds)
        sources = Sources(
            tree=tree, wheels=wheels, bill_of_materials=bill, stage=work, version=version, epoch_seconds=epoch_seconds
        )
        build_package(program, sources, destination)
    every_extra = tuple(sorted({extra for program in PROGRAMS for extra in program.extras}))
    needs = closure(wanted, every_extra)
    bill = bill_of_materials(wheels_of(needs), extras=every_extra, epoch_seconds=epoch_seconds)
    (destination / f"{PROJECT}-{version}.cdx.json").write_text(bill, "utf-8")
    build_bundle(
        tree=tree,
        wheels={program.name: wheels_of(by_program[program.name]) for program in PROGRAMS},
        installer=files["pip"],
        bill_of_materials=bill,
        stage=work,
        destination=destination,
        epoch_seconds=epoch_seconds,
    )
    (destination / COMMIT).write_text(f"{commit}\n")
    write_checksums(destination, (path for path in destination.iterdir()))


def check_tools() -> None:
    """Raises BuildFailed with the Debian packages that are missing."""
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if missing:
        raise BuildFailed(
            f"packages are built on Debian with {SYSTEM_PYTHON.name} (the Python of the environment; `make dist "
            f"PYTHON=…` makes another); missing: apt-get install {' '.join(missing)}"
        )


def export(tree: Path) -> tuple[Path, str, int]:
    """Puts the commit that is checked out into `tree`: (tree, commit, its instant in seconds since the Unix epoch)."""
    if not (ROOT / ".git").exists():
        raise BuildFailed("what belongs to a package is known by git, and this is no checkout")
    commit = run("git", "-C", ROOT, "rev-parse", "HEAD").strip()
    if run("git", "-C", ROOT, "status", "--porcelain", "--untracked-files=no"):
        print("make dist: changes that are not committed are not in the packages", file=sys.stderr)
    tree.mkdir()
    archive = tree.with_suffix(".tar")
    run("git", "-C", ROOT, "archive", "--format=tar", f"--output={archive}", commit)
    with tarfile.open(archive) as file:
        file.extractall(tree, filter="data")
    epoch = os.environ.get("SOURCE_DATE_EPOCH") or run("git", "-C", ROOT, "log", "-1", "--format=%ct", commit)
    return tree, commit, int(epoch)


def build_wheel(tree: Path, destination: Path, epoch_seconds: int) -> Path:
    """The wheel of the tree. Needs no index: what builds it is in the environment."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--wheel-dir", str(destination), str(tree)]
    environment = os.environ | {"SOURCE_DATE_EPOCH": str(epoch_seconds)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise BuildFailed(f"the wheel was not built:\n{done.stdout}{done.stderr}")
    (wheel,) = destination.glob("*.whl")
    return wheel


def write_checksums(directory: Path, paths: Iterable[Path]) -> None:
    """SHA256SUMS as sha256sum(1) checks them."""
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(directory)}\n" for path in paths]
    (directory / CHECKSUMS).write_text("".join(sorted(lines, key=lambda line: line.partition("  ")[2])))


if __name__ == "__main__":
    sys.exit(main())
