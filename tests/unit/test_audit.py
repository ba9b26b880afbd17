"""telemetry/audit.py: refusals and changes, one JSON object a line, turned over by size."""

from __future__ import annotations

import json
import resource
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxy.events import Answered, Changed
from proxy.telemetry.audit import Audit, TurningFile
from proxy.telemetry.log import LineWriter


def lines_of(path: Path) -> list[dict[str, object]]:
    """What the file says."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(**words: object) -> Answered:
    """A denial as web/registry.py reports it."""
    told = {"kind": "manifest", "status": 403, "outcome": "denied", "project": "team", "rule": "**:latest", **words}
    return Answered("id-1", "10.0.0.1", "GET", "/v2/x/manifests/latest", "agent", **told)  # type: ignore[arg-type]


def test_denials_and_changes_are_written_and_nothing_else(tmp_path: Path) -> None:
    """Each with the rule's name, so that it is found in metrics and error bodies alike."""
    path = tmp_path / "audit" / "audit.jsonl"
    writer = LineWriter(file := TurningFile(path))
    audit = Audit(writer, lambda: 1_800_000_000.0)
    audit.observe(refused(caller="ci", error="no"))
    audit.observe(refused(status=200, outcome="hit"))
    audit.observe(refused(status=401, kind="version"))
    audit.observe(Changed("robot", "ci", "removed"))
    writer.close()
    file.close()
    denied, changed = lines_of(path)
    assert (denied["event"], denied["project"], denied["rule"], denied["caller"]) == (
        "denied",
        "team",
        "**:latest",
        "ci",
    )
    assert changed == {
        "time": "2027-01-15T08:00:00.000+00:00",
        "event": "changed",
        "what": "robot",
        "name": "ci",
        "how": "removed",
    }
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_a_client_sent_stays_on_its_line(tmp_path: Path) -> None:
    """CWE-117: a line end in a path is not a line end in the file."""
    writer = LineWriter(file := TurningFile(tmp_path / "a"))
    event = refused(error="x\ny\u2028z")
    event.path = '/v2/a\n{"event":"forged"}'
    Audit(writer, lambda: 0.0).observe(event)
    writer.close()
    file.close()
    (line,) = lines_of(tmp_path / "a")
    assert line["event"] == "denied"


def test_the_file_is_turned_over_by_size_and_the_oldest_thrown_away(tmp_path: Path) -> None:
    """A flood of refusals does not fill the disk."""
    path = tmp_path / "audit.jsonl"
    file = TurningFile(path, max_bytes=100, n_old=2)
    for n in range(10):
        file.write(f"{n}" * 60 + "\n")
    file.close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    names = ("audit.jsonl.2", "audit.jsonl.1", "audit.jsonl")
    assert [path.with_name(name).read_text()[0] for name in names] == ["7", "8", "9"]
    assert all(path.with_name(name).stat().st_size <= 100 for name in names), "at no moment longer"
    again = TurningFile(path, max_bytes=100, n_old=2)
    again.write("a\n")
    again.close()
    assert path.read_text().endswith("a\n")


def test_lines_that_come_together_are_turned_over_one_by_one(tmp_path: Path) -> None:
    """Whatever comes at once, the whole log stays within its share; what no file can hold is left out."""
    path = tmp_path / "audit.jsonl"
    file = TurningFile(path, max_bytes=100, n_old=1)
    file.write("".join(f"{n}" * 60 + "\n" for n in range(5)) + "x" * 200 + "\n")
    file.close()
    assert [path.with_name(name).read_text()[0] for name in ("audit.jsonl.1", "audit.jsonl")] == ["3", "4"]


def test_what_a_larger_life_left_is_trimmed_at_the_start(tmp_path: Path) -> None:
    """A store that was made smaller: its share of the capacity binds the log, too."""
    path = tmp_path / "audit.jsonl"
    for name in ("audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"):
        (tmp_path / name).write_text("x" * 150)
    TurningFile(path, max_bytes=100, n_old=2).close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["audit.jsonl", "audit.jsonl.1"]


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """A disk that takes the beginning of a line and not the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_half_a_line_has_none_of_it(tmp_path: Path) -> None:
    """One JSON object a line, also of those around a failure; what comes when there is room again is written."""
    path = tmp_path / "audit.jsonl"
    file = TurningFile(path)
    file.write("a" * 60 + "\n")
    with files_of_at_most(100), pytest.raises(OSError, match=r"\[Errno"):
        file.write("b" * 60 + "\n")
    assert path.read_text() == "a" * 60 + "\n"
    file.write("c\n")
    file.close()
    assert path.read_text() == "a" * 60 + "\nc\n"


def test_a_turn_that_fails_is_not_the_end_of_the_log(tmp_path: Path) -> None:
    """The folder is gone in the middle of it; once it is back, so is the log."""
    path = tmp_path / "audit" / "audit.jsonl"
    file = TurningFile(path, max_bytes=100, n_old=1)
    file.write("a" * 60 + "\n")
    shutil.rmtree(path.parent)
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            file.write("b" * 60 + "\n")
    path.parent.mkdir()
    file.write("c\n")
    file.close()
    assert path.read_text() == "c\n"


class Failing:
    """A sink that takes nothing until it is mended."""

    def __init__(self) -> None:
        self.text = ""
        self.is_broken = True
        self.failed = threading.Event()

    def write(self, text: str) -> int:
        if self.is_broken:
            self.failed.set()
            raise OSError("no room")
        self.text += text
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


def test_lines_that_are_lost_are_counted_in_a_line_like_all_others() -> None:
    """Whoever reads the audit log by a program sees that something is missing, and is not stopped by it."""
    sink = Failing()
    writer = LineWriter(sink)
    audit = Audit(writer, lambda: 0.0)
    audit.observe(refused())
    assert sink.failed.wait(30)
    sink.is_broken = False
    audit.observe(refused(status=401))
    writer.close()
    kinds = [(line["event"], line.get("lines")) for line in map(json.loads, sink.text.splitlines())]
    assert kinds == [("denied", None), ("dropped", 1)]
