"""Which references a list asks for: one case for each kind of list that somebody has."""

from __future__ import annotations

import pytest

from proxy.image_lists import read
from proxy.rules.lists import in_documents, in_lines, merged

KUBEADM = """\
registry.k8s.io/kube-apiserver:v1.31.0
registry.k8s.io/kube-controller-manager:v1.31.0
registry.k8s.io/coredns/coredns:v1.11.3
registry.k8s.io/pause:3.10
registry.k8s.io/etcd:3.5.15-0
"""
KUBEADM_YAML = "apiVersion: output.kubeadm.k8s.io/v1alpha3\nimages:\n- registry.k8s.io/pause:3.10\nkind: Images\n"
K3S = "docker.io/rancher/klipper-helm:v0.9.3-build20241008\ndocker.io/rancher/mirrored-pause:3.6\n"
DIGEST = "sha256:" + "a" * 64
DEPLOYMENT = f"""\
---
# Source: chart/templates/deployment.yaml
apiVersion: apps/v1
kind: Deployment
spec:
  template:
    spec:
      initContainers:
        - name: wait
          image: "busybox:1.36"
      containers:
        - {{name: web, image: "quay.io/team/web@{DIGEST}", args: ["image: no"]}}
        - {{name: same, image: "busybox:1.36"}}
      volumes:
        - name: model
          image: {{reference: ghcr.io/team/model:1, pullPolicy: Always}}
---
apiVersion: v1
kind: Pod
spec:
  ephemeralContainers: [{{name: debug, image: alpine}}]
  containers: []
---
apiVersion: batch/v1
kind: CronJob
spec:
  jobTemplate: {{spec: {{template: {{spec: {{containers: [{{image: registry.test:5000/a/b:2}}]}}}}}}}}
---
"""


def references(text: str) -> list[str]:
    return [str(reference) for reference in read(text).references]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        pytest.param("", [], id="nothing"),
        pytest.param("# only\n\n  # comments\n", [], id="only comments"),
        pytest.param(
            "nginx\nalpine:3 # small\n", ["docker.io/library/nginx:latest", "docker.io/library/alpine:3"], id="short"
        ),
        pytest.param("a/b\r\na/b:latest\r\n", ["docker.io/a/b:latest"], id="each once"),
        pytest.param(KUBEADM, KUBEADM.split(), id="kubeadm"),
        pytest.param(KUBEADM_YAML, ["registry.k8s.io/pause:3.10"], id="kubeadm, as YAML"),
        pytest.param(K3S, K3S.split(), id="k3s and RKE2"),
        pytest.param(
            DEPLOYMENT,
            [
                f"quay.io/team/web@{DIGEST}",
                "docker.io/library/busybox:1.36",
                "ghcr.io/team/model:1",
                "docker.io/library/alpine:latest",
                "registry.test:5000/a/b:2",
            ],
            id="manifests, as Helm renders them",
        ),
        pytest.param(
            '{"kind": "List", "items": [{"spec": {"containers": [{"image": "a.test/x:1"}]}}]}',
            ["a.test/x:1"],
            id="JSON",
        ),
        pytest.param("- a.test/x:1\n- a.test/y:1\n", ["a.test/x:1", "a.test/y:1"], id="a list in YAML"),
    ],
)
def test_a_list_of_any_kind_is_understood(text: str, wanted: list[str]) -> None:
    """Issue 8: plain lists, manifests, Helm's output, kubeadm's, k3s's and RKE2's lists."""
    assert references(text) == wanted
    assert read(text).problems == ()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("nginx\nnot a reference\n", id="a line of words"),
        pytest.param("NGINX:1\n", id="upper case"),
        pytest.param("spec: {containers: [{image: '{{ .Values.image }}'}]}\n", id="a template that was not rendered"),
        pytest.param("kind: Images\nimages: [a.test/x:1, a..b]\n", id="one bad name"),
    ],
)
def test_what_is_no_reference_is_told(text: str) -> None:
    """Nothing is passed over in silence: a list that lost an image is found out on the wrong side of the gap."""
    assert len(read(text, "images.txt").problems) == 1
    assert read(text, "images.txt").problems[0].startswith("images.txt: ")


def test_aliases_do_not_make_an_endless_tree() -> None:
    """A billion laughs: ten lines of YAML that spell a tree of 10^9 nodes."""
    lines = ["a0: &a0 {containers: [{image: a.test/x:1}]}"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    assert references("\n".join(lines)) == ["a.test/x:1"]


def test_a_document_that_holds_itself_is_walked_once() -> None:
    """YAML can say that, too."""
    node: dict[str, object] = {"containers": [{"image": "a.test/x:1"}]}
    node["self"] = node
    assert len(in_documents([node]).references) == 1


def test_lists_add_up_in_order() -> None:
    """Several lists are one, each reference once."""
    both = merged([in_lines("a.test/x:1\nbad name\n"), in_lines("a.test/y:1\na.test/x:1\n")])
    assert [str(reference) for reference in both.references] == ["a.test/x:1", "a.test/y:1"]
    assert len(both.problems) == 1
