"""Commands about what is stored: list it, take it out, hash it again.

Each speaks to the running server over its admin listener; where none runs it takes the store's lock and does it here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

import click

from proxy.cli import FAILED, _config, _load
from proxy.cli.carry import _plain

_json = click.option("--json", "as_json", is_flag=True, help="For programs.")
_project = click.option("--project", default="", metavar="NAME", help="Only in this project.")


@click.command()
@_config
@_json
@click.option("--repair", is_flag=True, help="Fetch what is rotten again from upstream.")
def verify(config: str | None, as_json: bool, repair: bool) -> None:
    """Hash everything that is stored, and compare the count with what is on disk.

    A file that is not what its name says is quarantined. Exit code 1 when something is left to be put right.
    """
    from proxy.cli import talking

    settings = _load(config).settings

    def step(told: Mapping[str, Any]) -> None:
        if not as_json and told.get("what") != "right":
            click.echo(_plain(f"{told.get('what')}  {told.get('digest')}"), err=True)

    if talking.serves(settings):
        path = "/api/v1/verify?" + urlencode({"repair": str(repair).lower()})
        report = talking.told(settings, path, [], {"Content-Type": "application/json"}, step)
    else:
        from proxy import wiring

        report = wiring.work_in_store(settings, lambda appliance: appliance.scrub.verify(step, repair=repair))
    report.pop("event", None)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        from proxy.cli.status_text import size

        for digest, came in report["rotten"].items():
            click.echo(_plain(f"rotten      {digest}  {came or 'quarantined; the next pull fetches it again'}"))
        for digest, why in report["unreadable"].items():
            click.echo(_plain(f"unreadable  {digest}  {why}"))
        for digest in report["miscounted"]:
            click.echo(f"miscounted  {digest}")
        click.echo(
            f"{report['blobs']} blobs, {size(report['bytes'])}: {'all is well' if report['is_well'] else 'not well'}"
        )
    if not report["is_well"]:
        raise SystemExit(FAILED)


@click.command("ls")
@_config
@_json
@_project
@click.argument("words", nargs=-1, metavar="[WORD]...")
def list_stored(config: str | None, as_json: bool, project: str, words: tuple[str, ...]) -> None:
    """List what is cached: repositories, their tags, and bytes on disk.

    Only those whose name and tag contain every WORD.
    """
    from proxy.cli import asking, talking

    settings = _load(config).settings
    query = {"search": " ".join(words), "project": project, "limit": 1000}
    if talking.serves(settings):
        answer = asking.ask(settings.server.admin_listen, "/api/v1/images?" + urlencode(query))
    else:
        from proxy import wiring

        answer = wiring.work_in_store(settings, lambda appliance: appliance.listed(query))
    if as_json:
        click.echo(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    from proxy.cli.status_text import size

    for image in answer["images"]:
        tags = " ".join(tag if isinstance(tag, str) else str(tag.get("tag", tag.get("name"))) for tag in image["tags"])
        click.echo(
            _plain(
                f"{image['project']}  {image['upstream']}/{image['repository']}  {size(image['cached_bytes'])}  {tags}"
            )
        )
    if answer["more"]:
        click.echo("… and more; say words that narrow it")


@click.command()
@_config
@_json
@_project
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.argument("what", metavar="REF|DIGEST|PATTERN")
def purge(config: str | None, as_json: bool, project: str, dry_run: bool, what: str) -> None:
    """Take something out: an image, a repository, a pattern like quay.io/**, or a digest.

    What only it used goes with it. Exit code 1 when nothing here is called that.
    """
    from proxy.cli import talking

    settings = _load(config).settings
    order = {"what": what, "project": project, "dry_run": dry_run}
    if talking.serves(settings):
        answer = talking.posted(settings, "/api/v1/purge", order)
    else:
        from proxy import wiring

        answer = wiring.work_in_store(settings, lambda appliance: appliance.purged(order))
    if as_json:
        click.echo(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    from proxy.cli.status_text import size

    would = "would go" if answer["dry_run"] else "went"
    for tag in answer["tags"]:
        click.echo(_plain(tag))
    click.echo(
        f"{len(answer['tags'])} tags, {answer['manifests']} manifests and {answer['blobs']} blobs {would}, "
        f"{size(answer['freed_bytes'])}; {answer['busy_blobs']} blobs are being read, {answer['pinned_images']} images pinned"
    )


commands: tuple[click.Command, ...] = (verify, list_stored, purge)
