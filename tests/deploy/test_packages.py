"""What `make dist` made: complete, installed on a throwaway machine, run there as a site, and gone without trace.

Needs dist/ of the commit that is checked out (what it packages, at least, must not have changed since), and root.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.packages.debian_package import oldest_c_library
from deploy.packages.locked import read_lock
from deploy.packages.programs import PROGRAMS, Program
from tests.deploy.needed_tools import DEPLOY, ROOT, need_tool, not_here, run
from tests.deploy.throwaway_machine import ThrowawayMachine, need_throwaway_machine
from tests.test_tidy import PRODUCT

DIST = ROOT / "dist"
PACKAGED = [*PRODUCT, "deploy", "docs/installation.md", "pyproject.toml", "requirements.lock"]
KEPT_BY_DPKG = ("/var/lib/dpkg/", "/var/log/", "/var/cache/", "/var/lib/systemd/deb-systemd")
ACCOUNTS = ("passwd", "group", "shadow", "gshadow", "subuid", "subgid")
NO_ACCOUNT = "if (getent passwd; getent group) | grep farpoint; then exit 1; fi"

# why: hundreds of MiB are unpacked several times, beside whatever else the machine does
pytestmark = pytest.mark.timeout(1200)

each_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)


@pytest.fixture(scope="module")
def dist() -> Path:
    """Checked against its sums."""
    if not (DIST / "COMMIT").exists():
        not_here("dist/ is not there: make dist")
    commit = (DIST / "COMMIT").read_text().strip()
    same = subprocess.run(["git", "diff", "--quiet", commit, "HEAD", "--", *PACKAGED], cwd=ROOT, capture_output=True)
    if same.returncode:
        not_here("dist/ is of another commit: make dist")
    run("sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS", cwd=DIST)
    return DIST


@pytest.fixture(scope="module")
def machine(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThrowawayMachine]:
    """With all four packages installed. Its files are removed at the end."""
    directory = tmp_path_factory.mktemp("machine")
    try:
        need_throwaway_machine(directory / "probe")
        made = ThrowawayMachine(directory=directory / "packages", shared=dist)
        made.run("dpkg --install /mnt/*.deb")
        yield made
    finally:
        shutil.rmtree(directory)


def package(dist: Path, program: Program) -> Path:
    (path,) = dist.glob(f"{program.package_name}_*.deb")
    return path


def wheel(dist: Path) -> zipfile.ZipFile:
    (path,) = dist.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_sums_cover_everything(dist: Path) -> None:
    listed = {line.split("  ", 1)[1] for line in (dist / "SHA256SUMS").read_text().splitlines()}
    assert listed == {path.name for path in dist.iterdir()} - {"SHA256SUMS"}
    kinds = sorted(path.suffix for path in dist.iterdir() if path.suffix)
    assert kinds == [".deb", ".deb", ".deb", ".deb", ".gz", ".json", ".whl"]


def test_the_wheel_holds_the_programs_their_formats_and_migrations_and_no_tests(dist: Path) -> None:
    names = wheel(dist).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(PRODUCT)
    assert {"protocol/WIRE_FORMAT.md", "storage/SEGMENT_FORMAT.md"} <= set(names)
    tracked = run("git", "ls-files", "--", *PRODUCT).split()
    assert any("/migrations/versions/" in name for name in tracked)
    assert set(tracked) <= set(names)


def test_the_wheel_has_an_extra_for_each_program(dist: Path) -> None:
    archive = wheel(dist)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    extras = set(re.findall(r"^Provides-Extra: (.+)$", archive.read(metadata).decode(), re.MULTILINE))
    assert extras >= {extra for program in PROGRAMS for extra in program.extras}


@each_program
def test_a_bill_of_materials_names_what_the_package_holds(dist: Path, tmp_path: Path, program: Program) -> None:
    run("dpkg-deb", "--extract", package(dist, program), tmp_path)
    bill = json.loads((tmp_path / f"usr/share/doc/{program.package_name}/farpoint.cdx.json").read_text("utf-8"))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    named = {one["name"].replace("-", "_"): one for one in [bill["metadata"]["component"], *bill["components"]]}
    site = tmp_path / f"usr/lib/farpoint/{program.name}/lib/python3.11/site-packages"
    held = {path.name.partition("-")[0].lower().replace(".", "_") for path in site.glob("*.dist-info")}
    assert set(named) == held
    pins = read_lock(ROOT / "requirements.lock")
    for component in bill["components"]:
        pin = pins[component["name"]]
        assert component["version"] == pin.version
        assert f"sha256:{component['hashes'][0]['content']}" in pin.hashes
        assert component["licenses"]
    references = {component["bom-ref"] for component in named.values()}
    assert {entry["ref"] for entry in bill["dependencies"]} == references
    assert {path.name for path in site.iterdir() if path.name in PRODUCT} == set(program.packages)


@each_program
def test_a_package_puts_its_files_where_they_belong_and_owns_its_byte_code(dist: Path, program: Program) -> None:
    listed = [line.split(maxsplit=5) for line in run("dpkg-deb", "--contents", package(dist, program)).splitlines()]
    assert {fields[1] for fields in listed} == {"root/root"}
    paths = [fields[5].partition(" -> ")[0].removeprefix(".") for fields in listed if not fields[5].endswith("/")]
    places = (f"/usr/lib/farpoint/{program.name}/", f"/usr/share/doc/{program.package_name}/")
    others = {path for path in paths if not path.startswith(places)}
    units = {f"/lib/systemd/system/{unit}" for unit in program.units}
    assert others == {f"/usr/bin/{program.command}", f"/etc/farpoint/{program.command}.toml", *units}
    modules = {path for path in paths if path.endswith(".py")}
    compiled = {
        re.sub(r"__pycache__/(.+)\.cpython-\d+\.pyc$", r"\1.py", path) for path in paths if path.endswith(".pyc")
    }
    assert modules == compiled


def test_a_wheels_name_tells_the_oldest_c_library() -> None:
    assert oldest_c_library("x-1-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl") == (2, 17)
    assert oldest_c_library("x-1-cp311-cp311-manylinux_2_28_x86_64.whl") == (2, 28)
    assert oldest_c_library("x-1-py3-none-any.whl") == (0, 0)


def test_an_installed_program_says_its_version_and_takes_its_settings(machine: ThrowawayMachine) -> None:
    for program in PROGRAMS:
        assert machine.run(f"{program.command} --version").startswith(f"{program.command} ")
        said = machine.run(f"cd /; {program.command} config show --origin; {program.command} config check")
        assert "settings are good" in said
        if program.command == "process-server":
            assert "file /etc/farpoint/process-server.toml" in said


def test_every_module_of_a_package_can_be_imported_and_nothing_is_written_for_it(machine: ThrowawayMachine) -> None:
    before = set(machine.changed())
    for program in PROGRAMS:
        script = f"""
