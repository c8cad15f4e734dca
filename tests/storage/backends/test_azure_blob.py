"""Azure Blob against a real Azurite: it passes the store contract, and every way in which a request can fail has its
type.
"""

from __future__ import annotations

import asyncio
import datetime
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from azure.storage.blob import ContainerSasPermissions, generate_container_sas
from azure.storage.blob.aio import BlobServiceClient

from storage.backends.azure_address import AzureAddress, read_address
from storage.backends.azure_blob import AzureBlobStore
from storage.backends.object_store import ObjectStore
from storage.backends.open_store import open_store
from storage.backends.retrying import RetryingStore
from storage.errors import (
    ObjectExists,
    ObjectNotFound,
    StoreFault,
    StoreFull,
    StoreMissing,
    StoreNotPermitted,
    StoreOutcomeUnknown,
    StoreUnavailable,
)
from tests.azurite.server import ACCOUNT, KEY, Azurite, running_azurite
from tests.storage.backends.object_store_contract import ObjectStoreContract, names


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


async def test_a_wrong_key_is_not_permitted(azurite: Azurite, container: str) -> None:
    async with opened(address_of(azurite, container, AZURE_STORAGE_KEY="d3Jvbmc=")) as store:
        for call in (lambda: store.create("a", [b"x"]), lambda: store.read("a"), lambda: names(store)):
            with pytest.raises(StoreNotPermitted):
                await call()


async def test_a_signature_that_may_create_read_and_list_may_not_delete(azurite: Azurite, container: str) -> None:
    signature = generate_container_sas(
        ACCOUNT,
        container,
        account_key=KEY,
        permission=ContainerSasPermissions(read=True, create=True, list=True),
        expiry=datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1),
    )
    async with opened(address_of(azurite, container, AZURE_STORAGE_SAS_TOKEN=signature)) as store:
        await store.create("a/b", [b"x"])
        with pytest.raises((ObjectExists, StoreNotPermitted)):
            await store.create("a/b", [b"y"])
        assert await store.read("a/b") == b"x"
        assert await names(store) == ["a/b"]
        with pytest.raises(StoreNotPermitted) as caught:
            await store.delete("a/b")
        assert "sig=" not in str(caught.value)


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


@asynccontextmanager
async def cutting_proxy(
    azurite: Azurite, *, drop_reply_to: bytes, cut_request_after: int = 2**62
) -> AsyncIterator[Azurite]:
    """Forwards to Azurite; breaks a connection when the reply to a request beginning with `drop_reply_to` is due, or
    when `cut_request_after` bytes of it have gone through.
    """
    host, port = azurite.origin.removeprefix("http://").split(":")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection(host, int(port))
        newest_request = b""

        async def forward_requests() -> None:
            nonlocal newest_request
            passed = 0
            while data := await reader.read(65536):
                newest_request = data if data.startswith((b"PUT ", b"GET ", b"HEAD ", b"DELETE ")) else newest_request
                passed += len(data) if newest_request.startswith(drop_reply_to) else 0
                upstream_writer.write(data)
                await upstream_writer.drain()
                if passed > cut_request_after:
                    break

        async def forward_replies() -> None:
            while data := await upstream_reader.read(65536):
                if newest_request.startswith(drop_reply_to):
                    break
                writer.write(data)

        async with asyncio.TaskGroup() as group:
            directions = [group.create_task(forward_requests()), group.create_task(forward_replies())]
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            for direction in directions:
                direction.cancel()
        for end in (writer, upstream_writer):
            end.transport.abort()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield Azurite(origin=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")


async def test_a_lost_reply_to_a_creation_leaves_the_outcome_unknown(azurite: Azurite, container: str) -> None:
    async with (
        cutting_proxy(azurite, drop_reply_to=b"PUT ") as proxy,
        opened(address_of(proxy, container)) as store,
    ):
        with pytest.raises(StoreOutcomeUnknown):
            await store.create("a", [b"x" * 300_000])
        assert await store.read("a") == b"x" * 300_000


async def test_a_creation_cut_in_the_middle_leaves_the_outcome_unknown_and_no_part(
    azurite: Azurite, container: str
) -> None:
    async with (
        cutting_proxy(azurite, drop_reply_to=b"PUT ", cut_request_after=100_000) as proxy,
        opened(address_of(proxy, container)) as store,
    ):
        with pytest.raises(StoreOutcomeUnknown):
            await store.create("a", [b"x" * 3_000_000])
        with pytest.raises(ObjectNotFound):
            await store.read("a")


async def test_a_creation_with_unknown_outcome_is_not_repeated_by_the_retrying_store(
    azurite: Azurite, container: str
) -> None:
    async with (
        cutting_proxy(azurite, drop_reply_to=b"PUT ") as proxy,
        opened(address_of(proxy, container)) as store,
    ):
        with pytest.raises(StoreOutcomeUnknown):
            await RetryingStore(store).create("a", [b"x"])


async def test_a_lost_reply_to_anything_else_is_a_passing_fault(azurite: Azurite, container: str) -> None:
    async with (
        cutting_proxy(azurite, drop_reply_to=b"GET ") as proxy,
        opened(address_of(proxy, container)) as store,
    ):
        await store.create("a", [b"x"])
        for call in (lambda: store.read("a"), lambda: names(store)):
            with pytest.raises(StoreUnavailable) as caught:
                await call()
            assert type(caught.value) is StoreUnavailable


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
        (401, "NoAuthenticationInformation", StoreNotPermitted, StoreNotPermitted),
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


async def test_a_request_is_sent_once_only_because_retries_are_ours() -> None:
    requests = 0

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal requests
        requests += 1
        return web.Response(status=503, headers={"x-ms-error-code": "ServerBusy"})

    async with service(answer) as address, opened(address_of(address, "container")) as store:
        with pytest.raises(StoreUnavailable):
            await store.read("a")
    assert requests == 1


async def test_an_answer_that_is_cut_short_is_a_passing_fault() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Length": "1000", "Content-Range": "bytes 0-999/1000", "ETag": '"1"'}
        response = web.StreamResponse(status=206, headers=headers)
        await response.prepare(request)
        await response.write(b"x" * 10)
        assert request.transport is not None
        request.transport.abort()
        return response

    async with service(answer) as address, opened(address_of(address, "container")) as store:
        with pytest.raises(StoreUnavailable):
            await store.read("a", first_byte=0, end_byte=1000)


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
