"""When to try again. Pure: chance and time are arguments."""

from __future__ import annotations

#: How often a broken transfer is resumed without a byte of progress before it fails: containerd's own number.
MAX_RESUMES_WITHOUT_PROGRESS = 3
#: Fewer bytes than this are no progress: an upstream that gives a few with each answer would be asked without an end.
PROGRESS_BYTES = 64 * 1024
#: How long what upstream lied about is not asked for again, in seconds: clients that retry come back at once, and must
#: not start a storm, nor spend what upstream grants on an answer that is known to be bad.
BAD_FOR_S = 30.0


def resume_delay(attempt: int, chance: float) -> float:
    """Seconds to wait before the `attempt`-th (from 1) resume without progress; `chance` in [0, 1) spreads them."""
    return min(5.0, 0.1 * 2.0**attempt) * (0.5 + chance / 2)
