"""What runs inside the emulated machine: `python -m tests.live.guest_check DEVICE…`; the last line is JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobility_agent.tracking.abilities import machine_abilities
from tests.live.tracked import MIB, TrackedDisk


def write(device: Path, offset_mebibytes: int, length_mebibytes: int) -> None:
    """By another process, through the page cache, and down to the device."""
    words = ["if=/dev/urandom", f"of={device}", "bs=1M", f"seek={offset_mebibytes}", f"count={length_mebibytes}"]
    subprocess.run(["/bin/busybox", "dd", *words, "conv=fsync"], check=True, stderr=subprocess.DEVNULL)


def check(device: Path) -> dict[str, Any]:
    tracked = TrackedDisk(device, Path("/tmp") / device.name, Path("/sys/fs/bpf") / device.name)
    lost = 0
    promises = []
    for is_away in (False, False, True):
        if is_away:
            tracked.close()
        write(device, 2, 3)
        write(device, 9, 1)
        if is_away:
            tracked.open()
        told = tracked.round_or_resync()
        promises.append(told.end.promise.value)
        lost += len(tracked.differing_blocks())
        assert is_away is False or told.sent_bytes == 4 * MIB
    counters = tracked.source._tracked.counters()
    return {"lost_blocks": lost, "promises": promises, "counters": asdict(counters), "misses": tracked.tracker.misses()}


def main() -> None:
    devices = {name: check(Path(name)) for name in sys.argv[1:]}
    abilities = machine_abilities(Path("/sys/fs/bpf/farpoint"))
    lost = sum(found["lost_blocks"] for found in devices.values())
    said = {"kernel": os.uname().release, "can_pin": abilities.can_pin, "lost_blocks": lost, "devices": devices}
    print("RESULT " + json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
