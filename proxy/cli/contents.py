"""Commands about what is in the store: look at it, and take something out.

A running server answers when one has the store; otherwise it is done here, with the store's lock held.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click

from proxy.cli import _config, _load
from proxy.errors import BadRequest
from proxy.spelled import size

if TYPE_CHECKING:
    from proxy.web.operations import Seen

_project = click.option("--project", metavar="NAME", default="", help="Only in this project.")
_json = click.option("--json", "as_json", is_flag=True, help="For programs.")


# -- ls ----------------------------------------------------------------------------------------------------------------


@click.command()
@_config
@click.argument("words", nargs=-1, metavar="[WORD]...")
@_project
@click.option("--limit", type=click.IntRange(1, 1000), default=1000, show_default=True, help="Repositories at most.")
@_json
def ls(config: str | None, words: tuple[str, ...], project: str, limit: int, as_json: bool) -> None:
    """List what is cached.

    Repositories whose host/repository:tag contains every WORD, with their tags; all of them without one.
    """
    from proxy.cli import asking, talking

    settings = _load(config).settings
    asked: dict[str, Any] = {"search": " ".join(words)[:512], "project": project, "limit": limit}
    if talking.serves(settings):
        answer = asking.ask(settings.server.admin_listen, f"/api/v1/images?{urlencode(asked)}")
    else:
        from proxy import alone
        from proxy.web import documents, operations

        async def search(seen: Seen) -> Mapping[str, Any]:
            return (await operations.search(seen, documents.Search(**asked))).model_dump()

        answer = alone.look(settings, search)
    if as_json:
        click.echo(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        _show(answer)


def _show(answer: Mapping[str, Any]) -> None:
    for one in answer["images"]:
        name = f"{one['upstream']}/{one['repository']}"
        click.echo(f"{name}  project {one['project']}, {size(one['cached_bytes'])}, {one['n_manifests']} manifests")
        for tag in one["tags"]:
            click.echo(f"  {tag['tag']}  {tag['digest']}")
    if answer["more"]:
        click.echo("… and more: name a word, or raise --limit")


# -- purge -------------------------------------------------------------------------------------------------------------


@click.command()
@_config
@click.argument("what")
@_project
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@_json
def purge(config: str | None, what: str, project: str, dry_run: bool, as_json: bool) -> None:
    """Take something out of the store.

    WHAT is a reference (alpine:3), a repository (alpine: all its tags), a pattern (quay.io/**) or a digest. An image goes
    with what only it names and with what refers to it; what another image or project has stays, and what is pinned stays.
    """
    from proxy.cli import talking
    from proxy.rules.selection import Selection

    settings = _load(config).settings
    try:
        selected = Selection.parse(what).text
    except BadRequest as error:
        raise click.BadParameter(str(error), param_hint="WHAT") from error
    asked: dict[str, Any] = {"what": selected, "project": project, "dry_run": dry_run}
    report: Mapping[str, Any] | None
    if talking.serves(settings):
        report = talking.fetched(settings, "/api/v1/purge", json.dumps(asked).encode(), lambda _: None)
    else:
        from proxy import alone
        from proxy.web import documents, operations

        async def work(seen: Seen) -> Mapping[str, Any]:
            return (await operations.take_out(seen, documents.ToPurge(**asked))).model_dump()

        report = alone.look(settings, work)
    assert report is not None
    if as_json:
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _tell(report)


def _tell(report: Mapping[str, Any]) -> None:
    for tag in report["tags"]:
        click.echo(tag)
    said = "would go" if report["dry_run"] else "purged"
    click.echo(
        f"{said}: {len(report['tags'])} tags, {report['manifests']} manifests, {report['blobs']} blobs, "
        f"{size(report['freed_bytes'])}"
    )
    if report["busy_blobs"]:
        click.echo(f"{report['busy_blobs']} blobs are being read, and stay until eviction takes them")
    if report["pinned_images"]:
        click.echo(f"{report['pinned_images']} manifests stay: pinned, or their upstream is sealed")


commands: tuple[click.Command, ...] = (ls, purge)
