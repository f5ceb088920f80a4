"""The library against the local platform and workers on the real SDK, faults included."""

import asyncio
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

import delivery
import endpoint
import job_polled
from client import Answer, AsyncClient, Client, Progress, Response
from client_config import ClientSettings, load
from errors import (
    AnswerError,
    ConfigError,
    EndpointNotFound,
    JobCancelled,
    JobFailed,
    JobTimedOut,
    MissingChunk,
    NoWorker,
    PlatformFault,
    RateLimited,
    Rejected,
    RequestError,
    RestartedAnswer,
    SealedError,
    TamperedChunk,
    TooLarge,
    TruncatedAnswer,
    Unreachable,
    WrongApiKey,
)
from frames import End
from keys import generate_key
from tests.echo import Echo
from tests.wait import until

PROMPT = "one two three four five"
OPENAI = "/v1/chat/completions"


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Echo]:
    with Echo(tmp_path_factory.mktemp("echo")) as running:
        yield running


class Blocking:
    """The blocking client, in the words that both kinds share."""

    def __init__(self, settings: ClientSettings) -> None:
        self.settings = settings

    def chat(self, *args: Any, **options: Any) -> Answer:
        with Client(self.settings) as client:
            answer: Answer = client.chat(*args, **options)
            return answer

    def complete(self, *args: Any, **options: Any) -> Answer:
        with Client(self.settings) as client:
            answer: Answer = client.complete(*args, **options)
            return answer

    def stream(self, *args: Any, **options: Any) -> tuple[str, Answer | SealedError]:
        """Return the text that was delivered, and how it ended."""
        text = ""
        with Client(self.settings) as client:
            try:
                with client.chat(*args, stream=True, **options) as stream:
                    for delta in stream:
                        text += delta.text
                    return text, stream.answer()
            except SealedError as error:
                return text, error

    def request(self, *args: Any, **options: Any) -> Response:
        with Client(self.settings) as client:
            response: Response = client.request(*args, stream=False, **options)
            return response

    def events(self, *args: Any, **options: Any) -> tuple[list[bytes], Response]:
        with (
            Client(self.settings) as client,
            client.request(*args, stream=True, **options) as stream,
        ):
            assert stream.head().status
            return list(stream), stream.response()

    def leave(self, wait: Callable[[str], None], text: str, **options: Any) -> str:
        """Leave a stream after its first delta and `wait`; return the job's id."""
        with Client(self.settings) as client, client.chat(text, stream=True, **options) as stream:
            assert next(stream).text
            wait(stream.job_id)
            return stream.job_id

    def call(self, name: str, *args: Any) -> Any:
        with Client(self.settings) as client:
            return getattr(client, name)(*args)


class Looped:
    """The async client, in the same words."""

    def __init__(self, settings: ClientSettings) -> None:
        self.settings = settings

    def _run(self, call: Callable[[AsyncClient], Any]) -> Any:
        async def main() -> Any:
            async with AsyncClient(self.settings) as client:
                return await call(client)

        return asyncio.run(main())

    def chat(self, *args: Any, **options: Any) -> Answer:
        answer: Answer = self._run(lambda client: client.chat(*args, **options))
        return answer

    def complete(self, *args: Any, **options: Any) -> Answer:
        answer: Answer = self._run(lambda client: client.complete(*args, **options))
        return answer

    def stream(self, *args: Any, **options: Any) -> tuple[str, Answer | SealedError]:
        text = ""

        async def call(client: AsyncClient) -> Answer:
            nonlocal text
            async with client.chat(*args, stream=True, **options) as stream:
                async for delta in stream:
                    text += delta.text
                return await stream.answer()

        try:
            answer: Answer = self._run(call)
        except SealedError as error:
            return text, error
        return text, answer

    def request(self, *args: Any, **options: Any) -> Response:
        response: Response = self._run(lambda c: c.request(*args, stream=False, **options))
        return response

    def events(self, *args: Any, **options: Any) -> tuple[list[bytes], Response]:
        async def call(client: AsyncClient) -> tuple[list[bytes], Response]:
            async with client.request(*args, stream=True, **options) as stream:
                assert (await stream.head()).status
                return [event async for event in stream], await stream.response()

        events: tuple[list[bytes], Response] = self._run(call)
        return events

    def leave(self, wait: Callable[[str], None], text: str, **options: Any) -> str:
        async def call(client: AsyncClient) -> str:
            async with client.chat(text, stream=True, **options) as stream:
                assert (await anext(stream)).text
                wait(stream.job_id)
                return stream.job_id

        job_id: str = self._run(call)
        return job_id

    def call(self, name: str, *args: Any) -> Any:
        return self._run(lambda client: getattr(client, name)(*args))


