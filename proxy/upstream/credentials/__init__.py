"""Who we are to an upstream: one file for each source of a login, one port for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Login:
    """A user name and its secret, for Basic authentication (RFC 7617) at a registry or at its token realm."""

    username: str
    secret: str = field(repr=False)


class Credentials(Protocol):
    """A source of logins. Sources that expire (ECR, GAR, ACR) renew behind `login`, early and once for all askers."""

    @property
    def identity(self) -> str:
        """Names this login without revealing it: part of the key under which tokens are remembered."""
        ...

    async def login(self) -> Login:
        """The login to use now. Raises Unauthorised, Unreachable or Timeout when its source does not give one."""
        ...
