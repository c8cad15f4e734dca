"""Turns requests into calls: who is it, may they, is it well formed; only then does a handler see it.

The order is fixed: credentials before the body is read, its size before it is parsed, its form before it is used.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import ssl
from collections.abc import Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Final

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from pydantic import BaseModel, ValidationError

from config_server.api.openapi import openapi_document
from config_server.api.problems import problem_response
from config_server.api.route import ACCESS_OF_OPERATOR, ACCESS_OF_ROLE, MEMBERS, Access, Call, Caller, Rooms, Route
from config_server.api.routes import ROUTES
from config_server.database.operators import RequestMark
from config_server.metrics import ConfigServerMetrics
from protocol.control import BODY_VALUES_MAX, has_too_many_values, reason_of
from protocol.control_errors import (
    CredentialMissing,
    MethodNotAllowed,
    RequestInvalid,
    RequestRepeated,
    RequestTooLarge,
    ResourceNotFound,
    ServerUnwell,
)
from protocol.errors import NotPermitted, ReplicationError
from protocol.transport.tls import certificate_serial_of, identity_of

BODY_SECONDS_MAX: Final = 30.0
"""How long a request's body may take to arrive."""

_KEY: Final = re.compile(r"[\x21-\x7e]{1,128}")
_ETAG: Final = re.compile(r'"([0-9]{1,18})"')

log = structlog.get_logger(__name__)


def make_application(rooms: Rooms, metrics: ConfigServerMetrics) -> web.Application:
    """All routes of the table, and the document that describes them."""
    application = web.Application(middlewares=[_problems(metrics)])
    for route in ROUTES:
        application.router.add_route(route.method, route.template, _handle(route, rooms))
    document = openapi_document(ROUTES)

    async def describe(request: web.Request) -> web.Response:
        return web.json_response(document)

    application.router.add_get("/openapi.json", describe, allow_head=False)
    return application


def _handle(route: Route, rooms: Rooms) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        caller = await _identify(request, route, rooms)
        call = Call(
            caller=caller,
            address=_address_of(request),
            path=_validate(route.path, dict(request.match_info)),
            query=_validate(route.query, _single_values(request)),
            body=None if route.body is None else await _read_body(request, route, route.body),
            version=_expected_version(request) if route.takes_version else None,
        )
        reply = await _carry_out(route, rooms, _marked(request, route, call))
        version = getattr(reply, "version", None) if route.has_version else None
        headers = {"Cache-Control": "no-store"} | ({} if version is None else {"ETag": f'"{version}"'})
        return web.Response(body=reply.model_dump_json(), content_type="application/json", headers=headers)

    return handle


async def _carry_out(route: Route, rooms: Rooms, call: Call) -> BaseModel:
    """Once, however often a request with the same Idempotency-Key comes. Raises RequestRepeated."""
    try:
        return await route.handler(rooms, call)
    except RequestRepeated as repeated:
        if route.repeat is None:
            raise
        return await route.repeat(rooms, str(repeated.fields["subject"]))


def _marked(request: web.Request, route: Route, call: Call) -> Call:
    """With its Idempotency-Key, if it is one of the staff's that changes something. Raises RequestInvalid."""
    key, operator = request.headers.get("Idempotency-Key"), call.caller.operator
    if key is None or operator is None or route.method == "GET":
        return call
    if not _KEY.fullmatch(key):
        raise RequestInvalid(reason="Idempotency-Key: must be 1 to 128 printable ASCII characters")
    body = "" if call.body is None else call.body.model_dump_json()
    content = "\n".join([request.method, request.raw_path, str(call.version), body])
    mark = RequestMark(key=key, content_hash=hashlib.sha256(content.encode()).hexdigest())
    actor = replace(operator.actor, request=mark)
    return replace(call, caller=replace(call.caller, operator=replace(operator, actor=actor)))


