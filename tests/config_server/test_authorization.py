"""Every route × everybody who could call it; bodies that nobody should send; the document that describes it all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from config_server.api.openapi import openapi_document
from config_server.api.route import ACCESS_OF_OPERATOR, MEMBERS, NOBODY, SMALL_BODY_BYTES_MAX, Access, Route
from config_server.api.routes import ROUTES
from protocol.control import BODY_VALUES_MAX
from protocol.enrollment import CREDENTIALS_FILE
from protocol.operator_messages import Problem
from protocol.vocabulary import Role
from tests.config_server.running import Running, agent_report, registration, running_server

PRINCIPALS: dict[str, Access] = {
    "nobody": Access.ANYONE,
    "agent": Access.AGENT,
    "process-server": Access.PROCESS_SERVER,
    "recovery-worker": Access.RECOVERY_WORKER,
    "viewer": Access.VIEWER,
    "operator": Access.OPERATOR,
    "recovery": Access.RECOVERY,
    "auditor": Access.AUDITOR,
    "administrator": Access.ADMINISTRATOR,
}
REFUSED = {401, 403}
SAMPLE_PATH = {"disk": "d" * 32, "serial": "AB", "token": "e" * 32, "policy": "f" * 32, "machine": "a" * 32}


async def ask(
    server: Running, members: dict[Access, Path], tokens: dict[Access, str], principal: Access, route: Route
) -> tuple[int, Problem | None]:
    async with server.plain_session(members.get(principal), bearer=tokens.get(principal)) as session:
        url = route.template.format(**SAMPLE_PATH)
        data = None if route.body is None else b"{}"
        headers = {} if data is None else {"Content-Type": "application/json"}
        async with session.request(route.method, url, data=data, headers=headers) as response:
            body = await response.read()
            if response.status < 400:
                return response.status, None
            assert response.content_type == "application/problem+json"
            return response.status, Problem.model_validate_json(body)


async def test_every_route_serves_whom_it_names_and_nobody_else(tmp_path: Path) -> None:
    """The requests are empty: whoever is let in gets an answer, or 400 or 404; all others get 401 or 403."""
    async with running_server(tmp_path / "server") as server:
        members: dict[Access, Path] = {}
        for role, access in (
            (Role.AGENT, Access.AGENT),
            (Role.PROCESS_SERVER, Access.PROCESS_SERVER),
            (Role.RECOVERY_WORKER, Access.RECOVERY_WORKER),
        ):
            await server.enroll(role, tmp_path / role.value)
            members[access] = tmp_path / role.value / CREDENTIALS_FILE
        tokens = {Access.ADMINISTRATOR: server.admin_token}
        for operator_role, access in ACCESS_OF_OPERATOR.items():
            tokens[access] = (await server.operator_token(operator_role)).secret_token
        seen: dict[tuple[str, str, str], bool] = {}
        for route in ROUTES:
            for name, principal in PRINCIPALS.items():
                status, problem = await ask(server, members, tokens, principal, route)
                seen[route.method, route.template, name] = status not in REFUSED
                assert status < 500, problem
    expected = {
        (route.method, route.template, name): principal in route.serves or Access.ANYONE in route.serves
        for route in ROUTES
        for name, principal in PRINCIPALS.items()
    }
    assert seen == expected


def test_the_table_is_as_narrow_as_it_should_be() -> None:
    """What the rows say, said again by hand: a slip in one of them shows here."""
    public = {route.template for route in ROUTES if Access.ANYONE in route.serves}
    assert public == {"/v1/authority", "/v1/enrollments"}
    for route in ROUTES:
        if route.template.startswith("/v1/agent/"):
            assert route.serves == {Access.AGENT}
        elif route.template.startswith("/v1/process-server/"):
            assert route.serves == {Access.PROCESS_SERVER}
        elif route.template == "/v1/certificates" and route.method == "POST":
            assert route.serves == MEMBERS
        elif route.template.startswith("/v1/operator-tokens"):
            assert route.serves == {Access.ADMINISTRATOR} | ({Access.AUDITOR} if route.method == "GET" else set())
        elif route.template == "/v1/audit":
            assert route.serves == {Access.ADMINISTRATOR, Access.AUDITOR}
        elif route.template not in public:
            assert route.serves >= {Access.OPERATOR, Access.ADMINISTRATOR}
            if route.method != "GET":
                assert route.serves == {Access.OPERATOR, Access.ADMINISTRATOR}


def test_a_route_that_names_nobody_serves_nobody() -> None:
    one = ROUTES[0]
    route = Route(method="GET", template="/x", summary="", handler=one.handler, reply=one.reply)
    assert route.serves == NOBODY == frozenset()


async def test_a_certificate_does_not_help_where_a_wrong_admin_token_is_shown(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        await server.enroll(Role.RECOVERY_WORKER, tmp_path / "worker")
        credentials = tmp_path / "worker" / CREDENTIALS_FILE
        async with server.plain_session(credentials, bearer="wrong") as session, session.get("/v1/disks") as response:
            assert response.status == 401
        for header in ("Basic YTpi", "Bearer", "Bearer \udcff"):
            async with (
                server.plain_session() as session,
                session.get("/v1/disks", headers={"Authorization": header}) as response,
            ):
                assert response.status == 401


async def test_unknown_paths_and_methods_are_problems_too(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server, server.plain_session() as session:
        for method, path in (("GET", "/"), ("GET", "/v1/secrets"), ("DELETE", "/v2/machines")):
            async with session.request(method, path) as response:
                assert response.status == 404
                assert Problem.model_validate_json(await response.read()).code == "not-found"
        for method, path, allowed in (
            ("DELETE", "/v1/machines", "GET"),
            ("TRACE", "/v1/policies", "GET, POST"),
            ("POST", "/openapi.json", "GET"),
        ):
            async with session.request(method, path) as response:
                assert response.status == 405
                assert response.headers["Allow"] == allowed
                assert Problem.model_validate_json(await response.read()).code == "method-not-allowed"


MALFORMED: tuple[tuple[str, bytes], ...] = (
    ("nothing", b""),
    ("not JSON", b"{"),
    ("a list", b"[]"),
    ("not UTF-8", b'{"path": "\xff"}'),
    ("an unknown field", json.dumps({**json.loads(registration().model_dump_json()), "owner": "me"}).encode()),
    ("a number for a text", registration().model_dump_json().replace('"/dev/vda"', "7").encode()),
    ("a text for a number", registration().model_dump_json().replace("1073741824", '"1073741824"').encode()),
    ("a size beyond all disks", registration().model_dump_json().replace("1073741824", str(2**57)).encode()),
    ("an odd sector size", registration().model_dump_json().replace("512", "513").encode()),
    ("a path that is too long", b'{"path":"' + b"x" * 5000 + b'"}'),
    ("deep nesting", b"[" * 50_000),
)


@pytest.mark.parametrize(("what", "body"), MALFORMED, ids=[what for what, _ in MALFORMED])
async def test_a_malformed_body_is_refused_without_repeating_it(tmp_path: Path, what: str, body: bytes) -> None:
    async with running_server(tmp_path / "server") as server:
        await server.enroll(Role.AGENT, tmp_path / "agent")
        async with (
            server.plain_session(tmp_path / "agent" / CREDENTIALS_FILE) as session,
            session.post("/v1/agent/disks", data=body, headers={"Content-Type": "application/json"}) as response,
        ):
            assert response.status == 400
            problem = Problem.model_validate_json(await response.read())
    assert problem.code == "request-invalid"
    assert "xxxxxxxx" not in problem.detail
    assert not problem.is_retryable


async def test_other_content_types_and_encodings_are_refused(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        await server.enroll(Role.AGENT, tmp_path / "agent")
        body = agent_report().model_dump_json().encode()
        for headers in (
            {"Content-Type": "text/plain"},
            {"Content-Type": "application/json", "Content-Encoding": "gzip"},
            {"Content-Type": "application/json", "Content-Encoding": "identity"},
        ):
            async with (
                server.plain_session(tmp_path / "agent" / CREDENTIALS_FILE) as session,
                session.post("/v1/agent/report", data=body, headers=headers) as response,
            ):
                assert response.status == 400


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_an_oversized_body_is_refused_before_it_is_parsed(tmp_path: Path, is_chunked: bool) -> None:
    async with running_server(tmp_path / "server") as server:
        body = b'"' + b"x" * (SMALL_BODY_BYTES_MAX + 1)

        async def chunks() -> Any:
            for begin in range(0, len(body), 16384):
                yield body[begin : begin + 16384]

        async with server.plain_session() as session:
            try:
                async with session.post(
                    "/v1/enrollments",
                    data=chunks() if is_chunked else body,
                    headers={"Content-Type": "application/json"},
                ) as response:
                    assert response.status == 413
                    problem = Problem.model_validate_json(await response.read())
                    assert problem.code == "request-too-large"
            except aiohttp.ClientOSError:
                # the server may hang up on what it does not want to read; it must still be there
                assert is_chunked
            async with session.get("/v1/authority") as response:
                assert response.status == 200


async def test_a_body_of_very_many_values_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        await server.enroll(Role.AGENT, tmp_path / "agent")
        body = b'{"disks":[' + b"{}," * (BODY_VALUES_MAX // 2) + b"{}]}"
        async with (
            server.plain_session(tmp_path / "agent" / CREDENTIALS_FILE) as session,
            session.post("/v1/agent/report", data=body, headers={"Content-Type": "application/json"}) as response,
        ):
            assert response.status == 400
            problem = Problem.model_validate_json(await response.read())
    assert f"more than {BODY_VALUES_MAX} values" in problem.detail


@pytest.mark.parametrize(
    "query",
    ["revision=zz", "wait_seconds=-1", "wait_seconds=61", "wait_seconds=nan", "wait_seconds=1&wait_seconds=2", "x=1"],
)
async def test_a_malformed_query_is_refused(tmp_path: Path, query: str) -> None:
    async with running_server(tmp_path / "server") as server:
        await server.enroll(Role.AGENT, tmp_path / "agent")
        async with (
            server.plain_session(tmp_path / "agent" / CREDENTIALS_FILE) as session,
            session.get(f"/v1/agent/orders?{query}") as response,
        ):
            assert response.status == 400


async def test_the_openapi_document_is_served_and_complete(tmp_path: Path) -> None:
    async with (
        running_server(tmp_path / "server") as server,
        server.plain_session() as session,
        session.get("/openapi.json") as response,
    ):
        document = await response.json()
    assert document == json.loads(json.dumps(openapi_document(ROUTES)))
    assert document["openapi"] == "3.1.0"
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len(operations) == len(ROUTES)
    assert len({operation["operationId"] for operation in operations}) == len(ROUTES)
    for route in ROUTES:
        operation = document["paths"][route.template][route.method.lower()]
        assert operation["x-serves"] == sorted(access.value for access in route.serves)
        assert ("requestBody" in operation) == (route.body is not None)
        in_path = {one["name"] for one in operation["parameters"] if one["in"] == "path"}
        assert in_path == set(route.path.model_fields)
        assert bool(operation["security"]) == (Access.ANYONE not in route.serves)


def test_the_document_that_is_kept_is_that_of_the_table() -> None:
    kept = Path(__file__).parents[2] / "docs" / "openapi.json"
    assert json.loads(kept.read_text()) == json.loads(json.dumps(openapi_document(ROUTES))), "run `make openapi`"


def test_every_reference_in_the_openapi_document_leads_somewhere() -> None:
    document = openapi_document(ROUTES)
    references: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                references.append(value["$ref"])
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(document)
    assert references
    for reference in references:
        node: Any = document
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]
        assert node
    assert "$defs" not in json.dumps(document)
