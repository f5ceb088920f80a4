"""Nothing of a prompt or an answer leaves the worker in the clear: searched for, everywhere.

Canaries go in by every door, and everything that came out is searched for them. The same search
over the same worker's plaintext jobs finds them, and so it does in the log of a worker without
its guard, so it can fail.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpke import HpkePrivateKey
from local_runpod import LocalRunpod
from tests.attack import doors
from tests.attack.canaries import Words, letters, search
from tests.attack.traces import Traces, Wire
from tests.claims import FULL, Trials
from tests.wait import until
from tests.workers import WORKER, Caller, RunningWorker, Sent, starve

UNGUARDED = Path(__file__).with_name("unguarded_worker.py")


class Audited:
    """A worker with everything as talkative as it can be set, and all that it let out."""

    def __init__(
        self, worker: RunningWorker, traces: Traces, caller: Caller, keys: list[str]
    ) -> None:
        self.word = Words()
        self.worker = worker
        self.traces = traces
        self.caller = caller
        self.keys = keys

    def speak(self, kind: str) -> Sent:
        """Have it say much, with a canary in every parameter; it has begun by then."""
        body = {
            "messages": doors.messages(self.word, kind),
            "sampling_params": {
                **doors.sampling(self.word, kind),
                "max_tokens": 1500,
                "ignore_eos": True,
                "structured_outputs": {"regex": f"(\n|{self.word(f'{kind} regex')})*"},
            },
        }
        sent = self.caller.send("generate", body)
        self.caller.first_chunk(sent)
        return sent

    def search(self, kind: str, claim: Trials) -> None:
        """Search all that came out for the canaries of that kind; each is a trial."""
        words = self.word.of(kind)
        assert len(words) >= 9
        sources = self.traces.sources()
        hits = search(words, sources)
        claim.trials(len(words), len({hit.word for hit in hits}))
        places = {(hit.source.partition(" ")[0], hit.spelling) for hit in hits}
        purposes = {word: purpose for purpose, word in self.word.used.items()}
        if hits:
            claim.detail(f"{sorted({purposes[hit.word] for hit in hits})} in {sorted(places)}")
        else:
            size = sum(map(len, sources.values())) / 1e6
            claim.detail(f"{kind}: {len(words)} canaries, {len(sources)} traces of {size:.1f} MB")


@contextlib.contextmanager
def audit(folder: Path, program: Path = WORKER) -> Iterator[Audited]:
    """Start a worker of its own, with a recorder on each side of the platform."""
    hpke_key = HpkePrivateKey.generate().text
    hf_token, account_key = f"hf_{letters()}", f"rpa_{letters()}"
    with (
        LocalRunpod(hold_s=5, stream_hold_s=5, record_bytes=10**9) as platform,
        Wire(platform.port) as worker_wire,
        Wire(platform.port) as client_wire,
        RunningWorker(
            platform,
            folder,
            private=True,
            program=program,
            HF_TOKEN=hf_token,
            RUNPOD_API_KEY=account_key,
            HPKE_PRIVATE_KEY=hpke_key,
            ALLOW_WITHOUT_HPKE="true",
            RUNPOD_LOG_LEVEL="DEBUG",
            VLLM_LOGGING_LEVEL="DEBUG",
            LOG_LEVEL="DEBUG",
            ALLOW_PLAINTEXT="true",
            **worker_wire.worker_env(platform, "pod-1"),
        ) as worker,
        Caller(platform, worker.key) as caller,
    ):
        caller.http.base_url = client_wire.url(caller.http.base_url)
        traces = Traces(platform, worker.ready(), worker_wire, client_wire)
        yield Audited(worker, traces, caller, [worker.key, hpke_key, hf_token, account_key])


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Audited]:
    """One for most tests of this file."""
    with audit(tmp_path_factory.mktemp("private")) as audited:
        yield audited


def requests(word: Words, kind: str) -> Iterator[doors.Asked]:
    """Yield the requests to send: all under `make attack`, else the most telling ones."""
    yield from doors.answered(word, kind)
    yield from doors.refused(word, kind)
    if FULL:
        yield from doors.answered_too(word, kind)
        yield from doors.refused_too(word, kind)


@pytest.mark.engine
class TestWorker:
    @pytest.mark.claim(
        "leaks.nothing",
        "Nothing of a prompt, of an answer or of sampling parameters is found outside of the "
        "worker: not on the wire, in a log, a file, a command line or an environment.",
    )
    def test_nothing_that_was_sealed_is_found(self, audited: Audited, claim: Trials) -> None:
        caller, word = audited.caller, audited.word
        jobs = [caller.send(*asked) for asked in requests(word, "sealed")]
        audited.traces.look()
        answers = [caller.read(job) for job in jobs]
        assert answers[0].text == word("sealed answer")
        failed = sum(answered.end.error is not None for answered in answers)
        assert failed >= 4 and len(answers) - failed >= 5
        fernet = caller.key.simple_fernet
        for content in (
            json.dumps({"prompt": word("sealed simple"), "sampling_params": {"min_p": 9}}),
            word("sealed bare") + "\n",
        ):
            sealed = {"encrypted_input": fernet.encrypt(content.encode()).decode()}
            job = caller.submit(sealed)
            next(items for items, _ in caller.parts(job) if items)
            caller.cancel(job)
        cancelled = audited.speak("sealed")
        caller.cancel(cancelled.job_id)
        assert audited.worker.job_line(cancelled.job_id)["outcome"] == "cancelled"
        audited.search("sealed", claim)

    def test_the_same_search_finds_what_was_sent_in_plaintext(self, audited: Audited) -> None:
        caller, word = audited.caller, audited.word
        for route, body in requests(word, "plain"):
            if route == "generate":
                caller.outputs(caller.submit(body))
        words = {
            word(f"plain {purpose}")
            for purpose in ("prompt", "system", "answer", "stop", "earlier argument", "wrong")
        } | {word.used["plain seed"], word.used["plain temperature"]}
        hits = search(words, audited.traces.sources())
        for place in ("client → platform", "platform → worker", "wire 0", "wire 1"):
            found = {hit.word for hit in hits if hit.source.startswith(place)}
            assert found >= words - {word("plain answer")}, place
        # The SDK's own, at DEBUG.
        assert (word("plain answer"), "log") in {(hit.word, hit.source) for hit in hits}

    @pytest.mark.claim(
        "leaks.keys",
        "No key and no token of a worker is found on the wire, in a log, a file, a command line or "
        "an environment.",
    )
    def test_the_keys_are_in_no_trace(self, audited: Audited, claim: Trials) -> None:
        """Not even where /proc shows the environment a process was started with."""
        audited.traces.look()
        shown = audited.traces.shown
        if environ := shown.get(f"environ of {audited.worker.process.pid}"):
            assert b"MODELS=" in environ
        else:
            claim.detail("/proc shows no environment of a worker here")
        assert sum(name.startswith("cmdline") for name in shown) >= 4
        hits = search(audited.keys, audited.traces.sources())
        claim.trials(len(audited.keys), len({hit.word for hit in hits}))

    @pytest.mark.claim(
        "leaks.ends",
        "Nothing of a prompt, of an answer or of sampling parameters is found outside of the "
        "worker after it or its engine has died over them.",
    )
    def test_nothing_is_found_after_the_engine_has_crashed(
        self, audited: Audited, claim: Trials
    ) -> None:
        """The engine's worker dies under a request; vLLM then dumps what it was doing."""
        sent = audited.speak("crash")
        audited.worker.kill_child("VLLM::Worker")
        assert audited.worker.process.wait(15) == 1
        assert audited.caller.read(sent).fault["code"] == "engine_dead"
        until(lambda: not audited.worker.processes(), 10, "all its processes are gone")
        assert "this worker ends so that the platform replaces it" in audited.worker.log
        audited.search("crash", claim)