import importlib, pkgutil
for package in {program.packages}:
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not module.name.endswith("__main__") and ".migrations" not in module.name:
            importlib.import_module(module.name)
"""
        machine.run(f"cd /; /usr/lib/farpoint/{program.name}/bin/python3 -I - <<'SCRIPT'\n{script}\nSCRIPT")
    assert set(machine.changed()) == before


def is_enabled(unit: str, units: Path) -> bool:
    """Its links lead nowhere, seen from outside of the machine."""
    return any((folder / unit).is_symlink() for folder in units.glob("*.wants"))


def test_services_are_enabled_but_not_started_and_their_state_is_their_own(machine: ThrowawayMachine) -> None:
    for program in PROGRAMS:
        if program.has_service:
            assert all(is_enabled(unit, machine.upper / "etc/systemd/system") for unit in program.units)
            owner = program.user or "root"
            said = machine.run(
                f"stat --format='%a %U %G' /var/lib/farpoint/{program.name}; ls -A /var/lib/farpoint/{program.name}"
            )
            assert said == f"700 {owner} {owner}\n"


def test_the_packaged_programs_play_the_demonstration(machine: ThrowawayMachine) -> None:
    said = machine.run("cd /tmp; farpoint demo --json --size '64 MiB'")
    assert json.loads(said.splitlines()[-1])["identical"] is True


def test_a_site_of_the_packages_replicates_recovers_and_is_scraped_by_prometheus(machine: ThrowawayMachine) -> None:
    """Each program as its own user, the way docs/installation.md says."""
    need_tool("prometheus", "prometheus")
    script = (Path(__file__).parent / "installed_site.sh").read_text("utf-8")
    said = machine.run(script, shared=DEPLOY / "monitoring")
    assert said.splitlines()[-1] == "the site is well", said


def test_settings_and_state_outlive_a_removal_and_an_upgrade_and_nothing_outlives_a_purge(
    machine: ThrowawayMachine,
) -> None:
    """Spends the machine: the last of its tests."""
    names = " ".join(program.package_name for program in PROGRAMS)
    machine.run(
        "echo 'idle_seconds_max = 59' | cat - /etc/farpoint/process-server.toml > /tmp/new\n"
        "cat /tmp/new > /etc/farpoint/process-server.toml\n"
        "touch /var/lib/farpoint/process-server/kept\n"
        "dpkg --force-confold --install /mnt/farpoint-process-server_*.deb\n"
        "process-server config show --origin | grep -F 59\n"
        f"dpkg --remove {names}\n"
        "test -e /var/lib/farpoint/process-server/kept\n"
        "test ! -e /usr/lib/farpoint\n"
        "grep -q 59 /etc/farpoint/process-server.toml\n"
        f"dpkg --purge {names}\n"
        f"{NO_ACCOUNT}\n"
    )
    assert_nothing_is_left(machine)


def test_the_offline_bundle_installs_and_uninstalls_without_trace(dist: Path, tmp_path: Path) -> None:
    need_throwaway_machine(tmp_path / "probe")
    (bundle,) = dist.glob("*-offline-*.tar.gz")
    with tarfile.open(bundle) as archive:
        archive.extractall(tmp_path / "bundle", filter="data")
    (folder,) = (tmp_path / "bundle").iterdir()
    machine = ThrowawayMachine(directory=tmp_path / "machine", shared=folder)
    try:
        programs = "mobility-agent process-server config-server recovery"
        # why PYTHON: the interpreter is Debian's here, whatever else is on this machine's path
        said = machine.run(f"cd /mnt; PYTHON=/usr/bin/python3.11 ./install.sh {programs}; ./install.sh recovery")
        assert said.count("installed ") == 5
        for program in PROGRAMS:
            assert "settings are good" in machine.run(f"{program.command} --version; {program.command} config check")
            if program.has_service:
                unit = machine.upper / "etc/systemd/system" / program.unit
                assert f"ExecStart=/usr/local/bin/{program.command} run\n" in unit.read_text()
                assert all(is_enabled(name, unit.parent) for name in program.units)
        machine.run("/opt/farpoint/uninstall.sh recovery; test ! -e /usr/local/bin/farpoint; mobility-agent --version")
        machine.run("/opt/farpoint/uninstall.sh; test -d /var/lib/farpoint/config-server; test ! -e /opt/farpoint")
        machine.run(f"/mnt/uninstall.sh --purge; {NO_ACCOUNT}")
        assert_nothing_is_left(machine)
    finally:
        shutil.rmtree(machine.directory)


def test_a_damaged_bundle_is_refused(dist: Path, tmp_path: Path) -> None:
    need_throwaway_machine(tmp_path / "probe")
    (bundle,) = dist.glob("*-offline-*.tar.gz")
    with tarfile.open(bundle) as archive:
        archive.extractall(tmp_path / "bundle", filter="data")
    (folder,) = (tmp_path / "bundle").iterdir()
    with (folder / "systemd/farpoint-process-server.service").open("a") as file:
        file.write("\n")
    machine = ThrowawayMachine(directory=tmp_path / "machine", shared=folder)
    try:
        with pytest.raises(AssertionError, match="this bundle is damaged"):
            machine.run("cd /mnt; PYTHON=/usr/bin/python3.11 ./install.sh process-server")
        assert_nothing_is_left(machine)
    finally:
        shutil.rmtree(machine.directory)


def assert_nothing_is_left(machine: ThrowawayMachine) -> None:
    """But what dpkg and the accounts' tools keep of everything that ever was."""
    accounts = [f"/etc/{name}" for name in (*ACCOUNTS, ".pwd.lock")]
    left = sorted(machine.changed(apart_from=(*KEPT_BY_DPKG, *accounts)))
    assert left == []
    assert [folder for folder in machine.folders() if not folder.startswith(KEPT_BY_DPKG)] == []
    for name in ACCOUNTS:
        altered = machine.upper / "etc" / name
        if altered.exists():
            assert altered.read_text() == Path("/etc", name).read_text()
