"""An upstream behind its circuit breaker and its budget: what would fail or cost too much is refused at once.

The effect of each class of failure:

| class        | circuit breaker                    | budget                                       |
|--------------|------------------------------------|----------------------------------------------|
| unreachable  | a failure                          | –                                            |
| timeout      | a failure                          | –                                            |
| throttled    | an answer                          | nobody asks until the time upstream named    |
| unauthorised | an answer                          | –   (upstream/tokens.py waits for a minute)  |
| misbehaved   | an answer                          | –                                            |
| not found    | an answer                          | –                                            |

What is refused here is refused in the class of its cause and without a connection, so cached tags are served stale at
once and uncached requests get the true status.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from proxy.engine.around import AroundUpstream
from proxy.errors import BreakwaterError, Throttled, Timeout, Unreachable
from proxy.events import Event, Noticed
from proxy.oci.names import Repository, TagOrDigest
from proxy.ports import Clock, ManifestHead, Upstream
from proxy.rules.breaker import Breaker
from proxy.rules.breaker import State as Circuit
from proxy.rules.budget import Budget, Quote

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Condition:
    """How one address of an upstream is, for status and metrics. Times in seconds from now."""

    address: str
    circuit: Circuit
    limit: int | None
    remaining: int | None
    window_s: int | None
    #: Whether what is left is kept for misses.
    is_low: bool
    #: For how long nobody asks, because upstream throttled; None when it did not.
    throttled_for_s: float | None


class GuardedUpstream(AroundUpstream):
    """An upstream that raises Throttled or Unreachable without being asked. One for each address and identity; shared by
    everybody who asks them.

    `quote` tells what `upstream` last heard of its rate limit. `breaker` and `budget` are what is known of the address
    and of the identity: whoever replaces `upstream` while they stay the same hands them on.
    """

    def __init__(
        self,
        upstream: Upstream,
        *,
        host: str,
        address: str,
        clock: Clock,
        chance: Callable[[], float],
        observe: Callable[[Event], None],
        quote: Callable[[], Quote | None] = lambda: None,
        breaker: Breaker | None = None,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(upstream)
        self._host = host
        self._address = address
        self._clock = clock
        self._chance = chance
        self._observe = observe
        self._quote = quote
        self.breaker = breaker or Breaker()
        self.budget = budget or Budget()

    def condition(self) -> Condition:
        """How it is now."""
        now, quote = self._clock.monotonic(), self.budget.quote
        return Condition(
            self._address,
            self.breaker.state(now),
            quote.limit if quote else None,
            quote.remaining if quote else None,
            quote.window_s if quote else None,
            self.budget.is_low(now),
            self.budget.wait_s(now),
        )

    # -- ports.Upstream ------------------------------------------------------------------------------------------------

    async def manifest_head(self, repository: Repository, target: TagOrDigest) -> ManifestHead:
        """See ports.Upstream. Only revalidations ask this, so it is what stops first when little is left."""
        now = self._clock.monotonic()
        if self.budget.wait_s(now) is None and not self.budget.may_look(now):
            quote = self.budget.quote
            assert quote is not None
            raise Throttled(
                f"{self._host} grants {quote.remaining} more requests, which are kept for what is not here yet",
                upstream=self._host,
            )
        return await super().manifest_head(repository, target)

    # -- the guard -----------------------------------------------------------------------------------------------------

    async def _asked(self, ask: Callable[[Upstream], Awaitable[T]]) -> T:
        """What becomes of a body is the pump's to judge: its next attempt counts here."""
        self._admit()
        try:
            answer = await super()._asked(ask)
        except (Unreachable, Timeout) as error:
            self._failed(error)
            raise
        except Throttled as error:
            self.budget.throttle(error.retry_after_s, self._clock.monotonic())
            self._answered()
            raise
        except BreakwaterError:
            self._answered()
            raise
        except BaseException:
            self.breaker.left()  # the asker went away, or a bug: neither says anything about upstream
            raise
        finally:
            self.budget.hear(self._quote(), self._clock.monotonic())
        self._answered()
        return answer

    def _admit(self) -> None:
        now = self._clock.monotonic()
        if (wait_s := self.budget.wait_s(now)) is not None:
            raise Throttled(
                f"{self._host} asked to be left alone, for {wait_s:.0f} s more",
                upstream=self._host,
                retry_after_s=wait_s,
            )
        if (wait_s := self.breaker.wait_s(now)) is not None:
            raise Unreachable(f"{self._host} does not answer and is asked again in {wait_s:.0f} s", upstream=self._host)

    def _answered(self) -> None:
        if self.breaker.succeeded():
            self._observe(Noticed("info", f"{self._host} at {self._address} answers again"))

    def _failed(self, error: Unreachable | Timeout) -> None:
        if self.breaker.failed(self._clock.monotonic(), self._chance()):
            self._observe(
                Noticed(
                    "warning", f"{self._host} at {self._address} is left alone for a while, it does not answer: {error}"
                )
            )
