"""What /api/v1/status says, for people. Shows what it knows and passes over what is missing or new."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from proxy.spelled import duration, plain, size

OUTCOMES = ("hit", "coalesced", "miss", "stale", "denied", "failed")

#: A digest's first signs are enough to tell transfers apart, and a line stays a line.
_DIGEST_SIGNS = len("sha256:") + 12


def text_of(status: Mapping[str, Any]) -> str:
    """The whole table, ending in a newline. Nothing in it can move a terminal's cursor."""
    return "\n".join(plain(line) for line in _lines(status)) + "\n"


def _lines(status: Mapping[str, Any]) -> Iterator[str]:
    sealed = ", sealed" if status.get("sealed") else ""
    uptime = duration(status.get("uptime_s", 0))
    yield f"breakwater {status.get('version', '?')}, {status.get('ready', '?')}{sealed}, up {uptime}"

    requests = status.get("requests", {})
    yield ""
    yield from _table([OUTCOMES, [f"{requests.get(outcome, 0):,}" for outcome in OUTCOMES]], right=range(len(OUTCOMES)))
    yield ""
    yield f"sent to clients     {size(status.get('response_bytes', 0))}"
    yield f"from upstreams      {size(status.get('upstream_bytes', 0))}"

    store = status.get("store", {})
    used, reserved, capacity = (store.get(f"{name}_bytes") or 0 for name in ("used", "reserved", "capacity"))
    share = f" ({(used + reserved) / capacity:.0%})" if capacity else ""
    yield f"store               {store.get('path', '?')}, {store.get('state', '?')}"
    yield f"  used              {size(used)} + {size(reserved)} reserved of {size(capacity)}{share}"
    yield f"  blobs             {store.get('blobs') or 0:,}, evicted {size(store.get('evicted_bytes') or 0)}"

    yield from _carried(status)

    transfers: Sequence[Mapping[str, Any]] = status.get("transfers", [])
    yield ""
    yield f"transfers running   {len(transfers)}"
    if transfers:
        yield from _table(
            [("  digest", "from", "received", "readers", "age"), *map(_transfer, transfers)], right=(2, 3, 4)
        )

    upstreams: Mapping[str, Mapping[str, Any]] = status.get("upstreams", {})
    if upstreams:
        yield ""
        rows = [_upstream(host, upstream) for host, upstream in sorted(upstreams.items())]
        yield from _table([("upstream", "state", "requests", "failures", "last error"), *rows], right=(2, 3))


def _carried(status: Mapping[str, Any]) -> Iterator[str]:
    """What is pinned, and what was imported and when: what a seal was made of."""
    pins: Mapping[str, Any] = status.get("pins", {})
    if pins.get("references"):
        yield f"  pinned            {pins['references']:,} references, {size(pins.get('bytes') or 0)}"
    imports: Sequence[Mapping[str, Any]] = status.get("seal", {}).get("imports", [])
    for one in reversed(imports[-3:]):
        when = datetime.fromtimestamp(one.get("imported_at") or 0, UTC).isoformat(" ", "minutes").removesuffix("+00:00")
        signed = f", signed by {one['signed_by']}" if one.get("signed_by") else ""
        made = str(one.get("digest") or "an archive")[:_DIGEST_SIGNS]
        yield f"  imported          {when} UTC, {one.get('n_images', 0):,} images, {made}{signed}"


def _transfer(transfer: Mapping[str, Any]) -> tuple[str, ...]:
    total = transfer.get("size_bytes")
    return (
        f"  {str(transfer.get('digest', '?'))[:_DIGEST_SIGNS]}",
        f"{transfer.get('upstream', '?')}/{transfer.get('repository', '?')}",
        f"{size(transfer.get('received_bytes', 0))} of {size(total) if total is not None else '?'}",
        f"{transfer.get('readers', 0)}",
        duration(transfer.get("age_s", 0)),
    )


def _upstream(host: str, upstream: Mapping[str, Any]) -> tuple[str, ...]:
    counts = (f"{upstream.get(name, 0):,}" for name in ("requests", "failures"))
    return (host, str(upstream.get("state", "?")), *counts, str(upstream.get("last_error") or ""))


def _table(rows: Sequence[Sequence[str]], *, right: Sequence[int]) -> Iterator[str]:
    """Columns as wide as their widest cell, those in `right` aligned to it."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
