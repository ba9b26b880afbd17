"""Allow and deny lists (INV-8, product.md "Rules on tags").

Deny wins. A rule with a tag speaks about names: denying a tag denies the name only. A digest entry speaks about
content under every name. Kubelets fetch by digest, so a tag that is allowed allows the digests it resolved to here and
what those manifests name; that half needs the links and is asked through `tags_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from proxy.errors import Denied
from proxy.oci.digest import Digest
from proxy.oci.names import Tag
from proxy.rules.globs import Glob


@dataclass(frozen=True, slots=True)
class Rules:
    """The lists of one project, the `[policy]` list already among `deny`. Both in the order of the file.

    `closed` is true for `[policy] unmatched = "deny"` on the project of requests that belong to none.
    """

    project: str
    allow: tuple[Glob, ...] = ()
    deny: tuple[Glob, ...] = ()
    policy_deny: tuple[Glob, ...] = ()
    closed: bool = False

    @property
    def is_open(self) -> bool:
        """Whether no rule can refuse anything, so that nothing need be asked."""
        return not (self.allow or self.deny or self.policy_deny or self.closed)

    def check_repository(self, reference: str) -> None:
        """Whether anything of `<host>/<repository>` may be asked for at all. Raises Denied."""
        if self.closed:
            raise self._denied(
                reference, 'policy.unmatched = "deny"', "it belongs to no project, and such requests are refused"
            )
        for glob in self._denials():
            if glob.tag is None and glob.covers(reference):
                raise self._denied(reference, glob.text, "the repository is denied")
        if self.allow and not any(glob.digest is not None or glob.covers(reference) for glob in self.allow):
            raise self._denied(reference, "allow", "no entry of the allow list covers the repository")

    def check_tag(self, reference: str, tag: Tag) -> None:
        """Whether this tag may be asked for. Raises Denied."""
        self.check_repository(reference)
        for glob in self._denials():
            if glob.tag is not None and glob.covers(reference) and glob.covers_tag(tag.value):
                raise self._denied(f"{reference}:{tag}", glob.text, "the tag is denied")
        if not self.allows_tag(reference, tag.value):
            raise self._denied(f"{reference}:{tag}", "allow", "no entry of the allow list covers the tag")

    def allows_tag(self, reference: str, tag: str) -> bool:
        """Whether the allow list alone lets this tag through; an empty list allows everything."""
        return not self.allow or any(glob.covers(reference) and glob.covers_tag(tag) for glob in self.allow)

    def lists_tag(self, reference: str, tag: str) -> bool:
        """Whether the tag belongs in a tags/list answer."""
        denied = any(g.tag is not None and g.covers(reference) and g.covers_tag(tag) for g in self._denials())
        return not denied and self.allows_tag(reference, tag)

    def check_digest(self, reference: str, digest: Digest, tags_of: Callable[[], Iterable[str]]) -> None:
        """Whether this content may be asked for by digest. Raises Denied.

        `tags_of` gives the tags under which it was resolved here, itself or through what names it; it is called only
        when nothing but a tag rule could allow the digest.
        """
        self.check_content(reference, digest)
        self.check_repository(reference)
        if not self.allow or any(glob.tag is None and glob.covers(reference) for glob in self.allow):
            return
        if any(glob.digest == digest for glob in self.allow):
            return
        if any(self.allows_tag(reference, tag) for tag in tags_of()):
            return
        raise self._denied(
            f"{reference}@{digest}",
            "allow",
            "only certain tags are allowed, and none of them resolved to this digest here; pull an allowed tag first",
        )

    def check_content(self, reference: str, digest: Digest) -> None:
        """Whether the digest itself is denied, under whatever name. Raises Denied."""
        for glob in self._denials():
            if glob.digest == digest:
                raise self._denied(f"{reference}@{digest}", glob.text, "the digest is denied")

    def _denials(self) -> Iterable[Glob]:
        yield from self.policy_deny
        yield from self.deny

    def _denied(self, what: str, rule: str, why: str) -> Denied:
        of_policy = any(glob.text == rule for glob in self.policy_deny)
        owner = "[policy]" if of_policy or rule.startswith("policy.") else f"project {self.project!r}"
        return Denied(f"{what} is refused by rule {rule!r} of {owner}: {why}", rule=rule, project=self.project)
