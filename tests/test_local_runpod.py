"""The local platform, held against real SDK workers and plain HTTP clients."""

import asyncio
import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import local_runpod_http
from local_runpod import LocalRunpod
from local_runpod_faults import Fault
from tests.wait import until

ROOT = Path(__file__).parent.parent
WORKER = str(ROOT / "tests" / "runpod_worker.py")
MARKER = "zebra-in-the-clear"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")


class Client:
    """A client of the REST API; paths are relative to the endpoint."""

    def __init__(self, base_url: str, api_key: str, endpoint_id: str = "local") -> None:
        parts = urlsplit(base_url)
        self.host, self.port = parts.hostname, parts.port
        self.path = f"{parts.path}/{endpoint_id}"
        self.headers = {"Authorization": f"Bearer {api_key}"}

    def raw(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, str, bytes]:
        """Return status, content type and body of the answer."""
        path = path if path.startswith("/control") else self.path + path
        connection = http.client.HTTPConnection(str(self.host), self.port, timeout=30)
        try:
            connection.request(method, path, body, {**self.headers, **headers})
            answer = connection.getresponse()
            return answer.status, answer.getheader("Content-Type", ""), answer.read()
        finally:
            connection.close()

    def __call__(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        status, _, answer = self.raw(method, path, data)
        return status, json.loads(answer) if answer else None

    def run(self, policy: dict[str, int] | None = None, **given: Any) -> str:
        """Submit a job and return its id."""
        body = {"input": given} | ({"policy": policy} if policy else {})
        status, answer = self("POST", "/run", body)
        assert status == 200, answer
        assert answer["status"] == "IN_QUEUE"
        return str(answer["id"])

    def read(self, job_id: str) -> tuple[str, list[Any]]:
        """Read the stream to its end; return the final status and all outputs."""
        outputs = []
        while True:
            status, answer = self("GET", f"/stream/{job_id}")
            assert status == 200, answer
            outputs += [chunk["output"] for chunk in answer["stream"]]
            if answer["status"] in OVER:
                return answer["status"], outputs


def start_worker(
    platform: LocalRunpod, worker_id: str, notes: Path, slots: int = 8
) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **platform.worker_env(worker_id), "RUNPOD_LOG_LEVEL": "ERROR"}
    command = [sys.executable, WORKER, str(notes), str(slots)]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def texts(n: int, text: str = "") -> list[str]:
    return [f"{i} {text}" for i in range(n)]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("echo") / "notes"
    path.touch()
    return path


@pytest.fixture(scope="module")
def shared(notes: Path) -> Iterator[LocalRunpod]:
    """A platform with one worker of eight slots."""
    with LocalRunpod(allow_faults=True, record_bytes=100_000_000) as platform:
        worker = start_worker(platform, "pod-1", notes)
        try:
            until(lambda: platform.workers["pod-1"].ready or worker.poll(), 60, "worker ready")
            yield platform
            platform.drain("pod-1")
            worker.terminate()
            assert worker.wait(15) == 0
        finally:
            kill(worker)


@pytest.fixture
def platform(shared: LocalRunpod) -> Iterator[LocalRunpod]:
    yield shared
    shared.faults.clear()


@pytest.fixture
def client(platform: LocalRunpod) -> Client:
    return Client(platform.base_url, platform.api_key)


@pytest.fixture
def alone() -> Iterator[LocalRunpod]:
    """A platform without a worker, with short times."""
    with LocalRunpod(hold_s=5, stream_hold_s=0, gone_after_s=0.2, kept_s=600) as platform:
        yield platform


def worker_call(
    platform: LocalRunpod, method: str, operation: str, *ids: str, body: bytes | None = None
) -> tuple[int, Any]:
    """Do what the SDK of a worker does, by hand."""
    client = Client(platform.base_url, "")
    path = f"/{operation}/{'/'.join(ids)}?key={platform.worker_key}&job_in_progress=0"
    status, _, answer = client.raw(method, path, body)
    return status, json.loads(answer) if answer else None


def take(platform: LocalRunpod, worker_id: str) -> Any:
    status, job = worker_call(platform, "GET", "job-take", worker_id)
    assert status == 200
    return job


