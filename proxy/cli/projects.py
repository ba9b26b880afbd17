"""Commands about projects: accounts of robots, what is used, and why something is or is not allowed."""

from __future__ import annotations

import json
import re
import secrets
import sys
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

import click

from proxy.cli import FAILED, _ask, _config, _load
from proxy.spelled import size

#: What a secret begins with, so that scanners for leaked secrets can know one.
SECRET_PREFIX = "bw_"

_NAME = re.compile(r"[a-z0-9]+(?:[._-][a-z0-9]+)*")


# -- robot -------------------------------------------------------------------------------------------------------------


@click.group()
def robot() -> None:
    """Accounts of programs: make one, list them."""


@robot.command("create")
@_config
@click.argument("name")
@click.option("--project", "projects", multiple=True, metavar="NAME", help="A project it may pull through; repeatable.")
@click.option("--expires", metavar="DAY", help='When it stops being known: "2027-01-31", or with a time.')
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def create(config: str | None, name: str, projects: tuple[str, ...], expires: str | None, as_json: bool) -> None:
    """Make a secret for robot NAME, and print what belongs into the settings file.

    The secret is shown this once and kept nowhere. For a robot that exists already, it is a second secret: write both
    hashes until every node has the new one.
    """
    from proxy.rules.secret_hash import SALT_BYTES, SecretHash
    from proxy.settings.values import instant_of

    if not _NAME.fullmatch(name):
        raise click.BadParameter(
            f"{name!r}: lower-case letters and digits, with . _ or - between them", param_hint="NAME"
        )
    if expires is not None:
        try:
            instant_of(expires)
        except ValueError as error:
            raise click.BadParameter(str(error), param_hint="--expires") from error
    settings = _load(config).settings
    unknown = [project for project in projects if project not in settings.projects and project != "default"]
    if unknown:
        known = ", ".join(sorted(settings.projects)) or "none"
        raise click.BadParameter(f"no project is called {unknown[0]!r}; there are: {known}", param_hint="--project")
    secret = SECRET_PREFIX + secrets.token_urlsafe(32)
    made = SecretHash.of(secret, secrets.token_bytes(SALT_BYTES)).text
    known_robot = settings.robots.get(name)
    hashes = [made, *(one.get_secret_value() for one in known_robot.secret_hash)] if known_robot else [made]
    asked = list(projects) or (list(known_robot.projects) if known_robot else [])
    if as_json:
        document = {"name": name, "secret": secret, "secret_hash": made, "projects": asked, "expires": expires}
        click.echo(json.dumps(document, indent=2))
        return
    click.echo(f"Secret of {name}, shown this once:\n\n    {secret}\n")
    click.echo("Into the settings file, and then a reload:\n")
    click.echo(f"    [robots.{json.dumps(name) if '.' in name else name}]")
    click.echo(f"    secret_hash = {json.dumps(hashes[0] if len(hashes) == 1 else hashes)}")
    click.echo(f"    projects = {json.dumps(asked or ['…'], ensure_ascii=False)}")
    if expires:
        click.echo(f"    expires = {json.dumps(expires)}")
    click.echo(f'\nand its name among the readers of each: access = ["{name}"].')


@robot.command("list")
@_config
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_robots(config: str | None, as_json: bool) -> None:
    """List the robots in the settings, and what each may read."""
    settings = _load(config).settings
    rows = []
    for name, account in sorted(settings.robots.items()):
        reads = sorted(
            project
            for project in account.projects
            if project in settings.projects and name in settings.projects[project].access
        )
        expires = None if account.expires is None else datetime.fromtimestamp(account.expires, UTC).isoformat()
        rows.append({"name": name, "projects": reads, "secrets": len(account.secret_hash), "expires": expires})
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        ends = f", until {row['expires']}" if row["expires"] else ""
        reads_text = ", ".join(row["projects"]) or "nothing: no project's access names it"  # type: ignore[arg-type]
        n = row["secrets"]
        click.echo(f"{row['name']}: reads {reads_text}; {n} secret{'s' if n != 1 else ''}{ends}")
    if not rows:
        click.echo("no robots; make one with: breakwater robot create NAME --project PROJECT")


