"""The suite's judge can fail: it finds clients and workers out that are weakened on purpose."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from crypto import OpenedChunk
from delivery import Delivery, _Attempt
from errors import (
    AnswerError,
    EngineDead,
    JobCancelled,
    JobFailed,
    JobTimedOut,
    Rejected,
    RequestError,
    TamperedChunk,
    TruncatedAnswer,
)
from frames import AnswerEvent, End
from job_polled import PolledJob
from tests.chaos.callers import LONG, stream
from tests.chaos.fleet import Member
from tests.chaos.ledger import Job, Ledger, Verdict
from tests.chaos.meter import trend
from tests.chaos.run import Run
from tests.chaos.stages import ECHO, REAL, Stage
from tests.claims import Trials
from tests.workers import ROOT

WEAK = Path(__file__).with_name("weak_worker.py")
oracle = pytest.mark.claim(
    "chaos.oracle",
    "The suite finds out clients and workers that are weakened: it can fail.",
)


def losing(run: Run) -> None:
    """Lose chunks for good: neither the stream nor the result has them."""

    def without_output(body: bytes) -> bytes:
        return json.dumps({**json.loads(body), "output": []}).encode()

    run.results_lost = True
    run.platform.faults.add("job-stream", drop=True, probability=0.05, seed=1)
    run.platform.faults.add("job-done", tamper=without_output)


def shuffling(run: Run) -> None:
    """Have chunks arrive twice and out of order."""
    run.platform.faults.add("job-stream", duplicate=1, probability=0.1, seed=1)
    run.platform.faults.add("job-stream", reorder=True, probability=0.1, seed=2)


def repeating(run: Run) -> None:
    """Hand jobs to both workers."""
    run.platform.faults.add("job-take", duplicate=1, probability=0.5, seed=1)


async def judged(folder: Path, trouble: Any, stage: Stage = ECHO, workers: int = 1) -> Ledger:
    """Return the ledger of some jobs, streamed over the queue, in this trouble."""
    async with stage.open(folder, workers=workers) as run:
        run.ways = {"chat streamed": (stream, 1)}
        run.concurrency = 8
        trouble(run)
        async with run.load():
            await run.more(24)
    return run.ledger


def believe_what_is_there(patch: pytest.MonkeyPatch) -> None:
    """Weaken the client: what has arrived when the job is over is the answer."""
    finish = PolledJob._finish

    async def trusting(self: PolledJob) -> list[AnswerEvent]:
        try:
            return await finish(self)
        except AnswerError:
            return [End(None, {})]

    patch.setattr(PolledJob, "_finish", trusting)


def ignore_numbers(patch: pytest.MonkeyPatch) -> None:
    """Weaken the client: chunks are believed in the order in which they come."""

    def take(self: _Attempt, chunk: OpenedChunk, digest: int) -> None:
        self._decode(chunk)

    patch.setattr(_Attempt, "take", take)


def join_attempts(patch: pytest.MonkeyPatch) -> None:
    """Weaken the client: all attempts are one answer."""

    def release(self: Delivery, attempt: _Attempt) -> list[AnswerEvent]:
        self.ended = attempt.end is not None
        events, attempt.events = attempt.events, []
        return events

    patch.setattr(Delivery, "_release", release)


@oracle
@pytest.mark.parametrize(
    ("trouble", "weaken", "workers"),
    [
        (losing, believe_what_is_there, 1),
        (shuffling, ignore_numbers, 1),
        (repeating, join_attempts, 2),
    ],
)
async def test_a_weakened_client_is_found_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: Any,
    weaken: Any,
    workers: int,
    claim: Trials,
) -> None:
    (tmp_path / "sound").mkdir()
    sound = await judged(tmp_path / "sound", trouble, workers=workers)
    assert not sound.bad, sound.complaints()
    weaken(monkeypatch)
    (tmp_path / "weak").mkdir()
    weak = await judged(tmp_path / "weak", trouble, workers=workers)
    claim.trial(bool(weak.bad))
    claim.detail(f"{weaken.__name__}: {len(weak.bad)} of {len(weak.outcomes)} jobs")


@oracle
async def test_a_worker_that_forgets_is_found_out(tmp_path: Path, claim: Trials) -> None:
    environment = {"WEAK_PROGRAM": str(ECHO.program), "WEAKNESS": "forgets"}
    weak = await judged(tmp_path, lambda run: None, Stage(False, WEAK, environment))
    claim.trial(weak.count(Verdict.WRONG) > 0)
    claim.detail(f"forgets: {weak.count(Verdict.WRONG)} of {len(weak.outcomes)} jobs")


async def left_running(folder: Path, stage: Stage) -> list[str]:
    """Return the workers that are busy with answers that nobody waits for any more."""
    async with stage.open(folder, workers=1) as run:
        for question in run.questions[:8]:
            options = {**question.options, "max_tokens": LONG}
            async with run.callers.polled.chat(question.prompt, stream=True, **options) as answer:
                await anext(answer)
        assert not await run.settled(10)
        return await run.fleet.busy(within_s=3)


@pytest.mark.engine
@pytest.mark.skipif(not Trials.full, reason="starts two engines: make chaos")
@oracle
async def test_an_engine_that_goes_on_is_found_out(tmp_path: Path, claim: Trials) -> None:
    (tmp_path / "sound").mkdir()
    assert not await left_running(tmp_path / "sound", REAL)
    environment = {"WEAK_PROGRAM": str(ROOT / "rp_handler.py"), "WEAKNESS": "keeps"}
    (tmp_path / "weak").mkdir()
    claim.trial(bool(await left_running(tmp_path / "weak", Stage(True, WEAK, environment))))
    claim.detail("keeps: still busy")


async def with_jobs(run: Run) -> Member:
    """Wait for a worker that has several jobs."""
    while True:
        for member in run.fleet.ready():
            if len(run.platform.workers[member.name].jobs) >= 3:
                return member
        await asyncio.sleep(0.005)


async def dropped(folder: Path, stage: Stage) -> int:
    """Return the jobs that a worker has left at SIGTERM, beside one that goes on."""
    async with stage.open(folder) as run:
        run.concurrency = 8
        async with run.load():
            await run.more(8)
            await run.fleet.roll(await with_jobs(run), drained=False)
        (ended,) = run.fleet.ended
        return ended.jobs_left


@oracle
@pytest.mark.parametrize(
    "stage",
    [
        ECHO,
        pytest.param(
            REAL,
            marks=[
                pytest.mark.engine,
                pytest.mark.skipif(not Trials.full, reason="starts six engines: make chaos"),
            ],
        ),
    ],
    ids=["echo", "engine"],
)
async def test_a_worker_that_drops_its_jobs_is_found_out(
    tmp_path: Path, stage: Stage, claim: Trials
) -> None:
    (tmp_path / "sound").mkdir()
    assert not await dropped(tmp_path / "sound", stage)
    environment = {"WEAK_PROGRAM": str(stage.program), "WEAKNESS": "drops"}
    (tmp_path / "weak").mkdir()
    left = await dropped(tmp_path / "weak", Stage(stage.engine, WEAK, environment))
    claim.trial(left > 0)
    claim.detail(f"drops: {left} jobs")


@oracle
@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (JobCancelled("x"), Verdict.UNEXPLAINED),
        (JobTimedOut("x"), Verdict.LOST),
        (JobFailed("the job failed on the platform: handler: boom"), Verdict.UNEXPLAINED),
        (EngineDead(), Verdict.UNEXPLAINED),
        (RequestError("x", code="expired"), Verdict.UNEXPLAINED),
        (RequestError("the worker failed", status=500), Verdict.UNEXPLAINED),
        (TruncatedAnswer("x"), Verdict.UNEXPLAINED),
        (TamperedChunk("x"), Verdict.UNEXPLAINED),
        (Rejected(), Verdict.UNEXPLAINED),
        (RuntimeError("x"), Verdict.UNTYPED),
    ],
)
def test_an_error_without_a_cause_is_not_good(
    error: Exception, verdict: Verdict, claim: Trials
) -> None:
    ledger = Ledger()
    ledger.failed(Job(0, "chat", "text"), error)
    claim.trial([outcome.verdict for outcome in ledger.bad] == [verdict])


@oracle
def test_a_leak_is_told_from_noise(claim: Trials) -> None:
    dice = random.Random(1)
    drift = [0.0]
    for _ in range(299):
        drift.append(0.9 * drift[-1] + dice.gauss(0, 1))
    level = [1000 + noise for noise in drift]
    leaking = [value + 0.1 * n for n, value in enumerate(level)]
    claim.trial(trend(level).excludes(20))
    claim.trial(not trend(leaking).excludes(20))
