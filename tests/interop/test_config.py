"""What config/ ships for others to read: Kubernetes, Prometheus and Grafana, each judged by its own schema or tool.

The settings files beside them are tests/unit/test_settings.py's.
"""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from proxy.settings import Settings, parse
from tests.support.process import START_S, Breakwater, program, run

CONFIG = Path(__file__).parents[2] / "config"
MANIFESTS = sorted((CONFIG / "kubernetes").glob("*.yaml"))
#: The oldest and the newest that the schemas know and clusters run.
VERSIONS = ("1.28", "1.35")
#: Kinds of an operator's, whose schema is not Kubernetes' own.
FOREIGN = {"ServiceMonitor"}

_METRIC = re.compile(r"\bbreakwater_[a-z_]+")


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def of_kind(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    return (document for document in documents(path) if document["kind"] == kind)


def the_pod(path: Path, kind: str) -> dict[str, Any]:
    (workload,) = of_kind(path, kind)
    pod: dict[str, Any] = workload["spec"]["template"]["spec"]
    return pod


def settings_in(path: Path) -> Settings:
    (config_map,) = of_kind(path, "ConfigMap")
    return parse(tomllib.loads(config_map["data"]["breakwater.toml"]))


every_manifest = pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
NODE = CONFIG / "kubernetes" / "node-mirror.yaml"


# -- Kubernetes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@every_manifest
def test_manifests_follow_kubernetes_schemas(path: Path, version: str) -> None:
    """Strictly: a key that the API would drop without a word is an error here."""
    validated = [document for document in documents(path) if document["kind"] not in FOREIGN]
    assert validated
    for document in validated:
        kubernetes_validate.validate(document, version, strict=True)


@every_manifest
def test_what_manifests_name_is_there(path: Path) -> None:
    """Volumes, ports, selectors and namespaces agree with each other, across documents."""
    found = documents(path)
    (namespace,) = (document["metadata"]["name"] for document in found if document["kind"] == "Namespace")
    assert {document["metadata"].get("namespace", namespace) for document in found} == {namespace}
    names = {(document["kind"], document["metadata"]["name"]) for document in found}
    (workload,) = (document for document in found if document["kind"] in ("DaemonSet", "Deployment"))
    labels = workload["spec"]["template"]["metadata"]["labels"]
    pod = workload["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for container in (*pod.get("initContainers", ()), *pod["containers"]):
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
        assert container["securityContext"]["readOnlyRootFilesystem"]
    for volume in volumes.values():
        for kind, field, key in (
            ("ConfigMap", "configMap", "name"),
            ("Secret", "secret", "secretName"),
            ("PersistentVolumeClaim", "persistentVolumeClaim", "claimName"),
        ):
            assert field not in volume or (kind, volume[field][key]) in names
    ports = {port["name"] for port in pod["containers"][0]["ports"]}
    services = [document for document in found if document["kind"] == "Service"]
    for service in services:
        assert service["spec"]["selector"].items() <= labels.items()
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    for monitor in (document for document in found if document["kind"] == "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        (service,) = (each for each in services if wanted <= each["metadata"]["labels"].items())
        assert {end["port"] for end in monitor["spec"]["endpoints"]} <= {
            port["name"] for port in service["spec"]["ports"]
        }


@every_manifest
def test_settings_in_manifests_are_right_and_fit_the_pod(path: Path) -> None:
    """The ConfigMap parses; its ports are the pod's; the pod's time to end is longer than the grace."""
    settings = settings_in(path)
    (workload,) = (document for document in documents(path) if document["kind"] in ("DaemonSet", "Deployment"))
    pod = workload["spec"]["template"]["spec"]
    ports = {port["name"]: port["containerPort"] for port in pod["containers"][0]["ports"]}
    assert {listening.port for listening in settings.server.listen} == {ports["registry"]}  # type: ignore[union-attr]
    assert settings.server.admin_listen.port == ports["admin"]  # type: ignore[union-attr]
    assert pod["terminationGracePeriodSeconds"] > settings.server.shutdown_grace
    mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert settings.store.path in mounts


def test_the_node_mirror_needs_nothing_of_the_cluster() -> None:
    """It starts on a node without CNI and DNS, under every taint, before others, from another registry; IPv6, too."""
    pod = the_pod(NODE, "DaemonSet")
    assert pod["hostNetwork"] is True
    assert pod["dnsPolicy"] == "Default"
    assert pod["priorityClassName"] == "system-node-critical"
    assert pod["tolerations"] == [{"operator": "Exists"}]
    settings = settings_in(NODE)
    mirrored = {str(host) for host in settings.upstreams}
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["image"].partition("/")[0] not in mirrored, "its own image would come through itself"
    hosts = {host for listening in settings.server.listen for host in listening.hosts}  # type: ignore[union-attr]
    assert hosts == {"0.0.0.0", "::"}


# -- Prometheus and Grafana --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metrics(scratch: Path) -> str:
    """What a running Breakwater exports, after it has been asked for something."""
    settings = {
        "upstreams": {"docker.io": {"url": "http://127.0.0.1:1"}},
        "projects": {"platform": {"match": ["docker.io/**"], "quota": "1GiB", "deny": ["**:latest"]}},
    }
    with Breakwater(scratch / "exporting", settings) as breakwater:
        for tag in ("latest", "1"):
            connection = http.client.HTTPConnection("127.0.0.1", breakwater.port, timeout=START_S)
            connection.request("GET", f"/v2/library/x/manifests/{tag}")
            assert connection.getresponse().status in (403, 502)
            connection.close()
        text = breakwater.admin("/metrics")
        assert isinstance(text, str)
        return text


def test_the_metrics_page_is_clean(metrics: str) -> None:
    """`promtool check metrics` finds nothing: names, types, help texts, units."""
    done = subprocess.run(
        [program("promtool"), "check", "metrics"], input=metrics, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_names_that_are_a_contract_are_exported(metrics: str) -> None:
    """product.md, "What a client and an operator see"."""
    assert exported(metrics) >= {
        *("breakwater_requests_total", "breakwater_response_bytes_total", "breakwater_upstream_requests_total"),
        *("breakwater_upstream_bytes_total", "breakwater_store_bytes", "breakwater_store_capacity_bytes"),
        *("breakwater_evicted_bytes_total", "breakwater_project_bytes", "breakwater_denied_total"),
        *("breakwater_transfers_in_flight", "breakwater_upstream_up", "breakwater_request_duration_seconds"),
    }


def exported(metrics: str) -> set[str]:
    return set(re.findall(r"^# TYPE (\S+)", metrics, re.MULTILINE))


def test_the_alert_rules_fire_when_they_should_and_else_not() -> None:
    """Each of them fires on what it is for, and none on a healthy instance (`promtool test rules`)."""
    rules = CONFIG / "prometheus" / "breakwater.rules.yml"
    run([program("promtool"), "check", "rules", "--lint=all", "--lint-fatal", str(rules)])
    run([program("promtool"), "test", "rules", str(rules.with_suffix("").with_suffix(".rules.test.yml"))])


def expressions() -> Iterator[str]:
    rules = yaml.safe_load((CONFIG / "prometheus" / "breakwater.rules.yml").read_text())
    yield from (rule["expr"] for group in rules["groups"] for rule in group["rules"])
    board = json.loads((CONFIG / "grafana" / "breakwater.json").read_text())
    yield from (target["expr"] for panel in board["panels"] for target in panel["targets"])


def test_alerts_and_dashboard_ask_for_what_is_exported(metrics: str) -> None:
    """A metric that is renamed would leave a panel empty and an alert silent."""
    suffixes = ("", "_bucket", "_sum", "_count")
    there = {name + suffix for name in exported(metrics) for suffix in suffixes}
    for expression in expressions():
        assert set(_METRIC.findall(expression)) <= there, expression


def test_the_dashboard_asks_in_promql(scratch: Path) -> None:
    """Every panel's expression parses, its variables replaced as Grafana does; panels do not overlap."""
    board = json.loads((CONFIG / "grafana" / "breakwater.json").read_text())
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m").replace("$instance", ".*")}
        for number, expression in enumerate(expressions())
    ]
    path = scratch / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    run([program("promtool"), "check", "rules", str(path)])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places) > 10
