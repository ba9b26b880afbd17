"""strace on a process that runs: its system calls fail, or kill it, as `-e inject=…` says, until it is let go.

Attached rather than started beneath it: the process lives through the fault and after it, without a restart. strace
counts calls for each thread by itself, so "the n-th" is the n-th of whichever thread comes that far.
"""

from __future__ import annotations

import asyncio
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from signal import SIGINT

from tests.support.process import program

#: How long strace may take to let go.
PATIENCE_S = 5


class CannotTrace(AssertionError):
    """strace could not attach; what it said is in the message."""


@asynccontextmanager
async def attached(pid: int, *options: str) -> AsyncIterator[None]:
    """Every thread of `pid` is traced with these options, now and until the block is left. Raises CannotTrace."""
    strace = await asyncio.create_subprocess_exec(
        program("strace"), "-f", "-p", str(pid), *options, stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE
    )
    try:
        assert strace.stderr is not None
        said = await strace.stderr.readline()
        if b"attached" not in said:
            raise CannotTrace(said.decode() + (await strace.stderr.read()).decode())
        yield
    finally:
        if strace.returncode is None:
            strace.send_signal(SIGINT)  # strace detaches, and the process goes on
        try:
            await asyncio.wait_for(strace.communicate(), PATIENCE_S)
        except TimeoutError:
            strace.kill()  # it waits for a thread that has just been killed; the kernel detaches all the same
            await strace.communicate()
