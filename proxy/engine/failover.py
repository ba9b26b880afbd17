"""Several addresses of one upstream, asked in their order until one answers.

Each is a `ports.Upstream` behind a breaker of its own, which says at once that it is not to be asked: health needs no
second place. What holds over all of them:

- "Not found" counts only when every address says so. While one cannot be asked, nobody knows (`NotFound` is "absent
  for certain"), and a tag that is known here is not forgotten because a mirror lags behind.
- The first address is the authority on tags. What another says of a tag while an earlier one fails is told as
  second-hand: it confirms a known tag and never moves one (engine/tags.py), so a mirror that lags cannot move it back.
- A body that breaks off sets its address back for a while, so the pump, which asks again from the byte that it has,
  is sent to the next one.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from proxy.engine.around import AroundBody, AroundUpstreams
from proxy.errors import NotFound, UpstreamError
from proxy.oci.digest import Digest
from proxy.oci.names import Repository, Tag, TagOrDigest
from proxy.ports import BlobBody, Clock, ManifestHead, Upstream

T = TypeVar("T")

#: For how long an address whose body broke off is asked last, in seconds.
SET_BACK_S = 30.0


class Failover(AroundUpstreams):
    """A `ports.Upstream` over `addresses`, of which there is at least one."""

    def __init__(self, addresses: Sequence[Upstream], clock: Clock) -> None:
        self._addresses = tuple(addresses)
        self._clock = clock
        self._set_back_until = [-math.inf] * len(self._addresses)

    async def manifest_head(self, repository: Repository, target: TagOrDigest) -> ManifestHead:
        """See ports.Upstream. `is_secondhand` where an earlier address failed; one that then names no digest confirms
        nothing, so the failure stands."""
        head, failure, _ = await self._first_answer(
            lambda upstream: upstream.manifest_head(repository, target), self._in_order()
        )
        if failure is None or not isinstance(target, Tag):
            return head
        if head.digest is None:
            raise failure
        return replace(head, is_secondhand=True)

    async def blob(self, repository: Repository, digest: Digest, *, offset: int = 0) -> BlobBody:
        """See ports.Upstream."""
        body, _, number = await self._first_answer(
            lambda upstream: upstream.blob(repository, digest, offset=offset), self._by_health()
        )
        return _WatchedBody(body, lambda: self._set_back(number))

    async def blob_size(self, repository: Repository, digest: Digest) -> int | None:
        """See ports.Upstream."""
        return (await self._first_answer(lambda upstream: upstream.blob_size(repository, digest), self._by_health()))[0]

    # -- whom to ask ---------------------------------------------------------------------------------------------------

    async def _asked(self, ask: Callable[[Upstream], Awaitable[T]]) -> T:
        return (await self._first_answer(ask, self._in_order()))[0]

    async def _first_answer(
        self, ask: Callable[[Upstream], Awaitable[T]], order: Iterable[int]
    ) -> tuple[T, UpstreamError | None, int]:
        """The first answer, why an address before it gave none (the first reason), and whose answer it is."""
        absent: NotFound | None = None
        failure: UpstreamError | None = None
        for number in order:
            try:
                return await ask(self._addresses[number]), failure, number
            except NotFound as error:
                absent = absent or error
            except UpstreamError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        assert absent is not None
        raise absent

    def _in_order(self) -> Iterable[int]:
        """As written: for what may differ between addresses."""
        return range(len(self._addresses))

    def _by_health(self) -> Iterable[int]:
        """For content named by its digest, which is the same anywhere: those that broke off lately come last."""
        now = self._clock.monotonic()
        return sorted(self._in_order(), key=lambda number: self._set_back_until[number] > now)

    def _set_back(self, number: int) -> None:
        self._set_back_until[number] = self._clock.monotonic() + SET_BACK_S


class _WatchedBody(AroundBody):
    """A body that says when it broke off."""

    __slots__ = ("_on_broken",)

    def __init__(self, body: BlobBody, on_broken: Callable[[], None]) -> None:
        super().__init__(body)
        self._on_broken = on_broken

    async def read(self) -> bytes:
        """See ports.BlobBody."""
        try:
            return await super().read()
        except UpstreamError:
            self._on_broken()
            raise
