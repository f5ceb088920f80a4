"""A worker that exchanges its model: real engines one after the other in one process.

One worker with two models that work and two that do not; each test goes on where the one
before has left it, the last one ends it.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from errors import EngineDead
from frames import FrameDecoder, Note
from local_runpod import LocalRunpod
from tests.wait import until
from tests.workers import MODEL, ROOT, Answered, Caller, RunningWorker, tokens

pytestmark = pytest.mark.engine

CHAT = "/v1/chat/completions"
LLAMA, TALKER = "llama", "tiny-talker"
SWAP_S = 300
REFUSED = "model_not_loadable"


def broken(folder: Path) -> Path:
    """Make a model whose context is shorter than what the worker is set to."""
    shutil.copytree(MODEL, folder)
    config = folder / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 256})
    )
    return folder


@pytest.fixture(scope="module")
def first_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path_factory.mktemp("models") / "tiny-llama"))


@pytest.fixture(scope="module")
def worker(
    platform: LocalRunpod, first_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningWorker]:
    folder = tmp_path_factory.mktemp("worker")
    models = (
        first_model,
        MODEL.with_name("tiny-talker"),
        broken(folder / "broken-1"),
        broken(folder / "broken-2"),
    )
    with RunningWorker(
        platform,
        folder,
        MODELS=",".join(map(str, models)),
        SERVED_MODEL_NAME=LLAMA,
        MODEL_SWAP="true",
        DTYPE="float32",
    ) as worker:
        yield worker.ready()


def to(model: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"model": model, **body}


def chat(model: str, stream: bool) -> dict[str, Any]:
    """The body of the chat route that asks what `tokens(24)` asks of `generate`."""
    given = tokens(24)
    asked = {"model": model, "stream": stream, "messages": given["messages"]}
    return {**asked, **given["sampling_params"]}


def patiently(caller: Caller, body: dict[str, Any]) -> Answered:
    """Ask what may need a swap."""
    return caller.read(caller.send("generate", body), SWAP_S)


def notes(answered: Answered) -> list[str]:
    """What was said of the wait, once each."""
    answer = answered.opened[-1].salt
    words = [
        event.text
        for chunk in answered.opened
        if chunk.salt != answer
        for event in FrameDecoder().feed(chunk.payload)
        if isinstance(event, Note)
    ]
    return list(dict.fromkeys(words))


def said(answered: Answered) -> str:
    """The text of an answer of either route."""
    assert answered.end.error is None, answered.end
    if answered.head.kind == "generate":
        return answered.text
    if answered.head.kind == "body":
        return str(answered.json()["choices"][0]["message"]["content"])
    deltas = [choice["delta"] for event in answered.sse() for choice in event["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def ask_by_command(caller: Caller, worker: RunningWorker, model: str) -> subprocess.Popen[str]:
    """Start `client.py` with what `tokens(24)` asks; it says on stderr how the wait goes."""
    options = [
        word if isinstance(word, str) else json.dumps(word)
        for name, value in tokens(24)["sampling_params"].items()
        for word in ("-o", name, value)
    ]
    return subprocess.Popen(
        [sys.executable, ROOT / "client.py", "ask", "Speak.", "-v", "--model", model, *options],
        env={
            **os.environ,
            "RUNPOD_API_BASE": caller.platform.base_url,
            "RUNPOD_ENDPOINT_ID": caller.platform.endpoint_id,
            "RUNPOD_API_KEY": caller.platform.api_key,
            "ENCRYPTION_KEY": worker.key,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def loaded(caller: Caller) -> list[str]:
    models: list[str] = caller.ask("worker", None).json()["models"]
    return models


def engine_processes(worker: RunningWorker) -> dict[int, str]:
    """The processes of vLLM's by their ids."""
    found = {}
    for process in worker.processes():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if "VLLM::" in line:
                found[process.pid] = line.strip()
    return found


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """What each model answers to `tokens(24)`, as the first test has seen it."""
    return {}


