"""What a run in the guest judges by: what is left behind, and what was refused. The run itself: `make guest`."""

from __future__ import annotations

import pytest

from tests.guest.story import HARMLESS_REFUSALS, counted, refused_calls

BEFORE = """d 755 0:0 /etc
f 644 0:0 /etc/passwd
f 600 0:0 /var/lib/dpkg/status
-- accounts
root:x:0:0:root:/root:/bin/bash
-- units
-- processes
"""


@pytest.mark.parametrize(
    "left",
    [
        "f 600 0:0 /var/lib/farpoint/mobility-agent/credentials.pem\n",
        "d 755 0:0 /etc/farpoint\n",
        "d 755 0:0 /tmp/farpoint-install.x\n",
        "l 777 0:0 /etc/systemd/system/multi-user.target.wants/farpoint.service -> /lib/farpoint.service\n",
        "farpoint:x:999:999::/:/bin/false\n",
        "farpoint-mobility-agent.service enabled enabled\n",
        "root /usr/bin/mobility-agent run\n",
    ],
)
def test_what_a_package_leaves_is_noticed(left: str) -> None:
    assert counted(BEFORE + left) - counted(BEFORE) == {left.rstrip("\n")}


def test_a_file_that_changes_hands_is_noticed() -> None:
    assert counted(BEFORE) != counted(BEFORE.replace("f 644 0:0 /etc/passwd", "f 666 0:0 /etc/passwd"))


@pytest.mark.parametrize("kept", ["/var/lib/dpkg/info/x.list", "/var/log/dpkg.log", "/var/cache/apt/pkgcache.bin"])
def test_what_the_package_system_keeps_of_everything_does_not_count(kept: str) -> None:
    assert counted(f"{BEFORE}f 644 0:0 {kept}\n") == counted(BEFORE)


def test_refused_calls_are_read_off_the_journal() -> None:
    line = (
        "audit: type=1326 audit(1795182867.668:4): auid=4294967295 uid=0 gid=0 ses=4294967295 subj=unconfined pid=438 "
        'comm="mobility-agent" exe="/usr/bin/python3.11" sig=0 arch=c000003e syscall=165 compat=0 ip=0x7f code=0x50000'
    )
    assert refused_calls(f"{line}\n{line}\nsomething else\n") == {("mobility-agent", 165)}
    assert 165 not in HARMLESS_REFUSALS, "mount"
