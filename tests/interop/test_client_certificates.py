"""`server.tls.client_ca`: real clients show a certificate of that CA, or are not let in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import trustme

from tests.interop.conftest import upstreams_at
from tests.interop.test_client_setup import files_in, printed
from tests.support.clients import TEST_HOST, Containerd
from tests.support.images import image
from tests.support.origin import Origin
from tests.support.process import Breakwater, CommandFailed, program, run

_SEED = count(9100)


@dataclass(frozen=True)
class Guarded:
    """Breakwater behind TLS that asks for certificates, and what a node needs to be let in."""

    breakwater: Breakwater
    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def pair(self) -> tuple[Path, Path]:
        return self.folder / "client.cert", self.folder / "client.key"

    def stranger(self) -> Path:
        """A folder with our CA and a certificate of somebody else's."""
        folder = self.folder / "stranger"
        folder.mkdir(exist_ok=True)
        (folder / "ca.crt").write_bytes(self.ca.read_bytes())
        _write(trustme.CA().issue_cert("node"), folder / "client.cert", folder / "client.key")
        return folder


def _write(issued: trustme.LeafCert, cert: Path, key: Path) -> None:
    cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())


@pytest.fixture(scope="module")
def guarded(scratch: Path, origin: Origin) -> Iterator[Guarded]:
    folder = scratch / "certificates"
    folder.mkdir()
    servers, nodes = trustme.CA(), trustme.CA()
    servers.cert_pem.write_to_path(str(folder / "ca.crt"))
    nodes.cert_pem.write_to_path(str(folder / "nodes.pem"))
    _write(servers.issue_cert("127.0.0.1"), folder / "server.pem", folder / "server-key.pem")
    _write(nodes.issue_cert("node"), folder / "client.cert", folder / "client.key")
    settings = upstreams_at(origin.url)
    tls = {"cert": folder / "server.pem", "key": folder / "server-key.pem", "client_ca": folder / "nodes.pem"}
    settings["server"]["tls"] = {name: str(path) for name, path in tls.items()}
    breakwater = Breakwater(folder / "breakwater", settings)
    breakwater.is_ready = lambda: "Breakwater " in breakwater.log()  # type: ignore[method-assign]  # it speaks TLS
    with breakwater:
        yield Guarded(breakwater, folder)
        breakwater.stop_cleanly()


def _inspect(guarded: Guarded, repository: str, certificates: Path) -> str:
    reference = f"docker://{guarded.breakwater.address}/{TEST_HOST}/{repository}:1"
    return run([program("skopeo"), "inspect", "--cert-dir", str(certificates), "--format", "{{.Digest}}", reference])


def test_a_node_with_a_certificate_pulls(guarded: Guarded, origin: Origin) -> None:
    """skopeo takes its pair and the CA from a folder, as podman and Docker do."""
    repository = f"team/shown-{next(_SEED)}"
    pushed = origin.push(repository, "1", image(next(_SEED), (1000, 2000)))
    assert _inspect(guarded, repository, guarded.folder).strip() == pushed.digest


def test_containerd_set_up_as_printed_shows_its_certificate(scratch: Path, guarded: Guarded, origin: Origin) -> None:
    """The printed hosts.toml has a line for the pair; with the node's paths in it, it works as it stands."""
    setup = files_in(printed(guarded.breakwater, TEST_HOST))[f"/etc/containerd/certs.d/{TEST_HOST}/hosts.toml"]
    setup = re.sub(r"# (ca|client) = ", r"\1 = ", setup).replace("/path/to/ca.pem", str(guarded.ca))
    for placeholder, path in zip(("/path/to/client.pem", "/path/to/client.key"), guarded.pair, strict=True):
        assert placeholder in setup
        setup = setup.replace(placeholder, str(path))
    repository = f"team/shown-{next(_SEED)}"
    pushed = origin.push(repository, "1", image(next(_SEED), (1000, 2000)))
    with Containerd(scratch / f"certified-{next(_SEED)}", guarded.breakwater.address, setup) as client:
        assert client.pull(repository, "1") == pushed.digest


@pytest.mark.parametrize("who", ["nobody", "a stranger"])
def test_who_shows_no_certificate_of_the_ca_is_not_let_in(guarded: Guarded, origin: Origin, who: str) -> None:
    """TLS ends before a request is read; operators see no traceback of it."""
    repository = f"team/shown-{next(_SEED)}"
    origin.push(repository, "1", image(next(_SEED), (1000, 2000)))
    folder = guarded.stranger()
    if who == "nobody":
        (folder / "client.cert").unlink()
        (folder / "client.key").unlink()
    with pytest.raises(CommandFailed, match=r"(?i)certificate"):
        _inspect(guarded, repository, folder)
    assert repository not in guarded.breakwater.log()
    assert "Traceback" not in guarded.breakwater.log()


def test_a_client_ca_that_is_none_is_refused_at_the_start(scratch: Path, guarded: Guarded, origin: Origin) -> None:
    """Exit code 2 and a line with the file's name: half a guard would let everybody in."""
    folder = scratch / "no-ca"
    folder.mkdir()
    settings = upstreams_at(origin.url)
    tls = {
        "cert": guarded.folder / "server.pem",
        "key": guarded.folder / "server-key.pem",
        "client_ca": folder / "none.pem",
    }
    settings["server"]["tls"] = {name: str(path) for name, path in tls.items()}
    breakwater = Breakwater(folder, settings)
    with pytest.raises(AssertionError, match=r"none\.pem"):
        breakwater.start()
    assert "Traceback" not in breakwater.log()
