"""Whether a join token admits a newcomer: known, its secret proved, for this role, not expired, and not used.

Nothing is told about a token before its secret is proved. The very same request again gets the same answer again, so
that a lost reply does not cost the token.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass, field

from protocol.control_errors import (
    JoinTokenExpired,
    JoinTokenForAnotherRole,
    JoinTokenUsed,
    JoinTokenWrong,
    RequestInvalid,
)
from protocol.enrollment import EnrollmentRequest, is_proved, is_signing_key_proved, transcript
from protocol.vocabulary import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredJoinToken:
    """used_by: the request_hash of the request that used it, None while it is unused."""

    token: str
    role: Role
    proof_key: bytes = field(repr=False)
    expires_ns: int
    used_by: bytes | None


class Admission(enum.Enum):
    ADMIT = "admit"
    REPEAT = "repeat"
    """It was admitted by this very request before: answer the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionDecision:
    admission: Admission
    request_hash: bytes


def is_token_proved(request: EnrollmentRequest, stored: StoredJoinToken | None, *, authority_key_hash: bytes) -> bool:
    """Whether the newcomer holds the token's secret."""
    statement = _transcript(request, authority_key_hash)
    return stored is not None and is_proved(stored.proof_key, statement, request.proof)


def decide_admission(
    request: EnrollmentRequest, stored: StoredJoinToken | None, *, authority_key_hash: bytes, now_ns: int
) -> AdmissionDecision:
    """Raises JoinTokenWrong, JoinTokenForAnotherRole, JoinTokenUsed, JoinTokenExpired, RequestInvalid."""
    statement = _transcript(request, authority_key_hash)
    if stored is None or not is_proved(stored.proof_key, statement, request.proof):
        raise JoinTokenWrong(token=request.token)
    request_hash = hashlib.sha256(statement).digest()
    if stored.used_by == request_hash:
        return AdmissionDecision(admission=Admission.REPEAT, request_hash=request_hash)
    if stored.used_by is not None:
        raise JoinTokenUsed(token=request.token)
    if now_ns >= stored.expires_ns:
        raise JoinTokenExpired(token=request.token)
    if stored.role is not request.role:
        raise JoinTokenForAnotherRole(token=request.token, token_role=stored.role.value, asked_role=request.role.value)
    _check_signing_key(request, statement)
    return AdmissionDecision(admission=Admission.ADMIT, request_hash=request_hash)


def _transcript(request: EnrollmentRequest, authority_key_hash: bytes) -> bytes:
    return transcript(
        token=request.token,
        role=request.role,
        name=request.name,
        request_pem=request.request_pem,
        signing_public_key=request.signing_public_key,
        authority_key_hash=authority_key_hash,
    )


def _check_signing_key(request: EnrollmentRequest, statement: bytes) -> None:
    needs_one = request.role is Role.PROCESS_SERVER
    if needs_one and not is_signing_key_proved(request, statement):
        raise RequestInvalid(reason="a process server must prove that it holds its signing key")
    if not needs_one and (request.signing_public_key is not None or request.signing_proof is not None):
        raise RequestInvalid(reason="only a process server has a signing key")
