"""Message assembly over a transport that the test holds in its hand: backpressure, bounds, deadlines, ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from protocol.errors import ConnectionLost, DeadlineExceeded, LimitExceeded, MalformedInput, ReplicationError
from protocol.framing import body_bytes_of, encode_start
from protocol.messages import Frame, Goodbye, Message, Tick
from protocol.transport.buffers import BufferPool
from protocol.transport.byte_channel import (
    FIRST_MESSAGE_SECONDS_MAX,
    MESSAGE_SECONDS_MAX,
    QUEUED_BODIES_MAX,
    QUEUED_MESSAGES_MAX,
    WRITE_BYTES_MAX,
    ByteChannel,
)
from protocol.vocabulary import Compression
from tests.protocol.transport.certificates import AGENT

TICK = Tick(instant_ns=None)


def frame(payload_bytes: int) -> Frame:
    return Frame(
        channel=1,
        epoch=1,
        sequence=1,
        frame_number=0,
        extent_count=0,
        raw_bytes=payload_bytes,
        payload_bytes=payload_bytes,
        compression=Compression.NONE,
        end=None,
    )


def encode(message: Message, fill: bytes = b"d") -> bytes:
    return encode_start(message) + fill * body_bytes_of(message)


class HeldTransport:
    """A transport whose input the test provides and whose output it looks at."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.is_reading_paused = False
        self.is_closed = False
        self.is_aborted = False
        self.waiting_bytes = 0
        self._arrived = bytearray()
        self.channel: ByteChannel | None = None

    def attach(self, channel: ByteChannel) -> ByteChannel:
        self.channel = channel
        channel.connection_made(self)
        return channel

    def feed(self, data: bytes) -> None:
        """Hands over what the channel takes; the rest waits for resume_reading(), as in a socket."""
        self._arrived += data
        self._deliver()

    @property
    def unread_bytes(self) -> int:
        return len(self._arrived)

    def _deliver(self) -> None:
        assert self.channel is not None
        while self._arrived and not self.is_reading_paused:
            buffer = self.channel.get_buffer(-1)
            count = min(len(buffer), len(self._arrived))
            buffer[:count] = self._arrived[:count]
            del self._arrived[:count]
            self.channel.buffer_updated(count)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return self.waiting_bytes

    def pause_reading(self) -> None:
        self.is_reading_paused = True

    def resume_reading(self) -> None:
        self.is_reading_paused = False
        self._deliver()

    def close(self) -> None:
        self.is_closed = True
        assert self.channel is not None
        asyncio.get_running_loop().call_soon(self.channel.connection_lost, None)

    def abort(self) -> None:
        self.is_aborted = True
        assert self.channel is not None
        asyncio.get_running_loop().call_soon(self.channel.connection_lost, None)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Time passes only when nothing is ready, and then at once."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        original = self._selector.select  # type: ignore[attr-defined]

        def select(timeout: float | None) -> Any:
            if timeout:
                self._now += timeout
            return original(0)

        self._selector.select = select  # type: ignore[attr-defined]

    def time(self) -> float:
        return self._now


def run(test: Callable[[], Any]) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(test())


def make(pool: BufferPool | None = None) -> tuple[HeldTransport, ByteChannel]:
    transport = HeldTransport()
    return transport, transport.attach(ByteChannel(peer=AGENT, pool=pool))


def test_messages_and_bodies_arrive_in_order_in_pooled_buffers() -> None:
    async def scenario() -> None:
        pool = BufferPool(2, 100)
        transport, channel = make(pool)
        transport.feed(encode(TICK) + encode(frame(100), b"a") + encode(frame(0)))
        assert (await channel.receive()).message == TICK
        received = await channel.receive()
        assert (received.message, bytes(received.body), pool.free) == (frame(100), b"a" * 100, 1)
        received.release()
        received.release()
        assert pool.free == 2
        assert (await channel.receive()).message == frame(0)

    run(scenario)


