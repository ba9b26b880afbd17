"""The registry API: a request becomes an endpoint, the engine's answer becomes a response.

Knows HTTP and the engine's values, and decides nothing: what may be pulled is a gate's, how a body travels is
serve.py's.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from itertools import count
from typing import TypeVar

from aiohttp import web

from proxy import errors
from proxy.engine.access import Caller
from proxy.engine.blobs import Opened
from proxy.engine.pull import Pull
from proxy.events import Answered, Event, Outcome
from proxy.oci import codes, endpoints, mediatypes, pagination, ranges, referrers
from proxy.oci.endpoints import BlobGet, Endpoint, ManifestGet, ReferrersList, TagsList, VersionCheck
from proxy.oci.ranges import Range
from proxy.ports import Clock, LocalFile, TagPage
from proxy.web import errors as error_table
from proxy.web.callers import TOKEN_PATH, Callers, Shown, repository_of
from proxy.web.ready import READY, Ready
from proxy.web.serve import Part, ReadFailed, Sender, Sent, size_of

T = TypeVar("T")

#: A request id that a client brings is taken over only if it cannot harm a log or a header.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

#: Headers that make an answer one caller's or one request's: it is not kept for others.
_SPEAKS_FOR_ONE = ("X-Request-Id", "If-None-Match")

_COMMON = error_table.COMMON


class Registry:
    """Answers the data port."""

    def __init__(
        self,
        pull: Pull,
        sender: Sender,
        callers: Callers,
        *,
        clock: Clock,
        observe: Callable[[Event], None],
        header_deadline_s: float,
    ) -> None:
        """`header_deadline_s`: how long a client waits for headers before it is told to ask elsewhere, in seconds."""
        self._pull = pull
        self._sender = sender
        self._callers = callers
        self._clock = clock
        self._observe = observe
        self._header_deadline_s = header_deadline_s
        self._ids = count()
        self._id_prefix = secrets.token_hex(4)

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request, whatever happens; exactly one `Answered` event comes of it."""
        began = self._clock.monotonic()
        said = Answered(
            request_id=self._request_id(request),
            remote=request.remote or "unix",
            method=request.method,
            path=request.raw_path,
            user_agent=request.headers.get("User-Agent", ""),
        )
        try:
            response = await self._answered(request, said)
            said.status = response.status
            return response
        except asyncio.CancelledError:
            said.ending = "gone"
            raise
        except BaseException:
            said.status, said.outcome = 500, "failed"  # a bug of ours: the server answers it, and the log tells it
            raise
        finally:
            said.seconds = self._clock.monotonic() - began
            self._observe(said)

    async def _answered(self, request: web.BaseRequest, said: Answered) -> web.StreamResponse:
        try:
            return await self._answer(request, said)
        except errors.BreakwaterError as error:
            return self._failed(error, said)

    async def _answer(self, request: web.BaseRequest, said: Answered) -> web.StreamResponse:
        path, _, query = endpoints.origin_form(request.raw_path).partition("?")
        if path == TOKEN_PATH:
            said.path = path  # the rest may name an account at an upstream, which is nobody else's business
            return await self._callers.token(request)
        asked = endpoints.parse(request.method, path, query)
        if request.body_exists:
            raise errors.BadRequest(f"a {request.method} has no body here")
        shown = await self._callers.of(request)
        said.caller = shown.caller.name
        try:
            return await self._asked(request, asked, shown, said)
        except errors.Unauthenticated as error:
            await self._clock.sleep(shown.delay_s)
            challenge = self._callers.challenge(request, repository_of(asked))
            raise errors.Unauthenticated(
                str(error), challenge=challenge, rule=error.rule, project=error.project
            ) from None

    async def _asked(
        self, request: web.BaseRequest, asked: Endpoint, shown: Shown, said: Answered
    ) -> web.StreamResponse:
        if isinstance(asked, ManifestGet):
            said.kind = "manifest"
            return await self._manifest(request, asked, shown, said)
        if isinstance(asked, BlobGet):
            said.kind = "blob"
            return await self._blob(request, asked, shown.caller, said)
        if isinstance(asked, TagsList):
            said.kind = "tags"
            return await self._tags(request, asked, shown.caller, said)
        if isinstance(asked, ReferrersList):
            said.kind = "referrers"
            return await self._referrers(request, asked, shown.caller, said)
        said.kind = "version"
        if self._callers.must_log_in(shown):
            raise errors.Unauthenticated("ask for a token; without a name it is one for anybody", challenge="")
        return self._version(asked, said)

    # -- endpoints --------------------------------------------------------------------------------------------------

    def _version(self, asked: VersionCheck, said: Answered) -> web.Response:
        headers = {**_COMMON, "Content-Type": "application/json"}
        headers |= _namespace(asked.ns)
        said.n_bytes = 2
        return web.Response(headers=headers, body=b"{}")

    async def _manifest(
        self, request: web.BaseRequest, asked: ManifestGet, shown: Shown, said: Answered
    ) -> web.Response:
        pulled = await self._in_time(self._pull.manifest(asked, shown.caller))
        self._note(said, pulled.route.place, pulled.outcome)
        held = pulled.held
        etag = f'"{held.descriptor.digest}"'
        headers = {
            **_COMMON,
            "Content-Type": held.descriptor.media_type,
            "Docker-Content-Digest": str(held.descriptor.digest),
            "ETag": etag,
            "Cache-Status": cache_status(pulled.outcome),
            **_namespace(asked.ns),
        }
        if pulled.age_s is not None:
            headers["Age"] = str(int(pulled.age_s))
        if pulled.trouble:
            said.error = pulled.trouble
        if ranges.etag_matches(request.headers.get("If-None-Match"), etag):
            return web.Response(status=304, headers=headers)
        response = self._document(request, headers, held.body, said)
        if shown.may_be_kept and not any(name in request.headers for name in _SPEAKS_FOR_ONE):
            again = self._pull.vouch(asked, pulled, shown.caller)
            if again is not None:
                body = held.body if request.method == "GET" else b""
                request[READY] = Ready(
                    said,
                    body,
                    again,
                    good_until=shown.good_until,
                    has_age=pulled.age_s is not None,
                    is_secret=shown.is_secret,
                )
        return response

    async def _blob(
        self, request: web.BaseRequest, asked: BlobGet, caller: Caller, said: Answered
    ) -> web.StreamResponse:
        etag = f'"{asked.digest}"'
        headers = {
            **_COMMON,
            "Content-Type": "application/octet-stream",
            "Docker-Content-Digest": str(asked.digest),
            "ETag": etag,
            "Accept-Ranges": "bytes",
            # Content that is named by its hash never changes (RFC 8246).
            "Cache-Control": "max-age=31536000, immutable",
        }
        if request.method == "HEAD":
            route, size, outcome = await self._in_time(self._pull.blob_size(asked, caller))
            self._note(said, route.place, outcome)
            headers |= {"Cache-Status": cache_status(outcome), **_namespace(asked.ns)}
            if ranges.etag_matches(request.headers.get("If-None-Match"), etag):
                return web.Response(status=304, headers=headers)
            return web.Response(headers=headers | {"Content-Length": str(size)})
        route, opened = await self._in_time(self._pull.blob(asked, caller))
        try:
            self._note(said, route.place, opened.outcome)
            headers |= {"Cache-Status": cache_status(opened.outcome), **_namespace(asked.ns)}
            response, parts = _select(request, headers, opened, etag)
        except BaseException:
            _let_go(opened)
            raise
        if parts is None:
            _let_go(opened)
            return response

        async def instead(failure: ReadFailed) -> Opened:
            rotten = f"{asked.digest}: {failure}" if failure.is_short else ""
            return await self._pull.blob_instead(asked, caller, rotten=rotten)

        await self._send(request, response, opened, parts, said, instead)
        return response

    async def _tags(self, request: web.BaseRequest, asked: TagsList, caller: Caller, said: Answered) -> web.Response:
        route, page, outcome = await self._in_time(self._pull.tags(asked, caller))
        self._note(said, route.place, outcome)
        headers = {
            **_COMMON,
            "Content-Type": "application/json",
            "Cache-Status": cache_status(outcome),
            **_namespace(asked.ns),
            **_next_page(request, asked, page),
        }
        document = {"name": route.repository.value, "tags": list(page.tags)}
        return self._document(request, headers, json.dumps(document).encode(), said)

    async def _referrers(
        self, request: web.BaseRequest, asked: ReferrersList, caller: Caller, said: Answered
    ) -> web.Response:
        route, found = await self._in_time(self._pull.referrers(asked, caller))
        self._note(said, route.place, found.outcome)
        headers = {
            **_COMMON,
            "Content-Type": mediatypes.OCI_INDEX,
            "Cache-Status": cache_status(found.outcome),
            **_namespace(asked.ns),
        }
        if asked.artifact_type:
            headers["OCI-Filters-Applied"] = "artifactType"
        body = referrers.build(referrers.filtered(found.descriptors, asked.artifact_type))
        return self._document(request, headers, body, said)

    # -- bodies and errors ------------------------------------------------------------------------------------------

    async def _send(
        self,
        request: web.BaseRequest,
        response: web.StreamResponse,
        opened: Opened,
        parts: Sequence[Part],
        said: Answered,
        instead: Callable[[ReadFailed], Awaitable[Opened]],
    ) -> None:
        """Send a body. Where the file cannot be read on, the rest comes from `instead`. What else fails after the
        headers can only end it short; the connection closes behind it (INV-3)."""
        try:
            try:
                sent = await self._sender.send(request, response, opened.source, parts)
            except ReadFailed as failure:
                said.error = str(failure)
                n_sent = sum(map(size_of, parts)) - sum(map(size_of, failure.rest))
                other = await instead(failure)
                if other.size != opened.size:
                    _let_go(other)
                    raise
                sent = await self._sender.send(request, response, other.source, failure.rest)
                sent = Sent(n_sent + sent.n_bytes, sent.ending)
        except errors.BreakwaterError as error:
            if not response.prepared:
                raise
            said.ending, said.error, said.outcome = "short", str(error), "failed"
            response.force_close()
            return
        said.n_bytes, said.ending = sent.n_bytes, sent.ending

    def _document(self, request: web.BaseRequest, headers: dict[str, str], body: bytes, said: Answered) -> web.Response:
        """A small body with its exact length, or for HEAD the length alone."""
        if request.method == "HEAD":
            headers["Content-Length"] = str(len(body))
            return web.Response(headers=headers)
        said.n_bytes = len(body)
        return web.Response(headers=headers, body=body)

    def _failed(self, error: errors.BreakwaterError, said: Answered) -> web.Response:
        said.error = str(error)
        said.outcome = "failed"
        if isinstance(error, errors.Denied) or (isinstance(error, errors.Unauthenticated) and error.rule):
            said.outcome, said.rule, said.project = "denied", error.rule, error.project
        if isinstance(error, errors.UpstreamError):
            said.upstream = error.upstream
        response = error_table.answer(error)
        if isinstance(error, errors.Unsupported):
            response.force_close()  # its body was not read, and is not going to be
        return response

    async def _in_time(self, answer: Awaitable[T]) -> T:
        """The engine's answer, or a 504 before the client's own deadline: containerd waits 30 s for headers. What runs
        behind it goes on, so that asking again finds it further."""
        try:
            async with asyncio.timeout(self._header_deadline_s):
                return await answer
        except TimeoutError:
            raise errors.Timeout(
                f"upstream has not answered within {self._header_deadline_s:g} s; the fetch goes on, ask again",
                upstream="",
            ) from None

    def _note(self, said: Answered, place: tuple[str, str, str], outcome: Outcome) -> None:
        said.project, said.upstream, said.repository = place
        said.outcome = outcome

    def _request_id(self, request: web.BaseRequest) -> str:
        brought = request.headers.get("X-Request-Id")
        if brought is not None and _REQUEST_ID.fullmatch(brought):
            return brought
        return self.new_request_id()

    def new_request_id(self) -> str:
        """An id that no other request of this process has, and hardly one of any other."""
        return f"{self._id_prefix}-{next(self._ids):x}"


