"""upstream/credentials: each source of logins against an endpoint that checks what it is sent, and helpers as programs."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from proxy.engine.tasks import TaskOwner
from proxy.errors import Misbehaved, Unauthorised, Unreachable, UpstreamError
from proxy.upstream.credentials import Login
from proxy.upstream.credentials.acr import AcrCredentials
from proxy.upstream.credentials.docker_config import HUB_KEY, DockerConfigCredentials, ProgramCredentials
from proxy.upstream.credentials.ecr import EcrCredentials, region_of
from proxy.upstream.credentials.files import FileCredentials
from proxy.upstream.credentials.gar import GarCredentials
from proxy.upstream.credentials.renewing import Lease, RenewingCredentials
from proxy.upstream.credentials.sigv4 import AwsKeys, signed
from tests.support.clock import ManualClock
from tests.support.endpoint import Came, Endpoint

HOST = "registry.test"
ECR_HOST = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
SECRET = "hunter2-of-the-source"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def owner() -> AsyncIterator[TaskOwner]:
    made = TaskOwner(print)
    yield made
    await made.aclose()


@pytest.fixture
def words(clock: ManualClock, owner: TaskOwner) -> dict[str, Any]:
    """What every source that renews takes."""
    return {"clock": clock, "spawn": owner.spawn}


# -- renewal -----------------------------------------------------------------------------------------------------------


class Source:
    """Counts what it is asked; gives logins that hold an hour, or fails."""

    def __init__(self) -> None:
        self.n_asked = 0
        self.failure: UpstreamError | None = None
        self.gate: asyncio.Event | None = None

    async def fetch(self) -> Lease:
        """The next login."""
        self.n_asked += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return Lease(Login("u", f"secret-{self.n_asked}"), 3600.0)


async def test_one_fetch_for_all_who_wait(words: dict[str, Any]) -> None:
    """A rollout must not become a storm at a token endpoint; one who leaves takes nobody with them."""
    source = Source()
    source.gate = asyncio.Event()
    credentials = RenewingCredentials("test", source.fetch, **words)
    waiting = [asyncio.create_task(credentials.login()) for _ in range(20)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    source.gate.set()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert source.n_asked == 1
    assert [one.secret for one in found[1:] if isinstance(one, Login)] == ["secret-1"] * 19


async def test_it_is_renewed_before_it_ends_and_nobody_waits(words: dict[str, Any], clock: ManualClock) -> None:
    """The old login is given while the new one is fetched beside."""
    source = Source()
    credentials = RenewingCredentials("test", source.fetch, **words)
    await credentials.login()
    await clock.advance(3600 * 0.8 - 1)
    assert (await credentials.login()).secret == "secret-1"
    await asyncio.sleep(0)
    assert source.n_asked == 1
    await clock.advance(2.0)
    assert (await credentials.login()).secret == "secret-1"
    for _ in range(3):
        await asyncio.sleep(0)
    assert (await credentials.login()).secret == "secret-2"


async def test_a_source_that_fails_costs_nothing_while_the_login_holds(
    words: dict[str, Any], clock: ManualClock
) -> None:
    """Renewed early means that there is time for a second attempt; and then the failure is told as what it is."""
    source = Source()
    credentials = RenewingCredentials("test", source.fetch, **words)
    await credentials.login()
    source.failure = Unreachable("down", upstream=HOST)
    await clock.advance(3590.0)
    assert (await credentials.login()).secret == "secret-1"
    await asyncio.sleep(0)
    await clock.advance(11.0)
    for _ in range(5):
        with pytest.raises(Unreachable):
            await credentials.login()
    assert source.n_asked <= 3
    source.failure = None
    await clock.advance(30.0)
    assert (await credentials.login()).secret.startswith("secret-")


# -- files -------------------------------------------------------------------------------------------------------------


async def test_a_secret_in_a_file_is_read_again_once_it_changed(tmp_path: Path) -> None:
    """Secrets are rotated by replacing the file, also below a link that is swapped (Kubernetes)."""
    path = tmp_path / "secret"
    path.write_text("one\n")
    credentials = FileCredentials("u", str(path), upstream=HOST)
    assert await credentials.login() == Login("u", "one")
    (tmp_path / "new").write_text("two\n")
    (tmp_path / "new").rename(path)
    assert await credentials.login() == Login("u", "two")
    path.unlink()
    with pytest.raises(Unauthorised, match="cannot read"):
        await credentials.login()
    assert "two" not in repr(credentials)


# -- docker config and helpers -----------------------------------------------------------------------------------------


def helper(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real executable on the PATH."""
    program = folder / f"docker-credential-{name}"
    program.write_text(f"#!{sys.executable}\nimport json, sys, os\nserver = sys.stdin.read()\n{script}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def config(folder: Path, document: Mapping[str, Any]) -> str:
    """A config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(document))
    return str(path)


def packed(username: str, secret: str) -> dict[str, str]:
    """An entry of auths."""
    return {"auth": base64.b64encode(f"{username}:{secret}".encode()).decode()}


@pytest.mark.parametrize(
    ("registry", "key"),
    [("docker.io", HUB_KEY), (HOST, HOST), (HOST, f"https://{HOST}"), ("r.test:5000", "r.test:5000")],
)
async def test_what_docker_login_stored_is_found(
    registry: str, key: str, tmp_path: Path, words: dict[str, Any]
) -> None:
    """Docker Hub stands under an address of old; others under their host."""
    path = config(tmp_path, {"auths": {key: packed("u", "p:w"), "other.test": packed("x", "y")}})
    found = await DockerConfigCredentials(path, registry, upstream=HOST, **words).login()
    assert found == Login("u", "p:w")


@pytest.mark.parametrize(
    "document",
    [{}, {"auths": {HOST: {}}}, {"auths": {HOST: {"auth": "###"}}}, {"auths": 7}, {"credHelpers": []}],
    ids=str,
)
async def test_a_file_without_the_login_says_so(
    document: Mapping[str, Any], tmp_path: Path, words: dict[str, Any]
) -> None:
    """And never what else is in it."""
    path = config(tmp_path, {**document, "x": SECRET})
    with pytest.raises(Unauthorised) as told:
        await DockerConfigCredentials(path, HOST, upstream=HOST, **words).login()
    assert "has no login for registry.test" in str(told.value)
    assert SECRET not in str(told.value)


async def test_a_helper_is_told_the_server_on_its_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, Any]
) -> None:
    """credHelpers before credsStore before auths; nothing but "get" is an argument."""
    said = 'json.dump({"ServerURL": server, "Username": "%s", "Secret": " ".join(sys.argv[1:]) + " " + server}, sys.stdout)'
    helper(tmp_path, "one", said % "one", monkeypatch)
    helper(tmp_path, "store", said % "store", monkeypatch)
    document = {
        "auths": {HOST: packed("u", "p"), "b.test": {}},
        "credHelpers": {HOST: "one"},
        "credsStore": "store",
    }
    path = config(tmp_path, document)
    assert await DockerConfigCredentials(path, HOST, upstream=HOST, **words).login() == Login("one", f"get {HOST}")
    assert await DockerConfigCredentials(path, "b.test", upstream=HOST, **words).login() == Login("store", "get b.test")


@pytest.mark.parametrize(
    ("name", "script", "says"),
    [
        ("absent", None, "is not installed"),
        ("../../bin/sh", None, "is not installed"),
        ("refuses", f"print('{SECRET}'); sys.exit(1)", "has none for"),
        ("babbles", "print('not json')", "answers with nonsense"),
        ("empty", "print('{}')", "answers with nonsense"),
        ("token", 'print(json.dumps({"Username": "<token>", "Secret": "t"}))', "identity token"),
    ],
)
async def test_a_helper_that_has_nothing_is_named(
    name: str, script: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, Any]
) -> None:
    """The sentence says which program, and nothing of what it printed."""
    if script is not None:
        helper(tmp_path, name, script, monkeypatch)
    with pytest.raises(Unauthorised) as told:
        await ProgramCredentials(name, HOST, upstream=HOST, **words).login()
    assert says in str(told.value)
    assert SECRET not in str(told.value)


# -- AWS ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "region"),
    [
        (ECR_HOST, "eu-west-1"),
        ("123456789012.dkr.ecr-fips.us-gov-west-1.amazonaws.com", "us-gov-west-1"),
        ("123456789012.dkr.ecr.cn-north-1.amazonaws.com.cn", "cn-north-1"),
        ("123456789012.dkr-ecr.eu-west-1.on.aws", "eu-west-1"),
        ("registry.corp.test", None),
    ],
)
def test_the_region_is_in_the_host(host: str, region: str | None) -> None:
    """ECR's own names say it."""
    assert region_of(host) == region


@pytest.mark.parametrize("token", ["", "session/token=="], ids=["keys", "temporary keys"])
def test_the_signature_is_botocores(token: str) -> None:
    """Two implementations of one rule agree to the byte."""
    from botocore.auth import SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    url, body = "https://api.ecr.eu-west-1.amazonaws.com/", b'{"a": "b"}'
    headers = {"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": "Some.Thing"}
    theirs = AWSRequest("POST", url, data=body, headers=headers)
    signer = SigV4Auth(Credentials("AKIA", "secret", token or None), "ecr", "eu-west-1")
    signer.add_auth(theirs)
    stamp = theirs.headers["X-Amz-Date"]
    ours = signed(url, headers, body, AwsKeys("AKIA", "secret", token), region="eu-west-1", service="ecr", stamp=stamp)
    assert ours["Authorization"] == theirs.headers["Authorization"]


def ecr_answer(came: Came) -> tuple[int, object]:
    """ECR, STS, a container's endpoint and a metadata service in one."""
    if came.target == "/latest/api/token":
        return (200, b"imds-token") if came.method == "PUT" else (405, b"")
    if came.target.startswith("/latest/meta-data"):
        if came.headers.get("x-aws-ec2-metadata-token") != "imds-token":
            return 401, b""
        keys = {"AccessKeyId": "INSTANCE", "SecretAccessKey": "s", "Token": "t"}
        return 200, b"my-role" if came.target.endswith("/") else keys
    if came.target == "/container":
        good = came.headers.get("authorization") == "from-file"
        return (200, {"AccessKeyId": "CONTAINER", "SecretAccessKey": "s", "Token": "t"}) if good else (403, b"")
    if came.form.get("Action") == "AssumeRoleWithWebIdentity":
        good = came.form["WebIdentityToken"] == "jwt" and came.form["RoleArn"] == "arn:role"
        xml = b"<C><AccessKeyId>WEB</AccessKeyId><SecretAccessKey>s</SecretAccessKey><SessionToken>t</SessionToken></C>"
        return (200, xml) if good else (403, b"")
    entry = {"authorizationToken": base64.b64encode(b"AWS:" + SECRET.encode()).decode(), "expiresAt": 1_800_003_600.0}
    is_public = came.headers["x-amz-target"].startswith("Spencer")
    return 200, {"authorizationData": entry if is_public else [entry]}


@pytest.mark.parametrize("source", ["keys", "web identity", "container", "instance"])
async def test_ecr_with_every_identity_of_a_machine(source: str, tmp_path: Path, words: dict[str, Any]) -> None:
    """Found in the order of AWS's own tools; what signs the request is what the source gave."""
    (tmp_path / "token").write_text("jwt")
    (tmp_path / "container").write_text("from-file")
    async with Endpoint(ecr_answer) as aws:
        environ = {
            "keys": {"AWS_ACCESS_KEY_ID": "ENV", "AWS_SECRET_ACCESS_KEY": "s"},
            "web identity": {
                "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"),
                "AWS_ROLE_ARN": "arn:role",
                "AWS_ENDPOINT_URL_STS": aws.url,
            },
            "container": {
                "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{aws.url}/container",
                "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(tmp_path / "container"),
            },
            "instance": {},
        }[source]
        credentials = EcrCredentials(
            ECR_HOST, is_public=False, region="", endpoint=aws.url, environ=environ, metadata=aws.url, **words
        )
        assert await credentials.login() == Login("AWS", SECRET)
        asked = aws.came[-1]
        key = {"keys": "ENV", "web identity": "WEB", "container": "CONTAINER", "instance": "INSTANCE"}[source]
        assert f"Credential={key}/20270115/eu-west-1/ecr/aws4_request" in asked.headers["authorization"]
        assert SECRET not in repr(credentials)


