"""The admin API: a table of operations, their serving, and the OpenAPI document, all three made of the same models.

A room that adds an operation makes an `Operation` and hands it to `Admin`: what it asks is checked against the model
that the document shows, and what it answers is written by the model that the document shows, so neither can lie.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from proxy.errors import BadRequest, BreakwaterError
from proxy.web.errors import TABLE

PREFIX = "/api/v1/"
#: The largest body of an operation, in bytes.
MAX_BODY_BYTES = 64 << 10

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_BOOLEAN = {"true": True, "false": False}


class Document(BaseModel):
    """What is asked or answered: nothing unknown, nothing changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Nothing(Document):
    """No parameters."""


class Failure(Document):
    """Why something was not done, in a sentence."""

    error: str


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that can be asked below /api/v1/.

    `asks` is the model of a GET's query or of a POST's JSON body. `work` gets it, checked, and returns an `answers`;
    what it raises of proxy/errors.py becomes an answer with its sentence. A POST changes something and needs the token;
    the guard sees to that before anything here runs.
    """

    method: Literal["GET", "POST"]
    path: str
    summary: str
    work: Callable[[Any], Awaitable[BaseModel]]
    answers: type[BaseModel]
    asks: type[BaseModel] = Nothing
    #: Statuses of failures that are this operation's own, with what they mean.
    fails: Mapping[int, str] | None = None

    @property
    def name(self) -> str:
        """The operationId."""
        return f"{self.method.lower()}_{self.path.replace('/', '_').replace('.', '_')}"

    def route(self) -> web.RouteDef:
        """For the admin application."""
        register = web.get if self.method == "GET" else web.post
        return register(PREFIX + self.path, self._serve)

    async def _serve(self, request: web.Request) -> web.Response:
        try:
            asked = await self._asked(request)
            answer = await self.work(asked)
        except _Unacceptable as error:
            return failed(error.status, error.sentence)
        except BreakwaterError as error:
            return failed(status_of(error), str(error))
        return web.Response(body=answer.model_dump_json().encode(), content_type="application/json")

    async def _asked(self, request: web.Request) -> BaseModel:
        given = _query_of(request, self.asks) if self.method == "GET" else await _body_of(request)
        try:
            return self.asks.model_validate(given, strict=True)
        except ValidationError as error:
            raise BadRequest(_sentence(error)) from error


class _Unacceptable(Exception):
    """Never leaves this module."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


def failed(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> web.Response:
    """A failure as every operation tells it."""
    body = Failure(error=sentence).model_dump_json().encode()
    return web.Response(status=status, body=body, content_type="application/json", headers=headers)


def status_of(error: BreakwaterError) -> int:
    """The status of a failure by its meaning, as on the data port."""
    return next(status for kind, _, status in TABLE if isinstance(error, kind))


def _query_of(request: web.Request, model: type[BaseModel]) -> dict[str, Any]:
    """The parameters, turned into what their types say. Unknown ones are a mistake worth telling."""
    given: dict[str, Any] = {}
    for name, text in request.query.items():
        if name in given:
            raise BadRequest(f"{name} is given twice")
        field = model.model_fields.get(name)
        value: Any = text
        if field is not None and field.annotation is int and _INTEGER.fullmatch(text):
            value = int(text)
        elif field is not None and field.annotation is bool:
            value = _BOOLEAN.get(text, text)
        given[name] = value
    return given


async def _body_of(request: web.Request) -> Any:
    if request.content_type != "application/json":
        raise _Unacceptable(415, "expected a body of application/json")
    body = b""
    while piece := await request.content.readany():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise _Unacceptable(413, f"expected a body of at most {MAX_BODY_BYTES} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {str(error)[:200]}") from error


def _sentence(error: ValidationError) -> str:
    """All that is wrong, in one line."""
    return "; ".join(
        f"{'.'.join(map(str, each['loc'])) or 'the body'}: {each['msg'][:200]}"
        for each in error.errors(include_url=False)
    )


# -- the document ------------------------------------------------------------------------------------------------------


def openapi(operations: Iterable[Operation], also: Mapping[str, Any], version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document. `also`: paths that are served elsewhere, as the document shows them."""
    listed = list(operations)
    wanted: list[tuple[type[BaseModel], JsonSchemaMode]] = [(Failure, "serialization")]
    wanted += [(each.answers, "serialization") for each in listed]
    wanted += [(each.asks, "validation") for each in listed if each.method == "POST"]
    refs, schemas = models_json_schema(list(dict.fromkeys(wanted)), ref_template="#/components/schemas/{model}")
    paths: dict[str, Any] = {}
    for each in listed:
        paths.setdefault(PREFIX + each.path, {})[each.method.lower()] = _described(each, refs)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Breakwater admin API",
            "version": version,
            "summary": "What operators ask of a running Breakwater.",
            "description": "GET asks, POST changes. Changes need the token of `server.admin_token_file`, except over "
            "a Unix socket. Requests must name the listener by an address, `localhost` or one of `server.admin_hosts`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {**paths, **also},
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _described(operation: Operation, refs: Mapping[Any, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": {
            "200": {"description": "Done.", "content": _json(refs[operation.answers, "serialization"])},
            **{
                str(status): {"description": meaning, "content": _json({"$ref": "#/components/schemas/Failure"})}
                for status, meaning in sorted(_failures(operation).items())
            },
        },
    }
    if operation.method == "POST":
        described["security"] = [{"token": []}]
        described["requestBody"] = {"required": True, "content": _json(refs[operation.asks, "validation"])}
    elif operation.asks.model_fields:
        schema = operation.asks.model_json_schema()
        described["parameters"] = [
            {
                "name": name,
                "in": "query",
                "required": name in schema.get("required", ()),
                "description": one.pop("description", ""),
                "schema": one,
            }
            for name, one in schema["properties"].items()
        ]
    return described


def _failures(operation: Operation) -> dict[int, str]:
    found = {
        400: "The request cannot be understood.",
        421: "The Host header names somebody else.",
        503: "The store cannot be read.",
    }
    if operation.method == "POST":
        found |= {
            401: "The token is missing or wrong.",
            403: "The request comes from another site's page.",
            413: "The body is too large.",
            415: "The body is not JSON.",
        }
    return found | dict(operation.fails or {})


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
