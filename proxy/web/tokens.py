"""Tokens of our own: who somebody is, signed, for a few minutes (distribution-spec "token authentication").

A token carries an identity and nothing else that counts: what it may read is judged on every request, by the settings
in effect at that moment. The scope is there because clients expect one. The key is made at the start and kept nowhere:
a restart, or another Breakwater behind the same name, answers 401 to older tokens, and clients fetch a new one.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import jwt

from proxy.ports import Clock

#: How long a token is good for, in seconds. Clients keep it as long, and a pull asks for a new one when it is over.
LIFETIME_S = 300
#: A clock that is set back a little must not make our own tokens unborn.
LEEWAY_S = 60
#: No token of ours is longer. What a client sends beyond this is not even looked at.
MAX_TOKEN = 4096

ISSUER = "breakwater"
_ALGORITHM = "HS256"


@dataclass(frozen=True, slots=True)
class Bearer:
    """Whom a token speaks for, until wall `expires_at`: a robot, by the secret that `mark` marks; without a robot, the
    login that `mark` marks (`pass_through`), or anybody where both are "".
    """

    robot: str
    mark: str
    expires_at: float


class Tokens:
    """Issues and reads tokens. True for this process."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._key = secrets.token_bytes(32)

    def issue(self, robot: str, mark: str, service: str, scopes: Sequence[str]) -> str:
        """A token for this robot, this login, or anybody; see `Bearer`."""
        now = int(self._clock.wall())
        claims = {
            "iss": ISSUER,
            "sub": robot,
            "aud": service,
            "iat": now,
            "exp": now + LIFETIME_S,
            "jti": secrets.token_urlsafe(12),
            "mark": mark,
            "access": [access for scope in scopes if (access := _access(scope))],
        }
        return jwt.encode(claims, self._key, algorithm=_ALGORITHM)

    def read(self, token: str) -> Bearer | None:
        """Whom a token of ours speaks for, or None: forged, expired, or somebody else's."""
        if len(token) > MAX_TOKEN:
            return None
        try:
            # The times are compared by our own clock, and the audience is whatever name we were reached by.
            claims = jwt.decode(
                token,
                self._key,
                algorithms=[_ALGORITHM],
                issuer=ISSUER,
                options={
                    "require": ["exp", "iat", "sub"],
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                    "verify_aud": False,
                },
            )
            bearer = Bearer(str(claims["sub"]), str(claims["mark"]), float(claims["exp"]))
            issued_at = float(claims["iat"])
        except (jwt.PyJWTError, KeyError, ValueError, TypeError):
            return None
        now = self._clock.wall()
        return bearer if issued_at - LEEWAY_S <= now < bearer.expires_at else None


def _access(scope: str) -> dict[str, object] | None:
    """One entry of the `access` claim, as registries write it; None for what is no scope."""
    kind, first, rest = scope.partition(":")
    name, second, actions = rest.rpartition(":")
    if not (first and second and name):
        return None
    return {"type": kind, "name": name, "actions": ["pull"] if "pull" in actions.split(",") else []}
