"""prefetch, export and import: what may be asked, progress while it runs, and the report.

A running server does the work when one has the store; otherwise it is done here, with the store's lock held.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from proxy.cli import FAILED, _config, _load
from proxy.spelled import plain, size

Each = Callable[[Mapping[str, Any]], None]

#: Options that say what to carry.
_files = click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    metavar="FILE",
    help="A list of images, or Kubernetes manifests; - for standard input; repeatable.",
)
_platform = click.option(
    "--platform",
    "platforms",
    metavar="LIST",
    default="all",
    show_default=True,
    help="As linux/amd64,linux/arm64; or all.",
)
_referrers = click.option(
    "--referrers/--no-referrers",
    default=True,
    show_default=True,
    help="Signatures, SBOMs and whatever else refers to it.",
)
_project = click.option("--project", metavar="NAME", help="Through this project.")
_json = click.option("--json", "as_json", is_flag=True, help="For programs: the report, and nothing else.")


# -- prefetch ----------------------------------------------------------------------------------------------------------


@click.command()
@_config
@click.argument("references", nargs=-1, metavar="[REF]...")
@_files
@_platform
@_referrers
@_project
@click.option("--pin", is_flag=True, help="Keep what is listed from eviction.")
@_json
def prefetch(
    config: str | None,
    references: tuple[str, ...],
    files: tuple[str, ...],
    platforms: str,
    referrers: bool,
    project: str | None,
    pin: bool,
    as_json: bool,
) -> None:
    """Fill the store with the images of a list.

    Exit code 1 when anything of them is missing; the report says what and why. What is here is not fetched again.
    """
    order = _order(references, files, platforms, referrers, project, pin=pin)
    settings = _load(config).settings

    from proxy.cli import talking

    with _Progress(as_json) as progress:
        if talking.serves(settings):
            body = json.dumps(order.as_json()).encode()
            report = talking.told(
                settings, "/api/v1/prefetch", [body], {"Content-Type": "application/json"}, progress.step
            )
        else:
            from proxy import alone

            report = alone.carry(settings, lambda freight: freight.prefetch(order, progress.step))
    _finish(report, as_json)


# -- export ------------------------------------------------------------------------------------------------------------


def _size(_: click.Context, __: click.Parameter, given: str | None) -> int | None:
    from proxy.settings.values import size_of

    if given is None:
        return None
    try:
        n_bytes = size_of(given)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if n_bytes < 1 << 20:
        raise click.BadParameter("parts of less than 1MiB are none")
    return n_bytes


@click.command()
@_config
@click.argument("references", nargs=-1, metavar="[REF]...")
@_files
@click.option("-o", "--output", required=True, metavar="FILE", type=click.Path(path_type=Path), help="The bundle.")
@_platform
@_referrers
@click.option("--project", metavar="NAME", help="Through this project; all that it has, where no image is named.")
@click.option(
    "--since",
    multiple=True,
    metavar="BUNDLE",
    type=click.Path(path_type=Path),
    help="Leave out what this earlier bundle brought; repeatable.",
)
@click.option("--split", metavar="SIZE", callback=_size, help='Into FILE.001 and so on of at most this size: "4GiB".')
@click.option("--zstd", is_flag=True, help="Packed. Layers mostly are already.")
@click.option("--sign", metavar="KEY", type=click.Path(path_type=Path), help="Ed25519 key in PEM; makes FILE.sig.")
@_json
def export(
    config: str | None,
    references: tuple[str, ...],
    files: tuple[str, ...],
    output: Path,
    platforms: str,
    referrers: bool,
    project: str | None,
    since: tuple[Path, ...],
    split: int | None,
    zstd: bool,
    sign: Path | None,
    as_json: bool,
) -> None:
    """Write images of the store into a bundle.

    An OCI image layout in a tar, which skopeo, podman, ctr and docker read, too. Nothing is fetched: prefetch first.
    Nothing is written, and the exit code is 1, when anything is missing.
    """
    order = _order(references, files, platforms, referrers, project, may_be_empty=project is not None)
    settings = _load(config).settings

    from proxy.archives import signatures
    from proxy.archives.files import Writing
    from proxy.cli import talking

    earlier = [_contents(path) for path in since]
    if sign is not None:
        signatures.sign(b"", sign)  # a wrong key is found out before the work and not after it
    writing = Writing(output, split=split, is_packed=zstd)
    try:
        with _Progress(as_json) as progress:
            if talking.serves(settings):
                asked = {**order.as_json(), "since": [json.loads(body) for body in earlier]}
                report = talking.fetched(settings, "/api/v1/export", json.dumps(asked).encode(), writing.write)
            else:
                report = _export_here(settings, order, earlier, writing, progress.step)
        if report is not None:
            _finish(report, as_json)
        names = writing.finish()
    except BaseException:
        writing.give_up()
        raise
    if sign is not None:
        output.with_name(f"{output.name}.sig").write_bytes(signatures.sign(writing.contents, sign))
    _say_written(writing.contents, names, writing.n_bytes, as_json)


def _export_here(settings: Any, order: Any, earlier: list[bytes], writing: Any, each: Each) -> dict[str, Any] | None:
    import asyncio

    from proxy import alone
    from proxy.oci.layout import Contents

    async def work(freight: Any) -> dict[str, Any] | None:
        plan, report = await freight.plan_export(order, [Contents.parse(body) for body in earlier])
        if not plan.is_whole:
            return dict(report)
        async for piece in freight.bundle(plan, each):
            await asyncio.to_thread(writing.write, piece)
        return None

    return alone.carry(settings, work)


def _contents(path: Path) -> bytes:
    """The contents of an earlier bundle. Raises UsageError for a file that is none of ours."""
    from proxy.archives.files import Bundle, grouped

    [paths] = grouped([path])
    bundle = Bundle.look(paths)
    if not bundle.contents:
        raise click.UsageError(f"--since {path}: that is not a bundle of Breakwater's")
    return bundle.contents


def _say_written(contents: bytes, names: list[Path], n_bytes: int, as_json: bool) -> None:
    from proxy.oci.digest import Digest
    from proxy.oci.layout import Contents

    read = Contents.parse(contents)
    if as_json:
        report = {
            "event": "report",
            "n_images": read.n_images,
            "n_missing": 0,
            "files": [str(name) for name in names],
            "n_bytes": n_bytes,
            "n_blobs": len(read.members),
            "n_blobs_elsewhere": len(read.elsewhere),
            "contents": str(Digest.of(contents)),
        }
        click.echo(json.dumps(report, indent=2))
        return
    without = f", without {len(read.elsewhere)} blobs that are there already" if read.elsewhere else ""
    click.echo(f"{read.n_images} images, {len(read.members)} blobs, {size(n_bytes)}{without}, in:")
    for name in names:
        click.echo(str(name))


# -- import ------------------------------------------------------------------------------------------------------------


@click.command("import")
@_config
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@click.option("--key", metavar="KEY", type=click.Path(path_type=Path), help="Take only what this public key signed.")
@click.option("--name", metavar="REF", default="", help="For an archive that says no name, or only a tag.")
@_project
@click.option("--pin", is_flag=True, help="Keep what is imported from eviction.")
@_json
def take(
    config: str | None,
    files: tuple[Path, ...],
    key: Path | None,
    name: str,
    project: str | None,
    pin: bool,
    as_json: bool,
) -> None:
    """Take bundles into the store.

    Bundles of export, whole or in parts, and OCI layouts and docker-save archives that other tools wrote. An image is
    there when all of it is, and not before. What is refused leaves nothing; what was interrupted goes on.
    """
    settings = _load(config).settings

    from proxy.archives.files import Bundle, grouped
    from proxy.engine.intake import Terms

    bundles = [Bundle.look(paths) for paths in grouped(files)]
    images: list[Any] = []
    contents: list[Any] = []
    with _Progress(as_json) as progress:
        for bundle in bundles:
            digest, signed_by = _signature(bundle, key)
            terms = Terms(digest, signed_by, name, project, pin)
            report = _take_one(settings, bundle, terms, progress.step)
            images += report["images"]
            contents.append({**report["contents"], "file": str(bundle.paths[0])})
    _finish(
        {
            "event": "report",
            "images": images,
            "n_images": len(images),
            "n_missing": sum(bool(image["missing"]) for image in images),
            "bundles": contents,
            "fetched_bytes": sum(one["new_bytes"] for one in contents),
        },
        as_json,
    )


def _take_one(settings: Any, bundle: Any, terms: Any, each: Each) -> dict[str, Any]:
    from urllib.parse import urlencode

    from proxy import alone
    from proxy.cli import talking

    if not talking.serves(settings):
        return alone.carry(settings, lambda freight: freight.take(_in_thread(bundle.pieces()), terms, each))
    asked = {"contents": terms.contents, "signed_by": terms.signed_by, "name": terms.name, "project": terms.project}
    query = urlencode(
        {key: str(value) for key, value in asked.items() if value} | ({"pin": "true"} if terms.pin else {})
    )
    headers = {"Content-Type": "application/x-tar"}
    return talking.told(settings, f"/api/v1/import?{query}", bundle.pieces(), headers, each)


async def _in_thread(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Files are read, and packed ones unpacked, beside the loop."""
    import asyncio

    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece


