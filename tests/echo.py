"""The local platform with echo workers on the real SDK, for tests of the client's side."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from client_config import ClientSettings
from hpke import HpkePrivateKey
from keys import generate_key
from local_runpod import LocalRunpod
from local_runpod_faults import Fault
from local_runpod_queue import Job, Status
from tests.wait import until

ECHO_WORKER = Path(__file__).with_name("echo_worker.py")


class Echo:
    """A platform and its workers; `folder` is where the workers note what they did."""

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = 1,
        clock_s: float = 0,
        hpke: bool = False,
        **options: Any,
    ) -> None:
        self.key = generate_key()
        self.hpke_key = HpkePrivateKey.generate() if hpke else None
        self.folder = folder
        self.platform = LocalRunpod(record_bytes=64_000_000, **options)
        self._workers = workers
        self._clock_s = clock_s
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.platform.__enter__()
        names = [f"pod-{number}" for number in range(1, self._workers + 1)]
        for name in names:
            self.start(name)
        workers = self.platform.workers
        until(lambda: all(workers[name].ready for name in names), 60, "workers")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        self.platform.__exit__(None, None, None)

    def start(self, name: str) -> None:
        """Start a worker."""
        env = {
            **os.environ,
            **self.platform.worker_env(name),
            "ECHO_KEYS": self.key,
            "ECHO_HPKE": self.hpke_key.text if self.hpke_key else "",
            "ECHO_FOLDER": str(self.folder),
            "ECHO_CLOCK_S": str(self._clock_s),
            "RUNPOD_DEBUG_LEVEL": "ERROR",
        }
        self.processes[name] = subprocess.Popen(
            [sys.executable, str(ECHO_WORKER)], env=env, stdout=subprocess.DEVNULL
        )

    @property
    def settings(self) -> ClientSettings:
        """What a client of this platform needs."""
        platform = self.platform
        return ClientSettings(
            platform.endpoint_id,
            platform.api_key,
            self.key,
            platform.base_url,
            state_dir=self.state,
            hpke_public_key=self.hpke_key.public.text if self.hpke_key else "",
        )

    @property
    def state(self) -> Path:
        """Where clients keep the records of their jobs."""
        return self.folder / "state"

    @property
    def environ(self) -> dict[str, str]:
        """The same as variables of a process."""
        return {
            "PATH": os.environ["PATH"],
            "RUNPOD_ENDPOINT_ID": self.platform.endpoint_id,
            "RUNPOD_API_KEY": self.platform.api_key,
            "RUNPOD_API_BASE": self.platform.base_url,
            "ENCRYPTION_KEY": self.key,
            "CLIENT_STATE_DIR": str(self.state),
            **({"HPKE_PUBLIC_KEY": self.hpke_key.public.text} if self.hpke_key else {}),
        }

    @contextlib.contextmanager
    def fault(self, operation: str, **what: Any) -> Iterator[Fault]:
        """Put a fault in force; it must have struck by the end."""
        fault = self.platform.faults.add(operation, **what)
        try:
            yield fault
            assert fault.hits, "the fault never struck"
        finally:
            self.platform.faults.clear()

    @contextlib.contextmanager
    def watch(self, operation: str) -> Iterator[Fault]:
        """Count the requests of an operation in `seen`, and let them be."""
        try:
            yield self.platform.faults.add(operation, delay_s=0.0)
        finally:
            self.platform.faults.clear()

    def noted(self, name: str) -> list[str]:
        """Return the lines that workers wrote about `runs` or `cancelled`."""
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / name).read_text().split()
        return []

    def until_hanging(self, job_id: str) -> None:
        """Wait until a job of the behaviour `hang` does nothing but wait.

        Cancelled during a POST, the SDK would not tell the handler.
        """
        until(lambda: job_id in self.noted("hanging"), 10, "hanging")

    def job(self, job_id: str) -> Job:
        """Return the job of that id."""
        return self.platform.jobs[job_id]

    def until_completed(self, job_id: str) -> None:
        """Wait until the platform has heard of a job's end, which clients know before it."""
        job = self.job(job_id)
        until(lambda: job.status is Status.COMPLETED, 10, "completed")

    def last_job(self) -> Job:
        """Return the newest job."""
        return list(self.platform.jobs.values())[-1]

    def until_cancelled(self, job_id: str, *, worker_too: bool = True) -> None:
        """Wait until the platform, and the worker that ran it, have given up a job."""
        job = self.job(job_id)
        until(lambda: job.status is Status.CANCELLED, 10, "cancelled on the platform")
        if worker_too:
            until(lambda: job_id in self.noted("cancelled"), 10, "cancelled on the worker")

    @property
    def carried(self) -> bytes:
        """All bodies that crossed the platform, on both sides."""
        return b"\n".join(exchange.body for exchange in self.platform.exchanged)