async def test_public_ecr_is_asked_in_its_own_words(words: dict[str, Any]) -> None:
    """us-east-1 and nothing else, under another service's name."""
    async with Endpoint(ecr_answer) as aws:
        environ = {"AWS_ACCESS_KEY_ID": "ENV", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "eu-west-1"}
        credentials = EcrCredentials(
            "public.ecr.aws", is_public=True, region="", endpoint=aws.url, environ=environ, **words
        )
        assert (await credentials.login()).secret == SECRET
        assert "/us-east-1/ecr-public/" in aws.came[-1].headers["authorization"]


# -- Google ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


async def test_google_with_a_key_checks_the_statement(
    key: rsa.RSAPrivateKey, tmp_path: Path, words: dict[str, Any], clock: ManualClock
) -> None:
    """RFC 7523: who, for what, to whom, from when until when; signed with the key of the file."""

    def answer(came: Came) -> tuple[int, object]:
        if came.form.get("grant_type") != "urn:ietf:params:oauth:grant-type:jwt-bearer":
            return 400, {}
        claims = jwt.decode(
            came.form["assertion"],
            key.public_key(),
            ["RS256"],
            audience=came_audience,
            options={"verify_exp": False, "verify_iat": False},
        )
        good = claims["iss"] == "robot@project" and claims["exp"] - claims["iat"] == 3600
        return (200, {"access_token": SECRET, "expires_in": 3599}) if good and "read" in claims["scope"] else (401, {})

    async with Endpoint(answer) as google:
        came_audience = google.url
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()
        path = tmp_path / "key.json"
        path.write_text(json.dumps({"client_email": "robot@project", "private_key": pem, "token_uri": google.url}))
        credentials = GarCredentials(HOST, key_file=str(path), endpoint="", **words)
        assert await credentials.login() == Login("oauth2accesstoken", SECRET)
        path.write_text('{"client_email": "' + SECRET + '"}')
        await clock.advance(4000)
        with pytest.raises(Unauthorised) as told:
            await credentials.login()
        assert SECRET not in str(told.value)


