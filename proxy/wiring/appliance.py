"""All of it: up, reloaded and down, with what operators ask and do."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import web

from proxy import __version__, admin_token
from proxy.archives.tar import framed, members_of
from proxy.clock import SystemClock
from proxy.engine import changes
from proxy.engine.bundle import Parts
from proxy.engine.catalogue import Catalogue
from proxy.engine.explain import Explain
from proxy.engine.export import Export
from proxy.engine.freight import Freight
from proxy.engine.intake import Import
from proxy.engine.orders import Orders
from proxy.engine.prefetch import Prefetch
from proxy.engine.purge import Purge
from proxy.engine.refetch import refetching
from proxy.engine.scrub import Scrub
from proxy.engine.standing import Standing
from proxy.engine.tasks import TaskOwner
from proxy.errors import Overloaded
from proxy.fitting import Fitting, asked_of, ignored_proxies, logins_of
from proxy.planning import allowances_of, limits_of, plan_of, sealed_hosts, server_tls, standing_order
from proxy.reports import Reports
from proxy.rules.routes import DEFAULT_PROJECT
from proxy.service.sockets import NOTHING_HANDED, Handed, not_covered
from proxy.settings import Settings, TcpAddress
from proxy.settings.changes import taken_up
from proxy.store.disk import DiskStore
from proxy.store.layout import AUDIT
from proxy.store.lock import PATIENCE_S
from proxy.telemetry.log import EventLog
from proxy.web import freight as freight_operations
from proxy.web import operations, pinning, reloading, scrubbing
from proxy.web import projects as project_operations
from proxy.web.admin import Admin, Probes
from proxy.web.dashboard import Dashboard
from proxy.web.guard import Guard
from proxy.web.listening import listen, name_of
from proxy.wiring.kept import Kept, Surroundings
from proxy.wiring.serving import Serving
from proxy.wiring.watching import Watching

#: How long a command waits for somebody else's lock on the store, in seconds: a server has it for good.
COMMAND_PATIENCE_S = 2.0


@dataclass(slots=True)
class Appliance:
    """The running parts."""

    settings: Settings
    around: Surroundings
    watching: Watching
    fitting: Fitting
    tls: ssl.SSLContext | None
    kept: Kept
    serving: Serving
    explain: Explain
    freight: Freight
    standing: Standing
    catalogue: Catalogue
    purge: Purge
    scrub: Scrub
    started_at: float
    reports: Reports = field(init=False)
    admin: web.AppRunner | None = None
    admin_addresses: tuple[str, ...] = ()
    probes: web.AppRunner | None = None
    probe_addresses: tuple[str, ...] = ()
    #: Reads the settings again and has them taken up; whoever knows where they come from says how (lifecycle.py).
    reread: Callable[[], Awaitable[tuple[str, ...]]] | None = None

    def __post_init__(self) -> None:
        self.reports = Reports(
            settings=lambda: self.settings,
            store_path=str(self.kept.store.path),
            clock=self.around.clock,
            capacity=self.kept.capacity,
            charges=self.kept.charges,
            tags=self.kept.tags,
            blobs=self.serving.blobs,
            pins=self.kept.pins,
            seal=self.kept.seal,
            standing=self.standing,
            fitting=self.fitting,
            health=self.watching.health,
            tally=self.watching.tally,
            data=self.serving.data,
            started_at=self.started_at,
        )

    @classmethod
    async def start(
        cls, settings: Settings, log: EventLog, handed: Handed = NOTHING_HANDED, *, listens: bool = True
    ) -> Appliance:
        """Open the store, then listen, on sockets that were `handed` over first; unless a command only needs the parts.

        Raises Unavailable, InvalidSettings or OSError when that is not possible.
        """
        clock = SystemClock()
        watching = Watching(log, clock)
        owner = TaskOwner(lambda sentence: log.say("error", sentence))
        around = Surroundings(clock, owner, watching.observe)
        # Before the store: a mistake is told at once, and not after waiting for whoever has the store's lock.
        fitting = Fitting(clock, owner, watching.observe)
        fitted = await asyncio.to_thread(fitting.fit, settings)
        tls = await asyncio.to_thread(server_tls, settings)
        store = await DiskStore.open(
            Path(settings.store.path),
            clock=clock,
            report=lambda sentence: log.say("warning", sentence),
            patience_s=PATIENCE_S if listens else COMMAND_PATIENCE_S,
        )
        if (ignored := ignored_proxies(os.environ)) and listens:
            log.say("warning", ignored)
        fitting.use(fitted)
        try:
            kept = await Kept.of(store, settings, around)
            await watching.open_audit(store.path / AUDIT / "audit.jsonl", store.upkeep.others)
            serving = Serving.of(kept, settings, around, fitting.upstreams, fitting.logins, tls, watching.repeats)
        except BaseException:
            await owner.aclose()
            await fitting.aclose()
            await store.aclose()
            await watching.aclose()
            raise
        self = cls._of(settings, around, watching, fitting, tls, kept, serving)
        try:
            if listens:
                await self._listen(handed)
        except BaseException:
            await self.aclose()
            raise
        self._say_what_never_binds()
        kept.start()
        if listens:
            self.scrub.start(int(settings.store.scrub_rate))
            if settings.prefetch.list:
                owner.spawn_background(self.standing.run_forever(), "the standing order")
        return self

    @classmethod
    def _of(
        cls,
        settings: Settings,
        around: Surroundings,
        watching: Watching,
        fitting: Fitting,
        tls: ssl.SSLContext | None,
        kept: Kept,
        serving: Serving,
    ) -> Appliance:
        """With what operators do beside the read path: carry images, look, take out, check."""
        clock, owner, observe = around.clock, around.owner, around.observe
        store, links, capacity = kept.store, kept.links, kept.capacity
        freight = _freight(kept, serving, around)
        return cls(
            settings=settings,
            around=around,
            watching=watching,
            fitting=fitting,
            tls=tls,
            kept=kept,
            serving=serving,
            explain=Explain(lambda: serving.pull.plan, links, store.records, kept.charges),
            freight=freight,
            standing=Standing(
                freight,
                lambda: asyncio.to_thread(standing_order, settings),
                settings.prefetch.schedule,
                clock=clock,
                observe=observe,
            ),
            catalogue=Catalogue(store.records, links, capacity, clock=clock, owner=owner),
            purge=Purge(store.records, links, kept.tags, kept.manifests, capacity, observe),
            scrub=Scrub(
                store.blobs,
                store.records,
                store.facts,
                kept.verification,
                capacity.ledger.size_of,
                refetching(serving.pull),
                clock=clock,
                owner=owner,
                observe=observe,
            ),
            started_at=clock.monotonic(),
        )

    def _say_what_never_binds(self) -> None:
        capacity = self.kept.capacity.ledger.capacity
        for name, project in self.settings.projects.items():
            if project.quota is not None and project.quota > capacity:
                told = f"the quota of project {name!r} is larger than the store may become, so it will never bind"
                self.watching.log.say("warning", told)

    async def _listen(self, handed: Handed) -> None:
        server = self.settings.server
        token = await asyncio.to_thread(admin_token.obtain, self.settings)
        probes = Probes(metrics=self.reports.metrics, readiness=self.reports.readiness)
        self.admin = web.AppRunner(self._admin(probes, token).app(), access_log=None, shutdown_timeout=1.0)
        await self.admin.setup()
        if server.probe_listen is not None:
            self.probes = web.AppRunner(probes.app(), access_log=None, shutdown_timeout=1.0)
            await self.probes.setup()
            self.probe_addresses = await listen(self.probes, str(server.probe_listen))
        if handed.admin:
            for listening in handed.admin:
                await web.SockSite(self.admin, listening).start()
            self.admin_addresses = tuple(name_of(listening) for listening in handed.admin)
        else:
            self.admin_addresses = await listen(self.admin, str(server.admin_listen))
        addresses = not_covered([str(address) for address in server.listen], handed.data)
        await self.serving.data.start(addresses, handed.data)

    def seen(self) -> operations.Seen:
        """What operators can look at."""
        return operations.Seen(
            status=self.reports.status,
            usage=self.kept.charges.usage,
            projects=lambda: {DEFAULT_PROJECT, *map(str, self.settings.projects)},
            activity=self.watching.activity,
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
        orders = Orders(self.freight, self.around.clock, self.around.owner)
        return Admin(
            probes=probes,
            guard=Guard(token, names, place),
            operations=[
                *operations.operations(seen),
                *pinning.operations(self.kept.pins, self.around.observe),
                reloading.operation(self._reread),
                *freight_operations.operations(self.freight),
                *scrubbing.operations(self.scrub),
                *project_operations.operations(self.explain.of, self.reports.usage, self.kept.charges.recount),
            ],
            pages=Dashboard(seen, orders, wall=self.around.clock.wall, token_place=place),
            version=__version__,
        )

    async def _reread(self) -> tuple[str, ...]:
        if self.reread is None:
            raise Overloaded("it is still starting; ask again")
        return await self.reread()

    async def reload(self, wanted: Settings) -> tuple[str, ...]:
        """Take up new settings, and the files they name, all at once and for requests that come from now on.

        Returns the keys that wait for the next start. Raises InvalidSettings when something of it cannot be used, and
        has changed nothing then.
        """
        settings, held = taken_up(self.settings, wanted)
        fitted = await asyncio.to_thread(self.fitting.fit, settings)
        tls = await asyncio.to_thread(server_tls, settings)
        plan = plan_of(settings, asked_of(fitted), logins_of(fitted))
        # Before the seal holds: between the two nothing may be evicted that could not be had again.
        await self.kept.pins.keep_all_of(self.kept.store.records, sealed_hosts(settings))
        # Nothing below fails or waits, so that no request sees half of it.
        self.kept.pins.keeps_all = settings.server.sealed
        self.settings = settings
        old, self.serving.pull.plan = self.serving.pull.plan, plan
        self.kept.charges.allow(allowances_of(settings))
        self.serving.project_limits.allow(limits_of(settings))
        for change in changes.between(old, plan):
            self.around.observe(change)
        self.fitting.use(fitted)
        self.watching.health.forget_others(self.fitting.upstreams)
        if self.tls is not None and tls is not None:
            self.tls.sni_callback = _presenting(tls)
        return held

    async def drain(self, grace_s: float, hurry: asyncio.Future[None]) -> None:
        """Fail readiness, stop accepting, let running answers end within `grace_s` seconds; `hurry` cuts that short."""
        self.reports.is_stopping = True
        draining = self.around.owner.spawn(self.serving.data.aclose(grace_s), "drain")
        await asyncio.wait([draining, hurry], return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            await self.serving.data.aclose(0)
        await draining

    async def aclose(self) -> None:
        """Everything down, in the opposite order of its making."""
        await self.serving.data.aclose(0)
        for runner in (self.admin, self.probes):
            if runner is not None:
                await runner.cleanup()
        await self.around.owner.aclose()
        await self.fitting.aclose()
        self.serving.sender.close()
        await self.kept.aclose()
        await self.watching.aclose()

    def greeting(self) -> str:
        """The first line: where, and how to point a client at it."""
        listening = " and ".join(self.serving.data.addresses)
        first = next(
            (a for a in self.serving.data.addresses if not a.startswith("unix:")), self.serving.data.addresses[0]
        )
        scheme = "https" if self.settings.server.tls else "http"
        example = f"{first}/docker.io/library/alpine:3"
        return (
            f"Breakwater {__version__} serves {len(self.settings.upstreams)} upstreams on {listening}, store "
            f"{self.kept.store.path}, admin {' '.join(self.admin_addresses)}. Try: docker pull {example}; client set-up: "
            f"breakwater hosts-toml ({scheme}://{first})"
        )


def _presenting(fresh: ssl.SSLContext) -> Callable[[ssl.SSLObject, str | None, ssl.SSLContext], None]:
    """Has the context that the listeners were made with hand each handshake, with or without a server name, to `fresh`.

    Not `load_cert_chain` on the context in use: that reads the files once more, and one that then does not match the
    other leaves half of a pair, which refuses every handshake.
    """

    def choose(connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        connection.context = fresh

    return choose


def _freight(kept: Kept, serving: Serving, around: Surroundings) -> Freight:
    parts = Parts(
        pull=serving.pull,
        blobs=kept.store.blobs,
        records=kept.store.records,
        links=kept.links,
        manifests=kept.manifests,
        verification=kept.verification,
        tags=kept.tags,
        capacity=kept.capacity,
        charges=kept.charges,
        pins=kept.pins,
        clock=around.clock,
        owner=around.owner,
    )
    return Freight(
        Prefetch(serving.pull, kept.capacity, kept.charges, kept.pins, clock=around.clock),
        Export(parts),
        Import(parts),
        kept.seal,
        framed=framed,
        members_of=members_of,
    )
