"""Reads what the demo's programs count, from their own /metrics."""

from __future__ import annotations

from dataclasses import dataclass

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from farpoint.demo.programs import HOST

REQUEST_SECONDS_MAX = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What has gone through the line since its programs began; bytes, seconds."""

    read_bytes: int
    sent_bytes: int
    stored_bytes: int
    cpu_seconds: float

    def since(self, earlier: Counts) -> Counts:
        return Counts(
            read_bytes=self.read_bytes - earlier.read_bytes,
            sent_bytes=self.sent_bytes - earlier.sent_bytes,
            stored_bytes=self.stored_bytes - earlier.stored_bytes,
            cpu_seconds=round(self.cpu_seconds - earlier.cpu_seconds, 2),
        )


async def answers(port: int) -> bool:
    """Whether a program serves its metrics at `port` by now."""
    try:
        await counted(port, "")
    except (aiohttp.ClientError, TimeoutError):
        return False
    return True


async def counted(port: int, name: str) -> int:
    """The sum over all labels of one counter or gauge of the program whose endpoint is at `port`; 0 if it has none.

    Raises aiohttp.ClientError, TimeoutError.
    """
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS_MAX)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.get(f"http://{HOST}:{port}/metrics", raise_for_status=True) as answer,
    ):
        text = await answer.text()
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return int(sum(sample.value for sample in samples if sample.name == name))
