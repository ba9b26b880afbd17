"""The life of the process: start, signals, reload, drain, end. What runs in between is wiring's.

SIGTERM and SIGINT: readiness fails, nothing new is accepted, running answers have `server.shutdown_grace`; a second one
hurries. SIGHUP: the settings are read again and taken up whole, or not at all. Before everything is up SIGTERM keeps
its default, which ends a start that hangs at once, whatever it hangs on: there is nothing to lose yet, and a service
manager that gives a start up must not have to wait for it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Literal

import uvloop

from proxy.clock import SystemClock
from proxy.errors import BreakwaterError, InvalidSettings, StoreError
from proxy.service import sockets
from proxy.service.notify import Notifier
from proxy.settings import Settings
from proxy.telemetry.log import EventLog, LineWriter, LoggingBridge
from proxy.wiring import Appliance

#: Reads the settings again, from where they were read at first. Raises InvalidSettings. May block.
Load = Callable[[], Settings]

_ENDING = (signal.SIGTERM, signal.SIGINT)
#: How long a thread that only computes (the count of a million blobs does) may go on while the loop wants to, in seconds.
#: CPython's own 5 ms, met a few times on the way of one answer, were 20 (bench/README.md, P5).
_SWITCH_S = 0.0005


def run(settings: Settings, load: Load, environ: Mapping[str, str] = os.environ) -> int:
    """Serve until told to stop, with what `load` reads whenever SIGHUP comes. Returns the exit code: 0 after a clean
    stop, 1 when it could not start.

    Raises InvalidSettings when a file that the settings name cannot be used: that is the caller's to say.
    """
    sys.setswitchinterval(_SWITCH_S)
    clock = SystemClock()
    writer = LineWriter(sys.stderr)
    log = EventLog(
        writer,
        clock.wall,
        as_json=_is_json(settings),
        level=settings.log.level,
        requests=settings.server.request_log,
    )
    logging.basicConfig(handlers=[LoggingBridge(log)], force=True)
    notifier = Notifier(environ, os.getpid(), clock.monotonic)
    handed = sockets.handed(environ, os.getpid())
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, load, log, notifier, handed))
        return 0
    except KeyboardInterrupt:
        return 1  # before it was up; after that SIGINT is a clean stop
    except StoreError as error:
        log.say("error", f"cannot start: {error}")
        return 1
    except OSError as error:
        log.say("error", f"cannot start: {error.strerror or error}")
        return 1
    finally:
        handed.close()
        notifier.close()
        writer.close()


async def _serve(settings: Settings, load: Load, log: EventLog, notifier: Notifier, handed: sockets.Handed) -> None:
    """Everything up, until told to stop; then everything down in the opposite order."""
    loop = asyncio.get_running_loop()
    stop, reload, hurry = asyncio.Event(), asyncio.Event(), loop.create_future()
    loop.add_signal_handler(signal.SIGHUP, reload.set)  # its default would end us; early, it waits for its turn
    appliance = await Appliance.start(settings, log, handed)
    # What was imported and built stays for good: the collector, which looks at all there is each time, and 45 ms long for
    # that, need not look at it again.
    gc.freeze()
    for number in _ENDING:
        loop.add_signal_handler(number, stop.set)
    try:
        log.say("info", appliance.greeting())
        notifier.ready(_status_of(appliance))
        notifier.feed_watchdog(lambda: _status_of(appliance))
        rereading = _Rereading(appliance, load, log)
        appliance.reread = rereading.now
        appliance.around.owner.spawn_background(_reload_forever(appliance, reload, rereading, notifier), "reload")
        await stop.wait()
        grace_s = appliance.settings.server.shutdown_grace
        notifier.stopping(f"stopping: running answers have {grace_s:g} s")
        log.say("info", f"stopping: running answers have {grace_s:g} s")
        for number in _ENDING:
            loop.remove_signal_handler(number)
            loop.add_signal_handler(number, _resolve, hurry)
        await appliance.drain(grace_s, hurry)
    finally:
        await appliance.aclose()
        notifier.close()
    log.say("info", "stopped")


async def _reload_forever(
    appliance: Appliance, asked: asyncio.Event, rereading: _Rereading, notifier: Notifier
) -> None:
    """One reload at a time; signals that come during one are one more."""
    while True:
        await asked.wait()
        asked.clear()
        notifier.reloading()
        try:
            await rereading.now()
        except BreakwaterError:
            pass  # said where it happened; what was in effect stays so
        finally:
            notifier.ready(_status_of(appliance))  # also when nothing changed: the manager waits for it


class _Rereading:
    """The settings read again and taken up: for SIGHUP and for the admin listener, one at a time."""

    def __init__(self, appliance: Appliance, load: Load, log: EventLog) -> None:
        self._appliance = appliance
        self._load = load
        self._log = log
        self._one_at_a_time = asyncio.Lock()

    async def now(self) -> tuple[str, ...]:
        """Returns the keys that wait for the next start. Raises InvalidSettings, or another BreakwaterError, when
        nothing was changed. The log, readiness and metrics have been told either way."""
        async with self._one_at_a_time:
            reports = self._appliance.reports
            try:
                held = await self._appliance.reload(await asyncio.to_thread(self._load))
            except BreakwaterError as error:
                problems = error.problems if isinstance(error, InvalidSettings) else [str(error)]
                reports.reload_problem = "; ".join(" ".join(problem.split()) for problem in problems)
                self._log.say("error", f"reload: nothing was changed: {reports.reload_problem}")
                raise
            settings = self._appliance.settings
            self._log.adjust(as_json=_is_json(settings), level=settings.log.level, requests=settings.server.request_log)
            reports.reload_problem = ""
            waiting = f"; these change at the next start only: {', '.join(held)}" if held else ""
            level: Literal["warning", "info"] = "warning" if held else "info"
            self._log.say(level, f"reload: settings, certificates and credentials are taken up{waiting}")
            return held


def _status_of(appliance: Appliance) -> str:
    """The line for the service manager."""
    word, reason = appliance.reports.readiness()
    where = " ".join(appliance.serving.data.addresses)
    problem = f"; last reload: {appliance.reports.reload_problem}" if appliance.reports.reload_problem else ""
    return f"{word}{f' ({reason})' if reason else ''}, on {where}{problem}"


def _is_json(settings: Settings) -> bool:
    return settings.log.format == "json" or (settings.log.format == "auto" and not sys.stderr.isatty())


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