def _signature(bundle: Any, key: Path | None) -> tuple[Any, str]:
    """The digest that the contents must have, and who signed; None and "" where no key is asked for."""
    if key is None:
        return None, ""
    from proxy.archives import signatures
    from proxy.errors import BadArchive
    from proxy.oci.digest import Digest

    first = bundle.paths[0]
    stem = first.name.removesuffix(".001") if len(bundle.paths) > 1 else first.name
    path = first.with_name(f"{stem}.sig")
    if not path.exists() and first.name.endswith(".001"):
        path = first.with_name(f"{first.name.removesuffix('.001')}.sig")
    try:
        signature = path.read_bytes()
    except OSError as error:
        raise BadArchive(f"{first} is not signed: cannot read {path}: {error.strerror}") from error
    if not bundle.contents:
        raise BadArchive(f"{first} is not signed: it does not begin with its contents")
    return Digest.of(bundle.contents), signatures.check(bundle.contents, signature, key)


commands: list[click.Command] = [prefetch, export, take]


# -- what they share ---------------------------------------------------------------------------------------------------


def _order(
    references: tuple[str, ...],
    files: tuple[str, ...],
    platforms: str,
    referrers: bool,
    project: str | None,
    *,
    pin: bool = False,
    may_be_empty: bool = False,
) -> Any:
    """The order, from arguments and lists. Raises UsageError with every problem of every list."""
    from proxy import image_lists
    from proxy.engine.freight import Order
    from proxy.engine.walk import Scope
    from proxy.rules.closure import Platforms
    from proxy.rules.lists import in_lines, merged

    asked = merged([in_lines("\n".join(references)), *(image_lists.read(_text(name), name) for name in files)])
    if asked.problems:
        raise click.UsageError("; ".join(asked.problems))
    if not asked.references and not may_be_empty:
        raise click.UsageError("nothing to do: name images, or a list with -f")
    try:
        scope = Scope(Platforms.parse(platforms), referrers)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--platform") from error
    return Order(asked.references, scope, project, pin)


