"""The real worker as a process, and a bare client that sees every chunk as it travelled.

`RunningWorker` is `python rp_handler.py` with the real SDK and the real engine. `Caller`
speaks SPEC.md with keys.py, crypto.py and frames.py alone and keeps what it received, which
client.py rightly hides.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx2
import psutil

from crypto import AnswerOpener, OpenedChunk, new_request, seal_request
from frames import AnswerEvent, Body, End, Event, FrameDecoder, Head, Sse, Text
from keys import Key, KeyRing, generate_key
from local_runpod import LocalRunpod
from local_runpod_faults import Fault
from protocol import Request
from tests.wait import until

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "rp_handler.py"
MODEL = ROOT / "models" / "tiny-llama"
SERVED = "tiny"
START_TIMEOUT_S = 300
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")

LONG_TEXT = " ".join(f"{number} is followed by" for number in range(40)) + " the end."
"""A text that a tiny model can be made to say, to the letter: see `saying`."""


def saying(text: str, **params: Any) -> dict[str, Any]:
    """Return a `generate` body whose only possible answer is `text`."""
    return {
        "messages": [{"role": "user", "content": "Speak."}],
        "sampling_params": {"structured_outputs": {"choice": [text]}, "temperature": 0, **params},
    }


def tokens(count: int, **params: Any) -> dict[str, Any]:
    """Return a `generate` body that is answered with exactly `count` tokens of nonsense."""
    return {
        "messages": [{"role": "user", "content": "Speak."}],
        "sampling_params": {
            "temperature": 0,
            "max_tokens": count,
            "ignore_eos": True,
            **params,
        },
    }


def start(command: Sequence[str], log: Path, **options: Any) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own; all that its processes write goes to the log."""
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **options,
        )


def starve(pid: int) -> None:
    """Let a process have no more memory than it has."""
    used_bytes = psutil.Process(pid).memory_info().vms
    resource.prlimit(pid, resource.RLIMIT_AS, (used_bytes, used_bytes))


def until_ready(
    platform: LocalRunpod, name: str, process: subprocess.Popen[bytes], log: Path
) -> None:
    """Wait until a worker asks for jobs; what fails tells the end of its log."""

    def asks() -> bool:
        code = process.poll()
        assert code is None, f"the worker ended with {code}"
        worker = platform.workers.get(name)
        return worker is not None and worker.ready

    try:
        until(asks, START_TIMEOUT_S, f"worker {name} ready")
    except AssertionError as error:
        words = log.read_text(errors="replace")[-6000:]
        raise AssertionError(f"{error}; its log ends with:\n{words}") from None


