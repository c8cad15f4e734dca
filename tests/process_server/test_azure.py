"""The process server on a real Azurite, with a credential that may create, read and list, through a proxy that breaks
its requests: what is committed is there, nothing is taken for a fork, and nobody is asked more often than agreed.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from azure.core.exceptions import HttpResponseError
from azure.storage.blob import BlobBlock, StandardBlobTier
from azure.storage.blob.aio import BlobClient, ContainerClient

from farpoint.demo.azurite import (
    ACCOUNT,
    FOLD_WORKER_PERMISSIONS,
    KEY,
    PROCESS_SERVER_PERMISSIONS,
    RECOVERY_PERMISSIONS,
    Azurite,
    container_signature,
)
from process_server.settings import ProcessServerLimits
from protocol.control import PublishPoint
from protocol.signed_records import PointMember, PointRecord, sign_point
from protocol.vocabulary import Consistency, PointId
from runtime.local_directory import LocalDirectory
from storage.backends.azure_address import read_address
from storage.backends.azure_blob import AzureBlobStore
from storage.backends.retrying import RetryingStore, RetryPolicy
from storage.disk_archive import DiskArchive
from storage.errors import StoreNotPermitted
from tests.azurite.proxy import Fault, FaultyProxy, Request, faulty_proxy
from tests.azurite.server import running_azurite
from tests.process_server.world import (
    DISK,
    DISK_BYTES,
    MACHINE,
    SMALL,
    VAULT,
    RunningServer,
    ScriptedAgent,
    World,
    eventually,
)

MEBIBYTE = 2**20
HOUR = datetime.timedelta(hours=1)
POINT = PointId("e1" * 16)
POLICY = RetryPolicy()
AT_ONCE = RetryPolicy(first_pause_seconds=0.01, pause_seconds_max=0.05, jitter_seconds=0.01)
PAUSES = ProcessServerLimits()
"""As they are in production."""

BREAKS_ONE_REQUEST = [fault for fault in Fault if fault not in (Fault.NONE, Fault.SLOW, Fault.DEAF)]


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    with running_azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@dataclass(kw_only=True)
class AzureWorld:
    """A world whose store is Azurite behind the proxy. sound: the archive as it is, by the account's key, past it."""

    world: World
    proxy: FaultyProxy
    sound: DiskArchive
    container: str
    azurite: Azurite
    stack: AsyncExitStack

    def store(self, azurite: Azurite, permissions: str) -> AzureBlobStore:
        """By a shared access signature."""
        signature = container_signature(self.container, permissions=permissions, lifetime=HOUR)
        return self._opened(azurite, {"AZURE_STORAGE_SAS_TOKEN": signature})

    def owner(self) -> AzureBlobStore:
        return self._opened(self.azurite, {"AZURE_STORAGE_KEY": KEY})

    def use(self, policy: RetryPolicy) -> None:
        """The process server's store."""
        self.world.store = RetryingStore(self.store(self.proxy.azurite, PROCESS_SERVER_PERMISSIONS), policy)

    def blob(self, name: str, permissions: str = PROCESS_SERVER_PERMISSIONS) -> BlobClient:
        """The SDK's own client, without anything of ours."""
        signature = container_signature(self.container, permissions=permissions, lifetime=HOUR)
        client = BlobClient(self.azurite.endpoint, self.container, name, credential=signature)
        self.stack.push_async_callback(client.close)
        return client

    def _opened(self, azurite: Azurite, environment: dict[str, str]) -> AzureBlobStore:
        url = f"azure://{ACCOUNT}/{self.container}?endpoint={azurite.endpoint}"
        store = AzureBlobStore(read_address(url, credentials_file=None, environment=environment))
        self.stack.push_async_callback(store.close)
        return store


