"""How old a tag's answer may be (INV-6).

What is served without asking, what is asked about first, and what may go out marked stale when upstream cannot answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class Answer(Enum):
    """What to do with a remembered tag."""

    #: Younger than `tag_ttl`: serve without asking.
    SERVE = "serve"
    #: Ask upstream; if it cannot answer, or not in time, serve this, marked.
    REVALIDATE = "revalidate"
    #: Ask upstream; this is too old to serve whatever happens.
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True)
class TagPolicy:
    """`tag_ttl_s` and `stale_if_error_s` in seconds; the latter counts from the end of the former and may be infinite.

    `sealed`: no upstream is ever asked, so the record is the answer at any age.
    """

    tag_ttl_s: float = 600.0
    stale_if_error_s: float = math.inf
    sealed: bool = False


def age(*, validated_at: float, now: float) -> float | None:
    """Seconds since the record was validated, or None when the clock says something impossible.

    `validated_at` and `now` are wall-clock: a machine that starts at 1970, or one whose clock was ahead when it wrote,
    gives a negative age. That is unknown, so the record counts as stale: asked about, but never refused for it.
    """
    seconds = now - validated_at
    return seconds if seconds >= 0 else None


def fresh_for(age_s: float | None, policy: TagPolicy) -> float:
    """For how many seconds more a record of this age is served without asking; 0 or less: it is not."""
    if policy.sealed:
        return math.inf
    return 0.0 if age_s is None else policy.tag_ttl_s - age_s


def judge(age_s: float | None, policy: TagPolicy) -> Answer:
    """The verdict on a record of this age (None: unknown, see `age`)."""
    if fresh_for(age_s, policy) > 0:
        return Answer.SERVE
    if age_s is None:
        return Answer.REVALIDATE
    if age_s < policy.tag_ttl_s + policy.stale_if_error_s:
        return Answer.REVALIDATE
    return Answer.REFUSE
