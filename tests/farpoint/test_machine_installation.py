"""What `farpoint machines install` reads and judges before it changes anything: packages, hosts, its own command line.

tests/deploy has the rest, against a real sshd.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import io
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import cast

import asyncssh
import pytest
import zstandard
from click.testing import CliRunner, Result

from farpoint.__main__ import main
from farpoint.machine_installation.agent_package import AgentPackage, find_package
from farpoint.machine_installation.errors import (
    HostConnectionLost,
    HostUnfit,
    PackageInvalid,
    PackageMissing,
    RemoteCommandFailed,
    RootNeeded,
)
from farpoint.machine_installation.installation import Site, install_on_all
from farpoint.machine_installation.remote_host import Access, connected
from farpoint.machine_installation.target import PROBE, SPARE_BYTES, Target, check_target, parse_probe
from protocol.control_errors import JoinTokenMalformed
from protocol.operator_messages import JoinTokenCreated, JoinTokenRequest, MachineList
from protocol.transport.operator_client import OperatorClient
from runtime.exit_codes import ExitCode

CONTROL = (
    "Package: farpoint-mobility-agent\nVersion: 1.2.3\nArchitecture: amd64\nInstalled-Size: 100\nDescription: x\n y\n"
)


def archive_member(name: str, data: bytes) -> bytes:
    """As ar(5) has it."""
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n"
    return header.encode() + data + b"\n" * (len(data) % 2)


def package_bytes(control: str = CONTROL, *, name: str = "control.tar.zst") -> bytes:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        member = tarfile.TarInfo("./control")
        member.size = len(control.encode())
        archive.addfile(member, io.BytesIO(control.encode()))
    packed = zstandard.ZstdCompressor().compress(tar.getvalue()) if name.endswith(".zst") else tar.getvalue()
    return b"!<arch>\n" + archive_member("debian-binary", b"2.0\n") + archive_member(name, packed)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["control.tar.zst", "control.tar"])
def test_a_package_tells_what_it_is_by_its_control_file(tmp_path: Path, name: str) -> None:
    data = package_bytes(name=name)
    found = find_package(written(tmp_path / "renamed", data))
    assert (found.version, found.architecture, found.installed_bytes) == ("1.2.3", "amd64", 100 * 1024)
    assert (found.size_bytes, found.sha256) == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04",
        package_bytes()[:40],
        package_bytes()[:-10],
        package_bytes(CONTROL.replace("mobility-agent", "process-server")),
        package_bytes(CONTROL.replace("Version", "Vision")),
        package_bytes(CONTROL.replace("100", "many")),
        package_bytes(name="data.tar.zst"),
        b"!<arch>\n" + archive_member("debian-binary", b"2.0\n") + archive_member("control.tar.zst", b"no zstd"),
        b"!<arch>\n" + f"{'debian-binary':<48}{-5:<10}`\n".encode(),
    ],
)
def test_what_is_no_package_of_the_agent_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(PackageInvalid):
        find_package(written(tmp_path / "agent.deb", data))


def test_the_sums_beside_a_package_count(tmp_path: Path) -> None:
    path = written(tmp_path / "agent.deb", package_bytes())
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(f"{'0' * 64}  agent.deb\n")
    with pytest.raises(PackageInvalid, match="another sum"):
        find_package(path)
    sums.write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  agent.deb\n")
    assert find_package(path).version == "1.2.3"


def test_the_package_in_dist_is_taken_if_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PackageMissing):
        find_package(None)
    (tmp_path / "dist").mkdir()
    written(tmp_path / "dist/farpoint-mobility-agent_1_amd64.deb", package_bytes())
    assert find_package(None).version == "1.2.3"
    written(tmp_path / "dist/farpoint-mobility-agent_2_amd64.deb", package_bytes())
    with pytest.raises(PackageMissing, match="there are 2"):
        find_package(None)


PACKAGE = AgentPackage(
    path=Path("agent.deb"),
    version="1.2.3",
    architecture="amd64",
    size_bytes=40 * 2**20,
    installed_bytes=120 * 2**20,
    sha256="0" * 64,
)
NEEDED_BYTES = PACKAGE.size_bytes + PACKAGE.installed_bytes + SPARE_BYTES
FIT = f"""kernel=Linux
name=Debian GNU/Linux 12 (bookworm)
architecture=amd64
installer=/usr/bin/apt-get
systemd=/usr/bin/systemctl
uid=1000
root=yes
package=
free_bytes={NEEDED_BYTES}
"""


def check(text: str) -> Target:
    target = parse_probe(text)
    check_target(target, PACKAGE, host="host", user="somebody")
    return target


def test_a_host_that_fits_is_taken() -> None:
    target = check(FIT)
    assert not target.is_root
    assert not target.has(PACKAGE)
    assert not target.is_interrupted


@pytest.mark.parametrize(
    ("line", "other", "reason"),
    [
        ("kernel=Linux", "kernel=FreeBSD", "FreeBSD"),
        ("kernel=Linux", "", "unknown"),
        ("architecture=amd64", "architecture=", "no dpkg"),
        ("architecture=amd64", "architecture=arm64", "arm64"),
        ("installer=/usr/bin/apt-get", "installer=", "no dpkg"),
        ("systemd=/usr/bin/systemctl", "", "systemd"),
        (f"free_bytes={NEEDED_BYTES}", f"free_bytes={NEEDED_BYTES - 1}", "free"),
        (f"free_bytes={NEEDED_BYTES}", "free_bytes=much", "free"),
    ],
)
def test_a_host_that_does_not_fit_is_told_why(line: str, other: str, reason: str) -> None:
    with pytest.raises(HostUnfit, match=reason):
        check(FIT.replace(line, other))


def test_a_user_who_cannot_become_root_is_refused() -> None:
    with pytest.raises(RootNeeded):
        check(FIT.replace("root=yes\n", ""))


def test_nothing_said_is_unfit() -> None:
    with pytest.raises(HostUnfit):
        check("")


def test_what_is_installed_needs_no_room() -> None:
    target = check(FIT.replace("package=", "package=installed 1.2.3").replace(f"={NEEDED_BYTES}", "=0"))
    assert target.has(PACKAGE)
    assert not target.has(dataclasses.replace(PACKAGE, version="1.2.4"))


@pytest.mark.parametrize("state", ["half-installed", "unpacked", "half-configured", "triggers-pending"])
def test_a_package_half_installed_is_seen_as_cut_off(state: str) -> None:
    assert check(FIT.replace("package=", f"package={state} 1.2.3")).is_interrupted


@pytest.mark.parametrize("state", ["", "not-installed ", "config-files 1.2.3"])
def test_a_package_that_is_gone_is_not_there(state: str) -> None:
    target = check(FIT.replace("package=", f"package={state}"))
    assert not target.is_interrupted
    assert not target.has(PACKAGE)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["machines", *(str(argument) for argument in arguments)])


@pytest.mark.parametrize(
    "arguments",
    [
        ("install",),
        ("install", "one", "one"),
        ("install", "one", "two", "--host-key-fingerprint", "SHA256:x"),
        ("install", "one", "--host-key-fingerprint", "MD5:x"),
        ("-o", "json", "install", "one"),
    ],
)
def test_wrong_usage_is_told_before_any_host_is_touched(arguments: tuple[str, ...]) -> None:
    assert call(*arguments).exit_code == ExitCode.USAGE


def test_files_that_are_missing_or_wrong_have_their_exit_codes(tmp_path: Path) -> None:
    key, package = tmp_path / "key", written(tmp_path / "agent.deb", package_bytes())
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(str(key))
    known_hosts = written(tmp_path / "known_hosts", b"")
    good = ("--key-file", key, "--known-hosts", known_hosts, "--package", package)

    def exit_code(*arguments: object) -> int:
        return call("install", "host", *good, *arguments).exit_code

    assert exit_code() == ExitCode.USAGE, "no server is given"
    assert exit_code("--key-file", tmp_path / "none") == ExitCode.NOT_FOUND
    assert exit_code("--key-file", known_hosts) == ExitCode.FAILURE
    assert exit_code("--known-hosts", tmp_path / "none") == ExitCode.USAGE
    assert exit_code("--package", tmp_path / "none") == ExitCode.NOT_FOUND
    assert exit_code("--package", key) == ExitCode.USAGE


class OpenToEverybody(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return False


Answer = Callable[[asyncssh.SSHServerProcess[str]], Awaitable[None]]


@contextlib.asynccontextmanager
async def host_with(answer: Answer, *, address: str = "127.0.0.1") -> AsyncIterator[Access]:
    """An SSH server on loopback; `answer` is what becomes of each script."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    async with await asyncssh.listen(
        address, 0, server_factory=OpenToEverybody, server_host_keys=[key], process_factory=answer
    ) as server:
        yield Access(
            user="somebody",
            port=server.get_port(),
            keys=(key,),
            known_hosts=asyncssh.import_known_hosts(""),
            fingerprint=key.get_fingerprint(),
        )


