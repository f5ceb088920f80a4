"""What holds for every test."""

import functools
import logging
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

from local_runpod import LocalRunpod
from tests.workers import ROOT, Caller, RunningWorker

pytest_plugins = ["tests.claims"]

# Many tests interrupt what they start. Where interrupts are ignored, as a shell has it in the
# background, everything that is started would ignore them too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class OneEngineAtATime(LoadScopeScheduling):  # type: ignore[misc]
    """Where two processes share the tests, one has all files with engines, the other all the rest.

    Two engines at a time would be slower than one after the other. (By marks, xdist 3.8 cannot part
    tests with pytest 9.2.)
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "engine" if _needs_engine(file) else file


@functools.cache
def _needs_engine(file: str) -> bool:
    return "mark.engine" in (ROOT / file).read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneEngineAtATime:
    """Tell xdist how to share the tests."""
    return OneEngineAtATime(config, log)


@pytest.fixture(autouse=True)
def usual_root_logger() -> None:
    """Undo what a dependency of vLLM does when a test imports it: it silences the root logger."""
    logging.getLogger().setLevel(logging.WARNING)


@pytest.fixture(scope="module")
def platform() -> Iterator[LocalRunpod]:
    """Return the platform that the workers of a file are started on."""
    with LocalRunpod(hold_s=5, stream_hold_s=5, record_bytes=20_000_000) as platform:
        yield platform


@pytest.fixture
def caller(platform: LocalRunpod, worker: RunningWorker) -> Iterator[Caller]:
    """Return a client of the file's `worker`; faults that were put in force end with it."""
    with Caller(platform, worker.key) as caller:
        yield caller
    platform.faults.clear()
