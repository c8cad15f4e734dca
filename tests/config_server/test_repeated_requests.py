"""A change that is asked for twice under one Idempotency-Key is carried out once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from protocol.control_errors import RequestRepeated, ServerUnreachable
from protocol.operator_messages import AuditEntry, OperatorRole, OperatorTokenRequest, PolicyStatus, ReplicationPolicy
from tests.config_server.running import Running, registration, running_server

GOLD = ReplicationPolicy(name="gold", rpo_threshold_seconds=600.0, point_interval_seconds=60.0)
JSON = {"Content-Type": "application/json"}


async def entries(server: Running) -> tuple[AuditEntry, ...]:
    async with server.operator() as administrator:
        return (await administrator.audit_page()).entries


async def send(
    session: aiohttp.ClientSession, key: str, *, method: str = "POST", url: str = "/v1/policies", body: Any = GOLD
) -> tuple[int, bytes]:
    data = None if body is None else body.model_dump_json()
    headers = {"Idempotency-Key": key} | ({} if body is None else JSON)
    async with session.request(method, url, data=data, headers=headers) as response:
        return response.status, await response.read()


async def test_the_same_answer_comes_again_and_nothing_is_done_twice(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        server.administrator() as session,
    ):
        first, again = await send(session, "k1"), await send(session, "k1")
        assert first == again
        assert first[0] == 200
        made = PolicyStatus.model_validate_json(first[1])
        url = f"/v1/policies/{made.policy}"
        silver = GOLD.model_copy(update={"name": "silver"})
        edits = [await send(session, "k2", method="PUT", url=url, body=silver) for _ in range(2)]
        assert edits[0] == edits[1]
        deletions = [await send(session, "k3", method="DELETE", url=url, body=None) for _ in range(2)]
        assert deletions == [(200, b"{}")] * 2
        assert [entry.action for entry in await entries(server)] == ["create policy", "edit policy", "delete policy"]
    async with (
        running_server(tmp_path / "server") as server,
        server.administrator() as session,
    ):
        assert await send(session, "k3", method="DELETE", url=url, body=None) == (200, b"{}")
        assert (await send(session, "k4", method="DELETE", url=url, body=None))[0] == 404


async def test_a_key_is_of_one_request_of_one_caller(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        server.administrator() as session,
    ):
        assert (await send(session, "k"))[0] == 200
        assert (await send(session, "k", body=GOLD.model_copy(update={"name": "silver"})))[0] == 409
        token = OperatorTokenRequest(name="x", role=OperatorRole.OPERATOR)
        status, problem = await send(session, "k", url="/v1/operator-tokens", body=token)
        assert status == 409
        assert b"idempotency-key-reused" in problem
        other = await server.operator_token(OperatorRole.OPERATOR)
        async with server.plain_session(bearer=other.secret_token) as others:
            assert (await send(others, "k", body=GOLD.model_copy(update={"name": "silver"})))[0] == 200
        for wrong in ("x" * 129, "two words"):
            assert (await send(session, wrong))[0] == 400


async def test_a_secret_is_not_shown_twice(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        server.administrator() as session,
    ):
        request = OperatorTokenRequest(name="x", role=OperatorRole.VIEWER)
        status, _ = await send(session, "k", url="/v1/operator-tokens", body=request)
        assert status == 200
        status, problem = await send(session, "k", url="/v1/operator-tokens", body=request)
        assert status == 409
        assert b"request-repeated" in problem
        (entry,) = await entries(server)
        assert entry.subject.encode() in problem


async def test_requests_at_once_with_one_key_change_once(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        server.administrator() as session,
    ):
        request = OperatorTokenRequest(name="x", role=OperatorRole.VIEWER)
        found = await asyncio.gather(*(send(session, "k", url="/v1/operator-tokens", body=request) for _ in range(8)))
        assert sorted(status for status, _ in found) == [200] + [409] * 7
        assert len(await entries(server)) == 1
        async with server.operator() as administrator:
            assert len((await administrator.operator_tokens()).tokens) == 1


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_repeats_that_overtake_each_other_get_the_same_answer(tmp_path: Path, method: str) -> None:
    async with running_server(tmp_path / "server") as server, server.administrator() as session:
        url, body = "/v1/policies", GOLD
        if method != "POST":
            made = PolicyStatus.model_validate_json((await send(session, "made"))[1])
            url, body = f"{url}/{made.policy}", GOLD.model_copy(update={"name": "silver"})
        found = await asyncio.gather(
            *(send(session, "k", method=method, url=url, body=None if method == "DELETE" else body) for _ in range(6))
        )
        assert len(set(found)) == 1
        assert found[0][0] == 200


async def test_the_command_lines_client_asks_again_when_an_answer_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        server.operator() as operator,
        await server.agent(tmp_path / "agent") as agent,
    ):
        machine = (await agent.register_disk(registration())).machine
        exchange, lost = operator._connection._exchange, []

        async def lose_every_other(*arguments: Any) -> Any:
            answer = await exchange(*arguments)
            lost.append(arguments)
            if len(lost) % 2:
                raise ServerUnreachable(server=server.url, reason="cut off")
            return answer

        monkeypatch.setattr(operator._connection, "_exchange", lose_every_other)
        made = await operator.create_policy(GOLD)
        await operator.set_policy(machine, made.policy)
        with pytest.raises(RequestRepeated):
            await operator.create_operator_token(OperatorTokenRequest(name="x", role=OperatorRole.VIEWER))
        done = [entry.action for entry in await entries(server)][-3:]
        assert done == ["create policy", "set policy of machine", "create operator token"]
        assert len(lost) == 6