Either = Blocking | Looped


@pytest.fixture(params=[Blocking, Looped], ids=["blocking", "async"])
def client(request: pytest.FixtureRequest, echo: Echo) -> Either:
    kind: type[Blocking] | type[Looped] = request.param
    return kind(echo.settings)


@pytest.fixture
def plain(echo: Echo) -> Iterator[Client]:
    with Client(echo.settings) as client:
        yield client


# -- answers ---------------------------------------------------------------------------------------


def test_a_whole_answer(client: Either, echo: Echo) -> None:
    answer = client.chat(PROMPT, temperature=0.5, seed=None)
    assert answer.text == PROMPT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage == {"prompt_tokens": 1, "completion_tokens": 5, "total_tokens": 6}
    assert answer.timings["first_token_ms"] == 2.0
    echo.until_completed(answer.job_id)
    assert len(answer.request_id) == 32


def test_a_stream_delivers_while_the_job_runs(client: Either, echo: Echo) -> None:
    # The worker says three words and then nothing ever again.
    job_id = client.leave(echo.until_hanging, PROMPT, behaviour="hang")
    echo.until_cancelled(job_id)


def test_a_stream_adds_up_to_its_answer(client: Either) -> None:
    text, answer = client.stream(PROMPT)
    assert isinstance(answer, Answer)
    assert text == answer.text == PROMPT


def test_a_conversation_with_a_system_prompt(client: Either) -> None:
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert client.chat(history, system="s").text == "s / a / b"


def test_completions_take_text_or_token_ids(client: Either) -> None:
    assert client.complete("once upon").text == "once upon"
    assert client.complete([1, 2, 3]).text == "[1, 2, 3]"


def test_everything_that_an_answer_can_hold(client: Either) -> None:
    answer = client.chat("x", behaviour="everything", n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.text == "x"
        assert choice.reasoning == "hmm, yes"
        function = {"name": "look", "arguments": '{"at":"sky"}'}
        assert choice.tool_calls == [{"id": "c1", "type": "function", "function": function}]
        assert choice.logprobs[0]["logprob"] == -0.5
    assert json.loads(json.dumps(answer.to_dict()))["choices"][1]["reasoning"] == "hmm, yes"


def test_long_answers_and_large_prompts(client: Either) -> None:
    prompt = "ünï " * 20_000
    assert client.chat([{"role": "user", "content": prompt.replace(" ", "_")}]).text == (
        prompt.replace(" ", "_")
    )


def test_openai_routes(client: Either) -> None:
    body = {"messages": [{"role": "user", "content": "a b"}]}
    response = client.request(OPENAI, body)
    assert (response.status, response.content_type) == (200, "application/json")
    assert response.json() == {"echo": "a b"}


def test_openai_routes_stream_their_events(client: Either) -> None:
    events, response = client.events(OPENAI, {"messages": [{"role": "user", "content": "a b"}]})
    assert [event[:6] for event in events] == [b"data: "] * 3
    assert json.loads(events[1][6:])["choices"][0]["delta"]["content"] == "b "
    assert events[2] == b"data: [DONE]"
    assert response.content_type == "text/event-stream"
    assert response.body == b"".join(event + b"\n\n" for event in events)


def test_a_body_decides_whether_a_request_streams(echo: Echo) -> None:
    body = {"messages": [{"role": "user", "content": "a b"}], "stream": True}
    with Client(echo.settings) as client:
        assert isinstance(client.request(OPENAI, body, stream=False), Response)
        stream = client.request(OPENAI, body)
        assert not isinstance(stream, Response)
        assert len(list(stream)) == 3


def test_error_statuses_are_raised_unless_they_are_wanted(client: Either) -> None:
    for call in (client.request, client.events):
        with pytest.raises(RequestError, match="no such route") as raised:
            call("/v1/nowhere", {})
        assert (raised.value.status, raised.value.type) == (404, "NotFoundError")
    assert client.request("/v1/nowhere", {}, check=False).status == 404
    pieces, response = client.events("/v1/nowhere", {}, check=False)
    assert response.status == 404 and b"".join(pieces) == response.body


def test_errors_of_the_worker_are_typed(client: Either) -> None:
    with pytest.raises(RequestError, match="longer than the context") as raised:
        client.chat(PROMPT, behaviour="too long")
    assert (raised.value.status, raised.value.param) == (400, "messages")
    _, error = client.stream(PROMPT, behaviour="too long")
    assert isinstance(error, RequestError)


def test_the_platform_sees_no_word(client: Either, echo: Echo) -> None:
    assert client.chat("Rosebud-4711", system="Xanadu-0815").text == "Xanadu-0815 / Rosebud-4711"
    assert len(echo.carried) > 1000
    for word in ("Rosebud-4711", "Xanadu-0815", "messages", echo.key):
        assert word.encode() not in echo.carried


def test_worker_health_status_cancel_purge(client: Either, echo: Echo) -> None:
    assert client.call("worker")["models"] == ["echo"]
    assert client.call("health")["workers"]["ready"] == 1
    job_id = client.chat("x").job_id
    echo.until_completed(job_id)
    assert client.call("status", job_id)["status"] == "COMPLETED"
    assert client.call("cancel", job_id)["id"] == job_id
    assert client.call("purge_queue")["removed"] == 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda client: client.chat([]), "empty"),
        (lambda client: client.chat(""), None),
        (lambda client: client.complete(""), "empty"),
        (lambda client: client.chat("x", temperature=float("nan")), "JSON"),
        (lambda client: client.chat("\ud800"), "surrogate"),
        (lambda client: client.chat("x", stop={1, 2}), "JSON"),
        (lambda client: client.chat("x", tools="hammer"), "tools"),
        (lambda client: client.request("/v1/x", {}, method="GET"), "GET"),
    ],
)
def test_bad_requests_are_refused_before_they_are_sent(
    client: Either, echo: Echo, call: Callable[[Either], Any], says: str | None
) -> None:
    before = len(echo.platform.jobs)
    if says is None:
        call(client)
        assert len(echo.platform.jobs) == before + 1
    else:
        with pytest.raises(RequestError, match=says):
            call(client)
        assert len(echo.platform.jobs) == before


