"""The composition root: settings become running parts. The only module that knows everyone."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import socket
import ssl
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import uvloop
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from proxy import __version__, admin_token, image_lists
from proxy.archives.tar import framed, members_of
from proxy.clock import SystemClock
from proxy.engine import changes
from proxy.engine.bandwidth import LimitedUpstream
from proxy.engine.blobs import Blobs, Limits
from proxy.engine.bundle import Export, Import, Parts
from proxy.engine.capacity import Capacity
from proxy.engine.catalogue import Catalogue
from proxy.engine.charges import Charges
from proxy.engine.explain import Explain
from proxy.engine.freight import Freight, Order
from proxy.engine.limits import Limit, ProjectLimits
from proxy.engine.links import Links
from proxy.engine.listings import Listings
from proxy.engine.manifests import Manifests
from proxy.engine.orders import Orders
from proxy.engine.origins import Origin, Origins, SealedUpstream
from proxy.engine.pins import Pins
from proxy.engine.prefetch import Prefetch
from proxy.engine.pull import Plan, Pull
from proxy.engine.pump import Work
from proxy.engine.purge import Purge
from proxy.engine.remains import Remains
from proxy.engine.robots import Robots
from proxy.engine.scrub import Refetch, Scrub
from proxy.engine.seal import Seal
from proxy.engine.standing import Standing
from proxy.engine.tags import Tags
from proxy.engine.tasks import TaskOwner
from proxy.engine.verification import Verification
from proxy.engine.walk import Scope
from proxy.errors import BadRequest, InvalidSettings, StoreError
from proxy.events import Event, Noticed, UpstreamAsked, UpstreamUnreached
from proxy.fitting import Fitting, asked_of, conditions_shown, ignored_proxies, key_of
from proxy.oci.digest import Digest
from proxy.oci.endpoints import BlobGet, ManifestGet, RepositoryPath
from proxy.ports import Holding, LocalFile, Upstream
from proxy.rules.closure import Platforms
from proxy.rules.freshness import TagPolicy
from proxy.rules.gates.access import EVERYBODY, Access, Robot
from proxy.rules.gates.allowlist import Rules
from proxy.rules.gates.immutability import Immutable
from proxy.rules.globs import Glob
from proxy.rules.ledger import Ledger
from proxy.rules.lists import merged
from proxy.rules.quota import Allowance
from proxy.rules.routes import DEFAULT_PROJECT, ProjectRoute, Routes
from proxy.rules.secret_hash import SecretHash
from proxy.service.descriptors import connections_within, raise_limit
from proxy.service.sockets import NOTHING_HANDED, Handed, not_covered
from proxy.settings import Address, Settings, TcpAddress, UnixAddress, effective_default
from proxy.settings.changes import taken_up
from proxy.store.disk import DiskStore
from proxy.store.lock import PATIENCE_S
from proxy.telemetry.activity import Activity
from proxy.telemetry.audit import Audit, TurningFile
from proxy.telemetry.log import EventLog, LineWriter
from proxy.telemetry.tally import Tally
from proxy.web import freight as freight_routes
from proxy.web import operations, scrubbing
from proxy.web import projects as project_routes
from proxy.web.admin import Admin, Probes
from proxy.web.callers import Callers
from proxy.web.dashboard import Dashboard
from proxy.web.guard import Guard
from proxy.web.ready import ReadyTable
from proxy.web.registry import Registry
from proxy.web.serve import Pace as ReaderPace
from proxy.web.serve import Sender
from proxy.web.server import DataServer, name_of
from proxy.web.server import Limits as ServerLimits

T = TypeVar("T")

#: How long a command waits for somebody else's lock on the store, in seconds: a server has it for good.
COMMAND_PATIENCE_S = 2.0


@dataclass(slots=True)
class Appliance:
    """The running parts."""

    settings: Settings
    owner: TaskOwner
    store: DiskStore
    fitting: Fitting
    tls: ssl.SSLContext | None
    capacity: Capacity
    charges: Charges
    project_limits: ProjectLimits
    tags: Tags
    explain: Explain
    audit: LineWriter | None
    observe: Callable[[Event], None]
    blobs: Blobs
    pull: Pull
    tally: Tally
    clock: SystemClock
    sender: Sender
    data: DataServer
    admin: web.AppRunner
    admin_addresses: tuple[str, ...]
    health: UpstreamHealth
    pins: Pins
    freight: Freight
    activity: Activity
    catalogue: Catalogue
    purge: Purge
    scrub: Scrub
    seal: Seal
    standing: Standing
    started_at: float
    probes: web.AppRunner | None = None
    probe_addresses: tuple[str, ...] = ()
    is_stopping: bool = False
    #: Why the last reload changed nothing; "" when it was taken up, or there was none.
    reload_problem: str = ""

    @classmethod
    async def start(
        cls, settings: Settings, log: EventLog, handed: Handed = NOTHING_HANDED, *, listens: bool = True
    ) -> Appliance:
        """Open the store, then listen, on sockets that were `handed` over first; unless a command only needs the parts.

        Raises Unavailable, InvalidSettings or OSError when that is not possible.
        """
        clock = SystemClock()
        tally = Tally()
        health = UpstreamHealth(clock.monotonic)
        activity = Activity(clock.wall)

        watching: list[Callable[[Event], None]] = []

        def observe(event: Event) -> None:
            tally.observe(event)
            health.observe(event)
            activity.observe(event)
            log.observe(event)
            for watch in watching:
                watch(event)

        owner = TaskOwner(lambda sentence: log.say("error", sentence))
        store = await DiskStore.open(
            Path(settings.store.path),
            clock=clock,
            report=lambda sentence: log.say("warning", sentence),
            patience_s=PATIENCE_S if listens else COMMAND_PATIENCE_S,
        )
        if (ignored := ignored_proxies(os.environ)) and listens:
            log.say("warning", ignored)
        fitting = Fitting(clock, owner, observe)
        fitted = await asyncio.to_thread(fitting.fit, settings)
        fitting.use(fitted)
        tls = await asyncio.to_thread(server_tls, settings)
        audit: LineWriter | None = None
        try:
            file = await asyncio.to_thread(TurningFile, store.path / "audit" / "audit.jsonl")
            audit = LineWriter(file, at_end=file.close)
            watching.append(Audit(audit, clock.wall).observe)
        except OSError as error:  # a disk that is read-only serves hits, and must not keep us from starting
            log.say("error", f"there is no audit log: {error.strerror}")
        space = await store.blobs.space()
        min_free = settings.store.min_free
        inode_share = settings.store.min_free_inode_share
        capacity = Capacity(
            Ledger(settings.store.capacity.of(space.total_bytes)),
            store.blobs,
            store.facts,
            min_free_bytes=min_free.of,
            min_free_inodes=lambda total: int(total * inode_share),
            clock=clock,
            owner=owner,
            observe=observe,
            notes=store.notes,
            records=store.records,
        )
        await capacity.prepare()

        pins = Pins(store.notes, capacity.ledger, owner, keeps_all=settings.server.sealed)
        seal = Seal(store.notes, owner)
        try:
            await pins.load()
            await seal.load()
            await pins.keep_all_of(store.records, sealed_hosts(settings))
        except StoreError as error:
            log.say("error", f"what is pinned is not known: {error}")
        capacity.pinned = pins

        async def condemn(digest: Digest, why: str) -> None:
            await store.blobs.quarantine(digest, why)
            capacity.forget(digest)
            observe(Noticed("error", f"{why}; moved to quarantine"))

        verification = Verification(owner, clock, condemn=condemn)
        links = Links(store.records, owner)
        charges = Charges(allowances_of(settings), store.charges, capacity, clock=clock, owner=owner, observe=observe)
        await charges.load()
        manifests = Manifests(
            store.blobs, capacity, charges, links, verification, clock=clock, owner=owner, observe=observe
        )
        remains = Remains(store.blobs, capacity, clock=clock, owner=owner, observe=observe)
        remains.start()
        capacity.on_forgotten = lambda digests: manifests.forget(*digests)
        tags = Tags(store.records, manifests, links, clock=clock, owner=owner, observe=observe)
        project_limits = ProjectLimits(clock, limits_of(settings))
        blobs = Blobs(
            Work(store.blobs, capacity, clock, random.random, observe, charges, remains),
            links,
            verification,
            owner=owner,
            on_last_reader_gone=settings.transfers.on_last_reader_gone,
            limits=Limits(
                settings.transfers.max_concurrent,
                settings.transfers.max_per_upstream,
                settings.transfers.queue_deadline,
            ),
            projects=project_limits,
        )
        listings = Listings(links, manifests, tags, clock=clock, owner=owner, observe=observe)
        pull = Pull(
            plan_of(settings, fitting.upstreams, project_limits),
            tags=tags,
            manifests=manifests,
            blobs=blobs,
            listings=listings,
            links=links,
            charges=charges,
        )
        sender = Sender(
            clock,
            pace=ReaderPace(int(settings.transfers.reader_min_rate), settings.transfers.reader_min_rate_window),
        )
        explain = Explain(lambda: pull.plan, links, store.records, charges)
        callers = Callers(
            Robots(key=secrets.token_bytes(32), clock=clock, owner=owner),
            lambda: pull.plan.robots,
            clock=clock,
            is_tls=settings.server.tls is not None,
            public_url=settings.server.public_url or "",
        )
        registry = Registry(
            pull, sender, callers, clock=clock, observe=observe, header_deadline_s=settings.transfers.header_deadline
        )
        data = DataServer(
            registry,
            log=logging.getLogger("http"),
            limits=ServerLimits(n_connections=connections_within(raise_limit(), settings.server.max_connections)),
            tls=tls,
            ready=ReadyTable(clock=clock, observe=observe, request_id=registry.new_request_id),
        )
        parts = Parts(
            pull=pull,
            blobs=store.blobs,
            records=store.records,
            links=links,
            manifests=manifests,
            tags=tags,
            capacity=capacity,
            charges=charges,
            pins=pins,
            clock=clock,
            owner=owner,
        )
        freight = Freight(
            Prefetch(pull, capacity, pins, clock=clock),
            Export(parts),
            Import(parts),
            seal,
            framed=framed,
            members_of=members_of,
        )
        standing = Standing(
            freight,
            lambda: asyncio.to_thread(standing_order, settings),
            settings.prefetch.schedule,
            clock=clock,
            observe=observe,
        )
        self = cls(
            settings=settings,
            owner=owner,
            store=store,
            fitting=fitting,
            tls=tls,
            capacity=capacity,
            charges=charges,
            project_limits=project_limits,
            tags=tags,
            explain=explain,
            audit=audit,
            observe=observe,
            blobs=blobs,
            pull=pull,
            tally=tally,
            clock=clock,
            sender=sender,
            data=data,
            admin=None,  # type: ignore[arg-type]  # made below: it reports on all the others
            admin_addresses=(),
            health=health,
            pins=pins,
            freight=freight,
            seal=seal,
            standing=standing,
            activity=activity,
            catalogue=Catalogue(store.records, links, capacity, clock=clock, owner=owner),
            purge=Purge(store.records, links, tags, manifests, capacity, observe),
            scrub=Scrub(
                store.blobs,
                store.records,
                store.facts,
                verification,
                capacity.ledger.size_of,
                refetching(pull),
                clock=clock,
                owner=owner,
                observe=observe,
            ),
            started_at=clock.monotonic(),
        )
        try:
            if listens:
                await self._listen(handed)
        except BaseException:
            await self.aclose()
            raise
        for name, project in settings.projects.items():
            if project.quota is not None and project.quota > capacity.ledger.capacity:
                told = f"the quota of project {name!r} is larger than the store may become, so it will never bind"
                log.say("warning", told)
        capacity.start()
        if listens:
            self.scrub.start(int(settings.store.scrub_rate))
        charges.start()
        if listens and settings.prefetch.list:
            owner.spawn_background(self.standing.run_forever(), "the standing order")
        return self

    async def _listen(self, handed: Handed) -> None:
        server = self.settings.server
        token = await asyncio.to_thread(admin_token.obtain, self.settings)
        probes = Probes(metrics=self.metrics, readiness=self.readiness)
        self.admin = web.AppRunner(self._admin(probes, token).app(), access_log=None, shutdown_timeout=1.0)
        await self.admin.setup()
        if server.probe_listen is not None:
            self.probes = web.AppRunner(probes.app(), access_log=None, shutdown_timeout=1.0)
            await self.probes.setup()
            self.probe_addresses = await _sites(self.probes, server.probe_listen)
        address = server.admin_listen
        if handed.admin:
            for listening in handed.admin:
                await web.SockSite(self.admin, listening).start()
            self.admin_addresses = tuple(name_of(listening) for listening in handed.admin)
        else:
            self.admin_addresses = await _sites(self.admin, address)
        listen = [str(listening) for listening in self.settings.server.listen]
        await self.data.start(not_covered(listen, handed.data), handed.data)

    def seen(self) -> operations.Seen:
        """What operators can look at."""
        return operations.Seen(
            status=self.status,
            usage=self.charges.usage,
            projects=lambda: {DEFAULT_PROJECT, *map(str, self.settings.projects)},
            activity=self.activity,
            catalogue=self.catalogue,
            purge=self.purge,
        )

    def _admin(self, probes: Probes, token: str) -> Admin:
        """What operators ask and see. A feature with a question of its own adds its `Operation` to the list here."""
        server = self.settings.server
        seen = self.seen()
        names = [*server.admin_hosts]
        if isinstance(server.admin_listen, TcpAddress):
            names.append(server.admin_listen.host)
        place = str(admin_token.place_of(self.settings))
        orders = Orders(self.freight, self.clock, self.owner)
        return Admin(
            probes=probes,
            guard=Guard(token, names, place),
            operations=[*operations.operations(seen)],
            also=[
                *freight_routes.routes(self.freight),
                *scrubbing.routes(self.scrub),
                *project_routes.routes(self.explain.of, self.usage, self.charges.recount),
            ],
            described=operations.ELSEWHERE,
            pages=Dashboard(seen, orders, wall=self.clock.wall, token_place=place),
            version=__version__,
        )

    async def reload(self, wanted: Settings) -> tuple[str, ...]:
        """Take up new settings, and the files they name, all at once and for requests that come from now on.

        Returns the keys that wait for the next start. Raises InvalidSettings when something of it cannot be used, and
        has changed nothing then.
        """
        settings, held = taken_up(self.settings, wanted)
        fitted = await asyncio.to_thread(self.fitting.fit, settings)
        # A context that took half of a pair would refuse every handshake: try on one that nobody uses.
        await asyncio.to_thread(server_tls, settings)
        plan = plan_of(settings, asked_of(fitted), self.project_limits)
        # Before the seal holds: between the two nothing may be evicted that could not be had again.
        await self.pins.keep_all_of(self.store.records, sealed_hosts(settings))
        # Nothing below fails or waits, so that no request sees half of it.
        self.pins.keeps_all = settings.server.sealed
        self.settings = settings
        old, self.pull.plan = self.pull.plan, plan
        self.charges.allow(allowances_of(settings))
        self.project_limits.allow(limits_of(settings))
        for change in changes.between(old, plan):
            self.observe(change)
        self.fitting.use(fitted)
        self.health.forget_others({str(host) for host in settings.upstreams})
        if self.tls is not None and settings.server.tls is not None:
            self.tls.load_cert_chain(settings.server.tls.cert, settings.server.tls.key)
        return held

    async def drain(self, grace_s: float, hurry: asyncio.Future[None]) -> None:
        """Fail readiness, stop accepting, let running answers end within `grace_s` seconds; `hurry` cuts that short."""
        self.is_stopping = True
        draining = self.owner.spawn(self.data.aclose(grace_s), "drain")
        await asyncio.wait([draining, hurry], return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            await self.data.aclose(0)
        await draining

    async def aclose(self) -> None:
        """Everything down, in the opposite order of its making."""
        await self.data.aclose(0)
        for runner in (self.admin, self.probes):
            if runner is not None:
                await runner.cleanup()
        await self.owner.aclose()
        await self.charges.aclose()
        await self.capacity.aclose()
        await self.fitting.aclose()
        if self.audit is not None:
            await asyncio.to_thread(self.audit.close)
        self.sender.close()
        await self.store.aclose()

    # -- what operators see --------------------------------------------------------------------------------------------

    def greeting(self) -> str:
        """The first line: where, and how to point a client at it."""
        listening = " and ".join(self.data.addresses)
        first = next((a for a in self.data.addresses if not a.startswith("unix:")), self.data.addresses[0])
        scheme = "https" if self.settings.server.tls else "http"
        example = f"{first}/docker.io/library/alpine:3"
        return (
            f"Breakwater {__version__} serves {len(self.settings.upstreams)} upstreams on {listening}, store "
            f"{self.store.path}, admin {' '.join(self.admin_addresses)}. Try: docker pull {example}; client set-up: "
            f"breakwater hosts-toml ({scheme}://{first})"
        )

    def readiness(self) -> tuple[str, str]:
        """The word and the sentence of /readyz."""
        if self.is_stopping:
            return "stopping", "shutting down"
        if self.capacity.degraded:
            return "degraded", f"nothing new is kept: {self.capacity.degraded}"
        if failing := self.health.failing():
            return "ready", f"upstreams failing: {', '.join(failing)}"
        return "ready", ""

    def status(self) -> dict[str, Any]:
        """The document of /api/v1/status."""
        now = self.clock.monotonic()
        word, reason = self.readiness()
        outcomes = self.tally.outcomes()
        ledger = self.capacity.ledger
        return {
            "version": __version__,
            "uptime_s": round(now - self.started_at, 3),
            "sealed": self.settings.server.sealed,
            "seal": self.seal.as_json(),
            "prefetch": self.standing.last,
            "pins": {"references": len(self.pins), "bytes": self.pins.n_bytes},
            "ready": word,
            "reason": reason,
            "requests": {o: outcomes.get(o, 0) for o in ("hit", "coalesced", "miss", "stale", "denied", "failed")},
            "response_bytes": self.tally.response_bytes,
            "upstream_bytes": sum(self.tally.upstream_bytes.values()),
            "store": {
                "path": str(self.store.path),
                "used_bytes": ledger.committed,
                "reserved_bytes": ledger.reserved,
                "capacity_bytes": ledger.capacity,
                "blobs": len(ledger),
                "evicted_bytes": self.capacity.evicted_bytes,
                "state": f"degraded: {self.capacity.degraded}" if self.capacity.degraded else "ok",
                "counted": self.capacity.is_counted,
            },
            "transfers": [
                {
                    "digest": str(transfer.digest),
                    "upstream": transfer.source.upstream,
                    "repository": transfer.source.repository,
                    "received_bytes": transfer.received,
                    "size_bytes": transfer.size,
                    "readers": transfer.n_readers,
                    "age_s": round(now - transfer.started_at, 3),
                }
                for transfer in self.blobs.running()
            ],
            "refused_tag_moves": [
                {"project": project, "reference": name, "kept": str(kept), "upstream": str(now) if now else None}
                for (project, name), (kept, now) in self.tags.refused_moves.items()
            ],
            "upstreams": {host: self._upstream(host) for host in sorted(map(str, self.settings.upstreams))},
            "connections": self.data.n_connections,
            "listen": list(self.data.addresses),
        }

    def _upstream(self, host: str) -> dict[str, Any]:
        return self.health.of(host) | conditions_shown(self.fitting.conditions(host))

    def usage(self) -> dict[str, Any]:
        """The document of /api/v1/usage: what projects pay for, and what is on disk."""
        ledger, projects = self.capacity.ledger, self.charges.usage()
        return {
            "projects": [
                {
                    "project": one.project,
                    "used_bytes": one.charged_bytes,
                    "reserved_bytes": one.reserved_bytes,
                    "blobs": one.n_blobs,
                    "quota_bytes": one.quota,
                    "on_full": one.on_full,
                }
                for one in projects
            ],
            "store": {
                "logical_bytes": sum(one.charged_bytes for one in projects),
                "physical_bytes": ledger.committed,
                "capacity_bytes": ledger.capacity,
                "blobs": len(ledger),
            },
            "drift": [
                {"project": one.project, "gone": one.n_gone, "resized": one.n_resized, "bytes": one.n_bytes}
                for one in self.charges.drift
            ],
        }

    def metrics(self) -> bytes:
        """The document of /metrics."""
        tally, ledger = self.tally, self.capacity.ledger
        tally.gauge("breakwater_store_bytes", "Bytes on disk, committed.", ledger.committed)
        tally.gauge("breakwater_store_reserved_bytes", "Bytes promised to running transfers.", ledger.reserved)
        tally.gauge("breakwater_store_capacity_bytes", "What the store may hold.", ledger.capacity)
        tally.gauge("breakwater_store_blobs", "Blobs in the store.", len(ledger))
        tally.gauge("breakwater_transfers_in_flight", "Transfers running.", sum(1 for _ in self.blobs.running()))
        tally.gauge("breakwater_connections", "Client connections open.", self.data.n_connections)
        up: dict[tuple[str, ...], float] = {
            (str(host),): float(self.health.is_up(str(host))) for host in self.settings.upstreams
        }
        tally.gauge("breakwater_upstream_up", "1 while the last answer was one, else 0.", up, "upstream")
        self.fitting.gauge(tally.gauge)
        self._gauge_projects()
        degraded = float(bool(self.capacity.degraded))
        tally.gauge("breakwater_store_degraded", "1 while nothing new can be kept, else 0.", degraded)
        is_taken_up = 0.0 if self.reload_problem else 1.0
        tally.gauge("breakwater_reload_successful", "1 unless the last reload found a mistake.", is_taken_up)
        registry = CollectorRegistry()
        registry.register(tally)
        return generate_latest(registry)

    def _gauge_projects(self) -> None:
        usage = self.charges.usage()
        used: dict[tuple[str, ...], float] = {(each.project,): each.charged_bytes for each in usage}
        quotas: dict[tuple[str, ...], float] = {(u.project,): u.quota for u in usage if u.quota is not None}
        self.tally.gauge("breakwater_project_bytes", "Stored bytes that a project pays for.", used, "project")
        self.tally.gauge("breakwater_project_quota_bytes", "What a project may hold.", quotas, "project")


class UpstreamHealth:
    """What the last requests to each upstream came to."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._requests: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._last_error: dict[str, tuple[str, float]] = {}
        self._down: set[str] = set()

    def observe(self, event: Event) -> None:
        """Take note of an upstream's answer."""
        if isinstance(event, UpstreamUnreached):
            self._failures[event.upstream] += 1
            self._down.add(event.upstream)
            self._last_error[event.upstream] = (event.why, self._monotonic())
            return
        if not isinstance(event, UpstreamAsked):
            return
        host = event.upstream
        self._requests[host] += 1
        if event.status == 0 or event.status >= 500 or event.status == 429:
            self._failures[host] += 1
            self._down.add(host)
            said = f"answered {event.status}" if event.status else "gave no answer"
            self._last_error[host] = (f"{event.method} {event.kind} {said}", self._monotonic())
        else:
            self._down.discard(host)

    def forget_others(self, hosts: Collection[str]) -> None:
        """Only these are upstreams from now on."""
        self._down &= set(hosts)

    def is_up(self, host: str) -> bool:
        """Whether its last answer was one; true before the first."""
        return host not in self._down

    def failing(self) -> list[str]:
        """Those that are not up."""
        return sorted(self._down)

    def of(self, host: str) -> dict[str, Any]:
        """One upstream's entry in the status document."""
        error = self._last_error.get(host)
        return {
            "state": "ok" if self.is_up(host) else "failing",
            "last_error": f"{error[0]}, {self._monotonic() - error[1]:.0f} s ago" if error else None,
            "requests": self._requests[host],
            "failures": self._failures[host],
        }