def poll(platform: LocalRunpod, worker_id: str, receive_bytes: int = 0) -> socket.socket:
    """Leave a held job-take poll on a connection of its own."""
    peer = socket.socket()
    if receive_bytes:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    peer.connect((platform.host, platform.port))
    path = f"/v2/local/job-take/{worker_id}?key={platform.worker_key}&"
    peer.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return peer


# -- jobs on a real worker -------------------------------------------------------------------


def test_chunks_are_readable_while_the_job_runs(platform: LocalRunpod, client: Client) -> None:
    job_id = client.run(n=3, text=MARKER, delay_s=0.2)
    status, answer = client("GET", f"/stream/{job_id}")
    assert (status, answer["status"]) == (200, "IN_PROGRESS")
    first = [chunk["output"] for chunk in answer["stream"]]
    assert first == texts(1, MARKER)
    assert client.read(job_id) == ("COMPLETED", texts(3, MARKER)[1:])
    assert client("GET", f"/stream/{job_id}")[1] == {"status": "COMPLETED", "stream": []}
    _, view = client("GET", f"/status/{job_id}")
    assert view["output"] == texts(3, MARKER)
    assert view["executionTime"] >= 600
    assert view["delayTime"] >= 0
    job = platform.jobs[job_id]
    assert (job.chunks_received, job.chunks_delivered, job.attempts) == (3, 3, 1)


def test_runsync_answers_with_the_output_or_with_what_is_known(client: Client) -> None:
    _, view = client("POST", "/runsync", {"input": {"n": 2}})
    assert (view["status"], view["output"]) == ("COMPLETED", texts(2))
    assert view["id"].startswith("sync-")
    _, view = client("POST", "/runsync?wait=1000", {"input": {"delay_s": 1.5}})
    assert view["status"] == "IN_PROGRESS"
    assert client.read(view["id"]) == ("COMPLETED", texts(1))


def test_jobs_fill_the_slots_of_one_worker(platform: LocalRunpod, client: Client) -> None:
    ids = [client.run(text=str(i), delay_s=1.5) for i in range(8)]
    # The SDK counts a job that it queued twice, so some slots may stay empty for a second.
    until(lambda: client("GET", "/health")[1]["jobs"]["inProgress"] >= 6, what="in progress")
    assert client("GET", "/health")[1]["workers"]["running"] == 1
    for i, job_id in enumerate(ids):
        assert client.read(job_id) == ("COMPLETED", texts(1, str(i)))
    batches = [e for e in platform.exchanged if "/job-take-batch/" in e.path]
    assert any(e.direction == "platform → worker" and e.body.startswith(b"[") for e in batches)


def test_cancel_stops_the_handler(client: Client, notes: Path) -> None:
    job_id = client.run(n=1000, delay_s=0.05)
    until(lambda: client("GET", f"/stream/{job_id}")[1]["stream"])
    assert client("POST", f"/cancel/{job_id}")[1] == {"id": job_id, "status": "CANCELLED"}
    until(lambda: f"cancelled {job_id}" in notes.read_text(), what="handler cancelled")
    assert client("GET", f"/status/{job_id}")[1]["status"] == "CANCELLED"
    assert client.read(job_id)[0] == "CANCELLED"


def test_execution_timeout_stops_the_handler(client: Client, notes: Path) -> None:
    job_id = client.run({"executionTimeout": 300}, n=1000, delay_s=0.05)
    assert client.read(job_id)[0] == "TIMED_OUT"
    until(lambda: f"cancelled {job_id}" in notes.read_text(), what="handler cancelled")
    assert "timeout" in client("GET", f"/status/{job_id}")[1]["error"]


def test_failed_job_can_be_retried(platform: LocalRunpod, client: Client) -> None:
    job_id = client.run(fail=True)
    assert client.read(job_id) == ("FAILED", [])
    assert "told to fail" in client("GET", f"/status/{job_id}")[1]["error"]
    retried = client("GET", "/health")[1]["jobs"]["retried"]
    assert client("POST", f"/retry/{job_id}")[1] == {"id": job_id, "status": "IN_QUEUE"}
    assert client.read(job_id)[0] == "FAILED"
    assert client("GET", "/health")[1]["jobs"]["retried"] == retried + 1
    done = client.run()
    assert client.read(done)[0] == "COMPLETED"
    assert client("POST", f"/retry/{done}")[0] == 400