class RunningWorker:
    """One worker process of a platform; `settings` are added to its environment.

    Its folder holds its working directory and its log, and with `private` also its
    home, its temporary files and vLLM's cache. A weakened one is another `program`.
    """

    def __init__(
        self,
        platform: LocalRunpod,
        folder: Path,
        name: str = "pod-1",
        *,
        key: str | None = None,
        private: bool = False,
        program: Path = WORKER,
        **settings: str,
    ) -> None:
        self.began_s = time.time()
        self.platform = platform
        self.name = name
        self.folder = folder / name
        self.key = key or generate_key()
        self._log = self.folder / "log"
        self._shortcut: Path | None = None
        cwd = self.folder / "cwd"
        cwd.mkdir(parents=True)
        env = {
            **os.environ,
            **platform.worker_env(name),
            "MODELS": str(MODEL),
            "SERVED_MODEL_NAME": SERVED,
            "ENCRYPTION_KEY": self.key,
            "HF_HOME": str(self.folder / "hf"),
            "ENFORCE_EAGER": "true",
            "MAX_MODEL_LEN": "2048",
            "KV_CACHE_MEMORY_BYTES": "268435456",
            # Bound to a core that everything else needs too, the engine can keep it for seconds.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            **settings,
        }
        if private:
            for variable in ("HOME", "TMPDIR", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME"):
                (self.folder / variable).mkdir()
                env[variable] = str(self.folder / variable)
            # Sockets lie there too, for which the path of a test's folder may be too long.
            self._shortcut = Path(tempfile.mkdtemp(prefix="w"))
            (self._shortcut / "t").symlink_to(env["TMPDIR"])
            env["TMPDIR"] = str(self._shortcut / "t")
        self.process = start([sys.executable, str(program)], self._log, env=env, cwd=cwd)

    @property
    def log(self) -> str:
        """What all its processes have written."""
        return self._log.read_text(errors="replace")

    @property
    def raw_log(self) -> bytes:
        """The same as bytes."""
        return self._log.read_bytes()

    def ready(self) -> Self:
        """Wait until it asks for jobs."""
        until_ready(self.platform, self.name, self.process, self._log)
        return self

    def processes(self) -> list[psutil.Process]:
        """Return every process of the worker that lives, orphans included."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(process.pid) == self.process.pid and process.status() != "zombie":
                    found.append(process)
        return found

    def shared_memory(self) -> set[str]:
        """Return the files in memory that its processes share."""
        found = set()
        for process in self.processes():
            with contextlib.suppress(OSError):
                maps = Path(f"/proc/{process.pid}/maps").read_text()
                found |= {line.split()[5] for line in maps.splitlines() if "/dev/shm/psm_" in line}
        return found

    def child(self, title: str = "VLLM::EngineCore") -> psutil.Process | None:
        """Return the engine's process, or its `VLLM::Worker`, which a test may kill."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if title in " ".join(process.cmdline()):
                    return process
        return None

    def kill_child(self, title: str = "VLLM::EngineCore") -> None:
        """Kill a process of the engine, as a fault or the kernel would."""
        process = self.child(title)
        assert process is not None, [p.name() for p in self.processes()]
        process.kill()

    def stop(self, timeout_s: float = 60) -> int:
        """Drain, send SIGTERM and return the exit code."""
        self.platform.drain(self.name)
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """End every process of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)
        self.platform.lose(self.name)
        if self._shortcut:
            shutil.rmtree(self._shortcut, ignore_errors=True)

    def job_line(self, job_id: str) -> dict[str, str]:
        """Wait for the log line of a job and return its fields."""

        def find() -> dict[str, str] | None:
            for line in self.log.splitlines():
                _, mark, rest = line.partition("worker: job=" + job_id + " ")
                if mark:
                    return dict(item.split("=", 1) for item in rest.split())
            return None

        return until(lambda: find() or {}, 10, f"the log line of job {job_id}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@dataclass
class Sent:
    """A job on its way."""

    job_id: str
    request: Request
    key: Key


@dataclass
class Answered:
    """What came back of a sealed job."""

    status: str
    error: str | None
    chunks: list[str]
    arrived_s: list[float]
    opened: list[OpenedChunk]
    events: list[AnswerEvent] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text of choice 0, or the body, or all server-sent events."""
        pieces: list[bytes] = []
        for event in self.events:
            if isinstance(event, Text) and event.index == 0:
                pieces.append(event.delta.encode())
            elif isinstance(event, Body):
                pieces.append(event.data)
            elif isinstance(event, Sse):
                pieces.append(event.data + b"\n\n")
        return b"".join(pieces).decode()

    @property
    def head(self) -> Head:
        """How it began."""
        assert isinstance(self.events[0], Head), self.events
        return self.events[0]

    @property
    def end(self) -> End:
        """Its authenticated end; fails without."""
        assert self.status == "COMPLETED", (self.status, self.error)
        assert self.opened[-1].final
        assert isinstance(self.events[-1], End), self.events
        return self.events[-1]

    @property
    def fault(self) -> dict[str, Any]:
        """The error that its end carries."""
        assert self.end.error is not None, self.text
        return self.end.error

    @property
    def details(self) -> dict[str, Any]:
        """All EVENT objects in one."""
        found: dict[str, Any] = {}
        for event in self.events:
            if isinstance(event, Event):
                found |= event.data
        return found

    def json(self) -> Any:
        """Return the body."""
        return json.loads(self.text)

    def sse(self) -> list[Any]:
        """Return the server-sent events' JSON; the last must be `[DONE]`."""
        lines = [event.data for event in self.events if isinstance(event, Sse)]
        assert lines[-1] == b"data: [DONE]"
        return [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]

    @property
    def complete(self) -> bool:
        """Whether every chunk arrived exactly once and in order, up to the final one."""
        numbers = [chunk.seq for chunk in self.opened]
        return numbers == list(range(len(numbers))) and self.opened[-1].final


class Caller:
    """A bare client of one platform."""

    def __init__(self, platform: LocalRunpod, key: str) -> None:
        self.platform = platform
        self.key = KeyRing.parse(key).first
        self.http = httpx2.Client(
            base_url=f"{platform.base_url}/{platform.endpoint_id}",
            headers={"Authorization": f"Bearer {platform.api_key}"},
            timeout=60,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def submit(self, job_input: Any) -> str:
        """Queue a job of any input and return its id."""
        # Escaped, so that a lone surrogate gets as far as the worker.
        answer = self.http.post("/run", content=json.dumps({"input": job_input}))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def send(
        self,
        route: str,
        body: Mapping[str, Any] | bytes | None,
        *,
        request: Request | None = None,
        key: Key | None = None,
        **options: Any,
    ) -> Sent:
        """Seal a request and queue it; `request` sends that one (again)."""
        if request is None:
            content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            options = {
                "audience": self.platform.endpoint_id,
                "ttl_s": 600,
                "method": "GET" if body is None else "POST",
                **options,
            }
            request = new_request(route, content, **options)
        key = key or self.key
        return Sent(self.submit({"sealed": seal_request(request, key)}), request, key)

    def parts(self, job_id: str, timeout_s: float = 90) -> Iterator[tuple[list[Any], str]]:
        """Yield what `/stream` gives, and the job's status, until it is over."""
        until_s = time.monotonic() + timeout_s
        while True:
            answer = self.http.get(f"/stream/{job_id}").json()
            yield [item["output"] for item in answer["stream"]], answer["status"]
            if answer["status"] in OVER and not answer["stream"]:
                return
            if answer["status"] in OVER:
                continue
            assert time.monotonic() < until_s, f"job {job_id} is still {answer['status']}"

    def outputs(self, job_id: str, timeout_s: float = 90) -> list[Any]:
        """Return all that a job streamed."""
        return [item for items, _ in self.parts(job_id, timeout_s) for item in items]

    def status(self, job_id: str) -> dict[str, Any]:
        """Return `/status`."""
        answer: dict[str, Any] = self.http.get(f"/status/{job_id}").json()
        return answer

    def cancel(self, job_id: str) -> None:
        self.http.post(f"/cancel/{job_id}")

    def read(self, sent: Sent, timeout_s: float = 90) -> Answered:
        """Return the answer: every chunk opened, and the events of the last attempt."""
        opener = AnswerOpener(sent.request, sent.key)
        chunks: list[str] = []
        arrived_s: list[float] = []
        status = "IN_QUEUE"
        for items, now in self.parts(sent.job_id, timeout_s):
            status = now
            chunks += items
            arrived_s += [time.monotonic()] * len(items)
        error = self.status(sent.job_id).get("error")
        opened = [opener.open(chunk) for chunk in chunks]
        answered = Answered(status, error, chunks, arrived_s, opened)
        last = [chunk for chunk in opened if chunk.salt == opened[-1].salt]
        by_number = {chunk.seq: chunk for chunk in reversed(last)}
        if sorted(by_number) == list(range(len(by_number))):
            decoder = FrameDecoder()
            for _, chunk in sorted(by_number.items()):
                answered.events += decoder.feed(chunk.payload)
        return answered

    def ask(self, route: str, body: Mapping[str, Any] | bytes | None, **options: Any) -> Answered:
        """Send and read."""
        return self.read(self.send(route, body, **options))

    def first_chunk(self, sent: Sent) -> None:
        """Wait until the worker has posted the first chunk of a job; consumes nothing."""
        until(
            lambda: self.platform.jobs[sent.job_id].chunks_received,
            60,
            f"first chunk of {sent.job_id}",
        )

    @contextlib.contextmanager
    def fault(self, operation: str, **what: Any) -> Iterator[Fault]:
        """Put a fault in force; it must have struck by the end."""
        fault = self.platform.faults.add(operation, **what)
        try:
            yield fault
            assert fault.hits, "the fault never struck"
        finally:
            self.platform.faults.active.remove(fault)
