"""The composition root: settings become running parts. The only module that knows everyone."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from proxy import __version__, admin_token
from proxy.archives.tar import framed, members_of
from proxy.clock import SystemClock
from proxy.engine import changes
from proxy.engine.blobs import Blobs, Limits
from proxy.engine.bundle import Export, Import, Parts
from proxy.engine.capacity import Capacity
from proxy.engine.catalogue import Catalogue
from proxy.engine.charges import Charges
from proxy.engine.explain import Explain
from proxy.engine.freight import Freight
from proxy.engine.limits import ProjectLimits
from proxy.engine.links import Links
from proxy.engine.listings import Listings
from proxy.engine.manifests import Manifests
from proxy.engine.orders import Orders
from proxy.engine.pins import Pins
from proxy.engine.prefetch import Prefetch
from proxy.engine.pull import Pull
from proxy.engine.pump import Work
from proxy.engine.purge import Purge
from proxy.engine.refetch import refetching
from proxy.engine.remains import Remains
from proxy.engine.robots import Robots
from proxy.engine.scrub import Scrub
from proxy.engine.seal import Seal
from proxy.engine.standing import Standing
from proxy.engine.tags import Tags
from proxy.engine.tasks import TaskOwner
from proxy.engine.verification import Verification
from proxy.errors import StoreError
from proxy.events import Event, Noticed
from proxy.fitting import Fitting, asked_of, ignored_proxies
from proxy.oci.digest import Digest
from proxy.planning import allowances_of, limits_of, plan_of, sealed_hosts, server_tls, standing_order
from proxy.reports import Reports
from proxy.rules.ledger import Ledger
from proxy.rules.routes import DEFAULT_PROJECT
from proxy.service.descriptors import connections_within, raise_limit
from proxy.service.sockets import NOTHING_HANDED, Handed, not_covered
from proxy.settings import Settings, TcpAddress
from proxy.settings.changes import taken_up
from proxy.store.disk import DiskStore
from proxy.store.lock import PATIENCE_S
from proxy.telemetry.activity import Activity
from proxy.telemetry.audit import Audit, TurningFile
from proxy.telemetry.health import UpstreamHealth
from proxy.telemetry.log import EventLog, LineWriter
from proxy.telemetry.tally import Tally
from proxy.web import freight as freight_routes
from proxy.web import operations, scrubbing, sites
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
    reports: Reports
    pins: Pins
    freight: Freight
    activity: Activity
    catalogue: Catalogue
    purge: Purge
    scrub: Scrub
    seal: Seal
    standing: Standing
    probes: web.AppRunner | None = None
    probe_addresses: tuple[str, ...] = ()

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

        verification = Verification(owner, clock, condemn=condemn, is_irreplaceable=pins.is_irreplaceable)
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
            reports=Reports(
                settings=lambda: self.settings,
                store_path=str(store.path),
                clock=clock,
                capacity=capacity,
                charges=charges,
                tags=tags,
                blobs=blobs,
                pins=pins,
                seal=seal,
                standing=standing,
                fitting=fitting,
                health=health,
                tally=tally,
                data=data,
                started_at=clock.monotonic(),
            ),
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
        probes = Probes(metrics=self.reports.metrics, readiness=self.reports.readiness)
        self.admin = web.AppRunner(self._admin(probes, token).app(), access_log=None, shutdown_timeout=1.0)
        await self.admin.setup()
        if server.probe_listen is not None:
            self.probes = web.AppRunner(probes.app(), access_log=None, shutdown_timeout=1.0)
            await self.probes.setup()
            self.probe_addresses = await sites.listen(self.probes, server.probe_listen)
        address = server.admin_listen
        if handed.admin:
            for listening in handed.admin:
                await web.SockSite(self.admin, listening).start()
            self.admin_addresses = tuple(name_of(listening) for listening in handed.admin)
        else:
            self.admin_addresses = await sites.listen(self.admin, address)
        listen = [str(listening) for listening in self.settings.server.listen]
        await self.data.start(not_covered(listen, handed.data), handed.data)

    def seen(self) -> operations.Seen:
        """What operators can look at."""
        return operations.Seen(
            status=self.reports.status,
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
                *project_routes.routes(self.explain.of, self.reports.usage, self.charges.recount),
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
        self.reports.is_stopping = True
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
