"""How many descriptors this process may have open, and how many connections fit beneath that.

The soft limit is 1,024 on most systems for the sake of programs that use select(2); we do not, and raise it to the hard
one, as Go's runtime does.
"""

from __future__ import annotations

import resource

#: Left for files, upstreams, listeners and logs.
SPARE = 256


def raise_limit() -> int:
    """Raise the soft limit of open files to the hard one; returns what holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            return soft  # a sandbox may forbid it
    return hard


def connections_within(limit: int, wanted: int) -> int:
    """How many of `wanted` connections fit beneath `limit` open files, at least one.

    An eighth more are taken in for as long as it takes to tell them 503 (web/server.py), so these count too.
    """
    return max(1, min(wanted, (limit - SPARE) * 8 // 9 - 8))
