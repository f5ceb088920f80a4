"""One serverless endpoint as its client sees it: RunPod's REST operations, blocking or not.

Owns the HTTP: addresses, the API key, time-outs, what is tried again and which
error a status or a broken connection becomes. Refuses to know what a job says.

Everything is written once, as coroutines over a `Transport`. Those over
`BlockingTransport` never suspend, so `run_blocking` runs them without an event loop.
"""

import asyncio
import contextlib
import functools
import ssl
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlsplit

import httpx2
import msgspec

from client_config import is_local
from errors import (
    EndpointNotFound,
    JobError,
    PlatformFault,
    RateLimited,
    TooLarge,
    Unreachable,
    WrongApiKey,
)

MAX_RUN_BYTES = 10_000_000
"""Largest body of /run."""

CONNECT_TIMEOUT_S = 10.0
REPLY_TIMEOUT_S = 30.0
CANCEL_TIMEOUT_S = 5.0
"""How long the cancelling of a job may delay an error or Ctrl-C."""

PATIENCE_S = 1.75
JOB_PATIENCE_S = 15.0
RATE_PATIENCE_S = 30.0
"""How long to pause in all, retries together: plain calls, calls about a running job, on 429."""

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 4.0

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer of the platform."""

    status: int
    body: bytes
    date: str
    """The Date header, empty without one."""
    retry_after: str
    elapsed_s: float


class Transport(Protocol):
    """How requests are sent and time passes."""

    async def send(self, method: str, url: str, body: bytes | None, timeout_s: float) -> Reply:
        """Return the answer; httpx2.TransportError without one."""

    async def sleep(self, seconds: float) -> None:
        """Let time pass."""

    async def whole(self, work: Coroutine[Any, Any, None]) -> None:
        """See `work` through, for up to CANCEL_TIMEOUT_S even when the caller is cancelled."""

    def beside(self, work: Coroutine[Any, Any, None]) -> Callable[[], object] | None:
        """Run `work` while others wait and return what ends it; None where that cannot be."""

    async def close(self) -> None:
        """Close the connections."""


@functools.cache
def _tls(scheme: str) -> ssl.SSLContext:
    # Reading the certificates takes 0.1 s, which every new client would pay. Without TLS there
    # is no use for them: redirects are not followed, and a context without any trusts nobody.
    if scheme == "https":
        return httpx2.create_ssl_context()
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _options(base: str, api_key: str) -> dict[str, Any]:
    url = urlsplit(base)
    return {
        "headers": {
            "Authorization": f"Bearer {api_key}",
            "Content-Type": "application/json",
            "User-Agent": "sealed-vllm",
        },
        "verify": _tls(url.scheme),
        "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=100),
        # A proxy of the environment is not for this machine's own addresses.
        "trust_env": not is_local(url.hostname or ""),
    }


def _timeout(timeout_s: float) -> httpx2.Timeout:
    return httpx2.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s))


def _reply(response: httpx2.Response, started_s: float) -> Reply:
    return Reply(
        response.status_code,
        response.content,
        response.headers.get("date", ""),
        response.headers.get("retry-after", ""),
        time.monotonic() - started_s,
    )


class BlockingTransport:
    """Sends with pooled blocking connections; its coroutines never suspend."""

    def __init__(
        self, base: str, api_key: str, transport: httpx2.BaseTransport | None = None
    ) -> None:
        self._http = httpx2.Client(**_options(base, api_key), transport=transport)

    async def send(self, method: str, url: str, body: bytes | None, timeout_s: float) -> Reply:
        """Send one request."""
        started_s = time.monotonic()
        response = self._http.request(method, url, content=body, timeout=_timeout(timeout_s))
        return _reply(response, started_s)

    async def sleep(self, seconds: float) -> None:
        """Block the thread."""
        time.sleep(seconds)  # noqa: ASYNC251 - never runs on an event loop

    async def whole(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`: a blocking thread is not cancelled from outside."""
        await work

    def beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Refuse: there is one thread."""
        work.close()

    async def close(self) -> None:
        """Close the connections."""
        self._http.close()


class AsyncTransport:
    """Sends with pooled connections of the running event loop."""

    def __init__(
        self, base: str, api_key: str, transport: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        self._http = httpx2.AsyncClient(**_options(base, api_key), transport=transport)

    async def send(self, method: str, url: str, body: bytes | None, timeout_s: float) -> Reply:
        """Send one request."""
        started_s = time.monotonic()
        response = await self._http.request(method, url, content=body, timeout=_timeout(timeout_s))
        return _reply(response, started_s)

    async def sleep(self, seconds: float) -> None:
        """Suspend the task."""
        await asyncio.sleep(seconds)

    async def whole(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` in a task of its own, out of reach of the caller's cancellation."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            try:
                await asyncio.wait({task}, timeout=CANCEL_TIMEOUT_S)
            finally:
                if not task.done():
                    task.cancel()
                elif not task.cancelled():
                    task.exception()
            raise

    def beside(self, work: Coroutine[Any, Any, None]) -> Callable[[], object]:
        """Run `work` in a task."""
        return asyncio.ensure_future(work).cancel

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()


def run_blocking(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine over a BlockingTransport to its end."""
    try:
        work.send(None)
    except StopIteration as stop:
        result: _T = stop.value
        return result
    work.close()
    raise RuntimeError("a blocking call suspended")


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
        platform may have the job. TooLarge, before sending, past MAX_RUN_BYTES.
        """
        if len(body) > MAX_RUN_BYTES:
            raise TooLarge(
                f"the sealed request has {len(body) / 1e6:.1f} MB and the platform carries "
                f"{MAX_RUN_BYTES / 1e6:.0f} MB; shorten it (sealing adds a third and padding)"
            )
        reply = await self._call("POST", "/run", body, deadline_s=deadline_s, repeatable=False)
        job_id = self._object(reply).get("id")
        if not isinstance(job_id, str) or not job_id:
            raise PlatformFault("the platform took the job but gave it no id")
        return job_id

    async def stream(self, job_id: str, deadline_s: float) -> StreamRead:
        """Read, and thereby consume, what the job has yielded since the last read."""
        reply = await self._job_call("GET", "stream", job_id, deadline_s)
        try:
            read = msgspec.json.decode(reply.body, type=StreamRead)
        except ValueError:
            raise self._not_the_api(reply) from None
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
        pause_s, paused_s = _FIRST_PAUSE_S, 0.0
        while True:
            left_s = (deadline_s or float("inf")) - time.monotonic()
            failure: JobError
            limit_s = patience_s
            wish_s = 0.0
            try:
                reply = await self.transport.send(
                    method, self._base + path, body, max(0.001, min(REPLY_TIMEOUT_S, left_s))
                )
            except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
                failure = Unreachable(
                    f"no connection to {self._host}: {_reason(error)}; "
                    "check RUNPOD_API_BASE and the network"
                )
            except httpx2.TransportError as error:
                failure = Unreachable(f"the connection to {self._host} broke: {_reason(error)}")
                if not repeatable:
                    raise Unreachable(
                        f"{failure}; the platform may have taken the job all the same, "
                        "so it was not sent again"
                    ) from None
            else:
                if reply.status < 300:
                    return reply
                failure = self._failure(reply, path)
                if isinstance(failure, RateLimited):
                    limit_s, wish_s = RATE_PATIENCE_S, _seconds(reply.retry_after)
                elif not (repeatable and isinstance(failure, PlatformFault)):
                    raise failure
            pause_s = max(pause_s, wish_s)
            if paused_s + pause_s > limit_s or pause_s > left_s:
                raise failure from None
            await self.transport.sleep(pause_s)
            paused_s += pause_s
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _failure(self, reply: Reply, path: str) -> JobError:
        said = _said(reply.body)
        match reply.status:
            case 401 | 403:
                return WrongApiKey(
                    f"the platform refused the API key ({reply.status}); check RUNPOD_API_KEY "
                    f"and that it may use the endpoint {self.id}"
                )
            case 404 if path.count("/") > 1:
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
                return self._not_the_api(reply)

    def _object(self, reply: Reply) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            return msgspec.json.decode(reply.body, type=dict[str, Any])
        raise self._not_the_api(reply)

    def _not_the_api(self, reply: Reply) -> PlatformFault:
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


def _said(body: bytes) -> str:
    """Return the platform's own words, shortened, as the end of a clause."""
    with contextlib.suppress(ValueError):
        value = msgspec.json.decode(body)
        text = value.get("error") or value.get("message") if isinstance(value, dict) else None
        if isinstance(text, str):
            return f": {text[:200]}"
    return ""
