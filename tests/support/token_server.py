"""A token server as docker-registry expects one (distribution's token specification): signs with a key of its own, for
whoever shows the right login, what may be had; and keeps what it was asked. Nothing of the package under test."""

from __future__ import annotations

import base64
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Self
from urllib.parse import parse_qsl, urlsplit

import jwt
import trustme
from cryptography.hazmat.primitives.serialization import load_pem_private_key


class TokenServer:
    """Listens on 127.0.0.1 while entered. Public repositories are read by everybody, the others with `login`."""

    ISSUER = "issuer.test"
    SERVICE = "registry.test"

    def __init__(self, folder: Path, login: tuple[str, str], *, public: str, lifetime_s: int = 300) -> None:
        """`public` is how the names of public repositories begin. `bundle` is what the registry trusts."""
        authority = trustme.CA()
        issued = authority.issue_cert("tokens.test", key_type=trustme.KeyType.ECDSA)
        folder.mkdir(parents=True, exist_ok=True)
        self.bundle = folder / "bundle.pem"
        authority.cert_pem.write_to_path(str(self.bundle))
        self._key = load_pem_private_key(issued.private_key_pem.bytes(), password=None)
        pem = issued.cert_chain_pems[0].bytes().decode()
        self._x5c = ["".join(pem.strip().splitlines()[1:-1])]
        self.login = login
        self.lifetime_s = lifetime_s
        self._public = public
        #: (status, scope, whether a login was shown) of each request.
        self.asked: list[tuple[int, str, bool]] = []

    @property
    def settings(self) -> dict[str, object]:
        """The registry's `auth` section."""
        words = {"realm": f"{self.url}/token", "service": self.SERVICE, "issuer": self.ISSUER}
        return {"token": {**words, "rootcertbundle": str(self.bundle)}}

    @property
    def url(self) -> str:
        """Its address, without a slash at the end."""
        return f"http://{self.address}"

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        server = self

        class Answering(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, document = server._answer(self.path, self.headers.get("Authorization"))
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Kept in `asked`."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, target: str, authorization: str | None) -> tuple[int, dict[str, object]]:
        query = dict(parse_qsl(urlsplit(target).query))
        scope = query.get("scope", "")
        kind, name, actions = (*scope.split(":"), "", "")[:3]
        shown = (authorization or "").removeprefix("Basic ")
        if authorization is not None and shown != base64.b64encode(":".join(self.login).encode()).decode():
            self.asked.append((401, scope, True))
            return 401, {"details": "incorrect username or password"}
        may = authorization is not None or name.startswith(self._public)
        access = [{"type": kind, "name": name, "actions": actions.split(",")}] if kind and may else []
        now = int(time.time())
        claims = {
            "iss": self.ISSUER,
            "sub": self.login[0] if authorization is not None else "",
            "aud": query.get("service", ""),
            "nbf": now - 10,
            "iat": now,
            "exp": now + self.lifetime_s,
            "jti": str(len(self.asked)),
            "access": access,
        }
        self.asked.append((200, scope, authorization is not None))
        token = jwt.encode(claims, self._key, "ES256", headers={"x5c": self._x5c})  # type: ignore[arg-type]  # of EC
        return 200, {"token": token, "expires_in": self.lifetime_s}
