"""The states of one transfer, and how much of it a reader may see (INV-3). A table; the driving is engine/pump.py."""

from __future__ import annotations

from enum import Enum

#: Bytes at the end of every body that no reader gets before the digest agreed. One would keep the promise; a piece of
#: this size also keeps clients that ignore Content-Length from taking a bad body for a whole one, and costs nothing.
HELD_BACK_BYTES = 64 * 1024


class State(Enum):
    """Where a transfer stands."""

    REQUESTED = "requested"
    STREAMING = "streaming"
    VERIFYING = "verifying"
    COMMITTED = "committed"
    FAILED = "failed"
    ABANDONED = "abandoned"


_NEXT: dict[State, frozenset[State]] = {
    State.REQUESTED: frozenset({State.STREAMING, State.FAILED, State.ABANDONED}),
    State.STREAMING: frozenset({State.VERIFYING, State.FAILED, State.ABANDONED}),
    State.VERIFYING: frozenset({State.COMMITTED, State.FAILED, State.ABANDONED}),
    State.COMMITTED: frozenset(),
    State.FAILED: frozenset(),
    State.ABANDONED: frozenset(),
}

#: States that nothing follows.
ENDED = frozenset(state for state, following in _NEXT.items() if not following)


def step(state: State, to: State) -> State:
    """The next state. Raises RuntimeError for a step the table does not have: a bug, not an event."""
    if to not in _NEXT[state]:
        raise RuntimeError(f"a transfer cannot go from {state.value} to {to.value}")
    return to


def frontier(*, received: int, size: int | None, is_verified: bool) -> int:
    """How many bytes of the body a reader may have: all that was received, but for the end until the digest agreed.

    Without a known `size` any byte may be the last, so the end is held back from what was received.
    """
    if is_verified:
        return received
    end = received if size is None else size
    return max(0, min(received, end - HELD_BACK_BYTES))
