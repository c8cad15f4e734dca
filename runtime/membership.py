"""A program's membership of its vault: enrolling with a join token, and a fresh certificate every day.

Invariants: certificate and key lie in one file that is replaced whole, so that a renewal never leaves a pair that does
not fit; the signing key that grants name is made once and stays, whatever happens to the certificate; a renewal that
fails, for whatever reason, is tried again and ends nothing.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Final, Protocol

import structlog
from cryptography import x509

from protocol.control import CertificateBundle
from protocol.enrollment import (
    AUTHORITY_FILE,
    CREDENTIALS_FILE,
    IDENTITY_FILE,
    LEAF_LIFETIME,
    EnrolledIdentity,
    credentials_pem,
    make_certificate_key,
)
from protocol.errors import ReplicationError
from protocol.join_token import JoinToken
from protocol.transport.control_client import enroll
from protocol.vocabulary import Role
from runtime.clock import Clock
from runtime.errors import AlreadyEnrolled, NotEnrolled
from runtime.local_directory import LocalDirectory
from runtime.locks import exclusive_lock
from runtime.privileges import become_owner_of
from runtime.secrets import read_secret

LOOK_SECONDS: Final = 60.0
"""How often the certificate's age is looked at."""
RETRY_SECONDS: Final = 600.0

_log = structlog.get_logger("runtime.membership")


class Renewing(Protocol):
    """The control clients of protocol.transport.control_client fit."""

    async def renew(self, request_pem: str) -> CertificateBundle: ...

    async def reload_credentials(self, authority_pem: bytes) -> None: ...


def enroll_state_directory(
    path: Path, *, lock_file: str, server_url: str, token_file: Path, role: Role, name: str
) -> EnrolledIdentity:
    """What `enroll` does: makes the state directory a member's, root acting as its owner. Blocks.

    Raises SecretMissing, SecretUnreadable, JoinTokenMalformed, StateLocked, OSError, and what enroll_member raises.
    """
    token = JoinToken.parse(read_secret(token_file).decode("utf-8", "replace").strip())
    directory = LocalDirectory(path)
    become_owner_of(path)
    with exclusive_lock(path / lock_file):
        return asyncio.run(
            enroll_member(directory, server_url=server_url, token=token, role=role, name=name or socket.gethostname())
        )


async def enroll_member(
    directory: LocalDirectory, *, server_url: str, token: JoinToken, role: Role, name: str
) -> EnrolledIdentity:
    """Becomes a member; everything is durable on return.

    Raises AlreadyEnrolled, and what protocol.transport.control_client.enroll raises.
    """
    if IDENTITY_FILE in directory.names():
        raise AlreadyEnrolled(directory=str(directory.path))
    bundle = await enroll(server_url=server_url, token=token, role=role, name=name)
    for file_name, contents in bundle.files():
        directory.replace(file_name, contents)
    return bundle.identity


def read_identity(directory: LocalDirectory, *, program: str) -> EnrolledIdentity:
    """program: the command that enrols. Raises NotEnrolled, IdentityFileInvalid."""
    try:
        return EnrolledIdentity.decode(directory.read(IDENTITY_FILE))
    except FileNotFoundError as error:
        raise NotEnrolled(directory=str(directory.path), program=program) from error


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
        self.expires_seconds = math.nan
        """When the certificate ends, since the Unix epoch; not a number until it was looked at."""
        self._ordered = asyncio.Event()

    def order(self) -> None:
        """Renew now."""
        self._ordered.set()

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                if await loop.run_in_executor(self._executor, self.is_old) or self._ordered.is_set():
                    await self.renew()
                    self._ordered.clear()
            except (ReplicationError, OSError) as error:
                hint = error.hint if isinstance(error, ReplicationError) else ""
                _log.warning("certificate not renewed", reason=str(error), hint=hint)
                # why: an order that could not be carried out is not tried again in a tight loop.
                await asyncio.sleep(RETRY_SECONDS)
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._ordered.wait()
            except TimeoutError:
                continue

    async def renew(self) -> None:
        """One renewal; the new certificate is durable, and in use for what is connected from now on.

        Raises OSError if it cannot be kept, and what the control raises; the old one stays in use.
        """
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

    def is_old(self) -> bool:
        """Whether the leaf is past its age. Blocks. What cannot be read counts as old, and so does one from the future,
        of a clock that jumped back: renewing is always allowed."""
        try:
            leaf = x509.load_pem_x509_certificate(self._directory.read(CREDENTIALS_FILE))
        except (ValueError, x509.InvalidVersion):
            return True
        self.expires_seconds = leaf.not_valid_after_utc.timestamp()
        issued_seconds = (leaf.not_valid_after_utc - LEAF_LIFETIME).timestamp()
        age_seconds = self._clock.now_ns() / 1e9 - issued_seconds
        return not 0 <= age_seconds < self._renew_after_seconds
