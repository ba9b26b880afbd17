"""Docker's config.json and its credential helpers (docker/cli, cli/config; docker/docker-credential-helpers).

A helper is a program of its own, `docker-credential-<name>`: it is told the registry on its standard input and answers
in JSON, so that no secret is ever an argument. It gets ten seconds, and is killed then.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import os
import re
import shutil
from typing import Any

from proxy.errors import Timeout, Unauthorised, UpstreamError
from proxy.ports import Clock
from proxy.upstream.credentials import Credentials, Login
from proxy.upstream.credentials.files import WatchedFile
from proxy.upstream.credentials.renewing import Lease, RenewingCredentials
from proxy.upstream.tokens import Spawn

#: Where Docker Hub's login stands in config.json, by tradition.
HUB_KEY = "https://index.docker.io/v1/"
_HUB = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
PROGRAM_S = 10.0
#: Helpers do not say how long their secrets hold; ECR's, the most used, gives twelve hours.
PROGRAM_LIFETIME_S = 600.0
_MAX_ANSWER_BYTES = 64 * 1024
#: What helpers answer instead of a user name when the secret is an OAuth2 refresh token.
_TOKEN_USERNAME = "<token>"


def keys_of(registry: str) -> tuple[str, ...]:
    """The names under which config.json may have a registry's login, best first."""
    if registry in _HUB:
        return (HUB_KEY, "docker.io", "index.docker.io", "https://index.docker.io/v1", "registry-1.docker.io")
    return (registry, f"https://{registry}", f"https://{registry}/", f"http://{registry}")


async def login_of_program(name: str, server: str, *, upstream: str) -> Login:
    """What `docker-credential-<name> get` answers for `server`. Raises Unauthorised or Timeout."""
    program = f"docker-credential-{name}"

    def none(why: str) -> Unauthorised:
        return Unauthorised(f"upstream {upstream}: no login, {program} {why}", upstream=upstream)

    if not _NAME.fullmatch(name) or await asyncio.to_thread(shutil.which, program) is None:
        raise none("is not installed")
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            "get",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise none(f"cannot be started: {os.strerror(error.errno or 0).lower()}") from None
    try:
        async with asyncio.timeout(PROGRAM_S):
            told, _ = await process.communicate(server.encode())
    except TimeoutError:
        raise Timeout(f"upstream {upstream}: no login, {program} takes too long", upstream=upstream) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise none(f"has none for {server}")  # its words are not repeated: some helpers print what they tried
    document = _object(told[:_MAX_ANSWER_BYTES].decode("utf-8", "replace"))
    username, secret = document.get("Username"), document.get("Secret")
    if not isinstance(username, str) or not isinstance(secret, str) or not secret:
        raise none("answers with nonsense")
    if username == _TOKEN_USERNAME:
        raise none("has an identity token, which is not supported; use an access token as the password")
    return Login(username, secret)


class ProgramCredentials(RenewingCredentials):
    """The login that a helper has for one server, asked for again every ten minutes at the latest."""

    def __init__(self, name: str, server: str, *, upstream: str, clock: Clock, spawn: Spawn) -> None:
        async def fetch() -> Lease:
            return Lease(await login_of_program(name, server, upstream=upstream), PROGRAM_LIFETIME_S)

        super().__init__(f"helper:{name}", fetch, clock=clock, spawn=spawn)


class DockerConfigCredentials:
    """The login that a Docker config.json has for a registry: its helper's, else what it stores.

    As Docker does: `credHelpers` for the registry, then `credsStore` for all, then `auths`. Passes the `Credentials`
    port; the file is read again once it has changed.
    """

    def __init__(self, path: str, registry: str, *, upstream: str, clock: Clock, spawn: Spawn) -> None:
        self._file = WatchedFile(path, upstream=upstream)
        self._path = path
        self._registry = registry
        self._upstream = upstream
        self._clock = clock
        self._spawn = spawn
        self._helpers: dict[tuple[str, str], Credentials] = {}

    @property
    def identity(self) -> str:
        """The registry's entry in the file."""
        return f"docker-config:{self._registry}"

    async def login(self) -> Login:
        """What the file, or the helper that it names, has now. Raises Unauthorised when there is nothing."""
        document = _object(await self._file.read())
        keys = keys_of(self._registry)
        helpers, auths = _table(document, "credHelpers"), _table(document, "auths")
        for key in keys:
            if isinstance(name := helpers.get(key), str):
                return await self._helped(name, key)
        store = document.get("credsStore")
        if isinstance(store, str) and store:
            try:
                return await self._helped(store, next((key for key in keys if key in auths), keys[0]))
            except UpstreamError:
                if not any(self._stored(auths.get(key)) for key in keys):
                    raise
        for key in keys:
            if (found := self._stored(auths.get(key))) is not None:
                return found
        raise Unauthorised(
            f"upstream {self._upstream}: {self._path} has no login for {self._registry}", upstream=self._upstream
        )

    async def _helped(self, name: str, server: str) -> Login:
        key = (name, server)
        if key not in self._helpers:
            self._helpers[key] = ProgramCredentials(
                name, server, upstream=self._upstream, clock=self._clock, spawn=self._spawn
            )
        return await self._helpers[key].login()

    @staticmethod
    def _stored(entry: object) -> Login | None:
        if not isinstance(entry, dict):
            return None
        username, password, packed = entry.get("username"), entry.get("password"), entry.get("auth")
        if isinstance(username, str) and isinstance(password, str) and password:
            return Login(username, password)
        if not isinstance(packed, str) or not packed:
            return None
        try:
            name, mark, secret = base64.b64decode(packed, validate=True).decode("utf-8").partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        return Login(name, secret.rstrip("\0")) if mark else None

    def __repr__(self) -> str:
        return f"DockerConfigCredentials({self._path!r}, {self._registry!r})"


def _object(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    return document if isinstance(document, dict) else {}


def _table(document: dict[str, Any], key: str) -> dict[str, Any]:
    found = document.get(key)
    return found if isinstance(found, dict) else {}
