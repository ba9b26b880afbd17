"""Azure Container Registry: a Microsoft Entra token, exchanged at the registry for a refresh token of its own.

The Entra token is had with a client secret or with a federated token (workload identity on AKS), whose file is read
anew each time. The exchange is ACR's own (Azure/acr docs, AAD-OAuth.md); its refresh token is the password.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from proxy.ports import Clock
from proxy.upstream.credentials import Login
from proxy.upstream.credentials.files import WatchedFile
from proxy.upstream.credentials.renewing import Lease, RenewingCredentials
from proxy.upstream.credentials.source import asked_json, word
from proxy.upstream.tokens import Spawn

USERNAME = "00000000-0000-0000-0000-000000000000"
AUTHORITY = "https://login.microsoftonline.com"
_SCOPE = "https://containerregistry.azure.net/.default"
_ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
#: ACR's refresh tokens hold three hours and do not say so but inside; renewed well before.
_LIFETIME_S = 3 * 3600.0 - 900.0


class AcrCredentials(RenewingCredentials):
    """A login for the registry at `url`. What is not given ("") is taken from the AZURE_ variables of `environ`.

    `endpoint`: the authority, "" for Microsoft's. Raises ValueError when something is missing.
    """

    def __init__(
        self,
        host: str,
        url: str,
        *,
        tenant: str,
        client_id: str,
        secret_file: str,
        endpoint: str,
        environ: Mapping[str, str],
        clock: Clock,
        spawn: Spawn,
    ) -> None:
        super().__init__(f"acr:{host}", self._fetch_login, clock=clock, spawn=spawn)
        self._host = host
        self._url = url.rstrip("/")
        self._tenant = tenant or environ.get("AZURE_TENANT_ID", "")
        self._client_id = client_id or environ.get("AZURE_CLIENT_ID", "")
        self._authority = (endpoint or environ.get("AZURE_AUTHORITY_HOST") or AUTHORITY).rstrip("/")
        federated = environ.get("AZURE_FEDERATED_TOKEN_FILE", "")
        self._is_secret = bool(secret_file)
        if not self._tenant or not self._client_id or not (secret_file or federated):
            raise ValueError(
                "who are we to Azure? Write tenant, client_id and secret_file, or run with a workload identity"
            )
        self._file = WatchedFile(secret_file or federated, upstream=host)

    async def _fetch_login(self) -> Lease:
        secret = (await self._file.read()).strip()
        form = {"grant_type": "client_credentials", "client_id": self._client_id, "scope": _SCOPE}
        if self._is_secret:
            form["client_secret"] = secret
        else:
            form |= {"client_assertion_type": _ASSERTION, "client_assertion": secret}
        entra = await asked_json(
            "POST", f"{self._authority}/{self._tenant}/oauth2/v2.0/token", upstream=self._host, form=form
        )
        access = word(entra, "access_token", upstream=self._host, source="Microsoft Entra")
        form = {
            "grant_type": "access_token",
            "service": urlsplit(self._url).netloc,
            "tenant": self._tenant,
            "access_token": access,
        }
        given = await asked_json("POST", f"{self._url}/oauth2/exchange", upstream=self._host, form=form)
        refresh = word(given, "refresh_token", upstream=self._host, source="the registry")
        return Lease(Login(USERNAME, refresh), _LIFETIME_S)
