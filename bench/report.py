"""A run as a table, as JSON and as a picture: medians, spread, ratios, and the targets with what became of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.work import Ledger

OURS = "breakwater"


class _NotMeasured(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Target:
    """`value(figures)` is to be at most, or at least, `bound`."""

    work: str
    sentence: str
    bound: float
    is_ceiling: bool
    value: Callable[[Medians], float]


class Medians:
    """The median of every figure."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __call__(self, work: str, case: str, unit: str, server: str = OURS) -> float:
        for (a_work, a_case, a_server, a_unit), values in self._ledger.figures.items():
            if (a_work, a_server, a_unit) == (work, server, unit) and a_case.strip().startswith(case):
                return statistics.median(values)
        raise _NotMeasured(f"{work} {case} {server} {unit}")

    def ratio(self, work: str, case: str, unit: str, other: str) -> float:
        """Ours over theirs."""
        return self(work, case, unit) / self(work, case, unit, other)


def _p1(clients: int) -> list[Target]:
    case = f"{clients} clients"
    return [
        Target("P1", f"{case}: GB/s ÷ nginx static, 1 worker", 0.9, False,
               lambda m: m.ratio("P1", case, "GB/s", "nginx static")),
        Target("P1", f"{case}: cpu-s/GB ÷ nginx static", 1.25, True,
               lambda m: m.ratio("P1", case, "cpu-s/GB", "nginx static")),
        Target("P1", f"{case}: GB/s ÷ docker-registry", 1.5, False,
               lambda m: m.ratio("P1", case, "GB/s", "docker-registry")),
    ]  # fmt: skip


#: What performance is promised; see the design behind each in README.md.
TARGETS = [
    *_p1(1), *_p1(16), *_p1(64),
    Target("P1", "64 clients: peak MiB", 100, True, lambda m: m("P1", "64 clients", "peak MiB")),
    Target("P2", "by tag: requests/s ÷ nginx static", 0.25, False,
           lambda m: m.ratio("P2", "by tag", "requests/s", "nginx static")),
    Target("P2", "by digest: requests/s ÷ nginx static", 0.25, False,
           lambda m: m.ratio("P2", "by digest", "requests/s", "nginx static")),
    Target("P2", "by tag: requests/s ÷ distribution v3", 40, False,
           lambda m: m.ratio("P2", "by tag", "requests/s", "distribution v3")),
    Target("P2", "by digest: requests/s ÷ distribution v3", 2, False,
           lambda m: m.ratio("P2", "by digest", "requests/s", "distribution v3")),
    Target("P2", "by tag: requests/s ÷ the same with 500 rules and robots", 1.25, True,
           lambda m: m.ratio("P2", "by tag", "requests/s", "breakwater, 500 rules")),
    Target("P2", "by tag: requests/s ÷ the same, with a name and secret instead of a token", 1.25, True,
           lambda m: m.ratio("P2", "by tag", "requests/s", "breakwater, 500 rules, Basic")),
    Target("P3", "seconds ÷ docker-registry", 1.0, True,
           lambda m: m.ratio("P3", "400 MiB", "seconds", "docker-registry")),
    Target("P3", "cpu-s/GB ÷ docker-registry", 0.6, True,
           lambda m: m.ratio("P3", "400 MiB", "cpu-s/GB", "docker-registry")),
    Target("P4", "64 clients: upstream GETs", 1, True, lambda m: m("P4", "64 clients", "upstream GETs")),
    Target("P4", "64 clients: seconds ÷ nginx proxy_cache", 1.4, True,
           lambda m: m.ratio("P4", "64 clients", "seconds", "nginx proxy_cache")),
    Target("P4", "64 clients: last first byte ÷ seconds", 0.9, True,
           lambda m: m("P4", "64 clients", "last first byte s") / m("P4", "64 clients", "seconds")),
    Target("P4", "1000 clients: upstream GETs", 1, True, lambda m: m("P4", "1000 clients", "upstream GETs")),
    Target("P4", "1000 clients: peak MiB", 120, True, lambda m: m("P4", "1000 clients", "peak MiB")),
    Target("P5", "1,000,000 blobs: first hit s", 1.0, True, lambda m: m("P5", "1,000,000 blobs", "first hit s")),
    Target("P5", "1,000,000 blobs: peak MiB", 300, True, lambda m: m("P5", "1,000,000 blobs", "peak MiB")),
    Target("P5", "evicting 10,000: slowest hit, ms", 50, True,
           lambda m: m("P5", "1,000,000 blobs", "hit max ms, while evicting")),
    Target("P6", "10,000 idle: RSS MiB", 150, True, lambda m: m("P6", "10,000 idle", "RSS MiB")),
    Target("P6", "10,000 idle: p99 ms", 5, True, lambda m: m("P6", "10,000 idle", "p99 ms")),
    Target("P7", "beside 64 streams: p99 ms", 50, True, lambda m: m("P7", "beside 64", "p99 ms")),
    Target("DISK", "a manifest beside 8 cold readers: p99 ms", 50, True, lambda m: m("DISK", "manifest", "p99 ms")),
    Target("DISK", "a small blob beside 8 cold readers: p99 ms", 50, True, lambda m: m("DISK", "small blob", "p99 ms")),
    Target("START", "after kill -9: first hits s", 2.0, True, lambda m: m("START", "after kill -9", "first hits s")),
    Target("S1", "start to first answer: s", 1.0, True, lambda m: m("S1", "first answer", "seconds")),
    Target("S2", "breakwater --help: s", 0.5, True, lambda m: m("S2", "breakwater --help", "seconds")),
]  # fmt: skip


