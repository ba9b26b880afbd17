"""Where requests of one upstream may go, and what they may carry there (INV-7).

Pure. Decides on URLs as they are written; `wire.py` judges the addresses that their names resolve to. A URL that passes
is sent byte for byte as it came: signed URLs break when somebody tidies them.
"""

from __future__ import annotations

import re

from yarl import URL

from proxy.errors import Misbehaved
from proxy.upstream.addresses import Address, literal, why_denied
from proxy.upstream.policy import UpstreamPolicy

#: Visible ASCII without the characters that parsers of URLs disagree about (RFC 3986 § 2), and without a fragment.
_URL = re.compile(r"[!$%&'()*+,\-./0-9:;=?@A-Z\[\]_a-z~]+")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\.?")


def origin(url: URL) -> tuple[str, str, int | None]:
    """Scheme, host and port: what credentials belong to (RFC 6454)."""
    return url.scheme, (url.raw_host or "").lower(), url.port


def shown(url: URL) -> str:
    """`url` as it may be written in a log: without its query, where signatures are."""
    return f"{url.scheme}://{url.raw_authority}{url.raw_path}"[:300]


class Targets:
    """The URLs that one upstream's requests may be sent to.

    Raises ValueError when the policy's own `url` is not usable.
    """

    def __init__(self, policy: UpstreamPolicy) -> None:
        self._policy = policy
        base = URL(policy.url, encoded=True)
        if not _URL.fullmatch(policy.url) or "?" in policy.url:
            raise ValueError(f"{policy.host}: its url is not the address of a registry")
        self.base = base.with_path(base.raw_path.rstrip("/"), encoded=True)
        self._is_plain = base.scheme == "http"
        self._own = (literal(base.raw_host or ""), base.port)
        try:
            self.check(base)
        except Misbehaved as problem:
            raise ValueError(str(problem)) from None

    def at(self, path: str) -> URL:
        """The upstream's own URL for `path` (and query), already encoded, which starts at /v2/.

        A base with /v2/ in its own path names the repositories of one registry behind another, as containerd's
        `override_path` does: `https://mirror/v2/quay.io`.
        """
        if "/v2/" in self.base.raw_path:
            path = path.removeprefix("/v2")
        return URL(f"{str(self.base).rstrip('/')}{path}", encoded=True)

    def is_home(self, url: URL) -> bool:
        """Whether `url` is of the upstream's own origin, and so may receive what is meant for it."""
        return origin(url) == origin(self.base)

    def redirect(self, current: URL, location: str) -> URL:
        """Where `location`, received from `current`, leads. Raises Misbehaved when nobody may be led there."""
        if not _URL.fullmatch(location):
            raise self._misbehaved("redirects to something that is not a URL")
        try:
            url = URL(location, encoded=True)
            # Joining tidies dot segments, so an absolute location is taken as it is.
            target = url if url.scheme else current.join(url)
        except ValueError:
            raise self._misbehaved("redirects to something that is not a URL") from None
        self.check(target)
        return target

    def realm(self, text: str) -> URL:
        """The token realm that a challenge names. Raises Misbehaved when it is not one that we ask (CVE-2026-33540)."""
        try:
            url = URL(text, encoded=True)
        except ValueError:
            raise self._misbehaved("names a token realm that is not a URL") from None
        if not _URL.fullmatch(text):
            raise self._misbehaved("names a token realm that is not a URL")
        self.check(url)
        return url

    def receives_credentials(self, realm: URL) -> bool:
        """Whether the credentials may be sent to `realm`: the upstream's own origin, or a host that the settings name.

        A named host without a port means every port of it. Another port of the upstream's own host is another service,
        and has to be named.
        """
        if self.is_home(realm):
            return True
        host = (realm.raw_host or "").lower()
        bracketed = f"[{host}]" if ":" in host else host
        return not self._policy.token_realms.isdisjoint({bracketed, f"{bracketed}:{realm.port}"})

    def check(self, url: URL) -> None:
        """Raises Misbehaved unless a request may be sent to `url`, as far as can be told without resolving its name."""
        try:
            host, port, place = url.raw_host, url.port, shown(url)
        except ValueError:  # yarl reads the authority of an encoded URL only when it is asked for a part of it
            raise self._misbehaved("leads to something that is not a URL") from None
        if url.scheme not in ("http", "https") or not host or port is None or port == 0:
            raise self._misbehaved(f"leads to {place}, which is not http or https at some host")
        if url.scheme == "http" and not self._is_plain:
            raise self._misbehaved(f"leads from https to plain {place}; https is kept")
        if "@" in url.raw_authority:
            raise self._misbehaved("leads to a URL that carries a user name")
        try:
            address = literal(host)
        except ValueError:
            raise self._misbehaved(f"leads to {host[:80]}, an address spelled in an unusual way") from None
        if address is None:
            if not _NAME.fullmatch(host):
                raise self._misbehaved(f"leads to {host[:80]!r}, which is not a host name")
        elif why := self.why_denied(address, port):
            raise self._misbehaved(f"leads to {address}, a {why} address; set allow_private if that is meant")

    def why_denied(self, address: Address, port: int) -> str | None:
        """What is wrong with connecting to `address` at `port`, or None.

        A literal `url` permits its own address and port, and nothing else of that machine.
        """
        if (address, port) == self._own:
            return None
        return why_denied(address, allow_private=self._policy.allow_private)

    def _misbehaved(self, sentence: str) -> Misbehaved:
        return Misbehaved(f"upstream {self._policy.host} {sentence}", upstream=self._policy.host)
