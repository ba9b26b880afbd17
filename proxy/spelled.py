"""Numbers and instants in words, for pages and terminals alike. Exact numbers are for programs: `--json`, /api/v1/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def size(n_bytes: float) -> str:
    """Bytes, in powers of two, with three digits that mean something."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}" if unit == "B" or n_bytes >= 100 else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def count(n: int) -> str:
    """A number with its thousands apart."""
    return f"{n:,}"


def percent(part: float, whole: float) -> str:
    """A share; never 0 % for something, nor 100 % for less than all."""
    if not whole:
        return "–"
    share = 100 * part / whole
    if 0 < share < 0.1:
        return "< 0.1 %"
    if 99.9 < share < 100:
        return "> 99.9 %"
    return f"{share:.0f} %" if share in (0, 100) else f"{share:.1f} %"


def duration(seconds: float) -> str:
    """`42 s`, `3 min`, `5 h 2 min`, `12 d 3 h`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def ago(at: float, now: float) -> str:
    """How long ago an instant was; both in seconds since 1970. A clock that was set back makes nothing negative."""
    passed = now - at
    return "just now" if passed < 5 else f"{duration(passed)} ago"


def short(digest: str) -> str:
    """A digest's first signs: enough to tell it from others on a page."""
    algorithm, colon, digits = digest.partition(":")
    return f"{algorithm}:{digits[:12]}…" if colon else digest


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    text = text.strip()
    if not text:
        return ""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?…" else ".")


def plain(text: str) -> str:
    """Text without control characters: what an upstream says may carry a terminal's commands."""
    return "".join(sign if sign.isprintable() else "�" for sign in text)


def budget(told: Mapping[str, Any]) -> str:
    """What upstream last said of its rate limit, each part as far as it is known."""
    left, limit, window = (told.get(name) for name in ("remaining", "limit", "window_s"))
    words = f"{count(left)} left" if left is not None else ""
    if limit is not None:
        words += f" of {count(limit)}" if words else f"{count(limit)}"
    return words + (f" in {duration(window)}" if window else "")
