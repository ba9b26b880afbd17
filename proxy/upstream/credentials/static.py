"""A user name and a secret that do not change while the program runs."""

from __future__ import annotations

from proxy.upstream.credentials import Login


class StaticCredentials:
    """`username` and `secret` as the settings gave them. Passes the `Credentials` port."""

    __slots__ = ("_login",)

    def __init__(self, username: str, secret: str) -> None:
        self._login = Login(username, secret)

    @property
    def identity(self) -> str:
        """The user name: one upstream has one secret for it at a time."""
        return f"static:{self._login.username}"

    async def login(self) -> Login:
        """Always the same; never raises."""
        return self._login

    def __repr__(self) -> str:
        return f"StaticCredentials({self._login.username!r})"