async def _identify(request: web.Request, route: Route, rooms: Rooms) -> Caller:
    """Raises CredentialMissing, OperatorTokenRefused, CertificateRefused, NotPermitted, ServerUnwell."""
    if Access.ANYONE in route.serves:
        return Caller(access=Access.ANYONE)
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme:
        if scheme.lower() != "bearer":
            raise CredentialMissing(needs="a bearer token")
        operator = await rooms.operators.authenticate(token.strip())
        access = Access.ADMINISTRATOR if operator.role is None else ACCESS_OF_OPERATOR[operator.role]
        caller = Caller(access=access, operator=operator)
    else:
        caller = await _identify_member(request, route, rooms)
    if caller.access not in route.serves:
        raise NotPermitted(subject=caller.access.value, reason=f"{route.method} {route.template} is not for this role")
    return caller


def _expected_version(request: web.Request) -> int | None:
    """Raises RequestInvalid."""
    text = request.headers.get("If-Match")
    if text is None or text == "*":
        return None
    match = _ETAG.fullmatch(text)
    if match is None:
        raise RequestInvalid(reason='If-Match: must be one ETag of this server, such as "3"')
    return int(match[1])


def _address_of(request: web.Request) -> str:
    return request.remote or ""


async def _identify_member(request: web.Request, route: Route, rooms: Rooms) -> Caller:
    ssl_object = request.get_extra_info("ssl_object")
    # why: an empty dictionary is what the ssl module gives for a certificate that was not verified
    if not isinstance(ssl_object, ssl.SSLObject | ssl.SSLSocket) or not ssl_object.getpeercert():
        needs = "a member's certificate" if route.serves & MEMBERS else "an operator token"
        raise CredentialMissing(needs=needs)
    identity = identity_of(ssl_object)
    certificate = await rooms.admission.authenticate(identity, certificate_serial_of(ssl_object))
    access = ACCESS_OF_ROLE.get(certificate.role)
    if access is None:
        raise NotPermitted(subject=identity.uri, reason="this role calls nobody")
    return Caller(access=access, certificate=certificate)


def _validate(model: type[BaseModel], values: Mapping[str, str]) -> BaseModel:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise RequestInvalid(reason=reason_of(error)) from error


def _single_values(request: web.Request) -> dict[str, str]:
    if len(set(request.query)) != len(request.query):
        raise RequestInvalid(reason="a query parameter is given twice")
    return dict(request.query)


async def _read_body(request: web.Request, route: Route, model: type[BaseModel]) -> BaseModel:
    if request.content_type != "application/json" or "Content-Encoding" in request.headers:
        raise RequestInvalid(reason="the body must be plain application/json")
    if (request.content_length or 0) > route.body_bytes_max:
        raise RequestTooLarge(limit_bytes=route.body_bytes_max)
    received = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            async for chunk in request.content.iter_any():
                received += chunk
                if len(received) > route.body_bytes_max:
                    raise RequestTooLarge(limit_bytes=route.body_bytes_max)
    except TimeoutError as error:
        raise RequestInvalid(reason=f"its body did not arrive within {BODY_SECONDS_MAX:.0f} s") from error
    except ConnectionError as error:
        raise RequestInvalid(reason="its body was cut off") from error
    data = bytes(received)
    if has_too_many_values(data):
        raise RequestInvalid(reason=f"it has more than {BODY_VALUES_MAX} values")
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise RequestInvalid(reason=reason_of(error)) from error


def _problems(metrics: ConfigServerMetrics) -> Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        template = "unknown" if resource is None else resource.canonical
        with metrics.request(request.method, template) as outcome:
            response = await _answer(request, handler, template)
            outcome.status = response.status
        return response

    return middleware


async def _answer(request: web.Request, handler: Handler, template: str) -> web.StreamResponse:
    try:
        return await handler(request)
    except ReplicationError as error:
        response = problem_response(error)
        if response.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            log.error("request failed", route=template, code=error.code, reason=str(error))
        else:
            log.info("request refused", route=template, code=error.code, reason=str(error), peer=request.remote)
        return response
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        return problem_response(MethodNotAllowed(method=request.method, path=template, allowed=allowed))
    except web.HTTPException as error:
        if error.status == HTTPStatus.NOT_FOUND:
            return problem_response(ResourceNotFound(what="route", identifier=f"{request.method} {request.path}"))
        return problem_response(RequestInvalid(reason=error.reason))
    except Exception:
        # why: whatever a handler has wrong, its client gets an answer and the operator's log the traceback
        log.exception("request failed", route=template)
        return problem_response(ServerUnwell(reason="an internal fault; the log names it"))
