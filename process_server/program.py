"""The process server as a program: the service with production's ports, the listener, the endpoint, the renewal."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Final

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from prometheus_client import CollectorRegistry

from process_server.errors import StoreNotSet
from process_server.service import ProcessServer, ProcessServerPorts
from process_server.settings import PROGRAM, ProcessServerSettings
from protocol.enrollment import AUTHORITY_FILE, CREDENTIALS_FILE, SIGNING_KEY_FILE, read_signing_key
from protocol.transport.buffers import BufferPool
from protocol.transport.channel import listen
from protocol.transport.control_client import ProcessServerControlClient
from protocol.transport.tls import IdentityContext, server_context
from runtime.clock import SystemClock
from runtime.local_directory import LocalDirectory
from runtime.locks import exclusive_lock
from runtime.membership import CertificateRenewal, read_identity
from runtime.metrics import register_certificate_expiry, register_process_metrics
from runtime.observability import observability_endpoint
from runtime.service import StopSignal, notify_ready
from storage.backends.open_store import open_store
from storage.disk_archive import DiskArchive
from storage.errors import StoreUnavailable

LOCK_FILE: Final = ".lock"
FILE_THREADS: Final = 3
"""One writes the cache, the others read it for uploads and keep the state."""
STORE_THREADS: Final = 4
FIND_VAULT_SECONDS_MAX: Final = 10.0
FRAME_BUFFERS: Final = 40
"""Received bodies that are not yet sealed, over all connections; 42 MiB."""

_log = structlog.get_logger("process_server.program")


class ProcessServerProgram:
    """`run_service(ProcessServerProgram(settings).run)`.

    Raises NotEnrolled, StateLocked, PortTaken, AddressTaken, StoreNotSet, StoreMissing, NotAVault and what else
    start-up finds.
    """

    def __init__(self, settings: ProcessServerSettings) -> None:
        self._settings = settings
        self._path = settings.state_directory

    async def run(self, stop: StopSignal) -> None:
        """Until `stop`."""
        settings = self._settings
        if not settings.store:
            raise StoreNotSet()
        async with AsyncExitStack() as stack:
            stack.enter_context(exclusive_lock(self._path / LOCK_FILE))
            stack.enter_context(exclusive_lock(settings.cache_path / LOCK_FILE))
            directory = LocalDirectory(self._path)
            identity = read_identity(directory, program=PROGRAM)
            files = stack.enter_context(ThreadPoolExecutor(FILE_THREADS, thread_name_prefix="files"))
            sealing = stack.enter_context(ThreadPoolExecutor(settings.sealing_threads, thread_name_prefix="seal"))
            stores = stack.enter_context(ThreadPoolExecutor(STORE_THREADS, thread_name_prefix="store"))
            store = open_store(settings.store, credentials_file=settings.store_credentials_file, executor=stores)
            stack.push_async_callback(store.close)
            authority = Ed25519PublicKey.from_public_bytes(identity.vault_authority_public_key)
            archive = DiskArchive(store, vault=identity.peer.vault, authority=authority)
            await _find_vault(archive)
            control = await stack.enter_async_context(
                ProcessServerControlClient(
                    server_url=identity.server_url,
                    authority_pem=directory.read(AUTHORITY_FILE),
                    credentials_path=str(self._path / CREDENTIALS_FILE),
                )
            )
            renewal = CertificateRenewal(
                directory=directory,
                control=control,
                clock=SystemClock(),
                executor=files,
                name=identity.name,
                renew_after_seconds=settings.renew_after_seconds,
            )
            ports = ProcessServerPorts(
                identity=identity.peer,
                signing_key=read_signing_key(directory.read(SIGNING_KEY_FILE)),
                cache=LocalDirectory(settings.cache_path),
                state=directory,
                archive=archive,
                control=control,
                clock=SystemClock(),
                random_bytes=os.urandom,
                sealing_executor=sealing,
                cache_executor=files,
                host=settings.host,
                port=settings.listen_address.port,
                registry=CollectorRegistry(),
                on_renewal_due=renewal.order,
            )
            await self._serve(ports, renewal, stop)

    async def _serve(self, ports: ProcessServerPorts, renewal: CertificateRenewal, stop: StopSignal) -> None:
        settings = self._settings
        register_process_metrics(ports.registry, program=PROGRAM)
        register_certificate_expiry(ports.registry, lambda: renewal.expires_seconds)
        server = ProcessServer(ports, settings.limits())
        async with (
            observability_endpoint(settings.observability, registry=ports.registry, readiness=server.not_ready),
            asyncio.TaskGroup() as group,
        ):
            listener = await listen(
                settings.listen_address.host,
                settings.listen_address.port,
                tls=self._context(),
                pool=BufferPool(FRAME_BUFFERS),
                on_channel=server.serve_channel,
                task_group=group,
            )
            renewal.on_renewed = lambda: listener.use_context(self._context())
            helpers = [group.create_task(renewal.run()), group.create_task(_stop_on(stop, server))]
            notify_ready()
            try:
                await server.run()
            finally:
                await listener.close()
                for task in helpers:
                    task.cancel()

    def _context(self) -> IdentityContext:
        """With the certificate of the moment. Revoked certificates are refused by the service, live ones too."""
        credentials = self._path / CREDENTIALS_FILE
        return server_context(credentials, credentials, self._path / AUTHORITY_FILE)


async def _find_vault(archive: DiskArchive) -> None:
    """Looks before anything is written: where a file system is not mounted lies an empty directory, and no vault.

    A store that is only away keeps nobody from starting: the cache takes what comes. Raises NotAVault, ObjectCorrupt,
    FormatNotSupported, and what StoreFault no retry mends.
    """
    try:
        async with asyncio.timeout(FIND_VAULT_SECONDS_MAX):
            await archive.read_vault()
    except (TimeoutError, StoreUnavailable) as error:
        _log.warning("the store is away", reason=str(error) or "no answer in time")


async def _stop_on(stop: StopSignal, server: ProcessServer) -> None:
    await stop.wait()
    server.stop()
