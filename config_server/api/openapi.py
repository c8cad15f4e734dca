"""The OpenAPI 3.1 document, made of the table of routes and the models: it cannot say what the server does not do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from config_server.api.route import MEMBERS, STAFF, Access, Parameters, Route
from protocol.operator_messages import Problem

Json = dict[str, Any]

OPENAPI_VERSION: Final = "3.1.0"
_SCHEMAS: Final = "#/components/schemas/{model}"
_VALIDATION: Final[JsonSchemaMode] = "validation"
_SERIALIZATION: Final[JsonSchemaMode] = "serialization"
_IDEMPOTENCY_KEY: Final[Json] = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Chosen by the caller: a request that comes again with the same key is not carried out again",
    "schema": {"type": "string", "pattern": "^[!-~]{1,128}$"},
}
_IF_MATCH: Final[Json] = {
    "name": "If-Match",
    "in": "header",
    "required": False,
    "description": "The ETag of the version that the edit is based on",
    "schema": {"type": "string", "pattern": '^("[0-9]{1,18}"|\\*)$'},
}
_ERROR_STATUSES: Final = ("400", "401", "403", "404", "405", "409", "412", "413", "429", "503")


def openapi_document(routes: Iterable[Route]) -> Json:
    """As plain JSON values."""
    routes = tuple(routes)
    wanted: list[tuple[type[BaseModel], JsonSchemaMode]] = [(Problem, _SERIALIZATION)]
    for route in routes:
        wanted.append((route.reply, _SERIALIZATION))
        if route.body is not None:
            wanted.append((route.body, _VALIDATION))
    references, definitions = models_json_schema(list(dict.fromkeys(wanted)), ref_template=_SCHEMAS)
    paths: Json = {}
    for route in routes:
        paths.setdefault(route.template, {})[route.method.lower()] = _operation(route, references)
    return {
        "openapi": OPENAPI_VERSION,
        "info": {
            "title": "Farpoint configuration server",
            "version": version("farpoint"),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": definitions.get("$defs", {}),
            "securitySchemes": {
                "member": {"type": "mutualTLS", "description": "A certificate of the vault's authority"},
                "operator": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An operator token, or the admin token",
                },
            },
            "responses": {
                "Problem": {
                    "description": "The request was refused or failed",
                    "content": {"application/problem+json": {"schema": references[Problem, _SERIALIZATION]}},
                }
            },
        },
    }


def _operation(route: Route, references: Mapping[Any, Json]) -> Json:
    reply = {"application/json": {"schema": references[route.reply, _SERIALIZATION]}}
    operation: Json = {
        "operationId": _operation_id(route),
        "summary": route.summary,
        "parameters": [*_parameters(route.path, "path"), *_parameters(route.query, "query")],
        "responses": {
            "200": {"description": "Done", "content": reply},
            **{status: {"$ref": "#/components/responses/Problem"} for status in _ERROR_STATUSES},
        },
        "security": _security(route),
        "x-serves": sorted(access.value for access in route.serves),
    }
    if route.method != "GET" and route.serves & STAFF:
        operation["parameters"].append(_IDEMPOTENCY_KEY)
    if route.takes_version:
        operation["parameters"].append(_IF_MATCH)
    if route.body is not None:
        content = {"application/json": {"schema": references[route.body, _VALIDATION]}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _security(route: Route) -> list[Json]:
    if Access.ANYONE in route.serves:
        return []
    schemes: list[Json] = []
    if route.serves & MEMBERS:
        schemes.append({"member": []})
    if route.serves & STAFF:
        schemes.append({"operator": []})
    return schemes


def _parameters(model: type[Parameters], place: str) -> list[Json]:
    schema = model.model_json_schema(mode=_VALIDATION)
    required = set(schema.get("required", ()))
    return [
        {"name": name, "in": place, "required": place == "path" or name in required, "schema": one}
        for name, one in schema.get("properties", {}).items()
    ]


def _operation_id(route: Route) -> str:
    words = re.findall(r"[a-z0-9]+", route.template.removeprefix("/v1").lower())
    return "_".join([route.method.lower(), *words])
