"""What can go wrong while a disk is recovered: what was asked for is not there, the history is damaged, the target does
not do."""

from __future__ import annotations

from protocol.errors import LocalFault
from storage.errors import VaultFault


class DiskNotFound(LocalFault):
    """Fields: selector, known (what the vault holds, as text)."""

    code = "disk-not-found"
    message = "the vault holds no disk {selector!r}; it holds: {known}"
    hint = "Give a disk's identifier, a prefix of at least 8 digits that only one disk has, or machine-name:disk-name."


class DiskAmbiguous(LocalFault):
    """Fields: selector, found."""

    code = "disk-ambiguous"
    message = "{selector!r} could be any of the disks {found}"
    hint = "Give more digits of the identifier."


class PointNotFound(LocalFault):
    """Fields: disk, selector, nearest (the points around it, as text)."""

    code = "point-not-found"
    message = "disk {disk} has no recovery point for {selector!r}; nearest: {nearest}"
    hint = "`farpoint points --store URL --recovery-key FILE` lists them all."


class PointAmbiguous(LocalFault):
    """Fields: disk, selector, found."""

    code = "point-ambiguous"
    message = "{selector!r} could be any of the points {found} of disk {disk}"
    hint = "Give more digits of the identifier."


class PointSelectorInvalid(LocalFault):
    """Fields: selector, reason."""

    code = "point-selector-invalid"
    message = "{selector!r} names no recovery point: {reason}"
    hint = "Use `latest`, a point's identifier (8 digits or more), or an instant such as 2026-11-20T09:00:00Z."


class PointDamaged(VaultFault):
    """The history up to the point cannot be read whole. Fields: point, segment, reason, recoverable (text)."""

    code = "point-damaged"
    message = (
        "point {point} cannot be recovered: segment {segment}: {reason}; newest point that still can: {recoverable}"
    )
    hint = (
        "Nothing was left at the target. `farpoint points --store URL --recovery-key FILE` lists what can be recovered."
    )


class NewestPointHidden(VaultFault):
    """What is damaged may have held newer points. Fields: segment, reason, recoverable (text)."""

    code = "newest-point-hidden"
    message = "segment {segment} hides what is newer: {reason}; newest point that can still be recovered: {recoverable}"
    hint = "To recover that point all the same, give its identifier with --point."


class PointDisputed(VaultFault):
    """The signed point and the disk's history do not agree. Fields: point, reason."""

    code = "point-disputed"
    message = "point {point} is not what its signed record says: {reason}"
    hint = "Somebody altered the vault; recover another point, and find out who."


class TargetFault(LocalFault):
    """Something about the place to recover to. Fields: path, reason."""

    code = "target-fault"
    message = "target {path}: {reason}"


class TargetExists(TargetFault):
    """Fields: path."""

    code = "target-exists"
    message = "target {path} exists; it is never overwritten"
    hint = "Choose another path, or move the file away."


class TargetUnfinished(TargetFault):
    """Fields: path."""

    code = "target-unfinished"
    message = "{path} is there: another recovery is writing it, or one was killed"
    hint = "If no recovery is running to that path, remove the file."


class TargetNotPermitted(TargetFault):
    """Fields: path, reason."""

    code = "not-permitted"


class TargetMissing(TargetFault):
    """Fields: path, reason."""

    code = "target-missing"


class TargetInUse(TargetFault):
    """Fields: path, reason."""

    code = "target-in-use"
    message = "device {path} is in use: {reason}"
    hint = "Unmount it, and release what holds it (device mapper, RAID, swap)."


class TargetTooSmall(TargetFault):
    """Fields: path, size_bytes, needed_bytes."""

    code = "target-too-small"
    message = "target {path} takes {size_bytes} bytes; {needed_bytes} are needed"


class TargetFull(TargetFault):
    """Fields: path, needed_bytes."""

    code = "target-full"
    message = "the file system of {path} is full; the recovery writes {needed_bytes} bytes"
    hint = "Free space or choose another file system. Nothing was left behind."


class DeviceNotConfirmed(TargetFault):
    """Fields: path."""

    code = "device-not-confirmed"
    message = "{path} is a block device, and all that is on it would be overwritten"
    hint = "Say so with --overwrite-device."


class DeviceHalfWritten(TargetFault):
    """Fields: path, reason."""

    code = "device-half-written"
    message = "device {path} was not written to the end, its contents are of no use: {reason}"
    hint = "Run the recovery again."
