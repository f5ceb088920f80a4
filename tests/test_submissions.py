"""Jobs that outlive a connection: submitted by one process, collected by another."""

import asyncio
import contextlib
import functools
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client import Answer, AsyncClient, Client, Progress, Response, SubmittedJob
from errors import (
    EndpointNotFound,
    JobCancelled,
    JobFailed,
    NotOver,
    PlatformFault,
    RecordError,
    Rejected,
    RequestError,
    SealedError,
    TamperedChunk,
    TruncatedAnswer,
    Unconfirmed,
    Unreachable,
    WrongApiKey,
)
from keys import generate_key
from local_runpod_queue import Status
from tests.cli import Done, run, run_apart, start
from tests.echo import Echo
from tests.wait import until

PROMPT = "one two three four five"
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Echo]:
    with Echo(tmp_path_factory.mktemp("echo")) as running:
        yield running


@pytest.fixture
def echo(running: Echo) -> Echo:
    """The platform, with no record of an earlier test."""
    for path in kept(running):
        path.unlink()
    return running


@pytest.fixture
def client(echo: Echo) -> Iterator[Client]:
    with Client(echo.settings) as client:
        yield client


def kept(echo: Echo) -> list[Path]:
    return sorted(echo.state.iterdir()) if echo.state.exists() else []


def count_jobs(echo: Echo, wanted: int) -> bool:
    return len(echo.platform.jobs) == wanted


def without_keys(echo: Echo) -> dict[str, str]:
    return {name: value for name, value in echo.environ.items() if name != "ENCRYPTION_KEY"}


def submit(echo: Echo, *args: str) -> str:
    done = run(echo.environ, "submit", *args)
    assert (done.code, done.err) == (0, "")
    return done.out.removesuffix("\n")


# -- the command -----------------------------------------------------------------------------------


def test_one_process_submits_and_another_collects(echo: Echo) -> None:
    submitted = run_apart(echo.environ, "submit", "why is the sky blue?")
    assert (submitted.code, submitted.err) == (0, "")
    job_id = submitted.out.strip()
    assert job_id == echo.last_job().id
    assert [path.name for path in kept(echo)] == [f"{job_id}.job"]
    collected = run_apart(without_keys(echo), "result", job_id)
    assert collected == Done(0, "why is the sky blue?\n", "")
    assert kept(echo) == []


def test_the_state_folder_holds_no_prompt_no_answer_and_no_key(echo: Echo) -> None:
    job_id = submit(echo, "-s", "Xylophone", "-o", "stop", '["Quagmire"]', "Zeppelin Vortex")
    echo.until_completed(job_id)
    assert run(echo.environ, "result", "--keep", job_id).out == "Xylophone / Zeppelin Vortex\n"
    (path,) = kept(echo)
    content = path.read_text() + path.name
    for secret in ("Xylophone", "Quagmire", "Zeppelin", "Vortex"):
        assert secret.lower() not in content.lower()
    assert echo.key not in content and echo.platform.api_key not in content
    assert json.loads(path.read_text()).keys() == {
        "endpoint_id",
        "key_id",
        "request_id",
        "response_secret",
        "route",
        "issued_at",
        "expires_at",
    }
    assert path.stat().st_mode & 0o777 == 0o600 and echo.state.stat().st_mode & 0o777 == 0o700


def test_result_prints_as_ask_does(echo: Echo) -> None:
    job_id = submit(echo, "-o", "n", "2", "-o", "behaviour", "everything", "x")
    text = run(echo.environ, "result", "--keep", "-u", job_id)
    asked = run(echo.environ, "-u", "-o", "n", "2", "-o", "behaviour", "everything", "x")
    assert text.out == asked.out
    assert text.err == asked.err.replace(echo.last_job().id, job_id)
    whole = json.loads(run(echo.environ, "result", "--json", job_id).out)
    assert (whole["text"], whole["job_id"]) == ("x", job_id)
    assert [choice["text"] for choice in whole["choices"]] == ["x", "x"]


def test_a_prompt_comes_from_a_pipe_too(echo: Echo) -> None:
    done = run(echo.environ, "submit", "about this:", stdin="from a pipe\n")
    result = run(echo.environ, "result", done.out.strip())
    assert result.out == "about this:\n\nfrom a pipe\n"


