"""The endpoint's OpenAI route carrying the sealed body, with workers on the real SDK."""

import asyncio
import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

import transport
from client import Answer, AsyncClient, Client, Progress
from client_config import ClientSettings
from errors import (
    ConfigError,
    EndpointNotFound,
    JobFailed,
    JobTimedOut,
    MissingChunk,
    NoWorker,
    PlatformFault,
    Rejected,
    RequestError,
    SealedError,
    TamperedChunk,
    TooLarge,
    TruncatedAnswer,
    Unreachable,
    WrongApiKey,
)
from gateway_reply import HEAD_WAIT_S
from keys import generate_key
from local_runpod_queue import Status
from tests.echo import Echo
from tests.gateways import RunningGateway
from tests.wait import until

PROMPT = "one two three four five"
CHAT = "/v1/chat/completions"
PATH = "/openai/v1/chat/completions"


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Echo]:
    with Echo(tmp_path_factory.mktemp("echo")) as running:
        yield running


def by_route(echo: Echo, **changes: Any) -> ClientSettings:
    return replace(echo.settings, transport="openai", **changes)


class Blocking:
    """The blocking client, in the words that both kinds share."""

    def __init__(self, settings: ClientSettings) -> None:
        self.settings = settings

    def chat(self, prompt: str, **options: Any) -> Answer:
        with Client(self.settings) as client:
            answer: Answer = client.chat(prompt, **options)
            return answer

    def stream(self, prompt: str, **options: Any) -> tuple[str, Answer | SealedError]:
        """Return the text that was delivered, and how it ended."""
        text = ""
        with Client(self.settings) as client:
            try:
                with client.chat(prompt, stream=True, **options) as stream:
                    for delta in stream:
                        text += delta.text
                    return text, stream.answer()
            except SealedError as error:
                return text, error

    def request(self, route: str, body: Any, *, stream: bool, **options: Any) -> tuple[int, bytes]:
        with Client(self.settings) as client:
            if not stream:
                response = client.request(route, body, stream=False, **options)
            else:
                with client.request(route, body, stream=True, **options) as events:
                    response = events.response()
            return response.status, response.body

    def leave(self, wait: Callable[[], object]) -> None:
        """Leave a stream after its first piece and `wait`."""
        with (
            Client(self.settings) as client,
            client.chat(PROMPT, stream=True, behaviour="hang") as stream,
        ):
            assert next(stream).text
            wait()


class Looped:
    """The same with the client for event loops."""

    def __init__(self, settings: ClientSettings) -> None:
        self.settings = settings

    def chat(self, prompt: str, **options: Any) -> Answer:
        async def main() -> Answer:
            async with AsyncClient(self.settings) as client:
                answer: Answer = await client.chat(prompt, **options)
                return answer

        return asyncio.run(main())

    def stream(self, prompt: str, **options: Any) -> tuple[str, Answer | SealedError]:
        async def main() -> tuple[str, Answer | SealedError]:
            text = ""
            async with AsyncClient(self.settings) as client:
                try:
                    async with client.chat(prompt, stream=True, **options) as stream:
                        async for delta in stream:
                            text += delta.text
                        return text, await stream.answer()
                except SealedError as error:
                    return text, error

        return asyncio.run(main())

    def request(self, route: str, body: Any, *, stream: bool, **options: Any) -> tuple[int, bytes]:
        async def main() -> tuple[int, bytes]:
            async with AsyncClient(self.settings) as client:
                if not stream:
                    response = await client.request(route, body, stream=False, **options)
                else:
                    async with client.request(route, body, stream=True, **options) as events:
                        response = await events.response()
                return response.status, response.body

        return asyncio.run(main())

    def leave(self, wait: Callable[[], object]) -> None:
        async def main() -> None:
            async with (
                AsyncClient(self.settings) as client,
                client.chat(PROMPT, stream=True, behaviour="hang") as stream,
            ):
                assert (await anext(stream)).text
                await asyncio.to_thread(wait)

        asyncio.run(main())


