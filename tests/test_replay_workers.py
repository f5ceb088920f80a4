"""Two workers, the real SDK and a real Redis: what one has answered, and what one leaves behind.

The engine is an echo: it has no part in this.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keys import generate_key
from local_runpod import LocalRunpod
from replay_store import LEASE_S
from tests.redis_server import PASSWORD, RedisServer
from tests.wait import until
from tests.workers import Caller, Sent

PROGRAM = Path(__file__).with_name("store_worker.py")
SHORT = {"prompt": "said once"}
LONG_TEXT = " ".join(str(number) for number in range(60))


class House:
    """A platform, a store and as many workers as a test starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = generate_key()
        self.platform = LocalRunpod(hold_s=5, stream_hold_s=5)
        self.store = RedisServer(folder)
        self.workers: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        env = {
            **os.environ,
            **self.platform.worker_env(name),
            "ENCRYPTION_KEY": f"laptop={self.key}",
            "MODELS": "echo",
            "HF_HOME": str(self.folder),
            "REPLAY_REDIS_URL": self.store.url,
        }
        with (self.folder / f"{name}.log").open("wb") as log:
            self.workers[name] = subprocess.Popen(
                [sys.executable, str(PROGRAM)], env=env, stdout=log, stderr=log
            )

    def ready(self, *names: str) -> None:
        for name in names:
            self.start(name)
        workers = self.platform.workers
        until(lambda: all(workers[name].ready for name in names), 60, "the workers")

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def worker_of(self, sent: Sent) -> str:
        return str(self.platform.jobs[sent.job_id].worker_id)

    def until_answered(self) -> None:
        """Wait until the store knows of no request that still runs."""
        until(lambda: set(self.store.marks().values()) == {b"answered"}, 10, "the marks")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("store"))
    with house.platform, house.store:
        house.ready("pod-1", "pod-2")
        yield house
        for worker in house.workers.values():
            worker.kill()
            worker.wait()


@pytest.fixture
def caller(house: House) -> Iterator[Caller]:
    with Caller(house.platform, house.key) as caller:
        yield caller


@pytest.mark.claim("requests.shared_replay")
def test_what_one_worker_answered_the_other_one_refuses(house: House, caller: Caller) -> None:
    first = caller.send("generate", SHORT)
    assert caller.read(first).text == SHORT["prompt"]
    house.until_answered()
    told: dict[str, str] = {}

    def both() -> bool:
        again = caller.send("", None, request=first.request)
        fault = caller.read(again).fault
        assert (fault["code"], fault["status"]) == ("replayed", 409)
        told[house.worker_of(again)] = fault["message"]
        return len(told) == 2

    until(both, 60, "both workers have been asked")
    elsewhere = {name for name, message in told.items() if "another worker" in message}
    assert elsewhere == told.keys() - {house.worker_of(first)}


def test_while_the_store_is_gone_requests_are_refused_and_then_run(
    house: House, caller: Caller
) -> None:
    house.store.stop()
    try:
        sent = caller.send("generate", SHORT)
        fault = caller.read(sent).fault
        assert (fault["code"], fault["status"]) == ("replay_store_unavailable", 503)
    finally:
        house.store.start()
    assert caller.ask("", None, request=sent.request).text == SHORT["prompt"]
    assert "the replay store is not available" in house.log(house.worker_of(sent))


@pytest.mark.claim("requests.retry")
def test_a_platforms_retry_after_a_worker_was_killed_is_answered(
    house: House, caller: Caller
) -> None:
    sent = caller.send("generate", {"prompt": LONG_TEXT})
    caller.first_chunk(sent)
    killed = house.worker_of(sent)
    house.workers[killed].kill()
    house.workers[killed].wait()
    began = time.monotonic()
    house.platform.lose(killed)
    answered = caller.read(sent)
    took_s = time.monotonic() - began
    assert answered.text == LONG_TEXT
    assert len({chunk.salt for chunk in answered.opened}) == 2
    assert answered.end.error is None
    assert house.worker_of(sent) != killed
    assert took_s < LEASE_S + 15
    house.until_answered()
    (left,) = house.workers.keys() - {killed}
    assert caller.ask("", None, request=sent.request).fault["code"] == "replayed"
    assert house.worker_of(sent) == left


def test_a_worker_that_is_told_to_stop_tells_what_it_answered(house: House, caller: Caller) -> None:
    (name,) = (name for name, worker in house.workers.items() if worker.poll() is None)
    sent = caller.send("generate", {"prompt": LONG_TEXT})
    caller.first_chunk(sent)
    house.platform.drain(name)
    house.workers[name].send_signal(signal.SIGTERM)
    assert caller.read(sent).text == LONG_TEXT
    assert house.workers[name].wait(20) == 0
    assert set(house.store.marks().values()) == {b"answered"}
    assert PASSWORD not in house.log(name) and PASSWORD.replace(" ", "%20") not in house.log(name)
    house.ready("pod-3")
    assert caller.ask("", None, request=sent.request).fault["code"] == "replayed"
