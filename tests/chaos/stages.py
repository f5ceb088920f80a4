"""Where runs take place: a platform, two workers and every client, with the engine or an echo.

Owns what a whole run is (fair weather, storm, fair weather) and the report that the claims are
read from.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from client_config import ClientSettings
from keys import generate_key
from local_runpod import LocalRunpod
from tests.chaos import storm
from tests.chaos.callers import EVERYTHING, GENERATE, Caller, Callers
from tests.chaos.fleet import Ended, Fleet
from tests.chaos.ledger import Ledger
from tests.chaos.questions import ask_all, echo_questions, engine_questions
from tests.chaos.run import Run, Step, follow
from tests.workers import ROOT, SERVED, RunningWorker

SEED = int(os.environ.get("CHAOS_SEED", "1"))
SETTLE_S = 100.0
"""Longer than what the platform gives a job whose last word it has lost."""

left_to_the_collector = pytest.mark.filterwarnings(
    "ignore:unclosed (transport|<socket):ResourceWarning"
)
"""Of thousands of calls that are cancelled or broken off, four or five left a connection to the
garbage collector. Why was not found; by its source, httpx2 shields the closing of connections from
anyio's cancellations alone, and not from asyncio's. That descriptors do not grow is a claim of its
own."""

BATCHED_TOKENS = 128

ENGINE = {
    "MODELS": str(ROOT / "models" / "tiny-talker"),
    # In bfloat16 tokens are equally likely far too often for one text to be the right one.
    "DTYPE": "float32",
    "MAX_NUM_SEQS": "24",
    # For each number of tokens in a step, vLLM's CPU engine keeps what it has compiled of every
    # layer, 128 numbers at most: 1.6 MiB each with this model.
    "MAX_NUM_BATCHED_TOKENS": str(BATCHED_TOKENS),
    # Two engines with two threads each would wait for each other's on a small machine.
    "OMP_NUM_THREADS": "1",
    # So little that every block of it has been used before the run begins, and counts from then.
    "KV_CACHE_MEMORY_BYTES": str(16 * 2**20),
}


@dataclass(frozen=True)
class Stage:
    """What kind of worker runs: the real one on the real engine, or an echo."""

    engine: bool
    program: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def ways(self) -> Mapping[str, tuple[Caller, float]]:
        """How these workers can be asked."""
        return EVERYTHING if self.engine else GENERATE

    @contextlib.asynccontextmanager
    async def open(self, folder: Path, *, workers: int = 2) -> AsyncIterator[Run]:
        """Start everything; the run's fleet is complete and its questions have answers."""
        key = generate_key()
        platform = LocalRunpod(hold_s=5, stream_hold_s=5, kept_s=120, gone_after_s=3)

        def start(name: str, hooks: dict[str, str]) -> RunningWorker:
            echo = {"ECHO_KEYS": key, "ECHO_FOLDER": str(folder), "RUNPOD_DEBUG_LEVEL": "ERROR"}
            settings: dict[str, Any] = {
                **(ENGINE if self.engine else echo),
                **self.environment,
                **hooks,
            }
            return RunningWorker(platform, folder, name, key=key, program=self.program, **settings)

        with platform:
            settings = ClientSettings(
                platform.endpoint_id, platform.api_key, key, platform.base_url
            )
            async with (
                Fleet(platform, folder, start, workers).running() as fleet,
                Callers.of(settings, SERVED, platform.faults) as callers,
            ):
                questions = (
                    await engine_questions(callers.polled) if self.engine else echo_questions()
                )
                yield Run(platform, fleet, callers, questions, self.ways, SEED)


REAL = Stage(True, ROOT / "rp_handler.py")
ECHO = Stage(False, Path(__file__).with_name("loop_echo.py"))


@dataclass
class Report:
    """What a run showed."""

    ledger: Ledger
    ended: list[Ended]
    crashed: list[Ended]
    jobs_left: list[str]
    """Jobs that the platform still had long after the last caller."""
    busy: list[str]
    """Workers that still worked."""
    asked_after: int
    wrong_after: int
    memory_before: int
    memory_after: int
    storm: str


async def storm_run(
    stage: Stage, folder: Path, steps: list[Step], *, apart: int, jobs: int, calm: int
) -> Report:
    """Return the report of a whole run."""
    print(f"seed {SEED} (CHAOS_SEED)")
    async with stage.open(folder) as run:
        fleet = run.fleet
        questions = [run.questions[n % len(run.questions)] for n in range(calm)]
        wrong = await ask_all(run.callers.polled, questions, run.concurrency)
        assert not wrong, f"{wrong} of {calm} answers depend on what else is asked: no oracle"
        memory_before = await fleet.memory_bytes()
        raised = storm.raise_storm(run.platform.faults, SEED)
        started_s = time.monotonic()
        async with run.load(cancels_every_s=0.5):
            await follow(run, steps, apart)
            await run.more(max(1, jobs - run.finished))
        print(f"  {run.finished} jobs in {time.monotonic() - started_s:.0f} s")
        run.platform.faults.clear()
        jobs_left = await run.settled(SETTLE_S)
        busy = await fleet.busy() if stage.engine else []
        await fleet.complete()
        wrong_after = await ask_all(run.callers.polled, questions, run.concurrency)
        await asyncio.sleep(1)
        memory_after = await fleet.memory_bytes()
        await fleet.end()
    report = Report(
        run.ledger,
        fleet.ended,
        fleet.crashed,
        jobs_left,
        busy,
        calm,
        wrong_after,
        memory_before,
        memory_after,
        storm.told(raised),
    )
    print(f"  {report.ledger.summary()}\n  struck: {report.storm}", flush=True)
    return report
