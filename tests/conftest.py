"""House rules that every test is held to, and the options of a whole run.

- Nothing is left behind: no task, thread or file descriptor that the test did not find (house.md §9, habit 3).
- Nothing of ours blocks the loop in a test that runs one (habit 2).
- Nothing is ever skipped: a real client, a registry, root or a loop device that is missing fails, and a run can be told
  how many tests of tests/interop/ must have passed.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import threading
import time
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx
from hypothesis import HealthCheck, settings

_HERE = Path(__file__).parent
_INTEROP = _HERE / "interop"
#: Where the code under test runs in this process, and so on this process's loop.
_IN_PROCESS = ("unit", "contract", "property", "fault")

#: Threads and descriptors that were there before the test.
_FOUND = pytest.StashKey[tuple[set[threading.Thread], set[str]]]()

# No deadline in any of them: how long an example takes on a busy machine says nothing.
settings.register_profile("full", deadline=None, print_blob=True)
settings.register_profile(
    "quick", deadline=None, print_blob=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "full"))


# -- a whole run -------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--interop-floor N`: fail a run in which fewer than N tests of tests/interop/ passed."""
    parser.addoption("--interop-floor", type=int, default=0, metavar="N", help=pytest_addoption.__doc__)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what speaks to real clients, and hold coroutines to what only they can break."""
    for item in items:
        if item.path.is_relative_to(_INTEROP):
            item.add_marker(pytest.mark.interop)
            # Tests of one file share daemons: they stay together on one worker, in order.
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.function):
            _look_last(item, "_leaves_no_task_behind")
            if item.path.relative_to(_HERE).parts[0] in _IN_PROCESS:
                _look_last(item, "_never_blocks_the_loop")


def _look_last(item: pytest.Function, fixture: str) -> None:
    """Set this fixture up before all others, so that what they own is closed by the time it looks."""
    if fixture not in item.fixturenames:
        item.fixturenames.insert(0, fixture)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip is a failure: what was not tried was not shown."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which nothing here may be: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a whole file (`importorskip` and the like)."""
    report = yield
    if report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"skipped, which nothing here may be: {report.longrepr}"
    return report


class _Floor:
    """Counts what passed under tests/interop/, in the process that sees every worker's reports."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.passed = wanted, 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed and report.nodeid.startswith("tests/interop/"):
            self.passed += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.passed < self.wanted and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.passed < self.wanted:
            terminalreporter.section("real clients")
            terminalreporter.line(
                f"{self.passed} tests of tests/interop/ passed, at least {self.wanted} must", red=True
            )


def pytest_configure(config: pytest.Config) -> None:
    """Count in the controller only."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Floor(config.getoption("--interop-floor")), "interop-floor")


# -- every test --------------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Remember what was open before any fixture of the test was set up."""
    item.stash[_FOUND] = (set(threading.enumerate()), _descriptors())
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """After every fixture of the test is gone: no thread and no descriptor that was not found."""
    yield
    threads, descriptors = item.stash[_FOUND]
    give_up_at = time.monotonic() + 5
    # Threads that were told to end, and sockets whose loop has just closed, may need a moment.
    while (left := _left(threads, descriptors)) and time.monotonic() < give_up_at:
        gc.collect()
        time.sleep(0.01)
    assert not left, f"left behind: {left}"


@pytest.fixture
async def _leaves_no_task_behind() -> AsyncIterator[None]:
    yield
    for _ in range(10):  # a task that was cancelled needs turns of the loop to end, and time does not matter to it
        await asyncio.sleep(0)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks left behind: {left}"


@pytest.fixture
def _never_blocks_the_loop() -> Iterator[None]:
    """A blocking call by our own code, on a thread that runs a loop, raises BlockingError where it is made."""
    with blockbuster_ctx("proxy"):
        yield


def _left(threads: set[threading.Thread], descriptors: set[str]) -> list[str]:
    new = [thread.name for thread in threading.enumerate() if thread not in threads and thread.is_alive()]
    return [*new, *sorted(_descriptors() - descriptors)]


def _descriptors() -> set[str]:
    """Every open descriptor as `number -> what it is`, but for those that are meant to stay."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            what = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # the one that listed them
            continue
        # Ports are kept until this process ends (tests/support/ports.py); hypothesis keeps its database.
        if not ("breakwater-ports-" in what or "/.hypothesis/" in what or what.startswith("/dev/")):
            found.add(f"fd {number} -> {what}")
    return found
