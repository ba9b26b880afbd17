"""Keys that are a contract already and do nothing yet.

Writing one is a problem, because a rule that is accepted and ignored would be a lie. When a feature lands, its line
goes.
"""

from __future__ import annotations

#: Pattern of the key, or of a table with all its keys -> what is missing. "+" is any entry of a list but the first.
NOT_YET: dict[str, str] = {
    "server.tls.client_ca": "client certificates are",
}


def is_not_yet(pattern: tuple[str, ...]) -> bool:
    """Whether the pattern, or a table around it, is in NOT_YET."""
    return any(".".join(pattern[:end]) in NOT_YET for end in range(1, len(pattern) + 1))