def test_options_that_do_not_exist_are_refused(client: Either) -> None:
    with pytest.raises(TypeError, match="colour"):
        client.request(OPENAI, {}, colour="red")


def test_many_answers_at_once(echo: Echo) -> None:
    async def main() -> list[str]:
        async with AsyncClient(echo.settings) as client:
            answers = await asyncio.gather(*(client.chat(f"number {n}") for n in range(24)))
            return [answer.text for answer in answers]

    assert asyncio.run(main()) == [f"number {n}" for n in range(24)]


# -- delivery --------------------------------------------------------------------------------------


def of_the_answer(change: Callable[[list[Any]], Any]) -> Callable[[bytes], bytes]:
    """Return what changes the aggregated output that the SDK sends at the end."""

    def tamper(body: bytes) -> bytes:
        result = json.loads(body)
        result["output"] = change(result["output"])
        return json.dumps(result).encode()

    return tamper


def chunk_becomes(value: Any) -> Callable[[bytes], bytes]:
    return lambda body: json.dumps({"output": value}).encode()


@pytest.mark.parametrize("nth", [1, 2, 4, 7])
def test_a_chunk_lost_by_the_worker_is_repaired(client: Either, echo: Echo, nth: int) -> None:
    with echo.fault("job-stream", nth=nth, drop=True):
        assert client.chat(PROMPT).text == PROMPT
    with echo.fault("job-stream", nth=nth, drop=True):
        text, answer = client.stream(PROMPT)
    assert isinstance(answer, Answer)
    assert text == answer.text == PROMPT


def test_a_read_lost_on_the_way_is_repaired(client: Either, echo: Echo) -> None:
    with echo.fault("stream", nth=2, count=2, reset=True, when="after"):
        text, answer = client.stream(PROMPT, pause_s=0.02)
    assert isinstance(answer, Answer)
    assert text == PROMPT


@pytest.mark.parametrize(("nth", "lost", "error"), [(4, 3, MissingChunk), (8, 7, TruncatedAnswer)])
def test_a_chunk_that_nobody_has_any_more_is_an_error(
    client: Either, echo: Echo, nth: int, lost: int, error: type[SealedError]
) -> None:
    forget = of_the_answer(lambda chunks: chunks[:lost] + chunks[lost + 1 :])
    for call in (client.chat, client.stream):
        with echo.fault("job-done", tamper=forget):
            echo.platform.faults.add("job-stream", nth=nth, drop=True)
            try:
                result = call(PROMPT)
            except SealedError as failure:
                result = "", failure
        assert isinstance(result, tuple)
        text, raised = result
        assert type(raised) is error
        assert PROMPT.startswith(text)


def test_the_last_chunk_is_the_eighth(client: Either, echo: Echo) -> None:
    # The numbers of the tests above: head, five words, finish_reason, end.
    assert echo.job(client.chat(PROMPT).job_id).chunks_received == 8


