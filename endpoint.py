"""One serverless endpoint as its client sees it: RunPod's REST operations.

Owns addresses, time-outs, what is tried again and which error a status or a broken
connection becomes. Refuses to know what a job says and how requests are sent.
"""

import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlsplit

import httpx2
import msgspec

from errors import (
    EndpointNotFound,
    JobError,
    PlatformFault,
    RateLimited,
    TooLarge,
    Unconfirmed,
    Unreachable,
    WrongApiKey,
)
from transport import CANCEL_TIMEOUT_S, SILENCE_S, Events, Reply, Transport

MAX_RUN_BYTES = 10_000_000
"""Largest body of /run, and of the OpenAI route."""

ROUTE = "/openai/v1/chat/completions"
"""Where sealed requests of every kind go by the OpenAI route (SPEC section 1.2)."""

SENT_ONCE = "the platform may have taken the job all the same, so it was not sent again"

REPLY_TIMEOUT_S = 30.0

PATIENCE_S = 1.75
JOB_PATIENCE_S = 15.0
RATE_PATIENCE_S = 30.0
"""How long to pause in all, retries together: plain calls, calls about a running job, on 429."""

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 4.0
_OF_A_JOB = ("/stream/", "/status/", "/cancel/")


class _Item(msgspec.Struct):
    output: Any = None


class StreamRead(msgspec.Struct):
    """What one read of /stream returned, and consumed."""

    status: str
    stream: list[_Item] | None = None
    elapsed_s: float = 0.0

    @property
    def chunks(self) -> list[Any]:
        """The chunks, in the platform's order; strings, if they are a worker's."""
        return [item.output for item in self.stream or ()]


class _Answered(Protocol):
    @property
    def status(self) -> int: ...
    @property
    def body(self) -> bytes: ...
    @property
    def retry_after(self) -> str: ...


_T = TypeVar("_T", bound=_Answered)


