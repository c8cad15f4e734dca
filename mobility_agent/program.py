"""The agent as a program: the service with production's ports, its socket, its endpoint, its certificate's renewal."""

from __future__ import annotations

import asyncio
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Final

import structlog
from prometheus_client import CollectorRegistry

from mobility_agent.consistency.freeze_points import FreezePorts
from mobility_agent.consistency.freezer import Freezer, thaw_before_start
from mobility_agent.consistency.scripts import FreezeScripts
from mobility_agent.control_socket import control_socket
from mobility_agent.disk_reader import open_local_disk
from mobility_agent.machine_facts import this_machine
from mobility_agent.metrics import AgentMetrics
from mobility_agent.service import AgentService
from mobility_agent.settings import AgentSettings
from mobility_agent.tracking.selection import SourceSelection
from protocol.control import AgentOrders, ProcessServerAddress
from protocol.enrollment import AUTHORITY_FILE, CREDENTIALS_FILE
from protocol.transport import channel, tls
from protocol.transport.control_client import AgentControlClient
from runtime.blocking import blocking
from runtime.clock import SystemClock
from runtime.local_directory import LocalDirectory
from runtime.locks import exclusive_lock
from runtime.membership import CertificateRenewal, read_identity
from runtime.metrics import register_certificate_expiry, register_process_metrics
from runtime.observability import observability_endpoint
from runtime.service import StopSignal, notify_ready

PROGRAM: Final = "mobility-agent"
LOCK_FILE: Final = ".lock"
HELD_THREADS: Final = 4
"""Disks that are read at once while file systems are frozen."""

log = structlog.get_logger(__name__)


class AgentProgram:
    """`run_service(AgentProgram(settings).run)`. Raises NotEnrolled, StateLocked, AddressTaken."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._path = settings.state_directory

    async def run(self, stop: StopSignal) -> None:
        """Until `stop`. SIGUSR1 begins a round of every disk at once."""
        thawed = thaw_before_start(self._path, LOCK_FILE, this_machine().boot_id)
        if thawed:
            log.error("file systems had been left frozen", thawed=thawed)
        with (
            exclusive_lock(self._path / LOCK_FILE),
            ThreadPoolExecutor(self._settings.worker_threads, thread_name_prefix="disk") as executor,
            ThreadPoolExecutor(HELD_THREADS, thread_name_prefix="held") as held_executor,
            ThreadPoolExecutor(1, thread_name_prefix="freeze") as freeze_executor,
            closing(SourceSelection(self._settings.tracking, self._settings.pin_directory)) as tracking,
        ):
            directory = LocalDirectory(self._path)
            identity = read_identity(directory, program=PROGRAM)
            clock = SystemClock()
            async with AgentControlClient(
                server_url=identity.server_url,
                authority_pem=directory.read(AUTHORITY_FILE),
                credentials_path=str(self._path / CREDENTIALS_FILE),
            ) as control:
                renewal = CertificateRenewal(
                    directory=directory,
                    control=control,
                    clock=clock,
                    executor=executor,
                    name=identity.name,
                    renew_after_seconds=self._settings.renew_after_seconds,
                )

                def on_orders(orders: AgentOrders) -> None:
                    if orders.renew_certificate:
                        renewal.order()

                machine = this_machine()
                service = AgentService(
                    directory=directory,
                    open_source=open_local_disk,
                    connect=_Connector(self._path, executor),
                    control=control,
                    clock=clock,
                    draw_random=os.urandom,
                    executor=executor,
                    limits=self._settings.limits(),
                    machine=machine,
                    on_orders=on_orders,
                    tracking=tracking,
                    freeze=self._freeze_ports(directory, machine.boot_id, held_executor, freeze_executor),
                )
                await self._serve(service, renewal, stop)

    def _freeze_ports(
        self, directory: LocalDirectory, boot_id: str, held: ThreadPoolExecutor, executor: ThreadPoolExecutor
    ) -> FreezePorts:
        settings = self._settings.freeze
        return FreezePorts(
            freezer=Freezer(directory=directory, path=self._path, boot_id=boot_id, executor=executor),
            scripts=FreezeScripts(settings.scripts_directory, seconds_max=settings.script_seconds_max),
            executor=executor,
            held_executor=held,
            seconds_max=settings.seconds_max,
        )

    async def _serve(self, service: AgentService, renewal: CertificateRenewal, stop: StopSignal) -> None:
        registry = CollectorRegistry()
        register_process_metrics(registry, program=PROGRAM)
        register_certificate_expiry(registry, lambda: renewal.expires_seconds)
        AgentMetrics(registry, service)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, service.scan_now)
        try:
            async with (
                observability_endpoint(self._settings.observability, registry=registry, readiness=service.readiness),
                asyncio.TaskGroup() as group,
                control_socket(self._path, service, group),
            ):
                side_tasks = [group.create_task(renewal.run()), group.create_task(_stop_on(stop, service))]
                notify_ready()
                try:
                    await service.run()
                finally:
                    for task in side_tasks:
                        task.cancel()
        finally:
            loop.remove_signal_handler(signal.SIGUSR1)


class _Connector:
    """Connects with the certificate of the moment: a renewed one is used from the next connection on."""

    def __init__(self, path: Path, executor: ThreadPoolExecutor) -> None:
        self._path = path
        self._executor = executor

    async def __call__(self, address: ProcessServerAddress) -> channel.Channel:
        credentials, authority = self._path / CREDENTIALS_FILE, self._path / AUTHORITY_FILE
        context = await blocking(self._executor, lambda: tls.client_context(credentials, credentials, authority))
        return await channel.connect(address.host, address.port, tls=context)


async def _stop_on(stop: StopSignal, service: AgentService) -> None:
    await stop.wait()
    service.stop()
