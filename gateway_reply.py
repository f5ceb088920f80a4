"""One HTTP request of the gateway from its body to the end of its answer.

Owns the pace of an answer, the promise that a client that goes away takes its job
with it, and the gateway's end, which no answer survives unsaid. Knows nothing of
routes; what is asked of the worker is its callers' matter.
"""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from answers import Answer, Response
from client import AsyncRawStream, AsyncStream
from errors import RateLimited, RequestError, SealedError
from gateway_errors import ANTHROPIC_ROUTES, error_body
from gateway_metrics import Measured, Metrics

HEAD_WAIT_S = 2.0
"""How long the head of an answer waits for its real status. A worker that is awake tells it
sooner; for one that has to start, the stream begins and an error becomes an event of it."""

EVENTS = "text/event-stream; charset=utf-8"
_WAITING = "waiting for the worker"

T = TypeVar("T")


@dataclass(slots=True)
class Reply:
    """The HTTP answer of one request."""

    route: str
    _send: Send
    measured: Measured
    _keepalive_s: float
    started: bool = False
    over: bool = False
    request_id: str = ""
    job_id: str = ""
    may_retry: bool = False
    retry_after_s: int | None = None

    def submitted(self, answer: AsyncRawStream | AsyncStream | Answer) -> None:
        """Take the ids that the head of the answer tells."""
        self.request_id = answer.request_id
        self.job_id = answer.job_id

    async def begin(self, status: int, content_type: str, length: int | None = None) -> None:
        """Send the head, once."""
        if self.started:
            return
        self.started = True
        self.measured.status = status
        headers = {
            "content-type": content_type,
            "cache-control": "no-store",
            "x-request-id": self.request_id or secrets.token_hex(16),
        }
        if length is not None:
            headers["content-length"] = str(length)
        if self.job_id:
            headers["x-job-id"] = self.job_id
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        if not self.may_retry:
            # The SDKs' retries would be jobs of their own, each with its price.
            headers["x-should-retry"] = "false"
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
            }
        )

    async def alive(self, work: Coroutine[Any, Any, T], note: Callable[[], str] = str) -> T:
        """Wait for `work`, and tell the client now and then that it is worth waiting.

        In a comment of the stream: the worker's own words where `note` has some.
        """
        task = asyncio.ensure_future(work)
        patience_s = self._keepalive_s if self.started else HEAD_WAIT_S
        try:
            while not (await asyncio.wait({task}, timeout=patience_s))[0]:
                await self.begin(200, EVENTS)
                words = " ".join((note() or _WAITING).split())  # a line break would end the comment
                await self.send(f": {words}\n\n".encode())
                patience_s = self._keepalive_s
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise
        return task.result()

    async def send(self, body: bytes, *, more: bool = True) -> None:
        """Send a piece of the body."""
        self.over = not more
        self.measured.sent(len(body))
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def end(self) -> None:
        """End a body that was sent in pieces."""
        self.over = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def whole(self, response: Response) -> None:
        """Send an answer that is there as a whole."""
        self.over = True
        self.measured.usage = response.usage or {}
        await self.begin(response.status, response.content_type, len(response.body))
        await self.send(response.body, more=False)

    async def fail(self, error: SealedError) -> None:
        """Tell an error; a stream that has begun ends with it, never as if it were complete."""
        body = msgspec.json.encode(error_body(error, self.route))
        if self.started:
            self.measured.status = error.status
            named = b"event: error\n" if self.route in ANTHROPIC_ROUTES else b""
            await self.send(named + b"data: " + body + b"\n\n", more=False)
            return
        if isinstance(error, RequestError) and error.retry_after_s is not None:
            self.retry_after_s = error.retry_after_s
        limited = isinstance(error, RateLimited) and not self.job_id
        self.may_retry = limited or self.retry_after_s is not None
        await self.begin(error.status, "application/json", len(body))
        await self.send(body, more=False)


FAREWELL_S = 1.0
"""How long a client that is cut off may take to be told so."""

Work = Callable[[Request, bytes, Reply], Awaitable[None]]
"""Answers one request, given its body; a SealedError from it is told to the client."""


class Serving:
    """All requests that a worker is asked something for, until the gateway ends."""

    def __init__(
        self, metrics: Metrics, *, keepalive_s: float, on_answer: Callable[[], None]
    ) -> None:
        """`on_answer` is called whenever a worker has answered."""
        self._metrics = metrics
        self._keepalive_s = keepalive_s
        self._on_answer = on_answer
        self._running = 0
        self._idle, self._ending = asyncio.Event(), asyncio.Event()
        self._idle.set()

    async def serve(
        self, scope: Scope, receive: Receive, send: Send, *, route: str, work: Work
    ) -> None:
        """Answer one request by `work`; if the client goes, it is cancelled, and its job too."""
        request = Request(scope, receive)
        try:
            content = await request.body()
        except ClientDisconnect:
            return
        self._running += 1
        self._idle.clear()
        try:
            measured = self._metrics.begin(route, len(content))
            reply = Reply(route, send, measured, self._keepalive_s)
            await self._run(work(request, content, reply), reply, receive)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def end(self, grace_s: float) -> None:
        """Let answers go on for a while; end what is left with an error, and cancel its jobs."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace_s)
        self._ending.set()
        await self._idle.wait()

    async def _run(self, work: Awaitable[None], reply: Reply, receive: Receive) -> None:
        answering = asyncio.ensure_future(self._answered(work, reply))
        leaving = asyncio.ensure_future(_disconnected(receive))
        ending = asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait({answering, leaving, ending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone = leaving.done() and not answering.done()
            cut = not answering.done() and not gone
            for task in (leaving, ending, answering):
                task.cancel()
            # Until the job is cancelled on the platform too.
            await asyncio.wait({answering})
            if cut and not reply.over:
                with contextlib.suppress(TimeoutError):  # of a client that no longer reads
                    await asyncio.wait_for(reply.fail(stopped()), FAREWELL_S)
            reply.measured.end(gone=gone)
        if not answering.cancelled():
            answering.result()

    async def _answered(self, answer: Awaitable[None], reply: Reply) -> None:
        try:
            await answer
        except SealedError as error:
            await reply.fail(error)
        else:
            self._on_answer()


def stopped() -> RequestError:
    """Return the error for what the gateway's end cut off."""
    return RequestError(
        "the gateway was stopped before the answer was complete; its job is cancelled, ask again",
        status=503,
        type="ServiceUnavailable",
        code="gateway_stopped",
    )


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