@pytest.mark.parametrize("stream", [False, True])
def test_a_route_is_submitted_too(echo: Echo, stream: bool) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "a b"}], "stream": stream})
    job_id = submit(echo, "--route", CHAT, "--body", body)
    asked = run(echo.environ, "request", CHAT, "--body", body)
    assert run(echo.environ, "result", "--keep", job_id) == asked
    whole = json.loads(run(echo.environ, "result", "--json", job_id).out)
    assert whole["status"] == 200
    assert whole["body"].strip() == asked.out.strip()


def test_a_route_s_error_is_told_and_is_the_answer(echo: Echo) -> None:
    job_id = submit(echo, "--route", "/v1/nowhere")
    done = run(echo.environ, "result", job_id)
    assert (done.code, done.out) == (4, "")
    assert done.err == "error: no such route\n"
    assert kept(echo) == []


@pytest.mark.parametrize(
    "args",
    [
        ["--route", CHAT, "and a prompt"],
        ["--route", CHAT, "-o", "n", "2"],
        ["--body", "{}", "prompt"],
        ["--wait", "5", "prompt"],
        ["--timeout", "5", "prompt"],
        ["--no-stream", "prompt"],
        [],
    ],
)
def test_what_makes_no_sense_is_refused(echo: Echo, args: list[str]) -> None:
    before = len(echo.platform.jobs)
    assert run(echo.environ, "submit", *args).code == 2
    assert len(echo.platform.jobs) == before and kept(echo) == []


def test_a_second_collection_says_what_became_of_it(echo: Echo) -> None:
    job_id = submit(echo, "once")
    assert run(echo.environ, "result", "--keep", job_id).out == "once\n"
    assert run(echo.environ, "result", job_id).out == "once\n"
    again = run(echo.environ, "result", job_id)
    assert (again.code, again.out) == (20, "")
    assert f"no record of job {job_id} in {echo.state}: its answer was collected" in again.err


def test_an_answer_that_was_not_shown_is_kept(echo: Echo) -> None:
    job_id = submit(echo, "x" * 200_000)
    echo.until_completed(job_id)
    process = start(echo.environ, "result", job_id)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.wait(20) == 141
    process.stderr.close()
    assert [path.name for path in kept(echo)] == [f"{job_id}.job"]


def test_before_it_is_over(tmp_path: Path) -> None:
    with Echo(tmp_path, workers=0) as echo:
        job_id = submit(echo, PROMPT)
        early = run(echo.environ, "result", "--no-wait", job_id)
        assert (early.code, early.out) == (21, "")
        assert early.err == (
            f"error: job {job_id} is still in the queue; it goes on, ask for its result later\n"
        )
        started_s = time.monotonic()
        assert run(echo.environ, "result", "--timeout", "0.5", job_id).code == 21
        assert 0.5 <= time.monotonic() - started_s < 5

        waiting = start(echo.environ, "result", "-v", job_id)
        assert waiting.stderr and waiting.stderr.readline().startswith("queued ")
        waiting.send_signal(signal.SIGINT)
        out, err = waiting.communicate(timeout=20)
        assert (waiting.returncode, out) == (130, "")
        assert err.endswith(f"interrupted; the job goes on, `result {job_id}` asks again\n")
        assert echo.job(job_id).status is Status.IN_QUEUE

        waiting = start(echo.environ, "result", job_id)
        echo.start("pod-1")
        assert waiting.communicate(timeout=60) == (PROMPT + "\n", "")
        assert waiting.returncode == 0


def test_while_the_worker_is_busy_with_it(echo: Echo) -> None:
    job_id = submit(echo, "-o", "behaviour", "hang", PROMPT)
    echo.until_hanging(job_id)
    # What it has said so far stays for whoever comes at the end: nothing of it is consumed.
    with echo.watch("stream") as reads:
        early = run(echo.environ, "result", "--no-wait", job_id)
    assert early.code == 21 and f"job {job_id} is running" in early.err
    assert reads.seen == 0
    assert echo.job(job_id).status is Status.IN_PROGRESS
    assert run(echo.environ, "cancel", job_id).code == 0
    cancelled = run(echo.environ, "result", job_id)
    assert cancelled.code == 130 and "was cancelled on the platform" in cancelled.err
    assert len(kept(echo)) == 1


