"""engine/watched.py: while the count of losses stands still, what was found is still there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.engine.watched import WatchedTable


@given(steps=st.lists(st.tuples(st.sampled_from(["put", "get", "pop"]), st.integers(0, 6)), max_size=60))
def test_nothing_is_lost_uncounted(steps: list[tuple[str, int]]) -> None:
    """Removed, replaced or evicted: each moves the count. Looking and adding alone do not."""
    table: WatchedTable[int, object] = WatchedTable(4)
    for what, key in steps:
        before, n_lost = dict(table.items()), table.n_lost
        if what == "put":
            table[key] = object()
        elif what == "get":
            table.get(key)
        else:
            table.pop(key, None)
        is_lost = any(table.get(each) is not value for each, value in before.items())
        assert is_lost == (table.n_lost != n_lost)
