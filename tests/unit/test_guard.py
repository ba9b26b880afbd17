"""Who may ask the admin listener what: names, origins and the token, over real sockets of both kinds."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from aiohttp import ClientSession, UnixConnector, web
from pydantic import Field

from proxy.web.admin import Admin, Probes
from proxy.web.api import Document, Operation
from proxy.web.guard import Guard

TOKEN = "x" * 43


class Word(Document):
    word: str = Field(min_length=1)


class Said(Document):
    said: str


@pytest.fixture
async def admin(tmp_path: Path) -> AsyncIterator[tuple[int, str]]:
    """An admin listener with one thing to ask and one to change: its port, and the path of its Unix socket."""

    async def say(asked: Word) -> Said:
        return Said(said=asked.word)

    probes = Probes(metrics=lambda: b"x 1\n", readiness=lambda: ("ready", ""))
    listener = Admin(
        probes=probes,
        guard=Guard(TOKEN, ["breakwater.example"], "/the/token"),
        operations=[
            Operation("GET", "said", "Say it.", say, Said, Word),
            Operation("POST", "say", "Say it and mean it.", say, Said, Word),
        ],
        version="1",
    )
    runner = web.AppRunner(listener.app(), access_log=None)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        await web.SockSite(runner, listening).start()
        path = str(tmp_path / "admin.sock")
        await web.UnixSite(runner, path).start()
        yield listening.getsockname()[1], path
        await runner.cleanup()


async def ask(
    at: int | str, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
) -> tuple[int, dict[str, str], str]:
    """Status, headers and text of an answer."""
    connector = UnixConnector(at) if isinstance(at, str) else None
    base = "http://localhost" if isinstance(at, str) else f"http://127.0.0.1:{at}"
    async with ClientSession(base, connector=connector) as session:
        async with session.request(method, path, headers=headers, data=body, allow_redirects=False) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, await answer.text()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        pytest.param("127.0.0.1:5001", 200, id="an address"),
        pytest.param("[::1]:5001", 200, id="an address of IPv6"),
        pytest.param("10.1.2.3", 200, id="another address: it cannot be rebound"),
        pytest.param("localhost:5001", 200, id="localhost"),
        pytest.param("breakwater.example", 200, id="a name of ours"),
        pytest.param("BREAKWATER.example:443", 200, id="in capitals, with a port"),
        pytest.param("evil.example:5001", 421, id="a name of somebody else"),
        pytest.param("127.0.0.1.evil.example", 421, id="a name that looks like an address"),
        pytest.param("localhost.evil.example", 421, id="a name that looks like localhost"),
        pytest.param("localhost@evil.example", 400, id="userinfo"),
        pytest.param("evil.example:port", 400, id="a port that is none"),
        pytest.param("", 400, id="empty"),
    ],
)
async def test_only_our_names_are_answered(admin: tuple[int, str], host: str, status: int) -> None:
    """DNS rebinding: a web page that gives its own name this machine's address still sends its own name."""
    assert (await ask(admin[0], "GET", "/api/v1/said?word=a", {"Host": host}))[0] == status


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
async def test_probes_and_metrics_answer_under_every_name_and_without_a_token(
    admin: tuple[int, str], path: str
) -> None:
    """A kubelet asks by the pod's address, a Prometheus by whatever its configuration says."""
    assert (await ask(admin[0], "GET", path, {"Host": "anything.example"}))[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param({}, 200, id="a program says nothing"),
        pytest.param({"Origin": "http://127.0.0.1:5001", "Sec-Fetch-Site": "same-origin"}, 200, id="our own page"),
        pytest.param({"Origin": "https://127.0.0.1:5001"}, 200, id="our own page behind TLS of a reverse proxy"),
        pytest.param({"Sec-Fetch-Site": "none"}, 200, id="typed by a person"),
        pytest.param({"Origin": "http://evil.example"}, 403, id="another site"),
        pytest.param({"Origin": "http://127.0.0.1:5002"}, 403, id="another port of this machine"),
        pytest.param({"Origin": "null"}, 403, id="a sandboxed page"),
        pytest.param({"Origin": "http://["}, 403, id="an origin that is none"),
        pytest.param({"Sec-Fetch-Site": "cross-site"}, 403, id="another site, as the browser says"),
        pytest.param({"Sec-Fetch-Site": "same-site"}, 403, id="another host of the same site"),
        pytest.param(
            {"Origin": "http://127.0.0.1:5001", "Sec-Fetch-Site": "cross-site"}, 403, id="what contradicts itself"
        ),
    ],
)
async def test_changes_come_from_our_own_pages_or_from_programs(
    admin: tuple[int, str], headers: dict[str, str], status: int
) -> None:
    """CSRF: a browser tells where a request comes from, and even the right token does not help a page elsewhere."""
    ours = {"Host": "127.0.0.1:5001", "Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    assert (await ask(admin[0], "POST", "/api/v1/say", ours | headers, b'{"word":"a"}'))[0] == status


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        pytest.param(f"Bearer {TOKEN}", 200, id="the token"),
        pytest.param(f"bearer  {TOKEN} ", 200, id="spelled otherwise"),
        pytest.param(None, 401, id="none"),
        pytest.param("Bearer", 401, id="empty"),
        pytest.param(f"Bearer {TOKEN}x", 401, id="a longer one"),
        pytest.param(f"Bearer {TOKEN[:-1]}", 401, id="a shorter one"),
        pytest.param(f"Basic {TOKEN}", 401, id="another scheme"),
        pytest.param("Bearer é", 401, id="not ASCII"),
    ],
)
async def test_changes_need_the_token(admin: tuple[int, str], authorization: str | None, status: int) -> None:
    """Issue 7: mutations need a token; the refusal says where it is."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": authorization} if authorization else {})
    found, answered, text = await ask(admin[0], "POST", "/api/v1/say", headers, b'{"word":"a"}')
    assert found == status
    if status == 401:
        assert answered["www-authenticate"].startswith("Bearer")
        assert "/the/token" in json.loads(text)["error"]


async def test_a_form_carries_the_token_to_pages_and_never_to_the_api(admin: tuple[int, str]) -> None:
    """A form can be sent by any page; what the API takes cannot be made with one."""
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert (await ask(admin[0], "POST", "/api/v1/say", form, f"token={TOKEN}&word=a".encode()))[0] == 401
    allowed = form | {"Authorization": f"Bearer {TOKEN}"}
    assert (await ask(admin[0], "POST", "/api/v1/say", allowed, b"word=a"))[0] == 415


async def test_a_unix_socket_needs_neither_name_nor_token(admin: tuple[int, str]) -> None:
    """Who may connect is decided by its folder and mode; a page that comes through is still asked for its origin."""
    headers = {"Host": "whatever.example", "Content-Type": "application/json"}
    assert (await ask(admin[1], "POST", "/api/v1/say", headers, b'{"word":"a"}'))[0] == 200
    crossed = headers | {"Origin": "http://evil.example"}
    assert (await ask(admin[1], "POST", "/api/v1/say", crossed, b'{"word":"a"}'))[0] == 403


async def test_what_is_not_there_is_not_there_before_a_token_is_asked_for(admin: tuple[int, str]) -> None:
    """So that a mistake in a path is not taken for a wrong token; and a wrong method names the right ones."""
    assert (await ask(admin[0], "POST", "/api/v1/absent"))[0] == 404
    status, headers, text = await ask(admin[0], "DELETE", "/api/v1/say")
    assert (status, headers["allow"]) == (405, "POST")
    assert set(json.loads(text)) == {"error"}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        pytest.param("/api/v1/said?word=", None, 400, id="too short a word"),
        pytest.param("/api/v1/said", None, 400, id="no word"),
        pytest.param("/api/v1/said?word=a&word=b", None, 400, id="two words"),
        pytest.param("/api/v1/said?word=a&more=b", None, 400, id="an unknown parameter"),
        pytest.param("/api/v1/say", b'{"word":7}', 400, id="a number for a word"),
        pytest.param("/api/v1/say", b'{"word":"a","more":1}', 400, id="an unknown key"),
        pytest.param("/api/v1/say", b"[]", 400, id="no object"),
        pytest.param("/api/v1/say", b"{", 400, id="no JSON"),
        pytest.param("/api/v1/say", b"[" * 60_000, 400, id="deeper than a parser goes"),
        pytest.param("/api/v1/say", b" " * 70_000 + b"{}", 413, id="too large"),
    ],
)
async def test_what_is_asked_is_checked_against_the_document(
    admin: tuple[int, str], path: str, body: bytes | None, status: int
) -> None:
    """The same models say what may be asked and show it."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    found, _, text = await ask(admin[0], "GET" if body is None else "POST", path, headers, body)
    assert found == status and json.loads(text)["error"]


async def test_no_answer_may_be_framed_sniffed_kept_or_read_elsewhere(admin: tuple[int, str]) -> None:
    """No CORS header is ever sent, so no other site's page reads anything."""
    _, headers, _ = await ask(admin[0], "GET", "/api/v1/said?word=a", {"Origin": "http://evil.example"})
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert headers["cache-control"] == "no-store" and headers["cross-origin-resource-policy"] == "same-origin"
    assert not [name for name in headers if name.startswith("access-control")]


async def test_the_document_shows_every_operation(admin: tuple[int, str]) -> None:
    """OpenAPI 3.1, with parameters, bodies, answers, failures and who needs a token."""
    document = json.loads((await ask(admin[0], "GET", "/api/v1/openapi.json"))[2])
    assert document["openapi"] == "3.1.0"
    get, post = document["paths"]["/api/v1/said"]["get"], document["paths"]["/api/v1/say"]["post"]
    assert [(one["name"], one["required"]) for one in get["parameters"]] == [("word", True)]
    assert "security" not in get and post["security"] == [{"token": []}]
    assert {"200", "400", "401", "403", "413", "415", "421", "503"} == set(post["responses"])
    assert document["components"]["schemas"]["Said"]["additionalProperties"] is False
