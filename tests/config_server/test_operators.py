"""Operator tokens and the audit log, against a server that really runs and the database that it leaves behind."""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config_server import token_hashes
from config_server.audit import ADMINISTRATOR, NEWCOMER
from config_server.core.rate_limit import Rate, RateLimit
from config_server.installation import DATABASE_FILE
from config_server.operators import USE_NOTED_NS
from config_server.token_hashes import (
    CHECKS_WAITING_MAX,
    REMEMBERED_MAX,
    SecretChecker,
    hash_secret,
    is_hash,
    is_hash_of,
)
from config_server.wrong_secrets import RATE
from protocol.audit_chain import ChainEnd, entry_hash, follow_chain
from protocol.control_errors import (
    AuditChainBroken,
    AuditFormatUnknown,
    CredentialMissing,
    OperatorTokenRefused,
    ResourceNotFound,
    ServerUnwell,
)
from protocol.enrollment import (
    EnrollableRole,
    EnrollmentRequest,
    make_certificate_key,
    proof_key,
    prove,
    transcript,
)
from protocol.errors import NotPermitted
from protocol.join_token import JoinToken
from protocol.operator_messages import AuditEntry, OperatorRole, OperatorTokenRequest
from protocol.vocabulary import Role, VaultId
from tests.config_server.running import VAULT, AdjustableClock, Running, registration, running_server

DAY_NS = 86400 * 10**9
BEGINNING = ChainEnd.beginning(VAULT)


async def refusal(server: Running, token: str) -> str:
    async with server.operator(token) as operator:
        with pytest.raises(OperatorTokenRefused) as refused:
            await operator.machines()
    return str(refused.value.fields["reason"])


async def test_a_token_counts_until_it_expires_or_is_revoked(tmp_path: Path) -> None:
    clock = AdjustableClock()
    async with running_server(tmp_path / "server", clock=clock) as server:
        short = await server.operator_token(OperatorRole.VIEWER, name="short", lifetime_seconds=3600)
        long = await server.operator_token(OperatorRole.VIEWER, name="long", lifetime_seconds=86400)
        for created in (short, long):
            async with server.operator(created.secret_token) as operator:
                await operator.machines()
        clock.offset_ns += 3601 * 10**9
        assert "expired" in await refusal(server, short.secret_token)
        async with server.operator() as administrator:
            for _ in range(2):
                await administrator.revoke_operator_token(long.token)
            with pytest.raises(ResourceNotFound):
                await administrator.revoke_operator_token("9" * 32)
            listed = {one.name: one for one in (await administrator.operator_tokens()).tokens}
        assert "revoked" in await refusal(server, long.secret_token)
        assert listed["long"].is_revoked
        assert not listed["short"].is_revoked
    async with running_server(tmp_path / "server", clock=clock) as server:
        assert "revoked" in await refusal(server, long.secret_token)


