"""The admin API: a table of operations, their serving, and the OpenAPI document, all three made of the same models.

A room that adds an operation makes an `Operation`, or a `LongWork` where the answer comes bit by bit, and hands it to
`Admin`: what it asks is checked against the model that the document shows, and what an operation answers is written by
the model that the document shows, so neither can lie.
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

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)


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
        is_get = self.method == "GET"
        return _checked(self.asks, _query_of(request, self.asks) if is_get else await _body_of(request))

    def models(self) -> list[tuple[type[BaseModel], JsonSchemaMode]]:
        """Those that the document has to show."""
        asks: list[tuple[type[BaseModel], JsonSchemaMode]] = []
        if self.method == "POST":
            asks = [(self.asks, "validation")]
        return [(self.answers, "serialization"), *asks]

    def described(self, refs: Mapping[Any, Any]) -> dict[str, Any]:
        """Its entry in the document."""
        also: dict[str, Any] = {"parameters": _parameters(self.asks)} if self.method == "GET" else {}
        if self.method == "POST":
            also = {"requestBody": {"required": True, "content": _json(refs[self.asks, "validation"])}}
        return _described(self, _json(refs[self.answers, "serialization"]), self.method == "POST", **also)


@dataclass(frozen=True, slots=True)
class LongWork:
    """A POST that is answered bit by bit: with lines of JSON while it goes on, or with a bundle.

    `asks` is the model of the JSON body where `takes` is "json", else of the query. `work` gets it, checked, and writes
    its answer itself; what it raises of proxy/errors.py before it has begun to becomes an answer with its sentence.
    `answers` are the media types it may answer with, and what the document says of each.
    """

    path: str
    summary: str
    work: Callable[[web.Request, Any], Awaitable[web.StreamResponse]]
    answers: Mapping[str, Any]
    asks: type[BaseModel]
    takes: Literal["json", "octets", "nothing"]
    fails: Mapping[int, str] | None = None
    max_body_bytes: int = MAX_BODY_BYTES

    method = "POST"

    @property
    def name(self) -> str:
        """The operationId."""
        return f"post_{self.path}"

    def route(self) -> web.RouteDef:
        """For the admin application."""
        return web.post(PREFIX + self.path, self._serve)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        is_json = self.takes == "json"
        try:
            if self.takes == "octets" and not request.body_exists and "Content-Type" not in request.headers:
                raise BadRequest("expected a body")
            given = await _body_of(request, self.max_body_bytes) if is_json else _query_of(request, self.asks)
            return await self.work(request, _checked(self.asks, given))
        except _Unacceptable as error:
            return failed(error.status, error.sentence)
        except BreakwaterError as error:
            return failed(status_of(error), str(error))

    def models(self) -> list[tuple[type[BaseModel], JsonSchemaMode]]:
        """Those that the document has to show."""
        return [(self.asks, "validation")] if self.takes == "json" else []

    def described(self, refs: Mapping[Any, Any]) -> dict[str, Any]:
        """Its entry in the document."""
        also: dict[str, Any] = {}
        if self.takes == "json":
            also["requestBody"] = {"required": True, "content": _json(refs[self.asks, "validation"])}
        else:
            also["parameters"] = _parameters(self.asks)
        if self.takes == "octets":
            body = {"schema": {"type": "string", "format": "binary"}}
            also["requestBody"] = {"required": True, "content": {"application/octet-stream": body}}
        return _described(self, self.answers, self.takes == "json", **also)


def _checked(model: type[BaseModel], given: Any) -> BaseModel:
    try:
        return model.model_validate(given, strict=True)
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


async def _body_of(request: web.Request, max_bytes: int = MAX_BODY_BYTES) -> Any:
    if request.content_type != "application/json":
        raise _Unacceptable(415, "expected a body of application/json")
    body = bytearray()
    while piece := await request.content.readany():
        body += piece
        if len(body) > max_bytes:
            raise _Unacceptable(413, f"expected a body of at most {max_bytes} bytes")
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


def openapi(operations: Iterable[Operation | LongWork], version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    listed = list(operations)
    wanted: list[tuple[type[BaseModel], JsonSchemaMode]] = [(Failure, "serialization")]
    wanted += [model for each in listed for model in each.models()]
    refs, schemas = models_json_schema(list(dict.fromkeys(wanted)), ref_template="#/components/schemas/{model}")
    paths: dict[str, Any] = {}
    for each in listed:
        paths.setdefault(PREFIX + each.path, {})[each.method.lower()] = each.described(refs)
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
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _described(
    operation: Operation | LongWork, answers: Mapping[str, Any], takes_json: bool, **also: Any
) -> dict[str, Any]:
    security: dict[str, Any] = {"security": [{"token": []}]} if operation.method == "POST" else {}
    return {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": {
            "200": {"description": "Done.", "content": answers},
            **{
                str(status): {"description": meaning, "content": _json({"$ref": "#/components/schemas/Failure"})}
                for status, meaning in sorted(_failures(operation, takes_json).items())
            },
        },
        **security,
        **also,
    }


def _parameters(model: type[BaseModel]) -> list[dict[str, Any]]:
    schema = model.model_json_schema()
    return [
        {
            "name": name,
            "in": "query",
            "required": name in schema.get("required", ()),
            "description": one.pop("description", ""),
            "schema": one,
        }
        for name, one in schema.get("properties", {}).items()
    ]


def _failures(operation: Operation | LongWork, takes_json: bool) -> dict[int, str]:
    found = {
        400: "The request cannot be understood.",
        421: "The Host header names somebody else.",
        503: "The store cannot be read.",
    }
    if operation.method == "POST":
        found |= {401: "The token is missing or wrong.", 403: "The request comes from another site's page."}
    if takes_json:
        found |= {413: "The body is too large.", 415: "The body is not JSON."}
    return found | dict(operation.fails or {})


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
