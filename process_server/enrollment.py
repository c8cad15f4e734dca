"""The process server's membership of its vault: enrolling with a join token, and a fresh certificate every day.

Invariant: certificate and key lie in one file that is replaced whole; the signing key that the grants name is made once
and stays, whatever happens to the certificate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final, Protocol

import structlog
from cryptography import x509

from process_server.errors import AlreadyEnrolled, NotEnrolled
from protocol.control import CertificateBundle
from protocol.enrollment import (
    AUTHORITY_FILE,
    CREDENTIALS_FILE,
    IDENTITY_FILE,
    EnrolledIdentity,
    credentials_pem,
    make_certificate_key,
)
from protocol.errors import ReplicationError
from protocol.join_token import JoinToken
from protocol.transport.control_client import enroll
from protocol.vocabulary import Role
from runtime.clock import Clock
from runtime.local_directory import LocalDirectory

LOOK_SECONDS: Final = 60.0
"""How often the certificate's age is looked at."""
RETRY_SECONDS: Final = 600.0

_log = structlog.get_logger("process_server.enrollment")


class Renewing(Protocol):
    """protocol.transport.control_client.ProcessServerControlClient fits."""

    async def renew(self, request_pem: str) -> CertificateBundle: ...

    async def reload_credentials(self, authority_pem: bytes) -> None: ...


async def enroll_process_server(
    directory: LocalDirectory, *, server_url: str, token: JoinToken, name: str
) -> EnrolledIdentity:
    """Becomes a member; everything is durable on return.

    Raises AlreadyEnrolled, and what protocol.transport.control_client.enroll raises.
    """
    if IDENTITY_FILE in directory.names():
        raise AlreadyEnrolled(directory=str(directory.path))
    bundle = await enroll(server_url=server_url, token=token, role=Role.PROCESS_SERVER, name=name)
    for file_name, contents in bundle.files():
        directory.replace(file_name, contents)
    return bundle.identity


def read_identity(directory: LocalDirectory) -> EnrolledIdentity:
    """Raises NotEnrolled, IdentityFileInvalid."""
    try:
        return EnrolledIdentity.decode(directory.read(IDENTITY_FILE))
    except FileNotFoundError as error:
        raise NotEnrolled(directory=str(directory.path)) from error


class CertificateRenewal:
    """Renews when the certificate is old enough, or when the configuration server says so."""

    def __init__(
        self,
        *,
        directory: LocalDirectory,
        control: Renewing,
        clock: Clock,
        executor: Executor,
        name: str,
        renew_after_seconds: float,
    ) -> None:
        self._directory = directory
        self._control = control
        self._clock = clock
        self._executor = executor
        self._name = name
        self._renew_after_seconds = renew_after_seconds
        self.on_renewed: Callable[[], None] = lambda: None
        """Called when the new certificate is durable."""
        self._ordered = asyncio.Event()

    def order(self) -> None:
        """Renew now."""
        self._ordered.set()

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                if self._ordered.is_set() or await loop.run_in_executor(self._executor, self._is_old):
                    await self.renew()
                    self._ordered.clear()
            except ReplicationError as error:
                _log.warning("certificate not renewed", code=error.code, reason=str(error), hint=error.hint)
                # why: an order that could not be carried out is not tried again in a tight loop.
                await asyncio.sleep(RETRY_SECONDS)
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._ordered.wait()
            except TimeoutError:
                continue

    async def renew(self) -> None:
        """One renewal; the new certificate is durable, and in use for what is connected from now on."""
        loop = asyncio.get_running_loop()
        key = await loop.run_in_executor(self._executor, lambda: make_certificate_key(self._name))
        bundle = await self._control.renew(key.request_pem)
        authority = bundle.authority_pem.encode()

        def write() -> None:
            self._directory.replace(AUTHORITY_FILE, authority)
            self._directory.replace(CREDENTIALS_FILE, credentials_pem(bundle, key))

        await loop.run_in_executor(self._executor, write)
        await self._control.reload_credentials(authority)
        self.on_renewed()
        _log.info("certificate renewed")

    def _is_old(self) -> bool:
        """Whether the leaf is past its age. A clock that jumped back counts as old: renewing is always allowed."""
        leaf = x509.load_pem_x509_certificate(self._directory.read(CREDENTIALS_FILE))
        age_seconds = self._clock.now_ns() / 1e9 - leaf.not_valid_before_utc.timestamp()
        return not 0 <= age_seconds < self._renew_after_seconds
