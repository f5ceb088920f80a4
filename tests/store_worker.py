"""The real handler, job loop, SDK and replay store as a process, with an echo for an engine.

Started with the variables of LocalRunpod.worker_env and the worker's own settings. It says the
prompt word by word, one every `PAUSE_S`.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec

import config
import log_guard
import rp_handler
from boot import Booted
from failed_starts import FailedStarts
from frames import AnswerEvent, End, Head, Text
from keys import KeyRing
from protocol import Call
from readiness import Readiness
from replay_store import ReplayStore
from worker_environment import prepare_libraries

PAUSE_S = 0.05


class Run:
    """One answer."""

    usage = None

    def __init__(self, call: Call) -> None:
        self._words = str(msgspec.json.decode(call.body)["prompt"]).split(" ")

    async def batches(self) -> AsyncIterator[list[AnswerEvent]]:
        yield [Head(200, "generate", "text/plain"), Text(0, self._words[0])]
        for word in self._words[1:]:
            await asyncio.sleep(PAUSE_S)
            yield [Text(0, " " + word)]
        yield [End(None, {})]

    async def aclose(self) -> None:
        """There is nothing to stop."""


class Models:
    """What the handler needs of `model_swap.Models`."""

    routes = ("/v1/models",)
    max_concurrency = 8
    dead = False

    def run(self, call: Call, cache_salt: str, expires_at: float | None) -> Run:
        return Run(call)

    def about(self) -> dict[str, Any]:
        return {"vllm": "none", "models": ["echo"], "tasks": ["generate"]}

    async def start(self, *_: object) -> None:
        """There is nothing to start."""

    stop = start


class Preparation:
    def finish(self) -> None:
        """There is nothing to wait for."""


def main() -> None:
    prepare_libraries(os.environ)
    log_guard.install()
    settings, _ = config.read(os.environ, ())
    store = ReplayStore(
        settings.replay_redis_url, settings.endpoint_id, clock_skew_s=settings.clock_skew_s
    )
    models: Any = Models()
    preparation: Any = Preparation()
    booted = Booted(
        settings=settings,
        keys=KeyRing.parse(settings.encryption_key),
        hpke_keys=None,
        store=store,
        models=models,
        model_files={},
        compile_cache=None,
        readiness=Readiness(),
        preparation=preparation,
        failed_starts=FailedStarts(
            settings.failed_starts, settings.endpoint_id, settings.worker_id
        ),
    )
    code = rp_handler.serve(booted)
    rp_handler.end_children()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
