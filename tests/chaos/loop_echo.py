"""The echo worker on the worker's own job loop, which is the SDK's with its faults mended."""

import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import job_loop
import log_guard
from tests.echo_worker import handle


@contextlib.asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    """Nothing surrounds these jobs."""
    yield


if __name__ == "__main__":
    log_guard.die_with_parent_when_forked()
    job_loop.run(job_loop.Worker(handle, lifespan, lambda: False, 16))
