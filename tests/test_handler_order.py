"""The order in which the handler asks before a request runs, with no engine but with its like.

A stand-in for the engine lets a request stay where a test wants it; what the real one adds is in
test_worker.py and test_worker_faults.py.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import log_guard
import rp_handler
from config import Settings
from crypto import AnswerOpener, new_request, seal_request
from errors import RequestError
from frames import AnswerEvent, End, FrameDecoder, Head, Text
from keys import Key, KeyRing, generate_key
from protocol import Request


class Models:
    """One request of the engine at a time, which waits until it is told to `go`."""

    routes = ("/v1/models",)
    max_concurrency = 8
    usage = None

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.runs = 0

    def run(self, call: Any, cache_salt: str, expires_at: float | None) -> "Models":
        self.runs += 1
        return self

    def about(self) -> dict[str, Any]:
        return {}

    async def batches(self) -> AsyncIterator[list[AnswerEvent]]:
        logging.getLogger("worker.engine").warning("something happened")
        yield [Head(200, "generate", ""), Text(0, "hello")]
        await self.go.wait()
        yield [End(None, {})]

    async def aclose(self) -> None:
        pass


class Store:
    """A shared store that refuses with one error until it is told otherwise."""

    def __init__(self) -> None:
        self.error: RequestError | None = None
        self.said: list[str] = []

    def name(self, secret: bytes, replay_id: str) -> str:
        return replay_id.partition(".")[2]

    async def begin(self, name: str, expires_at: int) -> None:
        self.said.append("begin")
        if self.error:
            raise self.error

    def finish(self, name: str) -> None:
        self.said.append("finish")

    def abandon(self, name: str) -> None:
        self.said.append("abandon")


class House:
    """A handler with keys of two clients, the first held to one request in flight."""

    def __init__(self, **settings: Any) -> None:
        text = f"laptop={generate_key()};max_in_flight=1,{generate_key()}"
        self.keys = KeyRing.parse(text)
        self.models, self.store = Models(), Store()
        models: Any = self.models
        self.handler = rp_handler.Handler(
            Settings(endpoint_id="local", **settings), self.keys, models, store=self.store
        )

    def request(self, route: str = "generate") -> Request:
        body, method = (None, "GET") if route == "worker" else (b'{"prompt":"x"}', "POST")
        return new_request(route, body, audience="local", ttl_s=60, method=method)  # type: ignore[arg-type]

    def send(self, request: Request, key: Key | None = None) -> "asyncio.Task[End]":
        """Have it answered; return the end of the answer."""
        key = key or self.keys[0]
        job = {"id": "job-1", "input": {"sealed": seal_request(request, key)}}

        async def answer() -> End:
            opener, decoder = AnswerOpener(request, key), FrameDecoder()
            events: list[Any] = []
            async for chunk in self.handler.handle(job):
                events += decoder.feed(opener.open(chunk).payload)
            end = events[-1]
            assert isinstance(end, End)
            return end

        return asyncio.create_task(answer())

    async def code(self, request: Request, key: Key | None = None) -> Any:
        end = await asyncio.wait_for(self.send(request, key), 10)
        return end.error and end.error["code"]

    async def running(self, request: Request, key: Key | None = None) -> "asyncio.Task[End]":
        before = self.models.runs
        task = self.send(request, key)
        while self.models.runs == before:
            await asyncio.sleep(0)
        return task


@pytest.mark.parametrize("interval_ms", [0, 1])
async def test_an_answer_that_comes_to_its_end_is_logged_as_done(
    interval_ms: int, caplog: pytest.LogCaptureFixture
) -> None:
    house = House(stream_interval_ms=interval_ms)
    house.models.go.set()
    with caplog.at_level(logging.INFO):
        for route in ("generate", "worker"):
            assert await house.code(house.request(route)) is None
    assert caplog.text.count("outcome=done") == 2


async def test_a_delivery_that_comes_twice_is_no_second_request_of_its_client() -> None:
    """Refused for its client's limit, the second one would be an answer beside the first."""
    house = House()
    request = house.request()
    first = await house.running(request)
    assert await house.code(request) == "already_running"
    assert await house.code(house.request()) == "rate_limit_exceeded"
    assert await house.code(house.request("worker")) is None
    house.models.go.set()
    assert (await first).error is None
    assert await house.code(request) == "replayed"
    assert await house.code(house.request()) is None
    assert house.models.runs == 2


async def test_what_was_refused_for_a_limit_was_answered() -> None:
    house = House()
    first, second = house.request(), house.request()
    task = await house.running(first)
    assert await house.code(second) == "rate_limit_exceeded"
    house.models.go.set()
    await task
    assert await house.code(second) == "replayed"


async def test_a_place_is_given_back_however_a_request_ends() -> None:
    house = House()
    for _ in range(3):
        task = await house.running(house.request())
        task.cancel()
        await asyncio.wait([task])
    house.models.go.set()
    assert await house.code(house.request()) is None
    assert house.store.said == [*["begin", "abandon"] * 3, "begin", "finish"]


@pytest.mark.parametrize("code", ["replayed", "replay_store_unavailable"])
async def test_what_the_other_workers_refuse_does_not_run_and_may_come_again(code: str) -> None:
    house = House()
    house.models.go.set()
    request = house.request()
    house.store.error = RequestError("no", status=409, code=code)
    assert await house.code(request) == code
    assert house.models.runs == 0
    house.store.error = None
    assert await house.code(request) is None
    assert await house.code(request) == "replayed"
    assert house.store.said == ["begin", "abandon", "begin", "finish"]


async def test_every_line_of_a_job_tells_its_key(caplog: pytest.LogCaptureFixture) -> None:
    house = House()
    house.models.go.set()
    caplog.set_level(logging.INFO)
    caplog.handler.addFilter(log_guard.JobFilter())
    formatter = logging.Formatter("%(message)s%(job)s")
    log_guard.current_job.set("job=before")  # as one who answers jobs one after the other leaves it
    for key, client in zip(house.keys, ("laptop", "-"), strict=True):
        caplog.clear()
        assert await house.code(house.request(), key) is None
        await asyncio.sleep(0)
        lines = [formatter.format(record) for record in caplog.records]
        assert len(lines) == 2
        assert lines[0] == f"something happened [job=job-1 key={key.id} client={client}]"
        assert lines[1].startswith(f"job=job-1 key={key.id} client={client} route=generate ")
        assert all(line.count("job=") == line.count(key.id) == 1 for line in lines)


def test_vllms_own_lines_are_marked_too() -> None:
    text = Path(rp_handler.__file__).with_name("vllm_logging.json").read_text()
    config = json.loads(text)
    assert "job" in config["handlers"]["vllm"]["filters"]
    assert config["formatters"]["vllm"]["format"].endswith("%(message)s%(job)s")
