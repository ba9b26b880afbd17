"""rules/freshness.py: how old a tag's answer may be (INV-6)."""

from __future__ import annotations

import math

import pytest

from proxy.rules.freshness import Answer, TagPolicy, age, judge

SHORT = TagPolicy(tag_ttl_s=600.0, stale_if_error_s=3600.0)
FOREVER = TagPolicy(tag_ttl_s=600.0, stale_if_error_s=math.inf)
ALWAYS_ASK = TagPolicy(tag_ttl_s=0.0, stale_if_error_s=3600.0)
NEVER_STALE = TagPolicy(tag_ttl_s=600.0, stale_if_error_s=0.0)
SEALED = TagPolicy(tag_ttl_s=0.0, stale_if_error_s=0.0, sealed=True)


@pytest.mark.parametrize(
    ("age_s", "policy", "answer"),
    [
        pytest.param(0.0, SHORT, Answer.SERVE, id="just validated"),
        pytest.param(599.9, SHORT, Answer.SERVE, id="within tag_ttl"),
        pytest.param(600.0, SHORT, Answer.REVALIDATE, id="tag_ttl is over"),
        pytest.param(4199.9, SHORT, Answer.REVALIDATE, id="stale_if_error counts from the end of tag_ttl"),
        pytest.param(4200.0, SHORT, Answer.REFUSE, id="too old to serve whatever happens"),
        pytest.param(1e12, FOREVER, Answer.REVALIDATE, id="stale_if_error = forever"),
        pytest.param(0.0, ALWAYS_ASK, Answer.REVALIDATE, id='tag_ttl = "0s" asks each time'),
        pytest.param(600.0, NEVER_STALE, Answer.REFUSE, id="never stale"),
        pytest.param(None, SHORT, Answer.REVALIDATE, id="unknown age is asked about, never refused"),
        pytest.param(None, NEVER_STALE, Answer.REVALIDATE, id="unknown age, though never stale"),
        pytest.param(1e12, SEALED, Answer.SERVE, id="sealed: the record is the answer"),
        pytest.param(None, SEALED, Answer.SERVE, id="sealed, of unknown age"),
    ],
)
def test_a_record_of_this_age_is_answered_so(age_s: float | None, policy: TagPolicy, answer: Answer) -> None:
    """INV-6: nothing older than the policy goes out unmarked, and what is possible is answered."""
    assert judge(age_s, policy) is answer


@pytest.mark.parametrize(
    ("validated_at", "now", "expected"),
    [
        pytest.param(1000.0, 1060.0, 60.0, id="a minute ago"),
        pytest.param(1000.0, 1000.0, 0.0, id="now"),
        pytest.param(1_800_000_000.0, 12.0, None, id="a machine that starts in 1970"),
        pytest.param(1001.0, 1000.0, None, id="written by a clock that was ahead"),
    ],
)
def test_an_impossible_age_is_unknown(validated_at: float, now: float, expected: float | None) -> None:
    """reliability.md: clocks are wrong at boot, and a wrong clock must not refuse what is cached."""
    assert age(validated_at=validated_at, now=now) == expected
