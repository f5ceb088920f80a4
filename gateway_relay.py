"""From one HTTP request to a sealed job and back: what every OpenAI route of the gateway does.

Owns the paths that are passed on, the pace of a streamed answer, and the promise
that a client that goes away takes its job with it. Bodies pass as they came, in
both directions; nothing of them is looked at but `stream`.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from answers import Answer, Response
from client import AsyncClient, AsyncRawStream, AsyncStream
from errors import RateLimited, RequestError, SealedError
from gateway_body import parsed
from gateway_errors import ANTHROPIC_ROUTES, error_body
from gateway_guard import not_found
from gateway_metrics import Measured, Metrics
from protocol import ROUTES

STREAMED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})

HEAD_WAIT_S = 2.0
"""How long the head of an answer waits for its real status. A worker that is awake tells it
sooner; for one that has to start, the stream begins and an error becomes an event of it."""

EVENTS = "text/event-stream; charset=utf-8"
_COMMENT = b": waiting for the worker\n\n"

T = TypeVar("T")


class _Asked(msgspec.Struct):
    stream: Any = False


def route_of(path: str) -> str | None:
    """Return the worker's route for a path with or without `/v1`, None where there is none."""
    path = "/" + path.strip("/")
    while path.startswith("/v1/v1/"):
        path = path.removeprefix("/v1")
    for route in (path, "/v1" + path, path.removeprefix("/v1")):
        if route in ROUTES:
            return route
    return None


class Relay:
    """The ASGI application of all sealed routes."""

    def __init__(
        self,
        client: AsyncClient,
        metrics: Metrics,
        *,
        keepalive_s: float,
        on_answer: Callable[[], None],
    ) -> None:
        self._client = client
        self._metrics = metrics
        self._keepalive_s = keepalive_s
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        route = route_of(scope["path"])
        if route is None:
            await not_found(scope["path"])(scope, receive, send)
            return
        await serve(
            scope,
            receive,
            send,
            route=route,
            metrics=self._metrics,
            keepalive_s=self._keepalive_s,
            work=self._answer,
        )

    async def _answer(self, request: Request, content: bytes, reply: "Reply") -> None:
        streams = _check(reply.route, request.method, content)
        posts = request.method == "POST"
        async with self._client.send(
            reply.route,
            content if posts else None,
            method="POST" if posts else "GET",
            streamed=streams,
        ) as answer:
            reply.submitted(answer)
            if streams:
                await self._stream(answer, reply)
            else:
                await reply.whole(await answer.response())
        self._on_answer()

    async def _stream(self, answer: AsyncRawStream, reply: "Reply") -> None:
        head = await reply.alive(answer.head())
        if head.kind != "sse":
            # An error, as nothing else answers a wish for a stream with a body.
            response = await answer.response()
            if reply.started and (error := response.error()):
                raise error
            await reply.whole(response)
            return
        await reply.begin(head.status, head.content_type)
        while events := await reply.alive(answer.batch()):
            await reply.send(b"".join(event + b"\n\n" for event in events))
        reply.measured.usage = (await answer.response()).usage or {}
        await reply.end()


def _check(route: str, method: str, content: bytes) -> bool:
    """Return whether the body asks for a stream; RequestError unless it can be sent at all."""
    if method != ROUTES[route]:
        raise RequestError(
            f"{route} is called with {ROUTES[route]}", status=405, type="MethodNotAllowed"
        )
    if method == "GET":
        return False
    return parsed(content, _Asked).stream is True and route in STREAMED


@dataclass(slots=True)
class Reply:
    """The HTTP answer of one request."""

    route: str
    _send: Send
    measured: Measured
    _keepalive_s: float
    started: bool = False
    request_id: str = ""
    job_id: str = ""
    may_retry: bool = False

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

    async def alive(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for `work`, and tell the client now and then that it is worth waiting."""
        task = asyncio.ensure_future(work)
        patience_s = self._keepalive_s if self.started else HEAD_WAIT_S
        try:
            while not (await asyncio.wait({task}, timeout=patience_s))[0]:
                await self.begin(200, EVENTS)
                await self.send(_COMMENT)
                patience_s = self._keepalive_s
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise
        return task.result()

    async def send(self, body: bytes, *, more: bool = True) -> None:
        """Send a piece of the body."""
        self.measured.sent(len(body))
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def end(self) -> None:
        """End a body that was sent in pieces."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def whole(self, response: Response) -> None:
        """Send an answer that is there as a whole."""
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
        self.may_retry = isinstance(error, RateLimited) and not self.job_id
        await self.begin(error.status, "application/json", len(body))
        await self.send(body, more=False)


Work = Callable[[Request, bytes, Reply], Awaitable[None]]
"""Answers one request, given its body; a SealedError from it is told to the client."""


async def serve(
    scope: Scope,
    receive: Receive,
    send: Send,
    *,
    route: str,
    metrics: Metrics,
    keepalive_s: float,
    work: Work,
) -> None:
    """Answer one request by `work`, which is cancelled, and its job with it, if the client goes."""
    request = Request(scope, receive)
    try:
        content = await request.body()
    except ClientDisconnect:
        return
    measured = metrics.begin(route, len(content))
    reply = Reply(route, send, measured, keepalive_s)
    answering = asyncio.ensure_future(_answered(work(request, content, reply), reply))
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone = not answering.done()
        leaving.cancel()
        answering.cancel()
        # Until the job is cancelled on the platform too.
        await asyncio.wait({answering})
        measured.end(gone=gone)
    if not answering.cancelled():
        answering.result()


async def _answered(answer: Awaitable[None], reply: Reply) -> None:
    try:
        await answer
    except SealedError as error:
        await reply.fail(error)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