def as_text(ledger: Ledger, machine: str) -> str:
    """The tables."""
    lines = [machine, ""]
    lines += [f"{name}: {settings}" for name, settings in ledger.settings.items()]
    lines += ["", f"{'':5}{'case':24}{'server':20}{'unit':20}{'median':>10}{'min':>10}{'max':>10}  ours ÷ theirs"]
    medians = Medians(ledger)
    last = ""
    for (work, case, server, unit), values in sorted(ledger.figures.items(), key=_order):
        if work != last:
            lines.append("")
            last = work
        ratio = ""
        if server != OURS:
            try:
                ratio = f"{medians(work, case.strip(), unit) / statistics.median(values):10.2f}"
            except (_NotMeasured, ZeroDivisionError):
                pass
        figures = "".join(f"{value:>10.4g}" for value in (statistics.median(values), min(values), max(values)))
        lines.append(f"{work:5}{case:24}{server:20}{unit:20}{figures}{ratio}")
    lines += ["", f"{'':5}{'target':56}{'bound':>10}{'reached':>10}"]
    for target, value in judged(ledger):
        bound = f"{'≤' if target.is_ceiling else '≥'} {target.bound:g}"
        is_met = value is not None and (value <= target.bound if target.is_ceiling else value >= target.bound)
        shown = "—" if value is None else f"{value:.3g}"
        verdict = "not measured" if value is None else "reached" if is_met else "MISSED"
        lines.append(f"{target.work:5}{target.sentence:56}{bound:>10}{shown:>10}  {verdict}")
    lines += [""] + [f"left out: {sentence}" for sentence in ledger.missing]
    lines += [f"beware:   {sentence}" for sentence in dict.fromkeys(ledger.warnings)]
    return "\n".join(lines) + "\n"


def _order(entry: tuple[tuple[str, str, str, str], list[float]]) -> tuple[str, str, str]:
    work, case, _, unit = entry[0]
    return work, case, unit


def judged(ledger: Ledger) -> list[tuple[Target, float | None]]:
    """Each target with its value, None where a part of it was not measured."""
    medians = Medians(ledger)
    found: list[tuple[Target, float | None]] = []
    for target in TARGETS:
        try:
            found.append((target, target.value(medians)))
        except (_NotMeasured, ZeroDivisionError):
            found.append((target, None))
    return found


def as_json(ledger: Ledger, machine: str) -> str:
    """Everything, for whoever compares runs."""
    return json.dumps(
        {
            "machine": machine,
            "settings": ledger.settings,
            "figures": [
                {"work": work, "case": case.strip(), "server": server, "unit": unit, "values": values}
                for (work, case, server, unit), values in ledger.figures.items()
            ],
            "targets": [
                {"work": t.work, "target": t.sentence, "bound": t.bound, "is_ceiling": t.is_ceiling, "value": value}
                for t, value in judged(ledger)
            ],
            "left_out": ledger.missing,
            "beware": ledger.warnings,
        },
        indent=1,
    )


def as_chart(ledger: Ledger, path: Path) -> None:
    """One small bar chart for each figure that has more than one server. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    shown = [
        ("P1", "GB/s"), ("P1", "cpu-s/GB"), ("P2", "requests/s"), ("P3", "seconds"), ("P3", "cpu-s/GB"),
        ("P4", "seconds"), ("P4", "upstream GETs"), ("P7", "p99 ms"),
    ]  # fmt: skip
    servers = list(ledger.settings)
    colours = dict(zip(servers, matplotlib.color_sequences["tab10"], strict=False))
    figure, axes = pyplot.subplots(2, 4, figsize=(18, 8))
    for axis, (work, unit) in zip(axes.flat, shown, strict=True):
        cases = sorted({case for a_work, case, _, a_unit in ledger.figures if (a_work, a_unit) == (work, unit)})
        for n, case in enumerate(cases):
            here = [s for s in servers if (work, case, s, unit) in ledger.figures]
            for m, server in enumerate(here):
                values = ledger.figures[work, case, server, unit]
                middle = statistics.median(values)
                spread = [[middle - min(values)], [max(values) - middle]]
                axis.bar(n + (m - len(here) / 2) * 0.17, middle, 0.16, yerr=spread, color=colours[server], label=server)
        axis.set_xticks(range(len(cases)), [case.strip() for case in cases], fontsize=8)
        axis.set_title(f"{work}: {unit}", fontsize=10)
        if unit in ("requests/s", "upstream GETs"):
            axis.set_yscale("log")
    handles = [patches.Patch(color=colours[server]) for server in servers]
    figure.legend(handles, servers, loc="lower center", ncol=len(servers))
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=90)
