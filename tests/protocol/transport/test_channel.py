"""Channels over real TLS on loopback, on asyncio's loop and on uvloop: whom they let in, and how they end."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

import protocol.transport.channel as channel_module
from protocol.errors import (
    CannotListen,
    CertificateRefused,
    ConnectionLost,
    DeadlineExceeded,
    LimitExceeded,
    MalformedInput,
    NotPermitted,
    PortTaken,
    ReplicationError,
    TlsFault,
)
from protocol.framing import encode_start
from protocol.messages import Frame, Goodbye, Hello, Refusal, Tick
from protocol.transport.channel import BufferPool, Channel, Listener, connect, listen
from protocol.transport.tls import IdentityContext, client_context, server_context
from protocol.vocabulary import FRAME_RAW_BYTES_MAX, Compression, Extent, PeerIdentity, Role, VaultId, extent_table
from tests.protocol.transport.certificates import AGENT, DAY, PROCESS_SERVER, Authority, Leaf

HELLO = Hello(wire_version_min=1, wire_version_max=1, agent_version="0", boot_id="b")
TICK = Tick(instant_ns=None)
Run = Callable[[Callable[[], Awaitable[None]]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    factory = uvloop.new_event_loop if request.param == "uvloop" else None
    complaints: list[dict[str, Any]] = []

    async def watched(test: Callable[[], Awaitable[None]]) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(20):
            await test()

    with asyncio.Runner(loop_factory=factory) as runner:
        yield lambda test: runner.run(watched(test))
    gc.collect()
    assert not complaints


class Certificates:
    """Everything that a pair needs, and what does not fit."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority(directory)
        self.stranger = Authority(directory, "stranger")
        self.agent = self.authority.issue(AGENT.uri, file_name="agent")
        self.process_server = self.authority.issue(PROCESS_SERVER.uri, file_name="process-server")

    @staticmethod
    def client(leaf: Leaf) -> IdentityContext:
        return client_context(leaf.path, leaf.path, leaf.authority_path)

    @staticmethod
    def server(leaf: Leaf, **options: Any) -> IdentityContext:
        return server_context(leaf.path, leaf.path, leaf.authority_path, **options)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


