"""The product's own channel over simulated connections: whole messages in order, or one typed error."""

import asyncio
import random

import pytest

from protocol.errors import ConnectionLost, ReplicationError
from protocol.messages import Frame, Tick
from protocol.transport.buffers import BufferPool
from protocol.transport.byte_channel import ByteChannel
from protocol.vocabulary import Compression, PeerIdentity, Role
from tests.simulation.loop import VirtualTimeLoop
from tests.simulation.network import Network
from tests.simulation.process import SimulatedProcess

VAULT = "5eed" * 8
AGENT = PeerIdentity(vault=VAULT, role=Role.AGENT, identifier="a" * 32)
SERVER = PeerIdentity(vault=VAULT, role=Role.PROCESS_SERVER, identifier="b" * 32)


def frame(number, payload):
    return Frame(
        channel=0,
        epoch=1,
        sequence=1,
        frame_number=number,
        extent_count=0,
        raw_bytes=len(payload),
        payload_bytes=len(payload),
        compression=Compression.NONE,
        end=None,
    )


async def send_all(channel, payloads):
    for number, payload in enumerate(payloads):
        await channel.send(frame(number, payload), [payload])
    await channel.send(Tick(instant_ns=None))


async def receive_all(channel, loop):
    """Until the tick, or the connection's end: the bodies, checked to be whole."""
    bodies = []
    while True:
        received = await channel.receive()
        if isinstance(received.message, Tick):
            return bodies
        assert received.message.frame_number == len(bodies)
        bodies.append(bytes(received.body))
        await asyncio.sleep(loop.draw.random() * 0.01)
        received.release()


def converse(seed, disturb):
    loop = VirtualTimeLoop(seed=seed)
    loop.draw = random.Random(seed)

    async def main():
        network = Network(loop, random.Random(seed))
        connection = network.connect(SimulatedProcess("agent"), SimulatedProcess("server"))
        pool = BufferPool(2)
        agent, server = ByteChannel(peer=SERVER), ByteChannel(peer=AGENT, pool=pool)
        connection.ends[0].start(agent)
        connection.ends[1].start(server)
        payloads = [loop.draw.randbytes(loop.draw.randrange(300_000)) for _ in range(8)]
        received: list[bytes] = []
        errors = []

        async def receive():
            received.extend(await receive_all(server, loop))

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(send_all(agent, payloads))
                group.create_task(receive())
                group.create_task(disturb(loop, connection))
        except* ReplicationError as group:
            errors.extend(group.exceptions)
        finally:
            await agent.close()
            await server.close()
        assert errors or pool.free == 2
        return payloads, received, errors

    try:
        result = loop.run_until_complete(main())
        assert loop.failures == []
        return result
    finally:
        loop.close()


def test_messages_arrive_whole_and_in_order_through_small_pools_and_slow_readers():
    async def leave_alone(loop, connection):
        pass

    for seed in range(10):
        payloads, received, errors = converse(seed, leave_alone)
        assert errors == []
        assert received == payloads


def test_a_cut_connection_ends_both_ends_with_one_typed_error():
    async def cut(loop, connection):
        await asyncio.sleep(loop.draw.random() * 0.1)
        connection.cut(loop.draw)

    ended = 0
    for seed in range(20):
        _, _, errors = converse(seed, cut)
        assert all(isinstance(error, ConnectionLost) for error in errors)
        ended += bool(errors)
    assert ended > 5


def test_a_silent_connection_is_given_up_after_its_deadline():
    async def silence(loop, connection):
        connection.fall_silent()

    _, _, errors = converse(1, silence)
    assert {type(error).__name__ for error in errors} & {"DeadlineExceeded", "ConnectionLost"}


@pytest.mark.parametrize("seed", range(3))
def test_one_seed_gives_one_conversation(seed):
    async def cut(loop, connection):
        await asyncio.sleep(loop.draw.random() * 0.1)
        connection.cut(loop.draw)

    first, second = converse(seed, cut), converse(seed, cut)
    assert [str(error) for error in first[2]] == [str(error) for error in second[2]]
    assert first[1] == second[1]
