"""What is done inside the guest whose disks are live: its disks are made, written to, frozen, unmounted and looked at.

LVM lies on one disk. The device-mapper device is two pieces of another, the second first, behind a gap: what is at one
place of it is at no such place of the disk below. It stays until the end of a shutdown: LVM's blk-availability.service,
which sometimes takes such devices down before anybody can note what was marked for them, is told not to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.guest.stage import FROZEN_SECONDS_MAX, SETTINGS, UNIT
from tests.live import canary

LVM_SERIAL: Final = "farpoint-lvm"
LVM_BYTES: Final = 192 * 2**20
LINEAR_SERIAL: Final = "farpoint-linear"
PIECES: Final = ((65 * 2**20, 64 * 2**20), (2**20, 64 * 2**20))
"""(offset, length) in bytes of the disk below, in the device's order."""
LINEAR_BYTES: Final = max(offset + length for offset, length in PIECES)
"""Of the disk below."""
SECTOR_BYTES: Final = 512
_LINEAR_DISK: Final = f"/dev/disk/by-id/virtio-{LINEAR_SERIAL}"
DEVICE_SECONDS_MAX: Final = 300
"""An emulated machine may take so long to find its disks."""
WRITER_SHARE: Final = "10%"
"""Of a processor, for each writer: there are two, emulated, and the agent has to keep up."""
_PLACES: Final = {"root": "/srv/live", "lvm": "/mnt/lvm/live", "linear": "/mnt/linear/live"}
_CANARY_FILE: Final = "/srv/canary"
SEPARATOR: Final = "\n--\n"


def _table() -> str:
    """For dmsetup(8)."""
    lines, at = [], 0
    for offset, length in PIECES:
        sectors = length // SECTOR_BYTES
        lines.append(f"{at} {sectors} linear {_LINEAR_DISK} {offset // SECTOR_BYTES}")
        at += sectors
    return "\n".join(lines)


MAKE_DISKS: Final = f"""
pvcreate --quiet /dev/disk/by-id/virtio-{LVM_SERIAL}
vgcreate --quiet data /dev/disk/by-id/virtio-{LVM_SERIAL}
lvcreate --quiet --yes --name volume --extents 90%VG data
mkfs.ext4 -q /dev/data/volume

cat >/etc/guest-linear.table <<'END'
{_table()}
END
cat >/etc/systemd/system/guest-linear.service <<'END'
[Unit]
Description=Two pieces of one disk as one device
DefaultDependencies=no
After=systemd-udev-trigger.service
Before=local-fs-pre.target farpoint-mobility-agent-begin.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/udevadm wait --timeout={DEVICE_SECONDS_MAX} {_LINEAR_DISK}
ExecStart=/usr/sbin/dmsetup create linear /etc/guest-linear.table
# the kernel's own count of what is written, which the agent compares with its own, is off for such devices
ExecStart=/bin/sh -c 'echo 1 >/sys/block/$$(dmsetup info -c --noheadings -o blkdevname linear)/queue/iostats'
[Install]
WantedBy=sysinit.target
END
mkdir /etc/systemd/system/blk-availability.service.d
printf '[Service]\\nExecStop=\\nExecStop=/bin/true\\n' >/etc/systemd/system/blk-availability.service.d/guest.conf
systemctl daemon-reload
systemctl enable --quiet --now guest-linear.service
mkfs.ext4 -q /dev/mapper/linear

mkdir -p /mnt/lvm /mnt/linear
options=ext4\\ defaults,nofail,x-systemd.device-timeout={DEVICE_SECONDS_MAX}
echo "/dev/data/volume /mnt/lvm $options 0 2" >>/etc/fstab
echo "/dev/mapper/linear /mnt/linear $options 0 2" >>/etc/fstab
systemctl daemon-reload
mount /mnt/lvm
mount /mnt/linear

mkdir -p /usr/local/lib/guest
cat >/usr/local/lib/guest/canary.py <<'END'
{Path(canary.__file__).read_text()}
END
printf '\\n[freeze]\\nseconds_max = {FROZEN_SECONDS_MAX}\\n' >>{SETTINGS}
systemctl restart {UNIT}
"""
PROTECT: Final = f"""
mobility-agent protect --all --exclude {_LINEAR_DISK}
mobility-agent protect /dev/mapper/linear
"""
"""Disks, not what lies on them: LVM's is protected whole. Of the other disk only the device that is made of it."""


