"""What every story of the guest needs: the guest and its site while it is played, steps with deadlines, scripts in the
guest, the agent's installation, and what is kept of a failure.

The first step that does not hold ends the story. Nothing of the guest or its site runs any more when it is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from farpoint.demo.programs import Programs
from farpoint.demo.source_image import copy_sparse
from farpoint.machine_installation.errors import RemoteCommandFailed
from tests.guest.guest_image import GuestImage
from tests.guest.qemu_guest import HOST, GuestFailed, QemuGuest
from tests.guest.site import GuestSite

PACKAGE: Final = "farpoint-mobility-agent"
UNIT: Final = f"{PACKAGE}.service"
SETTINGS: Final = "/etc/farpoint/mobility-agent.toml"
SYSTEM_SERIAL: Final = "farpoint-system"
FROZEN_SECONDS_MAX: Final = 20
"""An emulated machine is slow: `freeze.seconds_max` of its agent."""
SCRIPT_SECONDS_MAX: Final = 600.0
JOURNAL_SECONDS_MAX: Final = 60.0
SECONDS_MAX: Final = {"boot": 600, "servers": 120, "install": 900, "power off": 200}
"""Of the steps that every story has."""

Act = Callable[[GuestSite], Awaitable[None]]


class Stage:
    """For one story. `seconds` says how long each step took, `figures` what else was seen."""

    def __init__(
        self,
        image: GuestImage,
        package: Path,
        directory: Path,
        *,
        data_disks: Mapping[str, int],
        seconds_max: Mapping[str, float],
    ) -> None:
        """data_disks: by serial number, how many bytes each has. seconds_max: of the story's own steps."""
        self.image = image
        self.directory = directory
        self.disks = {serial: directory / f"{serial}.img" for serial in (SYSTEM_SERIAL, *data_disks)}
        self.guest = QemuGuest(image, directory, self.disks)
        self.seconds: dict[str, float] = {}
        self.figures: dict[str, Any] = {}
        self._package = package
        self._data_disks = data_disks
        self._seconds_max = {**SECONDS_MAX, **seconds_max}

    async def play(self, in_guest: Act, afterwards: Act) -> None:
        """in_guest: while guest and site run. afterwards: when both have ended in order.

        Raises GuestFailed and what the programs raise, as soon as something does not hold.
        """
        await asyncio.to_thread(copy_sparse, self.image.disk, self.disks[SYSTEM_SERIAL])
        for serial, size_bytes in self._data_disks.items():
            with self.disks[serial].open("xb") as disk:
                disk.truncate(size_bytes)
        async with self.guest, Programs(self.directory) as programs:
            site = GuestSite(self.directory, programs)
            try:
                async with self.step("boot"):
                    await self.guest.wait_until_up()
                async with self.step("servers"):
                    await site.start()
                await in_guest(site)
                async with self.step("power off"):
                    await self.guest.power_off()
                    await site.stop()
            except BaseException:
                await self._keep_journal()
                raise
            finally:
                await site.close()
            await afterwards(site)

    async def install(self, site: GuestSite, wanted: str) -> None:
        """The agent, from outside, as an operator does it."""
        access = self.guest.access()
        options = ["--user", access.user, "--port", access.port, "--key-file", self.guest.key_file]
        record = await site.install(
            HOST, [*options, "--known-hosts", self.guest.known_hosts, "--package", self._package]
        )
        for step in record["steps"]:
            self.tell(f"  {step['step']}: {step['result']} ({step['seconds']} s)")
        if record["result"] != wanted:
            raise GuestFailed(f"the agent is {record['result']}, not {wanted}")
        self.figures.setdefault("install_steps", {step["step"]: step["seconds"] for step in record["steps"]})

    async def in_guest(self, script: str, step: str) -> str:
        """What a script for sh says that root runs there; its first command that fails ends it."""
        return await self.guest.run(f"set -e\n{script}", step=step, seconds=SCRIPT_SECONDS_MAX)

    @contextlib.asynccontextmanager
    async def step(self, name: str) -> AsyncIterator[None]:
        """Raises GuestFailed when its time is up, or when a script in the guest failed."""
        seconds_max, started = self._seconds_max[name], time.monotonic()
        self.tell(f"{name} …")
        try:
            async with asyncio.timeout(seconds_max):
                yield
        except TimeoutError as error:
            raise GuestFailed(f"{name}: not within {seconds_max} s") from error
        except RemoteCommandFailed as error:
            raise GuestFailed(str(error)) from error
        finally:
            self.seconds[name] = round(time.monotonic() - started, 1)
        self.tell(f"{name}: {self.seconds[name]} s")

    async def _keep_journal(self) -> None:
        """What the guest's journal says last, beside the console, if it can still be asked."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(JOURNAL_SECONDS_MAX):
                text = await self.in_guest("journalctl --boot --no-pager --lines=400", "journal")
            (self.directory / "journal.log").write_text(text)

    @staticmethod
    def tell(text: str) -> None:
        """To whoever waits."""
        print(f"guest: {text}", file=sys.stderr, flush=True)
