"""Reads image lists: text of any kind that `rules/lists.py` knows, YAML by PyYAML's safe loader."""

from __future__ import annotations

from proxy.rules.lists import Asked, in_documents, in_lines

#: A list is read into memory. The largest rendered charts have some megabytes.
MAX_BYTES = 64 << 20


def read(text: str, name: str = "") -> Asked:
    """What `text` asks for. `name` is what problems call it.

    A text whose every line is a reference is a plain list. Anything else is YAML (of which JSON is a part), and where
    it is not that either, a plain list with problems.
    """
    if len(text) > MAX_BYTES:
        return Asked((), (f"{name or 'the list'} is longer than {MAX_BYTES} bytes",))
    plain = in_lines(text)
    asked = plain if not plain.problems else _in_yaml(text) or plain
    if not name:
        return asked
    return Asked(asked.references, tuple(f"{name}: {problem}" for problem in asked.problems))


def _in_yaml(text: str) -> Asked | None:
    """None where the text is no YAML, or only a scalar, which every text is."""
    import yaml  # a tenth of a second that no other command should pay

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        documents = [document for document in yaml.load_all(text, Loader=loader) if document is not None]
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    if not any(isinstance(document, dict | list) for document in documents):
        return None
    return in_documents(documents)