# -- explain -----------------------------------------------------------------------------------------------------------


@click.command()
@_config
@click.argument("reference", metavar="REF")
@click.option("--as", "robot_name", metavar="ROBOT", help="As this robot asks; without it, as anybody.")
@click.option("--admin-listen", metavar="ADDRESS", help="Ask there, whatever the settings say.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def explain(
    config: str | None, reference: str, robot_name: str | None, admin_listen: str | None, as_json: bool
) -> None:
    """Say whether REF may be pulled, and why: its route, its project, every rule tried, the verdict.

    REF is what stands after this registry's address: docker.io/library/alpine:3, team/app@sha256:…, ~project/name:tag.
    Nothing is fetched. Exits with 1 when the verdict is no.
    """
    query = {"ref": reference} | ({"as": robot_name} if robot_name else {})
    answer = _ask(config, admin_listen, f"/api/v1/explain?{urlencode(query)}")
    if as_json:
        click.echo(json.dumps(answer, indent=2, ensure_ascii=not sys.stdout.isatty()))
    else:
        click.echo(_explained(answer))
    if answer["verdict"] != "allow":
        raise SystemExit(FAILED)


def _explained(answer: dict[str, Any]) -> str:
    route = answer.get("route") or {}
    lines = [f"{answer['reference']} as {answer['as'] or 'anybody'}"]
    if route:
        lines.append(f"  route    {route['upstream']}, {route['repository']}")
        lines.append(f"  project  {route['project']} ({route['why']})")
    for step in answer["steps"]:
        lines.append(
            f"  {step['result']:7}  {step['owner']}: {step['rule']}" + (f" ({step['why']})" if step["why"] else "")
        )
    lines.append(f"  verdict  {answer['verdict']}" + (f": {answer['sentence']}" if answer["sentence"] else ""))
    return "\n".join(lines)


# -- du ----------------------------------------------------------------------------------------------------------------


@click.command()
@_config
@click.option("--admin-listen", metavar="ADDRESS", help="Ask there, whatever the settings say.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--recount", is_flag=True, help="First compare what is paid for with what is stored, and repair it.")
def du(config: str | None, admin_listen: str | None, as_json: bool, recount: bool) -> None:
    """Print what each project uses of its quota, and what is really on disk.

    A project pays the full size of every stored blob that was requested through it; bytes that several pay for are on
    disk once.
    """
    answer = _recounted(config, admin_listen) if recount else _ask(config, admin_listen, "/api/v1/usage")
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    rows = [("PROJECT", "USED", "QUOTA", "BLOBS", "WHEN FULL")]
    for one in answer["projects"]:
        quota = one["quota_bytes"]
        rows.append(
            (
                one["project"],
                size(one["used_bytes"]),
                "-" if quota is None else f"{size(quota)} ({one['used_bytes'] / quota:.0%})",
                str(one["blobs"]),
                "-" if quota is None else one["on_full"],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        click.echo("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
    store = answer["store"]
    click.echo(
        f"\nlogical {size(store['logical_bytes'])}, physical {size(store['physical_bytes'])} of "
        f"{size(store['capacity_bytes'])} in {store['blobs']} blobs"
    )
    for drift in answer["drift"]:
        click.echo(
            f"repaired: project {drift['project']} paid for {drift['gone']} blobs that are gone and {drift['resized']} "
            f"at a wrong size, {size(drift['bytes'])}"
        )


def _recounted(config: str | None, admin_listen: str | None) -> Any:
    """A recount changes something, so it takes the admin token, which lies where the settings say."""
    from proxy.cli import talking

    if admin_listen is not None:
        raise click.UsageError(
            "--recount needs the admin token, and that is found by the settings: leave --admin-listen"
        )
    return talking.fetched(_load(config).settings, "/api/v1/recount", b"{}", lambda _: None)


commands: tuple[click.Command, ...] = (robot, explain, du)