class Endpoint:
    """The REST operations of one endpoint; every failure is an errors.JobError."""

    def __init__(self, transport: Transport, base: str, endpoint_id: str) -> None:
        self.transport = transport
        self.id = endpoint_id
        self._base = f"{base.rstrip('/')}/{quote(endpoint_id, safe='')}"
        self._host = urlsplit(base).netloc

    async def run(self, body: bytes, deadline_s: float) -> str:
        """Queue a job and return its id.

        Tried again only on 429 and where no connection was made: after anything else the
        platform may have the job. TooLarge, before sending, past MAX_RUN_BYTES; Unconfirmed
        where the connection broke too late to tell.
        """
        _check_size(body)
        reply = await self._call("POST", "/run", body, deadline_s=deadline_s, repeatable=False)
        job_id = self._object(reply).get("id")
        if not isinstance(job_id, str) or not job_id:
            raise PlatformFault("the platform took the job but gave it no id")
        return job_id

    async def open(self, body: bytes, deadline_s: float) -> Events:
        """Send a job by the OpenAI route and return its answer while it comes.

        Tried again no more than `run`. What the platform answers for a job that failed is the
        caller's to judge: a status from 500 on is returned.
        """
        _check_size(body)

        async def send(timeout_s: float) -> Events:
            return await self.transport.open("POST", self._base + ROUTE, body, timeout_s)

        return await self._persist(
            send,
            ROUTE,
            deadline_s=deadline_s,
            reply_s=SILENCE_S,
            repeatable=False,
            judged=lambda status: status >= 500,
        )

    async def stream(self, job_id: str, deadline_s: float) -> StreamRead:
        """Read, and thereby consume, what the job has yielded since the last read."""
        reply = await self._job_call("GET", "stream", job_id, deadline_s)
        try:
            read = msgspec.json.decode(reply.body, type=StreamRead)
        except ValueError:
            raise self.not_the_api(reply) from None
        read.elapsed_s = reply.elapsed_s
        return read

    async def status(self, job_id: str, deadline_s: float | None = None) -> dict[str, Any]:
        """Return the job's state as the platform reports it, output included."""
        return self._object(await self._job_call("GET", "status", job_id, deadline_s))

    async def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a job that is not over."""
        deadline_s = time.monotonic() + CANCEL_TIMEOUT_S
        return self._object(await self._job_call("POST", "cancel", job_id, deadline_s))

    async def health(self) -> dict[str, Any]:
        """Return the counts of jobs and workers."""
        return self._object(await self._call("GET", "/health"))

    async def probe(self) -> Reply:
        """Return the raw answer to /health, for its clock and its delay."""
        return await self._call("GET", "/health")

    async def purge_queue(self) -> dict[str, Any]:
        """Remove every job that no worker has taken."""
        return self._object(await self._call("POST", "/purge-queue"))

    async def _job_call(
        self, method: str, operation: str, job_id: str, deadline_s: float | None
    ) -> Reply:
        path = f"/{operation}/{quote(job_id, safe='')}"
        return await self._call(method, path, deadline_s=deadline_s, patience_s=JOB_PATIENCE_S)

    async def _call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        deadline_s: float | None = None,
        patience_s: float = PATIENCE_S,
        repeatable: bool = True,
    ) -> Reply:
        async def send(timeout_s: float) -> Reply:
            return await self.transport.send(method, self._base + path, body, timeout_s)

        return await self._persist(
            send, path, deadline_s=deadline_s, patience_s=patience_s, repeatable=repeatable
        )

    async def _persist(
        self,
        send: Callable[[float], Awaitable[_T]],
        path: str,
        *,
        deadline_s: float | None,
        patience_s: float = PATIENCE_S,
        reply_s: float = 0.0,
        repeatable: bool,
        judged: Callable[[int], bool] = lambda _: False,
    ) -> _T:
        """Send until there is an answer; `judged` says which error statuses are one."""
        reply_s = reply_s or REPLY_TIMEOUT_S
        pause_s, paused_s = _FIRST_PAUSE_S, 0.0
        ends_s = deadline_s or float("inf")
        while True:
            failure: JobError
            limit_s = patience_s
            wish_s = 0.0
            try:
                reply = await send(max(0.001, min(reply_s, ends_s - time.monotonic())))
            except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
                failure = Unreachable(
                    f"no connection to {self._host}: {_reason(error)}; "
                    "check RUNPOD_API_BASE and the network"
                )
            except httpx2.TransportError as error:
                failure = Unreachable(f"the connection to {self._host} broke: {_reason(error)}")
                if not repeatable:
                    raise Unconfirmed(f"{failure}; {SENT_ONCE}") from None
            else:
                if reply.status < 300 or judged(reply.status):
                    return reply
                failure = self._failure(reply, path)
                if isinstance(failure, RateLimited):
                    limit_s, wish_s = RATE_PATIENCE_S, _seconds(reply.retry_after)
                elif not (repeatable and isinstance(failure, PlatformFault)):
                    raise failure
            pause_s = max(pause_s, wish_s)
            if paused_s + pause_s > limit_s or time.monotonic() + pause_s > ends_s:
                raise failure from None
            await self.transport.sleep(pause_s)
            paused_s += pause_s
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _failure(self, reply: _Answered, path: str) -> JobError:
        said = _clause(reply.body)
        match reply.status:
            case 401 | 403:
                return WrongApiKey(
                    f"the platform refused the API key ({reply.status}); check RUNPOD_API_KEY "
                    f"and that it may use the endpoint {self.id}"
                )
            case 404 if path.startswith(_OF_A_JOB):
                return EndpointNotFound(
                    "the platform knows no such job: its id is wrong, it belongs to another "
                    f"endpoint than {self.id}, or its result is no longer kept"
                )
            case 404:
                return EndpointNotFound(
                    f"the platform knows no endpoint {self.id}; check RUNPOD_ENDPOINT_ID"
                )
            case 413:
                return TooLarge(f"the platform refused the request as too large{said}; shorten it")
            case 429:
                return RateLimited(f"the platform asks to slow down (429){said}; try again later")
            case status if status >= 500:
                return PlatformFault(f"the platform answered {status}{said}; try again later")
            case status if status >= 400:
                return JobError(f"the platform refused the request with {status}{said}")
            case _:
                return self.not_the_api(reply)

    def _object(self, reply: Reply) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            return msgspec.json.decode(reply.body, type=dict[str, Any])
        raise self.not_the_api(reply)

    def not_the_api(self, reply: _Answered) -> PlatformFault:
        """Return the error that an answer of unknown form is."""
        return PlatformFault(
            f"{self._host} answered {reply.status} with something that is not the platform's API; "
            "check RUNPOD_API_BASE"
        )


def _seconds(text: str) -> float:
    return min(float(text), RATE_PATIENCE_S) if text.isdecimal() else 0.0


def _reason(error: Exception) -> str:
    if isinstance(error, httpx2.TimeoutException):
        return "no answer in time"
    return str(error) or type(error).__name__


def said(body: bytes) -> str | None:
    """Return the platform's own words in an answer that is an error, None without any."""
    with contextlib.suppress(ValueError):
        value = msgspec.json.decode(body)
        text = value.get("error") or value.get("message") if isinstance(value, dict) else None
        if isinstance(text, dict):
            text = text.get("message")
        if isinstance(text, str):
            return text
    return None


def _clause(body: bytes) -> str:
    text = said(body)
    return f": {text[:200]}" if text else ""


def _check_size(body: bytes) -> None:
    if len(body) > MAX_RUN_BYTES:
        raise TooLarge(
            f"the sealed request has {len(body) / 1e6:.1f} MB and the platform carries "
            f"{MAX_RUN_BYTES / 1e6:.0f} MB; shorten it (sealing adds a third and padding)"
        )
