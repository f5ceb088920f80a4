"""`POST /api/chat`: a question and its answer in a few plain members, for scripts.

    curl -d '{"message": "Why is the sky blue?"}' localhost:8000/api/chat

Owns the shape of this one route; whoever needs more has the OpenAI routes.
"""

from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from answers import Answer, Delta
from client import AsyncClient, AsyncStream
from errors import RequestError
from gateway_body import parsed
from gateway_reply import EVENTS, Reply, Serving

PATH = "/api/chat"


class Turn(msgspec.Struct, forbid_unknown_fields=True):
    """What was said before."""

    role: Literal["system", "user", "assistant"]
    content: str


class Question(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request."""

    message: str
    model: str | None = None
    history: list[Turn] = []
    stream: bool = False

    def messages(self) -> list[dict[str, str]]:
        """Return the conversation as the model gets it."""
        turns = [*self.history, Turn("user", self.message)]
        return [{"role": turn.role, "content": turn.content} for turn in turns]


class Chat:
    """The ASGI application of the route."""

    def __init__(self, client: AsyncClient, serving: Serving) -> None:
        self._client = client
        self._serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._serving.serve(scope, receive, send, route=PATH, work=self._answer)

    async def _answer(self, request: Request, content: bytes, reply: Reply) -> None:
        if request.method != "POST":
            raise RequestError(f"{PATH} is called with POST", status=405, type="MethodNotAllowed")
        question = parsed(content, Question)
        if question.stream or "text/event-stream" in request.headers.get("accept", ""):
            async with self._client.chat(
                question.messages(), stream=True, model=question.model
            ) as stream:
                reply.submitted(stream)
                await self._stream(stream, reply)
        else:
            answer = await self._client.chat(question.messages(), model=question.model)
            reply.submitted(answer)
            await self._whole(answer, reply)

    async def _whole(self, answer: Answer, reply: Reply) -> None:
        told = {
            "text": answer.text,
            "usage": answer.usage,
            "job_id": answer.job_id,
            "request_id": answer.request_id,
        }
        reply.measured.usage = answer.usage or {}
        body = msgspec.json.encode(told)
        await reply.begin(200, "application/json", len(body))
        await reply.send(body, more=False)

    async def _stream(self, stream: AsyncStream, reply: Reply) -> None:
        while delta := await reply.alive(_next(stream)):
            if delta.text:
                await reply.begin(200, EVENTS)
                await reply.send(_event({"text": delta.text}))
        usage = (await stream.answer()).usage
        reply.measured.usage = usage or {}
        await reply.begin(200, EVENTS)
        await reply.send(_event({"done": True, "usage": usage}), more=False)


async def _next(stream: AsyncStream) -> Delta | None:
    return await anext(stream, None)


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def routes(client: AsyncClient, serving: Serving) -> list[BaseRoute]:
    """Return the route; the body is bounded by whoever mounts it."""
    return [Route(PATH, Chat(client, serving))]
