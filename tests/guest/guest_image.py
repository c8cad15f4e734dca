"""The guest's disk, kernel and keys: a Debian of this machine's own release and apt source, made once and kept.

Invariant: what is kept lies under a name that tells all that it was made from; what was cut off half-way is never used.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
CACHE: Final = ROOT / ".guest"
TOOLS: Final = {
    "qemu-system-x86_64": "qemu-system-x86",
    "debootstrap": "debootstrap",
    "mkfs.ext4": "e2fsprogs",
    "ssh-keygen": "openssh-client",
    "ip": "iproute2",
    "unshare": "util-linux",
}
PACKAGES: Final = (
    *("systemd", "systemd-sysv", "udev", "dbus", "kmod", "linux-image-cloud-amd64"),
    *("openssh-server", "iproute2", "procps", "e2fsprogs", "lvm2", "dmsetup", "python3.11", "init-system-helpers"),
)
DISK_BYTES: Final = 2 * 2**30
"""Of the system's disk; sparse."""
ADDRESS: Final = "10.0.2.15"
HOST_ADDRESS: Final = "10.0.2.2"
"""Where QEMU's user network shows the loopback of the name space that it runs in."""
NAME: Final = "guest"
NETWORK: Final = f"""\
[Match]
Type=ether
[Network]
Address={ADDRESS}/24
Gateway={HOST_ADDRESS}
LinkLocalAddressing=no
IPv6AcceptRA=no
"""


class GuestMissing(Exception):
    """No guest can be made here. Its text says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestImage:
    """Files of a guest that was made. key: root's SSH key. host_key: the guest's own, public."""

    directory: Path

    @property
    def disk(self) -> Path:
        return self.directory / "disk.img"

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def initial_ram_disk(self) -> Path:
        return self.directory / "initrd"

    @property
    def key(self) -> Path:
        return self.directory / "key"

    @property
    def host_key(self) -> Path:
        return self.directory / "host_key.pub"


@dataclass(frozen=True, slots=True, kw_only=True)
class AptSource:
    """This machine's source of its own release's main packages. index: apt's list of them, as it lies here."""

    url: str
    release: str
    index: Path
    proxy: str


def check_tools() -> None:
    """Raises GuestMissing."""
    if platform.machine() != "x86_64" or os.geteuid() != 0:
        raise GuestMissing("a guest is made on x86-64, by root")
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if missing:
        raise GuestMissing(f"missing: apt-get install --no-install-recommends {' '.join(missing)}")


def guest_image() -> tuple[GuestImage, bool]:
    """The guest's image, and whether it had to be made. Others that were made before are removed then. Blocks.

    Raises GuestMissing, CalledProcessError.
    """
    source = _apt_source()
    image = GuestImage(directory=CACHE / _key(source))
    if image.directory.is_dir():
        return image, False
    for other in CACHE.glob(f"{source.release}-*"):
        shutil.rmtree(other)
    work = CACHE / "unfinished"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, mode=0o700)
    _make(GuestImage(directory=work), source)
    work.rename(image.directory)
    return image, True


def _apt_source() -> AptSource:
    """Asks for apt's lists if there are none, as after an image's clean-up. Raises GuestMissing."""
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    columns = "$(ORIGIN)|$(LABEL)|$(RELEASE)|$(COMPONENT)|$(REPO_URI)|$(FILENAME)"
    for has_asked in (False, True):
        if has_asked:
            _run("apt-get", "update", "--quiet", "--quiet")
        for line in _said("apt-get", "indextargets", "--format", columns, "Created-By: Packages").splitlines():
            *what, url, index = line.split("|")
            if what == ["Debian", "Debian", release, "main"] and Path(index).exists():
                proxy = _said("apt-config", "dump", "--format", "%v", "Acquire::http::Proxy").strip()
                return AptSource(url=url, release=release, index=Path(index), proxy=proxy)
    raise GuestMissing(f"apt has no source of Debian's {release} main here; is this Debian?")


def _key(source: AptSource) -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(f"{source.url} {source.release}\n".encode())
    digest.update(source.index.read_bytes())
    return f"{source.release}-{digest.hexdigest()[:24]}"


def _make(image: GuestImage, source: AptSource) -> None:
    root = image.directory / "root"
    environment = os.environ | ({"http_proxy": source.proxy} if source.proxy else {})
    debootstrap = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", source.release, str(root)]
    # why unshare: what debootstrap mounts in the new root goes with it
    _run("unshare", "--mount", *debootstrap, source.url, environment=environment)
    _run("chroot", str(root), "apt-get", "clean")
    (root / "etc/hostname").write_text(f"{NAME}\n")
    (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {NAME}\n")
    (root / "etc/fstab").write_text("/dev/vda / ext4 rw,noatime 0 1\n")
    (root / "etc/systemd/network/guest.network").write_text(NETWORK)
    _run("chroot", str(root), "systemctl", "--quiet", "enable", "systemd-networkd.service", "ssh.service")
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(image.key))
    keys = root / "root/.ssh"
    keys.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(image.key.with_suffix(".pub"), keys / "authorized_keys")
    shutil.copy(root / "etc/ssh/ssh_host_ed25519_key.pub", image.host_key)
    (kernel,) = (root / "boot").glob("vmlinuz-*")
    (initial_ram_disk,) = (root / "boot").glob("initrd.img-*")
    shutil.copy(kernel, image.kernel)
    shutil.copy(initial_ram_disk, image.initial_ram_disk)
    with image.disk.open("wb") as disk:
        disk.truncate(DISK_BYTES)
    _run("mkfs.ext4", "-q", "-F", "-d", str(root), str(image.disk))
    shutil.rmtree(root)


def _run(*command: str, environment: dict[str, str] | None = None) -> None:
    """What it says goes to stderr if it fails."""
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.stderr.write(done.stdout[-4000:])
        done.check_returncode()


def _said(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
