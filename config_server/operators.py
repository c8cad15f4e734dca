"""Who may ask for what as a person: operator tokens with a role and an end, and the audit log that says what they did.

The admin token, which `config-server init` makes, is for the first of them and for days on which all others are lost.
"""

from __future__ import annotations

import base64
import re
import secrets
from dataclasses import dataclass
from typing import Final

import structlog

from config_server.audit import ADMINISTRATOR, Actor, AuditLog
from config_server.clock import ServerClock
from config_server.database.engine import Database
from config_server.database.operators import (
    StoredOperatorToken,
    add_operator_token,
    find_chain_end,
    find_operator_token,
    list_audit_entries,
    list_operator_tokens,
    mark_operator_token_used,
    revoke_operator_token,
)
from config_server.errors import DatabaseFault
from config_server.installation import Installation
from config_server.token_hashes import SecretChecker
from protocol.control_errors import CredentialMissing, OperatorTokenRefused, ResourceNotFound
from protocol.operator_messages import (
    AuditPage,
    OperatorRole,
    OperatorTokenCreated,
    OperatorTokenList,
    OperatorTokenRequest,
    OperatorTokenStatus,
)

SECRET_BYTES: Final = 32
USE_NOTED_NS: Final = 3600 * 10**9
"""How exactly it is kept when a token was last seen: a list that is watched must not write."""
BEARER_CHARACTERS_MAX: Final = 512
_TEXT: Final = re.compile(r"farpoint\.([0-9a-f]{32})\.([A-Za-z0-9_-]{43})")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """role: None for an administrator."""

    actor: Actor
    role: OperatorRole | None


class OperatorOffice:
    """All methods: what they state is durable on return."""

    def __init__(
        self,
        *,
        installation: Installation,
        database: Database,
        clock: ServerClock,
        audit: AuditLog,
    ) -> None:
        self._admin_token_hash = installation.admin_token_hash
        self._database = database
        self._clock = clock
        self._audit = audit
        self._checker = SecretChecker()

    async def authenticate(self, bearer: str) -> Operator:
        """Raises CredentialMissing, OperatorTokenRefused, ServerUnwell."""
        if len(bearer) > BEARER_CHARACTERS_MAX or not bearer.isascii():
            raise CredentialMissing(needs="a valid operator token")
        match = _TEXT.fullmatch(bearer)
        if match is None:
            if not await self._checker.is_right(bearer.encode(), self._admin_token_hash):
                raise CredentialMissing(needs="a valid operator token")
            return Operator(actor=Actor(kind=ADMINISTRATOR, identifier="admin-token", name=ADMINISTRATOR), role=None)
        return await self._holder(match[1], match[2])

    async def create_token(self, request: OperatorTokenRequest, actor: Actor) -> OperatorTokenCreated:
        """The secret is not kept."""
        now_ns = (await self._clock.tick()).tick_ns
        secret = base64.urlsafe_b64encode(secrets.token_bytes(SECRET_BYTES)).decode().rstrip("=")
        stored = StoredOperatorToken(
            token=secrets.token_hex(16),
            name=request.name,
            role=request.role,
            secret_hash=await self._checker.hash(secret.encode()),
            created_ns=now_ns,
            expires_ns=now_ns + request.lifetime_seconds * 10**9,
            used_ns=None,
            is_revoked=False,
        )
        async with self._database.writing() as connection:
            await self._audit.check_new(connection, actor)
            await add_operator_token(connection, stored)
            await self._audit.record(
                connection,
                actor,
                "create operator token",
                stored.token,
                now_ns=now_ns,
                name=stored.name,
                role=stored.role.value,
                expires_at_ns=str(stored.expires_ns),
            )
        return OperatorTokenCreated(
            token=stored.token,
            secret_token=f"farpoint.{stored.token}.{secret}",
            name=stored.name,
            role=stored.role,
            expires_at_ns=stored.expires_ns,
        )

    async def tokens(self) -> OperatorTokenList:
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.reading() as connection:
            stored = await list_operator_tokens(connection)
        tokens = tuple(
            OperatorTokenStatus(
                token=one.token,
                name=one.name,
                role=one.role,
                created_at_ns=one.created_ns,
                expires_at_ns=one.expires_ns,
                used_at_ns=one.used_ns,
                is_revoked=one.is_revoked,
            )
            for one in stored
        )
        return OperatorTokenList(now_ns=now_ns, tokens=tokens)

    async def revoke_token(self, token: str, actor: Actor) -> None:
        """From the next request on. Raises ResourceNotFound."""
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.writing() as connection:
            await self._audit.check_new(connection, actor)
            stored = await find_operator_token(connection, token)
            if stored is None:
                raise ResourceNotFound(what="operator token", identifier=token)
            if stored.is_revoked:
                return
            await revoke_operator_token(connection, token)
            await self._audit.record(connection, actor, "revoke operator token", token, now_ns=now_ns, name=stored.name)

    async def audit_page(self, *, after: int, limit: int) -> AuditPage:
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.reading() as connection:
            entries = await list_audit_entries(connection, after=after, limit=limit)
            end = await find_chain_end(connection)
        return AuditPage(now_ns=now_ns, entries=tuple(entries), newest_number=0 if end is None else end.number)

    async def _holder(self, token: str, secret: str) -> Operator:
        now_ns = (await self._clock.tick()).tick_ns
        async with self._database.reading() as connection:
            stored = await find_operator_token(connection, token)
        if stored is None or not await self._checker.is_right(secret.encode(), stored.secret_hash):
            raise OperatorTokenRefused(token=token, reason="it is not known here")
        if stored.is_revoked:
            raise OperatorTokenRefused(token=token, reason="it has been revoked")
        if now_ns >= stored.expires_ns:
            raise OperatorTokenRefused(token=token, reason="it has expired")
        if stored.used_ns is None or abs(now_ns - stored.used_ns) > USE_NOTED_NS:
            await self._note_use(token, now_ns)
        return Operator(
            actor=Actor(kind=stored.role.value, identifier=stored.token, name=stored.name), role=stored.role
        )

    async def _note_use(self, token: str, now_ns: int) -> None:
        try:
            async with self._database.writing() as connection:
                await mark_operator_token_used(connection, token, now_ns=now_ns)
        except DatabaseFault as error:
            # why: whoever has to look at a server that cannot write must be let in
            log.error("that an operator token was used is not noted", token=token, reason=str(error))
