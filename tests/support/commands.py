"""The command line, as an operator types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.support.process import Breakwater


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        """What --json printed."""
        found: dict[str, Any] = json.loads(self.out)
        return found


def breakwater_command(
    at: Breakwater,
    *arguments: str,
    text: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 120,
) -> Done:
    """Run `breakwater <arguments>` with the settings of `at`, running or not. `text` is its standard input."""
    done = subprocess.run(
        [sys.executable, "-m", "proxy", arguments[0], "--config", str(at.settings_path), *arguments[1:]],
        input=(text or "").encode(),
        capture_output=True,
        env={**os.environ, **(env or {})},
        timeout=timeout_s,
        check=False,
    )
    return Done(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))