def test_a_call_for_another_model_exchanges_the_engine(
    caller: Caller, worker: RunningWorker, texts: dict[str, str]
) -> None:
    about = caller.ask("worker", None).json()
    assert about["models"] == [LLAMA]
    assert about["swappable"] == [TALKER, "broken-1", "broken-2"]
    texts[LLAMA] = said(caller.ask("generate", tokens(24)))
    before, shared = engine_processes(worker), worker.shared_memory()
    assert before and shared

    told = caller.send("generate", to(TALKER, tokens(24)))
    command = ask_by_command(caller, worker, TALKER)

    answered = caller.read(told, SWAP_S)

    texts[TALKER] = said(answered)
    assert texts[TALKER] != texts[LLAMA]
    assert f"loading model {TALKER}" in notes(answered)
    assert {len(chunk) for chunk in answered.chunks} == {1489}
    out, err = command.communicate(timeout=SWAP_S)
    assert (command.returncode, out.rstrip("\n")) == (0, texts[TALKER].rstrip("\n")), err
    assert f"running: loading model {TALKER}" in err.splitlines()
    timings = answered.end.timings
    assert 500 < timings["queue_ms"] <= timings["first_token_ms"] <= timings["total_ms"]
    after = engine_processes(worker)
    assert sorted(after.values()) == sorted(before.values())
    assert not after.keys() & before.keys()
    assert not any(Path(path).exists() for path in shared)
    listed = caller.ask("/v1/models", None).json()["data"]
    assert [(entry["id"], entry["loaded"]) for entry in listed] == [
        (TALKER, True),
        (LLAMA, False),
        ("broken-1", False),
        ("broken-2", False),
    ]


def test_calls_of_both_models_are_answered_by_theirs(
    caller: Caller, worker: RunningWorker, texts: dict[str, str]
) -> None:
    memory = psutil.Process(worker.process.pid).memory_info().rss
    running = caller.send("generate", to(TALKER, tokens(600)))
    caller.first_chunk(running)
    sent = [
        (model, caller.send(route, body))
        for model in (LLAMA, TALKER, LLAMA, TALKER)
        for route, body in (
            ("generate", to(model, tokens(24))),
            (CHAT, chat(model, True)),
            (CHAT, chat(model, False)),
        )
    ]

    long = caller.read(running, SWAP_S)

    usage = long.end.usage
    assert usage and usage["completion_tokens"] == 600
    assert long.complete
    assert long.text.startswith(texts[TALKER])
    for model, job in sent:
        answered = caller.read(job, SWAP_S)
        assert said(answered) == texts[model], model
    # Asked for the first model again: it is the one that a call means that names none.
    assert said(patiently(caller, tokens(24))) == texts[LLAMA]
    grown = psutil.Process(worker.process.pid).memory_info().rss - memory
    assert grown < 100e6, f"{grown / 1e6:.0f} MB more"


def test_who_is_cancelled_while_it_waits_exchanges_nothing(
    caller: Caller, worker: RunningWorker
) -> None:
    (model,) = loaded(caller)
    other = TALKER if model == LLAMA else LLAMA
    swaps = worker.log.count(" is loaded, after ")
    running = caller.send("generate", to(model, tokens(1200)))
    caller.first_chunk(running)
    waiting = caller.send("generate", to(other, tokens(24)))
    caller.first_chunk(waiting)  # a note
    caller.cancel(waiting.job_id)
    assert worker.job_line(waiting.job_id)["outcome"] == "cancelled"
    assert caller.read(running).end.error is None
    assert loaded(caller) == [model]
    assert worker.log.count(" is loaded, after ") == swaps


def test_a_model_that_does_not_start_gives_way_to_the_one_before(
    caller: Caller, worker: RunningWorker, texts: dict[str, str]
) -> None:
    (model,) = loaded(caller)
    wrong = [caller.send("generate", to("broken-1", tokens(24))) for _ in range(2)]
    caller.first_chunk(wrong[0])
    right = caller.send("generate", to(model, tokens(24)))
    for job in wrong:
        fault = caller.read(job, SWAP_S).fault
        assert (fault["code"], fault["status"]) == (REFUSED, 503)
        assert "broken-1" in fault["message"]
        assert "max_model_len" in fault["message"]
    assert said(caller.read(right, SWAP_S)) == texts[model]
    # The one before may still be on its way back.
    assert said(patiently(caller, to(model, tokens(24)))) == texts[model]
    # What has failed is not tried again.
    assert caller.ask("generate", to("broken-1", tokens(24))).fault["code"] == REFUSED
    assert "broken-1" not in str(caller.ask("worker", None).json()["swappable"])
    unknown = caller.ask(CHAT, chat("nope", False)).fault
    assert unknown["status"] == 404
    assert model in unknown["message"] and "broken-2" in unknown["message"]


def test_a_worker_that_is_left_without_a_model_ends(
    caller: Caller, worker: RunningWorker, first_model: Path, texts: dict[str, str]
) -> None:
    assert loaded(caller) == [LLAMA]
    shutil.rmtree(first_model)
    lost = caller.send("generate", to("broken-2", tokens(24)))
    assert worker.process.wait(SWAP_S) == 1
    assert caller.read(lost).fault["code"] in (REFUSED, EngineDead().code)
    until(lambda: not worker.processes(), 10, "all its processes are gone")
