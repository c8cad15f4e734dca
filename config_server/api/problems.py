"""Errors as problem+json (RFC 9457): which type has which status, and what of it the caller is told."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

from aiohttp import web

from protocol.control import DETAIL_LENGTH_MAX
from protocol.control_errors import (
    CertificateRequestInvalid,
    CredentialMissing,
    DiskChanged,
    DiskOfAnotherMachine,
    IdempotencyKeyReused,
    JoinTokenExpired,
    JoinTokenForAnotherRole,
    JoinTokenUsed,
    JoinTokenWrong,
    MachineQuarantined,
    MethodNotAllowed,
    OperatorTokenRefused,
    PolicyChanged,
    PolicyInUse,
    PolicyNameTaken,
    RequestInvalid,
    RequestRepeated,
    RequestTooLarge,
    ResourceNotFound,
    ServerUnwell,
    TooManyAttempts,
    TooManyDisks,
)
from protocol.errors import CertificateRefused, NotPermitted, ReplicationError
from protocol.operator_messages import Problem

PROBLEM_TYPE: Final = "application/problem+json"

STATUS_OF_ERROR: Final[dict[type[ReplicationError], HTTPStatus]] = {
    RequestInvalid: HTTPStatus.BAD_REQUEST,
    CertificateRequestInvalid: HTTPStatus.BAD_REQUEST,
    CredentialMissing: HTTPStatus.UNAUTHORIZED,
    OperatorTokenRefused: HTTPStatus.UNAUTHORIZED,
    NotPermitted: HTTPStatus.FORBIDDEN,
    CertificateRefused: HTTPStatus.FORBIDDEN,
    JoinTokenWrong: HTTPStatus.FORBIDDEN,
    JoinTokenExpired: HTTPStatus.FORBIDDEN,
    JoinTokenForAnotherRole: HTTPStatus.FORBIDDEN,
    ResourceNotFound: HTTPStatus.NOT_FOUND,
    JoinTokenUsed: HTTPStatus.CONFLICT,
    DiskOfAnotherMachine: HTTPStatus.CONFLICT,
    DiskChanged: HTTPStatus.CONFLICT,
    MachineQuarantined: HTTPStatus.FORBIDDEN,
    PolicyNameTaken: HTTPStatus.CONFLICT,
    RequestRepeated: HTTPStatus.CONFLICT,
    IdempotencyKeyReused: HTTPStatus.CONFLICT,
    MethodNotAllowed: HTTPStatus.METHOD_NOT_ALLOWED,
    PolicyInUse: HTTPStatus.CONFLICT,
    PolicyChanged: HTTPStatus.PRECONDITION_FAILED,
    TooManyDisks: HTTPStatus.CONFLICT,
    TooManyAttempts: HTTPStatus.TOO_MANY_REQUESTS,
    RequestTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    ServerUnwell: HTTPStatus.SERVICE_UNAVAILABLE,
}
"""What is not here is the server's own trouble: the caller is told no more than that."""


def problem_response(error: ReplicationError) -> web.Response:
    """The answer to a request that failed."""
    status = STATUS_OF_ERROR.get(type(error))
    if status is None:
        status, error = HTTPStatus.SERVICE_UNAVAILABLE, ServerUnwell(reason="an internal fault; the log names it")
    problem = Problem(
        type="about:blank",
        title=status.phrase,
        status=status,
        code=error.code,
        detail=str(error)[:DETAIL_LENGTH_MAX],
        hint=error.hint,
        is_retryable=error.is_retryable,
        fields={name: _plain(value) for name, value in error.fields.items()},
    )
    headers = {"WWW-Authenticate": "Bearer"} if status is HTTPStatus.UNAUTHORIZED else {}
    if isinstance(error, TooManyAttempts):
        headers["Retry-After"] = str(error.fields["wait_seconds"])
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = str(error.fields["allowed"])
    return web.Response(body=problem.model_dump_json(), status=status, content_type=PROBLEM_TYPE, headers=headers)


def _plain(value: object) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool | int | float):
        return value
    return str(value)[:DETAIL_LENGTH_MAX]
