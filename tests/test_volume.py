"""Many workers that start at once on one volume: nothing repeated, nothing damaged, nobody stuck.

The workers are processes, and one of them is killed. The volume keeps no locks, as network volumes
may not: what keeps them apart is the lease alone.
"""

import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import utils
from hub_download import Patience
from model_cache import remove_orphans
from model_lease import Claim, Pace, holder_of, leases
from tests.hub import Hub
from tests.test_utils import safetensors
from tests.wait import until

ROOT = Path(utils.__file__).parent
WORKERS = 6
SHARDS = {f"model-{n}-of-4.safetensors": safetensors(400_000 + n) for n in range(1, 5)}
MODEL: dict[str, bytes] = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"vocab": "' + b"a" * 9000 + b'"}',
    **SHARDS,
}
TOTAL = sum(map(len, MODEL.values()))
LOG = logging.getLogger("utils")
PACE = Pace(heartbeat_s=0.2, stale_s=2.0)

WORKER = """
import logging, sys
from pathlib import Path
import model_lease, utils
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
cache, endpoint, name, leased = sys.argv[1:]
if leased == "no":
    model_lease.Claim.take = lambda self, **_: model_lease.Lease(None, self.holder, self._pace)
utils.resolve(
    "org/tiny",
    hub_cache=Path(cache),
    runpod_cache=Path("/nowhere"),
    endpoint=endpoint,
    worker=name,
    patience=utils.Patience(
        attempts=3, backoff_s=0.1, log_every_s=0.2, pace=model_lease.Pace(0.2, 2.0)
    ),
)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A Hub that needs two seconds for the model."""
    with Hub(bytes_per_s=200_000).serving() as hub:
        hub.add("org/tiny", MODEL)
        yield hub