def test_chunks_doubled_and_reordered_change_nothing(client: Either, echo: Echo) -> None:
    for what in ({"duplicate": 2}, {"reorder": True}, {"nth": 3, "reorder": True}):
        with echo.fault("job-stream", **what):
            assert client.chat(PROMPT).text == PROMPT
        with echo.fault("job-stream", **what):
            text, answer = client.stream(PROMPT)
        assert isinstance(answer, Answer)
        assert text == PROMPT


@pytest.mark.parametrize(
    "tamper",
    [
        chunk_becomes("free text from the platform"),
        chunk_becomes({"text": "an object"}),
        chunk_becomes(None),
        lambda body: body.replace(b'"1.', b'"2.', 1),
        lambda body: body[:100] + (b"A" if body[100:101] != b"A" else b"B") + body[101:],
    ],
)
def test_a_tampered_chunk_is_never_delivered(
    client: Either, echo: Echo, tamper: Callable[[bytes], bytes]
) -> None:
    with echo.fault("job-stream", nth=3, tamper=tamper):
        text, error = client.stream(PROMPT, pause_s=0.01)
    assert isinstance(error, TamperedChunk)
    assert PROMPT.startswith(text)
    with echo.fault("job-stream", nth=3, tamper=tamper), pytest.raises(TamperedChunk):
        client.chat(PROMPT)


def test_chunks_of_another_answer_are_not_believed(client: Either, echo: Echo) -> None:
    job_id = client.chat("pay Eve").job_id
    echo.until_completed(job_id)
    old = echo.job(job_id).output
    with echo.fault("job-stream", nth=2, tamper=chunk_becomes(old[1])):
        text, error = client.stream(PROMPT)
    assert isinstance(error, TamperedChunk)
    assert text == ""


def test_plaintext_of_the_worker_is_not_believed(client: Either) -> None:
    text, error = client.stream(PROMPT, behaviour="plaintext", pause_s=0.01)
    assert isinstance(error, TamperedChunk)
    assert text in PROMPT


def test_a_repair_with_plaintext_is_not_believed(client: Either, echo: Echo) -> None:
    with echo.fault("job-done", tamper=of_the_answer(lambda chunks: "the whole answer")):
        echo.platform.faults.add("job-stream", nth=8, drop=True)
        with pytest.raises(TamperedChunk):
            client.chat(PROMPT)


def test_an_answer_without_its_end_is_truncated(client: Either) -> None:
    text, error = client.stream(PROMPT, behaviour="no end")
    assert type(error) is TruncatedAnswer
    assert text == PROMPT
    with pytest.raises(TruncatedAnswer):
        client.chat(PROMPT, behaviour="no end")


def test_an_answer_that_failed_fails_whenever_it_is_asked_for(plain: Client) -> None:
    with plain.chat(PROMPT, stream=True, behaviour="no end") as stream:
        for ask in (lambda: list(stream), stream.answer, stream.answer):
            with pytest.raises(TruncatedAnswer):
                ask()


