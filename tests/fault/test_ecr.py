"""A login of ECR from somebody else's reading of AWS's API: moto's server, as a process.

moto has no ECR Public; that one is checked against an endpoint of our own (tests/unit/test_credentials.py).
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

from proxy.clock import SystemClock
from proxy.engine.tasks import TaskOwner
from proxy.upstream.credentials.ecr import EcrCredentials
from tests.support import ports

HOST = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"


async def test_ecr_against_motos_server(tmp_path: Path) -> None:
    """Somebody else's reading of AWS's API."""
    port, owner = ports.take(), TaskOwner(print)
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
        )
    try:
        for _ in range(300):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
            except OSError:
                await asyncio.sleep(0.1)
        environ = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
        url = f"http://127.0.0.1:{port}"
        credentials = EcrCredentials(
            HOST, is_public=False, region="", endpoint=url, environ=environ, clock=SystemClock(), spawn=owner.spawn
        )
        found = await credentials.login()
        assert (found.username, bool(found.secret)) == ("AWS", True)
    finally:
        server.kill()
        server.wait()
        await owner.aclose()
