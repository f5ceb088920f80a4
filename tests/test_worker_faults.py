"""Death and pace: workers that are killed, engines that die, and answers on a clock.

Two workers of one platform, both in paced mode; what ends one comes last.
"""

import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from errors import EngineDead
from frames import Head
from local_runpod import LocalRunpod
from local_runpod_queue import Status
from tests.wait import until
from tests.workers import LONG_TEXT, SERVED, Caller, RunningWorker, Sent, saying, tokens

pytestmark = pytest.mark.engine

TICK_S = 0.1


@pytest.fixture(scope="module")
def workers(
    platform: LocalRunpod, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, RunningWorker]]:
    folder = tmp_path_factory.mktemp("workers")
    first = RunningWorker(platform, folder, "pod-1", STREAM_INTERVAL_MS="100")
    second = RunningWorker(platform, folder, "pod-2", key=first.key, STREAM_INTERVAL_MS="100")
    with first, second:
        yield {worker.name: worker.ready() for worker in (first, second)}


@pytest.fixture
def worker(workers: dict[str, RunningWorker]) -> RunningWorker:
    """The one whose key the caller has; both have the same."""
    return workers["pod-1"]


def worker_of(
    sent: Sent, platform: LocalRunpod, workers: dict[str, RunningWorker]
) -> RunningWorker:
    return workers[str(platform.jobs[sent.job_id].worker_id)]


class TestPaced:
    def test_one_chunk_of_one_size_per_tick(self, caller: Caller) -> None:
        sent = caller.send("generate", saying(LONG_TEXT))
        posted: list[float] = []
        job = caller.platform.jobs[sent.job_id]
        while not job.status.final:
            count = job.chunks_received
            if count > len(posted):
                posted += [time.monotonic()] * (count - len(posted))
            time.sleep(0.002)  # samples a clock; waits for nothing
        answered = caller.read(sent)
        assert answered.text == LONG_TEXT
        assert answered.complete
        assert {len(chunk) for chunk in answered.chunks} == {1489}
        gaps = [later - earlier for earlier, later in pairwise(posted)]
        # A busy machine is late for a tick, never early by more than it was late before.
        assert sorted(gaps)[len(gaps) // 2] == pytest.approx(TICK_S, abs=0.03)
        total_s = answered.end.timings["total_ms"] / 1000
        assert len(answered.chunks) <= total_s / TICK_S + 3

    @pytest.mark.parametrize(
        ("route", "body"),
        [
            ("generate", {"prompt": ""}),
            ("/v1/nothing", {}),
            ("worker", None),
            ("/v1/models", None),
            ("/v1/chat/completions", {"model": SERVED, "messages": []}),
        ],
    )
    def test_short_answers_and_errors_look_alike(
        self, caller: Caller, route: str, body: dict[str, object] | None
    ) -> None:
        answered = caller.ask(route, body)
        assert answered.end
        assert {len(chunk) for chunk in answered.chunks} == {1489}

    def test_refused_before_the_engine_looks_alike(self, caller: Caller) -> None:
        began = time.monotonic()
        refused = caller.ask("generate", saying("x"), audience="other")
        assert refused.fault["code"] == "wrong_audience"
        assert time.monotonic() - began >= TICK_S
        assert {len(chunk) for chunk in refused.chunks} == {1489}


def test_a_worker_that_is_killed_leaves_nothing_and_its_job_runs_again(
    platform: LocalRunpod, caller: Caller, workers: dict[str, RunningWorker]
) -> None:
    sent = caller.send("generate", saying(LONG_TEXT))
    caller.first_chunk(sent)
    worker = worker_of(sent, platform, workers)
    assert len(worker.processes()) >= 4  # itself, the SDK's ping, the engine and its worker
    shared = worker.shared_memory()
    worker.process.kill()
    worker.process.wait(10)
    until(lambda: not worker.processes(), 10, "all its processes are gone")
    assert shared
    assert not any(Path(path).exists() for path in shared)
    platform.lose(worker.name)
    answered = caller.read(sent)
    assert worker_of(sent, platform, workers) is not worker
    assert len({chunk.salt for chunk in answered.opened}) == 2
    assert answered.end.error is None
    assert answered.text == LONG_TEXT


def test_death_of_the_engine_is_told_and_ends_the_worker(
    platform: LocalRunpod, caller: Caller, workers: dict[str, RunningWorker]
) -> None:
    (worker,) = (worker for worker in workers.values() if worker.process.poll() is None)
    jobs = [caller.send("generate", tokens(1900)) for _ in range(3)]
    for job in jobs:
        caller.first_chunk(job)
    worker.kill_child()
    killed = time.monotonic()
    code = worker.process.wait(15)
    assert time.monotonic() - killed < 10
    assert code == 1
    for job in jobs:
        answered = caller.read(job)
        assert answered.fault["code"] == EngineDead().code
        assert answered.fault["status"] == 503
        # In paced mode the first chunk may have been sent before there was a first token.
        assert [e.status for e in answered.events if isinstance(e, Head)] in ([], [200])
        assert worker.job_line(job.job_id)["outcome"] == "error:engine_dead"
    until(lambda: not worker.processes(), 10, "all its processes are gone")
    late = caller.send("generate", saying("x"))
    assert platform.jobs[late.job_id].status is Status.IN_QUEUE


def test_sigterm_during_the_start_ends_it_at_once(
    platform: LocalRunpod, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("early")
    with RunningWorker(platform, folder, "pod-3") as worker:
        until(lambda: worker.child(), 240, "the engine's process")
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(20) == 0
        until(lambda: not worker.processes(), 10, "all its processes are gone")
        assert not platform.workers["pod-3"].ready