def _for_each(line: str) -> str:
    return "".join(line.format(name=name, place=place) for name, place in _PLACES.items())


COUNT: Final = _for_each("echo {name} $(od -An -t u8 -N 8 /run/ledger-{name})\n")
_BEGIN_WRITERS: Final = _for_each(
    f"""
mkdir -p {{place}}
rm -rf {{place}}/*
head -c 8 /dev/zero >/run/ledger-{{name}}
systemd-run --quiet --unit=writer-{{name}} --property=CPUQuota={WRITER_SHARE} --property=RequiresMountsFor={{place}} \\
  sh -c 'tail -f /dev/null | exec python3.11 /usr/local/lib/guest/canary.py {{place}} /run/ledger-{{name}} 1'
"""
)
WRITE_ON: Final = _for_each(
    """
until [ $(od -An -t u8 -N 8 /run/ledger-{name}) -gt {{{name}}} ]; do
  systemctl --quiet is-active writer-{name}
  sleep 0.2
done
"""
)
"""Waits until each writer was acknowledged more than so much: {root}, {lvm}, {linear}."""
WRITE: Final = _BEGIN_WRITERS + WRITE_ON.format(**dict.fromkeys(_PLACES, 3))
"""A writer on each disk, from now on."""
IS_MOUNTED: Final = """
findmnt /mnt/lvm >&2
findmnt /mnt/linear >&2
"""
FREEZE: Final = f"""
echo {{canary}} >{_CANARY_FILE}
sync {_CANARY_FILE}
{COUNT}
echo --
mobility-agent freeze-now -o json || true  # what it gave is in what it says
echo --
{COUNT}
"""
THAWED: Final = _for_each("timeout 60 sh -c 'date >{place}.thawed && sync {place}.thawed'\n") + (
    """mobility-agent thaw -o json | grep -q '"thawed": \\[\\]'\n"""
)
"""Whatever is frozen keeps who writes to it waiting."""
QUIET: Final = f"""
systemctl stop {" ".join(f"writer-{name}" for name in _PLACES)}
umount /mnt/lvm
umount /mnt/linear
blockdev --flushbufs /dev/data/volume
blockdev --flushbufs /dev/disk/by-id/virtio-{LVM_SERIAL}
blockdev --flushbufs /dev/mapper/linear
blockdev --flushbufs {_LINEAR_DISK}
"""
SHOW_CANARY: Final = f"""
cat {_CANARY_FILE}
cat >/run/show.py <<'END'
import pathlib
import sys
sys.path.insert(0, "/usr/local/lib/guest")
import canary
for name, place in {_PLACES!r}.items():
    counts = canary.read_counts(pathlib.Path(place))
    print(name, counts.first, counts.second)
END
python3.11 -B /run/show.py
"""


def gather_linear(disk: Path, target: Path) -> None:
    """target: what the device-mapper device holds, of the disk below it."""
    with disk.open("rb") as reading, target.open("xb") as writing:
        for offset, length in PIECES:
            reading.seek(offset)
            writing.write(reading.read(length))


def scatter_linear(device: Path, target: Path) -> None:
    """target: a disk on which that device-mapper device holds what the image `device` does."""
    with device.open("rb") as reading, target.open("xb") as writing:
        writing.truncate(LINEAR_BYTES)
        for offset, length in PIECES:
            writing.seek(offset)
            writing.write(reading.read(length))
