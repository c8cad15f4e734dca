"""Azure Blob against a real Azurite: it passes the store contract, and every way in which a request can fail has its
type.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import re
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from azure.identity import CredentialUnavailableError
from azure.storage.blob.aio import BlobServiceClient

from farpoint.demo.azurite import ACCOUNT, KEY, Azurite, container_signature
from storage.backends.azure_address import AzureAddress, read_address
from storage.backends.azure_blob import AzureBlobStore
from storage.backends.object_store import ObjectStore
from storage.backends.open_store import open_store
from storage.backends.retrying import RetryingStore
from storage.errors import (
    ObjectExists,
    ObjectNotFound,
    StoreCredentialRefused,
    StoreFault,
    StoreFull,
    StoreMissing,
    StoreNotPermitted,
    StoreOutcomeUnknown,
    StoreUnavailable,
)
from tests.azurite.proxy import Fault, FaultyProxy, faulty_proxy
from tests.azurite.server import running_azurite
from tests.storage.backends.object_store_contract import ObjectStoreContract, names

HOUR = datetime.timedelta(hours=1)


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    with running_azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture
async def container(azurite: Azurite) -> AsyncIterator[str]:
    name = f"test-{uuid.uuid4().hex}"
    async with BlobServiceClient.from_connection_string(azurite.connection_string) as service:
        await service.create_container(name)
        yield name
        await service.delete_container(name)


def address_of(azurite: Azurite, container: str, *, prefix: str = "", **environment: str) -> AzureAddress:
    return read_address(
        f"azure://{ACCOUNT}/{container}/{prefix}?endpoint={azurite.endpoint}",
        credentials_file=None,
        environment=environment or {"AZURE_STORAGE_KEY": KEY},
    )


@asynccontextmanager
async def opened(address: AzureAddress) -> AsyncIterator[AzureBlobStore]:
    store = AzureBlobStore(address)
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
async def store(azurite: Azurite, container: str) -> AsyncIterator[ObjectStore]:
    async with opened(address_of(azurite, container, prefix="some/prefix")) as store:
        yield store


class TestAzureBlobKeepsTheContract(ObjectStoreContract):
    pass


async def test_a_prefix_hides_everything_beside_it(azurite: Azurite, container: str) -> None:
    async with (
        opened(address_of(azurite, container)) as whole,
        opened(address_of(azurite, container, prefix="site-1")) as part,
    ):
        await part.create("a/b", [b"x"])
        await whole.create("site-10/c", [b"x"])
        assert await names(whole) == ["site-1/a/b", "site-10/c"]
        assert await names(part) == ["a/b"]


async def test_an_object_above_the_single_request_limit_is_created_once_too(
    azurite: Azurite, container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.backends.azure_blob.SINGLE_REQUEST_BYTES_MAX", 2**20)
    monkeypatch.setattr("storage.backends.azure_blob.BLOCK_BYTES", 2**20)
    parts = [bytes([number]) * 700_000 for number in range(6)]
    async with opened(address_of(azurite, container)) as store:
        await store.create("large", parts)
        with pytest.raises(ObjectExists):
            await store.create("large", [b"y" * 3_000_000])
        assert await store.read("large") == b"".join(parts)


async def test_a_missing_container_is_a_missing_store(azurite: Azurite) -> None:
    async with opened(address_of(azurite, "not-there")) as store:
        for call in (lambda: store.create("a", [b"x"]), lambda: store.read("a"), lambda: names(store)):
            with pytest.raises(StoreMissing):
                await call()


async def refused(store: AzureBlobStore, kind: type[StoreFault]) -> str:
    """Every call is refused like this; what the last says."""
    said = ""
    for call in (lambda: store.create("a", [b"x"]), lambda: store.read("a"), lambda: names(store)):
        with pytest.raises(StoreFault) as caught:
            await call()
        assert isinstance(caught.value, kind)
        said = str(caught.value)
        assert "sig=" not in said
    return said


async def test_a_wrong_key_is_not_permitted(azurite: Azurite, container: str) -> None:
    async with opened(address_of(azurite, container, AZURE_STORAGE_KEY="d3Jvbmc=")) as store:
        await refused(store, StoreNotPermitted)


async def test_a_signature_that_has_ended_is_told_with_its_end(azurite: Azurite, container: str) -> None:
    signature = container_signature(container, permissions="rcl", lifetime=-HOUR)
    async with opened(address_of(azurite, container, AZURE_STORAGE_SAS_TOKEN=signature)) as store:
        assert re.search(r"signature ended at 20\d\d-", await refused(store, StoreCredentialRefused))


async def test_a_signature_that_ends_is_replaced_in_its_file_while_the_store_is_open(
    azurite: Azurite, container: str, tmp_path: Path
) -> None:
    file = tmp_path / "credentials"
    file.write_text(azurite.signed_connection_string(container, permissions="rcl", lifetime=-HOUR))
    address = read_address(f"azure://{ACCOUNT}/{container}", credentials_file=file, environment={})
    async with opened(address) as store:
        await refused(store, StoreCredentialRefused)
        file.write_text(azurite.signed_connection_string(container, permissions="rcl", lifetime=HOUR))
        await store.create("a", [b"x"])
        assert await store.read("a") == b"x"


async def test_a_signature_for_another_container_is_not_permitted(azurite: Azurite, container: str) -> None:
    signature = container_signature("another", permissions="rcl", lifetime=HOUR)
    async with opened(address_of(azurite, container, AZURE_STORAGE_SAS_TOKEN=signature)) as store:
        await refused(store, StoreNotPermitted)


async def test_whoever_may_only_create_is_told_that_an_object_exists(azurite: Azurite, container: str) -> None:
    """By the service it is told as a lack of permission, which a repeated upload must not be stopped by."""
    signature = container_signature(container, permissions="rcl", lifetime=HOUR)
    async with opened(address_of(azurite, container, AZURE_STORAGE_SAS_TOKEN=signature)) as store:
        await store.create("a/b", [b"x"])
        with pytest.raises(ObjectExists):
            await store.create("a/b", [b"y"])
        assert await store.read("a/b") == b"x"


async def test_whoever_may_not_create_is_told_so(azurite: Azurite, container: str) -> None:
    for permissions in ("rl", "l"):
        signature = container_signature(container, permissions=permissions, lifetime=HOUR)
        async with opened(address_of(azurite, container, AZURE_STORAGE_SAS_TOKEN=signature)) as store:
            with pytest.raises(StoreNotPermitted):
                await store.create("a/b", [b"x"])


async def test_open_store_takes_a_connection_string_from_a_file(
    azurite: Azurite, container: str, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text(azurite.connection_string + "\n")
    store = open_store(f"azure://{ACCOUNT}/{container}/p", credentials_file=tmp_path / "credentials")
    await store.create("a", [b"x"])
    assert await store.read("a") == b"x"
    assert store.url == f"azure://{ACCOUNT}/{container}/p"
    await store.close()


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def test_a_service_that_is_not_there_has_certainly_created_nothing() -> None:
    nobody = Azurite(origin=f"http://127.0.0.1:{unused_port()}")
    async with opened(address_of(nobody, "container")) as store:
        with pytest.raises(StoreUnavailable) as caught:
            await store.create("a", [b"x"])
        assert type(caught.value) is StoreUnavailable
        with pytest.raises(StoreUnavailable):
            await store.read("a")
        with pytest.raises(StoreUnavailable):
            await names(store)


@dataclasses.dataclass(kw_only=True)
class Broken:
    """A store behind a proxy."""

    store: AzureBlobStore
    proxy: FaultyProxy

    async def expect(self, kind: type[StoreFault], call: Awaitable[object]) -> None:
        """The call fails like this, after one request only."""
        before = len(self.proxy.requests)
        with pytest.raises(StoreFault) as caught:
            await call
        assert type(caught.value) is kind
        assert len(self.proxy.requests) == before + 1


@pytest.fixture
async def broken(azurite: Azurite, container: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Broken]:
    monkeypatch.setattr("storage.backends.azure_blob.SILENCE_SECONDS_MAX", 1)
    async with faulty_proxy(azurite) as proxy, opened(address_of(proxy.azurite, container)) as store:
        await store.create("there", [b"x" * 300_000])
        yield Broken(store=store, proxy=proxy)


@pytest.mark.parametrize("fault", [Fault.LOST_REPLY, Fault.GATEWAY_ERROR, Fault.SILENCE])
async def test_a_creation_whose_reply_is_lost_was_sent_once_and_its_outcome_is_unknown(
    broken: Broken, fault: Fault
) -> None:
    broken.proxy.choose = lambda request: fault
    await broken.expect(StoreOutcomeUnknown, broken.store.create("a", [b"y" * 300_000]))
    broken.proxy.choose = lambda request: Fault.NONE
    assert await broken.store.read("a") == b"y" * 300_000


@pytest.mark.parametrize(
    ("fault", "size_bytes"), [(Fault.RESET, 300_000), (Fault.HALF_REQUEST, 3_000_000), (Fault.DEAF, 50_000_000)]
)
async def test_a_creation_that_is_cut_off_was_sent_once_and_leaves_no_part(
    broken: Broken, fault: Fault, size_bytes: int
) -> None:
    broken.proxy.choose = lambda request: fault
    await broken.expect(StoreOutcomeUnknown, broken.store.create("a", [b"y" * size_bytes]))
    broken.proxy.choose = lambda request: Fault.NONE
    with pytest.raises(ObjectNotFound):
        await broken.store.read("a")


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.THROTTLED])
async def test_a_busy_service_has_created_nothing_and_says_how_long_to_wait(broken: Broken, fault: Fault) -> None:
    broken.proxy.choose = lambda request: fault
    for retry_after, seconds in (("", 0.0), ("7", 7.0), ("100000", 60.0), ("Fri, 20 Nov 2026 10:00:00 GMT", 0.0)):
        broken.proxy.retry_after = retry_after
        with pytest.raises(StoreUnavailable) as caught:
            await broken.store.create("a", [b"y"])
        assert type(caught.value) is StoreUnavailable
        assert caught.value.retry_after_seconds == seconds
    broken.proxy.choose = lambda request: Fault.NONE
    await broken.store.create("a", [b"y"])


@pytest.mark.parametrize(
    "fault",
    [
        Fault.LOST_REPLY, Fault.GATEWAY_ERROR, Fault.SILENCE, Fault.BUSY, Fault.THROTTLED, Fault.RESET, Fault.DEAF,
        Fault.HALF_REPLY,
    ],
)  # fmt: skip
async def test_whatever_breaks_a_read_or_a_listing_is_a_passing_fault_after_one_request(
    broken: Broken, fault: Fault
) -> None:
    broken.proxy.choose = lambda request: fault
    await broken.expect(StoreUnavailable, broken.store.read("there"))
    await broken.expect(StoreUnavailable, broken.store.read("there", first_byte=5, end_byte=100_000))
    await broken.expect(StoreUnavailable, names(broken.store))
    if fault is not Fault.HALF_REPLY:  # an answer without a body has no half
        await broken.expect(StoreUnavailable, broken.store.info("there"))


async def test_a_slow_answer_is_an_answer(broken: Broken) -> None:
    broken.proxy.choose = lambda request: Fault.SLOW
    await broken.store.create("a", [b"y" * 100_000])
    assert await broken.store.read("a") == b"y" * 100_000
    assert await names(broken.store) == ["a", "there"]


async def test_an_object_is_read_by_one_request(broken: Broken) -> None:
    parts = [bytes([number]) * 2**20 for number in range(40)]
    await broken.store.create("large", parts)
    for first_byte, end_byte in ((0, None), (5, None), (2**20, 39 * 2**20)):
        broken.proxy.requests.clear()
        assert (
            await broken.store.read("large", first_byte=first_byte, end_byte=end_byte)
            == b"".join(parts)[first_byte:end_byte]
        )
        assert len(broken.proxy.requests) == 1


async def test_a_creation_with_unknown_outcome_is_not_repeated_by_the_retrying_store(broken: Broken) -> None:
    broken.proxy.choose = lambda request: Fault.LOST_REPLY
    await broken.expect(StoreOutcomeUnknown, RetryingStore(broken.store).create("a", [b"x"]))


async def test_the_retrying_store_asks_a_busy_service_not_earlier_than_it_says(broken: Broken) -> None:
    broken.proxy.retry_after = "1"
    broken.proxy.choose = lambda request: Fault.BUSY if len(broken.proxy.of("PUT", "a")) < 2 else Fault.NONE
    await RetryingStore(broken.store).create("a", [b"x"])
    sent = [request.seconds for request in broken.proxy.of("PUT", "a")]
    assert len(sent) == 3
    assert all(later - earlier >= 1.0 for earlier, later in itertools.pairwise(sent))


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def service(handler: Handler) -> AsyncIterator[Azurite]:
    """An HTTP service that answers what Azurite cannot be made to answer."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield Azurite(origin=f"http://127.0.0.1:{runner.addresses[0][1]}")
    finally:
        await runner.cleanup()