def test_the_truncation_test_can_fail(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that takes the platform's COMPLETED for the end returns half an answer."""
    take = delivery.Delivery.take

    def believe(self: delivery.Delivery, chunks: Any) -> Any:
        chunks = list(chunks)
        events = take(self, chunks)
        if not chunks and not self.ended:
            self.ended = True
            return [End(None, {})]
        return events

    monkeypatch.setattr(delivery.Delivery, "take", believe)
    with echo.fault("job-done", tamper=of_the_answer(lambda chunks: [])):
        echo.platform.faults.add("job-stream", nth=6, count=3, drop=True)
        text, answer = Blocking(echo.settings).stream(PROMPT)
    assert isinstance(answer, Answer)
    assert text == answer.text != PROMPT


def test_a_restart_is_told_after_delivery_and_followed_before(tmp_path: Path) -> None:
    with Echo(tmp_path, workers=3) as echo, Client(echo.settings) as client:

        def dying(name: str) -> Callable[[], None]:
            def work() -> None:
                until((tmp_path / f"died-{name}").exists, 20)
                job = echo.last_job()
                worker = str(job.worker_id)
                echo.processes[worker].wait(20)
                echo.platform.lose(worker)

            return work

        watcher = threading.Thread(target=dying("streamed"))
        watcher.start()
        text = ""
        with pytest.raises(RestartedAnswer, match="again"):
            for delta in client.chat(PROMPT, stream=True, behaviour="die", name="streamed"):
                text += delta.text
        watcher.join()
        assert text and PROMPT.startswith(text)
        assert echo.last_job().attempts == 2

        watcher = threading.Thread(target=dying("whole"))
        watcher.start()
        answer = client.chat(PROMPT, behaviour="die", name="whole")
        watcher.join()
        assert answer.text == PROMPT
        assert echo.job(answer.job_id).attempts == 2


def test_a_request_that_only_runs_elsewhere_is_its_error(client: Either) -> None:
    with pytest.raises(RequestError) as raised:
        client.chat("x", behaviour="already_running")
    assert raised.value.code == "already_running"


# -- the end of a job that nobody waits for --------------------------------------------------------


def test_an_exception_in_the_block_cancels(echo: Echo) -> None:
    with (
        Client(echo.settings) as client,
        pytest.raises(ZeroDivisionError),
        client.chat(PROMPT, stream=True, behaviour="hang") as stream,
    ):
        next(stream)
        echo.until_hanging(stream.job_id)
        raise ZeroDivisionError
    echo.until_cancelled(stream.job_id)


def test_a_cancelled_task_cancels_its_job(echo: Echo) -> None:
    async def main() -> str:
        async with AsyncClient(echo.settings) as client:
            task = asyncio.create_task(client.chat(PROMPT, behaviour="hang"))
            seen = len(echo.noted("hanging"))
            await asyncio.to_thread(until, lambda: len(echo.noted("hanging")) > seen)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return echo.last_job().id

    echo.until_cancelled(asyncio.run(main()))


def test_a_task_cancelled_while_it_submits_cancels_its_job(echo: Echo) -> None:
    async def main() -> None:
        async with AsyncClient(echo.settings) as client:
            seen = len(echo.platform.jobs)
            task = asyncio.create_task(client.chat(PROMPT, behaviour="hang"))
            await asyncio.to_thread(until, lambda: len(echo.platform.jobs) > seen)
            assert not task.done()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with echo.fault("run", when="after", delay_s=0.5):
        asyncio.run(main())
    echo.until_cancelled(echo.last_job().id, worker_too=False)


def test_an_answer_that_ended_is_not_cancelled(client: Either, echo: Echo) -> None:
    with echo.watch("cancel") as cancels:
        client.chat(PROMPT)
        client.stream(PROMPT)
    assert cancels.seen == 0


def test_an_error_in_the_answer_cancels_the_rest(client: Either, echo: Echo) -> None:
    with echo.fault("job-stream", nth=2, tamper=chunk_becomes("x")):
        _, error = client.stream(PROMPT, behaviour="hang")
    assert isinstance(error, TamperedChunk)
    echo.until_cancelled(echo.last_job().id, worker_too=False)


def test_a_job_cancelled_elsewhere_is_typed(client: Either, echo: Echo, plain: Client) -> None:
    seen = len(echo.noted("hanging"))

    def cancel() -> None:
        until(lambda: len(echo.noted("hanging")) > seen)
        plain.cancel(echo.last_job().id)

    elsewhere = threading.Thread(target=cancel)
    elsewhere.start()
    with pytest.raises(JobCancelled):
        client.chat(PROMPT, behaviour="hang")
    elsewhere.join()


# -- the platform ----------------------------------------------------------------------------------


def test_a_wrong_api_key(echo: Echo) -> None:
    with Client(replace(echo.settings, api_key="wrong")) as client:
        for call in (lambda: client.chat("x"), client.health):
            with pytest.raises(WrongApiKey, match="RUNPOD_API_KEY"):
                call()


def test_a_wrong_endpoint_and_a_wrong_job(echo: Echo, plain: Client) -> None:
    with (
        Client(replace(echo.settings, endpoint_id="elsewhere")) as client,
        pytest.raises(EndpointNotFound, match="RUNPOD_ENDPOINT_ID"),
    ):
        client.chat("x")
    for strange in ("unknown", "../health", "a?b#c"):
        with pytest.raises(EndpointNotFound, match="job"):
            plain.status(strange)


def test_a_wrong_encryption_key_says_which_key_and_endpoint(client: Either, echo: Echo) -> None:
    client.settings = replace(echo.settings, encryption_key=generate_key())
    with pytest.raises(Rejected, match="key of this worker") as raised:
        client.chat("x")
    assert "ENCRYPTION_KEY" in str(raised.value)
    assert echo.platform.endpoint_id in str(raised.value)


def test_a_failed_job_is_not_a_rejection(client: Either) -> None:
    with pytest.raises(JobFailed, match="the worker gave up"):
        client.chat(PROMPT, behaviour="fail")


def test_nothing_listens() -> None:
    settings = ClientSettings("e", "k", generate_key(), "http://127.0.0.1:9/v2")
    with (
        Client(settings) as client,
        pytest.raises(Unreachable, match=r"127\.0\.0\.1:9.*RUNPOD_API_BASE"),
    ):
        client.health()


def test_a_busy_platform_is_asked_again(client: Either, echo: Echo) -> None:
    before = len(echo.platform.jobs)
    with echo.fault("run", nth=1, count=2, status=429) as fault:
        assert client.chat("x").text == "x"
    assert fault.hits == 2
    assert len(echo.platform.jobs) == before + 1


def test_but_not_for_ever(echo: Echo, plain: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "RATE_PATIENCE_S", 0.5)
    with echo.fault("run", status=429), pytest.raises(RateLimited):
        plain.chat("x")


def test_nothing_is_sent_when_there_is_no_time_left_for_an_answer(
    echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "_FIRST_PAUSE_S", 8.0)
    sent: list[str] = []

    def slow_down(request: httpx2.Request) -> httpx2.Response:
        sent.append(request.url.path)
        time.sleep(2.5)  # more than the pause leaves of the time
        return httpx2.Response(429)

    client = Client(echo.settings, transport=httpx2.MockTransport(slow_down))
    with client, pytest.raises(RateLimited):
        client.chat("x", timeout_s=10)
    assert len(sent) == 1


@pytest.mark.parametrize(
    ("what", "error"),
    [({"status": 502}, PlatformFault), ({"reset": True}, Unreachable)],
)
def test_an_ambiguous_submission_is_not_sent_twice(
    client: Either, echo: Echo, what: dict[str, Any], error: type[SealedError]
) -> None:
    before = len(echo.platform.jobs)
    with echo.fault("run", when="after", **what) as fault, pytest.raises(error):
        client.chat("x")
    assert fault.hits == 1
    assert len(echo.platform.jobs) == before + 1


def test_a_submission_without_an_answer_is_not_sent_twice(
    echo: Echo, plain: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "REPLY_TIMEOUT_S", 0.2)
    with (
        echo.fault("run", when="after", delay_s=1.0) as fault,
        pytest.raises(Unreachable, match="may have taken the job"),
    ):
        plain.chat("x")
    assert fault.hits == 1


def test_reads_survive_a_stumbling_platform(client: Either, echo: Echo) -> None:
    with echo.fault("stream", nth=2, count=3, status=503) as fault:
        text, answer = client.stream(PROMPT, pause_s=0.01)
    assert isinstance(answer, Answer)
    assert text == PROMPT
    assert fault.hits == 3


def test_a_request_beyond_what_the_platform_carries_is_not_sent(client: Either, echo: Echo) -> None:
    with echo.watch("run") as runs:
        for size in (8_000_000, 16_000_000):
            with pytest.raises(TooLarge, match=r"shorten it|too large"):
                client.chat("x" * size)
    assert runs.seen == 0


def test_a_timeout_cancels(client: Either, echo: Echo) -> None:
    started_s = time.monotonic()
    with pytest.raises(JobTimedOut, match=r"0\.5 s"):
        client.chat(PROMPT, behaviour="hang", timeout_s=0.5)
    assert time.monotonic() - started_s < 2
    echo.until_cancelled(echo.last_job().id)


def test_the_limits_of_the_platform(client: Either, echo: Echo) -> None:
    with pytest.raises(JobTimedOut, match="execution timeout"):
        client.chat(PROMPT, behaviour="hang", execution_timeout_s=0.4)
    client.chat("x", ttl_s=77, execution_timeout_s=66)
    job = echo.last_job()
    assert (job.ttl_s, job.execution_timeout_s) == (77, 66)
    client.chat("x")
    assert echo.last_job().ttl_s > 1000


@pytest.mark.parametrize("kind", [Blocking, Looped], ids=["blocking", "async"])
def test_nobody_takes_the_job(kind: type[Blocking] | type[Looped], tmp_path: Path) -> None:
    seen: list[Progress] = []
    with Echo(tmp_path, workers=0, stream_hold_s=0) as echo:
        echo.platform.worker_env("pod-1")
        with pytest.raises(NoWorker, match="1 starting"):
            kind(echo.settings).chat("x", wait_s=1.3, on_progress=seen.append)
        echo.until_cancelled(echo.last_job().id, worker_too=False)
    assert [progress.state for progress in seen] == ["queued", "queued"]
    assert seen[1].waited_s > 1
    assert seen[0].workers and seen[0].workers["initializing"] == 1


def test_the_wait_ends_when_the_job_is_taken_however_long_it_says_nothing(client: Either) -> None:
    assert client.chat("a b", wait_s=2.0, before_s=2.5).text == "a b"


@pytest.fixture(scope="module")
def unheld(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Echo]:
    """A platform that answers every read at once."""
    with Echo(tmp_path_factory.mktemp("unheld"), stream_hold_s=0) as running:
        yield running


def test_progress_tells_queued_and_running(unheld: Echo) -> None:
    seen: list[Progress] = []
    with unheld.fault("job-take", delay_s=0.3):
        # The worker's poll is open already; the next one, for a second job, is delayed.
        Blocking(unheld.settings).chat("x")
        answer = Blocking(unheld.settings).chat("a b c", pause_s=0.3, on_progress=seen.append)
    assert answer.text == "a b c"
    assert [progress.state for progress in seen] == ["queued", "running"]
    assert all(progress.job_id == answer.job_id for progress in seen)


def test_progress_tells_what_the_worker_says_of_the_wait(client: Either) -> None:
    seen: list[Progress] = []
    words = ["loading model b", "loading model b, still"]
    answer = client.chat("a b c", notes=words, pause_s=0.2, on_progress=seen.append)
    assert answer.text == "a b c"
    told = [(progress.state, progress.note) for progress in seen if progress.note]
    assert told == [("running", word) for word in words]


def test_polling_adapts_to_the_platform(echo: Echo, unheld: Echo) -> None:
    def reads(platform: Echo) -> int:
        with platform.watch("stream") as watched:
            assert Blocking(platform.settings).chat("a b c d", pause_s=0.4).text == "a b c d"
        return watched.seen

    # Held: a read for every chunk. Not held: every 250 ms at most, more often after data.
    held, polled = reads(echo), reads(unheld)
    assert held <= 9
    assert held < polled <= 45


def first_byte_s(platform: Echo, before_s: float) -> float:
    """Return how long after its arrival on the platform the first text is the client's."""
    with (
        Client(platform.settings) as client,
        client.chat("a b c", stream=True, before_s=before_s) as stream,
    ):
        assert next(stream).text
        seen_s = time.monotonic()
        arrived_s = platform.job(stream.job_id).first_chunk_s
    assert arrived_s is not None
    return seen_s - arrived_s


@pytest.fixture(scope="module")
def briefly_held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Echo]:
    """A platform that holds reads for less than an answer takes to begin."""
    with Echo(tmp_path_factory.mktemp("held"), stream_hold_s=0.6) as running:
        yield running


