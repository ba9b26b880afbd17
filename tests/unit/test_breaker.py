"""rules/breaker.py: closed, open, half-open, by a clock that is a number."""

from __future__ import annotations

import pytest

from proxy.rules.breaker import FIRST_S, LONGEST_S, TRIPS_AFTER, Breaker


def opened(now: float = 0.0) -> Breaker:
    """A breaker that has just opened."""
    breaker = Breaker()
    for _ in range(TRIPS_AFTER):
        assert breaker.wait_s(now) is None
        breaker.failed(now, 0.999999)
    return breaker


def test_it_opens_after_failures_in_a_row_and_says_so_once() -> None:
    """Whoever reports it reports it once."""
    breaker = Breaker()
    said = [breaker.failed(0.0, 0.0) for _ in range(TRIPS_AFTER + 3)]
    assert said == [False] * (TRIPS_AFTER - 1) + [True] + [False] * 3
    assert breaker.state(0.0) == "open"


def test_an_answer_between_failures_starts_the_count_again() -> None:
    """One object that is broken upstream does not close the registry to all others."""
    breaker = Breaker()
    for _ in range(3):
        for _ in range(TRIPS_AFTER - 1):
            assert not breaker.failed(0.0, 0.0)
        assert not breaker.succeeded()
    assert breaker.state(0.0) == "closed"


def test_open_it_tells_how_long_and_then_lets_one_probe() -> None:
    """Half-open: one asks, the others are told to wait."""
    breaker = opened()
    assert breaker.wait_s(1.0) == pytest.approx(FIRST_S - 1.0, abs=0.01)
    assert breaker.state(FIRST_S) == "half-open"
    assert breaker.wait_s(FIRST_S) is None
    assert breaker.wait_s(FIRST_S) == 1.0


def test_a_probe_that_is_answered_closes_it() -> None:
    """And everybody asks again."""
    breaker = opened()
    assert breaker.wait_s(FIRST_S) is None
    assert breaker.succeeded()
    assert [breaker.wait_s(FIRST_S) for _ in range(3)] == [None] * 3


def test_a_probe_that_fails_doubles_the_wait_up_to_a_limit() -> None:
    """An upstream that is down for hours is asked once a minute."""
    breaker, now, waits = opened(), 0.0, []
    for _ in range(8):
        now += breaker.wait_s(now) or 0.0
        assert breaker.wait_s(now) is None
        assert not breaker.failed(now, 0.999999)
        waits.append(breaker.wait_s(now))
    assert waits == pytest.approx([10.0, 20.0, 40.0, *[LONGEST_S] * 5], abs=0.01)


@pytest.mark.parametrize(("chance", "share"), [(0.0, 0.75), (0.5, 0.875), (0.999999, 1.0)])
def test_chance_spreads_the_probes(chance: float, share: float) -> None:
    """A fleet of mirrors does not come back at one moment."""
    breaker = Breaker()
    for _ in range(TRIPS_AFTER):
        breaker.failed(0.0, chance)
    assert breaker.wait_s(0.0) == pytest.approx(FIRST_S * share, abs=0.01)


def test_a_probe_whose_asker_left_is_taken_over() -> None:
    """A cancelled probe must not keep the circuit half-open for ever."""
    breaker = opened()
    assert breaker.wait_s(FIRST_S) is None
    breaker.left()
    assert breaker.wait_s(FIRST_S) is None


def test_failures_of_requests_that_were_under_way_do_not_prolong_it() -> None:
    """They say what was known when it opened."""
    breaker = opened()
    for _ in range(50):
        breaker.failed(4.0, 0.0)
    assert breaker.state(FIRST_S) == "half-open"
