"""One attempt to answer a request, and what is remembered of it here and by the other workers.

Owns the order in which this worker's memory (replay_guard.py) and, where there is one, that of all
workers (replay_store.py) are asked whether it may run, and that both hear of its end (SPEC section
4, check 5). Knows nothing of jobs, of answers or of Redis.
"""

from typing import Protocol

from errors import RequestError
from keys import Key
from replay_guard import ReplayGuard


class Store(Protocol):
    """What is needed of `replay_store.ReplayStore`."""

    def name(self, secret: bytes, replay_id: str) -> str: ...

    async def begin(self, name: str, expires_at: int) -> None: ...

    def finish(self, name: str) -> None: ...

    def abandon(self, name: str) -> None: ...


class RequestAttempt:
    """A request's place in the memory of this worker and of the others: one attempt at a time."""

    def __init__(
        self, guard: ReplayGuard, store: Store | None, key: Key, replay_id: str, expires_at: int
    ) -> None:
        """Begin on this worker; RequestError if the request ran, runs or cannot be remembered."""
        guard.begin(replay_id, expires_at)
        self._guard = guard
        self._store = store
        self._id = replay_id
        self._name = store.name(key.local_secret("replay store"), replay_id) if store else ""
        self._expires_at = expires_at
        self._over = False

    async def begin_everywhere(self) -> None:
        """Begin on all workers; RequestError if another one ran it or cannot be asked."""
        if self._store is None:
            return
        try:
            await self._store.begin(self._name, self._expires_at)
        except RequestError:
            self.abandon()
            raise

    def finish(self) -> None:
        """The request was answered to its end: it will not run again."""
        if not self._over:
            self._over = True
            self._guard.finish(self._id)
            if self._store:
                self._store.finish(self._name)

    def abandon(self) -> None:
        """It was not, and may run again; harmless once it is over."""
        if not self._over:
            self._over = True
            self._guard.abandon(self._id)
            if self._store:
                self._store.abandon(self._name)
