"""Nothing of a prompt or an answer leaves the worker in the clear: searched for, everywhere.

Unique words go in by every door, and every byte that came out is searched for them. The
same search over the same worker's plaintext jobs finds them, so it can fail.
"""

import asyncio
import base64
import json
import logging
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import log_guard
import rp_handler
from config import Settings
from crypto import AnswerOpener, new_request, seal_request
from frames import AnswerEvent, End, FrameDecoder, Head, Text
from keys import KeyRing, generate_key
from local_runpod import LocalRunpod
from tests.wait import until
from tests.workers import ROOT, SERVED, Caller, RunningWorker

CHAT = "/v1/chat/completions"


def spellings(word: str) -> list[bytes]:
    """Return how a word may stand in bytes: as it is, in JSON, in base64 at any offset, in hex."""
    plain = word.encode()
    found = [plain, json.dumps(word)[1:-1].encode(), plain.hex().encode()]
    found += [plain.hex().upper().encode(), repr(plain)[2:-1].encode()]
    for offset in range(3):
        shifted = bytes(offset) + plain
        text = base64.b64encode(shifted)[-(-offset * 4 // 3) : len(shifted) * 8 // 6]
        found += [text, text.translate(bytes.maketrans(b"+/", b"-_"))]
    return found


def leaks(words: Iterable[str], sources: dict[str, bytes]) -> set[tuple[str, str]]:
    """Return which word stands in which source, in any spelling."""
    return {
        (word, name)
        for word in words
        for spelling in spellings(word)
        for name, content in sources.items()
        if spelling in content
    }


def test_the_search_finds_every_spelling() -> None:
    word = "zß" + secrets.token_hex(8)
    for before in ("", "a", "ab", "abc"):
        text = f"{before}{word} and more"
        for content in (
            text.encode(),
            json.dumps({"a": text}).encode(),
            base64.b64encode(text.encode()),
            base64.urlsafe_b64encode(text.encode()),
            text.encode().hex().encode(),
        ):
            assert leaks([word], {"x": content}), content
    assert not leaks([word], {"x": word[1:].encode()})


class Words:
    """Words that occur nowhere else, by what they were used for."""

    def __init__(self) -> None:
        self.used: dict[str, str] = {}

    def __call__(self, purpose: str) -> str:
        return self.used.setdefault(purpose, f"{purpose[:4]}ö{secrets.token_hex(10)}")


def requests(word: Words, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield routes and bodies that carry a word wherever one fits; most are valid, some not."""
    say = {"structured_outputs": {"choice": [word(f"{kind} answer")]}}
    messages = [
        {"role": "system", "content": word(f"{kind} system")},
        {"role": "user", "content": word(f"{kind} prompt")},
    ]
    short = {"max_tokens": 4}
    tool = {
        "type": "function",
        "function": {
            "name": "f" + word(f"{kind} tool").replace("ö", "_"),
            "description": word(f"{kind} description"),
            "parameters": {
                "type": "object",
                "properties": {word(f"{kind} argument"): {"type": "string"}},
            },
        },
    }
    schema = {
        "type": "object",
        "properties": {word(f"{kind} property"): {"enum": [word(f"{kind} enum")]}},
        "required": [word(f"{kind} property")],
        "additionalProperties": False,
    }
    yield "generate", {"messages": messages, "sampling_params": say}
    yield "generate", {"messages": messages, "sampling_params": say, "stream": False}
    yield "generate", {"prompt": word(f"{kind} raw"), "sampling_params": {**short, "logprobs": 3}}
    yield (
        "generate",
        {
            "messages": messages,
            "sampling_params": {
                **short,
                "stop": [word(f"{kind} stop")],
                "bad_words": [word(f"{kind} bad")],
            },
        },
    )
    json_schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    bounded = {"sampling_params": {"max_tokens": 60}}
    yield "generate", {"messages": messages, "response_format": json_schema, **bounded}
    yield (
        "generate",
        {"messages": messages, "tools": [tool], "tool_choice": "none"} | {"sampling_params": short},
    )
    chat = {"model": SERVED, "messages": messages, **short}
    yield CHAT, {**chat, "tools": [tool], "tool_choice": "required"}
    yield CHAT, {**chat, "tools": [tool], "tool_choice": tool, "stream": True}
    yield CHAT, {**chat, "response_format": json_schema, "stream": True}
    yield CHAT, {**chat, "user": word(f"{kind} user"), "stop": [word(f"{kind} chat stop")]}
    yield "/v1/completions", {"model": SERVED, "prompt": word(f"{kind} completion"), **short}
    yield "/v1/responses", {"model": SERVED, "input": word(f"{kind} input"), "max_output_tokens": 4}
    yield "/tokenize", {"model": SERVED, "prompt": word(f"{kind} tokenize")}
    # Refused, at every depth, by messages that quote what they refuse.
    wrong = word(f"{kind} wrong")
    role = {"messages": [{"role": wrong, "content": wrong, wrong: wrong}]}
    yield "generate", {**role, "sampling_params": short}
    yield "generate", {"prompt": "x", wrong: wrong}
    yield "generate", {"prompt": "x", "model": wrong}
    yield "generate", {"prompt": "x", "sampling_params": {wrong: wrong}}
    yield "generate", {"prompt": "x", "sampling_params": {"temperature": wrong}}
    for structured in (
        {"regex": f"({wrong}"},
        {"grammar": wrong},
        {"json": {"type": wrong, "$ref": f"#/{wrong}"}},
        {"json": wrong},
        {"choice": [5, {wrong: wrong}]},
        {wrong: wrong},
    ):
        asked = {"structured_outputs": structured, **short}
        yield "generate", {"prompt": "x", "sampling_params": asked}
    yield "generate", {"prompt": "x", "response_format": {"type": wrong}}
    yield "generate", {"prompt": f"{wrong} " * 1500}
    yield "generate", {"messages": [{"role": "user", "content": [{"type": wrong, wrong: wrong}]}]}
    template = {"chat_template_kwargs": {"chat_template": wrong}, "sampling_params": short}
    yield "generate", {"messages": messages, **template}
    yield CHAT, {**chat, "model": wrong}
    yield CHAT, {**chat, "temperature": wrong}
    yield CHAT, {**chat, "messages": [{"role": "user", "content": {wrong: wrong}}]}
    yield CHAT, {**chat, "tool_choice": wrong}
    yield "/v1/responses", {"model": SERVED, "input": [{"type": wrong}]}
    yield f"/v1/{word(f'{kind} route')}", {"prompt": "x"}


class House:
    """One platform and one worker, all of whose traces are kept."""

    def __init__(self, platform: LocalRunpod, worker: RunningWorker) -> None:
        self.platform = platform
        self.worker = worker
        self.word = Words()
        self.process_traces: dict[str, bytes] = {}
        self.core_limits: set[str] = set()
        self.caller = Caller(platform, worker.key)

    def look_at_processes(self) -> None:
        """Note what /proc shows of each process."""
        for process in self.worker.processes():
            folder = Path(f"/proc/{process.pid}")
            for name in ("cmdline", "environ"):
                self.process_traces[f"{name} of {process.pid}"] = (folder / name).read_bytes()
            limits = (folder / "limits").read_text()
            (core,) = (line for line in limits.splitlines() if "core file" in line)
            self.core_limits.add(" ".join(core.split()[4:6]))

    def traces(self) -> dict[str, bytes]:
        """Return everything that came out of the worker, by where it was found."""
        assert self.platform.exchanged_lost == 0
        told = {"log": self.worker.raw_log, **self.process_traces}
        told["platform"] = b"\0".join(
            part
            for exchange in self.platform.exchanged
            for part in (exchange.path.encode(), exchange.body)
        )
        for path in self.worker.folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                told[str(path.relative_to(self.worker.folder))] = path.read_bytes()
                told[str(path)] = str(path).encode()
        return told


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A worker with everything as talkative as it can be set, used by every door."""
    folder = tmp_path_factory.mktemp("private")
    with (
        LocalRunpod(hold_s=5, stream_hold_s=5, record_bytes=10**9) as platform,
        RunningWorker(
            platform,
            folder,
            private=True,
            HF_TOKEN="hf_" + secrets.token_hex(20),
            RUNPOD_LOG_LEVEL="DEBUG",
            VLLM_LOGGING_LEVEL="DEBUG",
            LOG_LEVEL="DEBUG",
            ALLOW_PLAINTEXT="true",
        ) as worker,
    ):
        house = House(platform, worker.ready())
        jobs = [house.caller.send(*asked) for asked in requests(house.word, "sealed")]
        house.look_at_processes()
        answers = [house.caller.read(job) for job in jobs]
        assert answers[0].text == house.word("sealed answer")
        assert answers[1].text == house.word("sealed answer")
        assert sum(answered.end.error is None for answered in answers) >= 12
        assert sum(answered.end.error is not None for answered in answers) >= 12
        fernet = house.caller.key.simple_fernet
        for content in (
            json.dumps({"prompt": house.word("simple prompt"), "sampling_params": {"min_p": 9}}),
            house.word("simple bare") + "\n",
        ):
            job = house.caller.submit(
                {"encrypted_input": fernet.encrypt(content.encode()).decode()}
            )
            next(items for items, _ in house.caller.parts(job) if items)
            house.caller.cancel(job)
        yield house
        house.caller.close()


@pytest.mark.engine
class TestWorker:
    def test_nothing_that_was_sealed_is_found(self, house: House) -> None:
        words = [word for purpose, word in house.word.used.items() if "plain" not in purpose]
        assert len(words) >= 20
        assert leaks(words, house.traces()) == set()

    def test_the_same_search_finds_what_was_sent_in_plaintext(self, house: House) -> None:
        for route, body in requests(house.word, "plain"):
            if route == "generate":
                house.caller.outputs(house.caller.submit(body))
        words = [
            house.word(f"plain {purpose}")
            for purpose in ("prompt", "system", "answer", "stop", "argument", "wrong")
        ]
        found = leaks(words, house.traces())
        assert {word for word, place in found if place == "platform"} == set(words)
        assert (house.word("plain answer"), "log") in found  # the SDK's own, at DEBUG

    def test_the_keys_are_in_no_trace(self, house: House) -> None:
        """Not even where /proc shows the environment a process was started with."""
        environ = house.process_traces[f"environ of {house.worker.process.pid}"]
        assert b"MODELS=" in environ
        assert len(house.process_traces) >= 8
        assert leaks([house.worker.key], house.traces()) == set()
        assert not any(b"HF_TOKEN=hf_" in trace for trace in house.process_traces.values())

    def test_core_dumps_are_off(self, house: House) -> None:
        assert house.core_limits == {"0 0"}

    def test_nothing_is_found_after_the_engine_has_crashed(self, house: House) -> None:
        """The engine's worker dies under a request; vLLM then dumps what it was doing."""
        say = house.word("crash prompt")
        body = {
            "messages": [{"role": "user", "content": say}],
            "sampling_params": {
                "max_tokens": 1900,
                "ignore_eos": True,
                "stop": [house.word("crash stop")],
                "bad_words": [house.word("crash bad")],
                "structured_outputs": {"regex": f"(\n|{house.word('crash regex')})*"},
            },
        }
        sent = house.caller.send("generate", body)
        house.caller.first_chunk(sent)
        house.worker.kill_child("VLLM::Worker")
        assert house.worker.process.wait(15) == 1
        assert house.caller.read(sent).fault["code"] == "engine_dead"
        until(lambda: not house.worker.processes(), 10, "all its processes are gone")
        assert "this worker ends so that the platform replaces it" in house.worker.log
        words = [word for purpose, word in house.word.used.items() if "crash" in purpose]
        assert len(words) == 4
        assert leaks(words, house.traces()) == set()


# --- without an engine ----------------------------------------------------------------------


class FailingModels:
    """Stands in for an engine whose fault nobody foresaw, which the real one cannot be told to."""

    routes = ("/v1/models",)
    max_concurrency = 1

    def __init__(self, message: str, where: str) -> None:
        self._message, self._where = message, where
        self.usage = None

    def run(self, call: Any, cache_salt: str, expires_at: float | None) -> "FailingModels":
        if self._where == "run":
            raise RuntimeError(self._message)
        return self

    async def batches(self) -> AsyncIterator[list[AnswerEvent]]:
        yield [Head(200, "generate", ""), Text(0, "said ")]
        if self._where == "render":
            yield [object()]  # type: ignore[list-item]
        raise RuntimeError(self._message)

    async def aclose(self) -> None:
        if self._where == "aclose":
            raise RuntimeError(self._message)


@pytest.mark.parametrize("where", ["run", "batches", "render"])
@pytest.mark.parametrize("interval_ms", [0, 1])
async def test_an_exception_that_nobody_foresaw_is_sealed_and_not_told(
    where: str, interval_ms: int, caplog: pytest.LogCaptureFixture
) -> None:
    word = Words()("exception")
    keys = KeyRing.parse(generate_key())
    settings = Settings(endpoint_id="local", stream_interval_ms=interval_ms)
    models: Any = FailingModels(word, where)
    handler = rp_handler.Handler(settings, keys, models)
    request = new_request("generate", b'{"prompt":"x"}', audience="local", ttl_s=60)
    job = {"id": "job", "input": {"sealed": seal_request(request, keys.first)}}

    async def answer() -> list[Any]:
        return [chunk async for chunk in handler.handle(job)]

    with caplog.at_level(logging.DEBUG):
        chunks = await asyncio.create_task(answer())
        await asyncio.sleep(0)
    opener, decoder = AnswerOpener(request, keys.first), FrameDecoder()
    events = [event for chunk in chunks for event in decoder.feed(opener.open(chunk).payload)]
    end = events[-1]
    assert isinstance(end, End)
    assert end.error is not None
    assert end.error["message"] == "the worker failed"
    assert end.error["status"] == 500
    assert "outcome=error:internal" in caplog.text
    assert where == "render" or "RuntimeError at " in caplog.text
    assert leaks([word], {"log": caplog.text.encode()}) == set()


def record(
    name: str, level: int, message: str, *args: Any, error: BaseException | None = None
) -> logging.LogRecord:
    exc_info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord(name, level, "file.py", 1, message, args, exc_info)


class TestLogGuard:
    def told(self, entry: logging.LogRecord) -> str | None:
        """Return what a handler would write."""
        if not log_guard.ContentFilter().filter(entry):
            return None
        return logging.Formatter("%(message)s").format(entry)

    def failed(self, word: str) -> ValueError:
        try:
            raise ValueError(word)
        except ValueError as error:
            return error

    @pytest.mark.parametrize(
        "name",
        [
            "vllm.entrypoints.openai.serving",
            "vllm.v1.engine.input_processor",
            "vllm.logging_utils.dump_input",
            "vllm.renderers.hf",
            "asyncio",
            "py.warnings",
            "transformers.tokenization_utils_base",
        ],
    )
    def test_who_handles_content_is_not_quoted(self, name: str) -> None:
        told = self.told(record(name, logging.ERROR, "request %s", "word"))
        assert told == "(text withheld)"
        assert self.told(record(name, logging.INFO, "request %s", "word")) is None

    def test_debug_is_not_logged(self) -> None:
        assert self.told(record("vllm.v1.core", logging.DEBUG, "x")) is None

    def test_an_exception_is_its_type_and_place(self) -> None:
        error = self.failed("word")
        told = self.told(record("vllm.v1.core", logging.ERROR, "it failed", error=error))
        assert told is not None
        assert told.startswith("it failed [ValueError at test_privacy.py:")
        assert "word" not in told
        told = self.told(record("worker", logging.ERROR, "it failed: %s", error))
        assert told == "it failed: ValueError"

    def test_other_records_pass(self) -> None:
        assert self.told(record("worker", logging.INFO, "job=%s", "id")) == "job=id"

    @pytest.mark.parametrize(
        "raising",
        [
            "raise ValueError(WORD)",
            "import threading; threading.Thread(target=int, args=[WORD]).start()",
            "from multiprocessing import get_context\n"
            "get_context('fork').Process(target=int, args=[WORD]).start()",
            "import gc\nclass A:\n    def __del__(self): raise ValueError(WORD)\na = A(); del a",
            "import asyncio\n"
            "async def f(): raise ValueError(WORD)\n"
            "async def g():\n    t = asyncio.create_task(f()); await asyncio.sleep(0); del t\n"
            "asyncio.run(g())",
        ],
    )
    def test_uncaught_exceptions_are_not_quoted(self, raising: str) -> None:
        program = f"import log_guard; log_guard.install(); WORD = 'w' + 'ord' * 5\n{raising}"
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "ValueError" in done.stderr
        assert "wordord" not in done.stderr + done.stdout
        unguarded = subprocess.run(
            [sys.executable, "-c", program.replace("log_guard.install();", "")],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "wordord" in unguarded.stderr

    def test_a_child_dies_with_its_parent(self) -> None:
        program = (
            "import os, sys, time, log_guard; log_guard.install()\n"
            "child = os.fork()\n"
            "if child: print(child, flush=True)\n"
            "time.sleep(600)"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        with parent:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            parent.kill()

        def gone() -> bool:
            try:
                # Where nobody adopts orphans they stay as zombies.
                return psutil.Process(child).status() == psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                return True

        until(gone, 10, "the child is gone")
