"""A login that a client showed for this upstream, which judges it itself (`pass_through`)."""

from __future__ import annotations

from proxy.upstream.credentials import Login


class ShownCredentials:
    """`username` and `secret` as a client showed them, known by `mark`. Passes the `Credentials` port."""

    __slots__ = ("_login", "_mark")

    def __init__(self, mark: str, username: str, secret: str) -> None:
        """`mark` stands for both where they must not be told: in sentences and logs."""
        self._login = Login(username, secret)
        self._mark = mark

    @property
    def identity(self) -> str:
        """The mark, short: neither the name nor the secret is ours to tell."""
        return f"login:{self._mark[:12]}"

    async def login(self) -> Login:
        """Always the same; never raises."""
        return self._login

    def __repr__(self) -> str:
        return f"ShownCredentials({self.identity!r})"
