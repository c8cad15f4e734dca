"""The offline bundle: all wheels with their hashes, the services' files, and the scripts that install and uninstall.

For machines without a registry that are no Debian of the packages' release: what they need is the same minor version
of Python and an equally new C library.
"""

from __future__ import annotations

import gzip
import hashlib
import platform
import shutil
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from deploy.packages.debian_package import PYTHON, oldest_c_library
from deploy.packages.locked import PROJECT, Wheel
from deploy.packages.programs import PROGRAMS

SCRIPTS: Final = Path(__file__).parent / "offline_scripts"


def build_bundle(
    *,
    tree: Path,
    wheels: Mapping[str, Sequence[Wheel]],
    installer: Path,
    bill_of_materials: str,
    stage: Path,
    destination: Path,
    epoch_seconds: int,
) -> Path:
    """Makes the archive in `destination`. wheels: by program. installer: pip's own wheel, which needs no other."""
    by_name = {wheel.name: wheel for program in wheels.values() for wheel in program}
    version = by_name[PROJECT].version
    name = f"{PROJECT}-{version}-offline-{PYTHON}-{platform.machine()}"
    root = stage / name
    for folder in ("wheels", "requirements", "systemd", "settings"):
        (root / folder).mkdir(parents=True)
    for wheel in by_name.values():
        shutil.copy(wheel.path, root / "wheels")
    shutil.copy(installer, root / "wheels")
    for program in PROGRAMS:
        lines = [wheel.requirement for wheel in wheels[program.name]]
        (root / "requirements" / f"{program.name}.txt").write_text("".join(lines))
        shutil.copy(tree / "deploy/settings" / f"{program.command}.toml", root / "settings")
        for example in program.examples:
            shutil.copytree(tree / "deploy" / example, root / "examples" / example)
        for document in program.documents:
            shutil.copy(tree / "docs" / document, root)
        for unit in program.units:
            shutil.copy(tree / "deploy/systemd" / unit, root / "systemd")
    c_library = max(oldest_c_library(wheel.path.name) for wheel in by_name.values())
    target = f"version={version}\npython={PYTHON}\nmachine={platform.machine()}\n"
    (root / "target").write_text(target + f"c_library={c_library[0]}.{c_library[1]}\n")
    for script in ("install.sh", "uninstall.sh"):
        shutil.copy(SCRIPTS / script, root / script)
        (root / script).chmod(0o755)
    shutil.copy(tree / "LICENSE", root)
    shutil.copy(tree / "docs/installation.md", root)
    (root / "farpoint.cdx.json").write_text(bill_of_materials, "utf-8")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(root)}\n" for path in files]
    (root / "SHA256SUMS").write_text("".join(lines))
    path = destination / f"{name}.tar.gz"
    _archive(root, [*files, root / "SHA256SUMS"], path, epoch_seconds)
    return path


def _archive(root: Path, files: Iterable[Path], path: Path, epoch_seconds: int) -> None:
    """The same files give the same bytes: sorted, of root, of one instant."""

    def settle(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime, member.uid, member.gid, member.uname, member.gname = epoch_seconds, 0, 0, "root", "root"
        member.mode = 0o755 if member.mode & 0o100 else 0o644
        return member

    with (
        path.open("wb") as raw,
        # why: wheels are compressed already
        gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=epoch_seconds, compresslevel=1) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as archive,
    ):
        for file in sorted(files):
            archive.add(file, f"{root.name}/{file.relative_to(root)}", filter=settle)
