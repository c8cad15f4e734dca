"""By what a disk is known: hardware marks, partition table, file systems, size; an image file by the inode that it is.

Read from sysfs, udev's records and the disk's own first sectors. Nothing here trusts a path.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import uuid
from collections.abc import Callable, Iterator
from typing import Final, Literal, TypeAlias

from mobility_agent.errors import DiskReplaced, DiskResized
from protocol.control import FILE_SYSTEMS_PER_DISK_MAX, NAME_LENGTH_MAX, DiskIdentity, DiskKind, ImageFileIdentity
from protocol.vocabulary import DISK_SIZE_BYTES_MAX

GPT_ENTRIES_MAX: Final = 512
_GETVERSION: Final = 0x80087601
"""FS_IOC_GETVERSION of linux/fs.h: an inode's generation."""

SectorBytes: TypeAlias = Literal[512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]
"""The logical sector sizes that the control plane knows."""

ReadAt = Callable[[int, int], bytes]
"""(offset, length) → bytes, fewer at the end."""


def identify_block_device(*, device: int, size_bytes: int, sector_bytes: SectorBytes, read_at: ReadAt) -> DiskIdentity:
    """device: st_rdev."""
    udev = _udev_properties(device)
    partition_table, file_systems = _contents(read_at, sector_bytes)
    return DiskIdentity(
        kind=DiskKind.BLOCK_DEVICE,
        size_bytes=size_bytes,
        logical_sector_bytes=sector_bytes,
        wwn=_first_of(_sysfs(device, "wwid"), _sysfs(device, "device/wwid"), udev.get("ID_WWN")),
        serial=_first_of(_sysfs(device, "serial"), _sysfs(device, "device/serial"), udev.get("ID_SERIAL")),
        partition_table=partition_table,
        file_systems=file_systems,
    )


def identify_image_file(
    *, descriptor: int, size_bytes: int, sector_bytes: SectorBytes, read_at: ReadAt
) -> DiskIdentity:
    status = os.fstat(descriptor)
    partition_table, file_systems = _contents(read_at, sector_bytes)
    return DiskIdentity(
        kind=DiskKind.IMAGE_FILE,
        size_bytes=size_bytes,
        logical_sector_bytes=sector_bytes,
        partition_table=partition_table,
        file_systems=file_systems,
        image_file=ImageFileIdentity(
            file_system=next(_names_of_file_system(descriptor)),
            inode=status.st_ino,
            generation=_generation(descriptor),
        ),
    )


def check_same_disk(path: str, expected: DiskIdentity, found: DiskIdentity) -> None:
    """Raises DiskReplaced or DiskResized unless both are the same disk.

    The strongest mark that both have decides: hardware before contents, for contents may be partitioned or formatted
    anew.
    """
    if expected.kind is not found.kind or expected.logical_sector_bytes != found.logical_sector_bytes:
        raise DiskReplaced(path=path, expected=_name(expected), found=_name(found))
    if not _is_same(expected, found):
        raise DiskReplaced(path=path, expected=_name(expected), found=_name(found))
    if expected.size_bytes != found.size_bytes:
        raise DiskResized(path=path, expected_bytes=expected.size_bytes, found_bytes=found.size_bytes)


def have_same_mark(one: DiskIdentity, other: DiskIdentity) -> bool:
    """Whether a mark that no two disks share says that both are one disk."""
    # why: in this order; namespaces of one NVMe controller share its serial number and differ in their WWN.
    for mark in ("image_file", "wwn", "serial"):
        ours, theirs = getattr(one, mark), getattr(other, mark)
        if ours is not None and theirs is not None:
            return bool(ours == theirs)
    return False


def _is_same(expected: DiskIdentity, found: DiskIdentity) -> bool:
    if expected.image_file is not None and found.image_file is not None:
        ours, theirs = expected.image_file, found.image_file
        same_generation = None in (ours.generation, theirs.generation) or ours.generation == theirs.generation
        return ours.inode == theirs.inode and ours.file_system == theirs.file_system and same_generation
    for mark in ("wwn", "serial", "partition_table"):
        ours_mark, theirs_mark = getattr(expected, mark), getattr(found, mark)
        if ours_mark is not None and theirs_mark is not None:
            return bool(ours_mark == theirs_mark)
    if expected.file_systems and found.file_systems:
        return not set(expected.file_systems).isdisjoint(found.file_systems)
    # why: a disk without any mark, or one that was formatted since, is known by its size alone; the scan sends what
    # differs.
    return expected.size_bytes == found.size_bytes


def _name(identity: DiskIdentity) -> str:
    """The strongest mark, for an error message."""
    if identity.image_file is not None:
        return f"image file, inode {identity.image_file.inode} of file system {identity.image_file.file_system}"
    for mark in ("wwn", "serial", "partition_table"):
        value = getattr(identity, mark)
        if value is not None:
            return f"{mark} {value}"
    if identity.file_systems:
        return f"file systems {', '.join(identity.file_systems)}"
    return f"a disk of {identity.size_bytes} bytes without any mark"


