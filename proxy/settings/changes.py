"""What of new settings can be taken up while running, and what waits for the next start.

Two tables say it for every key of the sections that are not remade as a whole; a test keeps them total, so that a new
key is decided about and never just ignored.
"""

from __future__ import annotations

from proxy.settings.fields import Section
from proxy.settings.model import Settings

#: Taken up by a reload. [upstreams], [projects], [policy] and [robots] are, with all their keys.
LIVE = frozenset(
    {
        "server.default_upstream",
        "server.sealed",
        "server.tls.cert",
        "server.tls.key",
        "server.shutdown_grace",
        "server.request_log",
        "transfers.min_rate",
        "transfers.min_rate_window",
        "log.format",
        "log.level",
    }
)
#: Taken up by the next start: sockets are open, the store's lock is held, and limits are counted against.
AT_START = frozenset(
    {
        "server.listen",
        "server.admin_listen",
        "server.admin_hosts",
        "server.admin_token_file",
        "server.probe_listen",
        "server.tls",  # whether there is TLS at all, on sockets that are open
        "server.tls.client_ca",
        "server.public_url",
        "server.max_connections",
        "store.path",
        "store.capacity",
        "store.min_free",
        "store.scrub_rate",
        "prefetch.list",
        "prefetch.schedule",
        "prefetch.platforms",
        "transfers.on_last_reader_gone",
        "transfers.max_concurrent",
        "transfers.max_per_upstream",
        "transfers.header_deadline",
        "transfers.queue_deadline",
        "transfers.reader_min_rate",
        "transfers.reader_min_rate_window",
    }
)


def taken_up(running: Settings, wanted: Settings) -> tuple[Settings, tuple[str, ...]]:
    """`wanted` with what cannot change while running as it is in `running`, and the keys that were held back."""
    held: list[str] = []
    updates: dict[str, Section] = {}
    for name in sorted({key.partition(".")[0] for key in AT_START}):
        mine, theirs = getattr(running, name), getattr(wanted, name)
        keeps = {}
        for key in type(theirs).model_fields:
            place = f"{name}.{key}"
            if place == "server.tls":
                kept = _tls(running, wanted, held)
                keeps[key] = kept
            elif place in AT_START and getattr(mine, key) != getattr(theirs, key):
                keeps[key] = getattr(mine, key)
                held.append(place)
        updates[name] = theirs.model_copy(update=keeps)
    return wanted.model_copy(update=updates), tuple(sorted(held))


def _tls(running: Settings, wanted: Settings, held: list[str]) -> object:
    """Another certificate is taken up; TLS itself is neither turned on nor off."""
    mine, theirs = running.server.tls, wanted.server.tls
    if mine is None or theirs is None:
        if mine is not theirs:
            held.append("server.tls")
        return mine
    if mine.client_ca != theirs.client_ca:
        held.append("server.tls.client_ca")
    return theirs.model_copy(update={"client_ca": mine.client_ca})
