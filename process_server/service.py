"""The process server as one object: everything it touches is handed to it, so that a test or the simulation runs the
same shells.

Invariants: an acknowledgement follows the cache's synchronize, a committed position follows the store's create; a lost
connection ends its own tasks and no others; when `run` ends, everything it started has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from process_server.settings import ProcessServerLimits

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from protocol.control import ProcessServerControl
    from protocol.transport.channel import Channel
    from protocol.vocabulary import PeerIdentity
    from runtime.clock import Clock
    from runtime.directory import DurableDirectory
    from storage.disk_archive import DiskArchive


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessServerPorts:
    """The outside world of one process server. Nothing else is read, written, asked, or drawn.

    identity: this process server's own, as in its certificate. signing_key: the Ed25519 key that its grants name.
    cache: one flat directory for the cache's log files, nothing else in it. state: grants and the revoked list.
    random_bytes(n): n bytes for data keys. sealing_executor: CPU work (two threads). cache_executor: the cache's file
    calls (one thread writes, reads for upload may use another).
    """

    identity: PeerIdentity
    signing_key: Ed25519PrivateKey
    cache: DurableDirectory
    state: DurableDirectory
    archive: DiskArchive
    control: ProcessServerControl
    clock: Clock
    random_bytes: Callable[[int], bytes]
    sealing_executor: Executor
    cache_executor: Executor


class ProcessServer:
    """Made once per process. `run` recovers the cache and works until `stop` is called; channels are served meanwhile.
    """

    def __init__(self, ports: ProcessServerPorts, limits: ProcessServerLimits) -> None:
        self._ports = ports
        self._limits = limits

    async def run(self) -> None:
        """Recovers what the cache holds, then seals, caches, uploads and reports until stop(); returns when all has
        ended.

        Cancelling it is a crash as far as durable state is concerned: what was acknowledged survives, nothing else
        need. Raises ReplicationError only for what no retry mends (a cache directory that cannot be read or written at
        start).
        """
        raise NotImplementedError

    async def wait_until_ready(self) -> None:
        """Returns once the cache is recovered and channels may be served."""
        raise NotImplementedError

    async def serve_channel(self, channel: Channel) -> None:
        """Serves one accepted connection to its end, in the caller's task; returns when it is over, and closes the
        channel.

        The peer's faults and a lost connection end only this call, without raising. May be called as soon as `run` runs
        (it waits until the cache is recovered).
        """
        raise NotImplementedError

    def stop(self) -> None:
        """Orderly end: no more frames are taken, what was received is made durable and acknowledged, agents get a
        goodbye, closed

        segments are uploaded for at most limits.stop_seconds_max; then run() returns. Nothing acknowledged depends on
        it.
        """
        raise NotImplementedError
