"""What several workers remember together of requests, in Redis (SPEC section 4, check 5).

Owns the marks in the store and their life. Of a request that runs there is a mark with a lease,
which its worker renews, so the mark of a worker that died lapses and a retry goes on; of one that
was answered there is a mark until the request has expired. A mark's name is a hash under a secret
of the key, so the store learns neither ids nor keys, nor which marks are of one client. Knows
nothing of jobs, of answers, or of what one worker remembers by itself (ReplayGuard).
"""

import asyncio
import contextlib
import hmac
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from errors import ConfigError, RequestError

LEASE_S = 10.0
"""How long a mark outlives the last word of its worker: what a retry waits for at most."""

RENEW_S = 3.0
"""How often leases are renewed, and what the store could not be told is told again."""

LOOK_S = 0.25
"""How often the mark of another worker's attempt is looked at while it runs."""

TIMEOUT_S = 2.0
"""How long an answer of the store may take before it counts as unavailable."""

_PREFIX = "sealed-vllm:"
_ANSWERED = b"answered"

# Marks that the store has lost come back; those of others are left alone.
_RENEW = """
local mark = redis.call('GET', KEYS[1])
if not mark then
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
elseif mark == ARGV[1] then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
"""
_REMOVE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"

log = logging.getLogger("worker.replay")


@dataclass
class _Attempt:
    """A run of a request on this worker, as the store knows it."""

    token: bytes
    expires_at: int
    forget_at: float
    """When the mark may go, by a clock that nobody sets: a clock that is ahead ends none early."""
    answered: bool = False
    """Answered, but the store does not know it yet."""