def site_of(access: Access, *, tell: Callable[[str], None], operator: object = None) -> Site:
    return Site(
        access=access,
        package=PACKAGE,
        operator=cast(OperatorClient, operator),
        machines_url="https://server",
        tell=tell,
    )


async def lose_connection(process: asyncssh.SSHServerProcess[str]) -> None:
    await process.stdin.read()
    process.get_extra_info("connection").abort()


async def test_a_connection_that_is_lost_in_a_script_is_told_as_that() -> None:
    async with host_with(lose_connection) as access, connected("127.0.0.1", access) as host:
        with pytest.raises(HostConnectionLost, match="`check`"):
            await host.run("true", step="check", seconds=60)


async def test_a_shell_that_ends_before_it_has_read_its_script_tells_its_status() -> None:
    async def answer(process: asyncssh.SSHServerProcess[str]) -> None:
        process.exit(7)

    async with host_with(answer) as access, connected("127.0.0.1", access) as host:
        for _ in range(20):
            with pytest.raises(RemoteCommandFailed, match="7"):
                await host.run("true\n" * 100_000, step="check", seconds=60)


async def test_a_connection_that_is_lost_ends_no_other_hosts_way() -> None:
    is_told = asyncio.Event()

    def tell(text: str) -> None:
        if text == "127.0.0.1: failed":
            is_told.set()

    async def answer(process: asyncssh.SSHServerProcess[str]) -> None:
        if process.get_extra_info("sockname")[0] == "127.0.0.1":
            await lose_connection(process)
            return
        await is_told.wait()
        process.exit(0)

    async with host_with(answer, address="0.0.0.0") as access:
        async with asyncio.timeout(60):
            reports = await install_on_all(["127.0.0.1", "127.0.0.2"], site_of(access, tell=tell), at_once=2)
    assert [type(report.error) for report in reports] == [HostConnectionLost, HostUnfit]


class HostileServer:
    """A configuration server in the place of an OperatorClient, whose join token is a script."""

    async def machines(self) -> MachineList:
        return MachineList(machines=(), now_ns=1)

    async def create_token(self, request: JoinTokenRequest) -> JoinTokenCreated:
        return JoinTokenCreated(token="x\nTOKEN\nid >/tmp/owned\n", role=request.role, expires_at_ns=1)


async def test_a_join_token_that_is_a_script_never_gets_to_the_machine() -> None:
    scripts: list[str] = []

    async def answer(process: asyncssh.SSHServerProcess[str]) -> None:
        script = await process.stdin.read()
        scripts.append(script)
        if PROBE in script:
            process.stdout.write(FIT.replace("package=", f"package=installed {PACKAGE.version}"))
        process.exit(0)

    async with host_with(answer) as access:
        site = site_of(access, tell=lambda text: None, operator=HostileServer())
        (report,) = await install_on_all(["127.0.0.1"], site, at_once=1)
    assert isinstance(report.error, JoinTokenMalformed)
    assert [PROBE in script for script in scripts] == [True, False], "asked for its identity, and then nothing more"
    assert not any("owned" in script or "TOKEN" in script for script in scripts)
