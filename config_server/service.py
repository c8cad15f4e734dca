"""The configuration server as one object: opens what it needs, serves until it is asked to stop, closes everything.

Invariant: what was answered is in the database; stopping or being killed at any moment loses nothing of it.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry

from config_server.admission import AdmissionOffice
from config_server.announcements import Announcements
from config_server.api.application import make_application
from config_server.api.route import Rooms
from config_server.audit import AuditLog
from config_server.authority import IssuedCertificate
from config_server.clock import ServerClock
from config_server.control_plane import ControlPlane
from config_server.core.policies import Terms
from config_server.database.engine import Database, open_database
from config_server.installation import (
    CREDENTIALS_FILE,
    DATABASE_FILE,
    LOCK_FILE,
    Installation,
    read_installation,
)
from config_server.metrics import ConfigServerMetrics
from config_server.operator_views import OperatorViews
from config_server.operators import OperatorOffice
from config_server.policies import PolicyOffice
from config_server.reconciler import Intervals, Reconciler
from config_server.settings import ConfigServerSettings
from config_server.wrong_secrets import WrongSecrets
from protocol.enrollment import credentials_pem, make_certificate_key
from protocol.errors import ReplicationError
from runtime.clock import Clock, SystemClock
from runtime.local_directory import LocalDirectory
from runtime.locks import exclusive_lock
from runtime.metrics import register_certificate_expiry, register_process_metrics
from runtime.observability import ListenAddress, listening, observability_endpoint
from runtime.service import StopSignal, notify_ready

OBSERVE_SECONDS: Final = 15.0
CERTIFICATE_CHECK_SECONDS: Final = 60.0
"""How often this server looks whether its own certificate is due: a day of the wall clock is not one of waiting."""
IDLE_SECONDS_MAX: Final = 60.0
"""How long a connection may wait for a whole request line and headers; members' own connections wait less."""
SHUTDOWN_SECONDS_MAX: Final = 5.0
"""How long requests in flight may take to end; long polls end at once."""

log = structlog.get_logger(__name__)