@pytest.mark.parametrize("before_s", [0.0, 0.3, 0.65, 1.3])
def test_polling_adds_little_to_the_first_byte_on_a_platform_that_holds_reads(
    briefly_held: Echo, before_s: float
) -> None:
    # Also where the first byte comes just after a read that was held in vain.
    assert sorted(first_byte_s(briefly_held, before_s) for _ in range(3))[1] < 0.1


def test_the_first_byte_test_can_fail(briefly_held: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that pauses after reads that were held finds the first byte late."""
    monkeypatch.setattr(job_polled, "HELD_S", float("inf"))
    monkeypatch.setattr(job_polled, "FIRST_DELAY_S", job_polled.LONGEST_DELAY_S)
    assert first_byte_s(briefly_held, 0.65) > 0.1


@pytest.mark.parametrize("before_s", [0.0, 0.45, 0.8, 1.1])
def test_polling_adds_its_longest_pause_at_most_on_a_platform_that_does_not(
    unheld: Echo, before_s: float
) -> None:
    added_s = sorted(first_byte_s(unheld, before_s) for _ in range(3))[1]
    assert added_s < job_polled.LONGEST_DELAY_S + 0.1


class NotTheApi(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Location", "https://example.org/")
        self.end_headers()
        self.wfile.write(b"<html>Welcome to nginx</html>")

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize("status", [200, 302])
def test_something_that_is_not_the_platform(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NotTheApi, "status", status)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotTheApi) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            base = f"http://127.0.0.1:{server.server_port}"
            with (
                Client(ClientSettings("e", "k", generate_key(), base)) as client,
                pytest.raises(PlatformFault, match="not the platform's API"),
            ):
                client.chat("x")
        finally:
            server.shutdown()
            thread.join()


def test_a_key_is_needed_only_to_seal(echo: Echo) -> None:
    with Client(replace(echo.settings, encryption_key="")) as client:
        assert client.health()
        with pytest.raises(ConfigError, match="ENCRYPTION_KEY"):
            client.chat("x")


# -- settings --------------------------------------------------------------------------------------

GOOD = {
    "RUNPOD_ENDPOINT_ID": "abc123",
    "RUNPOD_API_KEY": "rpa_secret",
    "ENCRYPTION_KEY": generate_key(),
}


def test_settings_have_runpods_address_as_default() -> None:
    settings = ClientSettings.from_environ(GOOD)
    assert settings.api_base == "https://api.runpod.ai/v2"
    assert "rpa_secret" not in repr(settings)
    assert GOOD["ENCRYPTION_KEY"] not in repr(settings)


def test_all_faults_are_told_at_once_and_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(GOOD["ENCRYPTION_KEY"])
    file.chmod(0o644)
    bad = {
        "RUNPOD_ENDPOINT_ID": "a/b",
        "RUNPOD_API_KEY": "sécret",
        "ENCRYPTION_KEY_FILE": str(file),
        "RUNPOD_API_BASE": "http://api.runpod.ai/v2",
        "CLIENT_TIMEOUT_S": "soon",
        "CLIENT_WAIT_S": "-1",
        "CLIENT_TTL_S": "0.5",
    }
    with pytest.raises(ConfigError) as raised:
        ClientSettings.from_environ(bad)
    faults = raised.value.faults
    assert len(faults) == len(bad)
    for name, fault in zip(bad, sorted(faults, key=_place(bad)), strict=True):
        assert fault.startswith(name)
    assert "chmod 600" in str(raised.value)
    assert "sécret" not in str(raised.value) and GOOD["ENCRYPTION_KEY"] not in str(raised.value)


def _place(names: dict[str, str]) -> Callable[[str], int]:
    order = list(names)
    return lambda fault: next(n for n, name in enumerate(order) if fault.startswith(name))


@pytest.mark.parametrize(
    ("base", "good"),
    [
        ("https://example.org/v2/", True),
        ("http://127.0.0.1:8000/v2", True),
        ("http://[::1]:8000", True),
        ("http://platform:8000", True),
        ("http://10.1.2.3", True),
        ("http://example.org", False),
        ("http://8.8.8.8", False),
        ("ftp://example.org", False),
        ("https://user:secret@example.org", False),
        ("https://example.org/?key=1", False),
        ("https://[", False),
        ("example.org", False),
    ],
)
def test_addresses(base: str, good: bool) -> None:
    environ = {**GOOD, "RUNPOD_API_BASE": base}
    if good:
        assert ClientSettings.from_environ(environ).api_base == base.rstrip("/")
    else:
        with pytest.raises(ConfigError, match="RUNPOD_API_BASE"):
            ClientSettings.from_environ(environ)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o604, 0o660, 0o644])
def test_key_files_are_their_owners_alone(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(GOOD["ENCRYPTION_KEY"] + "\n")
    file.chmod(mode)
    environ = {**GOOD, "ENCRYPTION_KEY_FILE": str(file)}
    del environ["ENCRYPTION_KEY"]
    if mode & 0o077:
        with pytest.raises(ConfigError, match=f"chmod 600 {file}"):
            ClientSettings.from_environ(environ)
    else:
        settings = ClientSettings.from_environ(environ)
        assert settings.encryption_key == GOOD["ENCRYPTION_KEY"]


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe", b"x" * 100_000, None])
def test_key_files_that_cannot_be(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
        file.chmod(0o600)
    environ = {**GOOD, "RUNPOD_API_KEY_FILE": str(file)}
    del environ["RUNPOD_API_KEY"]
    with pytest.raises(ConfigError, match="RUNPOD_API_KEY_FILE"):
        ClientSettings.from_environ(environ)


def test_a_key_and_a_file_of_it_contradict(tmp_path: Path) -> None:
    environ = {**GOOD, "ENCRYPTION_KEY_FILE": str(tmp_path)}
    with pytest.raises(ConfigError, match="both"):
        ClientSettings.from_environ(environ)


def test_what_is_given_takes_the_place_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "key"
    file.write_text("from-the-file")
    file.chmod(0o600)
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    assert load({"RUNPOD_API_KEY_FILE": str(file)}).api_key == "from-the-file"
    monkeypatch.delenv("RUNPOD_API_KEY")
    monkeypatch.setenv("RUNPOD_API_KEY_FILE", str(file))
    assert load({"RUNPOD_API_KEY": "given"}).api_key == "given"
    with Client(endpoint_id="other") as client:
        assert client.endpoint.id == "other"


def test_answers_that_are_not_what_was_asked_for(echo: Echo) -> None:
    with Client(echo.settings) as client, pytest.raises(AnswerError, match="kind"):
        client.request("generate", {"prompt": "x"}, stream=False)