@pytest.fixture
async def azure(azurite: Azurite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[AzureWorld]:
    monkeypatch.setattr("storage.backends.azure_blob.SILENCE_SECONDS_MAX", 1)
    container = f"test-{uuid.uuid4().hex}"
    async with AsyncExitStack() as stack:
        made = ContainerClient.from_connection_string(azurite.connection_string, container)
        await stack.enter_async_context(made)
        await made.create_container()
        world = World(path=tmp_path)
        azure = AzureWorld(
            world=world,
            proxy=await stack.enter_async_context(faulty_proxy(azurite)),
            sound=world.archive,
            container=container,
            azurite=azurite,
            stack=stack,
        )
        world.store = azure.owner()
        azure.sound = world.archive
        await world.begin()
        azure.use(AT_ONCE)
        yield azure


@dataclass(kw_only=True)
class Replication:
    """An agent that has opened the disk, what it has sent so far, and whether what it is told holds."""

    azure: AzureWorld
    running: RunningServer
    agent: ScriptedAgent
    expected: bytearray
    sent: int = 0

    async def send(self, count: int = 1) -> None:
        """Change sets of 300 KiB, each enough for a segment of its own."""
        for _ in range(count):
            self.sent += 1
            data = os.urandom(300 * 1024)
            offset = (self.sent * MEBIBYTE) % DISK_BYTES
            self.expected[offset : offset + len(data)] = data
            await self.agent.send_change_set(self.sent, {offset: data})

    async def until_all_is_committed(self) -> None:
        """And at every step on the way no more is told than lies in the store."""
        told = 0
        while told < self.sent:
            await self.agent.until(lambda told=told: told < self._committed() or self.agent.closed)
            assert not self.agent.closed, self.agent.closed
            told = self._committed()
            last = await self.azure.sound.last_segment(DISK, self.agent.opened[1].epoch)
            assert last is not None
            assert last.last_sequence >= told

    def failures(self, code: str) -> int:
        """Failed attempts of uploads."""
        return int(self.running.server.metrics.upload_failures.labels(code)._value.get())

    def _committed(self) -> int:
        return self.agent.positions[1].committed_sequence if 1 in self.agent.positions else 0


async def replication(azure: AzureWorld, running: RunningServer) -> Replication:
    agent = await running.agent()
    await agent.open()
    return Replication(azure=azure, running=running, agent=agent, expected=bytearray(DISK_BYTES))


async def expect_exact(azure: AzureWorld, done: Replication) -> None:
    """Each segment was created by one request, none was taken for another's, and the disk comes back."""
    assert max(Counter(azure.proxy.created).values()) == 1
    assert done.failures("history-forked") == 0
    azure.world.store = azure.owner()
    assert await azure.world.image() == done.expected


async def test_a_process_servers_whole_life_needs_no_more_than_create_read_and_list(azure: AzureWorld) -> None:
    world, proxy = azure.world, azure.proxy
    async with world.running() as running:
        one = await replication(azure, running)
        await one.send(3)
        await one.until_all_is_committed()
        member = PointMember(machine=MACHINE, disk=DISK, epoch=1, sequence=3)
        record = PointRecord(vault=VAULT, point=POINT, instant_ns=5, consistency=Consistency.CRASH, members=(member,))
        signed = sign_point(record, world.vault.authority.private_key)
        world.control.orders.append(PublishPoint(order="f0" * 16, point=POINT, record=signed))
        world.control.change()
        await eventually(lambda: not world.control.orders)
        proxy.choose = lambda request: Fault.BUSY
        await one.send(3)
        await one.agent.until_durable(6)
        await running.kill()
    proxy.choose = lambda request: Fault.NONE
    async with world.running() as running:  # what the cache holds goes up; the next epoch closes the one before
        again = await running.agent()
        opened = await again.open(epoch=1, acknowledged=6, wants_new=True)
        assert (opened.epoch, opened.parent_sequence) == (2, 6)
        await again.send_change_set(1, {0: b"n" * 4096})
        one.expected[:4096] = b"n" * 4096
        await again.until_committed(1)
        await running.kill()
    world.cache = LocalDirectory(world.path / "another-cache")
    world.grant(3)
    async with world.running() as running:  # an empty cache: the position comes from the store, and ends the epoch
        last = await running.agent()
        opened = await last.open(epoch=2, acknowledged=1)
        assert (opened.epoch, opened.parent_sequence) == (3, 1)
    assert {request.method for request, _ in proxy.requests} <= {"GET", "HEAD", "PUT"}
    assert 403 not in {status for _, status in proxy.answers}, "it asked for something that it may not do"
    assert any(name.endswith(".point") for name in proxy.created)
    world.store = azure.store(azure.azurite, RECOVERY_PERMISSIONS)
    assert await world.image() == one.expected


Attack = Callable[[BlobClient], Awaitable[object]]


async def _rewrite_blocks(blob: BlobClient) -> None:
    await blob.stage_block("MDE=", b"other")
    await blob.commit_block_list([BlobBlock("MDE=")])


ATTACKS: dict[str, Attack] = {
    "delete": lambda blob: blob.delete_blob(),
    "overwrite": lambda blob: blob.upload_blob(b"other", overwrite=True),
    "overwrite as an append blob": lambda blob: blob.create_append_blob(),
    "overwrite as a page blob": lambda blob: blob.create_page_blob(512),
    "rewrite its blocks": _rewrite_blocks,
    "move to the archive tier": lambda blob: blob.set_standard_blob_tier(StandardBlobTier.ARCHIVE),
    "change its metadata": lambda blob: blob.set_blob_metadata({"a": "b"}),
    "change its headers": lambda blob: blob.set_http_headers(),
    "lease": lambda blob: blob.acquire_lease(),
}


@pytest.mark.parametrize("attack", ATTACKS)
async def test_the_service_itself_lets_a_process_servers_credential_change_and_delete_nothing(
    azure: AzureWorld, attack: str
) -> None:
    name = f"vaults/{VAULT}/vault.json"
    before = await azure.owner().read(name)
    with pytest.raises(HttpResponseError) as caught:
        await ATTACKS[attack](azure.blob(name))
    assert caught.value.status_code == 403
    assert await azure.owner().read(name) == before


async def test_nothing_but_a_fold_workers_credential_deletes_and_it_creates_nothing(azure: AzureWorld) -> None:
    owner = azure.owner()
    await owner.create("a", [b"x"])
    for permissions in (PROCESS_SERVER_PERMISSIONS, RECOVERY_PERMISSIONS):
        with pytest.raises(StoreNotPermitted):
            await azure.store(azure.azurite, permissions).delete("a")
    worker = azure.store(azure.azurite, FOLD_WORKER_PERMISSIONS)
    with pytest.raises(StoreNotPermitted):
        await worker.create("b", [b"x"])
    await worker.delete("a")
    assert [info.name async for info in owner.list("a")] == []


@pytest.mark.parametrize("fault", BREAKS_ONE_REQUEST)
async def test_any_broken_upload_is_committed_once_and_exactly(azure: AzureWorld, fault: Fault) -> None:
    """The second segment's first request is broken, and then the first of each that settles what became of it."""
    broken: set[tuple[str, str]] = set()

    def choose(request: Request) -> Fault:
        kind = (request.method, request.range)
        if not request.name.endswith("000002.seg") or kind in broken:
            return Fault.NONE
        broken.add(kind)
        return fault

    async with azure.world.running() as running:
        one = await replication(azure, running)
        azure.proxy.choose = choose
        await one.send(3)
        await one.until_all_is_committed()
        assert ("PUT", "") in broken
    await expect_exact(azure, one)


async def test_an_upload_whose_reply_was_lost_is_found_again_after_a_kill(azure: AzureWorld) -> None:
    """By then the service says only that this credential may not overwrite."""
    proxy = azure.proxy
    async with azure.world.running() as running:
        one = await replication(azure, running)
        proxy.choose = lambda request: Fault.LOST_REPLY if request.method == "PUT" else Fault.RESET
        await one.send(2)
        await eventually(lambda: len(proxy.created) == 2)
        await one.agent.until_durable(2)
        await running.kill()
    proxy.choose = lambda request: Fault.NONE
    async with azure.world.running() as running:
        again = await replication(azure, running)
        await again.agent.until_committed(2)
        one.running = running
    assert 403 in {status for _, status in proxy.answers}
    await expect_exact(azure, one)


@pytest.mark.parametrize("seed", range(4))
async def test_through_any_mixture_of_faults_committed_is_exact_and_nothing_forks(azure: AzureWorld, seed: int) -> None:
    draw = random.Random(seed)
    faults = draw.sample([fault for fault in Fault if fault is not Fault.NONE], 6)
    azure.proxy.retry_after = draw.choice(["", "0", "1"])
    async with azure.world.running() as running:
        one = await replication(azure, running)
        azure.proxy.choose = lambda request: draw.choice(faults) if draw.random() < 0.5 else Fault.NONE
        for _ in range(4):
            await one.send(4)
            await one.until_all_is_committed()
        azure.proxy.choose = lambda request: Fault.NONE
    assert sum(fault is not Fault.NONE for _, fault in azure.proxy.requests) > 3
    await expect_exact(azure, one)


def _gaps(requests: list[Request]) -> list[float]:
    return [later.seconds - earlier.seconds for earlier, later in itertools.pairwise(requests)]


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.THROTTLED])
async def test_a_store_that_refuses_everything_is_asked_as_often_as_agreed_and_no_more(
    azure: AzureWorld, fault: Fault
) -> None:
    """Pauses can only be longer on a slow machine: they are held from below."""
    azure.use(POLICY)
    azure.world.limits = dataclasses.replace(
        SMALL,
        upload_pause_seconds_first=PAUSES.upload_pause_seconds_first,
        upload_pause_seconds_max=PAUSES.upload_pause_seconds_max,
    )
    proxy = azure.proxy
    async with azure.world.running() as running:
        one = await replication(azure, running)
        proxy.choose = lambda request: fault
        await one.send(6)
        await eventually(lambda: one.failures("store-unavailable") >= 8)
        asked, failed = proxy.of("PUT"), one.failures("store-unavailable")
        proxy.choose = lambda request: Fault.NONE
        await one.until_all_is_committed()
    names = {request.name for request in asked}
    assert len(names) == PAUSES.uploads_per_disk_max, "no more are tried at once than may be"
    at_once = len(names) * POLICY.attempts_max
    assert failed * POLICY.attempts_max <= len(asked) <= failed * POLICY.attempts_max + at_once
    pauses = [POLICY.first_pause_seconds * 2**number for number in range(POLICY.attempts_max - 1)]
    pauses.append(PAUSES.upload_pause_seconds_first)
    for name in names:
        gaps = _gaps([request for request in asked if request.name == name])
        assert all(gap >= pause * 0.99 for gap, pause in zip(gaps, itertools.cycle(pauses), strict=False))
    first_gaps = [_gaps([request for request in asked if request.name == name])[0] for name in names]
    later_gaps = [_gaps([request for request in asked if request.name == name])[1] for name in names]
    assert max(first_gaps) - min(first_gaps) + max(later_gaps) - min(later_gaps) > 0.005, "they come in step"
    await expect_exact(azure, one)