@pytest.fixture(autouse=True)
def quiet_hub(hub: Hub) -> None:
    """Begin every test with nothing recorded."""
    hub.forget()


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A cache on a volume, and beside it what makes locks there do nothing."""
    (tmp_path / "sitecustomize.py").write_text(
        "import fcntl\nfcntl.flock = fcntl.lockf = lambda *_: None\n"
    )
    return tmp_path / "hub"


class Workers:
    """Processes that all want the model."""

    def __init__(
        self, volume: Path, hub: Hub, *, leased: bool = True, count: int = WORKERS
    ) -> None:
        self.volume, self.hub = volume, hub
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(volume.parent)}
        command = [sys.executable, "-W", "error", "-c", WORKER, str(volume), hub.url]
        self.processes = []
        for n in range(count):
            words = [f"w{n}", "yes" if leased else "no"]
            with (volume.parent / f"w{n}.log").open("w") as log:
                process = subprocess.Popen(
                    [*command, *words],
                    cwd=ROOT,
                    env=environ,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                self.processes.append(process)

    def holder(self) -> "subprocess.Popen[bytes] | None":
        """Return the process that holds the lease."""
        held = leases(self.volume / ".locks" / "models--org--tiny")
        pid = holder_of(held[-1]).pid if held else None
        return next((process for process in self.processes if process.pid == pid), None)

    def log(self, number: int) -> str:
        return (self.volume.parent / f"w{number}.log").read_text()

    def codes(self, timeout_s: float = 30.0) -> list[int]:
        """Wait for all of them and return their exit codes."""
        ends = time.monotonic() + timeout_s
        return [process.wait(max(0.1, ends - time.monotonic())) for process in self.processes]

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def fetched(hub: Hub) -> dict[str, int]:
    """Return how often each file was asked for."""
    return {
        file: hub.count(f"GET /cdn/*/{file}" if len(content) >= 4096 else f"GET /org/*/{file}")
        for file, content in MODEL.items()
    }


def digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}


def assert_whole(volume: Path) -> None:
    """Every file is there with its content, and nothing besides."""
    (folder,) = (volume / "models--org--tiny" / "snapshots").iterdir()
    there = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert digests(there) == digests(MODEL)
    blobs = [path.name for path in (volume / "models--org--tiny" / "blobs").iterdir()]
    assert len(blobs) == len(MODEL), "\n".join(blobs)
    assert leases(volume / ".locks" / "models--org--tiny") == []


def test_each_file_is_fetched_once_while_the_others_wait(volume: Path, hub: Hub) -> None:
    with Workers(volume, hub) as workers:
        assert workers.codes() == [0] * WORKERS
        logs = [workers.log(n) for n in range(WORKERS)]
    assert_whole(volume)
    assert fetched(hub) == dict.fromkeys(MODEL, 1)
    assert hub.count("GET /api/models/*/tree/*") == 1
    waiting = [log for log in logs if "downloads it; waiting" in log]
    assert len(waiting) >= WORKERS - 2, logs
    assert any(" % of " in log and "MB/s" in log for log in waiting), waiting


def test_without_the_lease_everybody_fetches_everything(volume: Path, hub: Hub) -> None:
    """What the test above, and those below, would see of a lease that does not work."""
    with Workers(volume, hub, leased=False) as workers:
        assert workers.codes() == [0] * WORKERS
    assert max(fetched(hub).values()) > 2


@pytest.mark.parametrize("seed", range(4))
def test_one_is_killed_at_a_random_moment(volume: Path, hub: Hub, seed: int) -> None:
    chance = random.Random(seed)
    with Workers(volume, hub) as workers:
        share = chance.random()
        until(lambda: hub.body_bytes >= share * TOTAL and workers.holder(), 20)
        # Mostly the one who downloads, sometimes one who waits.
        victim = workers.holder() if seed % 4 else chance.choice(workers.processes)
        if victim is not None:
            victim.send_signal(signal.SIGKILL)
        codes = workers.codes()
        logs = [workers.log(n) for n in range(WORKERS)]
    assert sorted(set(codes)) in ([-signal.SIGKILL, 0], [0]), logs
    assert codes.count(0) >= WORKERS - 1, logs
    assert_whole(volume)
    assert max(fetched(hub).values()) <= 2, (fetched(hub), logs)
    assert sum(fetched(hub).values()) < 2 * len(MODEL), "finished files are kept"


def test_one_that_slept_through_a_takeover_notices(volume: Path, hub: Hub) -> None:
    with Workers(volume, hub, count=3) as workers:
        until(lambda: hub.body_bytes >= TOTAL / 8, 20)
        sleeper = until(workers.holder)
        assert sleeper is not None
        os.killpg(sleeper.pid, signal.SIGSTOP)
        others = [process for process in workers.processes if process is not sleeper]
        assert [process.wait(20) for process in others] == [0, 0]
        os.killpg(sleeper.pid, signal.SIGCONT)
        assert workers.codes() == [0] * 3
        assert "another worker has taken over" in workers.log(workers.processes.index(sleeper))
    # Between the end of a file and its renaming nobody can tell whose it is: it grows old, by a
    # clock that may be ahead of ours.
    remove_orphans(volume / "models--org--tiny", time.time() + 1, 0, LOG)
    assert_whole(volume)
    assert max(fetched(hub).values()) <= 2


def test_a_worker_that_is_stopped_gives_its_lease_back(volume: Path, hub: Hub) -> None:
    job = {
        **{"models": ["org/tiny"], "hub_cache": str(volume), "endpoint": hub.url, "worker": "w"},
        **{"model_path": None, "model_dirs": [], "token": None, "offline": False},
        **{"options": {}, "gpu_memory_utilization": 0.9},
    }
    command = [sys.executable, "preparation.py"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        print(json.dumps(job), file=process.stdin, flush=True)
        until(lambda: hub.body_bytes >= TOTAL / 4, 20)
        assert leases(volume / ".locks" / "models--org--tiny")
        process.stdin.close()
        process.wait(10)
    assert leases(volume / ".locks" / "models--org--tiny") == []
    assert list(volume.rglob("*.incomplete")) == []


def test_a_holder_that_lives_but_brings_nothing_is_not_waited_for(
    volume: Path, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    claim = Claim(volume / ".locks" / "models--org--tiny", "stuck", PACE, LOG)
    stuck = claim.take()
    assert stuck is not None
    with stuck:
        began = time.monotonic()
        patience = Patience(attempts=1, stall_s=1.0, pace=PACE)
        utils.resolve("org/tiny", hub_cache=volume, endpoint=hub.url, patience=patience)
        assert time.monotonic() - began > patience.with_others_s
        until(lambda: stuck.lost)
    assert "worker stuck on" in caplog.text
    assert "brings nothing; taking over" in caplog.text
    assert_whole(volume)


def test_a_model_that_is_complete_needs_no_lease(volume: Path, hub: Hub) -> None:
    utils.resolve("org/tiny", hub_cache=volume, endpoint=hub.url)
    claim = Claim(volume / ".locks" / "models--org--tiny", "other", PACE, LOG)
    lease = claim.take()
    assert lease is not None
    with lease:
        began = time.monotonic()
        assert utils.resolve("org/tiny", hub_cache=volume, endpoint=hub.url).source == "cache"
        assert time.monotonic() - began < 1
