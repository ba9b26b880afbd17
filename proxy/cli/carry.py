"""prefetch, export and import: what may be asked, progress while it runs, and the report.

A running server does the work when one has the store; otherwise it is done here, with the store's lock held.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from proxy.cli import FAILED, _config, _load

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
            from proxy import wiring

            report = wiring.work_alone(settings, lambda freight: freight.prefetch(order, progress.step))
    _finish(report, as_json)


commands: list[click.Command] = [prefetch]


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
    from proxy.cli.status_text import size

    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        for image in report["images"]:
            for what, why in image["missing"].items():
                click.echo(_plain(f"missing  {image['reference']}  {what}: {why}"))
        fetched = sum(image.get("fetched_bytes", 0) for image in report["images"])
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
            from proxy.cli.status_text import size

            what, n_bytes = str(step["what"]), int(step.get("of_bytes") or 0)
            click.echo(
                _plain(f"{what:8} {step['reference']}  {size(n_bytes)}  {step.get('sentence') or ''}".rstrip()),
                err=True,
            )

    def _draw(self, step: Mapping[str, Any]) -> None:
        name, what = str(step["reference"]), step.get("what")
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(_plain(name)[-60:], total=None)
        task = self._tasks[name]
        if what == "resolved":
            self._bars.update(task, total=step["of_bytes"])
            tasks = self._bars.tasks[self._all]
            self._bars.update(self._all, total=(tasks.total or 0) + step["of_bytes"])
        elif what == "bytes":
            self._bars.advance(task, step["n_bytes"])
            self._bars.advance(self._all, step["n_bytes"])
        elif what in ("done", "missing"):
            self._bars.console.print(_plain(f"{what:8} {name}  {step.get('sentence') or ''}".rstrip()), markup=False)
            self._bars.remove_task(task)


def _plain(text: str) -> str:
    """Without control characters: what an upstream says may carry a terminal's commands."""
    return "".join(sign if sign.isprintable() else "�" for sign in text)