# -- settings become values --------------------------------------------------------------------------------------------


def plan_of(settings: Settings, clients: Mapping[str, Upstream], limits: ProjectLimits) -> Plan:
    """Routing, rules and upstreams as one immutable value."""
    default = effective_default(settings)
    projects = tuple(
        ProjectRoute(
            name=str(name),
            path=str(project.path or ""),
            upstream=str(project.upstream or ""),
            match=tuple(Glob.parse(str(text)) for text in project.match),
        )
        for name, project in settings.projects.items()
    )
    policy_deny = tuple(Glob.parse(str(text)) for text in settings.policy.deny)
    rules = {
        DEFAULT_PROJECT: Rules(DEFAULT_PROJECT, policy_deny=policy_deny, closed=settings.policy.unmatched == "deny")
    }
    for name, project in settings.projects.items():
        rules[str(name)] = Rules(
            str(name),
            allow=tuple(Glob.parse(str(text)) for text in project.allow),
            deny=tuple(Glob.parse(str(text)) for text in project.deny),
            policy_deny=policy_deny,
            closed=str(name) == DEFAULT_PROJECT and settings.policy.unmatched == "deny",
            max_blob=project.max_blob,
        )
    origins = {}
    for host, upstream in settings.upstreams.items():
        sealed = settings.server.sealed or upstream.sealed
        port: Upstream = SealedUpstream(str(host)) if sealed else clients[str(host)]
        origins[str(host)] = Origin(
            str(host), port, TagPolicy(upstream.tag_ttl, upstream.stale_if_error, sealed), upstream.negative_ttl
        )
    of_project = {}
    for name, project in settings.projects.items():
        for origin in origins.values():
            asked = clients.get(key_of(str(name), origin.host), origin.upstream)
            if project.bandwidth is not None:
                asked = LimitedUpstream(asked, limits.share(str(name)))
            if asked is not origin.upstream:
                of_project[str(name), origin.host] = replace(origin, upstream=asked)
    hosts = frozenset(str(host) for host in settings.upstreams)
    robots = robots_of(settings)
    named = {str(name): tuple(project.access) for name, project in settings.projects.items()}
    named.setdefault(DEFAULT_PROJECT, (EVERYBODY,))
    immutable = {str(name): Immutable.of(tuple(project.immutable_tags)) for name, project in settings.projects.items()}
    access = {name: Access.of(name, readers, robots) for name, readers in named.items()}
    return Plan(
        Routes(hosts, str(default or ""), projects), rules, Origins(origins, of_project), access, robots, immutable
    )


