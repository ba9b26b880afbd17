"""The whole read path in one process: the data port over a real socket, the engine, and a real client of a scripted
registry; a clock that stands still, a store on disk. And a client that sees how a connection ends.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from proxy.engine.guarded import GuardedUpstream
from proxy.engine.origins import PassThrough
from proxy.engine.robots import Robots
from proxy.engine.tasks import TaskOwner
from proxy.events import Answered, Event, Repeat, UpstreamAsked
from proxy.guests import Guest, Guests
from proxy.ports import Upstream
from proxy.store.disk import DiskStore
from proxy.upstream.client import RegistryClient
from proxy.upstream.credentials import Credentials
from proxy.upstream.policy import UpstreamPolicy
from proxy.web.callers import Callers
from proxy.web.ready import ReadyTable
from proxy.web.registry import Registry
from proxy.web.serve import Sender
from proxy.web.server import DataServer
from tests.support.clock import ManualClock
from tests.support.engine import HOST, Engine, engine
from tests.support.registry import ScriptedRegistry


class HastyClock(ManualClock):
    """A manual clock that passes short sleeps at once: the pauses between attempts. Longer ones wait for `advance`."""

    async def sleep(self, seconds: float) -> None:
        """Move on by `seconds` where that is little."""
        if seconds <= 1.0:
            self._monotonic += seconds
            self._wall += seconds
            await asyncio.sleep(0)
        else:
            await super().sleep(seconds)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got. `end`: the whole body, a short one that ended with FIN, or a reset. Header names are lower
    case."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    end: Literal["whole", "short", "reset"]

    @property
    def code(self) -> str:
        """The spec's error code, "" where the body is no error."""
        return str(self._error()["code"]) if self.status >= 400 and self.body else ""

    @property
    def message(self) -> str:
        """The error's sentence."""
        return str(self._error()["message"])

    def _error(self) -> dict[str, Any]:
        document = json.loads(self.body)
        assert list(document) == ["errors"], "an error has the envelope of the spec, and nothing beside it"
        (error,) = document["errors"]
        assert {"code", "message"} <= set(error) <= {"code", "message", "detail"}
        found: dict[str, Any] = error
        return found


@dataclass(slots=True)
class Appliance:
    """What serves, and who asked it."""

    engine: Engine
    server: DataServer
    sender: Sender
    events: list[Event]
    ready: ReadyTable

    @property
    def port(self) -> int:
        """Where it listens, on 127.0.0.1."""
        return int(self.server.addresses[0].rpartition(":")[2])

    @property
    def answered(self) -> list[Answered]:
        """One for each request, in the order of their ends."""
        return [event for event in self.events if isinstance(event, Answered)]

    @property
    def upstream_requests(self) -> list[UpstreamAsked]:
        """What the upstream client says it sent."""
        return [event for event in self.events if isinstance(event, UpstreamAsked)]

    async def get(self, target: str, *, method: str = "GET", more: Mapping[str, str] | None = None) -> Answer:
        """See `ask`."""
        return await ask(self.port, target, method=method, more=more)

    async def quiet(self) -> None:
        """Wait until every request has been counted and no transfer runs."""
        while len(self.sender):
            await asyncio.sleep(0)
        await self.engine.idle()


