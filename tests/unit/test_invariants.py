"""Every invariant is named by a test that tries to break it (house.md §6.4 and §9, habit 6)."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
SOURCE = HERE.parent / "proxy"

#: Each invariant of house.md §6.4, and where the test is, at least, that kills, cuts, interleaves, or tries every way.
PROVEN_IN = {
    "INV-1": "fault/test_store",
    "INV-2": "fault/test_store",
    "INV-3": "fault/test_pull_faults.py",
    "INV-4": "property/test_transfers.py",
    "INV-5": "property/test_ledger.py",
    "INV-6": "property/test_tags.py",
    "INV-7": "fault/test_upstream",
    "INV-8": "unit/test_pull.py",
    "INV-9": "unit/test_manifests.py",
}

_ID = re.compile(r"INV-\d+")


@cache
def named_in_source() -> set[str]:
    """Every id that the package names."""
    return {found for path in SOURCE.rglob("*.py") for found in _ID.findall(path.read_text(encoding="utf-8"))}


@cache
def named_by_tests() -> dict[str, set[str]]:
    """id -> the tests whose own docstring names it, as file::function."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in HERE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
                for named in _ID.findall(ast.get_docstring(node) or ""):
                    found[named].add(f"{path.relative_to(HERE)}::{node.name}")
            elif isinstance(node, ast.ClassDef):  # the rules and invariants of a state machine speak for it
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("test"):
                        for named in _ID.findall(ast.get_docstring(inner) or ""):
                            found[named].add(f"{path.relative_to(HERE)}::{node.name}.{inner.name}")
    return found


def test_what_the_package_claims_is_named_by_tests() -> None:
    """Habit 6: an id in the source that no test's docstring names is a wish."""
    assert named_in_source() <= set(named_by_tests())


@pytest.mark.parametrize(("invariant", "place"), PROVEN_IN.items(), ids=PROVEN_IN.keys())
def test_each_invariant_has_the_test_that_attacks_it(invariant: str, place: str) -> None:
    """house.md §6.4: nine of them, each named where it is kept and where it is attacked."""
    tests = named_by_tests()[invariant]
    assert any(test.startswith(place) for test in tests), f"no test of {place} names {invariant} in its docstring"
    assert invariant in named_in_source(), f"{invariant} is not named where it is kept"


def test_no_invariant_is_invented() -> None:
    """An id beyond the list is a slip of the pen, or a decision that belongs into house.md first."""
    assert named_in_source() | set(named_by_tests()) <= set(PROVEN_IN)
