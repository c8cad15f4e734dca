"""Simulated connections deliver in order and once, until they are cut at some byte, and tell both ends what TCP would
tell.
"""

import asyncio
import random

import pytest

from tests.simulation.loop import VirtualTimeLoop
from tests.simulation.network import HIGH_WATER_BYTES, SLOW_BYTES_PER_DELIVERY, Network
from tests.simulation.process import SimulatedProcess


class Recorder(asyncio.Protocol):
    def __init__(self):
        self.data = bytearray()
        self.pieces = 0
        self.events = []

    def connection_made(self, transport):
        self.events.append("made")

    def data_received(self, data):
        self.events.append("data")
        self.data += data
        self.pieces += 1

    def eof_received(self):
        self.events.append("end")

    def connection_lost(self, error):
        self.events.append("lost" if error is None else "reset")

    def pause_writing(self):
        self.events.append("pause")

    def resume_writing(self):
        self.events.append("resume")


class BufferedRecorder(asyncio.BufferedProtocol):
    def __init__(self):
        self.buffer = bytearray(7)
        self.data = bytearray()
        self.events = []

    def connection_made(self, transport):
        pass

    def get_buffer(self, sizehint):
        return self.buffer

    def buffer_updated(self, count):
        self.data += self.buffer[:count]

    def eof_received(self):
        self.events.append("end")

    def connection_lost(self, error):
        self.events.append("lost")


def simulate(main, seed=1):
    loop = VirtualTimeLoop(seed=seed)
    network = Network(loop, random.Random(seed))
    try:
        result = loop.run_until_complete(main(network))
        assert loop.failures == []
        return result
    finally:
        loop.close()


def connected(network, client=None, server=None):
    connection = network.connect(SimulatedProcess("client"), SimulatedProcess("server"))
    client, server = client or Recorder(), server or Recorder()
    connection.ends[0].start(client)
    connection.ends[1].start(server)
    return connection, client, server


def test_bytes_arrive_in_order_and_once_in_other_pieces():
    async def main(network):
        connection, _, server = connected(network)
        for number in range(100):
            connection.ends[0].write(bytes([number]) * 100)
        await asyncio.sleep(1)
        assert bytes(server.data) == b"".join(bytes([number]) * 100 for number in range(100))
        assert server.pieces != 100

    simulate(main)


def test_buffered_protocols_are_fed_through_their_own_buffers():
    async def main(network):
        connection, _, server = connected(network, server=BufferedRecorder())
        connection.ends[0].writelines([b"a" * 10, b"b" * 10])
        await asyncio.sleep(1)
        assert bytes(server.data) == b"a" * 10 + b"b" * 10

    simulate(main)


def test_closing_delivers_what_was_written_and_then_the_end():
    async def main(network):
        connection, client, server = connected(network)
        connection.ends[0].write(b"last words")
        connection.ends[0].close()
        connection.ends[0].write(b"too late")
        await asyncio.sleep(1)
        assert bytes(server.data) == b"last words"
        assert server.events[-2:] == ["end", "lost"]
        assert client.events == ["made", "lost"]
        assert not connection.is_open

    simulate(main)


def test_a_cut_delivers_a_prefix_and_both_ends_hear_of_it():
    lengths = set()

    async def main(network):
        connection, client, server = connected(network)
        written = bytes(range(256)) * 4
        for first in range(0, len(written), 64):
            connection.ends[0].write(written[first : first + 64])
        await asyncio.sleep(random.Random(main.seed).random() * 0.01)
        connection.cut(random.Random(main.seed))
        await asyncio.sleep(1)
        assert written.startswith(bytes(server.data))
        assert client.events[-1] == "reset"
        assert server.events[-1] == "reset"
        lengths.add(len(server.data))

    for main.seed in range(30):
        simulate(main, main.seed)
    assert len(lengths) > 1


def test_a_silent_connection_delivers_nothing_and_tells_nobody():
    async def main(network):
        connection, client, server = connected(network)
        connection.fall_silent()
        connection.ends[0].write(b"into the void")
        await asyncio.sleep(1000)
        assert server.events == ["made"]
        assert client.events == ["made"]

    simulate(main)


