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

    It forgets what has expired by `now` and has also been kept for as long as it was valid by
    `passed`, a clock that nobody sets: a clock that was far ahead for a moment makes it forget
    nothing. What it has forgotten it refuses by date, so a clock that steps back opens no gap.
    Its memory is bounded; full, it refuses new requests rather than forget.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.time,
        max_entries: int = 1_000_000,
        clock_skew_s: int = CLOCK_SKEW_S,
        *,
        passed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = now
        self._passed = passed
        self._max_entries = max_entries
        self._clock_skew_s = clock_skew_s
        self._running: dict[str, tuple[int, float]] = {}
        self._finished: set[str] = set()
        self._by_expiry: list[tuple[int, float, str]] = []
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
        self._running[request_id] = expires_at, self._passed() + expires_at - self._now()

    def finish(self, request_id: str) -> None:
        """Note that a running request was answered to its end: it will not run again."""
        limits = self._running.pop(request_id, None)
        if limits is not None:
            self._finished.add(request_id)
            heapq.heappush(self._by_expiry, (*limits, request_id))

    def abandon(self, request_id: str) -> None:
        """Note that a running request was not answered to its end: it may run again."""
        self._running.pop(request_id, None)

    def _forget(self) -> None:
        margin_s = self._clock_skew_s + 1
        limit, passed = self._now() - margin_s, self._passed() - margin_s
        while self._by_expiry and self._by_expiry[0][0] < limit and self._by_expiry[0][1] < passed:
            expires_at, _, request_id = heapq.heappop(self._by_expiry)
            self._finished.discard(request_id)
            self._forgotten_until = max(self._forgotten_until, expires_at)
