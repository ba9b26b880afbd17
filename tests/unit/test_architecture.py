"""The import graph is a promise (house.md §6.2, habit 1), and so are the habits that a machine can watch.

This file is where they are written down. A row that has to change is a decision: say in the commit why the seam moved.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
ROOT = HERE.parent / "proxy"

EVERYTHING = {
    *("errors", "oci", "rules", "ports", "events", "settings", "settings_file", "image_lists", "archives", "clock"),
    *(
        "engine",
        "store",
        "upstream",
        "web",
        "telemetry",
        "service",
        "fitting",
        "guests",
        "planning",
        "reports",
        "wiring",
    ),
    *("alone", "lifecycle", "admin_token", "spelled", "cli"),
}

#: room -> the rooms it may import (itself always). Nobody may import wiring and cli, which know everyone.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "oci": {"errors"},
    # Numbers in words, for whoever shows them to people.
    "spelled": set(),
    "ports": {"errors", "oci"},
    "events": {"errors", "oci"},
    "rules": {"errors", "oci"},
    "settings": {"errors", "oci"},
    "settings_file": {"errors", "settings"},
    "image_lists": {"rules"},
    "archives": {"errors", "oci", "ports"},
    "clock": {"ports"},
    "engine": {"errors", "oci", "settings", "events", "ports", "rules"},
    "store": {"errors", "oci", "settings", "events", "ports"},
    "upstream": {"errors", "oci", "settings", "events", "ports"},
    "web": {"errors", "oci", "settings", "events", "ports", "engine", "spelled"},
    "telemetry": {"events"},
    # The protocols between a service manager and a process: they know neither the appliance nor its settings.
    "service": set(),
    # Where the token of the admin listener is: servers make it, commands read it.
    "admin_token": {"errors", "settings"},
    # Clients of upstreams, remade on a reload: a part of wiring with a life of its own.
    "fitting": {"errors", "events", "guests", "ports", "rules", "settings", "engine", "upstream"},
    "guests": {"ports", "engine", "upstream"},
    # Settings as values, and what the running parts say of themselves: both know many parts and start none.
    "planning": {"errors", "ports", "rules", "settings", "engine", "fitting", "image_lists"},
    "reports": {"ports", "settings", "engine", "fitting", "telemetry", "web"},
    "wiring": EVERYTHING,
    "alone": EVERYTHING,
    "lifecycle": EVERYTHING,
    "cli": EVERYTHING,
    "__main__": {"cli"},
}

#: room -> the distributions it may import. A room that is not here uses the standard library alone.
THIRD_PARTY: dict[str, set[str]] = {
    "settings": {"pydantic", "pydantic_core"},
    "image_lists": {"yaml"},
    "archives": {"cryptography", "zstandard"},
    "engine": {"cachetools"},
    "store": {"aiofiles", "diskcache"},
    "upstream": {"aiohttp", "cachetools", "jwt", "multidict", "yarl"},
    # The documents of the admin API are models like the settings; pages are made of templates.
    "web": {"aiohttp", "cachetools", "jinja2", "jwt", "multidict", "pydantic", "yarl"},
    "telemetry": {"prometheus_client"},
    # The composition root starts the servers and the loop that the others only describe.
    "wiring": {"aiohttp"},
    "guests": {"cachetools"},
    "reports": {"prometheus_client"},
    "alone": {"uvloop"},
    "lifecycle": {"uvloop"},
    "cli": {"click", "rich"},
}

#: Rooms in which nothing may touch the outside world or the clock.
PURE = {"errors", "spelled", "oci", "rules", "ports", "events", "settings"}
NOT_PURE = {"asyncio", "os", "time", "random", "socket", "logging", "pathlib", "threading"}
#: Neither sockets nor files, nor time or chance, but through a port (house.md §6.1, habit 5).
NOT_IN_ENGINE = {
    *("http", "io", "logging", "os", "pathlib", "random", "secrets", "select", "shutil", "signal", "socket", "sqlite3"),
    *("ssl", "subprocess", "tempfile", "threading", "time"),
}

#: Words that say nothing about what a thing is (house.md §7). Whole words of a definition's name.
EMPTY_WORDS = {"manager", "helper", "helpers", "util", "utils", "common", "misc"}

#: The one file that may start a task without being its owner's TaskGroup (habit 4).
OWNER_OF_TASKS = "engine/tasks.py"


def modules(below: Path = ROOT) -> list[Path]:
    return sorted(path for path in below.rglob("*.py") if path.name != "__init__.py" or path.stat().st_size > 200)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT if path.is_relative_to(ROOT) else HERE))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Every import of a file, those under TYPE_CHECKING and inside functions too: a type is knowledge."""
    here = ("proxy", *path.relative_to(ROOT).parent.parts) if path.is_relative_to(ROOT) else ()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level + 1]) if node.level else []
            head = ".".join([*base, *([node.module] if node.module else [])])
            # `from proxy import store` names the room in the alias.
            yield from (f"{head}.{alias.name}" for alias in node.names) if head == "proxy" else (head,)


