"""What each client may ask of this worker at once and per minute.

Owns the counting: requests in flight, and tokens by what the engine has really read and written,
of requests that ended and of those that run, within the last minute. A client is a name in
ENCRYPTION_KEY: keys of one name count together, and each is held to its own limits. Knows nothing
of jobs or of the engine. Workers do not share what they count.
"""

import collections
import math
import time
from collections.abc import Callable
from typing import Any

from errors import RequestError
from key_terms import KeyTerms

WINDOW_S = 60

Cost = Callable[[], int]
"""Returns the tokens that a request has cost so far."""


class Place:
    """A request among those of its client, from `ClientLimits.enter` until it leaves."""

    def __init__(self, client: "_Client") -> None:
        self._client = client
        self._counted_tokens = 0
        self.cost: Cost = lambda: 0

    def count(self) -> None:
        """Count what was spent since the last time as spent now."""
        tokens = self.cost()
        if tokens > self._counted_tokens:
            self._client.spend(tokens - self._counted_tokens)
            self._counted_tokens = tokens

    def leave(self) -> None:
        """Count the last of it and make room; harmless for one that has left."""
        if self in self._client.places:
            self.count()
            self._client.places.remove(self)


class _Client:
    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.places: set[Place] = set()
        self._spent: collections.deque[list[int]] = collections.deque()
        """Seconds and the tokens spent in each, for as long as they count."""

    def spend(self, tokens: int) -> None:
        second = math.floor(self._now())
        if self._spent and self._spent[-1][0] == second:
            self._spent[-1][1] += tokens
        else:
            self._forget()
            self._spent.append([second, tokens])

    def spent_tokens(self) -> int:
        """Return what was spent within the last minute, by running requests too."""
        for place in self.places:
            place.count()
        self._forget()
        return sum(tokens for _, tokens in self._spent)

    def below_in_s(self, limit: int) -> int:
        """Return in how many seconds less than `limit` will count, if nothing more is spent."""
        left = sum(tokens for _, tokens in self._spent)
        for second, tokens in self._spent:
            left -= tokens
            if left < limit:
                return max(1, math.ceil(second + 1 + WINDOW_S - self._now()))
        return 0

    def _forget(self) -> None:
        while self._spent and self._spent[0][0] + 1 + WINDOW_S <= self._now():
            self._spent.popleft()


class ClientLimits:
    """Lets requests in, or refuses them with what was exceeded and when to come again."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._clients: collections.defaultdict[str, _Client] = collections.defaultdict(
            lambda: _Client(now)
        )

    def enter(self, client: str, terms: KeyTerms) -> Place:
        """Let a request of a client in; RequestError, 429 `rate_limit_exceeded`, over a limit."""
        of_client = self._clients[client]
        running, limit = len(of_client.places), terms.max_in_flight
        if limit is not None and running >= limit:
            raise _exceeded(
                f"{running} requests of this client are in flight on this worker, its limit is "
                f"{limit} (max_in_flight): send this one again when one of them has ended",
                type="requests",
                retry_after_s=1,
            )
        limit = terms.max_tokens_per_minute
        if limit is not None and (spent_tokens := of_client.spent_tokens()) >= limit:
            wait_s = of_client.below_in_s(limit)
            raise _exceeded(
                f"this client has used {spent_tokens} tokens of this worker within a minute, its "
                f"limit is {limit} (max_tokens_per_minute): send this request again in {wait_s} s",
                type="tokens",
                retry_after_s=wait_s,
            )
        place = Place(of_client)
        of_client.places.add(place)
        return place


def _exceeded(message: str, **options: Any) -> RequestError:
    # The type and the code are those of OpenAI's own limits.
    return RequestError(message, status=429, code="rate_limit_exceeded", **options)
