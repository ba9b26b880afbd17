"""Numbers and instants in words."""

from __future__ import annotations

import pytest

from proxy import spelled


@pytest.mark.parametrize(
    ("part", "whole", "said"),
    [
        (0, 0, "–"),
        (0, 10, "0 %"),
        (10, 10, "100 %"),
        (1, 3, "33.3 %"),
        (1, 10**6, "< 0.1 %"),
        (99_999, 10**5, "> 99.9 %"),
    ],
)
def test_a_share_is_never_rounded_to_nothing_or_all(part: int, whole: int, said: str) -> None:
    """One miss in a million is not a hit ratio of 100 %."""
    assert spelled.percent(part, whole) == said


@pytest.mark.parametrize(
    ("n_bytes", "said"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (300 << 20, "300 MiB"),
        (5 << 40, "5.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_sizes_have_three_digits_that_mean_something(n_bytes: int, said: str) -> None:
    """In powers of two."""
    assert spelled.size(n_bytes) == said


@pytest.mark.parametrize(
    ("seconds", "said"), [(3.9, "3 s"), (42, "42 s"), (200, "3 min"), (18120, "5 h 2 min"), (97200, "1 d 3 h")]
)
def test_durations_have_the_units_that_matter(seconds: float, said: str) -> None:
    """Nobody reads 93784 s."""
    assert spelled.duration(seconds) == said


@pytest.mark.parametrize(
    ("passed", "said"),
    [
        (0, "just now"),
        (-60, "just now"),
        (59, "59 s ago"),
        (61, "1 min ago"),
        (7500, "2 h 5 min ago"),
        (100_000, "1 d 3 h ago"),
    ],
)
def test_instants_are_told_by_how_long_ago_they_were(passed: float, said: str) -> None:
    """A clock that was set back makes nothing negative."""
    assert spelled.ago(1000.0, 1000.0 + passed) == said


@pytest.mark.parametrize(("text", "said"), [("", ""), ("no room", "No room."), ("Why?", "Why?"), ("  a.  ", "A.")])
def test_a_sentence_begins_with_a_capital_and_ends(text: str, said: str) -> None:
    """Errors are phrases, pages have sentences."""
    assert spelled.sentence(text) == said


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"remaining": 76, "limit": 100, "window_s": 21600}, "76 left of 100 in 6 h 0 min"),
        ({"remaining": 0, "limit": None, "window_s": None}, "0 left"),
        ({"remaining": None, "limit": 5000, "window_s": None}, "5,000"),
    ],
)
def test_a_budget_is_told_as_far_as_it_is_known(told: dict[str, int | None], said: str) -> None:
    """Registries say one part or the other."""
    assert spelled.budget(told) == said
