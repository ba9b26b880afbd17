"""The scripted upstream: a registry on 127.0.0.1 that answers by the specification until its script says otherwise.

Raw asyncio streams, no HTTP library and no code of the package under test: both would misread the specification
together. A script is data: a list of `Twist`s, each saying for which requests and how an answer differs from the plain
one. What takes a decision during a request waits at a `Gate`, never for a time.

Every request is kept as it came in, with raw headers and a count by (method, path, range).
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import re
import socket
import ssl
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, Self
from urllib.parse import parse_qsl, urlsplit

from tests.support.images import OCI_INDEX, Image, digest_of

_V2 = re.compile(r"/v2/(?P<name>.+?)/(?P<kind>manifests|blobs|tags/list|referrers)(?:/(?P<last>[^/]+))?")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_REASONS = {200: "OK", 206: "Partial Content", 307: "Temporary Redirect", 401: "Unauthorized", 404: "Not Found"}

Header = tuple[str, str]


# -- the script --------------------------------------------------------------------------------------------------------


class Gate:
    """Where an answer waits. `reached` is set when it does; `step` lets one wait pass, `open` all of them for good."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._permits = asyncio.Semaphore(0)
        self._is_open = asyncio.Event()

    def step(self) -> None:
        """Let one wait pass, and forget that it was reached."""
        self.reached.clear()
        self._permits.release()

    def open(self) -> None:
        """Let everything pass from now on."""
        self._is_open.set()
        self._permits.release()

    async def passed(self) -> None:
        """Wait here. For the registry."""
        self.reached.set()
        if not self._is_open.is_set():
            await self._permits.acquire()
        if self._is_open.is_set():
            self._permits.release()


@dataclass(frozen=True, slots=True, kw_only=True)
class Twist:
    """How the answers to some requests differ. Of several twists that fit a request the first in the script is taken.

    `path` is a shell pattern for the path without its query; `method` "*" means all. Of the fitting requests that no
    twist before it took, `after` pass untouched, and then `times` are twisted (None: all that follow).
    """

    path: str = "*"
    method: str = "*"
    after: int = 0
    times: int | None = None

    #: Replace, add to, and take away from the plain answer. A body given here is not searched for ranges.
    status: int | None = None
    add: Sequence[Header] = ()
    drop: Sequence[str] = ()
    body: bytes | None = None
    #: Send exactly this instead of any answer, then close.
    raw: bytes | None = None

    #: Content with one bit of this byte flipped.
    flip_at: int | None = None
    #: The body packed, and called so.
    packed: bool = False
    #: Answer a range with the whole.
    ignores_range: bool = False

    #: How the end of the body is told: by its length, in chunks, or by closing.
    framing: Literal["length", "chunked", "eof"] = "length"
    #: Bytes after the body: beyond the length that was announced.
    extra: bytes = b""
    #: Stop after this many bytes of the body, and close in this way.
    cut_at: int | None = None
    cut: Literal["fin", "rst"] = "fin"
    #: Close before any answer.
    no_answer: Literal["fin", "rst"] | None = None

    #: Wait at `gate` before the headers, or before each of these bytes of the body.
    gate: Gate | None = None
    holds_headers: bool = False
    hold_at: Sequence[int] = ()
    #: Headers that never end: one byte each so many seconds.
    drip_s: float | None = None

    def fits(self, request: Request) -> bool:
        """Whether this is about `request`."""
        return self.method in ("*", request.method) and fnmatchcase(request.path, self.path)


@dataclass(slots=True, kw_only=True)
class Guard:
    """Who may come in. With a token realm ("bearer") or a password at the door ("basic")."""

    scheme: Literal["bearer", "basic"]
    #: User name and password; None takes everybody, a token is then asked for anonymously.
    login: tuple[str, str] | None = None
    #: The realm to name; "" means /token here.
    realm: str = ""
    service: str = "registry.test"
    #: The whole WWW-Authenticate value or values; {realm}, {service} and {name} are filled in.
    challenges: Sequence[str] = ('Bearer realm="{realm}",service="{service}",scope="repository:{name}:pull"',)
    #: What a token answer says besides the token itself, and under which name the token goes.
    token_key: str = "token"
    token_says: dict[str, Any] = field(default_factory=lambda: {"expires_in": 300})
    #: Several accounts in the place of `login`, name -> password; nobody without one is turned away at the token realm.
    accounts: dict[str, str] = field(default_factory=dict)
    #: With `accounts`: who may read a repository, "" being everybody. One that is not here nobody may.
    readers: dict[str, set[str]] = field(default_factory=dict)
    #: Tokens that are let in: all that were issued and not revoked.
    valid: set[str] = field(default_factory=set)
    #: Whose tokens they are, where there are `accounts`.
    owners: dict[str, str] = field(default_factory=dict)
    #: Lets nobody in, whatever they show.
    refuses_all: bool = False


