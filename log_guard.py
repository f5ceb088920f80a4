"""Keeps prompts and answers out of logs and tracebacks of this process and vLLM's.

Owns the filter that every log record of vLLM passes (`vllm_logging.json` names it,
so vLLM's child processes install it too) and the hooks for uncaught exceptions.
A record may say where something happened and of what type it was, never with what text.
"""

import contextlib
import contextvars
import logging
import os
import signal
import sys
import threading
import traceback
from ctypes import CDLL
from types import TracebackType
from typing import Any

# What handles what people write, or reports other people's exceptions: the text of these
# records is not for logs.
_HANDLES_CONTENT = (
    "asyncio",
    "jinja2",
    "outlines",
    "py.warnings",
    "transformers",
    "xgrammar",
    "vllm.entrypoints",
    "vllm.inputs",
    "vllm.logging_utils.dump_input",
    "vllm.multimodal",
    "vllm.parser",
    "vllm.reasoning",
    "vllm.renderers",
    "vllm.sampling_params",
    "vllm.tokenizers",
    "vllm.tool_parsers",
    "vllm.v1.engine.detokenizer",
    "vllm.v1.engine.input_processor",
    "vllm.v1.structured_output",
)

_PR_SET_PDEATHSIG = 1
_libc: Any = CDLL(None)


current_job: contextvars.ContextVar[str] = contextvars.ContextVar("job", default="")
"""What the lines are marked with that are logged while a job is worked on, such as `key=…`."""


class JobFilter(logging.Filter):
    """Gives each record `job`, which says for which job and key it was written."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.job = f" [{job}]" if (job := current_job.get()) else ""
        return True


class ContentFilter(logging.Filter):
    """Lets through what cannot hold content; of the rest, place and type only."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.INFO:
            return False
        if record.name.startswith(_HANDLES_CONTENT):
            if record.levelno < logging.WARNING:
                return False
            record.msg, record.args = "(text withheld)", None
        elif isinstance(record.args, tuple):
            record.args = tuple(map(_harmless, record.args))
        # Before the first request an exception says why the engine does not start.
        if record.exc_info and "failed to start" not in str(record.msg):
            kind, _, trace = record.exc_info
            record.msg = f"{record.msg} [{describe(kind, trace)}]"
            record.exc_info = record.exc_text = None
        return True


def _harmless(value: object) -> object:
    return type(value).__name__ if isinstance(value, BaseException) else value


def describe(kind: type[BaseException] | None, trace: TracebackType | None) -> str:
    """Return an exception's type and the places it came through, without its message."""
    places = [
        f"{os.path.basename(frame.filename)}:{frame.lineno}"
        for frame in traceback.extract_tb(trace)
    ]
    return f"{kind.__name__ if kind else 'exception'} at {' > '.join(places) or '?'}"


def install() -> None:
    """Guard this process: hooks and root logger; children die with it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s%(job)s")
    )
    handler.addFilter(ContentFilter())
    handler.addFilter(JobFilter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # A dependency of vLLM's application raises the root logger's level when it is imported.
    logging.getLogger("worker").setLevel(logging.INFO)
    logging.captureWarnings(True)
    for noisy in ("httpx", "httpx2", "httpcore", "httpcore2", "urllib3", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    guard_exceptions()
    # A worker that is killed must not leave a child that goes on telling the platform it lives.
    die_with_parent_when_forked()


def install_in_child() -> None:
    """Guard a process that was not forked but started anew; it dies with the one that did so."""
    guard_exceptions()
    die_with_parent()


def guard_exceptions() -> None:
    """Replace every hook that would print an uncaught exception's message."""

    def report(kind: type[BaseException] | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"uncaught {describe(kind, trace)}\n")

    sys.excepthook = lambda kind, _, trace: report(kind, trace)
    sys.unraisablehook = lambda info: report(info.exc_type, info.exc_traceback)
    threading.excepthook = lambda info: report(info.exc_type, info.exc_traceback)

    def print_exc(*_: object, **__: object) -> None:
        kind, _error, trace = sys.exc_info()
        report(kind, trace)

    traceback.print_exc = print_exc  # what multiprocessing prints of a child's exception


def die_with_parent_when_forked() -> None:
    """Let every process that this one forks from now on die with it."""
    parent = 0

    def remember() -> None:
        nonlocal parent
        parent = os.getpid()

    def follow() -> None:
        die_with_parent()
        # One that was killed before the kernel knew of the wish leaves an orphan without it.
        if os.getppid() != parent:
            os._exit(1)

    os.register_at_fork(before=remember, after_in_child=follow)


def die_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it is gone."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
