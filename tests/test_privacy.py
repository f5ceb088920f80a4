"""What the worker makes of exceptions and log records, so that neither quotes a prompt.

That nothing is found anywhere is shown by tests/attack/test_leaks.py.
"""

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest

import log_guard
import rp_handler
from config import Settings
from crypto import AnswerOpener, new_request, seal_request
from frames import AnswerEvent, End, FrameDecoder, Head, Text
from keys import KeyRing, generate_key
from tests.attack.canaries import Words, search
from tests.wait import until
from tests.workers import ROOT


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
    assert search([word], {"log": caplog.text.encode()}) == set()


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
