"""Makes the models ready in a process of its own, while this one imports vLLM.

Imported, this file is the worker's side: it starts the child, passes on what that tells the log,
and waits for the models. Run as a script, it is the child: `utils.resolve` for every model, for
those that may be loaded also whether they fit, for the first one then the page cache. Importing
vLLM takes seconds in which disk and network would do nothing; a process, because a thread would
share the interpreter with the import and could not be ended.

Knows nothing of vLLM, and of settings only what it is given. What the child needs, the Hub's token
among it, comes on its standard input; its messages are lines of JSON on its standard output.
"""

import contextlib
import dataclasses
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import engine_adapters
import errors
import log_guard
import machine_memory
import model_fit
import model_prefetch
import process_hygiene
import utils
from errors import ModelError
from readiness import Facts, Readiness, timed
from utils import Snapshot

log = logging.getLogger("worker.models")

_ORDERLY_END_S = 2.0


@dataclass(frozen=True)
class Job:
    """What the child is asked to make ready; the first model is the one that will be loaded."""

    models: Sequence[str]
    hub_cache: str
    model_path: str | None = None
    model_dirs: Sequence[str] = ()
    token: str | None = dataclasses.field(default=None, repr=False)
    endpoint: str | None = None
    offline: bool = False
    worker: str = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gpu_memory_utilization: float = 1.0
    may_swap: bool = False
    """Whether the models after the first may be loaded too, in its place."""


class Preparation:
    """The child process and what it has told so far."""

    def __init__(self, job: Job, readiness: Readiness) -> None:
        """Start the child; it ends with this process."""
        self._readiness = readiness
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._child = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._input = cast(IO[str], self._child.stdin)
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(dataclasses.asdict(job)), file=self._input, flush=True)
        self._models = len(job.models)
        self._reader = threading.Thread(target=self._read, args=(self._child.stdout,), daemon=True)
        self._reader.start()

    def _read(self, lines: IO[str]) -> None:
        try:
            for line in lines:
                message = json.loads(line)
                if "log" in message:
                    log.log(message["level"], "%s", message["log"])
                elif "phase" in message:
                    self._readiness.add(*message["phase"])
                else:
                    self._messages.put(message)
        finally:
            lines.close()
            self._messages.put(None)

    def snapshots(self) -> list[Snapshot]:
        """Wait until every model is whole and return them in order; ModelError if one cannot be.

        The child goes on reading the first one's weights into the page cache.
        """
        found: list[Snapshot] = []
        while len(found) < self._models:
            message = self._messages.get()
            if message is None:
                raise ModelError(
                    f"the process that makes the models ready ended with {self._child.wait()}; "
                    "the log above says why"
                )
            if "error" in message:
                raise getattr(errors, message["error"])(message["message"])
            snapshot = message["snapshot"]
            found.append(Snapshot(**{**snapshot, "path": Path(snapshot["path"])}))
        return found

    def finish(self) -> None:
        """End the child, whatever it still reads, and take in what it has told."""
        # Not by closing its input: an engine core that was forked meanwhile holds that, too.
        self._child.terminate()
        self._reader.join()
        self._child.wait()
        with contextlib.suppress(BrokenPipeError):
            self._input.close()


# --- the child ------------------------------------------------------------------------------


class _Channel(logging.Handler):
    """Sends messages, and as a logging handler what is logged, to the worker."""

    def __init__(self, file: IO[str]) -> None:
        super().__init__()
        self._file = file
        self._lock = threading.Lock()

    def say(self, **message: Any) -> None:
        with self._lock, contextlib.suppress(BrokenPipeError):
            print(json.dumps(message), file=self._file, flush=True)

    def emit(self, record: logging.LogRecord) -> None:
        self.say(log=record.getMessage(), level=record.levelno)

    def timed(self, name: str) -> AbstractContextManager[Facts]:
        """Time a phase for the worker's record."""
        return timed(name, lambda *phase: self.say(phase=phase))


def _prepare(job: Mapping[str, Any], channel: _Channel) -> None:
    told = logging.getLogger("worker.models")
    told.addHandler(channel)
    told.setLevel(logging.INFO)
    told.propagate = False
    base, fit = None, None
    memory = machine_memory.here()
    for number, model in enumerate(job["models"]):
        try:
            snapshot = utils.resolve(
                model,
                hub_cache=Path(job["hub_cache"]),
                model_path=Path(job["model_path"]) if job["model_path"] and not number else None,
                model_dirs=[Path(folder) for folder in job["model_dirs"]],
                token=job["token"],
                endpoint=job["endpoint"],
                offline=job["offline"],
                worker=job["worker"],
                log=told,
                timed=channel.timed,
            )
            loadable = base is None or job["may_swap"]
            if loadable and not engine_adapters.is_adapter(snapshot.path):
                found = model_fit.check(
                    snapshot.path,
                    snapshot.name,
                    job["options"],
                    job["gpu_memory_utilization"],
                    told,
                    memory,
                )
                if base is None:
                    base, fit = snapshot, found
        except ModelError as error:
            channel.say(error=type(error).__name__, message=str(error))
            return
        channel.say(snapshot={**dataclasses.asdict(snapshot), "path": str(snapshot.path)})
    if base is None:
        return
    # No lease is held any more: the worker need not wait for an orderly end.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with channel.timed("prefetch") as facts:
        done = model_prefetch.prefetch(
            base.path,
            reserve_bytes=model_fit.host_bytes(fit, memory),
            load_format=job["options"].get("LOAD_FORMAT", "auto"),
            log=told,
        )
        facts["bytes"] = done.bytes


def _end_with_worker() -> None:
    sys.stdin.read()
    # The orderly end stops a download and gives back its lease; nothing may hold up the worker's.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORDERLY_END_S)
    os._exit(1)


def _child() -> None:
    process_hygiene.seal_off()
    log_guard.install_in_child()
    job = json.loads(sys.stdin.readline())
    channel = _Channel(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)  # what libraries print must not mix with the messages
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_end_with_worker, daemon=True).start()
    _prepare(job, channel)
    os._exit(0)


if __name__ == "__main__":
    _child()
