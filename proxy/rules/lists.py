"""Image lists: which references a text or a set of parsed documents asks for.

Knows plain lists (one reference a line, `#` comments; `kubeadm config images list`, k3s and RKE2 write these) and
documents: Kubernetes manifests, Helm's output, `kubeadm config images list -o yaml`. What YAML is, is not known here:
documents arrive as plain dictionaries and lists. Nothing is guessed: an image that no container spec names is not
found, and what cannot be a reference is told and not passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from proxy.errors import BreakwaterError
from proxy.oci.names import Reference

#: Lists of containers in a pod's spec (Kubernetes API, PodSpec).
CONTAINER_LISTS = ("containers", "initContainers", "ephemeralContainers")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a list asks for, each reference once and in the list's order; and what in it could not be understood."""

    references: tuple[Reference, ...] = ()
    problems: tuple[str, ...] = ()


def in_lines(text: str) -> Asked:
    """The references of a plain list. A problem names its line."""
    found: dict[Reference, None] = {}
    problems: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 1:
            problems.append(f"line {number}: {line.strip()[:150]!r} is not one reference")
            continue
        _add(words[0], f"line {number}", found, problems)
    return Asked(tuple(found), tuple(problems))


def in_documents(documents: Iterable[Any]) -> Asked:
    """The references of parsed documents: every container spec, however deep, image volumes and kubeadm's lists."""
    found: dict[Reference, None] = {}
    problems: list[str] = []
    for number, document in enumerate(documents, start=1):
        for text in _images(document):
            _add(text, f"document {number}", found, problems)
    return Asked(tuple(found), tuple(problems))


def merged(lists: Iterable[Asked]) -> Asked:
    """Several lists as one."""
    references: dict[Reference, None] = {}
    problems: list[str] = []
    for each in lists:
        references.update(dict.fromkeys(each.references))
        problems.extend(each.problems)
    return Asked(tuple(references), tuple(problems))


def _add(text: str, place: str, found: dict[Reference, None], problems: list[str]) -> None:
    try:
        found[Reference.parse(text)] = None
    except BreakwaterError as error:
        problems.append(f"{place}: {text[:150]!r} is not an image reference: {error}")


def _images(document: Any) -> Iterator[str]:
    """Every image that a document names. Each node once: YAML's aliases can make a small file an endless tree."""
    if isinstance(document, list) and all(isinstance(entry, str) for entry in document):
        yield from document
        return
    if isinstance(document, dict) and document.get("kind") == "Images":
        yield from (entry for entry in document.get("images") or () if isinstance(entry, str))
        return
    seen: set[int] = set()
    waiting = [document]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, dict | list) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, list):
            waiting.extend(reversed(node))
            continue
        for name in CONTAINER_LISTS:
            yield from _named(node.get(name), "image")
        volumes = node.get("volumes")
        if isinstance(volumes, list):  # image volumes, Kubernetes 1.31
            yield from _named([v.get("image") for v in volumes if isinstance(v, dict)], "reference")
        waiting.extend(reversed(list(node.values())))


def _named(entries: Any, key: str) -> Iterator[str]:
    if not isinstance(entries, list):
        return
    for entry in entries:
        text = entry.get(key) if isinstance(entry, dict) else None
        if isinstance(text, str) and text.strip():
            yield text.strip()