def _text(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise click.UsageError(f"cannot read {name}: {reason}") from error


def _finish(report: Mapping[str, Any], as_json: bool) -> None:
    """Print the report, and end with 1 when something is missing."""
    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        for image in report["images"]:
            for what, why in image["missing"].items():
                click.echo(plain(f"missing  {image['reference']}  {what}: {why}"))
        fetched = report.get("fetched_bytes") or sum(image.get("fetched_bytes", 0) for image in report["images"])
        n_bytes = sum(image.get("n_bytes", 0) for image in report["images"])
        click.echo(
            f"{report['n_images'] - report['n_missing']} of {report['n_images']} images whole, "
            f"{size(n_bytes)}, of which {size(fetched)} new"
        )
    if report["n_missing"]:
        raise SystemExit(FAILED)


class _Progress:
    """Progress for each image and in all: bars on a terminal, a line for each image that ended elsewhere."""

    def __init__(self, is_quiet: bool) -> None:
        self._is_quiet = is_quiet
        self._stack = ExitStack()
        self._bars: Any = None
        self._all: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> _Progress:
        if not self._is_quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
            self._bars = self._stack.enter_context(Progress(*columns, console=Console(stderr=True)))
            self._all = self._bars.add_task("in all", total=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def step(self, step: Mapping[str, Any]) -> None:
        """Show one step."""
        if self._bars is not None:
            self._draw(step)
        elif not self._is_quiet and step.get("what") in ("resolved", "done", "missing"):
            what, n_bytes = str(step["what"]), int(step.get("of_bytes") or 0)
            click.echo(
                plain(f"{what:8} {step['reference']}  {size(n_bytes)}  {step.get('sentence') or ''}".rstrip()),
                err=True,
            )

    def _draw(self, step: Mapping[str, Any]) -> None:
        name, what = str(step["reference"]), step.get("what")
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(plain(name)[-60:], total=None)
        task = self._tasks[name]
        if what == "resolved":
            self._bars.update(task, total=step["of_bytes"])
            tasks = self._bars.tasks[self._all]
            self._bars.update(self._all, total=(tasks.total or 0) + step["of_bytes"])
        elif what == "bytes":
            self._bars.advance(task, step["n_bytes"])
            self._bars.advance(self._all, step["n_bytes"])
        elif what in ("done", "missing"):
            self._bars.console.print(plain(f"{what:8} {name}  {step.get('sentence') or ''}".rstrip()), markup=False)
            self._bars.remove_task(task)
