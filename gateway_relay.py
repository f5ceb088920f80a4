"""The routes of a worker: from an OpenAI client's request to a sealed job and back.

Owns the paths that are passed on and what asks for a stream. Bodies pass as they
came, in both directions, but for forms; nothing of them is looked at but `stream`.
"""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from client import AsyncClient, AsyncRawStream
from errors import RequestError
from gateway_body import parsed
from gateway_forms import json_of
from gateway_guard import not_found
from gateway_reply import Reply, Serving
from protocol import ROUTES

STREAMED = frozenset(
    {
        *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
        *("/v1/audio/transcriptions", "/v1/audio/translations"),
    }
)


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

    def __init__(self, client: AsyncClient, serving: Serving) -> None:
        self._client = client
        self._serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        route = route_of(scope["path"])
        if route is None:
            await not_found(scope["path"])(scope, receive, send)
            return
        await self._serving.serve(scope, receive, send, route=route, work=self._answer)

    async def _answer(self, request: Request, content: bytes, reply: Reply) -> None:
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            content = await json_of(request.headers, content)
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

    async def _stream(self, answer: AsyncRawStream, reply: Reply) -> None:
        head = await reply.alive(answer.head(), lambda: answer.note)
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
