"""Rules that can never be asked: projects hidden by an earlier one, entries that a denial covers or that stand twice.

Whether one pattern covers all that another matches is tried out: on names made of the second, with words nobody uses
where it has stars. A pattern that takes those takes anything in their place. Only what is hidden whole is a mistake;
projects that overlap in part are how exceptions are written, and the first of the file wins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from proxy.settings import values
from proxy.settings.model import Project

#: What stands for a star: nobody's name. And for two: none, one, and several elements of such.
_WORD = "zq7"
_WORDS = (_WORD, f"{_WORD}/{_WORD}", f"{_WORD}/{_WORD}/{_WORD}/{_WORD}")
_STARS = re.compile(r"\*\*/|\*\*|\*")
#: A pattern with more stars than this is not tried out.
_MOST_STARS = 5


def hidden_matches(projects: Mapping[str, Project]) -> Iterator[tuple[str, int, str]]:
    """(project, entry of its match, why) for each entry that brings nothing: an earlier project takes it all."""
    earlier: list[tuple[str, str]] = []
    for name, project in projects.items():
        for number, glob in enumerate(project.match):
            for owner, other in earlier:
                if covers(other, glob):
                    what = "is matched there, too" if other == glob else f"is covered by {other} there"
                    yield name, number, f"{glob} brings nothing here: project {owner} stands before, and it {what}"
                    break
        earlier += ((name, glob) for glob in project.match)


def hidden_rules(allow: Sequence[str], deny: Sequence[str], policy: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """(allow or deny, entry, why) for each entry that changes nothing."""
    for key, entries in (("allow", allow), ("deny", deny)):
        for number, rule in enumerate(entries):
            if rule in entries[:number]:
                yield key, number, f"{rule} is written twice"
    for number, rule in enumerate(allow):
        for owner, denials in (("deny", deny), ("policy.deny", policy)):
            denial = next((each for each in denials if _denies_all(each, rule)), None)
            if denial is not None:
                yield "allow", number, f"{rule} allows nothing: {owner} has {denial}, and deny wins"
                break


def covers(glob: str, other: str) -> bool:
    """Whether a pattern for repositories takes everything that another one does."""
    stars = _STARS.findall(other)
    if len(stars) > _MOST_STARS:
        return glob == other
    taken = _compiled(glob)
    parts = _STARS.split(other)
    choices = [
        ("", f"{_WORD}/", f"{_WORD}/{_WORD}/") if star == "**/" else _WORDS if star == "**" else (_WORD,)
        for star in stars
    ]
    return all(
        taken.fullmatch("".join(part + word for part, word in zip(parts, (*words, ""), strict=True)))
        for words in product(*choices)
    )


def _denies_all(denial: str, rule: str) -> bool:
    if values.is_digest_rule(rule) or values.is_type_rule(rule):
        return denial == rule
    if values.is_digest_rule(denial) or values.is_type_rule(denial):
        return False
    repository, tag = values.split_tag(rule)
    denied, denied_tag = values.split_tag(denial)
    if not covers(denied, repository):
        return False
    return not denied_tag or (bool(tag) and covers(denied_tag, tag))


def _compiled(glob: str) -> re.Pattern[str]:
    """As rules/globs.py reads it; a test holds the two together."""
    out, position = [], 0
    for star in _STARS.finditer(glob):
        out.append(re.escape(glob[position : star.start()]))
        out.append({"**/": r"(?:.+/)?", "**": r".*", "*": r"[^/]*"}[star[0]])
        position = star.end()
    return re.compile("".join((*out, re.escape(glob[position:]))))
