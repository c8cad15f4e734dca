"""The units: whole, known to systemd, and shut in as far as they were promised to be."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from deploy.packages.programs import PROGRAMS, Program
from tests.deploy.needed_tools import DEPLOY, need_tool, run

SERVICES = [program for program in PROGRAMS if program.has_service]
AGENT_CAPABILITIES = "CAP_DAC_READ_SEARCH CAP_LEASE CAP_BPF CAP_PERFMON CAP_SYS_ADMIN"
EXPOSURE_MAX = {"mobility-agent": 3.0, "process-server": 2.0, "config-server": 2.0}

each_service = pytest.mark.parametrize("program", SERVICES, ids=lambda program: program.name)


def unit_text(program: Program) -> str:
    return (DEPLOY / "systemd" / program.unit).read_text("utf-8")


def exposure(root: Path, program: Program, unit: str = "") -> float:
    name = unit or program.unit
    told = run("systemd-analyze", "security", "--offline=true", "--no-pager", f"--root={root}", name)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert found, told
    return float(found[1])


def root_with(tmp_path: Path, program: Program, *, drop_ins: bool) -> Path:
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    for name in program.units:
        shutil.copy(DEPLOY / "systemd" / name, units)
    examples = DEPLOY / "systemd" / f"{program.unit}.d"
    if drop_ins and examples.exists():
        shutil.copytree(examples, units / examples.name)
    return tmp_path


@each_service
@pytest.mark.parametrize("drop_ins", [False, True], ids=["as-installed", "with-drop-ins"])
def test_a_service_is_exposed_no_more_than_promised(tmp_path: Path, program: Program, drop_ins: bool) -> None:
    need_tool("systemd-analyze", "systemd")
    root = root_with(tmp_path, program, drop_ins=drop_ins)
    for unit in program.units:
        assert exposure(root, program, unit) <= EXPOSURE_MAX[program.name]


@each_service
def test_the_measure_notices_a_unit_that_is_opened(tmp_path: Path, program: Program) -> None:
    need_tool("systemd-analyze", "systemd")
    root = root_with(tmp_path, program, drop_ins=False)
    unit = root / "etc/systemd/system" / program.unit
    opened = re.sub(
        r"^(ProtectSystem|CapabilityBoundingSet|SystemCallFilter|RestrictNamespaces)=.*\n",
        "",
        unit.read_text(),
        flags=re.M,
    )
    unit.write_text(opened)
    assert exposure(root, program) > EXPOSURE_MAX[program.name]


@each_service
def test_systemd_finds_nothing_wrong_with_a_unit(tmp_path: Path, program: Program) -> None:
    need_tool("systemd-analyze", "systemd")
    root = root_with(tmp_path, program, drop_ins=True)
    units = root / "etc/systemd/system"
    for name in program.units:
        unit = units / name
        # why: verify looks for the command on this machine, where the package is not installed
        unit.write_text(unit.read_text().replace(f"/usr/bin/{program.command}", "/bin/true"))
        assert run("systemd-analyze", "verify", "--man=no", unit).strip() == ""


@each_service
def test_a_unit_fits_its_package(program: Program) -> None:
    text = unit_text(program)
    assert f"ExecStart=/usr/bin/{program.command} run\n" in text
    assert f"\nUser={program.user or 'root'}\n" in text
    assert f"StateDirectory=farpoint/{program.name}\nStateDirectoryMode=0700\n" in text
    assert "Type=notify\n" in text
    assert "\nWatchdogSec=" in text
    assert f"ConditionPathExists=/var/lib/farpoint/{program.name}/" in text


def test_no_server_has_a_capability_and_the_agent_has_only_those_to_read_trace_and_freeze() -> None:
    for program in SERVICES:
        granted = re.findall(r"^CapabilityBoundingSet=(.*)$", unit_text(program), re.MULTILINE)
        assert granted == ([AGENT_CAPABILITIES] if program.name == "mobility-agent" else [""])


def test_the_servers_wait_for_their_own_stop_before_systemd_kills_them() -> None:
    from process_server.settings import ProcessServerSettings

    (program,) = (program for program in SERVICES if program.name == "process-server")
    found = re.search(r"^TimeoutStopSec=(\d+)s$", unit_text(program), re.MULTILINE)
    assert found
    assert int(found[1]) > ProcessServerSettings().stop_seconds_max + 10


def order_of(unit: str, key: str) -> set[str]:
    text = (DEPLOY / "systemd" / unit).read_text("utf-8")
    return {name for line in re.findall(rf"^{key}=(.*)$", text, re.MULTILINE) for name in line.split()}


def test_the_agent_tracks_before_anything_is_mounted_and_notes_its_marks_after_all_was_unmounted() -> None:
    begin, stop = "farpoint-mobility-agent-begin.service", "farpoint-mobility-agent-stop.service"
    assert "local-fs-pre.target" in order_of(begin, "Before") & order_of(begin, "Wants")
    assert order_of(begin, "After") == {"systemd-remount-fs.service", "systemd-udev-trigger.service"}
    assert {"umount.target", "shutdown.target"} == order_of(stop, "After")
    assert order_of(stop, "Before") == {"final.target"}
    assert order_of(stop, "WantedBy") == {"poweroff.target", "reboot.target", "halt.target", "kexec.target"}
    for unit in (begin, stop):
        text = (DEPLOY / "systemd" / unit).read_text("utf-8")
        assert "\nDefaultDependencies=no\n" in text
        # why: each of these makes a unit wait for mounts, and those wait for it
        assert not re.search(r"^(StateDirectory|RequiresMountsFor|PrivateTmp|WorkingDirectory)=", text, re.MULTILINE)
    assert "RefuseManualStart=yes" in (DEPLOY / "systemd" / stop).read_text("utf-8")


def test_systemd_finds_an_order_for_the_agents_units_in_a_boot_and_a_shutdown(tmp_path: Path) -> None:
    """No cycle among them and systemd's own."""
    need_tool("systemd-analyze", "systemd")
    (program,) = (program for program in SERVICES if program.name == "mobility-agent")
    units = root_with(tmp_path, program, drop_ins=True) / "etc/systemd/system"
    for name in program.units:
        unit = units / name
        unit.write_text(unit.read_text().replace(f"/usr/bin/{program.command}", "/bin/true"))
    targets = ("sysinit.target", "reboot.target", "poweroff.target")
    for target, name in (
        (targets[0], program.units[1]),
        (targets[1], program.units[2]),
        (targets[2], program.units[2]),
    ):
        wants = units / f"{target}.wants"
        wants.mkdir(exist_ok=True)
        (wants / name).symlink_to(units / name)
    for target in targets:
        said = run(
            "systemd-analyze",
            "verify",
            "--man=no",
            f"/usr/lib/systemd/system/{target}",
            *sorted(units.glob("*.service")),
        )
        assert "cycle" not in said
        assert "farpoint" not in said, said
