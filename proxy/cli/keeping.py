"""What the store keeps: `verify` hashes it again, `pins` says what is never evicted, `unpin` lets go of it.

Each speaks to the running server over its admin listener; where none runs it takes the store's lock and does it here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click

from proxy.cli import FAILED, _config, _load
from proxy.spelled import plain, size

if TYPE_CHECKING:
    from proxy.engine.pins import Pins
    from proxy.settings import Settings

_json = click.option("--json", "as_json", is_flag=True, help="For programs.")


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
            click.echo(plain(f"{told.get('what')}  {told.get('digest')}"), err=True)

    if talking.serves(settings):
        path = "/api/v1/verify?" + urlencode({"repair": str(repair).lower()})
        report = talking.told(settings, path, [], {"Content-Type": "application/json"}, step)
    else:
        from proxy import alone

        report = alone.verify(settings, lambda scrub: scrub.verify(step, repair=repair))
    report.pop("event", None)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        for digest, came in report["rotten"].items():
            click.echo(plain(f"rotten      {digest}  {came or 'quarantined; the next pull fetches it again'}"))
        for digest, why in report["unreadable"].items():
            click.echo(plain(f"unreadable  {digest}  {why}"))
        for digest in report["miscounted"]:
            click.echo(f"miscounted  {digest}")
        click.echo(
            f"{report['blobs']} blobs, {size(report['bytes'])}: {'all is well' if report['is_well'] else 'not well'}"
        )
    if not report["is_well"]:
        raise SystemExit(FAILED)


# -- pins --------------------------------------------------------------------------------------------------------------


@click.command()
@_config
@_json
def pins(config: str | None, as_json: bool) -> None:
    """List what is never evicted.

    References that were pinned by prefetch --pin, import --pin or the list of [prefetch], with what they keep.
    """
    from proxy.cli import asking, talking

    settings = _load(config).settings
    if talking.serves(settings):
        answer = asking.ask(settings.server.admin_listen, "/api/v1/pins")
    else:
        from proxy import alone

        answer = alone.keep(settings, _listed)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    for pin in answer["pins"]:
        why = ", listed" if pin["listed"] else ""
        project = f", project {pin['project']}" if pin["project"] else ""
        click.echo(plain(f"{pin['reference']}  {size(pin['bytes'])}{project}{why}"))
    click.echo(f"{len(answer['pins'])} pinned, {size(answer['kept_bytes'])} together")


async def _listed(pinned: Pins) -> Mapping[str, Any]:
    from proxy.web import pinning

    return pinning.listed(pinned).model_dump()


@click.command()
@_config
@click.argument("references", nargs=-1, required=True, metavar="REF...")
@click.option("--project", metavar="NAME", default="", help="Only the pin of this project.")
@_json
def unpin(config: str | None, references: tuple[str, ...], project: str, as_json: bool) -> None:
    """Let REF be evicted again when room is wanted; nothing is deleted now.

    What the list of [prefetch] names is pinned again at its next run.
    """
    from proxy.cli import talking

    settings = _load(config).settings
    gone: list[Mapping[str, Any]] = []
    kept_bytes = 0
    for reference in references:
        asked = {"reference": reference, "project": project}
        if talking.serves(settings):
            answer = talking.fetched(settings, "/api/v1/unpin", json.dumps(asked).encode(), lambda _: None)
        else:
            answer = _unpin_here(settings, asked)
        assert answer is not None
        gone += answer["unpinned"]
        kept_bytes = answer["kept_bytes"]
    if as_json:
        click.echo(json.dumps({"unpinned": gone, "kept_bytes": kept_bytes}, indent=2))
        return
    for pin in gone:
        click.echo(plain(f"unpinned  {pin['reference']}  {size(pin['bytes'])}"))
    click.echo(f"{size(kept_bytes)} still pinned")


def _unpin_here(settings: Settings, asked: dict[str, str]) -> dict[str, Any]:
    from proxy import alone
    from proxy.web import pinning

    async def work(pinned: Pins) -> dict[str, Any]:
        return (await pinning.let_go(pinned, pinning.ToUnpin(**asked))).model_dump()

    return alone.keep(settings, work)


commands: tuple[click.Command, ...] = (verify, pins, unpin)