def test_openai_route(client: Client) -> None:
    body = {"messages": [], "stream": False}
    status, answer = client("POST", "/openai/v1/chat/completions", body)
    assert (status, answer) == (200, {"route": "/v1/chat/completions", "body": body})
    assert client("GET", "/openai/v1/models") == (200, {"route": "/v1/models", "body": None})
    status, kind, raw = client.raw("POST", "/openai/v1/chat/completions", b'{"stream": true}')
    assert (status, kind) == (200, "text/event-stream")
    assert raw == b'data: {"a": 1}\n\ndata: [DONE]\n\n'


def test_pings_arrive(shared: LocalRunpod) -> None:
    assert until(lambda: shared.workers["pod-1"].pings) >= 1


def test_record_holds_both_directions_and_no_keys(platform: LocalRunpod, client: Client) -> None:
    client.read(client.run(n=1, text=MARKER))
    entries = [e for e in platform.exchanged if MARKER.encode() in e.body]
    assert {e.direction for e in entries} >= {
        "client → platform",
        "platform → worker",
        "worker → platform",
        "platform → client",
    }
    everything = b"".join(e.path.encode() + e.body for e in platform.exchanged)
    assert platform.worker_key.encode() not in everything
    assert platform.api_key.encode() not in everything
    assert platform.exchanged_lost == 0