async def test_google_with_the_metadata_server(words: dict[str, Any]) -> None:
    """Nothing is asked without the header that a confused client would not send."""

    def answer(came: Came) -> tuple[int, object]:
        good = came.headers.get("metadata-flavor") == "Google" and came.method == "GET"
        return (200, {"access_token": SECRET, "expires_in": 100}) if good else (403, {})

    async with Endpoint(answer) as google:
        credentials = GarCredentials(HOST, key_file="", endpoint="", metadata=google.url, **words)
        assert await credentials.login() == Login("oauth2accesstoken", SECRET)
        assert google.came[0].target == "/computeMetadata/v1/instance/service-accounts/default/token"


# -- Azure -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["client secret", "workload identity"])
async def test_azure_asks_entra_and_then_the_registry(how: str, tmp_path: Path, words: dict[str, Any]) -> None:
    """Each is shown what is meant for it: the secret never reaches the registry."""
    (tmp_path / "secret").write_text("the-secret\n")

    def answer(came: Came) -> tuple[int, object]:
        form = came.form
        if came.target == "/tenant/oauth2/v2.0/token":
            good = form["client_id"] == "app" and form["grant_type"] == "client_credentials"
            shown = form.get("client_secret") if how == "client secret" else form.get("client_assertion")
            return (200, {"access_token": "entra"}) if good and shown == "the-secret" else (401, {})
        if came.target == "/oauth2/exchange" and form["access_token"] == "entra" and form["tenant"] == "tenant":
            assert b"the-secret" not in came.body
            return 200, {"refresh_token": SECRET}
        return 404, {}

    async with Endpoint(answer) as azure:
        is_secret = how == "client secret"
        environ = {"AZURE_TENANT_ID": "tenant", "AZURE_CLIENT_ID": "app"}
        if not is_secret:
            environ["AZURE_FEDERATED_TOKEN_FILE"] = str(tmp_path / "secret")
        credentials = AcrCredentials(
            HOST,
            azure.url,
            tenant="",
            client_id="",
            secret_file=str(tmp_path / "secret") if is_secret else "",
            endpoint=azure.url,
            environ=environ,
            **words,
        )
        assert await credentials.login() == Login("00000000-0000-0000-0000-000000000000", SECRET)


