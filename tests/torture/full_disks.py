"""File systems without room: a ballast takes all but a little of a disk for a while, and is then removed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from tests.torture.checks import expect_orderly_end
from tests.torture.torment import Need, Torment
from tests.torture.tortured_site import DISK_NAMES, USER_OF_DISK

LEFT_BYTES_MAX: Final = 2 * 2**20
SECONDS_MIN: Final = 1.0
SECONDS_MAX: Final = 3.0
BALLAST: Final = ".ballast"


class FullDisk(Torment):
    """While it is full, the source changes; sometimes the program that uses it is killed in that state."""

    kind = "full disk"
    needs = frozenset({Need.ROOT, Need.LOOP_DISKS})

    def arrange(self) -> str:
        self._name = self.draw.choice((*DISK_NAMES, "store", "process-server"))
        self._left_bytes = int(LEFT_BYTES_MAX * self.draw.random() ** 3)
        self._seconds = self.draw.uniform(SECONDS_MIN, SECONDS_MAX)
        self._ends_in_kill = self.draw.random() < 0.4
        ending = " and a kill" if self._ends_in_kill else ""
        return f"{self._name} has {self._left_bytes} bytes left for {self._seconds:.1f} s{ending}"

    def run(self) -> None:
        disk, program = self.site.disks[self._name], USER_OF_DISK[self._name]
        ballast = disk.path / BALLAST
        fill(ballast, disk.free_bytes() - self._left_bytes)
        try:
            with self.site.busy(self.draw):
                time.sleep(self._seconds)
                if self._ends_in_kill:
                    self.site.kill(program)
                    self.counts["kill at an instant"] += 1
                    self.site.programs[program].start(wait=False)
                    time.sleep(self._seconds)
            expect_orderly_end(self.site.programs[program])
        finally:
            ballast.unlink()
        self.counts[f"full disk of {self._name}"] += 1


def fill(ballast: Path, size_bytes: int) -> None:
    """Takes so much, or all that there is."""
    with open(ballast, "xb") as file:
        step = 2**24
        offset = 0
        while step >= 4096:
            if offset + step > size_bytes:
                step //= 2
                continue
            try:
                os.posix_fallocate(file.fileno(), offset, step)
            except OSError:
                step //= 2
            else:
                offset += step
