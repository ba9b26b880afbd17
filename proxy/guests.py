"""An upstream's clients for those who show logins of their own (`pass_through`): one for each login, made when it first
comes. The login goes where that upstream's credentials would go, and nowhere else: to its addresses, and to the token
realms that the settings name for it (INV-7).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cachetools import LRUCache

from proxy.engine.access import Login
from proxy.ports import Upstream
from proxy.upstream.client import RegistryClient
from proxy.upstream.credentials import Credentials
from proxy.upstream.credentials.shown import ShownCredentials

#: Logins with a client of their own at a time, for each upstream; the one unused for longest makes room. Each has
#: connections and tokens of its own, which is why they are not kept for everybody who ever came.
MAX_GUESTS = 256


@dataclass(frozen=True, slots=True)
class Guest:
    """What one login asks upstream through, and the clients that it is made of."""

    upstream: Upstream
    clients: tuple[RegistryClient, ...]


class Guests:
    """One upstream's. `made` makes the clients for credentials, None for nobody's; `retire` sees old ones out."""

    def __init__(
        self,
        made: Callable[[Credentials | None], Guest],
        retire: Callable[[Iterable[RegistryClient]], None],
    ) -> None:
        self._made = made
        self._retire = retire
        self._is_replaced = False
        self._known: LRUCache[str, Guest] = LRUCache(MAX_GUESTS)

    def __call__(self, login: Login | None) -> Upstream:
        """The upstream as this login is shown to it, or as nobody is."""
        mark = login.mark if login is not None else ""
        guest = self._known.get(mark)
        if guest is None:
            shown = ShownCredentials(login.mark, login.username, login.secret) if login is not None else None
            guest = self._made(shown)
            if len(self._known) >= MAX_GUESTS:
                self._retire(self._known.popitem()[1].clients)
            self._known[mark] = guest
            if self._is_replaced:
                self._retire(guest.clients)  # for a request that was routed before: closed once it is done
        return guest.upstream

    def replaced(self) -> None:
        """A reload made others for those who come from now on, and sees out those that there are."""
        self._is_replaced = True

    @property
    def clients(self) -> tuple[RegistryClient, ...]:
        """Those of everybody here now."""
        return tuple(client for guest in self._known.values() for client in guest.clients)