def answering(status: int, code: str) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        await request.read()
        return web.Response(status=status, headers={"x-ms-error-code": code})

    return answer


@pytest.mark.parametrize(
    ("status", "code", "of_create", "of_read"),
    [
        (409, "BlobAlreadyExists", ObjectExists, StoreFault),
        (412, "ConditionNotMet", ObjectExists, StoreFault),
        (409, "ContainerBeingDeleted", StoreMissing, StoreMissing),
        (404, "ContainerNotFound", StoreMissing, StoreMissing),
        (404, "BlobNotFound", ObjectNotFound, ObjectNotFound),
        (401, "NoAuthenticationInformation", StoreCredentialRefused, StoreCredentialRefused),
        (403, "AuthenticationFailed", StoreCredentialRefused, StoreCredentialRefused),
        (403, "KeyBasedAuthenticationNotPermitted", StoreCredentialRefused, StoreCredentialRefused),
        (403, "AuthorizationFailure", StoreNotPermitted, StoreNotPermitted),
        (403, "UnauthorizedBlobOverwrite", ObjectExists, StoreNotPermitted),
        (403, "AuthorizationPermissionMismatch", StoreNotPermitted, StoreNotPermitted),
        (403, "AccountIsDisabled", StoreNotPermitted, StoreNotPermitted),
        (507, "InsufficientStorage", StoreFull, StoreFull),
        (503, "ServerBusy", StoreUnavailable, StoreUnavailable),
        (429, "TooManyRequests", StoreUnavailable, StoreUnavailable),
        (503, "", StoreOutcomeUnknown, StoreUnavailable),
        (500, "InternalError", StoreOutcomeUnknown, StoreUnavailable),
        (500, "OperationTimedOut", StoreOutcomeUnknown, StoreUnavailable),
        (504, "", StoreOutcomeUnknown, StoreUnavailable),
        (408, "", StoreOutcomeUnknown, StoreUnavailable),
        (400, "InvalidUri", StoreFault, StoreFault),
        (302, "", StoreFault, StoreFault),
    ],
)
async def test_every_answer_of_the_service_has_its_type(
    status: int, code: str, of_create: type[StoreFault], of_read: type[StoreFault]
) -> None:
    async with service(answering(status, code)) as address, opened(address_of(address, "container")) as store:
        with pytest.raises(StoreFault) as caught:
            await store.create("a", [b"x"])
        assert type(caught.value) is of_create
        for call in (lambda: store.read("a"), lambda: store.info("a")):
            with pytest.raises(StoreFault) as caught:
                await call()
            assert type(caught.value) is of_read


async def test_a_listing_out_of_byte_order_is_refused() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        blobs = "".join(
            f"<Blob><Name>{name}</Name><Properties><Last-Modified>Fri, 20 Nov 2026 00:00:00 GMT</Last-Modified>"
            "<Content-Length>1</Content-Length><BlobType>BlockBlob</BlobType></Properties></Blob>"
            for name in ("a/b", "a-b")
        )
        listing = f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker /></EnumerationResults>"
        return web.Response(text=f'<?xml version="1.0" encoding="utf-8"?>{listing}', content_type="application/xml")

    async with service(answer) as address, opened(address_of(address, "container")) as store:
        with pytest.raises(StoreFault, match="byte order"):
            await names(store)


async def test_a_machine_without_any_credential_is_told_to_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoIdentity:
        async def get_token(self, *scopes: str, **options: object) -> None:
            raise CredentialUnavailableError(message="nothing here")

        async def close(self) -> None:
            return

    monkeypatch.setattr("storage.backends.azure_blob.DefaultAzureCredential", NoIdentity)
    async with opened(read_address("azure://backups/vault", credentials_file=None, environment={})) as store:
        said = await refused(store, StoreCredentialRefused)
    assert "no credentials file was given" in said
