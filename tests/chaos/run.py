"""A run: callers without a pause, a storm on the platform, and a plan of what happens to workers.

Owns the load and the plan. What is asked is in `questions`, how in `callers`, what the platform
does wrong in `storm`, the workers in `fleet`, the judgement in `ledger`.
"""

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from local_runpod import LocalRunpod
from tests.chaos.callers import Caller, Callers, Left
from tests.chaos.fleet import Fleet
from tests.chaos.ledger import Job, Ledger
from tests.chaos.questions import Question

DEADLINE_S = 240.0
"""When a job counts as lost: long after every limit that could end it."""

FEW = 4
"""Callers that go on while a worker is replaced: all of them would leave it no CPU to start."""

SKEWED_S = 45.0
AHEAD_S = 2 * 3600.0
BEHIND_S = -600.0
"""How far clocks jump: within what a worker tolerates, past every request's life, before it."""


@dataclass(eq=False)
class Run:
    """The load on one platform; everything random in it comes from `seed`."""

    platform: LocalRunpod
    fleet: Fleet
    callers: Callers
    questions: Sequence[Question]
    ways: Mapping[str, tuple[Caller, float]]
    seed: int
    concurrency: int = 32
    deadline_s: float = DEADLINE_S
    results_lost: bool = False
    """Whether the platform loses what workers say last on every job."""
    ledger: Ledger = field(default_factory=Ledger)
    fatal: list[str] = field(default_factory=list)
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def finished(self) -> int:
        """How many jobs have ended."""
        return len(self.ledger.outcomes)

    @contextlib.asynccontextmanager
    async def load(self, *, cancels_every_s: float = 0.0) -> AsyncIterator[None]:
        """Ask without a pause for as long as this is open, and wait for what is on its way."""
        self._stop.clear()
        callers = [asyncio.create_task(self._caller(n)) for n in range(self.concurrency)]
        operator = asyncio.create_task(self._operator(cancels_every_s))
        try:
            yield
            self._stop.set()
            await asyncio.gather(*callers)
        finally:
            for task in (*callers, operator):
                task.cancel()
            await asyncio.wait([*callers, operator])

    async def _caller(self, number: int) -> None:
        while not self._stop.is_set():
            if number < FEW or self.fleet.whole:
                await self._ask(next(self._numbers))
            else:
                await asyncio.sleep(0.1)

    async def _ask(self, index: int) -> None:
        dice = random.Random(f"{self.seed} {index}")
        names = list(self.ways)
        (name,) = dice.choices(names, [self.ways[name][1] for name in names])
        question = dice.choice(self.questions)
        job = Job(index, name, question.answer, result_lost=self.results_lost)
        asking = asyncio.ensure_future(self.ways[name][0](self.callers, job, question, dice))
        done, _ = await asyncio.wait({asking}, timeout=self.deadline_s)
        if not done:
            asking.cancel()
            self.ledger.lost(job)
            return
        try:
            self.ledger.said(job, asking.result())
        except Left:
            self.ledger.left(job)
        except Exception as error:
            self.ledger.failed(job, error)

    async def _operator(self, every_s: float) -> None:
        """Cancel jobs that nobody asked to be cancelled, as somebody at a console does."""
        dice = random.Random(f"{self.seed} operator")
        while every_s:
            await asyncio.sleep(dice.expovariate(1 / every_s))
            running = [job.id for job in self.platform.jobs.values() if not job.status.final]
            if running:
                job_id = dice.choice(running)
                self.ledger.asked[job_id] = time.monotonic()
                with contextlib.suppress(Exception):
                    await self.callers.polled.cancel(job_id)

    async def more(self, jobs: int) -> None:
        """Wait until so many more jobs have ended."""
        goal, until_s = self.finished + jobs, time.monotonic() + 2 * self.deadline_s
        while self.finished < goal:
            if time.monotonic() > until_s:
                raise AssertionError(f"{jobs} jobs did not end: {self.ledger.summary()}")
            await asyncio.sleep(0.05)

    async def settled(self, within_s: float) -> list[str]:
        """Return the ids of jobs that the platform still has after `within_s` without a caller."""
        until_s = time.monotonic() + within_s
        while True:
            left = [job.id for job in self.platform.jobs.values() if not job.status.final]
            if not left or time.monotonic() > until_s:
                return left
            await asyncio.sleep(0.1)


Step = tuple[str, Callable[[Run, random.Random], Awaitable[None]]]


async def kill_worker(run: Run, dice: random.Random) -> None:
    """SIGKILL to one worker."""
    await run.fleet.kill(dice.choice(run.fleet.ready()))


async def kill_engine(run: Run, dice: random.Random) -> None:
    """The engine's process of one worker is killed."""
    run.ledger.engine_died = True
    await run.fleet.kill_engine(dice.choice(run.fleet.ready()))


async def roll(run: Run, dice: random.Random) -> None:
    """SIGTERM to one worker, whom the platform has told of no more jobs."""
    await run.fleet.roll(dice.choice(run.fleet.ready()), drained=True)


async def roll_undrained(run: Run, dice: random.Random) -> None:
    """SIGTERM to one worker while the platform goes on to give it jobs."""
    await run.fleet.roll(dice.choice(run.fleet.ready()), drained=False)


def jump(offset_s: float, jobs: int) -> Callable[[Run, random.Random], Awaitable[None]]:
    """Return the step of a clock that is set wrong, and right again some jobs later."""

    async def step(run: Run, dice: random.Random) -> None:
        member = dice.choice(run.fleet.ready())
        if abs(offset_s) > 60:
            run.ledger.clock_off_until_s = float("inf")
        member.clock.set(offset_s)
        await run.more(jobs)
        member.clock.set(0)
        if abs(offset_s) > 60:
            # Answers that were made before now may still be on their way.
            run.ledger.clock_off_until_s = time.monotonic()

    return step


def plan(jobs: int) -> list[Step]:
    """Return what happens to workers, in order, `jobs` apart."""
    return [
        ("SIGKILL", kill_worker),
        ("clock 45 s ahead", jump(SKEWED_S, jobs)),
        ("engine killed", kill_engine),
        ("SIGTERM", roll),
        ("clock 10 min behind", jump(BEHIND_S, jobs)),
        ("SIGTERM, jobs still coming", roll_undrained),
        ("clock 2 h ahead", jump(AHEAD_S, jobs)),
    ]


async def follow(run: Run, steps: Sequence[Step], jobs: int) -> None:
    """Take the steps; none before all workers are ready and `jobs` more have ended."""
    dice = random.Random(f"{run.seed} plan")
    for name, step in steps:
        await run.more(jobs)
        await run.fleet.complete()
        started_s = time.monotonic()
        await step(run, dice)
        print(
            f"  {run.finished:5} jobs ended; {name}: {time.monotonic() - started_s:.1f} s",
            flush=True,
        )
    await run.more(jobs)
    await run.fleet.complete()
