"""Which requests run and which were answered (SPEC.md section 4, group 5).

Owns that memory of one worker. Knows nothing of what the requests are or of keys.
"""

import heapq
import time
from collections.abc import Callable

from errors import RequestError
from protocol import CLOCK_SKEW_S


class ReplayGuard:
    """Remembers which requests run and which were answered, for as long as they are valid.

    What it has forgotten it refuses by date, so a clock that steps back opens no gap.
    Its memory is bounded; full, it refuses new requests rather than forget.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.time,
        max_entries: int = 1_000_000,
        clock_skew_s: int = CLOCK_SKEW_S,
    ) -> None:
        self._now = now
        self._max_entries = max_entries
        self._clock_skew_s = clock_skew_s
        self._running: dict[str, int] = {}
        self._finished: set[str] = set()
        self._by_expiry: list[tuple[int, str]] = []
        self._forgotten_until = -1

    def __len__(self) -> int:
        return len(self._running) + len(self._finished)

    def begin(self, request_id: str, expires_at: int) -> None:
        """Note that a request runs, or raise RequestError.

        Codes: `already_running`, `replayed`, `expired`, `replay_guard_full`.
        """
        self._forget()
        if request_id in self._running:
            raise RequestError(
                "the request is already running on this worker", status=409, code="already_running"
            )
        if request_id in self._finished:
            raise RequestError(
                "the request was already answered by this worker; send a new one",
                status=409,
                code="replayed",
            )
        if expires_at <= self._forgotten_until:
            raise RequestError(
                "the request has expired; send a new one", status=408, code="expired"
            )
        if len(self) >= self._max_entries:
            raise RequestError(
                "this worker remembers too many requests; use requests that expire sooner "
                "or try again later",
                status=503,
                code="replay_guard_full",
            )
        self._running[request_id] = expires_at

    def finish(self, request_id: str) -> None:
        """Note that a running request was answered to its end: it will not run again."""
        expires_at = self._running.pop(request_id, None)
        if expires_at is not None:
            self._finished.add(request_id)
            heapq.heappush(self._by_expiry, (expires_at, request_id))

    def abandon(self, request_id: str) -> None:
        """Note that a running request was not answered to its end: it may run again."""
        self._running.pop(request_id, None)

    def _forget(self) -> None:
        limit = self._now() - self._clock_skew_s - 1
        while self._by_expiry and self._by_expiry[0][0] < limit:
            expires_at, request_id = heapq.heappop(self._by_expiry)
            self._finished.discard(request_id)
            self._forgotten_until = max(self._forgotten_until, expires_at)
