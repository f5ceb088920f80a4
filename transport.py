"""How an endpoint is reached: HTTP requests and the passing of time, blocking or not.

Owns the connections, TLS, proxies and what is done beside a wait. Refuses to know
what is sent, what an answer means and what is tried again.

Everything above is written once, as coroutines over a `Transport`. Those over
`BlockingTransport` never suspend, so `run_blocking` runs them without an event loop.
"""

import asyncio
import functools
import ssl
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import httpx2

from client_config import is_local

CONNECT_TIMEOUT_S = 10.0
CANCEL_TIMEOUT_S = 5.0
"""How long the cancelling of a job may delay an error or Ctrl-C."""

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