# -- what came in ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came over the wire."""

    method: str
    target: str
    headers: tuple[Header, ...]
    raw: bytes

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> list[Header]:
        """The parameters of the query, decoded, in order."""
        return parse_qsl(self.target.partition("?")[2], keep_blank_values=True)

    def header(self, name: str) -> str:
        """The first header of this name, "" if there is none."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), "")

    def names(self) -> set[str]:
        """The names of all headers, in lower case."""
        return {key.lower() for key, _ in self.headers}


@dataclass(frozen=True, slots=True)
class Served:
    """One line of the registry's own log: what was asked and with what status it answered; 0 is no answer."""

    method: str
    path: str
    status: int
    #: Body bytes that were written, whether or not they arrived.
    n_bytes: int


@dataclass(slots=True)
class _Answer:
    status: int
    headers: list[Header]
    body: bytes = b""

    def set(self, name: str, value: str) -> None:
        self.unset(name)
        self.headers.append((name, value))

    def unset(self, name: str) -> None:
        self.headers = [pair for pair in self.headers if pair[0].lower() != name.lower()]


# -- the registry ------------------------------------------------------------------------------------------------------


class ScriptedRegistry:
    """Listens while it is entered (`async with`). Content and script may be changed at any time."""

    def __init__(self, *script: Twist, guard: Guard | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.script: list[Twist] = list(script)
        self.guard = guard
        #: Tags on one page of a list, where the client does not ask for fewer; None: all.
        self.page_size: int | None = None
        self.has_referrers = True
        self.requests: list[Request] = []
        self.log: list[Served] = []
        self.n_connections = 0
        self.n_tokens = 0
        self._manifests: dict[str, dict[str, Image]] = {}
        self._tags: dict[str, dict[str, str]] = {}
        self._blobs: dict[str, dict[str, bytes]] = {}
        self._taken: Counter[int] = Counter()
        self._tls = tls
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, ssl=self._tls, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        tasks = tuple(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        """Its address, by number."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    # -- content

    def put(self, repository: str, wanted: Image, *tags: str) -> None:
        """Have an image with all it names, under these tags."""
        for blob in wanted.all_blobs():
            self.put_blob(repository, blob.content)
        for each in wanted.manifests():
            self._manifests.setdefault(repository, {})[each.digest] = each
        names = self._tags.setdefault(repository, {})
        names.update(dict.fromkeys(tags, wanted.digest))

    def put_blob(self, repository: str, content: bytes, algorithm: str = "sha256") -> str:
        """Have a blob; returns its digest."""
        digest = digest_of(content, algorithm)
        self._blobs.setdefault(repository, {})[digest] = content
        return digest

    # -- what was seen

    @property
    def counts(self) -> Counter[tuple[str, str, str]]:
        """How often each (method, path, Range header) was asked for."""
        return Counter((request.method, request.path, request.header("Range")) for request in self.requests)

    def asked(self, pattern: str, method: str = "*") -> list[Request]:
        """The requests whose path fits a shell pattern, in order."""
        fits = Twist(path=pattern, method=method).fits
        return [request for request in self.requests if fits(request)]

    def revoke(self) -> None:
        """No token issued so far is let in any more."""
        assert self.guard is not None
        self.guard.valid.clear()

    # -- one connection

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self.n_connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client left, or the test is over: neither is ours to report
        finally:
            self._connections.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; false when the connection is to be closed."""
        raw = await reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        method, target, _ = first.split(" ", 2)
        pairs = tuple((name, value.strip()) for name, _, value in (line.partition(":") for line in lines))
        request = Request(method, target, pairs, raw)
        self.requests.append(request)
        position = len(self.log)
        self.log.append(Served(method, request.path, 0, 0))
        twist = self._twist(request)
        if twist.holds_headers and twist.gate:
            await twist.gate.passed()
        if twist.no_answer:
            return self._end(writer, twist.no_answer)
        if twist.raw is not None:
            writer.write(twist.raw)
            await writer.drain()
            return False
        if twist.drip_s is not None:
            await self._drip(writer, twist.drip_s)
        answer = self._twisted(self._plain(request, twist), twist)
        return await self._sent(writer, request, answer, twist, position)

    def _twist(self, request: Request) -> Twist:
        for number, twist in enumerate(self.script):
            if not twist.fits(request):
                continue
            self._taken[number] += 1
            seen = self._taken[number] - twist.after
            if seen > 0 and (twist.times is None or seen <= twist.times):
                return twist
        return Twist()

    def rewrite(self, *script: Twist) -> None:
        """Follow another script from now on."""
        self.script[:] = script
        self._taken.clear()

    @staticmethod
    async def _drip(writer: asyncio.StreamWriter, pause_s: float) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(pause_s)

    @staticmethod
    def _twisted(answer: _Answer, twist: Twist) -> _Answer:
        if twist.status is not None:
            answer.status = twist.status
        if twist.body is not None:
            answer.body = twist.body
            answer.unset("Docker-Content-Digest")
        if twist.flip_at is not None and answer.body:
            spoilt = bytearray(answer.body)
            spoilt[twist.flip_at % len(spoilt)] ^= 1
            answer.body = bytes(spoilt)
        if twist.packed:
            answer.body = gzip.compress(answer.body, mtime=0)
            answer.set("Content-Encoding", "gzip")
        for name in twist.drop:
            answer.unset(name)
        for name in {name for name, _ in twist.add}:
            answer.unset(name)
        answer.headers += list(twist.add)
        return answer

    async def _sent(
        self, writer: asyncio.StreamWriter, request: Request, answer: _Answer, twist: Twist, position: int
    ) -> bool:
        body = b"" if request.method == "HEAD" else answer.body
        says_length = any(name.lower() == "content-length" for name, _ in answer.headers)
        if twist.framing == "chunked" and request.method != "HEAD":
            answer.set("Transfer-Encoding", "chunked")
        elif twist.framing == "length" and not says_length and "content-length" not in map(str.lower, twist.drop):
            answer.set("Content-Length", str(len(answer.body)))
        if twist.framing == "eof":
            answer.set("Connection", "close")
        head = f"HTTP/1.1 {answer.status} {_REASONS.get(answer.status, 'Whatever')}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in answer.headers) + "\r\n"
        end = len(body) if twist.cut_at is None else min(twist.cut_at, len(body))
        # Logged before it leaves, so that a client that has its answer also finds it here.
        self.log[position] = Served(request.method, request.path, answer.status, end)
        writer.write(head.encode("latin-1"))
        await writer.drain()
        start = 0
        for stop in [*(at for at in sorted(twist.hold_at) if at <= end), end]:
            await self._written(writer, body[start:stop], twist)
            start = stop
            if stop in twist.hold_at and twist.gate:
                await twist.gate.passed()
        if end < len(body):
            return self._end(writer, twist.cut)
        if twist.framing == "chunked" and request.method != "HEAD":
            writer.write(b"0\r\n\r\n")
        writer.write(twist.extra)
        await writer.drain()
        return twist.framing != "eof" and request.header("Connection").lower() != "close"

    @staticmethod
    async def _written(writer: asyncio.StreamWriter, piece: bytes, twist: Twist) -> None:
        if twist.framing == "chunked" and piece:
            piece = b"%x\r\n%b\r\n" % (len(piece), piece)
        writer.write(piece)
        await writer.drain()

    @staticmethod
    def _end(writer: asyncio.StreamWriter, how: str) -> bool:
        if how == "rst":
            # With a linger of zero seconds, closing resets: the peer loses even what it has not read yet.
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        return False

    # -- the plain answers (distribution-spec)

    def _plain(self, request: Request, twist: Twist) -> _Answer:
        if request.path == "/token":
            return self._token(request)
        if self.guard is not None and not self._is_let_in(request):
            return self._challenge(request)
        if request.path in ("/v2", "/v2/"):
            return _Answer(200, [("Content-Type", "application/json")], b"{}")
        found = _V2.fullmatch(request.path)
        if found is None or request.method not in ("GET", "HEAD"):
            return _error(404, "UNSUPPORTED", "no such endpoint")
        name, last = found["name"], found["last"] or ""
        if found["kind"] == "manifests":
            return self._manifest(name, last)
        if found["kind"] == "blobs":
            return self._blob(name, last, "" if twist.ignores_range else request.header("Range"))
        if found["kind"] == "referrers":
            return self._referrers(name, last, request.query)
        return self._tag_list(name, request)

    def _manifest(self, name: str, target: str) -> _Answer:
        digest = target if ":" in target else self._tags.get(name, {}).get(target, "")
        wanted = self._manifests.get(name, {}).get(digest)
        if wanted is None:
            return _error(404, "MANIFEST_UNKNOWN", "manifest unknown")
        headers = [("Content-Type", wanted.media_type), ("Docker-Content-Digest", digest), ("ETag", f'"{digest}"')]
        return _Answer(200, headers, wanted.body)

    def _blob(self, name: str, digest: str, wanted_range: str) -> _Answer:
        content = self._blobs.get(name, {}).get(digest)
        if content is None:
            return _error(404, "BLOB_UNKNOWN", "blob unknown to registry")
        headers = [
            ("Content-Type", "application/octet-stream"),
            ("Docker-Content-Digest", digest),
            ("ETag", f'"{digest}"'),
            ("Accept-Ranges", "bytes"),
        ]
        asked = _RANGE.fullmatch(wanted_range)
        if asked is None:
            return _Answer(200, headers, content)
        first = int(asked[1])
        last = min(int(asked[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return _Answer(416, [("Content-Range", f"bytes */{len(content)}")])
        headers.append(("Content-Range", f"bytes {first}-{last}/{len(content)}"))
        return _Answer(206, headers, content[first : last + 1])

    def _tag_list(self, name: str, request: Request) -> _Answer:
        if name not in self._tags:
            return _error(404, "NAME_UNKNOWN", "repository name not known to registry")
        query = dict(request.query)
        tags = [tag for tag in sorted(self._tags[name]) if tag > query.get("last", "")]
        n = min(int(query.get("n") or 10_000), self.page_size or 10_000)
        answer = _json(200, {"name": name, "tags": tags[:n]})
        if tags[n:]:
            answer.headers.append(("Link", f'</v2/{name}/tags/list?n={n}&last={tags[n - 1]}>; rel="next"'))
        return answer

    def _referrers(self, name: str, digest: str, query: Iterable[Header]) -> _Answer:
        if not self.has_referrers:
            return _error(404, "UNSUPPORTED", "no referrers here")
        wanted_type = dict(query).get("artifactType")
        entries = []
        for each in self._manifests.get(name, {}).values():
            document = json.loads(each.body)
            if document.get("subject", {}).get("digest") == digest and wanted_type in (None, document["artifactType"]):
                entries.append({**each.descriptor, "artifactType": document["artifactType"]})
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
        answer = _json(200, index)
        answer.set("Content-Type", OCI_INDEX)
        if wanted_type is not None:
            answer.headers.append(("OCI-Filters-Applied", "artifactType"))
        return answer

    # -- who may come in

    def _is_let_in(self, request: Request) -> bool:
        guard = self.guard
        assert guard is not None
        scheme, _, shown = request.header("Authorization").partition(" ")
        if guard.refuses_all:
            return False
        if guard.accounts:
            return self._is_reader(guard, request, scheme, shown)
        if guard.scheme == "basic":
            return scheme == "Basic" and guard.login is not None and shown == _basic(*guard.login)
        return scheme == "Bearer" and shown in guard.valid

    @staticmethod
    def _is_reader(guard: Guard, request: Request, scheme: str, shown: str) -> bool:
        if guard.scheme == "basic":
            named = [name for name, secret in guard.accounts.items() if shown == _basic(name, secret)]
            if scheme and not named:
                return False
            who = named[0] if named else ""
        elif scheme == "Bearer" and shown in guard.valid:
            who = guard.owners[shown]
        elif scheme:
            return False
        else:
            who = ""
        found = _V2.fullmatch(request.path)
        readers = guard.readers.get(found["name"], set()) if found else guard.accounts
        return "" in readers or (bool(who) and who in readers)

    def _challenge(self, request: Request) -> _Answer:
        guard = self.guard
        assert guard is not None
        found = _V2.fullmatch(request.path)
        words = {
            "realm": guard.realm or f"{self.url}/token",
            "service": guard.service,
            "name": found["name"] if found else "",
        }
        answer = _error(401, "UNAUTHORIZED", "authentication required")
        templates = ['Basic realm="{realm}"'] if guard.scheme == "basic" else guard.challenges
        answer.headers += [("WWW-Authenticate", template.format(**words)) for template in templates]
        return answer

    def _token(self, request: Request) -> _Answer:
        guard = self.guard
        if guard is None:
            return _error(404, "UNSUPPORTED", "no tokens here")
        shown = request.header("Authorization").removeprefix("Basic ")
        owners = {_basic(name, secret): name for name, secret in guard.accounts.items()}
        if (guard.login is not None and shown != _basic(*guard.login)) or (owners and shown and shown not in owners):
            return _json(401, {"details": "incorrect username or password"})
        self.n_tokens += 1
        token = f"token-{self.n_tokens}.{self.port}"
        guard.valid.add(token)
        guard.owners[token] = owners.get(shown, "")
        return _json(200, {guard.token_key: token, **guard.token_says})


def redirect(location: str, *, path: str = "*", method: str = "*", status: int = 307, **more: Any) -> Twist:
    """A twist that sends its requests elsewhere; `location` is written as it is."""
    return Twist(path=path, method=method, status=status, add=[("Location", location)], body=b"", **more)


def authority(url: str) -> str:
    """Host and port of a URL."""
    return urlsplit(url).netloc


def _basic(username: str, password: str) -> str:
    return base64.b64encode(f"{username}:{password}".encode()).decode()


def _json(status: int, document: object) -> _Answer:
    return _Answer(status, [("Content-Type", "application/json")], json.dumps(document).encode())


def _error(status: int, code: str, message: str) -> _Answer:
    return _json(status, {"errors": [{"code": code, "message": message}]})