async def test_a_store_that_resets_everything_gets_one_upload_and_the_agreed_questions_about_it(
    azure: AzureWorld,
) -> None:
    proxy = azure.proxy
    async with azure.world.running() as running:
        one = await replication(azure, running)
        proxy.choose = lambda request: Fault.RESET
        await one.send(1)
        await eventually(lambda: one.failures("store-unavailable") >= 4)
        proxy.choose = lambda request: Fault.NONE
        failed = one.failures("store-unavailable")
        sent = [request for request, fault in proxy.requests if fault is Fault.RESET and request.method == "PUT"]
        asked = [request for request, fault in proxy.requests if fault is Fault.RESET and request.method == "HEAD"]
        await one.until_all_is_committed()
    assert failed <= len(sent) <= failed + 1
    assert failed * AT_ONCE.attempts_max <= len(asked) <= (failed + 1) * AT_ONCE.attempts_max
    await expect_exact(azure, one)


async def test_an_upload_that_nobody_takes_does_not_hold_the_disk_for_ever(azure: AzureWorld) -> None:
    """A peer that is there and reads nothing: after the silence that is allowed the segment goes another way."""
    azure.world.limits = dataclasses.replace(SMALL, segment_stored_bytes_due=8 * MEBIBYTE, segment_age_seconds_max=5.0)
    seen: list[Request] = []

    def choose(request: Request) -> Fault:
        seen.append(request)
        return Fault.DEAF if request.method == "PUT" and len(azure.proxy.of("PUT")) == 0 else Fault.NONE

    async with azure.world.running() as running:
        one = await replication(azure, running)
        azure.proxy.choose = choose
        one.sent = 1
        data = {number * MEBIBYTE: os.urandom(MEBIBYTE) for number in range(16)}
        for offset, written in data.items():
            one.expected[offset : offset + len(written)] = written
        await one.agent.send_change_set(1, data)
        await one.until_all_is_committed()
        assert one.failures("store-outcome-unknown") == 1
    await expect_exact(azure, one)
