"""The whole worker's bounds, its traces on the machine, and its end when its engine is stuck.

One worker; what ends it comes last.
"""

import contextlib
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from errors import EngineDead
from hpke import HpkePrivateKey
from local_runpod import LocalRunpod
from tests.test_process_hygiene import look
from tests.wait import until
from tests.workers import SERVED, Caller, RunningWorker, saying, tokens

pytestmark = pytest.mark.engine

STUCK_S = 10
HF_TOKEN = "hf_" + secrets.token_hex(20)
HPKE_KEY = HpkePrivateKey.generate()
USER = [{"role": "user", "content": "Speak."}]


@pytest.fixture(scope="module")
def worker(
    platform: LocalRunpod, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningWorker]:
    folder = tmp_path_factory.mktemp("bounds")
    with RunningWorker(
        platform,
        folder,
        private=True,
        HF_TOKEN=HF_TOKEN,
        HPKE_PRIVATE_KEY=HPKE_KEY.text,
        ALLOW_WITHOUT_HPKE="true",
        RUNPOD_API_KEY="rpa_" + HF_TOKEN,
        MAX_NUM_SEQS="8",
        MAX_REQUEST_BYTES="20000",
        ENGINE_STUCK_S=str(STUCK_S),
    ) as worker:
        yield worker.ready()


def test_nothing_is_compiled_while_others_wait(worker: RunningWorker, caller: Caller) -> None:
    assert caller.ask("generate", tokens(2, temperature=1, logprobs=3)).complete
    assert not list(worker.folder.rglob("*.so"))


@pytest.mark.claim(
    "bounds.requests", "What asks for more than a bound is refused, with the number, on any route."
)
class TestBounds:
    def test_too_many_choices_are_refused_in_each_routes_own_form(self, caller: Caller) -> None:
        for route, more in (
            ("/v1/chat/completions", {"messages": USER}),
            ("/v1/chat/completions", {"messages": USER, "stream": True}),
            ("/v1/completions", {"prompt": "x"}),
        ):
            answered = caller.ask(route, {"model": SERVED, "n": 1000, **more})
            assert answered.head.status == 400
            error = answered.json()["error"]
            assert error["param"] == "n"
            assert "is 1000" in error["message"]
            assert "at most 4 choices" in error["message"]
            assert answered.end.usage is None  # the engine was not asked
        body = saying("x")
        body["sampling_params"]["n"] = 1000
        assert caller.ask("generate", body).fault["param"] == "n"
        assert caller.ask("generate", tokens(3, n=4, temperature=1)).end.error is None

    def test_a_body_that_is_too_long_is_refused_on_every_route(self, caller: Caller) -> None:
        for route in ("/v1/chat/completions", "/v1/responses", "/tokenize", "/v1/models"):
            answered = caller.ask(route, {"model": SERVED, "x": "a" * 20_000})
            assert answered.head.status == 413
            error = answered.json()["error"]
            assert error["code"] == "request_too_large"
            assert "at most 20000 (MAX_REQUEST_BYTES)" in error["message"]
        assert caller.ask("generate", {"prompt": "a" * 20_000}).fault["status"] == 413
        anthropic = caller.ask("/v1/messages", {"model": SERVED, "x": "a" * 20_000})
        assert anthropic.json()["type"] == "error"


@pytest.mark.claim(
    "hygiene.processes",
    "No process of a worker shows a secret in its environment, leaves a core file, or lets others "
    "look into its memory.",
)
def test_no_process_can_be_looked_into_or_was_given_a_secret(
    caller: Caller, worker: RunningWorker, platform: LocalRunpod
) -> None:
    caller.ask("generate", saying("x"))
    # The platform's key stands in its addresses, too: those of RunPod hold none.
    hidden = [f"={worker.key}", HPKE_KEY.text, HF_TOKEN, f"RUNPOD_AI_API_KEY={platform.worker_key}"]
    titles = []
    for process in worker.processes():
        title = " ".join(process.cmdline())
        titles.append(title)
        folder = Path(f"/proc/{process.pid}")
        with contextlib.suppress(PermissionError):  # what nobody may read shows nothing
            environ = (folder / "environ").read_bytes()
            assert not any(value.encode() in environ for value in hidden), title
        limits = (folder / "limits").read_text()
        assert "Max core file size        0                    0 " in limits
        if "resource_tracker" not in title:  # Python's own, which holds nothing
            assert look(process.pid) == "environ refused\nmaps refused\n", title
    assert len(titles) >= 4, titles


def test_sockets_and_temporary_files_lie_in_one_folder(worker: RunningWorker) -> None:
    (folder,) = (worker.folder / "TMPDIR").iterdir()
    assert any(path.is_socket() for path in folder.iterdir())


@pytest.mark.claim("bounds.stuck")
def test_an_engine_that_is_stuck_is_told_and_ends_the_worker(
    platform: LocalRunpod, caller: Caller, worker: RunningWorker
) -> None:
    jobs = [
        caller.send("generate", tokens(1900)),
        caller.send("/v1/chat/completions", {"messages": USER, "max_tokens": 1900, "stream": True}),
    ]
    for job in jobs:
        caller.first_chunk(job)
    engine = worker.child()
    assert engine is not None
    engine.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert worker.process.wait(6 * STUCK_S) == 1
    assert time.monotonic() - stopped >= 0.9 * STUCK_S
    for job in jobs:
        answered = caller.read(job)
        assert answered.fault["code"] == EngineDead().code
        assert answered.fault["status"] == 503
        assert worker.job_line(job.job_id)["outcome"] == "error:engine_dead"
    assert f"has taken no step for {STUCK_S} s with work waiting (ENGINE_STUCK_S)" in worker.log
    until(lambda: not worker.processes(), 10, "all its processes are gone")
    assert not list((worker.folder / "TMPDIR").iterdir())
    assert not list((worker.folder / "hf" / "sealed-vllm" / "failing").iterdir())
