"""The command line: what may be asked, and how it ends. 0 done, 1 failed, 2 wrong usage or settings.

Everything heavy is imported in the command that needs it, so that `--help` and shell completion answer at once. What
goes wrong is one line each on stderr; a traceback is never an answer.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import click

from proxy import __version__
from proxy.errors import BreakwaterError, InvalidSettings

if TYPE_CHECKING:
    from proxy.settings.keys import Place
    from proxy.settings.reading import Effective

FAILED = 1
WRONG = 2

#: Options that several commands share.
_config = click.option(
    "--config",
    metavar="FILE",
    help="Settings file. Default: $BREAKWATER_CONFIG, ./breakwater.toml, /etc/breakwater/breakwater.toml.",
)


def main() -> NoReturn:
    """Run the command that the process was started with, and exit."""
    try:
        # Click's own way to end prints several lines; ours is one.
        cli(prog_name="breakwater", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        raise SystemExit(WRONG) from None
    except click.UsageError as error:
        help_of = error.ctx.command_path if error.ctx else "breakwater"
        _end([f"{error.format_message()} (see {help_of} --help)"], WRONG)
    except click.ClickException as error:
        _end([error.format_message()], FAILED)
    except click.Abort:
        _end(["interrupted"], FAILED)
    except BrokenPipeError:
        # Whoever read has had enough. What is still in stdout's buffer must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(FAILED) from None
    except InvalidSettings as error:
        _end(error.problems, WRONG)
    except (BreakwaterError, OSError) as error:
        _end([str(error)], FAILED)
    except Exception as error:  # noqa: BLE001  # the outermost frame: a bug of ours still owes its user one line
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename.rpartition('/')[2]}:{last.lineno}"
        _end([f"internal error, please report it: {type(error).__name__} at {where}: {error}"], FAILED)
    raise SystemExit(0)


def _end(lines: Iterable[str], code: int) -> NoReturn:
    for line in lines:
        click.echo(f"breakwater: {' '.join(line.split())}", err=True)
    raise SystemExit(code)


def _load(config: str | None, options: Iterable[tuple[str, Place, Any]] = ()) -> Effective:
    """The effective settings. Raises InvalidSettings, which `main` prints."""
    from proxy.settings_file import load

    return load(config, options)


def _ask(config: str | None, admin_listen: str | None, path: str) -> Any:
    """What the running Breakwater answers to GET `path`, asked at `admin_listen` if given, else where the settings say."""
    from proxy.cli import asking
    from proxy.settings.values import address_of

    if admin_listen is None:
        return asking.ask(_load(config).settings.server.admin_listen, path)
    try:
        address = address_of(admin_listen)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--admin-listen") from error
    return asking.ask(address, path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="breakwater", message="%(prog)s %(version)s")
def cli() -> None:
    """A caching pull-through proxy appliance for OCI registries."""


# -- serve -------------------------------------------------------------------------------------------------------------


def _named_urls(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, list[str]]:
    """NAME=URL, repeatable: several for one name are tried in order."""
    urls: dict[str, list[str]] = {}
    for entry in given:
        name, equals, url = entry.partition("=")
        if not (name and equals and url):
            raise click.BadParameter(f"{entry!r}: expected NAME=URL, as in docker.io=https://registry-1.docker.io")
        urls.setdefault(name.lower(), []).append(url)
    return urls


@cli.command()
@_config
@click.option("--listen", multiple=True, metavar="ADDRESS", help="host:port, :port or unix:/path; repeatable.")
@click.option("--admin-listen", metavar="ADDRESS", help="Where health, metrics, status and the dashboard are.")
@click.option("--store", metavar="FOLDER", help="The store's directory.")
@click.option("--capacity", metavar="SIZE", help='What the store may hold: "200GiB", or "80%" of the file system.')
@click.option(
    "--upstream",
    multiple=True,
    metavar="NAME=URL",
    callback=_named_urls,
    help="Add an upstream, or give one another address; repeatable.",
)
@click.option("--sealed", is_flag=True, default=None, help="Never contact any upstream.")
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
def serve(
    config: str | None,
    listen: tuple[str, ...],
    admin_listen: str | None,
    store: str | None,
    capacity: str | None,
    upstream: dict[str, list[str]],
    sealed: bool | None,
    log_level: str | None,
) -> None:
    """Run until told to stop.

    Options win over the environment, and that over the settings file.
    """
    options: list[tuple[str, Place, Any]] = [
        ("--listen", ("server", "listen"), list(listen) or None),
        ("--admin-listen", ("server", "admin_listen"), admin_listen),
        ("--store", ("store", "path"), store),
        ("--capacity", ("store", "capacity"), capacity),
        ("--sealed", ("server", "sealed"), sealed),
        ("--log-level", ("log", "level"), log_level),
        *(("--upstream", ("upstreams", name, "url"), urls) for name, urls in upstream.items()),
    ]
    given = [option for option in options if option[2] is not None]
    effective = _load(config, given)  # a mistake is said before anything heavy is imported

    from proxy import lifecycle

    raise SystemExit(lifecycle.run(effective.settings, lambda: _load(config, given).settings))


# -- settings ----------------------------------------------------------------------------------------------------------


@cli.command()
@_config
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--check", is_flag=True, help="Only say whether they are right, by the exit code.")
@click.option("--reference", is_flag=True, help="Print every key with its default and the reason, in Markdown.")
def settings(config: str | None, as_json: bool, check: bool, reference: bool) -> None:
    """Print the settings in effect.

    Each with where it comes from: built-in, file and line, or environment variable. Secrets are not printed.
    """
    from proxy.settings import shown

    if reference:
        click.echo(shown.reference(), nl=False)
        return
    effective = _load(config)
    if check:
        return
    if as_json:
        click.echo(json.dumps(shown.as_json(effective), indent=2, ensure_ascii=False))
    else:
        click.echo(shown.as_toml(effective), nl=False)


# -- status ------------------------------------------------------------------------------------------------------------


@cli.command()
@_config
@click.option("--admin-listen", metavar="ADDRESS", help="Ask there, whatever the settings say.")
@click.option("--json", "as_json", is_flag=True, help="For programs: the answer of /api/v1/status as it is.")
def status(config: str | None, admin_listen: str | None, as_json: bool) -> None:
    """Print what the running Breakwater is doing.

    Outcomes of requests, bytes, the store, transfers and the health of upstreams, from its admin listener.
    """
    from proxy.cli import status_text

    answer = _ask(config, admin_listen, "/api/v1/status")
    if as_json:
        click.echo(json.dumps(answer, indent=2, ensure_ascii=not sys.stdout.isatty()))
    else:
        click.echo(status_text.text_of(answer), nl=False)


# -- hosts-toml --------------------------------------------------------------------------------------------------------


@cli.command("hosts-toml")
@_config
@click.argument("upstreams", nargs=-1, metavar="[UPSTREAM]...")
@click.option(
    "--client",
    type=click.Choice(["containerd", "crio", "podman", "docker"]),
    default="containerd",
    show_default=True,
    help="Whose files to print.",
)
@click.option("--project", metavar="NAME", help="Pull through this project.")
@click.option("--enforce", is_flag=True, help="Make Breakwater the only host: no way round its rules.")
@click.option("--url", metavar="URL", help="Where clients reach it. Default: from server.listen.")
def hosts_toml(
    config: str | None, upstreams: tuple[str, ...], client: str, project: str | None, enforce: bool, url: str | None
) -> None:
    """Print what clients need to pull through here.

    For each UPSTREAM, all of them unless named: containerd's hosts.toml, or what --client asks for.
    """
    from proxy.cli.client_files import Mirror, text_for

    mirror = Mirror.of(_load(config).settings, url=url, project=project, is_enforced=enforce)
    click.echo(text_for(client, mirror, upstreams), nl=False)


# -- commands of the other modules -------------------------------------------------------------------------------------

from proxy.cli import carry, contents, keeping, projects  # noqa: E402 – they use what is above

for _command in (*carry.commands, *contents.commands, *projects.commands, *keeping.commands):
    cli.add_command(_command)
