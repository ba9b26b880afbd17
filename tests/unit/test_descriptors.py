"""Connections fit beneath the limit of open files, those that are refused included."""

from __future__ import annotations

import pytest

from proxy.service.descriptors import SPARE, connections_within
from proxy.web.server import Limits


@pytest.mark.parametrize(
    ("limit", "wanted", "fits"),
    [
        pytest.param(1 << 20, 16384, 16384, id="plenty: as many as are wanted"),
        pytest.param(1024, 16384, 674, id="a low hard limit: fewer"),
        pytest.param(64, 16384, 1, id="absurdly low: one"),
    ],
)
def test_connections_are_capped_by_descriptors(limit: int, wanted: int, fits: int) -> None:
    """`server.max_connections` says: fewer where the limit of open files is lower."""
    assert connections_within(limit, wanted) == fits


@pytest.mark.parametrize("limit", [1024, 4096, 20_000])
def test_those_that_are_told_503_fit_too(limit: int) -> None:
    """web/server.py takes in an eighth and eight more before it closes connections unheard."""
    n = connections_within(limit, 1 << 30)
    assert n + n // 8 + 8 + SPARE <= limit
    assert Limits(n_connections=n).n_connections == n
