"""Bodies over real sockets on loopback, on uvloop and on the stock loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every test of this folder runs on both loops: their transports differ in all that matters here."""
    return {"uvloop": uvloop.new_event_loop, "stock": asyncio.new_event_loop}


# libuv keeps a pipe for signals from its first loop until the process ends: opened here, no test finds it left behind.
uvloop.new_event_loop().close()
