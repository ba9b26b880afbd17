"""Projects as an operator sees them, in a real process before a real registry: why, how much, and what was refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.interop.conftest import upstreams_at
from tests.support.clients import TEST_HOST
from tests.support.commands import breakwater_command
from tests.support.images import Image, image
from tests.support.origin import Origin
from tests.support.process import Breakwater, eventually, fetched

_SEED = count(15_000)


@pytest.fixture(scope="module")
def appliance(scratch: Path, origin: Origin) -> Iterator[Breakwater]:
    """Two projects that share a repository, one of them with rules and tags that never move."""
    projects = {
        "team": {"match": [f"{TEST_HOST}/team/**"], "deny": ["**:latest"], "immutable_tags": ["v*"], "quota": "64MiB"},
        "other": {"quota": "64MiB"},
    }
    with Breakwater(scratch / "projects", upstreams_at(origin.url, tag_ttl="0s") | {"projects": projects}) as running:
        yield running
        running.stop_cleanly()


def pull(running: Breakwater, repository: str, wanted: Image) -> None:
    """As a node does, by tag 1."""
    assert fetched(running.port, f"/v2/{repository}/manifests/1") == (200, wanted.body)
    for blob in wanted.all_blobs():
        assert fetched(running.port, f"/v2/{repository}/blobs/{blob.digest}")[0] == 200


def audit_of(running: Breakwater) -> list[dict[str, Any]]:
    """The lines of the audit log."""
    text = (running.store / "breakwater" / "audit" / "audit.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def size_of(wanted: Image) -> int:
    """Manifest, config and layers."""
    return len(wanted.body) + sum(len(blob.content) for blob in wanted.all_blobs())


def test_a_fixed_tag_that_moves_is_told_in_log_metric_and_status(appliance: Breakwater, origin: Origin) -> None:
    """Served as before; said once."""
    name = f"team/fixed-{next(_SEED)}"
    first, second = (image(next(_SEED), (2000,)) for _ in range(2))
    origin.push(name, "v1", first)
    assert fetched(appliance.port, f"/v2/{TEST_HOST}/{name}/manifests/v1") == (200, first.body)
    origin.push(name, "v1", second)
    for _ in range(3):
        assert fetched(appliance.port, f"/v2/{TEST_HOST}/{name}/manifests/v1") == (200, first.body)
    sentence = f"{TEST_HOST}/{name}:v1 was moved to {second.digest} upstream; project 'team' keeps {first.digest}"
    eventually(lambda: sentence in appliance.log(), "the log has it")
    assert appliance.log().count(sentence) == 1
    assert 'breakwater_refused_tag_moves_total{project="team"} 1.0' in appliance.admin("/metrics")
    expected = {
        "project": "team",
        "reference": f"{TEST_HOST}/{name}:v1",
        "kept": first.digest,
        "upstream": second.digest,
    }
    assert expected in appliance.status()["refused_tag_moves"]


def test_du_and_metrics_show_logical_and_physical_use(appliance: Breakwater, origin: Origin) -> None:
    """What two projects asked for is paid by both, and on disk once."""
    name = f"team/shared-{next(_SEED)}"
    wanted = image(next(_SEED), (300_000, 5000))
    origin.push(name, "1", wanted)
    before = breakwater_command(appliance, "du", "--json").report
    pull(appliance, f"~team/{TEST_HOST}/{name}", wanted)
    pull(appliance, f"~other/{TEST_HOST}/{name}", wanted)
    after = breakwater_command(appliance, "du", "--json").report
    used = {one["project"]: one["used_bytes"] for one in before["projects"]}
    for one in after["projects"]:
        if one["project"] in ("team", "other"):
            assert one["used_bytes"] - used.get(one["project"], 0) == size_of(wanted)
            line = f'breakwater_project_bytes{{project="{one["project"]}"}} {float(one["used_bytes"])}'
            assert line in appliance.admin("/metrics")
    gained = {key: after["store"][key] - before["store"][key] for key in ("logical_bytes", "physical_bytes")}
    assert gained["logical_bytes"] == 2 * size_of(wanted)
    assert size_of(wanted) <= gained["physical_bytes"] < 1.2 * size_of(wanted), "in blocks of the file system"
    shown = breakwater_command(appliance, "du")
    assert shown.code == 0 and "logical " in shown.out and "physical " in shown.out and "64.0 MiB" in shown.out


def test_a_refusal_says_the_same_rule_everywhere_and_explain_said_so_before(
    appliance: Breakwater, origin: Origin
) -> None:
    """Explain, without fetching; then body, log, metric, audit log and the API's denials."""
    name = f"team/refused-{next(_SEED)}"
    origin.push(name, "latest", image(next(_SEED), (2000,)))
    n_before = len(origin.requests())
    reference = f"{TEST_HOST}/{name}:latest"
    told = breakwater_command(appliance, "explain", reference, "--json")
    assert told.code == 1
    assert (told.report["verdict"], told.report["rule"], told.report["project"]) == ("deny", "**:latest", "team")
    assert "denies   project 'team' deny: **:latest" in breakwater_command(appliance, "explain", reference).out
    allowed = breakwater_command(appliance, "explain", f"{TEST_HOST}/{name}:1", "--json")
    assert (allowed.code, allowed.report["verdict"]) == (0, "allow")
    assert len(origin.requests()) == n_before, "nothing was fetched"

    status, body = fetched(appliance.port, f"/v2/{TEST_HOST}/{name}/manifests/latest")
    (error,) = json.loads(body)["errors"]
    assert status == 403 and error["detail"] == {"rule": "**:latest", "project": "team"}
    assert error["message"] == told.report["sentence"]

    def lines() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in appliance.log().splitlines() if f"{name}/manifests/latest" in line]
        return [line for line in found if line.get("status") == 403]

    eventually(lines, "the log has it")
    assert {line["rule"] for line in lines()} == {"**:latest"}
    eventually(lambda: any(name in line.get("path", "") for line in audit_of(appliance)), "the audit log has it")
    assert [line["rule"] for line in audit_of(appliance) if name in line.get("path", "")] == ["**:latest"]
    assert 'breakwater_denied_total{project="team",rule="**:latest"}' in appliance.admin("/metrics")
    assert any(name in str(one) and "**:latest" in str(one) for one in appliance.admin("/api/v1/denials")["denials"])