class ReplayStore:
    """The marks of one endpoint's requests; `start` inside the loop, `close` before it ends."""

    def __init__(
        self,
        url: str,
        endpoint_id: str,
        *,
        clock_skew_s: int,
        may_do_without: bool = False,
        lease_s: float = LEASE_S,
        renew_s: float = RENEW_S,
        timeout_s: float = TIMEOUT_S,
        now: Callable[[], float] = time.time,
    ) -> None:
        """With `may_do_without` requests run unmarked while the store is unavailable.

        ConfigError for what is no address; it is not quoted, since a password may stand in it.
        """
        self._redis = _client(url, timeout_s)
        self._endpoint_id = endpoint_id
        self._clock_skew_s = clock_skew_s
        self._may_do_without = may_do_without
        self._lease_ms = int(1000 * lease_s)
        self._renew_s = renew_s
        self._timeout_s = timeout_s
        self._now = now
        self._attempts: dict[str, _Attempt] = {}
        self._asked: list[tuple[str, bytes, asyncio.Future[bytes | None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._renewing: asyncio.Task[None] | None = None
        self._available = True

    def name(self, secret: bytes, replay_id: str) -> str:
        """Return the name of a request's mark; `secret` is of the request's key."""
        text = f"{self._endpoint_id} {replay_id}".encode()
        return _PREFIX + hmac.digest(secret, text, "sha256").hex()[:32]

    async def start(self) -> None:
        """Begin to renew leases, and say whether the store answers."""
        self._renewing = asyncio.create_task(self._keep())
        with contextlib.suppress(_Unavailable):
            async with self._asking():
                await self._redis.ping()
            log.info("the replay store answers")

    async def begin(self, name: str, expires_at: int) -> None:
        """Mark a request as running: one round trip, where no other worker runs it.

        While another worker runs it, this waits: for its answer, or for its death, after which
        the attempt here goes on. RequestError: `replayed`, `expired`, `replay_store_unavailable`.
        """
        forget_at = time.monotonic() + expires_at - self._now()
        attempt = _Attempt(os.urandom(8).hex().encode(), expires_at, forget_at)
        while True:
            try:
                mark = await self._marked(name, attempt.token)
            except _Unavailable:
                if not self._may_do_without:
                    raise RequestError(
                        "this worker cannot reach the store in which the endpoint's workers "
                        "remember what was answered, and does not run requests without it "
                        "(REPLAY_REDIS_UNAVAILABLE=refuse): try again later",
                        status=503,
                        type="ServiceUnavailableError",
                        code="replay_store_unavailable",
                    ) from None
                mark = attempt.token
            if mark == attempt.token:
                self._attempts[name] = attempt
                return
            if mark == _ANSWERED:
                raise RequestError(
                    "the request was already answered by another worker; send a new one",
                    status=409,
                    code="replayed",
                )
            if self._now() > expires_at + self._clock_skew_s:
                raise RequestError(
                    "the request expired while another worker ran it; send a new one",
                    status=408,
                    code="expired",
                )
            await asyncio.sleep(LOOK_S)

    async def _marked(self, name: str, token: bytes) -> bytes | None:
        """Return a request's mark, `token` if it had none; those that ask together go together."""
        mark: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._asked.append((name, token, mark))
        if len(self._asked) == 1:
            self._do(self._ask())
        return await mark

    async def _ask(self) -> None:
        asked, self._asked = self._asked, []
        marks: list[bytes | None] = []
        try:
            # One connection for all: each new one would cost its own round trips.
            async with self._asking(), self._redis.pipeline(transaction=False) as pipe:
                for name, token, _ in asked:
                    pipe.set(name, token, nx=True, px=self._lease_ms)
                    pipe.get(name)
                marks = (await pipe.execute())[1::2]
        finally:
            for number, (_, _, mark) in enumerate(asked):
                if mark.done():
                    continue  # who asked was stopped meanwhile
                if marks:
                    mark.set_result(marks[number])
                else:
                    mark.set_exception(_Unavailable())

    def finish(self, name: str) -> None:
        """Mark a request as answered to its end; the store is told beside the caller's work."""
        if attempt := self._attempts.get(name):
            attempt.answered = True
            self._do(self._tell(name, attempt))  # or else with the next renewal

    def abandon(self, name: str) -> None:
        """Remove the mark of a request that was not answered to its end: it may run again."""
        if attempt := self._attempts.pop(name, None):
            self._do(self._forget(name, attempt))

    async def close(self) -> None:
        """Tell the store what it does not know yet, if it can be reached, and leave it."""
        if self._renewing:
            self._renewing.cancel()
            await asyncio.wait([self._renewing])
        while self._tasks:
            await asyncio.wait(self._tasks)
        await self._tell_all()
        with contextlib.suppress(RedisError, OSError):
            await self._redis.aclose()

    # --- beside the requests ---

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        async def done() -> None:
            with contextlib.suppress(_Unavailable):
                await work

        task = asyncio.create_task(done())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, name: str, attempt: _Attempt) -> None:
        # Twice the skew: the clock of the worker that is asked next may be behind this one's.
        margin_s = 2 * self._clock_skew_s + 1
        left_s = margin_s + max(
            attempt.expires_at - self._now(), attempt.forget_at - time.monotonic()
        )
        if left_s > 0:
            async with self._asking():
                await self._redis.set(name, _ANSWERED, px=int(1000 * left_s))
        if self._attempts.get(name) is attempt:
            del self._attempts[name]

    async def _forget(self, name: str, attempt: _Attempt) -> None:
        async with self._asking():  # if not, its lease ends by itself
            await self._redis.eval(_REMOVE, 1, name, attempt.token)

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._renew_s)
            await self._tell_all()

    async def _tell_all(self) -> None:
        """Renew the leases of what runs, in one round trip, and tell what was not heard."""
        running = {n: a for n, a in self._attempts.items() if not a.answered}
        with contextlib.suppress(_Unavailable):
            if running:
                async with self._asking(), self._redis.pipeline(transaction=False) as pipe:
                    for name, attempt in running.items():
                        pipe.eval(_RENEW, 1, name, attempt.token, self._lease_ms)
                    await pipe.execute()
            for name, attempt in list(self._attempts.items()):
                if attempt.answered:
                    await self._tell(name, attempt)

    @contextlib.asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        """Raise _Unavailable for whatever goes wrong with the store, and say so once."""
        try:
            async with asyncio.timeout(self._timeout_s):
                yield
        except (RedisError, OSError, TimeoutError) as error:
            if self._available:
                log.error("the replay store is not available: %s", type(error).__name__)
            self._available = False
            raise _Unavailable from None
        if not self._available:
            log.info("the replay store answers again")
        self._available = True


def _client(url: str, timeout_s: float) -> redis.asyncio.Redis:
    """Return a client, which connects when it is used; ConfigError for what is no address."""
    with contextlib.suppress(ValueError, TypeError):
        return redis.asyncio.Redis.from_url(
            url,
            socket_timeout=timeout_s / 2,
            socket_connect_timeout=timeout_s / 2,
            socket_keepalive=True,
            # A connection that was closed while nobody used it; all commands may be repeated.
            retry=Retry(NoBackoff(), 1),
        )
    # Not inside of `except`: no error that knows the address is to be this one's context.
    fault = "REPLAY_REDIS_URL is no address like redis://:password@host:6379/0 or rediss://"
    raise ConfigError([fault])


class _Unavailable(Exception):
    """The store cannot be asked."""
