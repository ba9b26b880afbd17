"""One upstream, one identity: the distribution-spec's read side over HTTP. Implements `ports.Upstream`.

One attempt for each call, reported as it went. The exceptions to "one call, one request" are the protocol's own: a
challenge (at most one new token, at most one more request with it), redirects (at most five, each with headers of its
own), and a HEAD that the registry does not know (then one GET). What to retry, and when, is the engine's to decide.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from urllib.parse import urlencode

from cachetools import LRUCache
from multidict import CIMultiDictProxy
from yarl import URL

from proxy.errors import (
    BreakwaterError,
    InvalidTag,
    Misbehaved,
    Timeout,
    Unauthorised,
    UnknownBlob,
    UnknownManifest,
    UnknownName,
)
from proxy.oci import mediatypes, pagination
from proxy.oci.digest import Digest
from proxy.oci.manifest import MAX_MANIFEST_BYTES
from proxy.oci.names import Repository, Tag, TagOrDigest
from proxy.ports import BlobBody, Clock, ManifestHead, TagPage, UpstreamManifest
from proxy.upstream import answers, failures
from proxy.upstream.answers import Budget, ContentRange
from proxy.upstream.body import RegistryBody
from proxy.upstream.policy import UpstreamPolicy
from proxy.upstream.targets import Targets, origin
from proxy.upstream.tokens import Spawn, Tokens
from proxy.upstream.wire import Lookup, Observer, Reply, Wire, system_lookup

#: Registry to storage is one hop, mirrors add one or two; more is a loop or a game.
MAX_REDIRECTS = 5
#: A page of tags, or all pages of referrers, in bytes and pages: an index is a manifest, and a page is of that size.
MAX_LIST_BYTES = MAX_MANIFEST_BYTES
MAX_LIST_PAGES = 200
#: Of an error's body, this much is read for its sentence.
MAX_ERROR_BYTES = 8 * 1024
#: Blobs whose ETag and size are remembered for resuming.
MAX_VALIDATORS = 1024

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
#: "Not this method here" (RFC 9110 §15.5.6, §15.6.2).
_NO_SUCH_METHOD = frozenset({405, 501})

_Absent = type[UnknownName] | type[UnknownManifest] | type[UnknownBlob]


@dataclass(frozen=True, slots=True)
class _Validator:
    """What a blob's first answer said, to know the same object by when it is resumed."""

    origin: tuple[str, str, int | None]
    etag: str | None
    size: int | None


@dataclass(frozen=True, slots=True)
class _Ask:
    """One thing wanted from upstream. `kind` is its word in metrics, `what` in sentences, `absent` what a 404 means."""

    kind: str
    method: str
    url: URL
    repository: Repository
    what: str
    absent: _Absent
    accept: str = "*/*"
    range: str = ""
    validator: _Validator | None = None


