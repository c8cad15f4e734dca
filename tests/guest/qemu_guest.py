"""The guest as a running machine: started, reached over SSH, restarted by its own systemd, crashed, ended.

Invariants: it has no way out but to the loopback of the name space that it runs in; its console is kept in a file; it
is gone when the `with` block ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final

from farpoint.machine_installation.errors import (
    HostConnectionLost,
    HostUnreachable,
    RemoteCommandFailed,
    StepTookTooLong,
)
from farpoint.machine_installation.remote_host import Access, connected, read_key_file, read_known_hosts
from tests.guest.guest_image import GuestImage

SSH_PORT: Final = 2222
HOST: Final = "127.0.0.1"
MEMORY_MIB: Final = 1024
BOOT_SECONDS_MAX: Final = 600.0
POWER_OFF_SECONDS_MAX: Final = 120.0
ATTEMPT_SECONDS_MAX: Final = 60.0
POLL_SECONDS: Final = 0.5
KERNEL_ARGUMENTS: Final = "root=/dev/vda rw console=ttyS0 net.ifnames=0 SYSTEMD_LOG_SECCOMP=1"
"""The last goes to systemd's environment: what a unit's filter refuses is told in the kernel's log."""
BOOT_ID: Final = "cat /proc/sys/kernel/random/boot_id"


class GuestFailed(Exception):
    """Its text says what did not hold."""


class QemuGuest:
    """A context. directory: for its console. disks: raw images by serial number, the system's first. is_isolated: it
    reaches nothing at all, and only we reach it."""

    def __init__(
        self, image: GuestImage, directory: Path, disks: Mapping[str, Path], *, is_isolated: bool = False
    ) -> None:
        self._image = image
        self._disks = disks
        self._is_isolated = is_isolated
        self.console = directory / "console.log"
        self.known_hosts = directory / "known_hosts"
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> QemuGuest:
        """Starts it; it boots on."""
        self.known_hosts.write_text(f"[{HOST}]:{SSH_PORT} {self._image.host_key.read_text()}")
        await self._start()
        return self

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self._command(),
            stdin=asyncio.subprocess.DEVNULL,
            # why: Ctrl-C goes to the story alone, which ends the guest when its journal is kept
            start_new_session=True,
        )

    async def __aexit__(self, *_: object) -> None:
        await self._kill()

    async def _kill(self) -> None:
        process = self._running
        if process.returncode is None:
            process.kill()
            await process.wait()

    @property
    def _running(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process

    def _command(self) -> list[str]:
        disks = []
        for serial, file in self._disks.items():
            # why unsafe: what the guest wrote is in this machine's page cache, which outlives a guest that is killed
            disks += ["-drive", f"file={file},format=raw,if=none,id={serial},cache=unsafe,discard=unmap"]
            disks += ["-device", f"virtio-blk-pci,drive={serial},serial={serial}"]
        isolation = ",restrict=on" if self._is_isolated else ""
        network = [
            *("-netdev", f"user,id=network,hostfwd=tcp:{HOST}:{SSH_PORT}-:22{isolation}"),
            *("-device", "virtio-net-pci,netdev=network,romfile="),
        ]
        console = [
            *("-chardev", f"file,id=console,path={self.console},append=on"),
            *("-serial", "chardev:console", "-device", "virtio-rng-pci"),
        ]
        return [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35"),
            *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", str(MEMORY_MIB)),
            *("-kernel", str(self._image.kernel), "-initrd", str(self._image.initial_ram_disk)),
            *("-append", KERNEL_ARGUMENTS),
            *console,
            *disks,
            *network,
        ]

    @property
    def key_file(self) -> Path:
        """Root's."""
        return self._image.key

    def access(self) -> Access:
        """Root's, with the host key that was made with the image."""
        known_hosts = read_known_hosts(self.known_hosts, must_exist=True)
        key = read_key_file(self._image.key)
        return Access(user="root", port=SSH_PORT, keys=(key,), known_hosts=known_hosts, fingerprint=None)

    async def run(self, script: str, *, step: str, seconds: float) -> str:
        """What a script for sh says that root runs in it. Raises what RemoteHost.run and `connected` raise."""
        async with connected(HOST, self.access()) as host:
            return await host.run(script, step=step, seconds=seconds)

    async def wait_until_up(self, *, another_than: str = "") -> str:
        """The identifier of this boot, once systemd says that it has come up. Raises GuestFailed."""
        async for _ in self._attempts("SSH to the guest", BOOT_SECONDS_MAX):
            try:
                async with asyncio.timeout(ATTEMPT_SECONDS_MAX):
                    boot = await self.run(BOOT_ID, step="boot", seconds=ATTEMPT_SECONDS_MAX)
            except (HostUnreachable, HostConnectionLost, StepTookTooLong, RemoteCommandFailed, TimeoutError):
                continue
            if boot != another_than:
                break
        state = await self.run("systemctl is-system-running --wait || true", step="boot", seconds=BOOT_SECONDS_MAX)
        if state.strip() != "running":
            failed = await self.run("systemctl --failed --no-pager", step="boot", seconds=BOOT_SECONDS_MAX)
            raise GuestFailed(f"the guest is {state.strip()}:\n{failed}")
        return boot

    async def restart(self) -> None:
        """By its systemd; on return it has come up again."""
        before = await self.run(BOOT_ID, step="reboot", seconds=ATTEMPT_SECONDS_MAX)
        with contextlib.suppress(HostConnectionLost, RemoteCommandFailed):
            await self.run("systemctl reboot", step="reboot", seconds=ATTEMPT_SECONDS_MAX)
        await self.wait_until_up(another_than=before)

    async def crash(self) -> None:
        """Power is cut, and comes back: nothing of its memory is left. On return it has come up again."""
        before = await self.run(BOOT_ID, step="crash", seconds=ATTEMPT_SECONDS_MAX)
        await self._kill()
        await self._start()
        await self.wait_until_up(another_than=before)

    async def power_off(self) -> None:
        """By its systemd; on return the machine has ended by itself."""
        with contextlib.suppress(HostConnectionLost, RemoteCommandFailed):
            await self.run("systemctl poweroff", step="power off", seconds=ATTEMPT_SECONDS_MAX)
        async with asyncio.timeout(POWER_OFF_SECONDS_MAX):
            status = await self._running.wait()
        if status != 0:
            raise GuestFailed(f"QEMU ended with status {status}")

    async def _attempts(self, what: str, seconds: float) -> AsyncIterator[None]:
        """Again and again until the time is over. Raises GuestFailed, also as soon as the guest is gone."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._running.returncode is not None:
                raise GuestFailed(f"the guest ended with status {self._running.returncode}")
            yield
            await asyncio.sleep(POLL_SECONDS)
        raise GuestFailed(f"{what}: not within {seconds:.0f} s")
