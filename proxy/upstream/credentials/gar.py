"""Google Artifact Registry (and gcr.io): an access token of a service account is the password.

With a key file the token is asked for with a signed statement (RFC 7523; developers.google.com/identity/protocols/
oauth2/service-account); without one the metadata server of the machine or pod (GKE workload identity) has it. PyJWT
signs: it is here already, and google-auth would bring requests and its own threads for the same two requests.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jwt

from proxy.errors import Unauthorised
from proxy.ports import Clock
from proxy.upstream.credentials import Login
from proxy.upstream.credentials.files import WatchedFile
from proxy.upstream.credentials.renewing import Lease, RenewingCredentials
from proxy.upstream.credentials.source import asked_json, word
from proxy.upstream.tokens import Spawn

USERNAME = "oauth2accesstoken"
METADATA = "http://metadata.google.internal"
_TOKEN_URI = "https://oauth2.googleapis.com/token"
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_only https://www.googleapis.com/auth/cloud-platform.read-only"
_DEFAULT_S = 600.0
_MOST_S = 3600.0


class GarCredentials(RenewingCredentials):
    """A login for `host`. `key_file`: a service account's key in JSON, "" for the metadata server at `metadata`.

    `endpoint`: instead of the token endpoint that the key names, "" for that.
    """

    def __init__(
        self, host: str, *, key_file: str, endpoint: str, clock: Clock, spawn: Spawn, metadata: str = METADATA
    ) -> None:
        super().__init__(f"gar:{host}", self._fetch_login, clock=clock, spawn=spawn)
        self._host = host
        self._file = WatchedFile(key_file, upstream=host) if key_file else None
        self._endpoint = endpoint
        self._metadata = metadata

    async def _fetch_login(self) -> Lease:
        document = await (self._of_metadata() if self._file is None else self._of_key(self._file))
        token = word(document, "access_token", upstream=self._host, source="Google")
        lifetime = document.get("expires_in")
        if isinstance(lifetime, bool) or not isinstance(lifetime, int | float) or lifetime <= 0:
            lifetime = _DEFAULT_S
        return Lease(Login(USERNAME, token), min(float(lifetime), _MOST_S))

    async def _of_metadata(self) -> dict[str, Any]:
        base = self._endpoint or self._metadata
        url = f"{base.rstrip('/')}/computeMetadata/v1/instance/service-accounts/default/token"
        return await asked_json("GET", url, upstream=self._host, headers={"Metadata-Flavor": "Google"})

    async def _of_key(self, file: WatchedFile) -> dict[str, Any]:
        text = await file.read()
        uri, assertion = await asyncio.to_thread(self._assertion, text)  # RSA takes milliseconds
        form = {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": assertion}
        return await asked_json("POST", uri, upstream=self._host, form=form)

    def _assertion(self, text: str) -> tuple[str, str]:
        try:
            key = json.loads(text)
            now = int(self._clock.wall())
            uri = self._endpoint or key.get("token_uri") or _TOKEN_URI
            claims = {
                "iss": key["client_email"],
                "scope": _SCOPE,
                "aud": key.get("token_uri") or uri,
                "iat": now,
                "exp": now + 3600,
            }
            return uri, jwt.encode(claims, key["private_key"], "RS256", headers={"kid": key.get("private_key_id", "")})
        except (ValueError, KeyError, TypeError, AttributeError, jwt.PyJWTError):
            raise Unauthorised(
                f"upstream {self._host}: no login, the key file is not a service account's key", upstream=self._host
            ) from None