def test_without_a_free_buffer_reading_stops_until_one_is_given_back() -> None:
    async def scenario() -> None:
        pool = BufferPool(1, 100)
        held, first = make(pool)
        other, second = make(pool)
        held.feed(encode(frame(100), b"1"))
        other.feed(encode(frame(50), b"2") + encode(TICK))
        assert other.is_reading_paused
        assert other.unread_bytes == 50 + len(encode(TICK))
        (await first.receive()).release()
        received = await second.receive()
        assert bytes(received.body) == b"2" * 50
        assert not other.is_reading_paused
        received.release()
        assert (await second.receive()).message == TICK
        assert pool.free == 1

    run(scenario)


def test_a_channel_that_ended_while_it_waited_for_a_buffer_does_not_keep_one() -> None:
    async def scenario() -> None:
        pool = BufferPool(1, 100)
        held, first = make(pool)
        other, second = make(pool)
        held.feed(encode(frame(100)))
        other.feed(encode(frame(100)))
        second.connection_lost(None)
        (await first.receive()).release()
        assert pool.free == 1
        with pytest.raises(ConnectionLost, match="in the middle of a message"):
            await second.receive()

    run(scenario)


def test_a_connection_cut_within_a_body_gives_its_buffer_back() -> None:
    async def scenario() -> None:
        pool = BufferPool(1, 100)
        transport, channel = make(pool)
        transport.feed(encode(frame(100))[:-1])
        assert pool.free == 0
        channel.connection_lost(ConnectionResetError("reset"))
        assert pool.free == 1
        with pytest.raises(ConnectionLost, match="reset in the middle of a message"):
            await channel.receive()

    run(scenario)


def test_what_nobody_receives_stops_the_reading_at_a_bound() -> None:
    async def scenario() -> None:
        transport, channel = make()
        count = QUEUED_MESSAGES_MAX * 3
        transport.feed(encode(TICK) * count)
        assert transport.unread_bytes == (count - QUEUED_MESSAGES_MAX) * len(encode(TICK))
        for _ in range(count):
            assert (await channel.receive()).message == TICK
        assert not transport.is_reading_paused

    run(scenario)


def test_one_connection_queues_few_bodies_of_the_pool() -> None:
    async def scenario() -> None:
        pool = BufferPool(10, 100)
        transport, channel = make(pool)
        transport.feed(encode(frame(100)) * 6)
        assert pool.free == 10 - QUEUED_BODIES_MAX
        for _ in range(6):
            (await channel.receive()).release()
        assert pool.free == 10

    run(scenario)


def test_malformed_input_comes_after_what_was_whole_and_the_peer_can_still_be_told() -> None:
    async def scenario() -> None:
        transport, channel = make()
        transport.feed(encode(TICK) + b"GET / HTTP/1.1\r\n\r\n")
        assert transport.is_reading_paused
        assert (await channel.receive()).message == TICK
        with pytest.raises(MalformedInput):
            await channel.receive()
        await channel.send(Goodbye(reason="no"))
        assert transport.written == encode(Goodbye(reason="no"))
        await channel.close()
        assert transport.is_closed

    run(scenario)


@pytest.mark.parametrize("pool_bytes", [None, 99])
def test_a_body_that_fits_no_buffer_is_over_the_limit(pool_bytes: int | None) -> None:
    async def scenario() -> None:
        transport, channel = make(None if pool_bytes is None else BufferPool(1, pool_bytes))
        transport.feed(encode(frame(100)))
        with pytest.raises(LimitExceeded, match="body length"):
            await channel.receive()

    run(scenario)


def test_sending_joins_small_parts_and_cuts_long_ones_without_changing_a_byte() -> None:
    async def scenario() -> None:
        transport, channel = make()
        body = bytes(range(256)) * 4000
        await channel.send(frame(len(body) + 6), [b"abc", body, b"def"])
        assert transport.written == encode_start(frame(len(body) + 6)) + b"abc" + body + b"def"

    run(scenario)