class RegistryClient:
    """See the module and `ports.Upstream`. Make it anywhere; close it with `aclose`, on the loop that used it.

    `spawn` starts tasks that somebody owns (a token is fetched once for many askers, and outlives each of them);
    `observer` is told of each HTTP request sent and of body bytes as they come; `lookup` resolves names; `chance` gives
    numbers from [0, 1). Raises ValueError when the policy's `url` is not usable.
    """

    def __init__(
        self,
        policy: UpstreamPolicy,
        *,
        clock: Clock,
        spawn: Spawn,
        observer: Observer | None = None,
        lookup: Lookup = system_lookup,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.policy = policy
        self._clock = clock
        self._targets = Targets(policy)
        self._wire = Wire(policy, self._targets, observer=observer or (lambda _: None), lookup=lookup)
        self._tokens = Tokens(policy, self._targets, self._wire, clock=clock, spawn=spawn, chance=chance)
        self._validators: LRUCache[Digest, _Validator] = LRUCache(MAX_VALIDATORS)
        self._budget: Budget | None = None

    @property
    def budget(self) -> Budget | None:
        """What upstream last said of its rate limit, or None while it has not."""
        return self._budget

    @property
    def is_used(self) -> bool:
        """Whether a request is on its way or its answer being read. One that is retried is unused in between."""
        return self._wire.is_used

    async def aclose(self) -> None:
        """Close every connection; bodies that are being read break, later calls raise Unreachable."""
        await self._wire.aclose()

    def __repr__(self) -> str:
        return f"RegistryClient({self.policy.host}, {self._targets.base}, as {self.policy.identity})"

    # -- manifests -----------------------------------------------------------------------------------------------------

    async def manifest(self, repository: Repository, target: TagOrDigest) -> UpstreamManifest:
        """See `ports.Upstream.manifest`. What came gzip'ed is unpacked; over 4 MiB, or a web page, is Misbehaved."""
        body, headers = await self._document(self._manifest_ask("GET", repository, target), limit=MAX_MANIFEST_BYTES)
        return UpstreamManifest(body, answers.media_type(headers), answers.maybe_digest(headers), self.policy.url)

    async def manifest_head(self, repository: Repository, target: TagOrDigest) -> ManifestHead:
        """See `ports.Upstream.manifest_head`. Where HEAD is refused as a method, the headers of one GET answer."""
        async with self._deadline(f"manifest {repository}@{target}"):
            reply = await self._head_or_get(self._manifest_ask("HEAD", repository, target))
            await reply.drain()
        if answers.is_web_page(reply.headers):
            raise self._misbehaved(f"answers for manifest {repository}@{target} with a web page")
        headers = reply.headers
        return ManifestHead(
            answers.maybe_digest(headers), answers.media_type(headers), answers.maybe_length(headers), self.policy.url
        )

    def _manifest_ask(self, method: str, repository: Repository, target: TagOrDigest) -> _Ask:
        mark = "@" if isinstance(target, Digest) else ":"
        return _Ask(
            kind="manifest",
            method=method,
            url=self._targets.at(f"/v2/{repository}/manifests/{target}"),
            repository=repository,
            what=f"manifest {repository}{mark}{target}",
            absent=UnknownManifest,
            accept=mediatypes.ACCEPT,
        )

    # -- blobs ---------------------------------------------------------------------------------------------------------

    async def blob(self, repository: Repository, digest: Digest, *, offset: int = 0) -> BlobBody:
        """See `ports.Upstream.blob`. An encoded body, or a part of anything but what was asked for, is Misbehaved."""
        ask = self._blob_ask("GET", repository, digest)
        if offset:
            ask = replace(ask, range=f"bytes={offset}-", validator=self._validators.get(digest))
        async with self._deadline(ask.what):
            reply = await self._open(ask)
            try:
                if reply.status not in (200, 206):
                    raise await self._failure(ask, reply)
                return self._body(ask, digest, reply, offset)
            except BaseException:
                reply.close()
                raise

    async def blob_size(self, repository: Repository, digest: Digest) -> int | None:
        """See `ports.Upstream.blob_size`. Where HEAD is refused, a GET of the first byte tells the size."""
        async with self._deadline(f"blob {repository}@{digest}"):
            reply = await self._head_or_get(replace(self._blob_ask("HEAD", repository, digest), range="bytes=0-0"))
            await reply.drain()
        if reply.status == 416:
            return answers.unsatisfied_total(reply.headers.get("Content-Range"))
        if reply.status == 206:
            part = ContentRange.maybe_parse(reply.headers.get("Content-Range"))
            return part.total if part else None
        return answers.maybe_length(reply.headers)

    def _blob_ask(self, method: str, repository: Repository, digest: Digest) -> _Ask:
        return _Ask(
            kind="blob",
            method=method,
            url=self._targets.at(f"/v2/{repository}/blobs/{digest}"),
            repository=repository,
            what=f"blob {repository}@{digest}",
            absent=UnknownBlob,
        )

    def _body(self, ask: _Ask, digest: Digest, reply: Reply, offset: int) -> RegistryBody:
        """The body of a 200 or 206, once its headers are known not to contradict what was asked for."""
        if encoding := answers.content_encoding(reply.headers):
            raise self._misbehaved(f"sends {ask.what} encoded as {encoding[:20]!r}, which has another digest")
        size, start = answers.maybe_length(reply.headers), 0
        etag = answers.maybe_strong_etag(reply.headers)
        if reply.status == 206:
            size, start = self._part(ask, reply, etag, offset), offset
        known = self._validators.get(digest)
        if known is None or reply.status == 200:
            self._validators[digest] = _Validator(origin(reply.url), etag, size)
        return RegistryBody(
            reply,
            size=size,
            offset=start,
            source=self.policy.url,
            upstream=self.policy.host,
            clock=self._clock,
            pace=self.policy.pace,
        )

    def _part(self, ask: _Ask, reply: Reply, etag: str | None, offset: int) -> int | None:
        """The whole blob's size as a 206 tells it. Raises Misbehaved when it is a part of something else."""
        part = ContentRange.maybe_parse(reply.headers.get("Content-Range"))
        if part is None or not offset or part.first != offset:
            raise self._misbehaved(f"answers a request for {ask.what} from byte {offset} with another part of it")
        known = ask.validator
        if known is not None:
            if None not in (known.size, part.total) and known.size != part.total:
                raise self._misbehaved(f"says {ask.what} has {part.total} bytes, and earlier {known.size}")
            # Between origins ETags differ for the same bytes; within one they do not.
            if known.origin == origin(reply.url) and None not in (known.etag, etag) and known.etag != etag:
                raise self._misbehaved(f"resumes {ask.what} with a part of another object")
        return part.total if part.total is not None else (known.size if known else None)

    # -- lists ---------------------------------------------------------------------------------------------------------

    async def tags(self, repository: Repository, *, n: int | None, last: str | None) -> TagPage:
        """See `ports.Upstream.tags`. Words that are no tags are left out: nobody could ask for them."""
        asked = [(key, str(value)) for key, value in (("n", n), ("last", last)) if value is not None]
        ask = self._list_ask("tags", f"/v2/{repository}/tags/list", asked, repository, f"tags of {repository}")
        body, headers = await self._document(ask, limit=MAX_LIST_BYTES)
        found = self._json(body, ask).get("tags")
        if found is None:  # what Go writes for an empty list
            found = []
        if not isinstance(found, list):
            raise self._misbehaved(f"answers for {ask.what} with something else")
        tags = tuple(tag for tag in found if isinstance(tag, str) and _is_tag(tag))
        following = self._next(ask.url, headers)
        if following is None or not tags:
            return TagPage(tags, None)
        # Registries with pages of their own kind name no `last`; the page's last tag is what the spec means by it.
        return TagPage(tags, pagination.last_of(str(following)) or tags[-1])

    async def referrers(self, repository: Repository, digest: Digest, *, artifact_type: str) -> bytes | None:
        """See `ports.Upstream.referrers`. One page is passed on byte for byte; of several, the first has all."""
        asked = [("artifactType", artifact_type)] if artifact_type else []
        what = f"referrers of {repository}@{digest}"
        ask = self._list_ask("referrers", f"/v2/{repository}/referrers/{digest}", asked, repository, what)
        ask = replace(ask, accept=mediatypes.OCI_INDEX)
        pages: list[bytes] = []
        try:
            async with self._deadline(what):
                following: URL | None = ask.url
                while following is not None:
                    page, headers = await self._read_document(replace(ask, url=following), limit=MAX_LIST_BYTES)
                    pages.append(page)
                    if len(pages) > MAX_LIST_PAGES or sum(map(len, pages)) > MAX_LIST_BYTES:
                        raise self._misbehaved(f"answers for {what} without an end")
                    following = self._next(following, headers)
        except _NoSuchApi:
            return None
        return self._joined(pages, ask)

    def _list_ask(self, kind: str, path: str, asked: list[tuple[str, str]], repository: Repository, what: str) -> _Ask:
        query = f"?{urlencode(asked)}" if asked else ""
        return _Ask(
            kind=kind,
            method="GET",
            url=self._targets.at(path + query),
            repository=repository,
            what=what,
            absent=UnknownName,
            accept="application/json",
        )

    def _next(self, current: URL, headers: CIMultiDictProxy[str]) -> URL | None:
        """The page after this one (RFC 8288), at the upstream's own origin: it is asked for with our login."""
        location = pagination.parse_next(headers.get("Link", ""))
        if location is None:
            return None
        following = self._targets.redirect(current, location)
        if not self._targets.is_home(following):
            raise self._misbehaved("continues a list at another host")
        return following

    def _joined(self, pages: list[bytes], ask: _Ask) -> bytes:
        first = self._json(pages[0], ask)
        entries = [first.get("manifests")] + [self._json(page, ask).get("manifests") for page in pages[1:]]
        if not all(isinstance(part, list) for part in entries):
            raise self._misbehaved(f"answers for {ask.what} with something else")
        if len(pages) == 1:
            return pages[0]
        first["manifests"] = [entry for part in entries if isinstance(part, list) for entry in part]
        return json.dumps(first, separators=(",", ":")).encode()

    def _json(self, body: bytes, ask: _Ask) -> dict[str, object]:
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise self._misbehaved(f"answers for {ask.what} with something that is not a JSON object")
        return document

    # -- asking --------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _deadline(self, what: str) -> AsyncIterator[None]:
        """The wall time that an answer has, whatever it consists of."""
        seconds = self.policy.deadlines.answer_s
        try:
            async with asyncio.timeout(seconds):
                yield
        except TimeoutError:
            raise Timeout(
                f"upstream {self.policy.host} did not answer for {what} within {seconds:g} s", upstream=self.policy.host
            ) from None

    async def _document(self, ask: _Ask, *, limit: int) -> tuple[bytes, CIMultiDictProxy[str]]:
        async with self._deadline(ask.what):
            return await self._read_document(ask, limit=limit)

    async def _read_document(self, ask: _Ask, *, limit: int) -> tuple[bytes, CIMultiDictProxy[str]]:
        """A whole answer of at most `limit` bytes, unpacked where it came gzip'ed, and its headers."""
        reply = await self._open(ask)
        try:
            if reply.status != 200:
                raise await self._failure(ask, reply)
            if answers.is_web_page(reply.headers):
                raise self._misbehaved(f"answers for {ask.what} with a web page")
            body = await reply.at_most(limit)
        finally:
            reply.close()
        encoding = answers.content_encoding(reply.headers)
        if encoding in ("gzip", "x-gzip") and len(body) <= limit:
            unpacked = answers.gunzip(body, limit=limit)
            if unpacked is None:
                raise self._misbehaved(f"sends {ask.what} as gzip that cannot be unpacked")
            body = unpacked
        elif encoding and len(body) <= limit:
            raise self._misbehaved(f"sends {ask.what} encoded as {encoding[:20]!r}, which nobody asked for")
        if len(body) > limit:
            raise self._misbehaved(f"sends {ask.what} of more than {limit} bytes")
        return body, reply.headers

    async def _head_or_get(self, ask: _Ask) -> Reply:
        """The answer to a HEAD, or to a GET where the registry, or the storage behind it, does not know HEAD.

        Storage is asked by a signed address, which is good for one method: there HEAD ends in 403 and GET does not.
        """
        reply = await self._open(replace(ask, range=""))
        is_home = self._targets.is_home(reply.url)
        if reply.status in _NO_SUCH_METHOD or (reply.status in (401, 403) and not is_home):
            await reply.drain()
            ask = replace(ask, method="GET")
            reply = await self._open(ask)
        is_empty = reply.status == 416 and bool(ask.range) and ask.method == "GET"
        if reply.status in (200, 206) or is_empty:
            return reply
        raise await self._failure(ask, reply)

    async def _open(self, ask: _Ask) -> Reply:
        """The answer that counts, of whatever status but a redirect: after the token dance, and where redirects end.

        Raises Unauthorised when upstream wants a login after one has just been obtained.
        """
        sent = await self._tokens.ready(ask.repository)
        reply = await self._shown(ask, sent)
        if not self._is_challenge(reply):
            return reply
        await reply.drain()
        obtained = await self._tokens.obtain(reply.headers, ask.repository, rejected=sent)
        async with self._tokens.trial(obtained):
            reply = await self._shown(ask, obtained)
            if not self._is_challenge(reply):
                return reply
            failure = await self._failure(ask, reply)
            raise self._tokens.refusal(ask.repository, str(failure))

    async def _shown(self, ask: _Ask, authorization: str | None) -> Reply:
        reply = await self._follow(ask, authorization)
        if reply.status < 500 and reply.status not in (401, 429):
            self._tokens.accepted(authorization)
        return reply

    def _is_challenge(self, reply: Reply) -> bool:
        return reply.status == 401 and self._targets.is_home(reply.url)

    async def _follow(self, ask: _Ask, authorization: str | None) -> Reply:
        """Send, and follow redirects by hand. The authorization is left behind at the first foreign origin, for good:
        a host there could otherwise send it back to us for a repository of its choice."""
        url, is_home = ask.url, True
        for hop in range(MAX_REDIRECTS + 1):
            headers = self._headers(ask, url, authorization if is_home else None)
            reply = await self._wire.send(ask.method, url, headers, kind="redirect" if hop else ask.kind)
            if is_home:
                self._budget = Budget.maybe_of(reply.headers) or self._budget
            if reply.status not in _REDIRECTS:
                return reply
            await reply.drain()
            locations = reply.headers.getall("Location", [])
            if len(locations) != 1:
                raise self._misbehaved(f"redirects for {ask.what} without saying where to")
            url = self._targets.redirect(url, locations[0])
            is_home = is_home and self._targets.is_home(url)
        raise self._misbehaved(f"redirects for {ask.what} more than {MAX_REDIRECTS} times")

    def _headers(self, ask: _Ask, url: URL, authorization: str | None) -> dict[str, str]:
        """The headers for one hop, made afresh: what belongs to one origin never reaches another (INV-7)."""
        headers = {"Accept": ask.accept}
        if authorization is not None:
            headers["Authorization"] = authorization
        if ask.range:
            headers["Range"] = ask.range
            if ask.validator and ask.validator.etag and ask.validator.origin == origin(url):
                headers["If-Range"] = ask.validator.etag
        return headers

    async def _failure(self, ask: _Ask, reply: Reply) -> BreakwaterError:
        """What an answer that was not hoped for means. Reads its words and closes it."""
        try:
            body = (await reply.at_most(MAX_ERROR_BYTES))[:MAX_ERROR_BYTES] if ask.method != "HEAD" else b""
        except BreakwaterError:
            body = b""  # its status is what counts
        finally:
            reply.close()
        if ask.kind == "referrers" and reply.status in (404, *_NO_SUCH_METHOD):
            return _NoSuchApi()
        if reply.status == 416 and ask.range:
            return self._misbehaved(f"has fewer bytes of {ask.what} than it sent before")
        is_home = self._targets.is_home(reply.url)
        if reply.status == 401 and is_home and ask.method == "HEAD":
            return Unauthorised(f"upstream {self.policy.host} refuses us {ask.what} (401)", upstream=self.policy.host)
        return failures.of_status(
            reply.status,
            upstream=self.policy.host,
            what=ask.what,
            absent=UnknownName if answers.names_unknown(body) else ask.absent,
            words=answers.words_of(body, reply.headers),
            retry_after_s=failures.retry_after_s(reply.headers.get("Retry-After"), now_at=self._clock.wall()),
            is_home=is_home,
        )

    def _misbehaved(self, sentence: str) -> Misbehaved:
        return Misbehaved(f"upstream {self.policy.host} {sentence}", upstream=self.policy.host)


class _NoSuchApi(BreakwaterError):
    """Upstream has no referrers API. Never leaves this module."""


def _is_tag(text: str) -> bool:
    try:
        Tag.parse(text)
    except InvalidTag:
        return False
    return True
