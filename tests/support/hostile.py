"""Archives that mean harm, from a generator: each one a name, what it is, and the whole file.

Made with `tarfile` and by hand; nothing here knows the package under test. Every one must be refused: those that only
look odd have no place here.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import random
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

import zstandard

Members = list[tuple[tarfile.TarInfo, bytes]]

_HEX = "0" * 64


def archives(n_random: int = 60) -> Iterator[tuple[str, bytes]]:
    """(what it is, the file). `n_random` more are damaged at places that a fixed seed chooses."""
    yield from _names()
    yield from _kinds()
    yield from _twice()
    yield from _sizes()
    yield from _lies()
    yield from _documents()
    yield from _packings()
    yield from _docker()
    yield from _damaged(n_random)


# -- a good one, to spoil ----------------------------------------------------------------------------------------------


def good() -> Members:
    """A layout with one small image, as anybody would write it."""
    config = b'{"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}}'
    layer = b"not really a layer" * 100
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _descriptor(config, "application/vnd.oci.image.config.v1+json"),
            "layers": [_descriptor(layer, "application/vnd.oci.image.layer.v1.tar")],
        }
    ).encode()
    entry = _descriptor(manifest, "application/vnd.oci.image.manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": "registry.test/hostile/image:1"}
    index = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
    return [
        file("oci-layout", b'{"imageLayoutVersion": "1.0.0"}'),
        file("index.json", index),
        *(file(f"blobs/sha256/{hashlib.sha256(body).hexdigest()}", body) for body in (manifest, config, layer)),
    ]


def file(name: str, body: bytes) -> tuple[tarfile.TarInfo, bytes]:
    """A plain member."""
    info = tarfile.TarInfo(name)
    info.size = len(body)
    return info, body


def written(members: Members, format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of these, whatever they are."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for info, body in members:
            tar.addfile(info, io.BytesIO(body) if body else None)
    return out.getvalue()


def _descriptor(body: bytes, media_type: str) -> dict[str, object]:
    return {"mediaType": media_type, "digest": f"sha256:{hashlib.sha256(body).hexdigest()}", "size": len(body)}


# -- the kinds of harm -------------------------------------------------------------------------------------------------


def _names() -> Iterator[tuple[str, bytes]]:
    names = [
        "../outside",
        "../../../../../../../../tmp/outside",
        "/tmp/outside",
        "//tmp/outside",
        "blobs/../../outside",
        "blobs/sha256/../../../outside",
        "./../outside",
        "./.././outside",
        "..",
        "blobs/sha256/..",
        "..\\outside",
        "C:\\outside",
        "\\\\host\\share",
        f"blobs/sha256/{_HEX}/",
        f"blobs/sha256/{_HEX}\n",
        f"blobs/sha256/{_HEX[1:]}",
        f"blobs/sha256/{_HEX}0",
        f"blobs/sha256/{'A' * 64}",
        f"blobs/md5/{'0' * 32}",
        f"blobs/sha512/{_HEX}",
        f"blobs/SHA256/{_HEX}",
        f"blobs//sha256/{_HEX}",
        f"./blobs/./sha256/{_HEX}",
        f"blobs/sha256/{_HEX}.tar",
        "index.json\n",
        "index.json/x",
        "INDEX.JSON",
        "etc/passwd",
        "x" * 600,
        "a/" * 300 + "x",
        "\u2024\u2024/outside",
        "\u202eindex.json",
        "blobs/sha256/\x1b[2J",
        ".ssh/authorized_keys",
        "oci-layout/../../outside",
    ]
    for name in names:
        info, body = file(name, b"harm")
        shown = repr(name) if len(name) < 100 else f"{name[:20]!r} and {len(name)} signs in all"
        yield f"a name: {shown}", written([*good(), (info, body)])
        yield f"a name, in GNU's format: {shown}", written([(info, body), *good()], tarfile.GNU_FORMAT)
    for name in names[:12]:
        info, _ = file(name, b"")
        info.type = tarfile.DIRTYPE
        if ".." in name or name.startswith(("/", "\\", "C")):
            yield f"a folder: {name!r}", written([(info, b""), *good()])


def _kinds() -> Iterator[tuple[str, bytes]]:
    kinds = {
        "a hard link": tarfile.LNKTYPE,
        "a symbolic link": tarfile.SYMTYPE,
        "a character device": tarfile.CHRTYPE,
        "a block device": tarfile.BLKTYPE,
        "a fifo": tarfile.FIFOTYPE,
        "a contiguous file": tarfile.CONTTYPE,
        "an old sparse file": tarfile.GNUTYPE_SPARSE,
        "a type nobody knows": b"Z",
        "a volume header": b"V",
        "a multi-volume part": b"M",
        "a folder of files": b"D",
    }
    for what, kind in kinds.items():
        for name in ("index.json", f"blobs/sha256/{_HEX}", "outside"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            rest = [member for member in good() if member[0].name != name]
            yield f"{what} called {name[:20]}", _raw([(info, b""), *rest])
    for target in ("/etc/passwd", "../../../etc/passwd", "index.json", f"blobs/sha256/{_HEX}"):
        link = tarfile.TarInfo("escape")
        link.type, link.linkname = tarfile.SYMTYPE, target
        through, body = file("escape/file", b"harm")
        yield f"a link to {target[:30]}, and a file through it", written([(link, b""), (through, body), *good()])
    chain = []
    for n in range(3):
        link = tarfile.TarInfo(f"link{n}")
        link.type, link.linkname = tarfile.SYMTYPE, f"link{n + 1}" if n < 2 else "../outside"
        chain.append((link, b""))
    yield "a chain of links", written([*chain, *good()])


def _raw(members: Members) -> bytes:
    """Header and body as they are said, where tarfile would not write them so."""
    out = b""
    for info, body in members:
        out += info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)
    return out + bytes(1024)


def _twice() -> Iterator[tuple[str, bytes]]:
    members = good()
    for member in members:
        yield f"{member[0].name[:20]} twice", written([*members, member])
    body = members[1][1]
    yield "index.json twice, once with a dot", written([*members, file("./index.json", body)])
    yield "index.json and another one", written([*members, file("index.json", b'{"manifests": []}')])


def _sizes() -> Iterator[tuple[str, bytes]]:
    def spoiled(field: bytes) -> bytes:
        info, body = good()[0]
        block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        block[124:136] = field
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block) + body + bytes(-len(body) % 512) + written(good()[1:])

    yield "a negative size", spoiled(b"\xff" * 12)
    yield "a size of minus one block", spoiled(b"\xff" * 10 + b"\xfe\x00")
    yield "a size beyond all disks", spoiled(b"\x80" + b"\xff" * 11)
    yield "a size of four exabytes", spoiled(b"\x80\0\0\0" + (1 << 62).to_bytes(8, "big"))
    yield "a size that is no number", spoiled(b"eleven bytes")
    yield "a document of 2 GiB", spoiled(b"%011o\0" % (2 << 30))
    for key, value in {
        "size": "99999999999999999999",
        "size ": "1",
        "GNU.sparse.major": "1",
        "GNU.sparse.map": "0,1",
        "GNU.sparse.realsize": "1099511627776",
        "GNU.sparse.name": "index.json",
    }.items():
        info, body = good()[1]
        info.pax_headers = {key: value}
        yield f"a pax key {key}={value[:12]}", written([good()[0], (info, body), *good()[2:]])
    for value in ("-1", "1e9", "0x10"):
        record = f" size={value}\n"
        length = len(record) + 2
        yield f"a pax size of {value}", _extended(tarfile.XHDTYPE, f"{length}{record}".encode())
    for kind, what in ((tarfile.XHDTYPE, "a pax header"), (tarfile.GNUTYPE_LONGNAME, "a long name")):
        yield f"{what} of 64 MiB", gzip.compress(_extended(kind, bytes(64 << 20)), 1)
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = kind, 1 << 40
        yield f"{what} that says a terabyte", info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    for what, records in {
        "a path outside": {"path": "../outside"},
        "an absolute path": {"path": "/etc/passwd"},
        "a path that is another member's": {"path": "index.json"},
        "a path with a zero byte": {"path": "index.json\0/../../outside"},
        "another character set": {"path": "x", "hdrcharset": "BINARY"},
        "less than its size": {"size": "0"},
        "more than its size": {"size": "4096"},
        "two paths": {"path": "index.json", "path ": "../outside"},
    }.items():
        plain, rest = good()[2], [*good()[:2], *good()[3:]]
        header = b"".join(_pax(key, value) for key, value in records.items())
        body = plain[0].tobuf(tarfile.GNU_FORMAT) + plain[1] + bytes(-len(plain[1]) % 512)
        yield f"a pax header with {what}", _extension(tarfile.XHDTYPE, header) + body + written(rest)
    twice = _extension(tarfile.XHDTYPE, _pax("path", "../outside")) + _extension(
        tarfile.GNUTYPE_LONGNAME, b"oci-layout"
    )
    yield "a pax path and a long name of one member", twice + _raw([(file("oci-layout", b"")[0], b""), *good()])
    yield "a global pax header", _extended(tarfile.XGLTYPE, b"18 path=index.json")
    yield "pax records without lengths", _extended(tarfile.XHDTYPE, b"path=../outside\n")
    yield "a pax record longer than its header", _extended(tarfile.XHDTYPE, b"9999 path=x\n")
    yield "a pax record of no length", _extended(tarfile.XHDTYPE, b"0 path=x\n")
    yield "a long name that is not UTF-8", _extended(tarfile.GNUTYPE_LONGNAME, b"\xff\xfe\0")


def _extended(kind: bytes, body: bytes) -> bytes:
    return _extension(kind, body) + written(good())


def _extension(kind: bytes, body: bytes) -> bytes:
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = kind, len(body)
    return info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)


def _pax(key: str, value: str) -> bytes:
    """One record: its own length in decimal first."""
    rest = f" {key}={value}\n".encode()
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length += 1
    return str(length).encode() + rest


def _lies() -> Iterator[tuple[str, bytes]]:
    members = good()
    for n in (2, 3, 4):
        info, body = members[n]
        spoiled = bytearray(body)
        spoiled[len(body) // 2] ^= 1
        yield f"member {n} with one bit flipped", written([*members[:n], (info, bytes(spoiled)), *members[n + 1 :]])
        yield f"member {n} empty", written([*members[:n], file(info.name, b""), *members[n + 1 :]])
    contents = {
        "breakwater": 1,
        "created_at": 0,
        "images": 1,
        "documents": {},
        "members": {f"sha256:{info.name[13:]}": info.size for info, _ in members[2:]},
        "elsewhere": {},
        "left_out": [],
    }

    def with_contents(**change: object) -> Members:
        return [file("breakwater.json", json.dumps(contents | change).encode()), *members]

    sizes = dict(contents["members"])  # type: ignore[call-overload]
    yield "contents that name more than there is", written(with_contents(members=sizes | {f"sha256:{_HEX}": 1}))
    yield "contents that name less than there is", written(with_contents(members={}))
    yield "contents with a wrong size", written(with_contents(members=dict.fromkeys(sizes, 1)))
    yield "contents of an exabyte", written(with_contents(members=sizes | {f"sha256:{_HEX}": 1 << 60}))
    yield "contents that build on what is not here", written(with_contents(elsewhere={f"sha256:{_HEX}": 1}))
    yield "contents with another index", written(with_contents(documents={"index.json": f"sha256:{_HEX}"}))
    yield "contents of another version", written(with_contents(breakwater=2))
    yield "contents that are no JSON", written([file("breakwater.json", b"{"), *members])
    yield "contents that come last", written([*members, with_contents()[0]])
    yield "contents twice", written([with_contents()[0], *with_contents()])
    yield "contents of 20 MiB", written([file("breakwater.json", b" " * (20 << 20)), *members])


def _documents() -> Iterator[tuple[str, bytes]]:
    members = good()

    def replaced(name: str, body: bytes | None) -> bytes:
        rest = [member for member in members if member[0].name != name]
        return written(rest if body is None else [file(name, body), *rest])

    for name in ("oci-layout", "index.json"):
        yield f"no {name}", replaced(name, None)
        twice = b'{"manifests": [], "manifests": [], "imageLayoutVersion": "1", "imageLayoutVersion": "1"}'
        for what, body in {
            "no JSON": b"{",
            "a list": b"[]",
            "a number": b"1",
            "not UTF-8": b"\xff\xff",
            "nested without end": b'{"manifests": ' + b"[" * 200_000,
            "one key twice": twice,
        }.items():
            yield f"{name} is {what}", replaced(name, body)
    yield "a layout of another version", replaced("oci-layout", b'{"imageLayoutVersion": "9.0.0"}')
    yield "an index of 9 MiB", replaced("index.json", b" " * (9 << 20))
    for what, entry in {
        "no digest": {"mediaType": "x", "size": 1},
        "a path for a digest": {"mediaType": "x", "digest": "sha256:../../etc/passwd", "size": 1},
        "a negative size": {"mediaType": "x", "digest": f"sha256:{_HEX}", "size": -1},
        "no object": 7,
    }.items():
        body = json.dumps({"manifests": [entry]}).encode()
        yield f"an index whose entry has {what}", replaced("index.json", body)


def _packings() -> Iterator[tuple[str, bytes]]:
    plain = written(good())
    packed = gzip.compress(plain)
    yield "gzip, cut short", packed[: len(packed) // 2]
    yield "gzip, damaged", packed[:40] + b"\0\0\0\0" + packed[44:]
    yield "gzip of nothing", gzip.compress(b"")
    yield "gzip within gzip", gzip.compress(packed)
    yield "zstd that is none", b"\x28\xb5\x2f\xfd" + bytes(100)
    yield "xz", lzma.compress(plain)
    yield "zip", b"PK\x03\x04" + bytes(100)
    yield "nothing at all", b""
    yield "text", b"this is not an archive\n" * 100
    yield "a bomb: 256 MiB of zeros, in gzip", b"".join(_bomb(zlib.compressobj(1, wbits=31)))
    yield "a bomb: 256 MiB of zeros, in zstd", b"".join(_bomb(zstandard.ZstdCompressor(level=1).compressobj()))
    wide = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=27))
    yield "zstd with a window of 128 MiB", b"".join(_bomb(wide.compressobj()))
    yield "a bomb within a bomb", gzip.compress(b"".join(_bomb(zlib.compressobj(1, wbits=31))), 1)
    # Ten thousand names at a time; beyond what anybody reads they are the same again.
    parts = [
        gzip.compress(b"".join(_numbered(n) for n in range(at, at + 10_000)), 1) for at in range(0, 110_000, 10_000)
    ]
    yield "a million members", b"".join([*parts, *(parts[-1:] * 89)])


def _numbered(n: int) -> bytes:
    """An empty member whose name is a number: written by hand, since tarfile takes its time over each."""
    block = b"blobs/sha256/%064d" % n
    block = block.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"00000000000\0" * 2
    rest = b"0" + bytes(100) + b"ustar  \0" + bytes(247)
    return block + b"%06o\0 " % (sum(block) + 8 * 32 + sum(rest)) + rest


class _Packer(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


def _bomb(packer: _Packer) -> Iterator[bytes]:
    """A good layout, and one member more: a quarter of a gigabyte of zeros under a name that they do not hash to."""
    plain = written(good()).rstrip(b"\0")
    info = tarfile.TarInfo(f"blobs/sha256/{_HEX}")
    info.size = 1 << 28
    yield packer.compress(plain + bytes(-len(plain) % 512) + info.tobuf())
    for _ in range(256):
        yield packer.compress(bytes(1 << 20))
    yield packer.compress(bytes(1024))
    yield packer.flush()


def _docker() -> Iterator[tuple[str, bytes]]:
    layer, config = file(f"{_HEX}/layer.tar", b"layer"), file("config.json", b"{}")

    def saved(document: object, *more: tuple[tarfile.TarInfo, bytes]) -> bytes:
        return written([layer, config, *more, file("manifest.json", json.dumps(document).encode())])

    image = {"Config": "config.json", "RepoTags": ["registry.test/x:1"], "Layers": [f"{_HEX}/layer.tar"]}
    changes: dict[str, dict[str, object]] = {
        "a config that is not there": {"Config": "other.json"},
        "a layer that is not there": {"Layers": ["../../etc/passwd"]},
        "layers that are no list": {"Layers": 7},
    }
    for what, change in changes.items():
        yield f"docker-save with {what}", saved([image | change])
    yield "docker-save that is no list", saved(7)
    for target in ("/etc/passwd", "../../../etc/passwd", "../config.json", f"../{_HEX}/../x/layer.tar"):
        link = tarfile.TarInfo(f"{'1' * 64}/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, target
        yield f"docker-save with a link to {target[:40]}", saved([image], (link, b""))
    link = tarfile.TarInfo(f"{'1' * 64}/layer.tar")
    link.type, link.linkname = tarfile.SYMTYPE, f"../{'1' * 64}/layer.tar"
    yield "docker-save with a link to itself", saved([image | {"Layers": [link.name]}], (link, b""))


def _damaged(n_random: int) -> Iterator[tuple[str, bytes]]:
    plain, chance = written(good()), random.Random("hostile")
    content = plain.rstrip(b"\0")
    flips: Callable[[], int] = lambda: chance.randrange(500)  # noqa: E731  # within the first header: its sum is wrong
    for n in range(n_random // 2):
        at = flips()
        yield f"damaged {n}: byte {at} of the first header", plain[:at] + bytes([plain[at] ^ 0x55]) + plain[at + 1 :]
    for n in range(n_random - n_random // 2):
        at = chance.randrange(1, len(content))
        yield f"damaged {n}: cut off after {at} bytes", plain[:at]
