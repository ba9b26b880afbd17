"""rules/backoff.py: when to try again."""

from __future__ import annotations

import pytest

from proxy.rules.backoff import MAX_RESUMES_WITHOUT_PROGRESS, resume_delay


@pytest.mark.parametrize(
    ("attempt", "chance", "delay"),
    [(1, 0.0, 0.1), (2, 0.0, 0.2), (3, 0.0, 0.4), (1, 0.5, 0.15), (20, 0.0, 2.5), (20, 0.999, 4.9975)],
)
def test_the_delay_doubles_up_to_five_seconds_and_chance_spreads_it(attempt: int, chance: float, delay: float) -> None:
    """Half of it is certain, half is chance: many nodes must not come back at the same moment."""
    assert resume_delay(attempt, chance) == pytest.approx(delay)


def test_all_resumes_together_fit_into_a_clients_patience() -> None:
    """containerd waits 30 s for the next byte; the pauses between our attempts are a small part of that."""
    assert sum(resume_delay(n, 1.0) for n in range(1, MAX_RESUMES_WITHOUT_PROGRESS + 1)) < 3