def test_a_body_of_another_length_than_stated_is_our_own_mistake_and_nothing_is_written() -> None:
    async def scenario() -> None:
        transport, channel = make()
        for body in ([b"1234"], [b"123", b"456"], []):
            with pytest.raises(ValueError, match="states 5"):
                await channel.send(frame(5), body)
        with pytest.raises(ValueError, match="states 0"):
            await channel.send(TICK, [b"x"])
        assert not transport.written

    run(scenario)


def test_sending_waits_while_the_peer_does_not_read() -> None:
    async def scenario() -> None:
        transport, channel = make()
        channel.pause_writing()
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(channel.send(TICK))
            await asyncio.sleep(1)
            assert not sending.done()
            assert not transport.written
            channel.resume_writing()
        assert transport.written == encode(TICK)

    run(scenario)


def test_messages_of_several_tasks_do_not_mix() -> None:
    async def scenario() -> None:
        transport, channel = make()
        body = b"x" * (3 * WRITE_BYTES_MAX)
        channel.pause_writing()
        async with asyncio.TaskGroup() as group:
            group.create_task(channel.send(frame(len(body)), [body]))
            group.create_task(channel.send(TICK))
            await asyncio.sleep(0)
            channel.resume_writing()
            channel.pause_writing()
            await asyncio.sleep(1)
            channel.resume_writing()
        assert transport.written == encode(frame(len(body)), b"x") + encode(TICK)

    run(scenario)


def test_a_send_cancelled_within_a_message_ends_the_connection_and_before_it_does_not() -> None:
    async def scenario() -> None:
        transport, channel = make()
        channel.pause_writing()
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(channel.send(TICK))
            await asyncio.sleep(0)
            waiting.cancel()
        channel.resume_writing()
        await channel.send(TICK)
        assert not transport.is_aborted

        original = transport.write

        def write_and_block(data: Any) -> None:
            original(data)
            channel.pause_writing()

        transport.write = write_and_block  # type: ignore[method-assign]
        body = b"x" * (2 * WRITE_BYTES_MAX)
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(channel.send(frame(len(body)), [body]))
            await asyncio.sleep(0)
            sending.cancel()
        assert transport.is_aborted
        with pytest.raises(ConnectionLost, match="cancelled in the middle"):
            await channel.send(TICK)

    run(scenario)


def test_a_cancelled_receive_loses_nothing() -> None:
    async def scenario() -> None:
        transport, channel = make()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await channel.receive()
        transport.feed(encode(TICK))
        assert (await channel.receive()).message == TICK

    run(scenario)


async def end_of(channel: ByteChannel) -> tuple[ReplicationError, float]:
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        try:
            await channel.receive()
        except ReplicationError as error:
            return error, loop.time() - began


def test_a_peer_that_never_says_hello_is_cut() -> None:
    async def scenario() -> None:
        transport, channel = make()
        error, seconds = await end_of(channel)
        assert isinstance(error, DeadlineExceeded)
        assert error.is_retryable
        assert seconds == FIRST_MESSAGE_SECONDS_MAX
        assert transport.is_aborted

    run(scenario)


def test_a_peer_that_says_hello_a_byte_at_a_time_is_cut_at_the_same_deadline() -> None:
    async def scenario() -> None:
        transport, channel = make()
        loop = asyncio.get_running_loop()
        for index, byte in enumerate(encode(Goodbye(reason="x" * 50))):
            loop.call_later(index, transport.feed, bytes([byte]))
        error, seconds = await end_of(channel)
        assert isinstance(error, DeadlineExceeded)
        assert seconds == FIRST_MESSAGE_SECONDS_MAX

    run(scenario)


def test_silence_after_the_first_message_ends_the_connection_at_the_agreed_time() -> None:
    async def scenario() -> None:
        transport, channel = make()
        transport.feed(encode(TICK))
        channel.set_idle_seconds_max(20)
        asyncio.get_running_loop().call_later(15, transport.feed, encode(TICK))
        error, seconds = await end_of(channel)
        assert isinstance(error, DeadlineExceeded)
        assert seconds == 35

    run(scenario)