def test_log_never_holds_content(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        job_id = client.run(n=1, text=MARKER)
        client.read(job_id)
    assert job_id in caplog.text
    assert MARKER not in caplog.text


# -- faults ----------------------------------------------------------------------------------


def test_delay_on_every_chunk(platform: LocalRunpod, client: Client) -> None:
    fault = platform.faults.add("job-stream", delay_s=0.05)
    started_s = time.monotonic()
    assert client.read(client.run(n=6)) == ("COMPLETED", texts(6))
    assert time.monotonic() - started_s >= 0.3
    assert fault.hits == 6


@pytest.mark.parametrize(
    ("fault", "outputs"),
    [
        ({"reset": True, "when": "before"}, [0, 2]),
        ({"reset": True, "when": "after"}, [0, 1, 2]),
        ({"status": 400}, [0, 2]),
        ({"duplicate": 1}, [0, 1, 1, 2]),
        ({"drop": True}, [0, 2]),
        ({"reorder": True}, [0, 2, 1]),
    ],
)
def test_fault_on_the_second_chunk(
    platform: LocalRunpod, client: Client, fault: dict[str, Any], outputs: list[int]
) -> None:
    platform.faults.add("job-stream", nth=2, **fault)
    assert client.read(client.run(n=3)) == ("COMPLETED", [f"{i} " for i in outputs])


def test_sdk_repeats_a_chunk_after_a_server_error(platform: LocalRunpod, client: Client) -> None:
    lost, doubled = client.run(n=2, delay_s=0.5), client.run(n=2, delay_s=0.5)
    platform.faults.add("job-stream", job_id=lost, nth=1, status=500)
    platform.faults.add("job-stream", job_id=doubled, nth=1, status=500, when="after")
    assert client.read(lost) == ("COMPLETED", ["0 ", "1 "])
    assert client.read(doubled) == ("COMPLETED", ["0 ", "0 ", "1 "])


def test_tampering_with_chunks(platform: LocalRunpod, client: Client) -> None:
    platform.faults.add("job-stream", tamper=lambda body: body.replace(b"good", b"evil"))
    assert client.read(client.run(text="good"))[1] == ["0 evil"]
    platform.faults.clear()
    platform.faults.add("stream", tamper=lambda body: body.replace(b"good", b"evil"))
    assert client.read(client.run(text="good"))[1] == ["0 evil"]


def test_job_delivered_twice(platform: LocalRunpod, client: Client, notes: Path) -> None:
    platform.faults.add("job-take", nth=1, duplicate=1)
    # Both the poll that is held now and the next are already past the point where faults strike.
    client.read(client.run())
    job_id = client.run(delay_s=0.5)
    began = f"began {job_id}"
    until(lambda: notes.read_text().count(began) == 2, what="handed out twice")
    assert client.read(job_id)[0] == "COMPLETED"


def test_faults_on_the_client_side(platform: LocalRunpod, client: Client) -> None:
    platform.faults.add("run", nth=1, status=429)
    assert client("POST", "/run", {"input": {}})[0] == 429
    platform.faults.add("status", nth=1, reset=True)
    job_id = client.run()
    with pytest.raises(ConnectionError):
        client("GET", f"/status/{job_id}")
    assert client("GET", f"/status/{job_id}")[0] == 200
    client.read(job_id)


def test_lost_job_done_leaves_the_job_in_progress(platform: LocalRunpod, client: Client) -> None:
    fault = platform.faults.add("job-done", nth=1, drop=True)
    job_id = client.run()
    until(lambda: fault.hits)
    assert platform.jobs[job_id].status == "IN_PROGRESS"
    client("POST", f"/cancel/{job_id}")


def test_faults_over_http(platform: LocalRunpod, client: Client) -> None:
    fault = {"operation": "health", "status": 503, "count": 1}
    status, answer = client("POST", "/control/faults", fault)
    assert (status, answer["faults"][0]["status"]) == (200, 503)
    assert client("GET", "/health")[0] == 503
    assert client("GET", "/health")[0] == 200
    assert client("GET", "/control/faults")[1]["faults"][0]["hits"] == 1
    assert client("DELETE", "/control/faults")[1] == {"faults": []}
    bodies: list[Any] = [
        {"operation": "nothing"},
        {"operation": "run", "what": 1},
        {"operation": "run", "status": "500"},
        {"operation": "run", "drop": True},
        {"operation": "run", "when": "later"},
        [],
    ]
    for bad in bodies:
        assert client("POST", "/control/faults", bad)[0] == 400
    assert Client(platform.base_url, "wrong").raw("GET", "/control/faults")[0] == 401


def test_probability_is_reproducible() -> None:
    def strikes(seed: int) -> list[bool]:
        fault = Fault(operation="run", probability=0.5, seed=seed)
        return [fault.strikes("run", None, None) for _ in range(50)]

    assert strikes(1) == strikes(1) != strikes(2)
    assert 10 < sum(strikes(1)) < 40


# -- what clients may send -------------------------------------------------------------------


def test_keys_and_unknown_paths(platform: LocalRunpod, client: Client) -> None:
    assert Client(platform.base_url, "wrong")("GET", "/health")[0] == 401
    assert Client(platform.base_url, platform.api_key, "other")("GET", "/health")[0] == 404
    assert client("GET", "/status/none")[0] == 404
    assert client("POST", "/cancel/none")[0] == 404
    assert client("GET", "/stream/none")[0] == 404
    assert client("GET", "/nothing")[0] == 404
    assert client("GET", "/job-take/pod-1?key=wrong")[0] == 401


def test_control_is_off_unless_asked_for(alone: LocalRunpod) -> None:
    client = Client(alone.base_url, alone.api_key)
    assert client("GET", "/control/faults")[0] == 404


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"input": 1}',
        b'{"input": {"x": NaN}}',
        b'{"input": {}, "policy": 1}',
        b'{"input": {}, "policy": {"ttl": 0}}',
        b'{"input": {}, "webhook": "http://x"}',
        b'{"input": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    ],
)
def test_malformed_bodies(client: Client, body: bytes) -> None:
    status, _, answer = client.raw("POST", "/run", body)
    assert status == 400
    assert json.loads(answer)["error"]


def test_body_limits(alone: LocalRunpod) -> None:
    client = Client(alone.base_url, alone.api_key)

    def body(size: int) -> bytes:
        return b'{"input": {"x": "' + b"x" * (size - 20) + b'"}}'

    assert len(body(1000)) == 1000
    assert client.raw("POST", "/run", body(10_000_000))[0] == 200
    assert client.raw("POST", "/run", body(10_000_001))[0] == 413
    assert client.raw("POST", "/runsync?wait=1000", body(10_000_001))[0] == 200
    assert client.raw("POST", "/runsync", body(20_000_001))[0] == 413
    job_id = take(alone, "w")["id"]
    chunk = b'{"output": "' + b"x" * 999_986 + b'"}'
    assert worker_call(alone, "POST", "job-stream", "w", job_id, body=chunk)[0] == 200
    assert worker_call(alone, "POST", "job-stream", "w", job_id, body=chunk + b" ")[0] == 413