Either = Blocking | Looped
KINDS = pytest.mark.parametrize("kind", [Blocking, Looped], ids=["blocking", "async"])


@pytest.fixture(params=[Blocking, Looped], ids=["blocking", "async"])
def client(request: pytest.FixtureRequest, echo: Echo) -> Either:
    kind: type[Blocking] | type[Looped] = request.param
    return kind(by_route(echo))


def test_notes_of_the_wait_are_told(client: Either) -> None:
    seen: list[Progress] = []
    words = ["loading model b", "loading model b, still"]
    assert client.chat("a b", notes=words, pause_s=0.2, on_progress=seen.append).text == "a b"
    assert [progress.note for progress in seen if progress.note] == words


def until_over(echo: Echo, status: Status = Status.COMPLETED) -> None:
    until(lambda: echo.last_job().status.final, 10, "over")
    assert echo.last_job().status is status


# -- answers ---------------------------------------------------------------------------------------


def test_a_whole_answer_and_a_stream(client: Either, echo: Echo) -> None:
    answer = client.chat(PROMPT)
    assert answer.text == PROMPT
    assert answer.usage and answer.job_id == ""
    # Its connection was left open for as long as the platform needed to end the job.
    until_over(echo)
    text, streamed = client.stream(PROMPT)
    assert isinstance(streamed, Answer)
    assert text == streamed.text == PROMPT
    until_over(echo)


def test_every_route_travels_on_the_same_path(client: Either, echo: Echo) -> None:
    before = len(echo.platform.exchanged)
    body = {"messages": [{"role": "user", "content": "a b"}]}
    status, whole = client.request(CHAT, body, stream=False)
    assert (status, json.loads(whole)) == (200, {"echo": "a b"})
    status, events = client.request(CHAT, body, stream=True)
    assert status == 200 and events.endswith(b"data: [DONE]\n\n")
    assert client.request("/v1/nowhere", {}, stream=False, check=False)[0] == 404
    with pytest.raises(RequestError, match="no such route"):
        client.request("/v1/nowhere", {}, stream=True)
    sent = [each for each in echo.platform.exchanged[before:] if each.direction[:6] == "client"]
    assert {each.path.partition("/local")[2] for each in sent} == {PATH}
    assert all(json.loads(each.body).keys() == {"sealed", "stream"} for each in sent)


def test_errors_of_the_worker_are_typed(client: Either) -> None:
    with pytest.raises(RequestError, match="longer than the context") as raised:
        client.chat(PROMPT, behaviour="too long")
    assert (raised.value.status, raised.value.param) == (400, "messages")


def test_the_platform_sees_no_word(client: Either, echo: Echo) -> None:
    before = len(echo.platform.exchanged)
    text, _ = client.stream("Rosebud-4711 Xanadu-0815")
    assert text == "Rosebud-4711 Xanadu-0815"
    carried = b"\n".join(each.body for each in echo.platform.exchanged[before:])
    assert carried.count(b"data: 1.") >= 2  # the worker's posts and the platform's answer
    for word in ("Rosebud-4711", "Xanadu-0815", "messages", "generate", echo.key):
        assert word.encode() not in carried


def test_long_answers_and_large_prompts(client: Either) -> None:
    prompt = "ünï_" * 200_000
    assert client.chat(prompt).text == prompt


def test_many_at_once(echo: Echo) -> None:
    async def main() -> list[str]:
        async with AsyncClient(by_route(echo)) as client:
            answers = (client.chat(f"number {n}", pause_s=0.1) for n in range(32))
            return [answer.text for answer in await asyncio.gather(*answers)]

    assert asyncio.run(main()) == [f"number {n}" for n in range(32)]


