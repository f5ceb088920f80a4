"""Calls an ASGI application in process: one HTTP request, no socket (ASGI specification 3.0).

Owns back-pressure and the order in which a call is ended. Knows nothing of
what the application is.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]

SETTLE_CYCLES = 2
"""Turns of the event loop without news after which what has gathered is handed on."""

CLOSE_TIMEOUT_S = 5.0
"""How long a call may take to end by itself once it was told that its client has gone."""


@dataclass(frozen=True, slots=True)
class Start:
    """The response's first message; header names are lower-case."""

    status: int
    headers: dict[str, str]


class AsgiCall:
    """One request to `app`; iterate `start()` and `parts()`, then always `aclose()`.

    The application can be at most one message ahead of the consumer: while the
    consumer is busy it waits in `send`, and what vLLM produces meanwhile merges
    inside vLLM instead of piling up here.
    """

    def __init__(
        self,
        app: App,
        method: str,
        path: str,
        body: bytes,
        content_type: str = "application/json",
    ) -> None:
        self._app = app
        self._body: bytes | None = body
        self._gone = asyncio.Event()
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue(maxsize=1)
        self._scope: Message = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                (b"host", b"worker"),
                (b"content-type", content_type.encode()),
                (b"content-length", str(len(body)).encode()),
            ],
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 0),
            "state": {},
        }
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        finally:
            if not self._gone.is_set():
                await self._messages.put(None)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if not self._gone.is_set():
            await self._messages.put(message)

    async def _next(self) -> Message:
        message = await self._messages.get()
        return await self._fail() if message is None else message

    async def _fail(self) -> Message:
        if self._gone.is_set():
            raise ConnectionAbortedError("the call was closed")
        await self._task  # raises what the application raised
        raise RuntimeError("the application ended without ending its response")

    async def start(self) -> Start:
        """Wait for the response to begin; ConnectionAbortedError once the call is closed."""
        message = await self._next()
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in message["headers"]
        }
        return Start(message["status"], headers)

    async def parts(self) -> AsyncGenerator[tuple[list[bytes], bool], None]:
        """Yield what has gathered since the last time, and whether it is the end."""
        more = True
        while more:
            message = await self._next()
            gathered, idle = [message], 0
            while message.get("more_body", False) and idle <= SETTLE_CYCLES:
                try:
                    message = self._messages.get_nowait() or await self._fail()
                    gathered.append(message)
                    idle = 0
                except asyncio.QueueEmpty:
                    idle += 1
                    await asyncio.sleep(0)
            more = message.get("more_body", False)
            yield [part["body"] for part in gathered if part.get("body")], not more

    def disconnect(self) -> None:
        """Tell the application that its client has gone."""
        self._gone.set()
        with contextlib.suppress(asyncio.QueueEmpty):
            self._messages.get_nowait()  # frees an application that waits in `send`

    async def aclose(self) -> None:
        """End the call: disconnect, wait, and only then cancel."""
        self.disconnect()
        if not self._task.done():
            await asyncio.wait([self._task], timeout=CLOSE_TIMEOUT_S)
        if not self._task.done():
            self._task.cancel()
        with contextlib.suppress(BaseException):
            await self._task
        with contextlib.suppress(asyncio.QueueFull):
            self._messages.put_nowait(None)  # wakes whoever still waits for a message
