"""Twenty minutes at steady load: `make chaos SOAK=1` (`SOAK_S` for another time).

The platform goes on making its faults, for what leaks mostly leaks where something went wrong;
the workers are left alone, since one that has ended leaks no more.
"""

import asyncio
import gc
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.chaos import meter, storm
from tests.chaos.ledger import Ledger
from tests.chaos.meter import trend
from tests.chaos.run import Run
from tests.chaos.stages import BATCHED_TOKENS, REAL, SEED, left_to_the_collector
from tests.claims import Trials

SOAK_S = float(os.environ.get("SOAK_S", "1200"))
SAMPLES = 240
CONCURRENCY = 8
FILLINGS = 3
"""Which worker takes a request is chance."""

MEMORY = 0.02
PER_JOB = 0.01

pytestmark = [
    left_to_the_collector,
    pytest.mark.engine,
    pytest.mark.skipif(not os.environ.get("SOAK"), reason="takes 20 minutes: make chaos SOAK=1"),
]


@dataclass
class Soak:
    """What was measured, at equal distances in time, of both workers together."""

    ledger: Ledger
    jobs: int = 0
    """How many ended while it was measured."""
    memory: list[float] = field(default_factory=list)
    files: list[float] = field(default_factory=list)
    tasks: list[float] = field(default_factory=list)

    def sample(self, run: Run) -> None:
        """Measure everything once."""
        members = list(run.fleet.members.values())
        processes = [process for m in members for process in m.worker.processes()]
        self.memory.append(meter.memory_bytes(processes) / 2**20)
        self.files.append(meter.files(processes))
        assert self.memory[-1], "only root may look at a worker: its process is not dumpable"
        self.tasks.append(
            sum(meter.tasks(psutil.Process(m.worker.process.pid), m.probe) for m in members)
        )


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Soak]:
    """One soak, from which all claims are read."""
    soak = asyncio.run(steady(tmp_path_factory.mktemp("soak")))
    gc.collect()  # here, where it may warn
    yield soak


async def steady(folder: Path) -> Soak:
    """Return what was measured in `SOAK_S`, after a tenth of it to warm up."""
    async with REAL.open(folder) as run:
        run.concurrency = CONCURRENCY
        soak = Soak(run.ledger)
        began_s = time.monotonic()
        await fill_caches(run)
        print(f"  caches filled in {time.monotonic() - began_s:.0f} s")
        storm.raise_storm(run.platform.faults, SEED)
        async with run.load(cancels_every_s=2):
            await asyncio.sleep(SOAK_S / 10)
            began_s, first = time.monotonic(), run.finished
            for number in range(1, SAMPLES + 1):
                await asyncio.sleep(began_s + number * SOAK_S / SAMPLES - time.monotonic())
                await asyncio.to_thread(soak.sample, run)
            soak.jobs = run.finished - first
            print(f"  {soak.jobs} jobs in {time.monotonic() - began_s:.0f} s")
        assert not run.fleet.ended, run.fleet.ended
        print(f"  {run.ledger.summary()}")
        return soak


async def fill_caches(run: Run) -> None:
    """Have each worker take steps of nearly every size, for which its engine grows only once."""
    dice = random.Random(SEED)

    async def fill() -> None:
        for count in dice.sample(range(1, BATCHED_TOKENS + 1), BATCHED_TOKENS):
            prompt = dice.choices(range(100, 10_000), k=count)
            await run.callers.polled.complete(prompt, max_tokens=1)

    for _ in range(FILLINGS):
        await asyncio.gather(*(fill() for _ in run.fleet.members))


@pytest.mark.claim(
    "soak.answers",
    "At steady load, too, a job ends in the exact text, in a typed error that has a cause, or in a "
    "cancellation that was asked for.",
)
def test_no_answer_is_wrong(soak: Soak, claim: Trials) -> None:
    claim.trials(len(soak.ledger.outcomes), len(soak.ledger.bad))
    claim.detail(f"{SOAK_S / 60:g} min; {soak.ledger.summary()}")
    assert not soak.ledger.bad, soak.ledger.complaints()


@pytest.mark.claim(
    "soak.memory",
    "At steady load memory does not grow: growth of 2 % is excluded with 95 % confidence.",
)
def test_memory_does_not_grow(soak: Soak, claim: Trials) -> None:
    found = trend(soak.memory)
    claim.trials(len(soak.memory), 0 if found.excludes(MEMORY * found.level) else 1)
    claim.detail(f"MiB of two workers over {SOAK_S / 60:g} min: {found}")


@pytest.mark.claim(
    "soak.files",
    "At steady load file descriptors do not grow: one in 100 jobs is excluded with 95 % "
    "confidence.",
)
def test_files_do_not_grow(soak: Soak, claim: Trials) -> None:
    count_growth_per_job(soak.files, soak, claim)


@pytest.mark.claim(
    "soak.tasks",
    "At steady load asyncio tasks do not grow: one in 100 jobs is excluded with 95 % confidence.",
)
def test_tasks_do_not_grow(soak: Soak, claim: Trials) -> None:
    count_growth_per_job(soak.tasks, soak, claim)


def count_growth_per_job(samples: list[float], soak: Soak, claim: Trials) -> None:
    """Count a failure unless it is excluded that this grows by PER_JOB with each job."""
    found = trend(samples)
    enough = found.excludes(PER_JOB * soak.jobs)
    claim.trials(len(samples), 0 if enough else 1)
    claim.detail(f"of two workers over {SOAK_S / 60:g} min: {found}")
