"""AWS ECR, private and public: GetAuthorizationToken with whatever identity the machine or pod has.

The identity is looked for in the order of AWS's own tools, without their files: keys in the environment, a web
identity (IRSA: an EKS service account), the container's endpoint (ECS, EKS pod identity), the instance's metadata
service in its version 2.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from datetime import UTC, datetime

from proxy.errors import Misbehaved, Unauthorised
from proxy.ports import Clock
from proxy.upstream.credentials import Login
from proxy.upstream.credentials.files import WatchedFile
from proxy.upstream.credentials.renewing import Lease, RenewingCredentials
from proxy.upstream.credentials.sigv4 import AwsKeys, signed
from proxy.upstream.credentials.source import asked, asked_json, word
from proxy.upstream.tokens import Spawn

_HOST = re.compile(r"[0-9]{12}\.dkr[.-]ecr(?:-fips)?\.([a-z0-9-]+)\.(amazonaws\.com(?:\.cn)?|on\.aws)")
#: ECR's tokens hold twelve hours; what says otherwise is not believed beyond that.
_MOST_S = 12 * 3600.0
_LEAST_S = 60.0
METADATA = "http://169.254.169.254"
_ECS = "http://169.254.170.2"


def region_of(host: str) -> str | None:
    """The region that a private ECR's host names."""
    found = _HOST.fullmatch(host)
    return found[1] if found else None


class EcrCredentials(RenewingCredentials):
    """A login for ECR. `is_public`: for public.ecr.aws. `endpoint`: instead of AWS's API, "" for AWS's.

    Raises ValueError when no region is known.
    """

    def __init__(
        self,
        host: str,
        *,
        is_public: bool,
        region: str,
        endpoint: str,
        environ: Mapping[str, str],
        clock: Clock,
        spawn: Spawn,
        metadata: str = METADATA,
    ) -> None:
        super().__init__(f"ecr:{host}", self._fetch_login, clock=clock, spawn=spawn)
        named = region or region_of(host) or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or ""
        self._region = "us-east-1" if is_public else named
        if not self._region:
            raise ValueError("which AWS region? The host does not say; write region")
        self._host = host
        self._is_public = is_public
        self._service = "ecr-public" if is_public else "ecr"
        suffix = ".cn" if self._region.startswith("cn-") else ""
        self._endpoint = endpoint or f"https://api.{self._service}.{self._region}.amazonaws.com{suffix}"
        self._sts = environ.get("AWS_ENDPOINT_URL_STS") or f"https://sts.{self._region}.amazonaws.com{suffix}"
        self._environ = environ
        self._metadata = metadata
        path = environ.get("AWS_WEB_IDENTITY_TOKEN_FILE")
        self._identity_file = WatchedFile(path, upstream=host) if path else None
        path = environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
        self._container_file = WatchedFile(path, upstream=host) if path else None

    async def _fetch_login(self) -> Lease:
        keys = await self._keys()
        target = "SpencerFrontendService" if self._is_public else "AmazonEC2ContainerRegistry_V20150921"
        headers = {"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": f"{target}.GetAuthorizationToken"}
        url = self._endpoint.rstrip("/") + "/"
        stamp = datetime.fromtimestamp(self._clock.wall(), UTC).strftime("%Y%m%dT%H%M%SZ")
        headers = signed(url, headers, b"{}", keys, region=self._region, service=self._service, stamp=stamp)
        document = await asked_json("POST", url, upstream=self._host, headers=headers, body=b"{}")
        found = document.get("authorizationData")
        entry = found[0] if isinstance(found, list) and found else found
        if not isinstance(entry, dict):
            raise self._nonsense("ECR")
        packed = word(entry, "authorizationToken", upstream=self._host, source="ECR")
        try:
            username, _, secret = base64.b64decode(packed, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            raise self._nonsense("ECR") from None
        expires = entry.get("expiresAt")
        lifetime = float(expires) - self._clock.wall() if isinstance(expires, int | float) else _MOST_S
        return Lease(Login(username, secret), min(max(lifetime, _LEAST_S), _MOST_S))

    # -- who we are to AWS ---------------------------------------------------------------------------------------------

    async def _keys(self) -> AwsKeys:
        environ = self._environ
        if (key := environ.get("AWS_ACCESS_KEY_ID")) and (secret := environ.get("AWS_SECRET_ACCESS_KEY")):
            return AwsKeys(key, secret, environ.get("AWS_SESSION_TOKEN", ""))
        if self._identity_file is not None and (role := environ.get("AWS_ROLE_ARN")):
            return await self._web_identity(role, (await self._identity_file.read()).strip())
        if full := environ.get("AWS_CONTAINER_CREDENTIALS_FULL_URI"):
            return await self._container(full)
        if relative := environ.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"):
            return await self._container(f"{_ECS}/{relative.lstrip('/')}")
        return await self._instance()

    async def _web_identity(self, role: str, token: str) -> AwsKeys:
        form = {
            "Action": "AssumeRoleWithWebIdentity",
            "Version": "2011-06-15",
            "RoleArn": role,
            "RoleSessionName": self._environ.get("AWS_ROLE_SESSION_NAME") or "breakwater",
            "WebIdentityToken": token,
        }
        text = await asked("POST", self._sts.rstrip("/") + "/", upstream=self._host, form=form)
        # Three elements of one known answer: no parser of XML, and none of its surprises.
        found = {
            name: match[1].strip()
            for name in ("AccessKeyId", "SecretAccessKey", "SessionToken")
            if (match := re.search(f"<{name}>([^<]+)</{name}>", text))
        }
        if len(found) != 3:
            raise self._nonsense("STS")
        return AwsKeys(found["AccessKeyId"], found["SecretAccessKey"], found["SessionToken"])

    async def _container(self, url: str) -> AwsKeys:
        token = self._environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN", "")
        if self._container_file is not None:
            token = (await self._container_file.read()).strip()
        headers = {"Authorization": token} if token else {}
        return self._read(
            await asked_json("GET", url, upstream=self._host, headers=headers), "the container's endpoint"
        )

    async def _instance(self) -> AwsKeys:
        base = f"{self._metadata}/latest"
        ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "300"}
        token = await asked("PUT", f"{base}/api/token", upstream=self._host, headers=ttl)
        headers = {"X-aws-ec2-metadata-token": token}
        roles = f"{base}/meta-data/iam/security-credentials/"
        role = (await asked("GET", roles, upstream=self._host, headers=headers)).strip()
        if not re.fullmatch(r"[\w+=,.@-]+", role):
            raise Unauthorised(f"upstream {self._host}: no login, this instance has no role", upstream=self._host)
        found = await asked_json("GET", f"{roles}{role}", upstream=self._host, headers=headers)
        return self._read(found, "the metadata service")

    def _read(self, document: Mapping[str, object], source: str) -> AwsKeys:
        key = word(document, "AccessKeyId", upstream=self._host, source=source)
        secret = word(document, "SecretAccessKey", upstream=self._host, source=source)
        return AwsKeys(key, secret, str(document.get("Token") or ""))

    def _nonsense(self, source: str) -> Misbehaved:
        return Misbehaved(f"upstream {self._host}: no login, {source} answers with nonsense", upstream=self._host)
