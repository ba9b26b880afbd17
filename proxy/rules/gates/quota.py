"""The quota of a project that refuses when it is full: decided at the manifest, on the sizes it declares.

A client that was given a manifest may have nowhere else to go for its layers (peers.md §5.3), so this is the last
moment at which a refusal is honest. With "evict" and "bypass" nobody is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

from proxy.errors import Denied
from proxy.oci.descriptor import Descriptor
from proxy.rules.quota import Account

#: The word that a denial, the log and `explain` use for it.
RULE = "quota"


def check_manifest(account: Account, project: str, what: str, parts: Iterable[Descriptor]) -> None:
    """Whether everything that a manifest names fits, what is paid already left out. Raises Denied."""
    if account.allowance.on_full != "deny":
        return
    sizes = {part.digest: part.size for part in parts if part.digest not in account}
    refuse(account, project, what, sum(sizes.values()))


def refuse(account: Account, project: str, what: str, n_bytes: int) -> None:
    """Raise Denied when `n_bytes` more do not fit. Says how much is used of what."""
    if not account.missing(n_bytes):
        return
    quota = account.allowance.quota or 0
    raise Denied(
        f"{what} is refused by rule {RULE!r} of project {project!r}: it needs {spelled(n_bytes)} more, and "
        f"{spelled(account.used)} of {spelled(quota)} are used; purge what is not needed, or raise the quota",
        rule=RULE,
        project=project,
    )


def spelled(n_bytes: int) -> str:
    """A number of bytes for people, and exactly."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n_bytes >= 1 << power:
            return f"{n_bytes / (1 << power):.1f} {unit} ({n_bytes} bytes)"
    return f"{n_bytes} bytes"
