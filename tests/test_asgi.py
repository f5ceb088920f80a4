"""Calls of an ASGI application in process: order, back-pressure and ends."""

import asyncio
import contextlib
from typing import Any

import pytest

import asgi
from asgi import AsgiCall


async def _respond(send: Any, *pieces: bytes, status: int = 200) -> None:
    headers = [(b"Content-Type", b"text/plain"), (b"x-two", b"2")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _read(call: AsgiCall) -> list[tuple[list[bytes], bool]]:
    return [part async for part in call.parts()]


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    request = await receive()
    assert not request["more_body"]
    await _respond(send, scope["method"].encode(), scope["path"].encode(), request["body"])


async def test_a_call_reaches_the_application_as_one_http_request() -> None:
    call = AsgiCall(_echo, "POST", "/v1/x", b'{"a":1}')
    start = await call.start()
    assert (start.status, start.headers) == (200, {"content-type": "text/plain", "x-two": "2"})
    parts = await _read(call)
    assert b"".join(piece for pieces, _ in parts for piece in pieces) == b'POST/v1/x{"a":1}'
    assert [last for _, last in parts][-1] and not any(last for _, last in parts[:-1])
    await call.aclose()


async def test_what_is_there_leaves_together() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await _respond(send, *[b"x"] * 50)

    call = AsgiCall(app, "GET", "/", b"")
    await call.start()
    parts = await _read(call)
    assert sum(len(pieces) for pieces, _ in parts) == 50
    assert len(parts) < 10
    await call.aclose()


async def test_the_application_waits_for_a_consumer_that_is_busy() -> None:
    sent = 0

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            sent += 1

    call = AsgiCall(app, "GET", "/", b"")
    await call.start()
    for _ in range(100):
        await asyncio.sleep(0)
    assert sent <= 1
    call.disconnect()
    call._task.cancel()
    await call.aclose()


async def test_an_exception_of_the_application_reaches_the_consumer() -> None:
    async def before(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError("before the start")

    async def after(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise LookupError("in the middle")

    async def silent(scope: Any, receive: Any, send: Any) -> None:
        return

    call = AsgiCall(before, "GET", "/", b"")
    with pytest.raises(LookupError):
        await call.start()
    await call.aclose()
    call = AsgiCall(after, "GET", "/", b"")
    await call.start()
    with pytest.raises(LookupError):
        await _read(call)
    await call.aclose()
    call = AsgiCall(silent, "GET", "/", b"")
    with pytest.raises(RuntimeError, match="without ending"):
        await call.start()
    await call.aclose()


@pytest.mark.parametrize("waits", ["for its client to go", "in send", "before the start"])
async def test_closing_tells_the_application_and_lets_it_end_by_itself(waits: str) -> None:
    ended = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        if waits != "before the start":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        if waits == "in send":
            for _ in range(3):
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        ended.set()

    call = AsgiCall(app, "POST", "/", b"{}")
    if waits != "before the start":
        await call.start()
    for _ in range(5):
        await asyncio.sleep(0)
    await call.aclose()
    assert ended.is_set()


async def test_a_consumer_that_waits_is_woken_by_closing() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await receive()
        await receive()

    call = AsgiCall(app, "GET", "/", b"")
    await call.start()
    reading = asyncio.create_task(_read(call))
    await asyncio.sleep(0)
    await call.aclose()
    with pytest.raises(ConnectionAbortedError):
        await asyncio.wait_for(reading, 1)


async def test_an_application_that_ignores_its_client_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asgi, "CLOSE_TIMEOUT_S", 0.05)
    cancelled = False

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal cancelled
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled = True
            raise

    call = AsgiCall(app, "GET", "/", b"")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(call.start(), 0.01)
    await call.aclose()
    assert cancelled
    await call.aclose()  # harmless