every_module = pytest.mark.parametrize("path", modules(), ids=name_of)
every_test_file = pytest.mark.parametrize("path", modules(HERE), ids=name_of)


# -- who may know whom -------------------------------------------------------------------------------------------------


@every_module
def test_imports_point_inward(path: Path) -> None:
    """house.md §6.2: the table above, and nothing that it does not say."""
    mine = room_of(path)
    if mine == "__init__":
        return
    assert mine in MAY_IMPORT, f"{mine} has no row in MAY_IMPORT: say what it may know"
    for name in imports(path):
        top, _, rest = name.partition(".")
        theirs = rest.partition(".")[0]
        if top == "proxy" and theirs != "__version__":
            assert theirs == mine or theirs in MAY_IMPORT[mine], f"{mine} must not import {theirs} ({name})"


@every_module
def test_libraries_of_the_outside_world_stay_in_their_room(path: Path) -> None:
    """house.md §6.2: HTTP is spoken in web and upstream alone, and a library is replaced in one place."""
    mine = room_of(path)
    for name in imports(path):
        top = name.partition(".")[0]
        if top not in ("proxy", *sys.stdlib_module_names):
            assert top in THIRD_PARTY.get(mine, ()), f"{mine} must not import {top}"


@every_module
def test_what_decides_is_pure(path: Path) -> None:
    """house.md §6.2: time, chance and the world are arguments, so that every decision is a table in a test."""
    if room_of(path) in PURE:
        touched = {name.partition(".")[0] for name in imports(path)} & NOT_PURE
        assert not touched, f"{name_of(path)} is pure and imports {sorted(touched)}"


@every_module
def test_the_engine_has_only_ports(path: Path) -> None:
    """house.md §6.1: asyncio, but no sockets, files, clocks or dice; those are ports with suites and fakes."""
    if room_of(path) == "engine":
        touched = {name.partition(".")[0] for name in imports(path)} & NOT_IN_ENGINE
        assert not touched, f"{name_of(path)} imports {sorted(touched)}; that belongs behind a port"


def test_the_graph_has_no_circles() -> None:
    """A room that can be taken out and read alone stays readable."""
    order = ["errors", "oci", "ports", "events", "rules", "settings", "settings_file", "clock", "engine", "store"]
    order += ["image_lists", "archives", "admin_token", "spelled"]
    order += [
        "upstream",
        "telemetry",
        "web",
        "service",
        "guests",
        "fitting",
        "planning",
        "reports",
        "wiring",
        "alone",
        "lifecycle",
    ]
    order += ["cli", "__main__"]
    assert set(order) == set(MAY_IMPORT)
    for room, known in MAY_IMPORT.items():
        if room not in ("wiring", "alone", "lifecycle", "cli"):
            assert all(order.index(theirs) < order.index(room) for theirs in known)


# -- habits ------------------------------------------------------------------------------------------------------------