def test_azure_without_an_identity_is_a_mistake_in_the_settings(words: dict[str, Any]) -> None:
    """Said at the start, not at the first pull."""
    with pytest.raises(ValueError, match="who are we to Azure"):
        AcrCredentials(HOST, "https://x", tenant="", client_id="", secret_file="", endpoint="", environ={}, **words)


# -- sources that fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, {"error": SECRET}, Unauthorised),
        (401, {}, Unauthorised),
        (403, {}, Unauthorised),
        (429, {}, Unreachable),
        (500, {}, Unreachable),
        (302, {}, Misbehaved),
        (200, b"<html>", Misbehaved),
        (200, {"access_token": ""}, Misbehaved),
        (200, b"x" * 100_000, Misbehaved),
    ],
)
async def test_a_source_that_fails_is_told_apart(
    status: int, body: object, error: type[UpstreamError], words: dict[str, Any]
) -> None:
    """In our classes, without a word of what was sent or received, and no redirect is followed."""
    async with Endpoint(lambda _: (status, body)) as google:
        with pytest.raises(error) as told:
            await GarCredentials(HOST, key_file="", endpoint=google.url, **words).login()
        assert SECRET not in str(told.value)
        assert google.n_connections == 1


async def test_a_source_that_is_not_there_is_unreachable(words: dict[str, Any]) -> None:
    """As an upstream that is not there."""
    async with Endpoint(lambda _: (200, {})) as gone:
        url = gone.url
    with pytest.raises(Unreachable):
        await GarCredentials(HOST, key_file="", endpoint=url, **words).login()