def test_an_interrupted_wait_takes_nothing_from_the_next(echo: Echo) -> None:
    words = " ".join(str(n) for n in range(40))
    job_id = submit(echo, "-o", "pause_s", "0.1", words)
    waiting = start(echo.environ, "result", "-v", job_id)
    assert waiting.stderr
    until(lambda: echo.job(job_id).chunks_received > 5, 20)
    while waiting.stderr.readline() != "running\n":
        pass
    waiting.send_signal(signal.SIGTERM)
    waiting.communicate(timeout=20)
    assert waiting.returncode == 130
    assert run(echo.environ, "result", job_id).out == words + "\n"


def test_status_shows_what_is_recorded_and_what_the_platform_says(echo: Echo) -> None:
    environ = without_keys(echo)
    job_id = submit(echo, "x")
    echo.until_completed(job_id)
    (path,) = kept(echo)
    secret = json.loads(path.read_text())["response_secret"]
    done = run(environ, "status", job_id)
    told = json.loads(done.out)
    assert told["status"] == "COMPLETED"
    assert told["record"]["id"] == job_id and told["record"]["endpoint_id"] == "local"
    assert told["record"]["gone_at"] - told["record"]["issued_at"] == 24 * 3600 + 1800
    assert secret not in done.out
    with echo.fault("status", status=404):
        gone = run(environ, "status", job_id)
    assert gone.code == 13 and "no such job" in gone.err
    assert json.loads(gone.out)["record"] == told["record"]
    path.write_text("{")
    damaged = run(environ, "status", job_id)
    assert json.loads(damaged.out)["status"] == "COMPLETED" and "is damaged" in damaged.err


def test_jobs_lists_what_was_not_collected(echo: Echo) -> None:
    environ = {"CLIENT_STATE_DIR": str(echo.state)}
    assert run(environ, "jobs") == Done(0, "", f"no submitted job waits in {echo.state}\n")
    assert run(environ, "jobs", "--json").out == "[]\n"
    first, second = submit(echo, "x"), submit(echo, "--route", "/v1/models")
    done = run(environ, "jobs")
    assert done.code == 0 and len(done.out.splitlines()) == 2
    for job_id in (first, second):
        (line,) = (line for line in done.out.splitlines() if line.startswith(job_id))
        assert line.startswith(f"{job_id}  {echo.platform.endpoint_id}  20")
        assert line.endswith(str(echo.state / f"{job_id}.job"))
    rows = json.loads(run(environ, "jobs", "--json").out)
    assert {row["id"]: row["route"] for row in rows} == {first: "generate", second: "/v1/models"}
    assert not any("response_secret" in row for row in rows)
    run(echo.environ, "result", first)
    (echo.state / f"{second}.job").chmod(0o644)
    faulty = run(environ, "jobs")
    assert (faulty.code, faulty.out) == (20, "")
    assert f"run: chmod 600 {echo.state}/{second}.job" in faulty.err


def test_records_that_cannot_be_used(echo: Echo) -> None:
    job_id = submit(echo, "x")
    (path,) = kept(echo)
    elsewhere = run(echo.environ, "result", "--endpoint", "elsewhere", job_id)
    assert elsewhere.code == 20
    assert "submitted to endpoint local, and the settings name elsewhere" in elsewhere.err
    path.chmod(0o604)
    assert f"run: chmod 600 {path}" in run(echo.environ, "result", job_id).err
    path.chmod(0o600)
    path.write_text(path.read_text()[:-9])
    damaged = run(echo.environ, "result", job_id)
    assert damaged.code == 20 and f"the record {path} is damaged" in damaged.err
    assert path.exists()


# -- broken off ------------------------------------------------------------------------------------