def test_a_purge_is_in_the_audit_log(appliance: Breakwater, origin: Origin) -> None:
    """Who looks for what is gone finds when it went."""
    name = f"team/purged-{next(_SEED)}"
    wanted = origin.push(name, "1", image(next(_SEED), (2000,)))
    pull(appliance, f"{TEST_HOST}/{name}", wanted)
    done = breakwater_command(appliance, "purge", f"{TEST_HOST}/{name}")
    assert done.code == 0, done
    eventually(lambda: any("purged" in line.get("how", "") for line in audit_of(appliance)), "the audit log has it")
    (line,) = [line for line in audit_of(appliance) if "purged" in line.get("how", "")]
    assert (line["event"], line["what"]) == ("changed", "content") and name in line["name"]


def test_a_recount_repairs_drift_and_reports_it(appliance: Breakwater, origin: Origin) -> None:
    """A blob that somebody deleted behind our back is paid for by nobody after the next start."""
    name = f"team/drift-{next(_SEED)}"
    wanted = origin.push(name, "1", image(next(_SEED), (50_000,)))
    pull(appliance, f"{TEST_HOST}/{name}", wanted)
    layer = wanted.blobs[1]
    (before,) = [one for one in appliance.admin("/api/v1/usage")["projects"] if one["project"] == "team"]
    appliance.stop()
    (path,) = [path for path in appliance.store.rglob(layer.digest.removeprefix("sha256:")) if path.is_file()]
    os.unlink(path)
    appliance.start()
    eventually(lambda: appliance.admin("/api/v1/usage")["drift"], "it has recounted")
    usage = breakwater_command(appliance, "du", "--json").report
    assert usage["drift"] == [{"project": "team", "gone": 1, "resized": 0, "bytes": len(layer.content)}]
    (after,) = [one for one in usage["projects"] if one["project"] == "team"]
    assert before["used_bytes"] - after["used_bytes"] == len(layer.content)
    assert "recount: project 'team' paid for 1 blobs that are not stored" in appliance.log()
    assert "repaired: project team" in breakwater_command(appliance, "du").out
    again = breakwater_command(appliance, "du", "--recount", "--json")
    assert again.code == 0 and json.loads(again.out[again.out.index("{") :])["drift"] == []
