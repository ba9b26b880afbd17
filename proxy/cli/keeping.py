"""`breakwater verify`: hash again what is stored.

It speaks to the running server over its admin listener; where none runs it takes the store's lock and does it here.
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
        from proxy import alone

        report = alone.verify(settings, lambda scrub: scrub.verify(step, repair=repair))
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


commands: tuple[click.Command, ...] = (verify,)
