"""Long lists come in pages; all pages together are the list, each row once."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from protocol.control import CommittedPoint
from protocol.operator_messages import CertificateList, DiskList, MachineList, RecoveryPointList
from protocol.transport import operator_client
from protocol.vocabulary import Consistency, PointId
from tests.config_server.running import (
    disk_identity,
    position,
    process_server_report,
    registration,
    running_server,
)

MACHINES, DISKS, POINTS = 5, 3, 4


async def pages(session: aiohttp.ClientSession, url: str, reply: type, limit: int) -> list[list[object]]:
    """The rows of each page."""
    found, after = [], ""
    while after is not None:
        async with session.get(url, params={"after": after, "limit": str(limit)}) as response:
            assert response.status == 200, await response.text()
            listed = reply.model_validate_json(await response.read())
        rows = next(value for name, value in listed if isinstance(value, tuple))
        found.append(list(rows))
        after = listed.next
    return found


async def test_all_pages_together_are_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_server(tmp_path / "server") as server, server.administrator() as session:
        points = []
        async with await server.process_server(tmp_path / "process-server") as process_server:
            await process_server.report(process_server_report())
            for number in range(MACHINES):
                async with await server.agent(tmp_path / str(number), name=f"db-{MACHINES - number}") as agent:
                    for serial in range(DISKS):
                        identity = disk_identity(f"{number}-{serial}")
                        disk = (await agent.register_disk(registration(f"/dev/{serial}", identity))).disk
                        points += [
                            CommittedPoint(
                                disk=disk,
                                epoch=1,
                                sequence=at,
                                point=PointId(f"{len(points) + at:032x}"),
                                instant_ns=10**18 + at // 2,
                                consistency=Consistency.CRASH,
                            )
                            for at in range(1, POINTS + 1)
                        ]
            for first in range(0, len(points), POINTS):
                some = tuple(points[first : first + POINTS])
                await process_server.report(
                    process_server_report(
                        positions=(position(some[0].disk, durable=POINTS, committed=POINTS),), committed_points=some
                    )
                )
        for url, reply, count in (
            ("/v1/machines", MachineList, MACHINES),
            ("/v1/disks", DiskList, MACHINES * DISKS),
            ("/v1/certificates", CertificateList, MACHINES + 1),
            ("/v1/points", RecoveryPointList, MACHINES * DISKS * POINTS),
        ):
            whole = await pages(session, url, reply, 1000)
            assert [len(page) for page in whole] == [count]
            for limit in (1, 2, count - 1, count):
                found = await pages(session, url, reply, limit)
                assert [row for page in found for row in page] == whole[0], (url, limit)
                assert {len(page) for page in found[:-1]} <= {limit}
                assert found[-1]
        request = operator_client.ControlConnection.request

        async def in_twos(connection: object, method: str, path: str, reply: type, **values: object) -> object:
            if method == "GET" and path in ("/v1/machines", "/v1/disks", "/v1/certificates"):
                values["query"] = {**(values.get("query") or {}), "limit": "2"}  # type: ignore[dict-item]
            return await request(connection, method, path, reply, **values)  # type: ignore[arg-type]

        monkeypatch.setattr(operator_client.ControlConnection, "request", in_twos)
        async with server.operator() as operator:
            assert [one.name for one in (await operator.machines()).machines] == [
                f"db-{n + 1}" for n in range(MACHINES)
            ]
            listed = (await operator.disks()).disks
            assert len({one.disk for one in listed}) == len(listed) == MACHINES * DISKS
            assert len((await operator.certificates()).certificates) == MACHINES + 1


@pytest.mark.parametrize(
    ("url", "query"),
    [
        ("/v1/machines", "limit=0"),
        ("/v1/machines", "limit=1001"),
        ("/v1/machines", "after=x"),
        ("/v1/certificates", "after=abc"),
        ("/v1/points", "after=1.2.3"),
        ("/v1/points", "after=9999999999999999999.1.1." + "a" * 32),
    ],
)
async def test_what_is_no_page_is_refused(tmp_path: Path, url: str, query: str) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        server.administrator() as session,
        session.get(f"{url}?{query}") as response,
    ):
        assert response.status == 400
