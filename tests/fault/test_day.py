"""A small day in the life: what a limit and an outage upstream come to, with Breakwater and without."""

from __future__ import annotations

from tests.support.day import Shape, through_breakwater, without

SMALL = Shape(n_nodes=40, n_images=12, n_starts=1_500, n_always=4, n_moved=2, replaced_per_hour=2, limit=30)


async def test_a_limit_and_an_outage_fail_no_pull_of_what_is_here() -> None:
    """The reason to be: what is cached is served through both, and upstream is asked once for each thing."""
    direct, through = await without(SMALL), await through_breakwater(SMALL, is_warm=True)
    assert direct.failed > direct.pulls // 10
    assert through.failed == 0
    assert through.refused == 0
    assert through.upstream["manifest"] == 2 * SMALL.n_moved
    assert through.n_upstream < direct.n_upstream


async def test_the_same_seed_is_the_same_day() -> None:
    """Figures that are published can be had again."""
    assert await through_breakwater(SMALL) == await through_breakwater(SMALL)
