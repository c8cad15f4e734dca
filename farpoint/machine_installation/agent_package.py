"""The mobility agent's Debian package as a file here: found, read and digested before anything of it is sent.

Invariant: what a package says of itself is read from its control file, never from its name.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import zstandard

from farpoint.machine_installation.errors import PackageInvalid, PackageMissing

PACKAGE: Final = "farpoint-mobility-agent"
DIST: Final = Path("dist")
CHECKSUMS: Final = "SHA256SUMS"
CONTROL_BYTES_MAX: Final = 2**20
"""Of a package's control archive, packed and unpacked, and of a file with sums."""
_MAGIC: Final = b"!<arch>\n"
_MEMBER_HEADER_BYTES: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentPackage:
    """sha256: of the file's bytes, in hexadecimal. installed_bytes: what it takes once it is unpacked."""

    path: Path
    version: str
    architecture: str
    size_bytes: int
    installed_bytes: int
    sha256: str


def find_package(path: Path | None) -> AgentPackage:
    """The package at `path`, or the one in dist/ below the working directory. Blocks.

    If SHA256SUMS lies beside it, that must name it with its sum. Raises PackageMissing, PackageInvalid.
    """
    if path is None:
        found = sorted(DIST.glob(f"{PACKAGE}_*.deb"))
        if len(found) != 1:
            raise PackageMissing(place=f"{DIST}/{PACKAGE}_*.deb" + (f" (there are {len(found)})" if found else ""))
        path = found[0]
    try:
        with path.open("rb") as file:
            fields = _control_fields(file, path)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest() if file.seek(0) == 0 else ""
            size_bytes = file.seek(0, io.SEEK_END)
    except FileNotFoundError as error:
        raise PackageMissing(place=path) from error
    except OSError as error:
        raise PackageInvalid(path=path, reason=error.strerror) from error
    if fields.get("Package") != PACKAGE:
        raise PackageInvalid(path=path, reason=f"it is the package {fields.get('Package')}")
    _check_sum(path, sha256)
    try:
        return AgentPackage(
            path=path,
            version=fields["Version"],
            architecture=fields["Architecture"],
            size_bytes=size_bytes,
            installed_bytes=int(fields["Installed-Size"]) * 1024,
            sha256=sha256,
        )
    except (KeyError, ValueError) as error:
        raise PackageInvalid(path=path, reason=f"its control file is wrong: {error}") from error


def _control_fields(file: BinaryIO, path: Path) -> dict[str, str]:
    """The one-line fields of the control file. Raises PackageInvalid."""
    try:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("it is no archive")
        name, _ = _next_member(file)
        if name != "debian-binary":
            raise ValueError("it is no Debian package")
        name, data = _next_member(file)
        if name == "control.tar.zst":
            data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read(CONTROL_BYTES_MAX)
        elif not name.startswith("control.tar"):
            raise ValueError(f"{name} stands where its control archive should be")
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            control = archive.extractfile("./control")
            text = control.read(CONTROL_BYTES_MAX).decode() if control is not None else ""
    except (ValueError, KeyError, EOFError, tarfile.TarError, zstandard.ZstdError) as error:
        raise PackageInvalid(path=path, reason=str(error)) from error
    lines = (line.partition(":") for line in text.splitlines() if not line.startswith(" "))
    return {key: value.strip() for key, _, value in lines}


def _next_member(file: BinaryIO) -> tuple[str, bytes]:
    """Name and contents of an ar(5) archive's next member. Raises ValueError."""
    header = file.read(_MEMBER_HEADER_BYTES)
    if len(header) != _MEMBER_HEADER_BYTES or header[58:] != b"`\n":
        raise ValueError("it is cut off")
    size_bytes = int(header[48:58])
    if not 0 <= size_bytes <= CONTROL_BYTES_MAX:
        raise ValueError("its control archive is too large")
    data = file.read(size_bytes)
    if len(data) != size_bytes:
        raise ValueError("it is cut off")
    file.seek(size_bytes % 2, io.SEEK_CUR)
    return header[:16].decode("ascii", "replace").rstrip(" /"), data


def _check_sum(path: Path, sha256: str) -> None:
    try:
        with path.with_name(CHECKSUMS).open("rb") as file:
            lines = file.read(CONTROL_BYTES_MAX).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return
    sums = {name: value for value, _, name in (line.partition("  ") for line in lines)}
    if sums.get(path.name) != sha256:
        raise PackageInvalid(path=path, reason=f"{CHECKSUMS} beside it has another sum for it, or none")
