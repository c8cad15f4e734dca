"""Tracking needs the capabilities that the unit gives, and no other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.needed_tools import DEPLOY, ROOT, need_tool
from tests.live.block_devices import loop_device
from tests.live.tracked import MIB

SCRIPT = """
import sys
from pathlib import Path
from tests.live.tracked import TrackedDisk

tracked = TrackedDisk(*map(Path, sys.argv[1:]))
tracked.round_or_resync()
tracked.close()
tracked.open()
print(tracked.round().end.promise.value)
"""


def with_capabilities(words: list[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    kept = ",".join(f"+{word}" for word in words)
    limited = ["setpriv", "--bounding-set", f"-all,{kept}", "--inh-caps", "-all"]
    command = [*limited, sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def unit_capabilities() -> list[str]:
    text = (DEPLOY / "systemd" / "farpoint-mobility-agent.service").read_text()
    found = re.search(r"^CapabilityBoundingSet=(.*)$", text, re.MULTILINE)
    assert found
    return [word.removeprefix("CAP_").lower() for word in found[1].split()]


def test_the_units_capabilities_are_enough(tmp_path: Path, pins: Path) -> None:
    need_tool("setpriv", "util-linux")
    with loop_device(tmp_path / "disk.img", size_bytes=4 * MIB) as device:
        done = with_capabilities(unit_capabilities(), device, tmp_path / "state", pins)
        assert done.stdout.strip() == "copy_in_validated", done.stderr


LOOK = """
import sys
from pathlib import Path
from mobility_agent.core.tracking_choice import WantedSource
from mobility_agent.disk_reader import open_local_disk
from mobility_agent.tracking.selection import SourceSelection

selection = SourceSelection(WantedSource.AUTO, Path(sys.argv[2]))
selection.forget("d" * 32)
print(selection.choose(open_local_disk(sys.argv[1], None)).reason)
"""


def test_who_may_not_even_look_scans(tmp_path: Path, pins: Path) -> None:
    """Somebody who is not root, and a BPF file system as root's alone as it usually is."""
    need_tool("setpriv", "util-linux")
    pins.parent.chmod(0o700)
    with loop_device(tmp_path / "disk.img", size_bytes=4 * MIB) as device:
        mode = device.stat().st_mode
        device.chmod(0o666)
        somebody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--bounding-set", "-all"]
        command = [*somebody, sys.executable, "-c", LOOK, str(device), str(pins)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        finally:
            device.chmod(mode)
    assert "CAP_BPF" in done.stdout, done.stderr
    assert "not in a BPF file system" in done.stdout


@pytest.mark.parametrize("missing", ["bpf", "perfmon"])
def test_none_of_those_for_tracking_is_too_many(tmp_path: Path, pins: Path, missing: str) -> None:
    need_tool("setpriv", "util-linux")
    with loop_device(tmp_path / "disk.img", size_bytes=4 * MIB) as device:
        # why without: SYS_ADMIN, which freezing needs, contains both
        words = [word for word in unit_capabilities() if word not in (missing, "sys_admin")]
        done = with_capabilities(words, device, tmp_path / "state", pins)
        assert done.returncode
        assert re.search(r"Error: .*'bpf [A-Z_]+'", done.stderr), done.stderr