def _is_name(node: ast.expr, *names: str) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def ownerless_tasks(path: Path) -> Iterator[int]:
    """Lines that start a task nobody waits for. TaskGroup.create_task is fine: the group is the owner."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module == "asyncio":
            if {alias.name for alias in node.names} & {"create_task", "ensure_future"}:
                yield node.lineno
        elif isinstance(node, ast.Attribute) and node.attr in ("create_task", "ensure_future"):
            of = node.value
            on_a_loop = (
                isinstance(of, ast.Call) and isinstance(of.func, ast.Attribute) and of.func.attr.endswith("_loop")
            )
            on_a_loop = on_a_loop or "loop" in ast.unparse(of).rpartition(".")[2].lower()
            if _is_name(of, "asyncio") or on_a_loop:
                yield node.lineno


@every_module
def test_tasks_have_owners(path: Path) -> None:
    """Habit 4: engine/tasks.py is the only place that starts a task outside a TaskGroup."""
    if name_of(path) != OWNER_OF_TASKS:
        lines = list(ownerless_tasks(path))
        assert not lines, f"{name_of(path)} starts tasks on lines {lines}: give them to {OWNER_OF_TASKS} or a TaskGroup"


@pytest.mark.parametrize(
    ("source", "n_found"),
    [
        pytest.param("asyncio.create_task(x())", 1, id="the plain way"),
        pytest.param("asyncio.ensure_future(x())", 1, id="the old way"),
        pytest.param("asyncio.get_running_loop().create_task(x())", 1, id="by the running loop"),
        pytest.param("self._loop.create_task(x())", 1, id="by a loop that was kept"),
        pytest.param("from asyncio import create_task", 1, id="by its bare name"),
        pytest.param("group.create_task(x())", 0, id="in a group"),
        pytest.param("async with asyncio.TaskGroup() as both: both.create_task(x())", 0, id="in a group by any name"),
    ],
)
def test_the_watch_over_tasks_sees_what_it_should(source: str, n_found: int, tmp_path: Path) -> None:
    """A check that never fails proves nothing."""
    path = tmp_path / "x.py"
    path.write_text(source)
    assert len(list(ownerless_tasks(path))) == n_found


@every_module
def test_names_say_what_a_thing_is(path: Path) -> None:
    """house.md §7: no managers, helpers or utilities."""
    names = [path.stem] + [
        node.name
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    for name in names:
        said = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
        assert not said & EMPTY_WORDS, f"{name} in {name_of(path)}"


@every_module
def test_every_module_says_what_it_is_for(path: Path) -> None:
    """Habit 9: a module begins by saying what it decides or does."""
    assert ast.get_docstring(tree_of(path)), f"{name_of(path)} has no docstring"


@pytest.mark.parametrize("room", ["oci", "rules"])
def test_every_rule_has_its_tests(room: str) -> None:
    """house.md §8: oci and rules are mirrored under tests/unit, one file per module or one per folder of them."""
    there = {path.stem for path in (HERE / "unit").glob("test_*.py")}
    missing = [
        name_of(path)
        for path in modules(ROOT / room)
        if path.name != "__init__.py"
        and not {f"test_{path.stem}", f"test_{path.parent.name}"} & (there - {f"test_{room}"})
    ]
    assert not missing, f"no tests under tests/unit for {missing}"


@every_test_file
def test_doubles_are_written_and_not_mocked(path: Path) -> None:
    """house.md §8: do not patch what we do not own; put a port there and give it a fake that passes the suite."""
    if path != HERE / "unit" / "test_cli.py":
        assert not {name for name in imports(path) if name == "mock" or name.startswith("unittest")}


@every_test_file
def test_tests_do_not_wait_by_the_clock(path: Path) -> None:
    """house.md §8: interleavings are steps and not sleeps; where no real process takes part, nothing waits for time."""
    if path.relative_to(HERE).parts[0] not in ("unit", "property", "contract"):
        return
    for call in (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)):
        of = call.func
        if isinstance(of, ast.Attribute) and of.attr == "sleep" and _is_name(of.value, "asyncio", "time"):
            argument = call.args[0] if call.args else None
            assert isinstance(argument, ast.Constant) and argument.value == 0, f"{name_of(path)}:{call.lineno}"


@every_test_file
def test_the_scripted_upstream_shares_no_code_with_us(path: Path) -> None:
    """house.md §8: a double that reads the spec with our own code misreads it as we do."""
    if path == HERE / "support" / "registry.py":
        assert not {name for name in imports(path) if name.partition(".")[0] == "proxy"}