def test_a_crash_before_the_id_is_known_loses_no_answer(echo: Echo) -> None:
    submit(echo, "another one")
    with echo.fault("run", when="after", delay_s=5.0):
        before = len(echo.platform.jobs)
        for number, word in enumerate(("first", "second"), 1):
            process = start(echo.environ, "submit", word)
            until(functools.partial(count_jobs, echo, before + number), 20)
            process.kill()
            process.communicate(timeout=20)
    first, second = list(echo.platform.jobs)[-2:]
    assert [path.suffix for path in kept(echo)].count(".request") == 2
    assert run(echo.environ, "jobs").out.count("(no id)") == 2
    # The ids stand in the platform's console. Which record is whose, the answers tell.
    assert run(echo.environ, "result", "--keep", second).out == "second\n"
    assert (echo.state / f"{second}.job").exists()
    assert run(echo.environ, "result", first).out == "first\n"
    assert run(echo.environ, "result", second).out == "second\n"
    assert len(kept(echo)) == 1


def test_an_interrupt_while_it_is_submitted_cancels_it_and_leaves_no_record(echo: Echo) -> None:
    with echo.fault("run", when="after", delay_s=1.0):
        seen = len(echo.platform.jobs)
        process = start(echo.environ, "submit", "-o", "behaviour", "hang", PROMPT)
        until(lambda: len(echo.platform.jobs) > seen, 20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    echo.until_cancelled(echo.last_job().id, worker_too=False)
    assert kept(echo) == []


@pytest.mark.parametrize(
    ("what", "error"), [({"status": 502}, PlatformFault), ({"reset": True}, Unconfirmed)]
)
def test_what_the_platform_may_have_taken_keeps_its_record(
    echo: Echo, client: Client, what: dict[str, Any], error: type[SealedError]
) -> None:
    with echo.fault("run", when="after", **what), pytest.raises(error):
        client.submit("x")
    answer = client.result(echo.last_job().id)
    assert isinstance(answer, Answer) and answer.text == "x"
    with echo.fault("run", when="after", **what):
        done = run(echo.environ, "submit", "x")
    assert done.code == error.exit_code and "`result` with its id opens its answer" in done.err


def test_what_the_platform_refused_leaves_no_record(echo: Echo) -> None:
    for settings, error in (
        (replace(echo.settings, api_key="wrong"), WrongApiKey),
        (replace(echo.settings, endpoint_id="elsewhere"), EndpointNotFound),
        (replace(echo.settings, api_base="http://127.0.0.1:9"), Unreachable),
    ):
        with Client(settings) as client, pytest.raises(error):
            client.submit("x")
        assert kept(echo) == []


def test_nothing_is_sent_without_a_record(echo: Echo) -> None:
    before = len(echo.platform.jobs)
    environ = {**echo.environ, "CLIENT_STATE_DIR": "/proc/nowhere"}
    done = run(environ, "submit", "x")
    assert done.code == 20 and "no record can be kept in /proc/nowhere" in done.err
    assert len(echo.platform.jobs) == before


# -- the library -----------------------------------------------------------------------------------


def looped(echo: Echo, call: Callable[[AsyncClient], Any]) -> Any:
    async def main() -> Any:
        async with AsyncClient(echo.settings) as client:
            return await call(client)

    return asyncio.run(main())


def test_a_script_does_the_same(echo: Echo, client: Client) -> None:
    job = client.submit([{"role": "user", "content": PROMPT}], system="brief", temperature=0)
    answer = looped(echo, lambda client: client.result(job))
    assert answer.text == f"brief / {PROMPT}"
    assert (answer.job_id, answer.request_id) == (job.id, job.request_id)
    body = {"messages": [{"role": "user", "content": "a"}]}
    job = looped(echo, lambda client: client.submit_request(CHAT, body))
    response = client.result(job.id)
    assert isinstance(response, Response) and response.json() == {"echo": "a"}
    assert len(kept(echo)) == 2
    client.records.discard(job)
    assert len(kept(echo)) == 1


def test_without_a_record_the_job_itself_is_enough(echo: Echo, client: Client) -> None:
    job = looped(echo, lambda client: client.submit(PROMPT, record=False))
    assert isinstance(job, SubmittedJob) and kept(echo) == []
    answer = client.result(job)
    assert isinstance(answer, Answer) and answer.text == PROMPT
    with pytest.raises(RecordError, match="no record"):
        client.result(job.id)


def test_errors_of_a_submitted_job(echo: Echo, client: Client) -> None:
    job = client.submit("x", behaviour="too long")
    with pytest.raises(RequestError, match="longer than the context"):
        client.result(job)
    job = client.submit_request("/v1/nowhere")
    with pytest.raises(RequestError, match="no such route"):
        client.result(job)
    response = client.result(job, check=False)
    assert isinstance(response, Response) and response.status == 404
    for behaviour, error in (
        ("fail", JobFailed),
        ("no end", TruncatedAnswer),
        ("plaintext", TamperedChunk),
    ):
        with pytest.raises(error):
            client.result(client.submit("a b c d", behaviour=behaviour))
    with Client(replace(echo.settings, encryption_key=generate_key())) as other:
        job = other.submit("x")
    with pytest.raises(Rejected, match=job.key_id):
        client.result(job)
    job = client.submit("x", behaviour="hang")
    client.cancel(job.id)
    with pytest.raises(JobCancelled):
        client.result(job)


def test_the_answer_of_another_job_does_not_open(echo: Echo, client: Client) -> None:
    mine, theirs = client.submit("mine", record=False), client.submit("theirs", record=False)
    with pytest.raises(TamperedChunk):
        client.result(replace(mine, id=theirs.id))
    for name in ("request_id", "response_secret", "key_id"):
        other: dict[str, Any] = {name: "0" * len(getattr(mine, name))}
        with pytest.raises(SealedError):
            client.result(replace(mine, **other))


def test_an_output_that_the_platform_lost_is_read_from_the_stream(
    echo: Echo, client: Client
) -> None:
    job = client.submit(PROMPT)
    echo.until_completed(job.id)

    def without_output(body: bytes) -> bytes:
        return json.dumps({**json.loads(body), "output": None}).encode()

    with echo.fault("status", tamper=without_output):
        answer = client.result(job)
    assert isinstance(answer, Answer) and answer.text == PROMPT


def test_progress_counts_from_the_submission(tmp_path: Path) -> None:
    with Echo(tmp_path, workers=0) as echo, Client(echo.settings) as client:
        job = replace(client.submit("x"), issued_at=int(time.time()) - 100)
        told: list[Progress] = []
        with pytest.raises(NotOver):
            client.result(job, timeout_s=0.3, on_progress=told.append)
    assert told[0].state == "queued" and told[0].job_id == job.id
    assert 100 <= told[0].waited_s < 120
    assert told[0].workers is not None


def test_how_long_a_submitted_request_is_valid(echo: Echo, client: Client) -> None:
    day = client.submit("x")
    assert day.expires_at - day.issued_at == 24 * 3600
    assert echo.job(day.id).ttl_s == 24 * 3600
    hour = client.submit("x", ttl_s=3600)
    assert hour.expires_at - hour.issued_at == 3600 == echo.job(hour.id).ttl_s
    with Client(replace(echo.settings, ttl_s=60)) as other:
        assert echo.job(other.submit("x").id).ttl_s == 60


def test_a_submitted_job_has_an_id_whatever_the_transport(echo: Echo) -> None:
    with Client(replace(echo.settings, transport="openai")) as client:
        job = client.submit(PROMPT)
        answer = client.result(job)
    assert job.id == echo.last_job().id
    assert isinstance(answer, Answer) and answer.text == PROMPT


@pytest.mark.parametrize("name", ["timeout_s", "wait_s", "on_progress"])
def test_options_about_waiting_are_refused(client: Client, name: str) -> None:
    given: dict[str, Any] = {name: 1}
    with pytest.raises(TypeError, match=f"nobody waits for a submitted job: {name}"):
        client.submit("x", **given)


def test_a_cancelled_wait_cancels_nothing(echo: Echo, client: Client) -> None:
    job = client.submit(PROMPT, behaviour="hang")
    echo.until_hanging(job.id)

    async def give_up(client: AsyncClient) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(client.result(job), 0.3)

    looped(echo, give_up)
    assert echo.job(job.id).status is Status.IN_PROGRESS
    client.cancel(job.id)
    echo.until_cancelled(job.id)
