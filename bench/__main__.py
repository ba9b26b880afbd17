"""`python -m bench`: every work, interleaved over several rounds, as text, JSON and a picture."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import sys
import tempfile
from pathlib import Path

from bench import million, report, starts, work
from bench.restart import restart
from bench.work import Bench, Ledger

WORKS = ("P1", "P2", "P3", "P4", "P5", "P6", "P7", "DISK", "S", "TLS", "START")

_EACH_ROUND = {
    "P1": work.p1,
    "P2": work.p2,
    "P3": work.p3,
    "P6": work.p6,
    "P7": work.p7,
    "DISK": work.disk,
    "S": starts.both,
    "TLS": work.tls,
    "START": restart,
}


def main() -> int:
    """Returns 0 when every target that was measured was reached, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load that is bounded by time")
    parser.add_argument("--only", default=",".join(WORKS), help="e.g. P1,P3")
    parser.add_argument("--quick", action="store_true", help="smaller bodies, no thousand clients, no million blobs")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for results.{txt,json,png}")
    asked = parser.parse_args()
    wanted = asked.only.split(",")

    if shutil.which("nginx") is None:
        print("The upstream of this bench is nginx. Install it: apt-get install nginx-light", file=sys.stderr)
        return 2
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ledger = Ledger()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        os.chmod(folder, 0o755)  # nginx's workers are somebody else when it is started by root
        bench = Bench(Path(folder), ledger, asked.seconds, asked.quick)
        try:
            bench.set_up()
            for number in range(asked.rounds):
                bench.round = number
                print(f"round {number + 1} of {asked.rounds}", file=sys.stderr)
                for name in wanted:
                    _one(name, bench, is_first=number == 0)
        finally:
            bench.tear_down()

    machine = (
        f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}, {asked.rounds} rounds"
    )
    text = report.as_text(ledger, machine)
    print(text)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "results.txt").write_text(text)
    (asked.out / "results.json").write_text(report.as_json(ledger, machine))
    try:
        report.as_chart(ledger, asked.out / "results.png")
    except ImportError:
        print("no picture: matplotlib is not installed (dependency group bench)", file=sys.stderr)
    values = [(target, value) for target, value in report.judged(ledger) if value is not None]
    return int(any(value > t.bound if t.is_ceiling else value < t.bound for t, value in values))


def _one(name: str, bench: Bench, *, is_first: bool) -> None:
    if name == "P4":
        work.p4(bench, 64)
        if is_first and not bench.is_quick:
            work.p4(bench, 1000)
    elif name == "P5":
        if is_first and not bench.is_quick:
            million.p5(bench, 1_000_000)
    else:
        _EACH_ROUND[name](bench)


if __name__ == "__main__":
    sys.exit(main())
