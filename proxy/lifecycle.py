"""The life of the process: start, signals, reload, drain, end. What runs in between is wiring's.

SIGTERM and SIGINT: readiness fails, nothing new is accepted, running answers have `server.shutdown_grace`; a second one
hurries. SIGHUP: the settings are read again and taken up whole, or not at all. Before everything is up SIGTERM keeps
its default, which ends a start that hangs at once, whatever it hangs on: there is nothing to lose yet, and a service
manager that gives a start up must not have to wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping

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


def run(settings: Settings, load: Load, environ: Mapping[str, str] = os.environ) -> int:
    """Serve until told to stop, with what `load` reads whenever SIGHUP comes. Returns the exit code: 0 after a clean
    stop, 1 when it could not start.

    Raises InvalidSettings when a file that the settings name cannot be used: that is the caller's to say.
    """
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
    for number in _ENDING:
        loop.add_signal_handler(number, stop.set)
    try:
        log.say("info", appliance.greeting())
        notifier.ready(_status_of(appliance))
        notifier.feed_watchdog(lambda: _status_of(appliance))
        appliance.around.owner.spawn_background(_reload_forever(appliance, reload, load, log, notifier), "reload")
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
    appliance: Appliance, asked: asyncio.Event, load: Load, log: EventLog, notifier: Notifier
) -> None:
    """One reload at a time; signals that come during one are one more."""
    while True:
        await asked.wait()
        asked.clear()
        notifier.reloading()
        try:
            await _reload(appliance, load, log)
        finally:
            notifier.ready(_status_of(appliance))  # also when nothing changed: the manager waits for it


async def _reload(appliance: Appliance, load: Load, log: EventLog) -> None:
    try:
        held = await appliance.reload(await asyncio.to_thread(load))
    except BreakwaterError as error:
        problems = error.problems if isinstance(error, InvalidSettings) else [str(error)]
        appliance.reports.reload_problem = "; ".join(" ".join(problem.split()) for problem in problems)
        log.say("error", f"reload: nothing was changed: {appliance.reports.reload_problem}")
        return
    settings = appliance.settings
    log.adjust(as_json=_is_json(settings), level=settings.log.level, requests=settings.server.request_log)
    appliance.reports.reload_problem = ""
    waiting = f"; these change at the next start only: {', '.join(held)}" if held else ""
    log.say("warning" if held else "info", f"reload: settings, certificates and credentials are taken up{waiting}")


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