def robots_of(settings: Settings) -> dict[str, Robot]:
    """The accounts. Raises InvalidSettings for a hash that cannot be used."""
    robots = {}
    for name, robot in settings.robots.items():
        try:
            hashes = tuple(SecretHash.parse(one.get_secret_value()) for one in robot.secret_hash)
        except ValueError as error:
            raise InvalidSettings([f"robots.{name}.secret_hash: {error}"]) from error
        robots[name] = Robot(name, hashes, frozenset(robot.projects), robot.expires)
    return robots


def limits_of(settings: Settings) -> dict[str, Limit]:
    """What each project may take of the fetching."""
    return {str(name): Limit(project.max_transfers, project.bandwidth) for name, project in settings.projects.items()}


def allowances_of(settings: Settings) -> dict[str, Allowance]:
    """What each project may hold."""
    return {str(name): Allowance(project.quota, project.on_full) for name, project in settings.projects.items()}


def server_tls(settings: Settings) -> ssl.SSLContext | None:
    """The certificate to serve with, if any. Reads files. Raises InvalidSettings when it cannot be used."""
    tls = settings.server.tls
    if tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(tls.cert, tls.key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidSettings([f"[server] tls: cannot use {tls.cert} with {tls.key}: {error}"]) from error
    return context


async def _sites(runner: web.AppRunner, address: Address) -> tuple[str, ...]:
    """Listen on an address of the settings; returns the real ones."""
    if isinstance(address, UnixAddress):
        await web.SockSite(runner, _unix_socket(address)).start()
        return (str(address),)
    return await _tcp_sites(runner, address)


def _unix_socket(address: UnixAddress) -> socket.socket:
    """Bound so that only its owner and group may connect: over it no token is asked for. A socket that nobody listens
    on any more is replaced."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path = Path(address.path)
        if path.is_socket() and listening.connect_ex(address.path) != 0:
            path.unlink(missing_ok=True)
        listening.close()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        masked = os.umask(0o117)
        try:
            listening.bind(address.path)
        finally:
            os.umask(masked)
    except OSError as error:
        listening.close()
        raise OSError(error.errno, f"cannot listen on admin address {address}: {error.strerror}") from error
    return listening


async def _tcp_sites(runner: web.AppRunner, address: TcpAddress) -> tuple[str, ...]:
    """Listen on each address the name stands for; all but the first may be missing (no IPv6 here)."""
    names = []
    for i, host in enumerate(address.hosts):
        listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if listening.family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind((host, address.port))
        except OSError as error:
            listening.close()
            if i == 0:
                raise OSError(error.errno, f"cannot listen on admin address {address}: {error.strerror}") from error
            continue
        port = listening.getsockname()[1]
        await web.SockSite(runner, listening).start()
        names.append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    return tuple(names)


# -- what is to be here at all times -----------------------------------------------------------------------------------


def sealed_hosts(settings: Settings) -> frozenset[str]:
    """The upstreams that are sealed by themselves."""
    return frozenset(str(host) for host, upstream in settings.upstreams.items() if upstream.sealed)


def standing_order(settings: Settings) -> Order:
    """What the lists of `[prefetch]` say now. Reads files. Raises BadRequest for one that cannot be read, or understood
    as a whole: half a list would look like all of it."""
    lists = []
    for path in settings.prefetch.list:
        try:
            lists.append(image_lists.read(Path(path).read_text(encoding="utf-8-sig"), path))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise BadRequest(f"cannot read {path}: {reason}") from error
    asked = merged(lists)
    if asked.problems:
        raise BadRequest("; ".join(asked.problems[:5]))
    return Order(asked.references, Scope(Platforms.parse(settings.prefetch.platforms)), pin=True)


# -- commands without a server -----------------------------------------------------------------------------------------


def work_alone(settings: Settings, work: Callable[[Freight], Awaitable[T]]) -> T:
    """Do a command's work in this process, with the store's lock held and nothing listening.

    Raises Unavailable when a server has the store, and whatever `work` raises.
    """
    return _alone(settings, lambda appliance: work(appliance.freight))


def verify_alone(settings: Settings, work: Callable[[Scrub], Awaitable[T]]) -> T:
    """Like `work_alone`, for the hashing of what is stored. Raises alike."""

    async def verify(appliance: Appliance) -> T:
        await appliance.capacity.counted()
        return await work(appliance.scrub)

    return _alone(settings, verify)


def look_alone(settings: Settings, work: Callable[[operations.Seen], Awaitable[T]]) -> T:
    """Like `work_alone`, for what operators look at and take out. Raises alike."""

    async def look(appliance: Appliance) -> T:
        await appliance.capacity.counted()
        return await work(appliance.seen())

    return _alone(settings, look)


def _alone(settings: Settings, work: Callable[[Appliance], Awaitable[T]]) -> T:
    writer = LineWriter(sys.stderr)
    log = EventLog(writer, SystemClock().wall, as_json=False, level="error", requests="off")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_work_alone(settings, work, log))
    finally:
        writer.close()


async def _work_alone(settings: Settings, work: Callable[[Appliance], Awaitable[T]], log: EventLog) -> T:
    appliance = await Appliance.start(settings, log, listens=False)
    try:
        return await work(appliance)
    finally:
        await appliance.aclose()


def refetching(pull: Pull) -> Refetch:
    """How the scrub has something fetched again: through the read path, as the holding's readers would."""

    async def refetch(holding: Holding, digest: Digest, is_manifest: bool) -> None:
        project = None if holding.project == DEFAULT_PROJECT else holding.project
        path = RepositoryPath(project, holding.repository)
        if is_manifest:
            await pull.manifest(ManifestGet(path, digest, holding.host))
            return
        _, opened = await pull.blob(BlobGet(path, digest, holding.host))
        source = opened.source
        if isinstance(source, LocalFile):
            source.blob.close()
            return
        try:
            await source.beyond(opened.size - 1)
        finally:
            source.leave()

    return refetch