async def test_what_is_almost_a_token_is_none(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        created = await server.operator_token(OperatorRole.AUDITOR)
        head, token, secret = created.secret_token.split(".")
        other = await server.operator_token(OperatorRole.VIEWER)
        for wrong in (
            f"{head}.{token}.{secret[:-1]}{'A' if secret[-1] != 'A' else 'B'}",
            f"{head}.{'0' * 32}.{secret}",
            f"{head}.{other.token}.{secret}",
        ):
            assert await refusal(server, wrong) == "it is not known here"
        for wrong in (secret, token, f"{head}.{token}", server.admin_token + "x", "x" * 600, "farpoint..", "é"):
            async with server.plain_session(bearer=wrong) as session, session.get("/v1/machines") as response:
                assert response.status == 401
                assert "code" in await response.json(content_type=None)


async def test_a_role_is_no_more_than_it_says(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        for role in OperatorRole:
            created = await server.operator_token(role)
            async with server.operator(created.secret_token) as operator:
                await operator.disks()
                with pytest.raises(NotPermitted):
                    await operator.create_operator_token(OperatorTokenRequest(name="x", role=OperatorRole.VIEWER))


async def test_when_a_token_was_used_is_kept_without_a_write_each_time(tmp_path: Path) -> None:
    clock = AdjustableClock()
    async with running_server(tmp_path / "server", clock=clock) as server:
        created = await server.operator_token(OperatorRole.VIEWER, lifetime_seconds=86400)
        seen = []
        for step_ns in (0, USE_NOTED_NS // 2, USE_NOTED_NS):
            clock.offset_ns += step_ns
            async with server.operator(created.secret_token) as operator, server.operator() as administrator:
                await operator.machines()
                (status,) = (await administrator.operator_tokens()).tokens
                seen.append(status.used_at_ns)
        first, second, third = seen
        assert first is not None
        assert third is not None
        assert first == second < third


async def test_nothing_at_rest_is_a_token(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        created = await server.operator_token(OperatorRole.OPERATOR)
        admin_token = server.admin_token
        (server.path / "admin-token").unlink()  # what an operator may do, and should
        secret = created.secret_token.rsplit(".", 1)[1]
        async with server.operator(created.secret_token) as operator:
            await operator.machines()
        for file in server.path.rglob("*"):
            if file.is_file():
                data = file.read_bytes()
                assert secret.encode() not in data
                assert admin_token.encode() not in data
        async with server.operator(admin_token) as administrator:
            assert len((await administrator.operator_tokens()).tokens) == 1
    async with running_server(tmp_path / "server") as server, server.operator(admin_token) as administrator:
        await administrator.machines()


def enrollment(token: JoinToken, *, role: EnrollableRole = Role.AGENT, is_right: bool) -> EnrollmentRequest:
    request_pem = make_certificate_key("x").request_pem
    statement = transcript(
        token=token.identifier,
        role=role,
        name="x",
        request_pem=request_pem,
        signing_public_key=None,
        authority_key_hash=token.authority_key_hash,
    )
    secret = token.secret if is_right else bytes(32)
    return EnrollmentRequest(
        token=token.identifier,
        role=role,
        name="x",
        request_pem=request_pem,
        proof=prove(proof_key(secret), statement),
    )


async def test_who_guesses_join_tokens_has_to_wait_and_nobody_else(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server, server.plain_session() as session:
        token, used = await server.token(Role.AGENT), await server.token(Role.AGENT)

        async def send(request: EnrollmentRequest) -> tuple[int, str | None]:
            json = {"Content-Type": "application/json"}
            async with session.post("/v1/enrollments", data=request.model_dump_json(), headers=json) as response:
                return response.status, response.headers.get("Retry-After")

        assert await send(enrollment(used, is_right=True)) == (200, None)
        for _ in range(RATE.at_once + 5):
            assert (await send(enrollment(used, is_right=True)))[0] == 409, "it was right, and is only used"
        wrong = [enrollment(token, is_right=False)] * RATE.at_once
        wrong += [enrollment(replace(token, identifier="0" * 32), is_right=True)] * RATE.at_once
        answers = await asyncio.gather(*map(send, wrong))
        assert {status for status, _ in answers} == {403, 429}
        assert sum(status == 403 for status, _ in answers) <= RATE.at_once + 2
        assert {after for status, after in answers if status == 429} <= {"1", "2"}
        assert await send(enrollment(token, is_right=True)) == (200, None), "from the same address, and right"


async def test_wrong_operator_tokens_cost_nothing_and_shut_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[bytes] = []
    original = token_hashes.is_hash_of
    monkeypatch.setattr(token_hashes, "is_hash_of", lambda *given: (checked.append(given[0]), original(*given))[1])
    async with running_server(tmp_path / "server") as server:
        created = await server.operator_token(OperatorRole.VIEWER)
        checked.clear()
        head, token, secret = created.secret_token.split(".")
        wrong = [f"{head}.{token}.{'A' * 43}", f"{head}.{'0' * 32}.{secret}", "A" * 43]

        async def ask(bearer: str) -> int:
            async with server.plain_session(bearer=bearer) as session, session.get("/v1/machines") as response:
                return response.status

        assert set(await asyncio.gather(*(ask(bearer) for bearer in wrong * 30))) == {401}
        assert not checked
        assert await ask(created.secret_token) == 200
        assert checked == [secret.encode()]


def test_tries_come_back_with_time_and_other_addresses_have_their_own() -> None:
    limit = RateLimit(Rate(at_once=3, per_second=0.5), addresses_max=2)
    for _ in range(3):
        assert limit.wait_seconds("a", 10.0) == 0
        limit.count("a", 10.0)
    assert limit.wait_seconds("a", 10.0) == 2.0
    assert limit.wait_seconds("a", 11.0) == 1.0
    assert limit.wait_seconds("a", 12.0) == 0
    assert limit.wait_seconds("b", 10.0) == 0
    limit.count("a", 10.0)
    assert limit.wait_seconds("a", 10.0) == 4.0
    assert limit.wait_seconds("a", 1000.0) == 0
    limit.count("b", 10.0)
    limit.count("c", 10.0)  # a is forgotten: it was seen longest ago
    assert limit.wait_seconds("a", 10.0) == 0
    assert len(limit._left) == 2


# hashes of secrets


def test_a_hash_is_of_one_secret_and_never_the_same() -> None:
    one, other = hash_secret(b"secret"), hash_secret(b"secret")
    assert one != other
    assert is_hash_of(b"secret", one)
    assert is_hash_of(b"secret", other)
    assert not is_hash_of(b"secreu", one)
    assert not is_hash_of(b"", one)
    assert not is_hash_of(b"secret", "00000000:$argon2id$v=19$nonsense")
    assert not is_hash_of(b"secret", "")
    assert is_hash(one)
    assert not is_hash("")
    assert not is_hash("0:" + one.partition(":")[2])


async def test_a_right_secret_is_checked_once_and_a_wrong_one_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bytes] = []

    def check(secret: bytes, hashed: str) -> bool:
        calls.append(secret)
        return secret.startswith(b"right") and hashed == "hash"

    monkeypatch.setattr(token_hashes, "is_hash_of", check)
    monkeypatch.setattr(token_hashes, "may_be_hash_of", lambda secret, hashed: True)
    checker = SecretChecker()
    for _ in range(3):
        assert await checker.is_right(b"right", "hash")
        assert not await checker.is_right(b"right", "another hash")
        assert not await checker.is_right(b"wrong", "hash")
    assert calls.count(b"right") == 1 + 3
    assert calls.count(b"wrong") == 3
    for number in range(REMEMBERED_MAX):
        assert await checker.is_right(b"right %d" % number, "hash")
    assert len(checker._right) == REMEMBERED_MAX
    await checker.is_right(b"right", "hash")
    assert calls.count(b"right") == 1 + 3 + 1


async def test_wrong_tokens_cannot_queue_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_hashes, "is_hash_of", lambda secret, hashed: False)
    monkeypatch.setattr(token_hashes, "may_be_hash_of", lambda secret, hashed: True)
    checker = SecretChecker()
    found = await asyncio.gather(
        *(checker.is_right(b"%d" % number, "hash") for number in range(3 * CHECKS_WAITING_MAX)), return_exceptions=True
    )
    assert sum(isinstance(one, ServerUnwell) for one in found) == 2 * CHECKS_WAITING_MAX
    assert found.count(False) == CHECKS_WAITING_MAX
    assert not await checker.is_right(b"later", "hash")


# the audit log


async def all_entries(server: Running) -> tuple[AuditEntry, ...]:
    async with server.operator() as administrator:
        page = await administrator.audit_page()
    assert page.newest_number == len(page.entries)
    return page.entries


async def test_every_change_is_in_the_log_with_who_made_it(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        created = await server.operator_token(OperatorRole.OPERATOR, name="grace")
        client = await server.agent(tmp_path / "agent", name="db-1")
        async with client as agent, server.operator(created.secret_token) as operator:
            disk = (await agent.register_disk(registration())).disk
            await agent.register_disk(registration())  # nothing new
            await operator.pause_disk(disk, is_paused=True)
            await operator.pause_disk(disk, is_paused=False)
            await agent.unregister_disk(disk, keep_data=True)
            await agent.renew(make_certificate_key("db-1").request_pem)
            (certificate, *_) = (await operator.certificates()).certificates
            await operator.revoke_certificate(certificate.serial)
        async with server.operator() as administrator:
            await administrator.revoke_operator_token(created.token)
        entries = await all_entries(server)
    machine = certificate.identifier
    assert [(entry.action, entry.actor_kind, entry.actor_name, entry.subject) for entry in entries] == [
        ("create operator token", ADMINISTRATOR, ADMINISTRATOR, created.token),
        ("create join token", ADMINISTRATOR, ADMINISTRATOR, entries[1].subject),
        ("enrol", NEWCOMER, "db-1", machine),
        ("protect disk", Role.AGENT.value, "db-1", disk),
        ("pause disk", "operator", "grace", disk),
        ("resume disk", "operator", "grace", disk),
        ("end protection of disk", Role.AGENT.value, "db-1", disk),
        ("renew certificate", Role.AGENT.value, "db-1", machine),
        ("revoke certificates", "operator", "grace", machine),
        ("revoke operator token", ADMINISTRATOR, ADMINISTRATOR, created.token),
    ]
    assert entries[2].actor == entries[1].subject
    assert entries[3].details == {"path": "/dev/vda"}
    assert follow_chain(BEGINNING, entries) == ChainEnd(number=len(entries), hash=entries[-1].hash)


async def test_what_is_refused_or_fails_is_not_in_the_log(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server:
        viewer = await server.operator_token(OperatorRole.VIEWER)
        before = await all_entries(server)
        async with server.operator(viewer.secret_token) as operator, server.operator() as administrator:
            with pytest.raises(NotPermitted):
                await operator.revoke_certificate("AB")
            with pytest.raises(ResourceNotFound):
                await administrator.revoke_certificate("AB")
            with pytest.raises(CredentialMissing):
                async with server.operator("nonsense") as nobody:
                    await nobody.revoke_certificate("AB")
        assert await all_entries(server) == before


async def test_pages_are_of_any_size_and_changes_at_once_make_one_chain(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server") as server, server.operator() as administrator:
        request = OperatorTokenRequest(name="x", role=OperatorRole.VIEWER)
        await asyncio.gather(*(administrator.create_operator_token(request) for _ in range(12)))
        found: list[AuditEntry] = []
        while page := (await administrator.audit_page(after=len(found), limit=5)).entries:
            assert len(page) <= 5
            found += page
        assert follow_chain(BEGINNING, found).number == 12


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE audit_entries SET actor_name = 'eve' WHERE number = 2",
        "UPDATE audit_entries SET details = '{}' WHERE number = 2",
        "UPDATE audit_entries SET at_ns = at_ns + 1 WHERE number = 3",
        "UPDATE audit_entries SET details = 'nonsense' WHERE number = 2",
        "UPDATE audit_entries SET details = '[1]' WHERE number = 2",
        "UPDATE audit_entries SET hash = 'nonsense' WHERE number = 4",
        "DELETE FROM audit_entries WHERE number = 1",
        "DELETE FROM audit_entries WHERE number = 2",
    ],
)
async def test_a_log_that_was_tampered_with_does_not_hold(tmp_path: Path, tampering: str) -> None:
    async with running_server(tmp_path / "server") as server:
        for _ in range(4):
            await server.operator_token(OperatorRole.VIEWER)
    with sqlite3.connect(tmp_path / "server" / DATABASE_FILE) as connection:
        connection.execute(tampering)
    connection.close()
    async with running_server(tmp_path / "server") as server, server.operator() as administrator:
        await server.operator_token(OperatorRole.VIEWER)  # work goes on
        entries = (await administrator.audit_page()).entries
    with pytest.raises(AuditChainBroken):
        follow_chain(BEGINNING, entries)


TEXTS = st.text(max_size=20)
ENTRIES = st.lists(
    st.tuples(TEXTS, TEXTS, TEXTS, st.dictionaries(TEXTS, TEXTS, max_size=3), st.integers(0, 2**62)),
    min_size=1,
    max_size=6,
)


def chained(rows: list[tuple[str, str, str, dict[str, str], int]], beginning: ChainEnd = BEGINNING) -> list[AuditEntry]:
    end, entries = beginning, list[AuditEntry]()
    for name, action, subject, details, at_ns in rows:
        entry = AuditEntry(
            format=1,
            number=end.number + 1,
            at_ns=at_ns,
            actor_kind="operator",
            actor="a" * 32,
            actor_name=name,
            action=action,
            subject=subject,
            details=details,
            hash="0" * 64,
        )
        entry = entry.model_copy(update={"hash": entry_hash(end, entry)})
        entries.append(entry)
        end = ChainEnd(number=entry.number, hash=entry.hash)
    return entries


def test_an_entry_of_a_later_format_is_not_called_broken() -> None:
    (entry,) = chained([("a", "b", "c", {}, 1)])
    with pytest.raises(AuditFormatUnknown):
        follow_chain(BEGINNING, [entry.model_copy(update={"format": 2})])


@given(ENTRIES, st.data())
def test_no_entry_can_be_changed_left_out_moved_or_taken_from_another_vault(
    rows: list[tuple[str, str, str, dict[str, str], int]], data: st.DataObject
) -> None:
    entries = chained(rows)
    assert follow_chain(BEGINNING, entries).number == len(entries)
    assert follow_chain(follow_chain(BEGINNING, entries[:1]), entries[1:]).hash == entries[-1].hash
    place = data.draw(st.integers(0, len(entries) - 1))
    name = data.draw(st.sampled_from(["actor_name", "action", "subject", "actor", "actor_kind"]))
    changed = entries[place].model_copy(update={name: getattr(entries[place], name) + "x"})
    for broken in (
        [*entries[:place], changed, *entries[place + 1 :]],
        [*entries[:place], *entries[place + 1 :], entries[place]] if place < len(entries) - 1 else [changed],
        chained(rows, ChainEnd.beginning(VaultId("f" * 32))),
    ):
        with pytest.raises(AuditChainBroken):
            follow_chain(BEGINNING, broken)