def whole_disks() -> list[str]:
    """Paths of this machine's own disks: what has hardware behind it, holds something, and is not a CD or the like."""
    found = []
    for name in sorted(os.listdir("/sys/block")):
        has_hardware = os.path.exists(f"/sys/block/{name}/device")
        is_removable = _read_text(f"/sys/block/{name}/removable") == "1"
        size = _read_text(f"/sys/block/{name}/size")
        if has_hardware and not is_removable and size not in (None, "0") and not name.startswith(("sr", "fd")):
            found.append(f"/dev/{name.replace('!', '/')}")
    return found


def file_system_places(read_at: ReadAt, sector_bytes: int) -> list[tuple[int, bool]]:
    """Where something lies on the disk, in bytes, and whether it is a file system that is known here."""
    found = _gpt(read_at, sector_bytes) or _mbr(read_at, sector_bytes)
    starts = [0] if found is None else found[1]
    return [
        (start, start <= DISK_SIZE_BYTES_MAX and _file_system_uuid(read_at, start) is not None)
        for start in sorted(set(starts))
    ]


def _contents(read_at: ReadAt, sector_bytes: int) -> tuple[str | None, tuple[str, ...]]:
    """(partition table's mark, file systems' UUIDs, sorted) as the disk's own sectors say."""
    table, starts = _gpt(read_at, sector_bytes) or _mbr(read_at, sector_bytes) or (None, [])
    on_disk = (start for start in [0, *starts] if start <= DISK_SIZE_BYTES_MAX)
    systems = {found for start in on_disk if (found := _file_system_uuid(read_at, start)) is not None}
    return table, tuple(sorted(systems))[:FILE_SYSTEMS_PER_DISK_MAX]


def _gpt(read_at: ReadAt, sector_bytes: int) -> tuple[str, list[int]] | None:
    header = read_at(sector_bytes, 92)
    if len(header) < 92 or header[:8] != b"EFI PART":
        return None
    guid = str(uuid.UUID(bytes_le=header[56:72]))
    entries_at, count, entry_bytes = struct.unpack_from("<QII", header, 72)
    if not 128 <= entry_bytes <= 4096:
        return guid, []
    if entries_at * sector_bytes > DISK_SIZE_BYTES_MAX:
        return guid, []
    table = read_at(entries_at * sector_bytes, min(count, GPT_ENTRIES_MAX) * entry_bytes)
    used = (at for at in range(0, len(table) - entry_bytes + 1, entry_bytes) if any(table[at : at + 16]))
    return guid, [int.from_bytes(table[at + 32 : at + 40], "little") * sector_bytes for at in used]


def _mbr(read_at: ReadAt, sector_bytes: int) -> tuple[str, list[int]] | None:
    sector = read_at(0, 512)
    signature = int.from_bytes(sector[440:444], "little")
    if len(sector) < 512 or sector[510:512] != b"\x55\xaa" or not signature:
        return None
    starts = [
        int.from_bytes(sector[at + 8 : at + 12], "little") * sector_bytes
        for at in range(446, 510, 16)
        if sector[at + 4]
    ]
    return f"mbr-{signature:08x}", starts


def _file_system_uuid(read_at: ReadAt, start: int) -> str | None:
    """ext2/3/4, XFS and btrfs superblocks; the fields' places are those of the kernel's headers."""
    head = read_at(start, 2048)
    if head[1080:1082] == b"\x53\xef" and len(head) >= 1144:
        return str(uuid.UUID(bytes=head[1128:1144]))
    if head[:4] == b"XFSB" and len(head) >= 48:
        return str(uuid.UUID(bytes=head[32:48]))
    btrfs = read_at(start + 65536, 128)
    if btrfs[64:72] == b"_BHRfS_M":
        return str(uuid.UUID(bytes=btrfs[32:48]))
    return None


def _names_of_file_system(descriptor: int) -> Iterator[str]:
    """The file system that holds an image file: its UUID where udev or its superblock tells it, else its statfs id."""
    device = os.fstat(descriptor).st_dev
    by_uuid = "/dev/disk/by-uuid"
    if os.path.isdir(by_uuid):
        for name in sorted(os.listdir(by_uuid)):
            try:
                if os.stat(f"{by_uuid}/{name}").st_rdev == device:
                    yield name
            except OSError:
                continue  # a dangling link names no file system
    yield f"fsid-{os.fstatvfs(descriptor).f_fsid:016x}"


def _generation(descriptor: int) -> int | None:
    buffer = bytearray(8)
    try:
        fcntl.ioctl(descriptor, _GETVERSION, buffer)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return None
        raise
    return int.from_bytes(buffer[:4], "little")


def _udev_properties(device: int) -> dict[str, str]:
    text = _read_text(f"/run/udev/data/b{os.major(device)}:{os.minor(device)}") or ""
    pairs = (line[2:].partition("=") for line in text.splitlines() if line.startswith("E:"))
    return {key: value for key, _, value in pairs}


def _sysfs(device: int, name: str) -> str | None:
    return _read_text(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/{name}")


def _read_text(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None  # the mark does not exist on this device


def _first_of(*values: str | None) -> str | None:
    return next((value[:NAME_LENGTH_MAX] for value in values if value), None)
