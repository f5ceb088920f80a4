"""The job loop on the real SDK in production mode: start, jobs, stops and ends.

The engine is left out: `loop_worker.py` notes what the loop does to its jobs. What the
SDK's own loop does in the same place is shown where it differs.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from local_runpod import LocalRunpod
from local_runpod_queue import Job, Status
from tests.wait import until
from tests.workers import Caller, starve

SCRIPT = Path(__file__).with_name("loop_worker.py")


class LoopWorker:
    """One process of loop_worker.py."""

    def __init__(
        self, platform: LocalRunpod, folder: Path, *, slots: int = 4, loop: str = "mended"
    ) -> None:
        self.platform = platform
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(slots), loop],
            env={**os.environ, **platform.worker_env("pod-1"), "RUNPOD_LOG_LEVEL": "ERROR"},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def tell(self, name: str, on: bool = True) -> None:
        """Make or remove a file that steers the worker."""
        path = self.folder / name
        if on:
            path.touch()
        else:
            path.unlink()

    @property
    def notes(self) -> list[str]:
        """What it has noted."""
        path = self.folder / "notes"
        return path.read_text().splitlines() if path.exists() else []

    def noted(self, line: str, times: int = 1) -> None:
        """Wait for a line."""
        until(lambda: self.notes.count(line) >= times, 30, f"{times} x {line!r} in {self.notes}")

    def ready(self) -> Self:
        """Wait until it asks for jobs."""
        until(lambda: self.platform.workers["pod-1"].ready, 60, "ready")
        return self

    def holding(self, caller: Caller, count: int) -> list[str]:
        """Give it jobs when it is ready, and hold them once they have begun; return their ids."""
        self.ready()
        self.tell("hold")
        jobs = [caller.submit({}) for _ in range(count)]
        for job in jobs:
            self.noted(f"began {job}")
        return jobs

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def platform() -> Iterator[LocalRunpod]:
    with LocalRunpod(hold_s=3, stream_hold_s=3, record_bytes=10**6) as platform:
        yield platform


@pytest.fixture
def caller(platform: LocalRunpod) -> Iterator[Caller]:
    with Caller(platform, "A" * 43 + "=") as caller:
        yield caller


def status(platform: LocalRunpod, job_id: str) -> Status:
    return platform.jobs[job_id].status


def test_no_job_is_taken_before_the_start_is_complete(
    platform: LocalRunpod, caller: Caller, tmp_path: Path
) -> None:
    job = caller.submit({})
    (tmp_path / "hold-start").touch()
    with LoopWorker(platform, tmp_path) as worker:
        worker.noted("starting")
        assert not platform.workers["pod-1"].ready
        assert status(platform, job) is Status.IN_QUEUE
        worker.tell("hold-start", on=False)
        assert caller.outputs(job) == ["first", "last"]
        began = ["checked", "starting", "started", "connected"]
        assert worker.notes == [*began, f"began {job}", f"ended {job}"]


@pytest.mark.parametrize(
    ("fault", "check", "notes"),
    [("unfit", "fit", ["checked"]), ("fail-start", "engine_answers", ["checked", "starting"])],
)
def test_a_start_that_fails_takes_nothing_and_is_told(
    caller: Caller, platform: LocalRunpod, tmp_path: Path, fault: str, check: str, notes: list[str]
) -> None:
    job = caller.submit({})
    (tmp_path / fault).touch()
    with LoopWorker(platform, tmp_path) as worker:
        assert worker.process.wait(60) == 1
        assert worker.notes == notes
        assert not platform.workers["pod-1"].ready
    assert status(platform, job) is Status.IN_QUEUE
    told = {
        exchange.path
        for exchange in platform.exchanged
        if "status=unhealthy" in exchange.path and f"check={check}" in exchange.path
    }
    assert len(told) == 1


def test_sigterm_during_the_start_takes_nothing_and_ends_with_0(
    platform: LocalRunpod, caller: Caller, tmp_path: Path
) -> None:
    (tmp_path / "hold-start").touch()
    with LoopWorker(platform, tmp_path) as worker:
        worker.noted("starting")
        job = caller.submit({})
        worker.terminate()
        until((tmp_path / "told").exists, 30, "told to stop")
        worker.tell("hold-start", on=False)
        assert worker.process.wait(30) == 0
        assert worker.notes == ["checked", "starting", "started", "connected", "stopped"]
    assert status(platform, job) is Status.IN_QUEUE


def late_job(platform: LocalRunpod, caller: Caller, folder: Path, loop: str) -> tuple[str, int]:
    """Give a worker a job in the poll that it holds while SIGTERM reaches it."""
    with LoopWorker(platform, folder, loop=loop) as worker:
        worker.ready()
        until(lambda: platform.workers["pod-1"].polls >= 2, 30, "held polls")
        worker.terminate()
        until(lambda: not pending(worker.process.pid), 10, "the signal was handled")
        if loop == "sdk":  # it looks at the signal ten times a second
            worker.noted("runs no more")
        job = caller.submit({})
        until(lambda: status(platform, job) is not Status.IN_QUEUE, 10, "taken")
        return job, worker.process.wait(120)


def pending(pid: int) -> bool:
    """Whether SIGTERM still waits to be handled."""
    fields = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return bool(int(fields["ShdPnd"], 16) & (1 << (signal.SIGTERM - 1)))


def test_a_job_that_arrives_after_sigterm_is_answered(
    platform: LocalRunpod, caller: Caller, tmp_path: Path
) -> None:
    job, code = late_job(platform, caller, tmp_path, "mended")
    assert code == 0
    assert status(platform, job) is Status.COMPLETED
    assert caller.outputs(job) == ["first", "last"]


def test_running_jobs_finish_after_sigterm_and_no_other_is_taken(
    platform: LocalRunpod, caller: Caller, tmp_path: Path
) -> None:
    (tmp_path / "hold").touch()
    with LoopWorker(platform, tmp_path) as worker:
        worker.ready()
        jobs = [caller.submit({}) for _ in range(3)]
        for job in jobs:
            worker.noted(f"began {job}")
        worker.terminate()
        until(lambda: platform.workers["pod-1"].polls < 2, 10, "the poll for jobs has ended")
        late = caller.submit({})
        worker.tell("hold", on=False)
        assert [caller.outputs(job) for job in jobs] == [["first", "last"]] * 3
        assert worker.process.wait(30) == 0
        assert worker.notes[-1] == "stopped"
    assert status(platform, late) is Status.IN_QUEUE


def test_a_stop_is_heard_after_sigterm_too(
    platform: LocalRunpod, caller: Caller, tmp_path: Path
) -> None:
    with LoopWorker(platform, tmp_path) as worker:
        cancelled, other = worker.holding(caller, 2)
        polls = platform.faults.add("job-stop")  # which only counts
        worker.terminate()
        until((tmp_path / "told").exists, 30, "told to stop")
        until(lambda: polls.seen >= 2, 30, "a poll for stops that began after that")
        caller.cancel(cancelled)
        worker.noted(f"cancelled {cancelled}")
        worker.tell("hold", on=False)
        assert worker.process.wait(60) == 0
        assert f"ended {other}" in worker.notes


def test_a_worker_that_can_run_no_jobs_takes_none(
    platform: LocalRunpod, caller: Caller, tmp_path: Path
) -> None:
    def without_id(answer: bytes) -> bytes:
        return answer.replace(b'"id"', b'"di"')

    platform.faults.add("job-take", tamper=without_id)
    caller.submit({})
    with LoopWorker(platform, tmp_path) as worker:
        assert worker.process.wait(60) == 3


def test_death_of_the_engine_ends_running_jobs_and_takes_no_more(
    platform: LocalRunpod, caller: Caller, tmp_path: Path
) -> None:
    with LoopWorker(platform, tmp_path) as worker:
        (job,) = worker.holding(caller, 1)
        worker.tell("dead")
        assert caller.outputs(job) == ["first", "dead"]
        assert worker.process.wait(10) == 3
        late = caller.submit({})
    assert status(platform, late) is Status.IN_QUEUE


def test_a_stop_ends_one_job_only(platform: LocalRunpod, caller: Caller, tmp_path: Path) -> None:
    with LoopWorker(platform, tmp_path) as worker:
        first, second = worker.holding(caller, 2)
        until(
            lambda: all(platform.jobs[job].chunks_received for job in (first, second)),
            10,
            "first chunks",
        )
        caller.cancel(first)
        worker.noted(f"cancelled {first}")
        worker.tell("hold", on=False)
        assert caller.outputs(second) == ["first", "last"]
        assert f"cancelled {second}" not in worker.notes


def twice(platform: LocalRunpod, caller: Caller, folder: Path, loop: str) -> tuple[Any, list[str]]:
    """Deliver a job twice to the same worker, then let it end."""
    platform.faults.add("job-take", duplicate=1, nth=1)
    job = caller.submit({})
    (folder / "hold").touch()
    with LoopWorker(platform, folder, loop=loop) as worker:
        until(lambda: job in platform.workers["pod-1"].jobs, 60, "taken")
        worker.noted(f"began {job}")
        probe = caller.submit({})  # taken after the second delivery, which stood before it
        worker.noted(f"began {probe}")
        worker.tell("hold", on=False)
        outputs = caller.outputs(job)
        worker.noted(f"ended {probe}")
        return outputs, worker.notes


def test_a_job_delivered_twice_runs_once(
    platform: LocalRunpod, caller: Caller, tmp_path: Path
) -> None:
    outputs, notes = twice(platform, caller, tmp_path, "mended")
    assert outputs == ["first", "last"]
    assert sum(line.startswith("began") for line in notes) == 2


def test_slots_are_respected(platform: LocalRunpod, caller: Caller, tmp_path: Path) -> None:
    with LoopWorker(platform, tmp_path, slots=2) as worker:
        worker.ready()
        worker.tell("hold")
        jobs = [caller.submit({}) for _ in range(5)]
        until(lambda: sum(line.startswith("began") for line in worker.notes) == 2, 10, "two began")
        assert sum(platform.jobs[job].status is Status.IN_PROGRESS for job in jobs) == 2
        worker.tell("hold", on=False)
        assert [caller.outputs(job) for job in jobs] == [["first", "last"]] * 5


def polls_that_failed(
    platform: LocalRunpod, caller: Caller, folder: Path, loop: str
) -> tuple[int, list[Any]]:
    """Let every poll for jobs fail for two seconds; then give it a job."""
    with LoopWorker(platform, folder, loop=loop) as worker:
        worker.ready()
        fault = platform.faults.add("job-take", status=502)
        until(lambda: fault.hits, 10, "the first failure")
        began = time.monotonic()
        until(lambda: time.monotonic() - began > 2, 10, "two seconds")
        platform.faults.clear()
        return fault.hits, caller.outputs(caller.submit({}))


def test_a_platform_that_fails_is_asked_ever_less_often(
    platform: LocalRunpod, caller: Caller, tmp_path: Path
) -> None:
    failed, outputs = polls_that_failed(platform, caller, tmp_path, "mended")
    assert failed <= 5
    assert outputs == ["first", "last"]


def broken_posts(
    platform: LocalRunpod, caller: Caller, folder: Path, loop: str, operation: str, when: str
) -> Job:
    """Break the connection of one post of a job, and return the job when its worker has ended."""
    with LoopWorker(platform, folder, loop=loop) as worker:
        worker.ready()
        fault = platform.faults.add(operation, reset=True, when=when, nth=1)
        job = caller.submit({})
        worker.noted(f"ended {job}")
        until(lambda: fault.hits, 10, "the connection broke")
        worker.terminate()
        assert worker.process.wait(60) == 0
    return platform.jobs[job]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("operation", ["job-stream", "job-done"])
def test_what_was_posted_when_the_connection_broke_is_posted_again(
    platform: LocalRunpod, caller: Caller, tmp_path: Path, operation: str, when: str
) -> None:
    job = broken_posts(platform, caller, tmp_path, "mended", operation, when)
    assert job.status is Status.COMPLETED
    doubled = operation == "job-stream" and when == "after"
    assert caller.outputs(job.id) == ["first", "first", "last"][not doubled :]
    assert caller.status(job.id)["output"] == ["first", "last"]


def test_without_memory_for_a_job_the_worker_ends(
    platform: LocalRunpod, caller: Caller, tmp_path: Path
) -> None:
    with LoopWorker(platform, tmp_path) as worker:
        worker.ready()
        starve(worker.process.pid)
        caller.submit({"prompt": "x" * 5_000_000})
        assert worker.process.wait(30) == 3


def test_a_worker_that_has_failed_ends_even_if_its_way_out_does_not(
    platform: LocalRunpod, caller: Caller, tmp_path: Path
) -> None:
    with LoopWorker(platform, tmp_path) as worker:
        worker.ready()
        worker.tell("hold-end")
        starve(worker.process.pid)
        caller.submit({"prompt": "x" * 5_000_000})
        assert worker.process.wait(60) == -signal.SIGALRM
        assert "stopped" not in worker.notes


class TestTheSdksOwnLoop:
    """What job_loop mends is broken there: these tests would pass vacuously if it were not."""

    def test_a_job_that_arrives_after_sigterm_is_lost(
        self, platform: LocalRunpod, caller: Caller, tmp_path: Path
    ) -> None:
        job, code = late_job(platform, caller, tmp_path, "sdk")
        assert code == 0
        assert status(platform, job) is Status.IN_PROGRESS

    def test_a_platform_that_fails_is_asked_without_a_pause(
        self, platform: LocalRunpod, caller: Caller, tmp_path: Path
    ) -> None:
        failed, _ = polls_that_failed(platform, caller, tmp_path, "sdk")
        assert failed > 50

    def test_what_was_posted_when_the_connection_broke_is_lost(
        self, platform: LocalRunpod, caller: Caller, tmp_path: Path
    ) -> None:
        job = broken_posts(platform, caller, tmp_path, "sdk", "job-stream", "before")
        assert job.chunks_received == 1

    def test_a_job_whose_end_was_posted_when_the_connection_broke_has_none(
        self, platform: LocalRunpod, caller: Caller, tmp_path: Path
    ) -> None:
        job = broken_posts(platform, caller, tmp_path, "sdk", "job-done", "before")
        assert job.status is Status.IN_PROGRESS

    def test_a_job_delivered_twice_runs_twice(
        self, platform: LocalRunpod, caller: Caller, tmp_path: Path
    ) -> None:
        outputs, notes = twice(platform, caller, tmp_path, "sdk")
        assert outputs != ["first", "last"] or len(notes) > 5