class Failures:
    """What the listener was told, awaitable."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[ReplicationError] = asyncio.Queue()

    def __call__(self, address: str, error: ReplicationError) -> None:
        assert address.startswith("127.0.0.1:")
        self._queue.put_nowait(error)

    async def next(self) -> ReplicationError:
        return await self._queue.get()


async def echo(channel: Channel) -> None:
    """Sends ticks and goodbyes back until the goodbye; bodies are swallowed."""
    while True:
        received = await channel.receive()
        received.release()
        if not isinstance(received.message, Frame):
            await channel.send(received.message)
        if isinstance(received.message, Goodbye):
            return


@contextlib.asynccontextmanager
async def serving(
    context: IdentityContext, on_channel: Callable[[Channel], Awaitable[None]] = echo, **options: Any
) -> AsyncIterator[Listener]:
    async with asyncio.TaskGroup() as group:
        options.setdefault("pool", BufferPool(4))
        listener = await listen("127.0.0.1", 0, tls=context, on_channel=on_channel, task_group=group, **options)
        yield listener
        await listener.close()


def frame(raw_bytes: int, sequence: int = 1) -> Frame:
    return Frame(
        channel=1,
        epoch=1,
        sequence=sequence,
        frame_number=0,
        extent_count=1,
        raw_bytes=raw_bytes,
        payload_bytes=raw_bytes,
        compression=Compression.NONE,
        end=None,
    )


def test_both_sides_know_each_other_and_bodies_arrive_unchanged(run: Run, certificates: Certificates) -> None:
    payload = os.urandom(FRAME_RAW_BYTES_MAX)
    table = extent_table([Extent(offset_bytes=4096, length_bytes=len(payload))])
    bodies: list[bytes] = []
    peers: list[tuple[PeerIdentity, str]] = []

    async def take(channel: Channel) -> None:
        peers.append((channel.peer, channel.certificate_serial))
        for _ in range(8):
            received = await channel.receive()
            bodies.append(bytes(received.body))
            received.release()
        await channel.send(TICK)

    async def scenario() -> None:
        pool = BufferPool(2)
        async with serving(certificates.server(certificates.process_server), take, pool=pool) as listener:
            channel = await connect("127.0.0.1", listener.port, tls=certificates.client(certificates.agent))
            assert channel.peer == PROCESS_SERVER
            for sequence in range(1, 9):
                await channel.send(frame(len(payload), sequence), [table, payload])
            assert (await channel.receive()).message == TICK
            await channel.close()
        assert pool.free == 2

    run(scenario)
    assert bodies == [table.tobytes() + payload] * 8
    assert peers[0][0] == AGENT
    assert int(peers[0][1], 16) == certificates.agent.serial


def test_the_last_message_arrives_although_the_peer_is_still_sending(run: Run, certificates: Certificates) -> None:
    refusal = Refusal(code="sequence-gap", detail="no", is_retryable=False)

    async def refuse(channel: Channel) -> None:
        (await channel.receive()).release()
        for _ in range(20):
            await channel.send(TICK)
        await channel.send(refusal)

    async def scenario() -> None:
        async with serving(certificates.server(certificates.process_server), refuse) as listener:
            channel = await connect("127.0.0.1", listener.port, tls=certificates.client(certificates.agent))
            body = bytes(FRAME_RAW_BYTES_MAX)
            table = extent_table([Extent(offset_bytes=0, length_bytes=len(body))])
            with contextlib.suppress(ConnectionLost):
                for sequence in range(1, 40):
                    await channel.send(frame(len(body), sequence), [table, body])
            arrived = [(await channel.receive()).message for _ in range(21)]
            assert arrived == [TICK] * 20 + [refusal]
            with pytest.raises(ConnectionLost):
                await channel.receive()
            await channel.close()

    run(scenario)


async def first_error(listener: Listener, context: IdentityContext, **options: Any) -> ReplicationError:
    """What the client hears: from connect(), or from its first receive() as TLS 1.3 has it."""
    try:
        channel = await connect("127.0.0.1", listener.port, tls=context, **options)
    except ReplicationError as error:
        return error
    try:
        await channel.send(HELLO)
        message = (await channel.receive()).message
    except ReplicationError as error:
        return error
    finally:
        await channel.close()
    assert isinstance(message, Refusal)
    return message.to_error()


def test_a_client_of_another_authority_is_refused_and_told_why(run: Run, certificates: Certificates) -> None:
    stranger = certificates.stranger.issue(AGENT.uri, file_name="s-agent", trusts=certificates.authority)

    async def scenario() -> None:
        failures = Failures()
        async with serving(certificates.server(certificates.process_server), on_failed=failures) as listener:
            error = await first_error(listener, certificates.client(stranger))
            assert isinstance(error, CertificateRefused)
            assert "does not know its authority" in str(error)
            assert error.hint
            refusal = await failures.next()
            assert isinstance(refusal, CertificateRefused)
            assert "127.0.0.1" in str(refusal)

    run(scenario)


def test_a_server_of_another_authority_is_refused_by_the_client(run: Run, certificates: Certificates) -> None:
    stranger = certificates.stranger.issue(PROCESS_SERVER.uri, file_name="s-server", trusts=certificates.authority)

    async def scenario() -> None:
        failures = Failures()
        async with serving(certificates.server(stranger), on_failed=failures) as listener:
            error = await first_error(listener, certificates.client(certificates.agent))
            assert isinstance(error, CertificateRefused)
            assert f"127.0.0.1:{listener.port}" in str(error)
            assert isinstance(await failures.next(), CertificateRefused)

    run(scenario)


@pytest.mark.parametrize(("start", "end", "words"), [(-3 * DAY, -DAY, "expired"), (DAY, 2 * DAY, "bad")])
def test_a_certificate_outside_its_time_is_refused(
    run: Run, certificates: Certificates, start: datetime.timedelta, end: datetime.timedelta, words: str
) -> None:
    stale_agent = certificates.authority.issue(AGENT.uri, file_name="stale-agent", valid_from=start, valid_to=end)
    stale_server = certificates.authority.issue(
        PROCESS_SERVER.uri, file_name="stale-server", valid_from=start, valid_to=end
    )

    async def scenario() -> None:
        failures = Failures()
        async with serving(certificates.server(certificates.process_server), on_failed=failures) as listener:
            error = await first_error(listener, certificates.client(stale_agent))
            assert isinstance(error, CertificateRefused)
            assert words in str(error)
            assert isinstance(await failures.next(), CertificateRefused)
        async with serving(certificates.server(stale_server), on_failed=failures) as listener:
            error = await first_error(listener, certificates.client(certificates.agent))
            assert isinstance(error, CertificateRefused)

    run(scenario)


def test_peers_that_never_finish_a_body_take_no_buffer_from_the_others(run: Run, certificates: Certificates) -> None:
    table = extent_table([Extent(offset_bytes=0, length_bytes=4096)]).tobytes()

    async def scenario() -> None:
        pool = BufferPool(1)
        async with serving(certificates.server(certificates.process_server), pool=pool) as listener:
            context = certificates.client(certificates.agent)
            slow = [await connect("127.0.0.1", listener.port, tls=context) for _ in range(3)]
            for channel in slow:
                channel._transport.write(encode_start(frame(4096)) + table)  # type: ignore[attr-defined]
            quick = await connect("127.0.0.1", listener.port, tls=context)
            for _ in range(3):
                await quick.send(frame(4096), [table, bytes(4096)])
                await quick.send(TICK)
                assert (await quick.receive()).message == TICK
            await quick.send(Goodbye(reason="done"))
            await quick.receive()
            for channel in (*slow, quick):
                await channel.close()
        assert pool.free == 1, "what the connections brought went with them"

    run(scenario)


def test_a_connection_ends_with_the_certificate_that_made_it(
    run: Run, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        failures = Failures()
        leaf_end_seconds = (certificates.authority.now + DAY).timestamp()
        async with serving(certificates.server(certificates.process_server), on_failed=failures) as listener:
            monkeypatch.setattr("protocol.transport.channel._now_seconds", lambda: leaf_end_seconds - 1.2)
            channel = await connect("127.0.0.1", listener.port, tls=certificates.client(certificates.agent))
            await channel.send(TICK)
            assert (await channel.receive()).message == TICK, "until then all is well"
            with pytest.raises(ReplicationError) as caught:
                await channel.receive()
            ends = [str(caught.value), str(await failures.next())]
            assert any("it expired while it was connected" in end for end in ends), "whichever side was first"
            await channel.close()

    run(scenario)


def test_a_client_in_a_wrong_role_or_of_another_vault_is_refused_by_message(
    run: Run, certificates: Certificates
) -> None:
    elsewhere = PeerIdentity(vault=VaultId("ee" * 16), role=Role.AGENT, identifier=AGENT.identifier)
    wrong_role = certificates.authority.issue(PROCESS_SERVER.uri, file_name="wrong-role")
    wrong_vault = certificates.authority.issue(elsewhere.uri, file_name="wrong-vault")

    async def scenario() -> None:
        failures = Failures()
        async with serving(certificates.server(certificates.process_server), on_failed=failures) as listener:
            error = await first_error(listener, certificates.client(wrong_role))
            assert (error.fields["peer_code"], error.fields["retryable"]) == ("not-permitted", False)
            assert isinstance(await failures.next(), NotPermitted)
            assert isinstance(await first_error(listener, certificates.client(wrong_vault)), NotPermitted)

    run(scenario)


def test_a_server_in_a_wrong_role_is_refused_by_the_client(run: Run, certificates: Certificates) -> None:
    async def scenario() -> None:
        refusals: list[object] = []

        async def take(channel: Channel) -> None:
            refusals.append((await channel.receive()).message)

        options: dict[str, Any] = {"expected_roles": frozenset({Role.AGENT})}
        async with serving(certificates.server(certificates.agent), take, **options) as listener:
            error = await first_error(listener, certificates.client(certificates.agent))
            assert isinstance(error, NotPermitted)
            assert "role is agent, expected process-server" in str(error)
        assert isinstance(refusals[0], Refusal)

    run(scenario)


def raw_client(
    port: int,
    context: ssl.SSLContext,
    outcome: list[BaseException | bytes],
    opening: bytes = b"hello, who is there?",
) -> None:
    """A client that is not ours, in a thread of its own: what it reads after it said `opening`, or why not."""
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
            context.wrap_socket(connection) as wrapped,
        ):
            wrapped.sendall(opening)
            outcome.append(wrapped.recv(1))
    except OSError as error:
        outcome.append(error)


def foreign_context(certificates: Certificates) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(certificates.authority.path)
    return context


def test_a_client_without_a_certificate_is_refused(run: Run, certificates: Certificates) -> None:
    outcome: list[BaseException | bytes] = []

    async def scenario() -> None:
        failures = Failures()
        async with serving(certificates.server(certificates.process_server), on_failed=failures) as listener:
            await asyncio.to_thread(raw_client, listener.port, foreign_context(certificates), outcome)
            error = await failures.next()
            assert isinstance(error, CertificateRefused)
            assert "it showed none" in str(error)

    run(scenario)
    assert isinstance(outcome[0], ssl.SSLError)
    assert outcome[0].reason == "TLSV13_ALERT_CERTIFICATE_REQUIRED"


def test_tls_1_2_is_refused(run: Run, certificates: Certificates) -> None:
    context = foreign_context(certificates)
    context.load_cert_chain(certificates.agent.path)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    outcome: list[BaseException | bytes] = []

    async def scenario() -> None:
        failures = Failures()
        async with serving(certificates.server(certificates.process_server), on_failed=failures) as listener:
            await asyncio.to_thread(raw_client, listener.port, context, outcome)
            error = await failures.next()
            assert isinstance(error, TlsFault)
            assert "unsupported protocol" in str(error)

    run(scenario)
    assert isinstance(outcome[0], ssl.SSLError)


def test_a_second_connection_resumes_no_session(run: Run, certificates: Certificates) -> None:
    context = foreign_context(certificates)
    context.load_cert_chain(certificates.agent.path)
    tickets: list[bool] = []

    def connect_twice(port: int) -> None:
        session = None
        for _ in range(2):
            with (
                socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
                context.wrap_socket(connection, session=session) as wrapped,
            ):
                wrapped.sendall(bytes.fromhex("0300000000000000") + b"\x92\x08\xc0")
                wrapped.recv(1)
                session = wrapped.session
                tickets.append(bool(session and session.has_ticket) or bool(wrapped.session_reused))

    async def scenario() -> None:
        failures = Failures()
        async with serving(certificates.server(certificates.process_server), on_failed=failures) as listener:
            await asyncio.to_thread(connect_twice, listener.port)

    run(scenario)
    assert tickets == [False, False]


@pytest.mark.parametrize(
    "opening",
    [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", bytes(range(256)), b""],
    ids=["HTTP", "damaged hello", "noise", "nothing"],
)
def test_what_is_not_tls_is_refused(run: Run, certificates: Certificates, opening: bytes) -> None:
    async def scenario() -> None:
        failures = Failures()
        async with serving(certificates.server(certificates.process_server), on_failed=failures) as listener:
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            writer.write(opening)
            writer.write_eof()
            await reader.read()
            writer.close()
            assert isinstance(await failures.next(), TlsFault | ConnectionLost)

    run(scenario)


def test_a_peer_that_never_speaks_is_cut_at_the_handshake_deadline(
    run: Run, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "HANDSHAKE_SECONDS_MAX", 0.05)

    async def scenario() -> None:
        failures = Failures()
        async with serving(certificates.server(certificates.process_server), on_failed=failures) as listener:
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
            error = await failures.next()
            assert isinstance(error, DeadlineExceeded)
            assert "handshake" in str(error)

        silent = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)
        port = silent.sockets[0].getsockname()[1]
        with pytest.raises(DeadlineExceeded, match="handshake"):
            await connect("127.0.0.1", port, tls=certificates.client(certificates.agent))
        silent.close()

    run(scenario)


def test_a_peer_that_shakes_hands_and_says_nothing_is_cut_at_the_hello_deadline(
    run: Run, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = dict(channel_module.ByteChannel.__init__.__kwdefaults__, first_message_seconds_max=0.05)
    monkeypatch.setattr(channel_module.ByteChannel.__init__, "__kwdefaults__", defaults)
    context = foreign_context(certificates)
    context.load_cert_chain(certificates.agent.path)
    outcome: list[BaseException | bytes] = []

    async def scenario() -> None:
        failures = Failures()
        async with serving(certificates.server(certificates.process_server), on_failed=failures) as listener:
            await asyncio.to_thread(raw_client, listener.port, context, outcome, b"")
            error = await failures.next()
            assert isinstance(error, DeadlineExceeded)
            assert "first message" in str(error)

    run(scenario)
    assert outcome


def test_a_taken_port_is_named_with_what_to_do(run: Run, certificates: Certificates) -> None:
    async def scenario() -> None:
        context = certificates.server(certificates.process_server)
        async with serving(context) as listener, asyncio.TaskGroup() as group:
            with pytest.raises(PortTaken) as caught:
                await listen(
                    "127.0.0.1", listener.port, tls=context, pool=BufferPool(1), on_channel=echo, task_group=group
                )
            assert str(listener.port) in str(caught.value)
            assert caught.value.hint
            with pytest.raises(CannotListen):
                await listen("192.0.2.1", 0, tls=context, pool=BufferPool(1), on_channel=echo, task_group=group)

    run(scenario)


def test_a_closed_listener_frees_its_port_and_live_channels_go_on(run: Run, certificates: Certificates) -> None:
    async def scenario() -> None:
        context = certificates.server(certificates.process_server)
        async with serving(context) as listener:
            channel = await connect("127.0.0.1", listener.port, tls=certificates.client(certificates.agent))
            await channel.send(TICK)
            await channel.receive()
            await listener.close()
            with pytest.raises(ConnectionLost):
                await connect("127.0.0.1", listener.port, tls=certificates.client(certificates.agent))
            await channel.send(Goodbye(reason="done"))
            assert (await channel.receive()).message == Goodbye(reason="done")
            await channel.close()
            async with asyncio.TaskGroup() as group:
                again = await listen(
                    "127.0.0.1", listener.port, tls=context, pool=BufferPool(1), on_channel=echo, task_group=group
                )
                await again.close()

    run(scenario)


def test_nobody_listening_and_no_such_host_are_retryable(run: Run, certificates: Certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    async def scenario() -> None:
        for host in ("127.0.0.1", "no-such-host.invalid"):
            with pytest.raises(ConnectionLost) as caught:
                await connect(host, port, tls=certificates.client(certificates.agent))
            assert caught.value.is_retryable

    run(scenario)


def test_connections_beyond_the_bound_are_cut_at_once(
    run: Run, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "CONNECTIONS_MAX", 1)

    async def scenario() -> None:
        failures = Failures()
        async with serving(certificates.server(certificates.process_server), on_failed=failures) as listener:
            channel = await connect("127.0.0.1", listener.port, tls=certificates.client(certificates.agent))
            assert listener.connections == 1
            with pytest.raises(ConnectionLost):
                await connect("127.0.0.1", listener.port, tls=certificates.client(certificates.agent))
            assert isinstance(await failures.next(), LimitExceeded)
            await channel.send(Goodbye(reason="done"))
            await channel.receive()
            await channel.close()

    run(scenario)


class Tampering:
    """A relay between client and server that cuts, or flips one bit of, what the client sends after the handshake."""

    def __init__(self, target: int, *, at_byte: int, is_cut: bool) -> None:
        self._target = target
        self._at_byte = at_byte
        self._is_cut = is_cut
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.is_armed = threading.Event()
        self._threads = [threading.Thread(target=self._relay)]
        self._threads[0].start()

    def _relay(self) -> None:
        client, _ = self._listening.accept()
        self._listening.close()
        server = socket.create_connection(("127.0.0.1", self._target))
        back = threading.Thread(target=self._copy, args=(server, client, False))
        back.start()
        self._copy(client, server, True)
        back.join()
        client.close()
        server.close()

    def _copy(self, source: socket.socket, sink: socket.socket, is_tampered: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(65536)):
                if is_tampered and self.is_armed.is_set():
                    place = self._at_byte - passed
                    passed += len(data)
                    if 0 <= place < len(data) and self._is_cut:
                        sink.sendall(data[:place])
                        break
                    if 0 <= place < len(data):
                        data[place] ^= 1
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR if self._is_cut else socket.SHUT_WR)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.parametrize("is_cut", [True, False], ids=["cut", "flipped"])
@pytest.mark.parametrize("at_byte", [0, 5, 30, 5000, 300_000])
def test_a_stream_that_is_cut_or_altered_anywhere_delivers_no_message_that_was_not_sent(
    run: Run, certificates: Certificates, is_cut: bool, at_byte: int
) -> None:
    payload = os.urandom(FRAME_RAW_BYTES_MAX)
    table = extent_table([Extent(offset_bytes=0, length_bytes=len(payload))])
    arrived: list[object] = []

    async def take(channel: Channel) -> None:
        received = await channel.receive()
        received.release()
        await channel.send(TICK)
        while True:
            received = await channel.receive()
            arrived.append(received.message)
            received.release()

    async def scenario() -> None:
        failures = Failures()
        pool = BufferPool(2)
        async with serving(
            certificates.server(certificates.process_server), take, on_failed=failures, pool=pool
        ) as listener:
            relay = Tampering(listener.port, at_byte=at_byte, is_cut=is_cut)
            channel = await connect("127.0.0.1", relay.port, tls=certificates.client(certificates.agent))
            await channel.send(HELLO)
            await channel.receive()
            relay.is_armed.set()
            with contextlib.suppress(ConnectionLost, TlsFault):
                await channel.send(frame(len(payload)), [table, payload])
            error = await failures.next()
            assert isinstance(error, ConnectionLost if is_cut else TlsFault)
            await channel.close()
            await asyncio.to_thread(relay.join)
        assert pool.free == 2

    run(scenario)
    assert arrived == []


def test_bytes_that_are_no_message_are_malformed_and_the_peer_hears_it(run: Run, certificates: Certificates) -> None:
    context = foreign_context(certificates)
    context.load_cert_chain(certificates.agent.path)
    outcome: list[BaseException | bytes] = []

    async def take(channel: Channel) -> None:
        with pytest.raises(MalformedInput) as caught:
            await channel.receive()
        await channel.send(Refusal.from_error(caught.value))

    async def scenario() -> None:
        async with serving(certificates.server(certificates.process_server), take) as listener:
            await asyncio.to_thread(raw_client, listener.port, context, outcome)

    run(scenario)
    assert isinstance(outcome[0], bytes)
    assert outcome[0]


def test_a_cancelled_service_ends_its_channels(run: Run, certificates: Certificates) -> None:
    async def scenario() -> None:
        entered = asyncio.Event()
        left: list[str] = []

        async def wait_for_ever(channel: Channel) -> None:
            entered.set()
            try:
                await channel.receive()
            finally:
                left.append("left")

        async def service(port: asyncio.Future[int]) -> None:
            async with serving(certificates.server(certificates.process_server), wait_for_ever) as listener:
                port.set_result(listener.port)
                await asyncio.Event().wait()

        async with asyncio.TaskGroup() as group:
            port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            running = group.create_task(service(port))
            channel = await connect("127.0.0.1", await port, tls=certificates.client(certificates.agent))
            await entered.wait()
            running.cancel()
            with pytest.raises(ConnectionLost):
                await channel.receive()
            await channel.close()
        assert left == ["left"]

    run(scenario)
