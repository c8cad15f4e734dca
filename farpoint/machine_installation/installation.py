"""One host from nothing to an agent that the configuration server hears: step by step, each skipped if it is done.

Invariants: every step can be repeated after an interruption anywhere; a join token exists only while a host enrols, and
is nowhere but in the memory of both sides and on the wire between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from farpoint.machine_installation.agent_package import PACKAGE, AgentPackage
from farpoint.machine_installation.errors import EnrolledElsewhere, HostLocked, RemoteCommandFailed, StepTookTooLong
from farpoint.machine_installation.remote_host import Access, RemoteHost, connected, quoted
from farpoint.machine_installation.target import INSTALLED, PROBE, Target, check_target, parse_probe
from protocol.control_errors import AnswerMalformed
from protocol.enrollment import IDENTITY_FILE, EnrolledIdentity
from protocol.errors import InvalidValue, ReplicationError
from protocol.join_token import JoinToken
from protocol.operator_messages import JoinTokenRequest, MachineStatus
from protocol.transport.operator_client import OperatorClient
from protocol.vocabulary import Role, check_identifier

UNIT: Final = f"{PACKAGE}.service"
CHECK_SECONDS_MAX: Final = 120.0
COPY_SECONDS_MAX: Final = 1800.0
INSTALL_SECONDS_MAX: Final = 900.0
LOCK_SECONDS_MAX: Final = 300
"""How long apt waits for another program that installs packages."""
ENROLL_SECONDS_MAX: Final = 180.0
START_SECONDS_MAX: Final = 330.0
"""Beyond the unit's TimeoutStartSec."""
HEARD_SECONDS_MAX: Final = 180.0
POLL_SECONDS: Final = 1.0
TOKEN_SECONDS: Final = 600
COPY_TOLD_SECONDS: Final = 5.0

_INSTALL = """{{
export DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l
flock --shared --close {lock} {command} {package} >{log} 2>&1
status=$?
[ $status = 0 ] || cat {log}
exit $status
}} </dev/null
"""
_APT: Final = (
    f"apt-get install --yes --no-install-recommends -o DPkg::Lock::Timeout={LOCK_SECONDS_MAX} "
    "-o Dpkg::Options::=--force-confold"
)
_DPKG: Final = "dpkg --force-confold --install"
"""For what a cut-off installation left, which apt refuses to touch."""
_LOCK_TEXTS: Final = ("lock-frontend", "is locked by another process", "Could not get lock")