def test_a_writer_is_paused_above_the_high_water_mark_and_resumed_below_the_low_one():
    async def main(network):
        connection, client, _ = connected(network)
        connection.ends[0].write(bytes(HIGH_WATER_BYTES + 1))
        assert client.events == ["made", "pause"]
        await asyncio.sleep(1)
        assert client.events == ["made", "pause", "resume"]

    simulate(main)


def test_nothing_is_delivered_to_a_reader_that_paused():
    async def main(network):
        connection, _, server = connected(network)
        connection.ends[1].pause_reading()
        connection.ends[0].write(b"patience")
        await asyncio.sleep(1)
        assert server.data == b""
        connection.ends[1].resume_reading()
        await asyncio.sleep(1)
        assert bytes(server.data) == b"patience"

    simulate(main)


def test_the_peer_of_a_dead_process_reads_a_reset_and_the_dead_nothing():
    async def main(network):
        connection, client, server = connected(network)
        process = connection.ends[1].process
        process.kill()
        connection.process_died(process)
        connection.ends[0].write(b"x")
        await asyncio.sleep(1)
        assert client.events == ["made", "reset"]
        assert server.events == ["made"]

    simulate(main)


def test_connecting_to_a_dead_process_or_over_a_network_that_is_down_is_refused():
    async def main(network):
        dead = SimulatedProcess("server")
        dead.kill()
        with pytest.raises(ConnectionRefusedError):
            network.connect(SimulatedProcess("client"), dead)
        network.is_down = True
        with pytest.raises(ConnectionRefusedError):
            network.connect(SimulatedProcess("client"), SimulatedProcess("server"))

    simulate(main)


def test_a_connection_can_be_cut_behind_any_byte():
    async def main(network, size):
        connection, client, server = connected(network)
        connection.ends[0].bytes_until_cut = size
        for number in range(10):
            connection.ends[0].write(bytes([number]) * 10)
        await asyncio.sleep(1)
        assert (client.events[-1], server.events[-1]) == ("reset", "reset")
        return len(server.data)

    assert [simulate(lambda network, size=size: main(network, size)) for size in (1, 7, 50, 99)] == [1, 7, 50, 99]


def test_one_way_silence_and_a_half_open_connection_are_noticed_at_one_end_only():
    async def main(network):
        deaf, client, server = connected(network)
        deaf.ends[0].is_silent = True
        deaf.ends[0].write(b"unheard")
        deaf.ends[1].write(b"heard")
        half, left, told_nothing = connected(network)
        half.open_half(random.Random(1))
        half.ends[0].write(b"into the void")
        half.ends[1].write(b"into the void")
        await asyncio.sleep(1)
        assert (bytes(server.data), bytes(client.data)) == (b"", b"heard")
        assert sorted([left.events[-1], told_nothing.events[-1]]) == ["made", "reset"]
        assert not left.data
        assert not told_nothing.data

    simulate(main)


def test_what_was_sent_on_a_connection_that_was_given_up_arrives_late_and_whole():
    async def main(network):
        connection, client, server = connected(network)
        connection.fall_silent()
        connection.ends[0].writelines([b"from", b" before"])
        await asyncio.sleep(1)
        connection.ends[0].give_up_and_arrive_late(10.0)
        await asyncio.sleep(1)
        assert (client.events[-1], bytes(server.data)) == ("reset", b"")
        await asyncio.sleep(10)
        assert (server.events[-1], bytes(server.data)) == ("reset", b"from before")

    simulate(main)


def test_a_slow_connection_delivers_a_little_at_a_time_until_the_network_heals():
    async def main(network):
        network.slow_latency_seconds = 1.0
        connection, _, server = connected(network)
        connection.ends[0].write(bytes(SLOW_BYTES_PER_DELIVERY * 4))
        await asyncio.sleep(1.5)
        assert len(server.data) <= SLOW_BYTES_PER_DELIVERY
        network.heal()
        await asyncio.sleep(1.5)
        assert len(server.data) == SLOW_BYTES_PER_DELIVERY * 4

    simulate(main)
