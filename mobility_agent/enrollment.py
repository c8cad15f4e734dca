"""The agent's membership of its vault: enrolling with a join token, and a fresh certificate every day.

Invariant: certificate and key lie in one file that is replaced whole, so that a renewal never leaves a pair that
does not fit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Final, Protocol

import structlog
from cryptography import x509

from mobility_agent.blocking import blocking
from mobility_agent.errors import AlreadyEnrolled, NotEnrolled
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

log = structlog.get_logger(__name__)


class Renewing(Protocol):
    """protocol.transport.control_client.AgentControlClient fits."""

    async def renew(self, request_pem: str) -> CertificateBundle: ...

    async def reload_credentials(self, authority_pem: bytes) -> None: ...


async def enroll_agent(directory: LocalDirectory, *, server_url: str, token: JoinToken, name: str) -> EnrolledIdentity:
    """Makes this machine a member; everything is durable on return.

    Raises AlreadyEnrolled, and what protocol.transport.control_client.enroll raises.
    """
    if IDENTITY_FILE in directory.names():
        raise AlreadyEnrolled(directory=str(directory.path))
    bundle = await enroll(server_url=server_url, token=token, role=Role.AGENT, name=name)
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
    """Renews the certificate when it is old enough, or when the configuration server says so."""

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
        self._ordered = asyncio.Event()

    def order(self) -> None:
        """Renew now."""
        self._ordered.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            pause = LOOK_SECONDS
            try:
                if self._ordered.is_set() or await blocking(self._executor, self._is_old):
                    await self.renew()
                    self._ordered.clear()
            except ReplicationError as error:
                log.warning("certificate not renewed", error=str(error), hint=error.hint)
                pause = RETRY_SECONDS
            await self._wait(pause, early=self._ordered.is_set)

    async def renew(self) -> None:
        """One renewal; the new certificate is durable and in use for new connections on return."""
        key = await blocking(self._executor, lambda: make_certificate_key(self._name))
        bundle = await self._control.renew(key.request_pem)
        authority = bundle.authority_pem.encode()

        def write() -> None:
            self._directory.replace(AUTHORITY_FILE, authority)
            self._directory.replace(CREDENTIALS_FILE, credentials_pem(bundle, key))

        await blocking(self._executor, write)
        await self._control.reload_credentials(authority)
        log.info("certificate renewed")

    async def _wait(self, seconds: float, *, early: Callable[[], bool]) -> None:
        if early():
            # why: an order that could not be carried out is not tried again in a tight loop.
            await asyncio.sleep(seconds)
            return
        try:
            async with asyncio.timeout(seconds):
                await self._ordered.wait()
        except TimeoutError:
            return

    def _is_old(self) -> bool:
        """Whether the leaf is past its age. A clock that jumped back counts as old: renewing is always allowed."""
        leaf = x509.load_pem_x509_certificate(self._directory.read(CREDENTIALS_FILE))
        age = self._clock.now_ns() / 1e9 - leaf.not_valid_before_utc.timestamp()
        return not 0 <= age < self._renew_after_seconds