# --- under `make attack`: a worker for each of these ----------------------------------------

ONLY_FULL = pytest.mark.skipif(not FULL, reason="an engine start each: part of make attack")


def starve_engine(audited: Audited) -> None:
    """Have the engine need memory when there is none."""
    process = audited.worker.child("VLLM::Worker")
    assert process is not None
    starve(process.pid)
    ask_for_much(audited, words=1200, times=8)


def starve_worker(audited: Audited) -> None:
    """Have the worker need memory when there is none."""
    starve(audited.worker.process.pid)
    ask_for_much(audited, words=3_000_000, times=8)


def ask_for_much(audited: Audited, *, words: int, times: int) -> None:
    """Send long prompts again and again, with canaries that vLLM dumps when it dies over them."""
    prompt = f"{audited.word('ended long prompt')} " * (words // 30)
    params = {"max_tokens": 4, "stop": [audited.word("ended late stop")]}
    for _ in range(times):
        audited.caller.send("generate", {"prompt": prompt, "sampling_params": params})


ENDINGS: dict[str, Callable[[Audited], None]] = {
    "engine killed": lambda audited: audited.worker.kill_child("VLLM::EngineCore"),
    "engine out of memory": starve_engine,
    "worker out of memory": starve_worker,
    "worker killed": lambda audited: audited.worker.process.kill(),
}


@ONLY_FULL
@pytest.mark.engine
@pytest.mark.claim("leaks.ends")
@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_found_after_other_ends(ending: str, tmp_path: Path, claim: Trials) -> None:
    with audit(tmp_path) as audited:
        audited.speak("ended")
        ENDINGS[ending](audited)
        jobs = audited.traces.platform.jobs
        until(lambda: not audited.worker.processes(), 90, "all its processes are gone")
        failed = sum(job.status != "COMPLETED" for job in jobs.values())
        claim.detail(f"{ending}, {failed} of {len(jobs)} jobs failed")
        audited.search("ended", claim)


@ONLY_FULL
@pytest.mark.engine
@pytest.mark.claim("leaks.nothing")
def test_without_the_guard_the_log_tells(tmp_path: Path) -> None:
    """What vLLM dumps when its engine has no memory holds sampling parameters, in the clear."""
    with audit(tmp_path, UNGUARDED) as audited:
        starve_engine(audited)
        until(lambda: not audited.worker.processes(), 90, "all its processes are gone")
        hits = search(audited.word.of("ended"), audited.traces.sources())
        assert "log" in {hit.source for hit in hits}