def test_connections_are_used_again(echo: Echo) -> None:
    opened: list[str] = []

    class Counting(httpx2.HTTPTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            def trace(event: str, info: Any) -> None:
                if event == "connection.connect_tcp.started":
                    opened.append(event)

            request.extensions["trace"] = trace
            return super().handle_request(request)

    with Client(by_route(echo), transport=Counting()) as client:
        for _ in range(3):
            assert client.chat("x").text == "x"
            assert "".join(delta.text for delta in client.chat("y", stream=True)) == "y"
    assert len(opened) == 1


# -- who waits, and for how long -------------------------------------------------------------------


def test_a_client_that_goes_away_ends_the_job(client: Either, echo: Echo) -> None:
    def hanging() -> None:
        echo.until_hanging(echo.last_job().id)

    client.leave(hanging)
    echo.until_cancelled(echo.last_job().id)


@pytest.mark.parametrize(("noted", "before_s"), [("runs", 60), ("hanging", 0)])
def test_a_cancelled_task_ends_its_job(echo: Echo, noted: str, before_s: float) -> None:
    """Before the first event, when the answer has no head yet, and after some."""

    async def main() -> None:
        seen = len(echo.noted(noted))
        async with AsyncClient(by_route(echo)) as client:
            call = client.chat(PROMPT, behaviour="hang", before_s=before_s)
            task = asyncio.create_task(call)
            await asyncio.to_thread(until, lambda: len(echo.noted(noted)) > seen)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    echo.until_cancelled(echo.last_job().id)


def test_a_timeout_ends_the_job(client: Either, echo: Echo) -> None:
    started_s = time.monotonic()
    with pytest.raises(JobTimedOut, match=r"0\.6 s.*running"):
        client.chat(PROMPT, behaviour="hang", timeout_s=0.6)
    text, error = client.stream(PROMPT, behaviour="hang", timeout_s=0.6, pause_s=0.17)
    assert type(error) is JobTimedOut
    assert PROMPT.startswith(text)
    assert 1.2 <= time.monotonic() - started_s < 10
    echo.until_cancelled(echo.last_job().id, worker_too=False)


def test_the_timeout_test_can_fail(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the alarm, a blocking read lasts for as long as its first time-out says."""
    monkeypatch.setattr(transport, "SILENCE_S", 1.5)
    monkeypatch.setattr(transport, "_shut_down", lambda connection: None)
    started_s = time.monotonic()
    _, error = Blocking(by_route(echo)).stream(PROMPT, behaviour="hang", timeout_s=0.3)
    assert isinstance(error, JobTimedOut)
    assert time.monotonic() - started_s > 1.5


@KINDS
def test_nobody_takes_the_job(kind: type[Either], tmp_path: Path) -> None:
    with Echo(tmp_path, workers=0) as echo:
        echo.platform.worker_env("pod-1")
        with pytest.raises(NoWorker, match="1 starting"):
            kind(by_route(echo)).chat("x", wait_s=0.5)
        echo.until_cancelled(echo.last_job().id, worker_too=False)


def test_the_wait_ends_when_the_job_is_taken_however_long_it_says_nothing(client: Either) -> None:
    # An answer that is not streamed says its first word with its last.
    text, answer = client.stream("a b", wait_s=0.8, before_s=1.2)
    assert isinstance(answer, Answer)
    assert text == "a b"


def test_progress_tells_queued_and_running(tmp_path: Path) -> None:
    seen: list[Progress] = []
    with Echo(tmp_path, workers=0) as echo:
        answers: list[Answer] = []
        call = threading.Thread(
            target=lambda: answers.append(
                Looped(by_route(echo)).chat("a b", on_progress=seen.append, pause_s=0.2)
            )
        )
        call.start()
        until(lambda: seen, 10, "queued")
        echo.start("pod-1")
        call.join(60)
        assert answers[0].text == "a b"
    states = [progress.state for progress in seen]
    assert states[0] == "queued" and states[-1] == "running" and states.count("running") == 1


def test_the_gateway_by_the_route(echo: Echo, tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "a b"}]}
    with RunningGateway(echo.environ, tmp_path, CLIENT_TRANSPORT="openai") as gateway:
        assert gateway.http.post(CHAT, json=body).json() == {"echo": "a b"}
        before = len(echo.platform.jobs)
        # While the platform has not answered, the client hears that it is worth waiting.
        with (
            echo.fault("openai", delay_s=HEAD_WAIT_S + 0.5),
            gateway.http.stream("POST", CHAT, json={**body, "stream": True}) as answer,
        ):
            lines = answer.iter_lines()
            assert next(lines).startswith(":")
            assert len(echo.platform.jobs) == before
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert not [e for e in echo.platform.exchanged if "/run" in e.path or "/stream/" in e.path]


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"cut": 3}, {"cut": 3, "reset": True, "when": "after"}])
def test_a_cut_stream_is_truncated_and_says_what_helps(
    client: Either, echo: Echo, how: dict[str, Any]
) -> None:
    with echo.watch("run") as runs, echo.watch("status") as repairs:
        echo.platform.faults.add("openai", **how)
        text, error = client.stream(PROMPT, pause_s=0.05)
        assert type(error) is TruncatedAnswer
        assert "CLIENT_TRANSPORT=run" in str(error)
        assert text and PROMPT.startswith(text) and text != PROMPT
        with pytest.raises(TruncatedAnswer):
            client.chat(PROMPT)
        assert runs.seen == repairs.seen == 0


def test_a_cut_before_the_first_event(client: Either, echo: Echo) -> None:
    with echo.fault("job-stream", drop=True), pytest.raises(TruncatedAnswer):
        client.chat("x")


def test_a_lost_chunk_is_missing(client: Either, echo: Echo) -> None:
    with echo.fault("job-stream", nth=3, drop=True):
        text, error = client.stream(PROMPT)
    assert type(error) is MissingChunk
    assert text == "one"


def test_doubled_and_reordered_chunks_change_nothing(client: Either, echo: Echo) -> None:
    for what in ({"duplicate": 2}, {"nth": 3, "reorder": True}):
        with echo.fault("job-stream", **what):
            assert client.stream(PROMPT)[0] == PROMPT


@pytest.mark.parametrize("status", [500, 502, 524])
def test_a_fault_of_the_platform_is_not_sent_again(client: Either, echo: Echo, status: int) -> None:
    with (
        echo.fault("openai", status=status) as fault,
        pytest.raises(JobFailed if status == 500 else PlatformFault, match="injected fault"),
    ):
        client.chat("x")
    assert fault.hits == 1


def test_a_busy_platform_is_asked_again(client: Either, echo: Echo) -> None:
    with echo.fault("openai", nth=1, count=2, status=429) as fault:
        assert client.chat("x").text == "x"
    assert fault.hits == 2


def test_plaintext_and_other_chunks_are_not_believed(client: Either) -> None:
    text, error = client.stream(PROMPT, behaviour="plaintext", pause_s=0.01)
    assert type(error) is TamperedChunk
    assert text in PROMPT


@pytest.mark.parametrize(
    ("event", "error"),
    [
        ("data: x\n\n", TamperedChunk),
        (f"data: {Rejected.TEXT}\n\n", TamperedChunk),
        ('data: {"error": {"message": "out of memory"}}\n\n', JobFailed),
        ('data: {"error": "out of memory"}\n\n', JobFailed),
        ("data: never ending" + "." * 600_000, TruncatedAnswer),
        (": a comment\n\n", MissingChunk),
        ({"text": "an object"}, TamperedChunk),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_event_that_is_no_chunk(
    client: Either, echo: Echo, event: Any, error: type[SealedError]
) -> None:
    def tamper(body: bytes) -> bytes:
        return json.dumps({"output": event}).encode()

    with echo.fault("job-stream", nth=3, count=2, tamper=tamper):
        text, raised = client.stream(PROMPT, pause_s=0.01)
    assert type(raised) is error
    assert PROMPT.startswith(text)


def test_a_wrong_encryption_key_says_which_key_and_endpoint(client: Either, echo: Echo) -> None:
    client.settings = by_route(echo, encryption_key=generate_key())
    with pytest.raises(Rejected, match="ENCRYPTION_KEY") as raised:
        client.chat("x")
    assert echo.platform.endpoint_id in str(raised.value)
    until_over(echo, Status.FAILED)
    assert echo.last_job().error == Rejected.TEXT
    # The same where the platform tells of the failure alone.
    with echo.fault("job-stream", drop=True), pytest.raises(Rejected, match="ENCRYPTION_KEY"):
        client.chat("x")


def test_a_job_that_fails_on_its_way_is_not_an_answer(client: Either) -> None:
    text, error = client.stream(PROMPT, behaviour="fail", pause_s=0.01)
    assert type(error) is TruncatedAnswer
    assert text in PROMPT


def test_wrong_keys_and_endpoints(client: Either, echo: Echo) -> None:
    client.settings = by_route(echo, api_key="wrong")
    with pytest.raises(WrongApiKey, match="RUNPOD_API_KEY"):
        client.chat("x")
    client.settings = by_route(echo, endpoint_id="elsewhere")
    with pytest.raises(EndpointNotFound, match="RUNPOD_ENDPOINT_ID"):
        client.chat("x")
    client.settings = by_route(echo, api_base="http://127.0.0.1:9/v2")
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9.*RUNPOD_API_BASE"):
        client.chat("x")


def test_what_the_route_cannot_do_is_refused(client: Either, echo: Echo) -> None:
    with echo.watch("openai") as sent:
        with pytest.raises(ConfigError, match="CLIENT_TRANSPORT=run"):
            client.chat("x", execution_timeout_s=5)
        with pytest.raises(TooLarge, match="shorten it"):
            client.chat("x" * 8_000_000)
    assert sent.seen == 0


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """Answers 200 with a page, or hangs up without a word."""

    page = b""
    seen = 0

    def do_POST(self) -> None:
        type(self).seen += 1
        if self.page:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(self.page)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def elsewhere(page: bytes) -> Iterator[tuple[ClientSettings, type[Elsewhere]]]:
    handler = type("Handler", (Elsewhere,), {"page": page, "seen": 0})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            base = f"http://127.0.0.1:{server.server_port}"
            yield ClientSettings("e", "k", generate_key(), base, transport="openai"), handler
        finally:
            server.shutdown()
            thread.join()


@KINDS
def test_something_that_is_not_the_platform(kind: type[Either]) -> None:
    with (
        elsewhere(b"<html>Welcome</html>") as (settings, _),
        pytest.raises(PlatformFault, match="not the platform's API"),
    ):
        kind(settings).chat("x")


@KINDS
def test_a_broken_submission_is_not_sent_again(kind: type[Either]) -> None:
    with elsewhere(b"") as (settings, handler):
        with pytest.raises(Unreachable, match="not sent again"):
            kind(settings).chat("x")
        assert handler.seen == 1


# -- settings --------------------------------------------------------------------------------------


def test_the_transport_is_a_setting() -> None:
    good = {
        "RUNPOD_ENDPOINT_ID": "e",
        "RUNPOD_API_KEY": "k",
        "ENCRYPTION_KEY": generate_key(),
    }
    assert ClientSettings.from_environ(good).transport == "run"
    chosen = ClientSettings.from_environ({**good, "CLIENT_TRANSPORT": "openai"})
    assert chosen.transport == "openai"
    with pytest.raises(ConfigError, match="CLIENT_TRANSPORT is none of run, openai"):
        ClientSettings.from_environ({**good, "CLIENT_TRANSPORT": "carrier pigeon"})