def test_a_message_that_never_ends_is_cut_although_bytes_come() -> None:
    async def scenario() -> None:
        transport, channel = make(BufferPool(1, 1000))
        transport.feed(encode(TICK) + encode(frame(1000))[:100])
        loop = asyncio.get_running_loop()
        for second in range(1, 600):
            loop.call_later(second, transport.feed, b"d")
        error, seconds = await end_of(channel)
        assert isinstance(error, DeadlineExceeded)
        assert seconds == MESSAGE_SECONDS_MAX

    run(scenario)


def test_time_in_which_this_side_does_not_read_is_not_held_against_the_peer() -> None:
    async def scenario() -> None:
        pool = BufferPool(1, 100)
        lease = pool.take()
        assert lease is not None
        transport, channel = make(pool)
        transport.feed(encode(TICK) + encode(frame(100)))
        channel.set_idle_seconds_max(20)
        asyncio.get_running_loop().call_later(1000, lease.release)
        assert (await channel.receive()).message == TICK
        assert (await channel.receive()).message == frame(100)
        error, seconds = await end_of(channel)
        assert isinstance(error, DeadlineExceeded)
        assert seconds <= 40

    run(scenario)


def test_a_peer_that_takes_nothing_is_given_up_and_one_that_takes_little_is_not() -> None:
    async def scenario() -> None:
        transport, channel = make()
        transport.feed(encode(TICK))
        channel.set_idle_seconds_max(10_000)
        channel._idle_seconds_max = 20
        transport.waiting_bytes = 1000
        channel.pause_writing()
        loop = asyncio.get_running_loop()
        began = loop.time()
        loop.call_later(15, setattr, transport, "waiting_bytes", 900)
        with pytest.raises(DeadlineExceeded, match="reading"):
            await channel.send(TICK)
        assert loop.time() - began == 40
        assert transport.is_aborted

    run(scenario)


def test_closing_releases_what_nobody_took_and_ends_everything_on_the_channel() -> None:
    async def scenario() -> None:
        pool = BufferPool(3, 100)
        transport, channel = make(pool)
        transport.feed(encode(frame(100)) * 2)
        assert pool.free == 1
        await channel.close()
        assert pool.free == 3
        for attempt in (channel.receive(), channel.send(TICK)):
            with pytest.raises(ConnectionLost, match="closed on this side"):
                await attempt
        await channel.close()

    run(scenario)


def test_closing_wakes_whoever_waits_to_receive() -> None:
    async def scenario() -> None:
        _, channel = make()
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(end_of(channel))
            await asyncio.sleep(1)
            await channel.close()
        assert isinstance(waiting.result()[0], ConnectionLost)

    run(scenario)


def test_bytes_that_come_after_the_end_touch_no_pooled_buffer() -> None:
    async def scenario() -> None:
        pool = BufferPool(1, 100)
        transport, channel = make(pool)
        transport.feed(encode(frame(100))[:-50])
        channel.abort()
        lease = pool.take()
        assert lease is not None
        lease.view[:] = bytes(100)
        transport.feed(b"z" * 50)
        assert bytes(lease.view) == bytes(100)

    run(scenario)


def test_an_end_between_messages_is_told_as_such() -> None:
    async def scenario() -> None:
        transport, channel = make()
        transport.feed(encode(Goodbye(reason="stopping")))
        channel.eof_received()
        assert (await channel.receive()).message == Goodbye(reason="stopping")
        with pytest.raises(ConnectionLost) as caught:
            await channel.receive()
        assert caught.value.is_retryable
        assert "middle" not in str(caught.value)

    run(scenario)


def test_waiting_channels_get_buffers_in_the_order_in_which_they_asked() -> None:
    pool = BufferPool(1, 16)
    lease = pool.take()
    assert lease is not None
    served: list[str] = []
    pool.wait(lambda taken: (served.append("first"), taken.release())[1])

    def second(taken: Any) -> None:
        served.append("second")
        taken.release()

    def never(taken: Any) -> None:
        raise AssertionError

    pool.wait(never)
    pool.wait(second)
    pool.stop_waiting(never)
    lease.release()
    assert served == ["first", "second"]
    assert pool.free == 1