def test_purge_and_health(alone: LocalRunpod) -> None:
    client = Client(alone.base_url, alone.api_key)
    alone.worker_env("pod-1")
    running = client.run()
    take(alone, "w")
    waiting = [client.run(), client.run()]
    assert client("GET", "/health")[1] == {
        "jobs": {"completed": 0, "failed": 0, "inProgress": 1, "inQueue": 2, "retried": 0},
        "workers": {
            "idle": 0,
            "initializing": 1,
            "ready": 1,
            "running": 1,
            "throttled": 0,
            "unhealthy": 0,
        },
    }
    assert client("POST", "/purge-queue")[1] == {"removed": 2, "status": "completed"}
    assert [client("GET", f"/status/{j}")[1]["status"] for j in waiting] == ["CANCELLED"] * 2
    assert client("GET", f"/status/{running}")[1]["status"] == "IN_PROGRESS"


def test_results_and_jobs_expire() -> None:
    with LocalRunpod(kept_s=0.1) as platform:
        client = Client(platform.base_url, platform.api_key)
        done = client.run()
        take(platform, "w")
        worker_call(platform, "POST", "job-done", "w", done, body=b'{"output": 1}')
        until(lambda: client("GET", f"/status/{done}")[0] == 404, what="result dropped")
        old = client.run({"ttl": 100})
        until(lambda: client("GET", f"/status/{old}")[0] == 404, what="job expired")


def test_stream_without_holding_answers_at_once(alone: LocalRunpod) -> None:
    client = Client(alone.base_url, alone.api_key)
    assert client("GET", f"/stream/{client.run()}")[1] == {"status": "IN_QUEUE", "stream": []}


def test_stream_reader_that_left_consumes_nothing(platform: LocalRunpod, client: Client) -> None:
    job_id = client.run(delay_s=0.3)
    reader = http.client.HTTPConnection(str(client.host), client.port)
    reader.request("GET", f"{client.path}/stream/{job_id}", headers=client.headers)
    until(lambda: platform.jobs[job_id].status == "IN_PROGRESS")
    reader.close()
    assert client.read(job_id) == ("COMPLETED", texts(1))


# -- workers that come and go ----------------------------------------------------------------


def test_empty_poll_is_answered_204() -> None:
    with LocalRunpod(hold_s=0.05) as platform:
        assert worker_call(platform, "GET", "job-take", "w") == (204, None)
        assert worker_call(platform, "GET", "job-take-batch", "w") == (204, None)
        assert worker_call(platform, "GET", "job-stop", "w") == (204, None)


def test_poll_that_closed_swallows_no_job(alone: LocalRunpod) -> None:
    client = Client(alone.base_url, alone.api_key)
    for n in range(20):
        peer = poll(alone, f"ghost-{n}")
        until(lambda: sum(worker.polls for worker in alone.workers.values()) == 1)
        peer.close()
        job_id = client.run()
        assert take(alone, "w")["id"] == job_id
        assert alone.jobs[job_id].attempts == 1


def swallowed() -> bool:
    """Let a poll's client and a job cross in the same turn of the event loop."""

    async def cross() -> bool:
        async with LocalRunpod() as platform:
            peer = await asyncio.to_thread(poll, platform, "ghost")
            await asyncio.to_thread(until, lambda: any(w.polls for w in platform.workers.values()))
            peer.close()
            job = platform._queue.submit({}, prefix="", execution_timeout_s=60, ttl_s=60, kept_s=60)
            await asyncio.sleep(0.1)
            return job.status != "IN_QUEUE" or job.attempts != 0

    return asyncio.run(cross())


def test_poll_that_closes_as_the_job_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not swallowed()
    monkeypatch.setattr(local_runpod_http, "_present", lambda request: True)
    assert swallowed()


def test_job_whose_hand_over_breaks_off_is_queued_again(alone: LocalRunpod) -> None:
    client = Client(alone.base_url, alone.api_key)
    peer = poll(alone, "ghost", receive_bytes=4096)
    job_id = client.run(x="x" * 9_000_000)
    until(lambda: alone.jobs[job_id].status == "IN_PROGRESS")
    peer.recv(1000)
    peer.close()
    until(lambda: alone.jobs[job_id].status == "IN_QUEUE", what="queued again")
    assert take(alone, "w")["id"] == job_id
    assert alone.jobs[job_id].attempts == 1


