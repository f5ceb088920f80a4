"""The chaos suite: hundreds of jobs while the platform, the workers and the clocks fail.

`make chaos` runs it on the real worker and engine; as part of `make test` it is short and on
echo workers, which are the SDK, the job loop, the sealing and the client without an engine.
"""

import asyncio
import gc
from collections.abc import Iterator

import pytest

from tests.chaos.ledger import Verdict
from tests.chaos.run import Step, kill_worker, plan, roll_undrained
from tests.chaos.stages import ECHO, REAL, SEED, Report, left_to_the_collector, storm_run
from tests.claims import Trials

pytestmark = left_to_the_collector

MEMORY = 0.05
JOBS = 500


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Report]:
    """One run, from which all claims are read."""
    folder = tmp_path_factory.mktemp("chaos")
    if Trials.full:
        run = storm_run(REAL, folder, plan(40), apart=40, jobs=JOBS, calm=240)
    else:
        steps: list[Step] = [("SIGKILL", kill_worker), ("SIGTERM", roll_undrained)]
        run = storm_run(ECHO, folder, steps, apart=15, jobs=60, calm=16)
    report = asyncio.run(run)
    gc.collect()  # here, where it may warn
    yield report


@pytest.mark.claim(
    "chaos.answers",
    "While platform and workers fail, a job ends in the exact text, in a typed error that has a "
    "cause, or in a cancellation that was asked for.",
)
def test_no_answer_is_wrong(report: Report, claim: Trials) -> None:
    claim.trials(len(report.ledger.outcomes), len(report.ledger.bad))
    claim.detail(f"seed {SEED}: {report.ledger.summary()}")
    assert not report.ledger.bad, report.ledger.complaints()
    # Errors for everything would be typed, too.
    exact, cancelled = (report.ledger.count(v) for v in (Verdict.EXACT, Verdict.CANCELLED))
    assert exact > (len(report.ledger.outcomes) - cancelled) / 2


@pytest.mark.claim("chaos.lost", "No job is lost: each ends, for its caller and on the platform.")
def test_no_job_is_lost(report: Report, claim: Trials) -> None:
    lost = report.ledger.count(Verdict.LOST) + len(report.jobs_left)
    claim.trials(len(report.ledger.outcomes), lost)


@pytest.mark.claim(
    "chaos.recovers", "When the faults have ended, every job is answered, and exactly."
)
def test_it_recovers(report: Report, claim: Trials) -> None:
    claim.trials(report.asked_after, report.wrong_after)


@pytest.mark.claim(
    "chaos.processes",
    "A worker that was killed, stopped or lost its engine leaves no process and no shared memory.",
)
def test_nothing_is_left_of_a_worker(report: Report, claim: Trials) -> None:
    told = []
    for ended in report.ended:
        left = f"{ended.processes_left} processes and {ended.memory_left} files in memory"
        nothing = not ended.processes_left and not ended.memory_left
        claim.trial(nothing)
        told.append((ended.cause or f"code {ended.code}") + ("" if nothing else f" left {left}"))
    claim.detail(", ".join(told))
    assert not report.crashed, report.crashed


@pytest.mark.claim(
    "chaos.sigterm", "On SIGTERM a worker finishes every job it was given, and ends with 0."
)
def test_sigterm_loses_nothing(report: Report, claim: Trials) -> None:
    for ended in report.ended:
        if ended.cause.startswith("SIGTERM"):
            claim.trial(ended.cause == "SIGTERM" and ended.code == 0 and not ended.jobs_left)
            claim.detail(f"{ended.name}: code {ended.code}, {ended.jobs_left} jobs left")


full_only = pytest.mark.skipif(not Trials.full, reason="about the real worker: make chaos")


@full_only
@pytest.mark.claim("chaos.engine", "No request is left running in an engine.")
def test_no_engine_works_for_nobody(report: Report, claim: Trials) -> None:
    claim.trials(len(report.ended), len(report.busy))


@full_only
@pytest.mark.claim(
    "chaos.memory", "The workers' memory is after the run what it was before, ± 5 %."
)
def test_memory_is_what_it_was(report: Report, claim: Trials) -> None:
    if not report.memory_before:
        pytest.skip("a worker's memory is for root's eyes only, its process is not dumpable")
    change = report.memory_after / report.memory_before - 1
    claim.trial(abs(change) < MEMORY)
    claim.detail(f"{report.memory_before / 2**20:.0f} MiB, {change:+.1%}")