class ConfigServer:
    """Made from settings; `run` does everything."""

    def __init__(
        self,
        settings: ConfigServerSettings,
        *,
        clock: Clock | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._settings = settings
        self._clock: Clock = clock or SystemClock()
        self._registry = registry or CollectorRegistry()
        self._faults: list[str] = ["starting"]
        self._certificate: IssuedCertificate | None = None

    async def run(self, stop: StopSignal, *, on_ready: Callable[[ListenAddress], None] | None = None) -> None:
        """Serves until `stop` is set. on_ready is called with the address once requests are answered.

        Raises StateLocked, NotInitialised, InstallationDamaged, DatabaseTooNew, DatabaseFault, PortTaken,
        CannotListen.
        """
        loop = asyncio.get_running_loop()
        path = self._settings.state_directory
        installation = await loop.run_in_executor(None, read_installation, path)
        with exclusive_lock(path / LOCK_FILE):
            database = await open_database(path / DATABASE_FILE)
            try:
                await self._serve(installation, database, stop, on_ready)
            finally:
                await database.close()

    async def _serve(
        self,
        installation: Installation,
        database: Database,
        stop: StopSignal,
        on_ready: Callable[[ListenAddress], None] | None,
    ) -> None:
        clock = await ServerClock.open(database, self._clock)
        announcements = Announcements()
        metrics = ConfigServerMetrics(self._registry)
        register_process_metrics(self._registry, program="config-server")
        register_certificate_expiry(self._registry, self._certificate_expires_seconds)
        rooms = self._rooms(installation, database, clock, announcements)
        context = _tls_context(installation)
        await self._renew_own_certificate(installation, context)
        async with (
            observability_endpoint(
                self._settings.observability, registry=self._registry, readiness=lambda: self._faults
            ),
            self._listen(rooms, metrics, context, announcements) as address,
            asyncio.TaskGroup() as group,
        ):
            tasks = [
                group.create_task(clock.watch(), name="clock"),
                group.create_task(self._observe(rooms, clock, announcements, metrics), name="metrics"),
                group.create_task(self._keep_own_certificate(installation, context), name="own certificate"),
            ]
            self._faults.clear()
            log.info("serving", address=str(address), vault=installation.vault)
            notify_ready()
            if on_ready is not None:
                on_ready(address)
            await stop.wait()
            for task in tasks:
                task.cancel()
        await clock.tick()
        await clock.remember()

    def _rooms(
        self, installation: Installation, database: Database, clock: ServerClock, announcements: Announcements
    ) -> Rooms:
        settings = self._settings
        intervals = Intervals(
            heartbeat_seconds=settings.heartbeat_seconds, renew_after_seconds=settings.renew_after_seconds
        )
        terms = Terms(
            rpo_threshold_seconds=settings.rpo_threshold_seconds,
            copy_interval_seconds=settings.copy_interval_seconds,
            point_interval_seconds=settings.point_interval_seconds,
            freeze_interval_seconds=settings.freeze_interval_seconds,
            application_interval_seconds=settings.application_interval_seconds,
        )
        reconciler = Reconciler(installation.vault_authority, intervals, terms)
        audit = AuditLog(installation.vault)
        return Rooms(
            control_plane=ControlPlane(
                vault=installation.vault,
                database=database,
                clock=clock,
                reconciler=reconciler,
                announcements=announcements,
                audit=audit,
            ),
            admission=AdmissionOffice(
                installation=installation,
                database=database,
                clock=clock,
                announcements=announcements,
                audit=audit,
                wrong_secrets=WrongSecrets(),
            ),
            operators=OperatorOffice(installation=installation, database=database, clock=clock, audit=audit),
            views=OperatorViews(
                database=database,
                clock=clock,
                reconciler=reconciler,
            ),
            policies=PolicyOffice(database=database, clock=clock, announcements=announcements, audit=audit),
        )

    @asynccontextmanager
    async def _listen(
        self, rooms: Rooms, metrics: ConfigServerMetrics, context: ssl.SSLContext, announcements: Announcements
    ) -> AsyncIterator[ListenAddress]:
        address = ListenAddress.parse(self._settings.listen)
        runner = web.AppRunner(
            make_application(rooms, metrics),
            access_log=None,
            keepalive_timeout=IDLE_SECONDS_MAX,
            shutdown_timeout=SHUTDOWN_SECONDS_MAX,
            # why: a small compressed body can become a large one before anybody has counted it
            auto_decompress=False,
        )
        await runner.setup()
        try:
            with listening(address):
                await web.TCPSite(runner, address.host, address.port, ssl_context=context).start()
            host, port = runner.addresses[0][:2]
            yield ListenAddress(host=host, port=port)
        finally:
            announcements.close()
            await runner.cleanup()

    async def _observe(
        self, rooms: Rooms, clock: ServerClock, announcements: Announcements, metrics: ConfigServerMetrics
    ) -> None:
        while True:
            try:
                machines = [machine async for machine in rooms.views.all_machines()]
                disks = [disk async for disk in rooms.views.all_disks()]
                metrics.observe(machines, disks, await rooms.views.process_servers())
                self._faults.clear()
            except ReplicationError as error:
                log.error("cannot read the state", code=error.code, reason=str(error))
                self._faults[:] = [str(error)]
            metrics.long_polls.set(announcements.waiting)
            metrics.clock_jumps.set(clock.jumps)
            await asyncio.sleep(OBSERVE_SECONDS)

    async def _keep_own_certificate(self, installation: Installation, context: ssl.SSLContext) -> None:
        while True:
            await asyncio.sleep(CERTIFICATE_CHECK_SECONDS)
            issued_ns = self._certificate.valid_from_ns if self._certificate else 0
            if (self._clock.now_ns() - issued_ns) / 1e9 < self._settings.renew_after_seconds:
                continue
            try:
                await self._renew_own_certificate(installation, context)
            except OSError as error:
                log.error("cannot renew the server's own certificate yet", reason=str(error))

    async def _renew_own_certificate(self, installation: Installation, context: ssl.SSLContext) -> None:
        """At each start, and then as often as members do. Connections made from then on see the new one."""
        loop = asyncio.get_running_loop()
        now_ns = self._clock.now_ns()
        issued = await loop.run_in_executor(None, self._issue_own_certificate, installation, context, now_ns)
        self._certificate = issued
        log.info("own certificate issued", serial=issued.serial, names=list(self._settings.all_server_names()))

    def _certificate_expires_seconds(self) -> float:
        return self._certificate.valid_until_ns / 1e9 if self._certificate else math.nan

    def _issue_own_certificate(
        self, installation: Installation, context: ssl.SSLContext, now_ns: int
    ) -> IssuedCertificate:
        names = self._settings.all_server_names()
        key = make_certificate_key("configuration server")
        issued = installation.authority.issue(
            key.request_pem,
            installation.identity,
            name="configuration server",
            now_ns=now_ns,
            server_names=names,
        )
        pair = credentials_pem(installation.authority.bundle(issued), key)
        LocalDirectory(installation.path).replace(CREDENTIALS_FILE, pair)
        context.load_cert_chain(installation.path / CREDENTIALS_FILE)
        return issued


def _tls_context(installation: Installation) -> ssl.SSLContext:
    """Members show certificates, newcomers and operators none; one of another authority ends the handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_OPTIONAL
    context.load_verify_locations(cadata=installation.authority.certificate_pem.decode())
    # why: a resumed session would skip the check of the certificate
    context.num_tickets = 0
    return context
