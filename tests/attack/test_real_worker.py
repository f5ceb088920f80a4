"""The same mutated requests on the real thing: a worker process, the real SDK, the real engine."""

import time
from collections.abc import Iterator

import psutil
import pytest

from crypto import seal_request
from errors import Rejected
from local_runpod import LocalRunpod
from tests.attack.mutator import Mutator
from tests.attack.test_fuzz import CANARY
from tests.claims import FULL, Trials
from tests.workers import Caller, RunningWorker, saying

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not FULL, reason="`make attack` does this; elsewhere `test_worker` does"),
]

AT_ONCE = 50
MIB = 1 << 20


@pytest.fixture(scope="module")
def worker(
    platform: LocalRunpod, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningWorker]:
    folder = tmp_path_factory.mktemp("attacked")
    with RunningWorker(platform, folder, LOG_LEVEL="DEBUG") as worker:
        yield worker.ready()


@pytest.mark.claim(
    "fuzz.worker",
    "The real worker rejects mutated requests by the one text, answers others meanwhile to the "
    "letter, and is none the larger for it.",
)
def test_a_worker_under_attack(worker: RunningWorker, caller: Caller, claim: Trials) -> None:
    seed = int(time.time())
    mutator, tried, failures = Mutator(seed), 0, 0
    claim.detail(f"seed {seed}")
    sent = caller.send("generate", saying(CANARY))
    assert caller.read(sent).text == CANARY
    simple = caller.key.simple_fernet.encrypt(b'{"prompt":"x"}').decode()
    known = [("sealed", seal_request(sent.request, sent.key)), ("encrypted_input", simple)]
    process = psutil.Process(worker.process.pid)
    before_bytes = 0
    for round_number in range(20):
        # Only texts: what is no object, or too deep, platform and SDK turn away by themselves.
        picked = (mutator.choice(known) for _ in range(AT_ONCE))
        wrong = [(form, mutator.text(text)) for form, text in picked]
        jobs = [caller.submit({form: text}) for form, text in wrong if (form, text) not in known]
        failures += caller.ask("generate", saying("meanwhile")).text != "meanwhile"
        for job in jobs:
            outputs = caller.outputs(job)
            tried += 1
            failures += bool(outputs) or caller.status(job).get("error") != Rejected.TEXT
        if round_number == 4:
            before_bytes = process.memory_info().rss
    grown_bytes = process.memory_info().rss - before_bytes
    claim.detail(f"{grown_bytes / MIB:.1f} MiB more after 750 of them")
    failures += grown_bytes > 20 * MIB
    failures += "a job failed" in worker.log or CANARY in worker.log
    claim.trials(tried, failures)