async def ask(port: int, target: str, *, method: str = "GET", more: Mapping[str, str] | None = None) -> Answer:
    """Ask 127.0.0.1 on a connection of its own, and read to the end of the body, or of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"{method} {target} HTTP/1.1", f"Host: 127.0.0.1:{port}"]
    lines += [f"{name}: {value}" for name, value in (more or {}).items()]
    try:
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        return await read_answer(reader, has_body=method != "HEAD")
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except ConnectionError:
            pass  # the other side was faster


async def read_answer(reader: asyncio.StreamReader, *, has_body: bool = True) -> Answer:
    """One answer off a connection."""
    status, headers = 0, {}
    body = bytearray()
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")[:-2]
        status = int(first.split(" ", 2)[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        missing = int(headers.get("content-length", 0)) if has_body and status not in (204, 304) else 0
        while missing > 0:
            piece = await reader.read(missing)
            if not piece:
                return Answer(status, headers, bytes(body), "short")
            body += piece
            missing -= len(piece)
    except ConnectionError:
        return Answer(status, headers, bytes(body), "reset")
    except asyncio.IncompleteReadError:
        return Answer(status, headers, bytes(body), "short")
    return Answer(status, headers, bytes(body), "whole")


def repeats_into(events: list[Event]) -> Callable[[Answered], Repeat]:
    """What a ready table reports, as the events that it stands for."""

    def repeats(said: Answered) -> Repeat:
        return lambda request_id, remote, at: events.append(replace(said, request_id=request_id, remote=remote))

    return repeats


@asynccontextmanager
async def serving(
    running: Engine, *, header_deadline_s: float = 25.0, is_ready: bool = True
) -> AsyncIterator[Appliance]:
    """A data port in front of an engine. Its events join the engine's. `is_ready`: warm manifests are kept ready."""
    sender = Sender(running.clock, n_threads=2)
    robots = Robots(key=bytes(32), clock=running.clock, owner=running.owner)
    callers = Callers(
        robots,
        lambda: running.pull.plan.robots,
        clock=running.clock,
        is_tls=False,
        takes_logins=lambda: running.pull.plan.takes_logins,
    )
    registry = Registry(
        running.pull,
        sender,
        callers,
        clock=running.clock,
        observe=running.events.append,
        header_deadline_s=header_deadline_s,
    )
    table = ReadyTable(clock=running.clock, repeats=repeats_into(running.events), request_id=registry.new_request_id)
    server = DataServer(registry, log=logging.getLogger("test.data"), ready=table if is_ready else None)
    await server.start(["127.0.0.1:0"])
    try:
        yield Appliance(running, server, sender, running.events, table)
    finally:
        await server.aclose(5.0)
        sender.close()


@asynccontextmanager
async def appliance(
    registry: ScriptedRegistry,
    folder: Path,
    *,
    host: str = HOST,
    policy: Mapping[str, Any] | None = None,
    header_deadline_s: float = 25.0,
    is_guarded: bool = False,
    decides_for_s: float | None = None,
    clock: ManualClock | None = None,
    **engine_words: Any,
) -> AsyncIterator[Appliance]:
    """Everything, over a store in `folder`. `policy` are fields of UpstreamPolicy, `engine_words` go to `engine`.

    `is_guarded`: with the circuit breaker and the budget before the client, as the settings wire it. `decides_for_s`:
    the registry judges clients' own logins, and what it decides is remembered for so long.
    """
    clock = clock or HastyClock()
    owner = TaskOwner(print)
    events: list[Event] = []

    def client_of(credentials: Credentials | None) -> RegistryClient:
        words = {"credentials": credentials, **(policy or {})}
        around: dict[str, Any] = {"clock": clock, "spawn": owner.spawn, "observer": events.append}
        return RegistryClient(UpstreamPolicy(host, registry.url, **words), chance=lambda: 0.0, **around)

    client = client_of(None)
    guests = Guests(lambda credentials: Guest(one := client_of(credentials), (one,)), lambda clients: None)
    if decides_for_s is not None:
        engine_words["logins"] = {host: PassThrough(guests, decides_for_s)}
    asked: dict[str, Upstream] = {host: client}
    if is_guarded:
        asked[host] = GuardedUpstream(
            client,
            host=host,
            address=registry.url,
            clock=clock,
            chance=lambda: 0.0,
            observe=events.append,
            quote=lambda: client.budget,
        )
    reports: list[str] = []
    async with AsyncExitStack() as stack:
        store = await DiskStore.open(folder, clock=clock, report=reports.append)
        stack.push_async_callback(store.aclose)
        stack.push_async_callback(client.aclose)

        async def see_guests_out() -> None:
            for guest in guests.clients:
                await guest.aclose()

        stack.push_async_callback(see_guests_out)
        stack.push_async_callback(owner.aclose)
        running = await stack.enter_async_context(
            engine(store=store, ports=asked, clock=clock, events=events, **engine_words)
        )
        yield await stack.enter_async_context(serving(running, header_deadline_s=header_deadline_s))
    assert reports == [], "the store had nothing to report"
