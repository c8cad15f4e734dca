"""A renewed certificate replaces the old one whole, and the signing key that the grants name stays."""

from __future__ import annotations

import asyncio
import errno
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from protocol.control import CertificateBundle
from protocol.control_errors import ServerUnreachable
from protocol.enrollment import AUTHORITY_FILE, CREDENTIALS_FILE, IDENTITY_FILE, LEAF_LIFETIME, SIGNING_KEY_FILE
from protocol.join_token import JoinToken
from protocol.vocabulary import Role
from runtime import membership
from runtime.clock import SystemClock
from runtime.errors import AlreadyEnrolled, NotEnrolled
from runtime.local_directory import LocalDirectory
from runtime.membership import CertificateRenewal, enroll_member, read_identity
from tests.protocol.transport.certificates import DAY, PROCESS_SERVER, Authority


class Server:
    """Answers renewals with a certificate of the test's authority; only the files matter here."""

    def __init__(self, certificate_pem: str, authority_pem: str) -> None:
        self.bundle = CertificateBundle(certificate_pem=certificate_pem, authority_pem=authority_pem)
        self.is_away = False
        self.renewals = 0
        self.reloads: list[bytes] = []

    async def renew(self, request_pem: str) -> CertificateBundle:
        self.renewals += 1
        if self.is_away:
            raise ServerUnreachable(server="https://test", reason="away")
        return self.bundle

    async def reload_credentials(self, authority_pem: bytes) -> None:
        self.reloads.append(authority_pem)


@pytest.fixture
def directory(tmp_path: Path) -> LocalDirectory:
    leaf = Authority(tmp_path).issue(PROCESS_SERVER.uri, valid_from=-30 * DAY, valid_to=LEAF_LIFETIME - DAY)
    directory = LocalDirectory(tmp_path / "state")
    directory.replace(CREDENTIALS_FILE, leaf.path.read_bytes())
    directory.replace(AUTHORITY_FILE, leaf.authority_path.read_bytes())
    directory.replace(SIGNING_KEY_FILE, b"the signing key")
    return directory


def renewal(directory: LocalDirectory, server: Server, executor: ThreadPoolExecutor, age: float) -> CertificateRenewal:
    return CertificateRenewal(
        directory=directory,
        control=server,
        clock=SystemClock(),
        executor=executor,
        name="ps",
        renew_after_seconds=age,
    )


async def run_until(renewing: CertificateRenewal, condition: asyncio.Event) -> None:
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        task = group.create_task(renewing.run())
        await condition.wait()
        task.cancel()


async def test_an_old_certificate_is_renewed_with_a_new_key_and_the_signing_key_stays(
    directory: LocalDirectory,
) -> None:
    before = directory.read(CREDENTIALS_FILE)
    server = Server("NEW CERTIFICATE", "NEW AUTHORITY")
    renewed = asyncio.Event()
    with ThreadPoolExecutor(1) as executor:
        renewing = renewal(directory, server, executor, age=60.0)
        renewing.on_renewed = renewed.set
        # why: what is written is no certificate, so the loop must not look at it again before it is cancelled.
        await run_until(renewing, renewed)
    after = directory.read(CREDENTIALS_FILE)
    assert after != before
    assert after.startswith(b"NEW CERTIFICATE\n-----BEGIN")
    assert directory.read(AUTHORITY_FILE) == b"NEW AUTHORITY"
    assert server.reloads == [b"NEW AUTHORITY"]
    assert directory.read(SIGNING_KEY_FILE) == b"the signing key"


async def test_a_failed_renewal_keeps_the_certificate(directory: LocalDirectory) -> None:
    before = directory.read(CREDENTIALS_FILE)
    server = Server("NEW CERTIFICATE", "NEW AUTHORITY")
    server.is_away = True
    with ThreadPoolExecutor(1) as executor, pytest.raises(ServerUnreachable):
        await renewal(directory, server, executor, age=60.0).renew()
    assert directory.read(CREDENTIALS_FILE) == before
    assert not server.reloads


def test_a_certificate_that_begins_with_its_authority_is_as_old_as_its_issue(directory: LocalDirectory) -> None:
    with ThreadPoolExecutor(1) as executor:
        server = Server("NEW", "NEW")
        young, old = (renewal(directory, server, executor, age=days * 86400.0) for days in (1.01, 0.99))
        assert not young.is_old()
        assert old.is_old()
        assert young.expires_seconds == pytest.approx(time.time() + 13 * 86400, abs=60)


async def test_a_young_certificate_is_renewed_only_when_it_is_ordered(directory: LocalDirectory) -> None:
    server = Server("NEW CERTIFICATE", "NEW AUTHORITY")
    renewed = asyncio.Event()
    with ThreadPoolExecutor(1) as executor:
        renewing = renewal(directory, server, executor, age=13 * 86400.0)
        renewing.on_renewed = renewed.set
        assert not renewing.is_old()
        renewing.order()
        await run_until(renewing, renewed)
    assert server.renewals == 1


class FullDirectory(LocalDirectory):
    """Takes nothing more until there is room."""

    is_full = True

    def replace(self, name: str, data: bytes) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().replace(name, data)


async def test_a_full_state_directory_ends_nothing_and_the_renewal_is_tried_again(
    directory: LocalDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "RETRY_SECONDS", 0.01)
    full = FullDirectory(directory.path)
    server = Server("NEW CERTIFICATE", "NEW AUTHORITY")
    renewed = asyncio.Event()
    with ThreadPoolExecutor(1) as executor:
        renewing = renewal(full, server, executor, age=60.0)
        renewing.on_renewed = renewed.set
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            task = group.create_task(renewing.run())
            while server.renewals < 2:
                await asyncio.sleep(0)
                renewing.order()
            assert full.read(CREDENTIALS_FILE).startswith(b"-----BEGIN")
            full.is_full = False
            while not renewed.is_set():
                await asyncio.sleep(0)
                renewing.order()
            task.cancel()


def test_a_certificate_that_cannot_be_read_is_renewed(directory: LocalDirectory) -> None:
    directory.replace(CREDENTIALS_FILE, b"torn")
    with ThreadPoolExecutor(1) as executor:
        assert renewal(directory, Server("NEW", "NEW"), executor, age=13 * 86400.0).is_old()


async def test_an_enrolled_directory_is_never_enrolled_again(directory: LocalDirectory) -> None:
    with pytest.raises(NotEnrolled) as caught:
        read_identity(directory, program="process-server")
    assert "process-server enroll" in caught.value.hint
    directory.replace(IDENTITY_FILE, b"{}")
    token = JoinToken(identifier="ab" * 16, secret=bytes(32), authority_key_hash=bytes(32))
    with pytest.raises(AlreadyEnrolled):
        await enroll_member(
            directory, server_url="https://127.0.0.1:1", token=token, role=Role.PROCESS_SERVER, name="ps"
        )
