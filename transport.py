"""How an endpoint is reached: HTTP requests and the passing of time, blocking or not.

Owns the connections, TLS, proxies and what is done beside a wait. Refuses to know
what is sent, what an answer means and what is tried again.

Everything above is written once, as coroutines over a `Transport`. Those over
`BlockingTransport` never suspend, so `run_blocking` runs them without an event loop.
"""

import asyncio
import contextlib
import functools
import math
import socket
import ssl
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast
from urllib.parse import urlsplit

import httpx2

from client_config import is_local

CONNECT_TIMEOUT_S = 10.0
CANCEL_TIMEOUT_S = 5.0
"""How long the cancelling of a job may delay an error or Ctrl-C."""

SILENCE_S = 600.0
"""How long an open answer may say nothing; a platform ends a job of that length by itself."""

MAX_EVENT_BYTES = 1_000_000
"""Largest server-sent event, which is more than a chunk can have."""

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


class Events(Protocol):
    """An HTTP answer that is read while it comes.

    Where it is no stream of server-sent events, `body` holds all of it and there are none.
    """

    status: int
    body: bytes
    retry_after: str
    streams: bool

    async def next(self, until_s: float) -> str | None:
        """Return the next event's data, None after the last.

        TimeoutError when `until_s` on the monotonic clock comes first, ConnectionError when
        the connection breaks. The answer is closed after either.
        """

    async def close(self) -> None:
        """Close the connection if the answer has not ended; the other side notices."""


class Transport(Protocol):
    """How requests are sent and time passes."""

    async def send(self, method: str, url: str, body: bytes | None, timeout_s: float) -> Reply:
        """Return the answer; httpx2.TransportError without one."""

    async def open(self, method: str, url: str, body: bytes, timeout_s: float) -> Events:
        """Return the answer once its head is there; httpx2.TransportError without one."""

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


def _patience(timeout_s: float) -> dict[str, float | None]:
    return _timeout(min(SILENCE_S, timeout_s)).as_dict()


class _Events:
    """What both kinds know of an open answer."""

    def __init__(self, response: httpx2.Response, patience: dict[str, float | None]) -> None:
        self.status = response.status_code
        self.body = b""
        self.retry_after = response.headers.get("retry-after", "")
        content_type = response.headers.get("content-type", "")
        self.streams = self.status < 300 and content_type.startswith("text/event-stream")
        self._response = response
        if self.streams:
            # What the head was given is not for the events; it is looked at again at the first.
            patience["read"] = SILENCE_S


def _broken(error: httpx2.TransportError) -> ConnectionError:
    if isinstance(error, httpx2.TimeoutException):
        return ConnectionError(f"it said nothing for {SILENCE_S:.0f} s")
    return ConnectionError(str(error) or type(error).__name__)


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # Not by the method of a TLS connection, which would take it apart while it is read.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _BlockingEvents(_Events):
    def __init__(self, response: httpx2.Response, patience: dict[str, float | None]) -> None:
        super().__init__(response, patience)
        self._events = iter(httpx2.EventSource(response, MAX_EVENT_BYTES))
        self._alarm: threading.Timer | None = None
        self._alarm_s = math.inf

    async def next(self, until_s: float) -> str | None:
        self._set_alarm(until_s)
        try:
            event = next(self._events, None)
        except httpx2.TransportError as error:
            await self.close()
            if time.monotonic() >= until_s:
                raise TimeoutError from None
            raise _broken(error) from None
        return None if event is None else event.data

    def _set_alarm(self, until_s: float) -> None:
        """Have the connection ended at `until_s`: one read has one time-out, its own."""
        if until_s == self._alarm_s:
            return
        if self._alarm:
            self._alarm.cancel()
            self._alarm = None
        self._alarm_s = until_s
        stream = self._response.extensions.get("network_stream")
        connection = stream and stream.get_extra_info("socket")
        if connection and until_s < math.inf:
            delay_s = until_s - time.monotonic()
            self._alarm = threading.Timer(delay_s, _shut_down, [connection])
            self._alarm.daemon = True
            self._alarm.start()

    async def close(self) -> None:
        self._set_alarm(math.inf)
        self._response.close()


class _AsyncEvents(_Events):
    def __init__(self, response: httpx2.Response, patience: dict[str, float | None]) -> None:
        super().__init__(response, patience)
        events = aiter(httpx2.EventSource(response, MAX_EVENT_BYTES))
        self._events = cast(AsyncGenerator[httpx2.ServerSentEvent, None], events)

    async def next(self, until_s: float) -> str | None:
        limit_s = None if until_s == math.inf else max(0.0, until_s - time.monotonic())
        try:
            async with asyncio.timeout(limit_s):
                event = await anext(self._events, None)
        except httpx2.TransportError as error:
            await self.close()
            raise _broken(error) from None
        except BaseException:
            await self.close()
            raise
        return None if event is None else event.data

    async def close(self) -> None:
        await self._events.aclose()
        await self._response.aclose()


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

    async def open(self, method: str, url: str, body: bytes, timeout_s: float) -> Events:
        """Send one request and read its answer's head."""
        patience = _patience(timeout_s)
        request = self._http.build_request(
            method, url, content=body, extensions={"timeout": patience}
        )
        response = self._http.send(request, stream=True)
        events = _BlockingEvents(response, patience)
        if not events.streams:
            events.body = response.read()
        return events

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

    async def open(self, method: str, url: str, body: bytes, timeout_s: float) -> Events:
        """Send one request and read its answer's head."""
        patience = _patience(timeout_s)
        request = self._http.build_request(
            method, url, content=body, extensions={"timeout": patience}
        )
        response = await self._http.send(request, stream=True)
        events = _AsyncEvents(response, patience)
        if not events.streams:
            events.body = await response.aread()
        return events

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
