"""Allow and deny lists (INV-8, product.md "Rules on tags").

Deny wins. A rule with a tag speaks about names: denying a tag denies the name only. A digest entry speaks about content
under every name, and so does a media type. Kubelets fetch by digest, so a tag that is allowed allows the digests it
resolved to here and what those manifests name; that half needs the links and is asked through `tags_of`.

Media types are a list of their own: where `allow` has any, content must match one of them, and its name one of the
others, if there are others. Content whose media type nobody has said cannot be judged by such rules, and is refused.

Hundreds of rules cost a request nothing: what they come to is worked out once for each repository and tag, and kept for
as long as the rules are. A reload makes new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from proxy.errors import Denied
from proxy.oci.descriptor import Descriptor
from proxy.oci.digest import Digest
from proxy.oci.names import Tag
from proxy.rules.globs import Glob

#: The word for a denial by size.
SIZE_RULE = "max_blob"
#: Repositories whose verdicts are kept, and tags of each.
MAX_KEPT = 10_000

#: Why something is refused: the rule as written, and a clause for the sentence.
Refusal = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Trial:
    """One rule that was tried. `result`: "denies", "allows", or "passes" where it does not speak about this."""

    owner: str
    rule: str
    result: str
    why: str = ""


class _Here:
    """What the rules come to for one repository."""

    __slots__ = ("refusal", "tag_allows", "tag_denials", "tags", "whole")

    def __init__(self, rules: Rules, reference: str) -> None:
        names = [glob for glob in rules.allow if glob.media_type is None]
        covering = [glob for glob in names if glob.covers(reference)]
        self.tag_denials = [glob for glob in rules.denials() if glob.tag is not None and glob.covers(reference)]
        self.tag_allows = covering
        #: Whether every digest may be asked for, whatever tag it had.
        self.whole = not names or any(glob.tag is None for glob in covering)
        self.refusal: Refusal | None = None
        self.tags: dict[str, Refusal | None] = {}
        if rules.closed:
            self.refusal = ('policy.unmatched = "deny"', "it belongs to no project, and such requests are refused")
            return
        for glob in rules.denials():
            if glob.tag is None and glob.covers(reference):
                self.refusal = (glob.text, "the repository is denied")
                return
        if names and not covering and not any(glob.digest is not None for glob in names):
            self.refusal = ("allow", "no entry of the allow list covers the repository")

    def of_tag(self, tag: str, has_allows: bool) -> Refusal | None:
        """Why this tag may not be asked for, or None."""
        if tag in self.tags:
            return self.tags[tag]
        found = self.refusal or self._judged(tag, has_allows)
        if len(self.tags) >= MAX_KEPT:
            self.tags.clear()
        self.tags[tag] = found
        return found

    def _judged(self, tag: str, has_allows: bool) -> Refusal | None:
        for glob in self.tag_denials:
            if glob.covers_tag(tag):
                return glob.text, "the tag is denied"
        if has_allows and not any(glob.covers_tag(tag) for glob in self.tag_allows):
            return "allow", "no entry of the allow list covers the tag"
        return None


@dataclass(frozen=True, slots=True)
class Rules:
    """The lists of one project, the `[policy]` list beside them. All in the order of the file.

    `closed` is true for `[policy] unmatched = "deny"` on the project of requests that belong to none. `max_blob` is the
    largest blob that may be had, in bytes.
    """

    project: str
    allow: tuple[Glob, ...] = ()
    deny: tuple[Glob, ...] = ()
    policy_deny: tuple[Glob, ...] = ()
    closed: bool = False
    max_blob: int | None = None
    _here: dict[str, _Here] = field(default_factory=dict, init=False, repr=False, compare=False)
    _digests: dict[Digest, Glob] = field(default_factory=dict, init=False, repr=False, compare=False)
    _types: dict[str, Refusal | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for glob in self.denials():
            if glob.digest is not None:
                self._digests.setdefault(glob.digest, glob)

    @property
    def is_open(self) -> bool:
        """Whether no rule can refuse anything, so that nothing need be asked."""
        return not (self.allow or self.deny or self.policy_deny or self.closed or self.max_blob is not None)

    @property
    def names_media_types(self) -> bool:
        """Whether a verdict needs to know the media type of what is asked for."""
        return any(glob.media_type is not None for glob in (*self.denials(), *self.allow))

    def denials(self) -> Iterator[Glob]:
        """Every entry that denies, in the order in which they are tried."""
        yield from self.policy_deny
        yield from self.deny

    # -- what may be asked for --------------------------------------------------------------------------------------

    def check_repository(self, reference: str) -> None:
        """Whether anything of `<host>/<repository>` may be asked for at all. Raises Denied."""
        if (refusal := self._at(reference).refusal) is not None:
            raise self._denied(reference, refusal)

    def check_tag(self, reference: str, tag: Tag) -> None:
        """Whether this tag may be asked for. Raises Denied."""
        here = self._at(reference)
        if here.refusal is not None:
            raise self._denied(reference, here.refusal)
        if (refusal := here.of_tag(tag.value, self._has_names)) is not None:
            raise self._denied(f"{reference}:{tag}", refusal)

    def allows_tag(self, reference: str, tag: str) -> bool:
        """Whether the allow list alone lets this tag through; an empty list allows everything."""
        return not self._has_names or any(glob.covers_tag(tag) for glob in self._at(reference).tag_allows)

    def lists_tag(self, reference: str, tag: str) -> bool:
        """Whether the tag belongs in a tags/list answer."""
        return self._at(reference).of_tag(tag, self._has_names) is None

    def check_digest(self, reference: str, digest: Digest, tags_of: Callable[[], Iterable[str]]) -> None:
        """Whether this content may be asked for by digest. Raises Denied.

        `tags_of` gives the tags under which it was resolved here, itself or through what names it; it is called only
        when nothing but a tag rule could allow the digest.
        """
        if (refusal := self._of_digest(digest)) is not None:
            raise self._denied(f"{reference}@{digest}", refusal)
        here = self._at(reference)
        if here.refusal is not None:
            raise self._denied(reference, here.refusal)
        if here.whole or any(glob.digest == digest for glob in self.allow):
            return
        if any(self.allows_tag(reference, tag) for tag in tags_of()):
            return
        why = "only certain tags are allowed, and none of them resolved to this digest here; pull an allowed tag first"
        raise self._denied(f"{reference}@{digest}", ("allow", why))

    # -- what content may be had ------------------------------------------------------------------------------------

    def check_content(self, reference: str, digest: Digest) -> None:
        """Whether the digest itself is denied, under whatever name. Raises Denied."""
        if (refusal := self._of_digest(digest)) is not None:
            raise self._denied(f"{reference}@{digest}", refusal)

    def check_part(self, reference: str, part: Descriptor) -> None:
        """Whether this content may be had: its digest, what it is and how large. Raises Denied."""
        self.check_content(reference, part.digest)
        self.check_types(reference, part.digest, (part.media_type, part.artifact_type))
        self.check_size(reference, part.digest, part.size)

    def check_types(self, reference: str, digest: Digest, types: Iterable[str]) -> None:
        """Whether content of these media types may be had; "" counts as none. Raises Denied."""
        if not self.names_media_types:
            return
        known = [each for each in types if each]
        if not known:
            why = "rules here speak about media types, and no manifest pulled here says what this is; pull that first"
            raise self._denied(f"{reference}@{digest}", ("media-type", why))
        refusals = [self._of_type(each) for each in known]
        # An artifact type beside a media type may be what an allow entry is about; a denial of either counts.
        for each, refusal in zip(known, refusals, strict=True):
            if refusal is not None and (refusal[0] != "allow" or None not in refusals):
                raise self._denied(f"{reference}@{digest} ({each})", refusal)

    def check_size(self, reference: str, digest: Digest, size: int) -> None:
        """Whether content of `size` bytes may be had. Raises Denied."""
        if self.max_blob is not None and size > self.max_blob:
            why = f"it has {size} bytes, and the largest that may be had is {self.max_blob}"
            raise self._denied(f"{reference}@{digest}", (SIZE_RULE, why))

    def lists_part(self, reference: str, part: Descriptor) -> bool:
        """Whether content belongs in a referrers answer."""
        try:
            self.check_part(reference, part)
        except Denied:
            return False
        return True

    # -- why --------------------------------------------------------------------------------------------------------

    def trials(self, reference: str, tag: str | None, digest: Digest | None) -> Iterator[Trial]:
        """Every rule in the order in which it is tried for this reference, with what it says, up to the deciding one.

        For people: `explain`. The verdicts are those of the checks above; a test holds the two together.
        """
        if self.closed:
            yield Trial("[policy]", 'unmatched = "deny"', "denies", "it belongs to no project")
            return
        for glob in self.denials():
            owner = "[policy] deny" if glob in self.policy_deny else f"project {self.project!r} deny"
            if (digest is not None and glob.digest == digest) or (
                glob.covers(reference) and (glob.tag is None or (tag is not None and glob.covers_tag(tag)))
            ):
                yield Trial(owner, glob.text, "denies")
                return
            yield Trial(owner, glob.text, "passes", "speaks about media types" if glob.media_type else "")
        if not self._has_names:
            yield Trial(f"project {self.project!r} allow", "(empty)", "allows", "an empty list allows everything")
            return
        for glob in self.allow:
            owner = f"project {self.project!r} allow"
            is_named = glob.covers(reference) and (glob.tag is None or (tag is not None and glob.covers_tag(tag)))
            if is_named or (digest is not None and glob.digest == digest):
                yield Trial(owner, glob.text, "allows")
                return
            is_about_tags = glob.covers(reference) and tag is None
            why = "speaks about tags" if is_about_tags else "speaks about media types" if glob.media_type else ""
            yield Trial(owner, glob.text, "passes", why)

    # -- what is kept -----------------------------------------------------------------------------------------------

    @property
    def _has_names(self) -> bool:
        return any(glob.media_type is None for glob in self.allow)

    def _at(self, reference: str) -> _Here:
        here = self._here.get(reference)
        if here is None:
            if len(self._here) >= MAX_KEPT:
                self._here.clear()
            here = self._here[reference] = _Here(self, reference)
        return here

    def _of_digest(self, digest: Digest) -> Refusal | None:
        glob = self._digests.get(digest)
        return None if glob is None else (glob.text, "the digest is denied")

    def _of_type(self, media_type: str) -> Refusal | None:
        if media_type not in self._types:
            if len(self._types) >= MAX_KEPT:
                self._types.clear()
            self._types[media_type] = self._judged_type(media_type)
        return self._types[media_type]

    def _judged_type(self, media_type: str) -> Refusal | None:
        for glob in self.denials():
            if glob.covers_type(media_type):
                return glob.text, "the media type is denied"
        wanted = [glob for glob in self.allow if glob.media_type is not None]
        if wanted and not any(glob.covers_type(media_type) for glob in wanted):
            return "allow", "no entry of the allow list covers the media type"
        return None

    def _denied(self, what: str, refusal: Refusal) -> Denied:
        rule, why = refusal
        of_policy = any(glob.text == rule for glob in self.policy_deny)
        owner = "[policy]" if of_policy or rule.startswith("policy.") else f"project {self.project!r}"
        return Denied(f"{what} is refused by rule {rule!r} of {owner}: {why}", rule=rule, project=self.project)
