"""What the running parts say of themselves: readiness, status, usage and metrics, as the documents that operators see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from proxy import __version__
from proxy.engine.blobs import Blobs
from proxy.engine.capacity import Capacity
from proxy.engine.charges import Charges
from proxy.engine.pins import Pins
from proxy.engine.seal import Seal
from proxy.engine.standing import Standing
from proxy.engine.tags import Tags
from proxy.fitting import Fitting, conditions_shown
from proxy.ports import Clock
from proxy.settings import Settings
from proxy.telemetry.health import UpstreamHealth
from proxy.telemetry.tally import Tally
from proxy.web.server import DataServer


@dataclass(slots=True)
class Reports:
    """Made of parts that run; asked at any time, it answers at once and changes nothing."""

    #: Those in force: a reload changes them.
    settings: Callable[[], Settings]
    store_path: str
    clock: Clock
    capacity: Capacity
    charges: Charges
    tags: Tags
    blobs: Blobs
    pins: Pins
    seal: Seal
    standing: Standing
    fitting: Fitting
    health: UpstreamHealth
    tally: Tally
    data: DataServer
    #: Of the clock, in seconds.
    started_at: float
    is_stopping: bool = False
    #: Why the last reload changed nothing; "" when it was taken up, or there was none.
    reload_problem: str = ""

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
            "sealed": self.settings().server.sealed,
            "seal": self.seal.as_json(),
            "prefetch": self.standing.last,
            "pins": {"references": len(self.pins), "bytes": self.pins.n_bytes},
            "ready": word,
            "reason": reason,
            "requests": {o: outcomes.get(o, 0) for o in ("hit", "coalesced", "miss", "stale", "denied", "failed")},
            "response_bytes": self.tally.response_bytes,
            "upstream_bytes": sum(self.tally.upstream_bytes.values()),
            "store": {
                "path": self.store_path,
                "used_bytes": ledger.committed,
                "reserved_bytes": ledger.reserved,
                "upkeep_bytes": ledger.upkeep,
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
                {"project": project, "reference": name, "kept": str(kept), "upstream": str(theirs) if theirs else None}
                for (project, name), (kept, theirs) in self.tags.refused_moves.items()
            ],
            "upstreams": {host: self._upstream(host) for host in sorted(map(str, self.settings().upstreams))},
            "connections": self.data.n_connections,
            "refused_connections": self.data.n_refused,
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
        tally.gauge(
            "breakwater_store_upkeep_bytes", "Bytes set aside for all that is on disk and is no blob.", ledger.upkeep
        )
        is_counted = float(self.capacity.is_counted)
        tally.gauge("breakwater_store_counted", "1 once the store was counted after the start.", is_counted)
        tally.gauge("breakwater_store_capacity_bytes", "What the store may hold.", ledger.capacity)
        tally.gauge("breakwater_store_blobs", "Blobs in the store.", len(ledger))
        tally.gauge("breakwater_transfers_in_flight", "Transfers running.", sum(1 for _ in self.blobs.running()))
        tally.gauge("breakwater_connections", "Client connections open.", self.data.n_connections)
        beyond = "Client connections beyond server.max_connections: answered 503, or closed."
        tally.counter("breakwater_connections_refused", beyond, self.data.n_refused)
        up: dict[tuple[str, ...], float] = {
            (str(host),): float(self.health.is_up(str(host))) for host in self.settings().upstreams
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