_IDENTITY: Final = f"""
directory=$(mobility-agent config show | sed -n 's/^state_directory *//p')
[ ! -e "$directory/{IDENTITY_FILE}" ] || cat "$directory/{IDENTITY_FILE}"
"""
_ENROLL = """
mobility-agent enroll --server {server} --token-file /dev/stdin -o json <<'TOKEN'
{token}
TOKEN
"""
_START: Final = f"""
if systemctl is-active --quiet {UNIT}; then echo active; exit; fi
systemctl start {UNIT} && systemctl is-active --quiet {UNIT} && exit
status=$?
systemctl status --no-pager --lines=15 {UNIT}
exit $status
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One step that was done: what came of it, and how long it took."""

    step: str
    result: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """What came of one host. result: installed, upgraded, completed, up to date, failed."""

    host: str
    result: str
    machine: str | None
    version: str | None
    steps: tuple[StepReport, ...]
    error: ReplicationError | OSError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What is the same for all hosts. machines_url: the configuration server as the machines reach it."""

    access: Access
    package: AgentPackage
    operator: OperatorClient
    machines_url: str
    tell: Callable[[str], None]
    """Says one line of progress."""


class HostInstallation:
    """One host's way; `run` goes it, once."""

    def __init__(self, host: str, site: Site) -> None:
        self._name = host
        self._site = site
        self._steps: list[StepReport] = []
        self._result = "up to date"
        self._machine: str | None = None
        self._version: str | None = None
        self._sudo = False

    async def run(self) -> HostReport:
        """What came of it; an error that is foreseen is part of that."""
        error: ReplicationError | OSError | None = None
        try:
            await self._go()
        except (ReplicationError, OSError) as failure:
            error, self._result = failure, "failed"
        self._tell(self._result)
        return HostReport(
            host=self._name,
            result=self._result,
            machine=self._machine,
            version=self._version,
            steps=tuple(self._steps),
            error=error,
        )

    async def _go(self) -> None:
        access = self._site.access
        async with contextlib.AsyncExitStack() as stack:
            with self._step("connect") as done:
                host = await stack.enter_async_context(connected(self._name, access))
                done(f"as {access.user}; the host key is vouched for")
            with self._step("check") as done:
                target = parse_probe(await host.run(PROBE, step="check", seconds=CHECK_SECONDS_MAX))
                check_target(target, self._site.package, host=self._name, user=access.user)
                self._sudo = not target.is_root
                done(f"{target.name}, {target.architecture}, {target.package_version or 'nothing'} installed")
            if not target.has(self._site.package):
                await self._install(host, target)
            self._version = self._site.package.version
            before_ns = (await self._site.operator.machines()).now_ns
            await self._enroll(host)
            await self._start(host)
            await self._wait_until_heard(0 if self._result == "up to date" else before_ns)

    async def _install(self, host: RemoteHost, target: Target) -> None:
        package = self._site.package
        async with host.directory(step="copy", seconds=CHECK_SECONDS_MAX) as directory:
            path = f"{directory}/{PACKAGE}.deb"
            with self._step("copy") as done:
                await host.send_file(
                    package.path, path, step="copy", seconds=COPY_SECONDS_MAX, on_bytes=self._copy_teller()
                )
                check = f"printf '%s  %s\\n' {package.sha256} {quoted(path)} | sha256sum --check --quiet"
                await host.run(check, step="copy", seconds=CHECK_SECONDS_MAX)
                done(f"{package.size_bytes >> 20} MiB, its sum is right")
            with self._step("install") as done:
                script = _INSTALL.format(
                    lock=quoted(f"{directory}/lock"),
                    log=quoted(f"{directory}/log"),
                    command=_DPKG if target.is_interrupted else _APT,
                    package=quoted(path),
                )
                try:
                    await self._as_root(host, script, step="install", seconds=INSTALL_SECONDS_MAX)
                except RemoteCommandFailed as error:
                    if any(text in str(error) for text in _LOCK_TEXTS):
                        raise HostLocked(host=self._name, text=error.text) from error
                    raise
                was_there = target.package_state == INSTALLED
                self._result = "upgraded" if was_there else "installed"
                done(f"{package.version}" + (f" after {target.package_version}" if was_there else ""))

    async def _enroll(self, host: RemoteHost) -> None:
        """Raises EnrolledElsewhere, JoinTokenMalformed, and what making a token raises."""
        with self._step("enroll") as done:
            held = await self._as_root(host, _IDENTITY, step="enroll", seconds=ENROLL_SECONDS_MAX)
            if held.strip():
                identity = EnrolledIdentity.decode(held.encode())
                self._machine = identity.peer.identifier
                if await self._known() is None:
                    server = identity.server_url
                    raise EnrolledElsewhere(host=self._name, machine=self._machine, server=server)
                done(f"is machine {self._machine} already")
                return
            request = JoinTokenRequest(role=Role.AGENT, lifetime_seconds=TOKEN_SECONDS)
            created = await self._site.operator.create_token(request)
            # why: root's sh reads it there, and what the server answers is anything until it is parsed
            token = JoinToken.parse(created.token).format()
            script = _ENROLL.format(server=quoted(self._site.machines_url), token=token)
            said = await self._as_root(host, script, step="enroll", seconds=ENROLL_SECONDS_MAX)
            self._machine = _machine_of(said, self._name)
            self._changed()
            done(f"is machine {self._machine}")

    async def _start(self, host: RemoteHost) -> None:
        with self._step("start") as done:
            said = await self._as_root(host, _START, step="start", seconds=START_SECONDS_MAX)
            if said.strip() == "active":
                done("runs already")
                return
            self._changed()
            done(f"{UNIT} runs")

    async def _wait_until_heard(self, after_ns: int) -> None:
        """Until the configuration server heard the agent of this version, later than after_ns by its own clock."""
        with self._step("heard") as done:
            try:
                async with asyncio.timeout(HEARD_SECONDS_MAX):
                    while True:
                        if self._is_heard(await self._known(), after_ns):
                            break
                        await asyncio.sleep(POLL_SECONDS)
            except TimeoutError as error:
                raise StepTookTooLong(host=self._name, step="heard", seconds=HEARD_SECONDS_MAX) from error
            done("the configuration server hears it")

    def _is_heard(self, machine: MachineStatus | None, after_ns: int) -> bool:
        return (
            machine is not None
            and not machine.is_silent
            and (machine.last_heard_ns or 0) > after_ns
            and machine.agent_version == self._version
        )

    async def _known(self) -> MachineStatus | None:
        """This machine as the configuration server knows it."""
        listed = await self._site.operator.machines()
        return next((machine for machine in listed.machines if machine.machine == self._machine), None)

    async def _as_root(self, host: RemoteHost, script: str, *, step: str, seconds: float) -> str:
        return await host.run(script, step=step, seconds=seconds, with_sudo=self._sudo)

    def _changed(self) -> None:
        if self._result == "up to date":
            self._result = "completed"

    @contextlib.contextmanager
    def _step(self, name: str) -> Iterator[Callable[[str], None]]:
        """Gives what to call with the step's result."""
        started = time.monotonic()

        def done(result: str) -> None:
            seconds = round(time.monotonic() - started, 1)
            self._steps.append(StepReport(step=name, result=result, seconds=seconds))
            self._tell(f"{name}: {result} ({seconds} s)")

        yield done

    def _copy_teller(self) -> Callable[[int], None]:
        """Tells how far the copy is, now and then."""
        total_bytes = self._site.package.size_bytes
        told = time.monotonic()

        def show(done_bytes: int) -> None:
            nonlocal told
            if time.monotonic() - told > COPY_TOLD_SECONDS:
                told = time.monotonic()
                self._tell(f"copy: {done_bytes >> 20} of {total_bytes >> 20} MiB")

        return show

    def _tell(self, text: str) -> None:
        self._site.tell(f"{self._name}: {text}")


def _machine_of(said: str, host: str) -> str:
    """The machine's identifier in what `mobility-agent enroll -o json` printed. Raises AnswerMalformed."""
    try:
        return check_identifier(json.loads(said)["machine"], "machine")
    except (ValueError, KeyError, TypeError, RecursionError, InvalidValue) as error:
        raise AnswerMalformed(server=host, reason=f"its enrolment: {error}") from error


async def install_on_all(hosts: Sequence[str], site: Site, *, at_once: int) -> list[HostReport]:
    """What came of each, in their order; at most `at_once` at a time. One host's failure ends no other's way."""
    room = asyncio.Semaphore(at_once)

    async def install(host: str) -> HostReport:
        async with room:
            return await HostInstallation(host, site).run()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(install(host)) for host in hosts]
    return [task.result() for task in tasks]
