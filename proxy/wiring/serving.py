"""The read path, from a request's bytes to the answer's, and the listener that clients reach it by."""

from __future__ import annotations

import logging
import random
import secrets
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from proxy.engine.admission import Admissions
from proxy.engine.blobs import Blobs, Limits
from proxy.engine.limits import ProjectLimits
from proxy.engine.listings import Listings
from proxy.engine.origins import PassThrough
from proxy.engine.pull import Pull
from proxy.engine.pump import Work
from proxy.engine.robots import Robots
from proxy.events import Answered, Repeat
from proxy.planning import limits_of, plan_of
from proxy.ports import Upstream
from proxy.service.descriptors import connections_within, raise_limit
from proxy.settings import Settings
from proxy.web.callers import Callers
from proxy.web.ready import ReadyTable
from proxy.web.registry import Registry
from proxy.web.serve import Pace as ReaderPace
from proxy.web.serve import Sender
from proxy.web.server import DataServer
from proxy.web.server import Limits as ServerLimits
from proxy.wiring.kept import Kept, Surroundings


@dataclass(frozen=True, slots=True)
class Serving:
    """What answers clients, over what is kept and the upstreams' clients."""

    project_limits: ProjectLimits
    blobs: Blobs
    pull: Pull
    sender: Sender
    data: DataServer

    @classmethod
    def of(
        cls,
        kept: Kept,
        settings: Settings,
        around: Surroundings,
        upstreams: Mapping[str, Upstream],
        logins: Mapping[str, PassThrough],
        tls: ssl.SSLContext | None,
        repeats: Callable[[Answered], Repeat],
    ) -> Self:
        """The parts; `data` does not listen yet. `logins`: the upstreams that judge clients' own; `repeats` is told of
        answers from the ready table. Raises InvalidSettings."""
        clock, owner, observe = around.clock, around.owner, around.observe
        transfers = settings.transfers
        project_limits = ProjectLimits(clock, owner, limits_of(settings))
        blobs = Blobs(
            Work(kept.store.blobs, kept.capacity, clock, random.random, observe, kept.charges, kept.remains),
            kept.links,
            kept.verification,
            owner=owner,
            on_last_reader_gone=transfers.on_last_reader_gone,
            limits=Limits(transfers.max_concurrent, transfers.max_per_upstream, transfers.queue_deadline),
            projects=project_limits,
        )
        pull = Pull(
            plan_of(settings, upstreams, logins),
            tags=kept.tags,
            manifests=kept.manifests,
            blobs=blobs,
            listings=Listings(kept.links, kept.manifests, kept.tags, clock=clock, owner=owner, observe=observe),
            links=kept.links,
            charges=kept.charges,
            admissions=Admissions(clock=clock, owner=owner),
        )
        sender = Sender(clock, pace=ReaderPace(int(transfers.reader_min_rate), transfers.reader_min_rate_window))
        callers = Callers(
            Robots(key=secrets.token_bytes(32), clock=clock, owner=owner),
            lambda: pull.plan.robots,
            clock=clock,
            is_tls=settings.server.tls is not None,
            public_url=settings.server.public_url or "",
            takes_logins=lambda: pull.plan.takes_logins,
        )
        registry = Registry(
            pull, sender, callers, clock=clock, observe=observe, header_deadline_s=transfers.header_deadline
        )
        data = DataServer(
            registry,
            log=logging.getLogger("http"),
            limits=ServerLimits(n_connections=connections_within(raise_limit(), settings.server.max_connections)),
            tls=tls,
            ready=ReadyTable(clock=clock, repeats=repeats, request_id=registry.new_request_id),
        )
        return cls(project_limits, blobs, pull, sender, data)
