"""rules/budget.py: what is left, and for whom."""

from __future__ import annotations

import pytest

from proxy.rules.budget import LOOK_EVERY_S, UNSAID_S, Budget
from proxy.upstream.answers import Budget as Quote


@pytest.mark.parametrize(("asked", "waits"), [(120.0, 120.0), (0.0, None), (None, UNSAID_S)])
def test_throttled_means_that_nobody_asks_until_then(asked: float | None, waits: float | None) -> None:
    """Retry-After is for everybody who shares the address and the identity."""
    budget = Budget(10)
    budget.throttle(asked, 1000.0)
    assert budget.wait_s(1000.0) == waits
    assert budget.wait_s(1000.0 + (waits or 0.0)) is None


def test_a_later_answer_never_shortens_the_wait() -> None:
    """Of answers that cross on the way the most patient counts."""
    budget = Budget(10)
    budget.throttle(100.0, 0.0)
    budget.throttle(1.0, 0.0)
    assert budget.wait_s(0.0) == 100.0


@pytest.mark.parametrize(
    ("quote", "is_low"),
    [
        (None, False),
        (Quote(100, None, 21600), False),
        (Quote(100, 11, 21600), False),
        (Quote(100, 10, 21600), True),
        (Quote(100, 0, 21600), True),
        (Quote(None, 3, None), True),
        (Quote(5, 3, 60), False),
        (Quote(5, 0, 60), True),
    ],
    ids=str,
)
def test_below_the_floor_what_is_left_is_for_misses(quote: Quote | None, is_low: bool) -> None:
    """A floor above upstream's whole limit counts as none, but for nothing left at all."""
    budget = Budget(10)
    budget.hear(quote, 0.0)
    assert budget.is_low(1.0) is is_low


def test_below_the_floor_one_revalidation_a_minute_looks_whether_it_is_over() -> None:
    """Else nobody would ever hear that the budget is back."""
    budget = Budget(10)
    budget.hear(Quote(100, 4, 21600), 0.0)
    assert [budget.may_look(at) for at in (0.0, 1.0, LOOK_EVERY_S - 1, LOOK_EVERY_S)] == [True, False, False, True]
    budget.hear(Quote(100, 90, 21600), LOOK_EVERY_S + 1)
    assert [budget.may_look(LOOK_EVERY_S + 2) for _ in range(3)] == [True] * 3


def test_what_was_heard_a_window_ago_no_longer_counts() -> None:
    """By then all of it is granted anew."""
    budget = Budget(10)
    quote = Quote(100, 4, 60)
    budget.hear(quote, 0.0)
    budget.hear(quote, 59.0)  # the same answer, not a new one
    assert (budget.is_low(59.0), budget.is_low(60.0)) == (True, False)