# -- all of them -------------------------------------------------------------------------------------------------------

#: What each cloud's endpoints answer, how many requests one login costs, and for how many seconds it holds.
CLOUDS: dict[str, tuple[int, float]] = {
    "ecr": (1, 3600.0),
    "ecr-public": (1, 3600.0),
    "gar": (1, 3600.0),
    "acr": (2, 3 * 3600.0 - 900.0),
}


def cloud_answer(came: Came) -> tuple[int, object]:
    """All the clouds in one."""
    if "x-amz-target" in came.headers:
        return ecr_answer(came)
    if came.target.startswith("/computeMetadata/"):
        return 200, {"access_token": SECRET, "expires_in": 3600}
    if came.target == "/oauth2/exchange":
        return 200, {"refresh_token": SECRET}
    return 200, {"access_token": "entra"}


def cloud(name: str, url: str, folder: Path, words: dict[str, Any]) -> RenewingCredentials:
    """A cloud's source of logins, all of its endpoints at `url`."""
    environ = {"AWS_ACCESS_KEY_ID": "ENV", "AWS_SECRET_ACCESS_KEY": "s"}
    if name.startswith("ecr"):
        return EcrCredentials(
            ECR_HOST, is_public=name == "ecr-public", region="", endpoint=url, environ=environ, **words
        )
    if name == "gar":
        return GarCredentials(HOST, key_file="", endpoint=url, **words)
    (folder / "secret").write_text("s")
    app: dict[str, Any] = {"tenant": "t", "client_id": "c", "secret_file": str(folder / "secret"), "environ": {}}
    return AcrCredentials(HOST, url, endpoint=url, **app, **words)


@pytest.mark.parametrize(("name", "n_requests", "life_s"), [(name, *told) for name, told in CLOUDS.items()])
async def test_each_cloud_is_asked_once_for_all_and_early(
    name: str, n_requests: int, life_s: float, tmp_path: Path, words: dict[str, Any], clock: ManualClock
) -> None:
    """Twenty who ask at once cost one login; past four fifths of its life one renewal runs, and nobody waits for it."""
    async with Endpoint(cloud_answer) as endpoint:
        credentials = cloud(name, endpoint.url, tmp_path, words)
        found = await asyncio.gather(*(credentials.login() for _ in range(20)))
        assert {one.secret for one in found} == {SECRET}
        assert len(endpoint.came) == n_requests
        await clock.advance(0.79 * life_s)
        await asyncio.gather(*(credentials.login() for _ in range(20)))
        assert len(endpoint.came) == n_requests
        await clock.advance(0.02 * life_s)
        before = clock.monotonic()
        found = await asyncio.gather(*(credentials.login() for _ in range(20)))
        assert {one.secret for one in found} == {SECRET}
        flight = credentials._flight
        assert flight is not None
        await flight
        await asyncio.gather(*(credentials.login() for _ in range(20)))
        assert len(endpoint.came) == 2 * n_requests
        assert clock.monotonic() == before
