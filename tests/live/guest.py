"""`make live-guest`: the bitmap source under a stock Debian 12 kernel, in an emulated machine with this Python.

The machine's whole root is an initramfs: the interpreter, the packages that the check imports, this checkout's product,
two kernel modules. The last line of output is what the check inside says, as JSON; exit code 1 if anything was lost.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
KERNEL: Final = "linux-image-cloud-amd64"
BOOT_SECONDS_MAX: Final = 300
MEMORY_MEBIBYTES: Final = 2048
MODULES: Final = ("loop", "zsmalloc", "lzo-rle", "zram")
LEFT_OUT: Final = ("test", "site-packages", "__pycache__", "idlelib", "tkinter", "ensurepip", "config-3*", "tests")
NEEDED: Final = ("qemu-system-x86_64", "cpio", "apt-get", "dpkg", "ldd")
RESULT: Final = "RESULT "

INIT: Final = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc && $b mount -t sysfs sys /sys && $b mount -t devtmpfs dev /dev
$b mount -t tmpfs tmp /tmp && $b mount -t bpf bpf /sys/fs/bpf
for module in {modules}; do $b insmod /modules/$module.ko; done
$b dd if=/dev/zero of=/tmp/disk.img bs=1M count=16 2>/dev/null && $b losetup /dev/loop0 /tmp/disk.img
echo 16M > /sys/block/zram0/disksize
PYTHONPATH=/app/main:/app/site PYTHONHOME={home} {python} -m tests.live.guest_check /dev/loop0 /dev/zram0
$b poweroff -f
"""


def main() -> int:
    missing = [tool for tool in NEEDED if shutil.which(tool) is None]
    if missing:
        print(f"make live-guest needs {', '.join(missing)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="farpoint-guest-") as temporary:
        place = Path(temporary)
        kernel = fetch_kernel(place)
        archive = make_root(place)
        told = boot(kernel, archive)
    results = [line.partition(RESULT)[2] for line in told.splitlines() if RESULT in line]
    if not results:
        print(told, file=sys.stderr)
        return 1
    print(results[-1])
    return int(bool(json.loads(results[-1])["lost_blocks"]))


def fetch_kernel(place: Path) -> Path:
    """Debian's newest one, and a busybox, unpacked into `place`/debian."""
    depends = run("apt-cache", "depends", KERNEL, cwd=place)
    image = next(word for word in depends.split() if word.startswith("linux-image-6.1"))
    run("apt-get", "download", "-qq", image, "busybox-static", cwd=place)
    for package in place.glob("*.deb"):
        run("dpkg", "-x", package, place / "debian", cwd=place)
    return next((place / "debian" / "boot").glob("vmlinuz-*"))


def make_root(place: Path) -> Path:
    """The initramfs."""
    root = place / "root"
    for name in ("proc", "sys", "dev", "tmp", "bin", "modules", "app/main/tests", "app/site"):
        (root / name).mkdir(parents=True)
    shutil.copy(place / "debian" / "bin" / "busybox", root / "bin")
    for module in MODULES:
        shutil.copy(next((place / "debian").rglob(f"{module}.ko")), root / "modules")
    home, python = Path(sys.base_prefix), Path(sys.executable).resolve()
    ignore = shutil.ignore_patterns(*LEFT_OUT)
    standard = Path(sysconfig.get_path("stdlib"))
    shutil.copytree(standard, _inside(root, standard), ignore=ignore)
    _inside(root, python).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(python, _inside(root, python))
    for package in third_party():
        target = root / "app" / "site" / package.name
        if package.is_dir():
            shutil.copytree(package, target, ignore=ignore)
        else:
            shutil.copy(package, target)
    for name in ("mobility_agent", "protocol", "runtime"):
        shutil.copytree(ROOT / name, root / "app" / "main" / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests" / "live", root / "app" / "main" / "tests" / "live", ignore=ignore)
    for library in libraries([_inside(root, python), *root.rglob("*.so*")]):
        _inside(root, library).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, _inside(root, library))
    init = root / "init"
    init.write_text(INIT.format(modules=" ".join(MODULES), home=home, python=python))
    init.chmod(0o755)
    archive = place / "root.cpio"
    with open(archive, "wb") as file:
        names = subprocess.run(["find", "."], cwd=root, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=root, input=names, stdout=file, check=True)
    return archive


def third_party() -> list[Path]:
    """Top-level packages and modules of the environment that the check imports."""
    script = (
        "import sys, tests.live.guest_check; print('\\n'.join(m.__file__ or '' for m in list(sys.modules.values()) "
    )
    script += "if getattr(m, '__file__', None)))"
    environment = Path(sysconfig.get_path("purelib"))
    files = map(Path, run(sys.executable, "-c", script, cwd=ROOT).split())
    found = {environment / file.relative_to(environment).parts[0] for file in files if file.is_relative_to(environment)}
    bundled = {path for package in found if (path := package.with_name(f"{package.name}.libs")).exists()}
    return sorted(found | bundled)


def libraries(binaries: list[Path]) -> set[Path]:
    """What they are linked with."""
    found: set[Path] = set()
    for binary in binaries:
        told = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=False).stdout
        found |= {Path(word) for word in told.split() if word.startswith("/")}
    return {path for path in found if path.exists() and "farpoint-guest-" not in str(path)}


def boot(kernel: Path, archive: Path) -> str:
    """All that the machine said."""
    machine = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", str(MEMORY_MEBIBYTES)]
    machine += ["-nographic", "-no-reboot", "-kernel", str(kernel), "-initrd", str(archive)]
    machine += ["-append", "console=ttyS0 quiet panic=-1"]
    done = subprocess.run(
        machine, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=BOOT_SECONDS_MAX, check=True
    )
    return done.stdout.decode("utf-8", "replace")


def run(*command: object, cwd: Path) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True, env=os.environ).stdout


def _inside(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


if __name__ == "__main__":
    sys.exit(main())
