"""Two ends of a simulated connection as the product's own channels, the agent's end watched by the invariants.

Below them is protocol.transport.byte_channel, framing and codec as in production; only TLS is missing, so the
identities that certificates would prove are stated here.
"""

from __future__ import annotations

import contextvars
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from typing_extensions import Buffer

from protocol.messages import Message
from protocol.transport.buffers import BufferPool
from protocol.transport.byte_channel import ByteChannel, Received
from protocol.vocabulary import PeerIdentity
from tests.simulation.network import Connection
from tests.simulation.process import RUNNING_PROCESS, SimulatedProcess

if TYPE_CHECKING:
    from tests.simulation.world import World

POOL_BUFFERS: Final = 6


class WatchedChannel:
    """The agent's end: everything that is said passes the invariants on its way."""

    def __init__(self, channel: ByteChannel, world: World, process: SimulatedProcess) -> None:
        self._channel = channel
        self._world = world
        self._process = process
        self._view = world.invariants.new_connection()

    @property
    def peer(self) -> PeerIdentity:
        return self._channel.peer

    @property
    def certificate_serial(self) -> str:
        return self._channel.certificate_serial

    def set_idle_seconds_max(self, seconds: float) -> None:
        self._channel.set_idle_seconds_max(seconds)

    async def send(self, message: Message, body: Sequence[Buffer] = ()) -> None:
        self._process.check_alive()
        self._view.agent_sends(message, body)
        await self._channel.send(message, body)

    async def receive(self) -> Received:
        self._process.check_alive()
        received = await self._channel.receive()
        self._process.check_alive()
        self._view.agent_receives(received.message)
        return received

    async def close(self) -> None:
        await self._channel.close()

    def abort(self) -> None:
        self._channel.abort()


def connected_channels(
    world: World, connection: Connection, agent: PeerIdentity, process_server: PeerIdentity, pool: BufferPool
) -> tuple[Any, ByteChannel]:
    """(the agent's end, the process server's end), both connected. Each end's callbacks belong to its own process."""
    agent_end, server_end = connection.ends
    agent_channel = ByteChannel(peer=process_server, pool=None)
    server_channel = ByteChannel(peer=agent, pool=pool)
    context_of(agent_end.process).run(agent_end.start, agent_channel)
    context_of(server_end.process).run(server_end.start, server_channel)
    return WatchedChannel(agent_channel, world, agent_end.process), server_channel


def context_of(process: SimulatedProcess) -> contextvars.Context:
    """A context in which everything belongs to `process`."""
    context = contextvars.copy_context()
    context.run(RUNNING_PROCESS.set, process)
    return context