def test_job_survives_its_worker_and_fails_after_the_last_retry(alone: LocalRunpod) -> None:
    client = Client(alone.base_url, alone.api_key)
    job_id = client.run()
    for n in range(4):
        take(alone, f"w{n}")
        worker_call(alone, "POST", "job-stream", f"w{n}", job_id, body=b'{"output": 1}')
        alone.lose(f"w{n}")
    until(lambda: alone.jobs[job_id].status == "FAILED")
    assert client("GET", "/health")[1]["jobs"] == {
        "completed": 0,
        "failed": 1,
        "inProgress": 0,
        "inQueue": 0,
        "retried": 3,
    }
    assert "lost its worker 4 times" in client("GET", f"/status/{job_id}")[1]["error"]


def test_silent_worker_is_taken_as_gone() -> None:
    with LocalRunpod(silent_after_s=0.2) as platform:
        job_id = Client(platform.base_url, platform.api_key).run()
        take(platform, "w")
        until(lambda: platform.jobs[job_id].status == "IN_QUEUE", what="queued again")


def test_job_of_a_killed_worker_moves_to_another(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with LocalRunpod(gone_after_s=0.3, stream_hold_s=1) as platform:
        client = Client(platform.base_url, platform.api_key)
        worker = start_worker(platform, "pod-1", notes)
        try:
            job_id = client.run(n=1000, delay_s=0.1)
            until(lambda: platform.jobs[job_id].chunks, 60, "first chunk")
            # Only the worker: its ping process goes on, and must not keep it alive.
            os.kill(worker.pid, signal.SIGKILL)
            until(lambda: platform.jobs[job_id].status == "IN_QUEUE", what="queued again")
            assert client("GET", "/health")[1]["workers"]["unhealthy"] == 1
            assert take(platform, "pod-2")["id"] == job_id
            done = worker_call(platform, "POST", "job-done", "pod-2", job_id, body=b'{"output":1}')
            assert done[0] == 200
            assert client.read(job_id)[0] == "COMPLETED"
            assert platform.jobs[job_id].attempts == 2
        finally:
            kill(worker)


# -- the command -----------------------------------------------------------------------------


def processes_with(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_text())
        except OSError:
            continue
    return found


def start_command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "local_runpod.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "RUNPOD_LOG_LEVEL": "ERROR", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_command_serves_and_leaves_nothing_behind(tmp_path: Path) -> None:
    endpoint = f"e{os.getpid()}"
    worker = [sys.executable, WORKER, str(tmp_path / "notes"), "2"]
    platform = start_command(
        "--endpoint", endpoint, "--workers", "2", "--", *worker, RUNPOD_API_KEY="a-key-of-mine"
    )
    try:
        assert platform.stdout
        client = Client(platform.stdout.readline().strip(), "a-key-of-mine", endpoint)
        until(lambda: client("GET", "/health")[1]["workers"]["ready"] == 2, 60, "workers ready")
        job_id = client.run(n=3, delay_s=0.5)
        until(lambda: client("GET", f"/status/{job_id}")[1]["status"] == "IN_PROGRESS")
        assert len(processes_with(f"RUNPOD_ENDPOINT_ID={endpoint}")) >= 2
        platform.send_signal(signal.SIGTERM)
        assert client.read(job_id) == ("COMPLETED", texts(3))
        _, errors = platform.communicate(timeout=20)
        assert platform.returncode == 0, errors
        assert "a-key-of-mine" not in errors
        assert not processes_with(f"RUNPOD_ENDPOINT_ID={endpoint}")
    finally:
        if platform.returncode is None:
            platform.kill()
            platform.communicate()


def test_command_restarts_a_worker_and_gives_up() -> None:
    platform = start_command("--restarts", "1", "--", sys.executable, "-c", "raise SystemExit(7)")
    _, errors = platform.communicate(timeout=20)
    assert platform.returncode == 7
    assert errors.count("started, pid") == 2
    assert "export RUNPOD_API_KEY=" in errors


@pytest.mark.parametrize("command", [["/nowhere/to/be/found"], []])
def test_command_without_a_working_command(command: list[str]) -> None:
    platform = start_command("--restarts", "0", "--", *command)
    assert platform.stdout
    assert platform.stdout.readline().startswith("http://127.0.0.1:")
    if not command:
        platform.send_signal(signal.SIGTERM)
    platform.communicate(timeout=20)
    assert platform.returncode == (127 if command else 0)