def cache_status(outcome: Outcome) -> str:
    """The Cache-Status of an outcome (RFC 9211)."""
    return _CACHE_STATUS[outcome]


_CACHE_STATUS: dict[Outcome, str] = {
    "hit": "breakwater; hit",
    "stale": "breakwater; hit; detail=stale",
    "miss": "breakwater; fwd=miss; stored",
    "coalesced": "breakwater; fwd=miss; collapsed",
    "denied": "breakwater; detail=denied",
    "failed": "breakwater; detail=failed",
}


def _select(
    request: web.BaseRequest, headers: dict[str, str], opened: Opened, etag: str
) -> tuple[web.StreamResponse, Sequence[Part] | None]:
    """The response and the parts of the blob that the Range header means; None for no body of the blob (304, 416)."""
    if ranges.etag_matches(request.headers.get("If-None-Match"), etag):
        return web.Response(status=304, headers=headers), None
    size = opened.size
    asked = ranges.parse(request.headers.get("Range"))
    if asked is None or not ranges.if_range_matches(request.headers.get("If-Range"), etag):
        headers["Content-Length"] = str(size)
        return web.StreamResponse(headers=headers), (Range(0, size),) if size else ()
    found = ranges.resolve(asked, size)
    if not found:
        refusal = {
            **headers,
            "Content-Type": "application/json",
            "Content-Range": ranges.unsatisfied_range(size),
        }
        body = codes.envelope(codes.ErrorCode.RANGE_INVALID, f"no part of these {size} bytes lies in this range")
        return web.Response(status=416, headers=refusal, body=body), None
    if len(found) == 1:
        headers["Content-Length"] = str(found[0].length)
        headers["Content-Range"] = ranges.content_range(found[0], size)
        return web.StreamResponse(status=206, headers=headers), found
    boundary = secrets.token_hex(16)
    frame = ranges.multipart(found, size, headers["Content-Type"], boundary)
    headers["Content-Type"] = ranges.multipart_type(boundary)
    headers["Content-Length"] = str(frame.length)
    parts: list[Part] = []
    for head, part in frame.parts:
        parts += [head, part]
    return web.StreamResponse(status=206, headers=headers), [*parts, frame.trailer]


def _let_go(opened: Opened) -> None:
    """Nothing of it will be sent."""
    if isinstance(opened.source, LocalFile):
        opened.source.blob.close()
    else:
        opened.source.leave()


def _namespace(asked_ns: str | None) -> dict[str, str]:
    """`ns` is echoed (distribution-spec § Registry Proxying)."""
    return {"OCI-Namespace": asked_ns} if asked_ns is not None else {}


def _next_page(request: web.BaseRequest, asked: TagsList, page: TagPage) -> dict[str, str]:
    if page.last is None:
        return {}
    path = endpoints.origin_form(request.raw_path).partition("?")[0]
    return {"Link": pagination.link_header(path, n=asked.n, last=page.last, ns=asked.ns)}
