"""rules/transfer.py: the states of a transfer, and how much of it a reader may see (INV-3)."""

from __future__ import annotations

from itertools import product

import pytest

from proxy.rules.transfer import ENDED, HELD_BACK_BYTES, State, frontier, step

LEGAL = {
    (State.REQUESTED, State.STREAMING),
    (State.STREAMING, State.VERIFYING),
    (State.VERIFYING, State.COMMITTED),
    *product((State.REQUESTED, State.STREAMING, State.VERIFYING), (State.FAILED, State.ABANDONED)),
}  # fmt: skip


@pytest.mark.parametrize(("state", "to"), list(product(State, State)), ids=lambda state: state.value)
def test_the_table_has_these_steps_and_no_others(state: State, to: State) -> None:
    """Committing without verifying, or leaving an end, is a bug and not an event."""
    if (state, to) in LEGAL:
        assert step(state, to) is to
        return
    with pytest.raises(RuntimeError):
        step(state, to)


def test_what_has_ended_stays_so() -> None:
    """Three ends, and nothing follows them."""
    assert {State.COMMITTED, State.FAILED, State.ABANDONED} == ENDED


@pytest.mark.parametrize(
    ("received", "size", "is_verified", "expected"),
    [
        pytest.param(0, 1 << 20, False, 0, id="nothing yet"),
        pytest.param(1000, 1 << 20, False, 1000, id="far from the end: all that came"),
        pytest.param(1 << 20, 1 << 20, False, (1 << 20) - HELD_BACK_BYTES, id="all came, unverified"),
        pytest.param(1 << 20, 1 << 20, True, 1 << 20, id="all came and agrees"),
        pytest.param(HELD_BACK_BYTES, HELD_BACK_BYTES, False, 0, id="as small as what is held back"),
        pytest.param(10, 10, False, 0, id="smaller than what is held back"),
        pytest.param(0, 0, False, 0, id="empty"),
        pytest.param(0, 0, True, 0, id="empty and verified"),
        pytest.param(1 << 20, None, False, (1 << 20) - HELD_BACK_BYTES, id="size unknown: any byte may be the last"),
        pytest.param(100, None, False, 0, id="size unknown, little came"),
    ],
)
def test_a_reader_may_have_so_much(received: int, size: int | None, is_verified: bool, expected: int) -> None:
    """INV-3: no reader has the last byte before the digest agreed."""
    assert frontier(received=received, size=size, is_verified=is_verified) == expected


@pytest.mark.parametrize("size", [1, 2, HELD_BACK_BYTES - 1, HELD_BACK_BYTES, HELD_BACK_BYTES + 1, 10 << 20])
def test_the_last_byte_is_never_within_reach_of_the_unverified(size: int) -> None:
    """INV-3, for every amount received, a byte more than announced among them."""
    for received in (0, 1, size - 1, size, size + 1):
        assert frontier(received=received, size=size, is_verified=False) < size
