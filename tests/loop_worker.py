"""A worker on `job_loop`, or on the SDK's own loop, that answers without an engine.

Its arguments: a folder, its number of slots, and `mended` or `sdk`. It notes in the
folder's `notes` what happens, one line each, and does what files of the folder tell
it: with `fail-start` it fails to start, with `dead` its engine counts as dead, while
`unfit` is there it is not fit to serve, while `hold` is there jobs wait and while
`hold-start` or `hold-end` is there the start or the end does. `told` is there once it
is told to stop.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runpod
from runpod.serverless.modules import rp_scale

import job_loop
from errors import ConfigError

FOLDER = Path(sys.argv[1])


def note(*words: object) -> None:
    """Append one line for the test to read."""
    with (FOLDER / "notes").open("a") as notes:
        notes.write(" ".join(map(str, words)) + "\n")


def there(name: str) -> bool:
    """Whether the test has made that file."""
    return (FOLDER / name).exists()


async def released(hold: str) -> None:
    """Wait until that file is gone."""
    while there(hold) and not there("dead"):
        await asyncio.sleep(0.01)


async def handler(job: dict[str, Any]) -> AsyncIterator[str]:
    """Yield one chunk, wait while told to, yield another."""
    note("began", job["id"])
    try:
        yield "first"
        await released("hold")
        yield "dead" if there("dead") else "last"
        note("ended", job["id"])
    except (asyncio.CancelledError, GeneratorExit):
        note("cancelled", job["id"])
        raise


@contextlib.asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    """Stand in for the engine's start and stop."""
    note("starting")
    await released("hold-start")
    if there("fail-start"):
        raise ConfigError(["told to fail"])
    note("started")
    yield
    await released("hold-end")
    note("stopped")


def fit() -> None:
    """Stand in for what is checked before there is a loop."""
    note("checked")
    if there("unfit"):
        raise ConfigError(["told to be unfit"])


class ToldLoop(job_loop.JobLoop):
    """The product's loop, which makes the file `told` when it has been told to stop."""

    def kill_worker(self) -> None:
        super().kill_worker()
        (FOLDER / "told").touch()


class SdkLoop(rp_scale.JobScaler):  # type: ignore[misc]
    """The SDK's own loop, which says when it has stopped looking for jobs to run."""

    async def run_jobs(self, session: Any) -> None:
        await super().run_jobs(session)
        note("runs no more")


if __name__ == "__main__":
    slots = int(sys.argv[2])
    if sys.argv[3] == "sdk":
        note("started")
        rp_scale.JobScaler = SdkLoop
        runpod.serverless.start(
            {
                "handler": handler,
                "return_aggregate_stream": True,
                "concurrency_modifier": lambda _: slots,
            }
        )
        sys.exit(0)
    job_loop.JobLoop = ToldLoop  # type: ignore[misc]
    job_loop.END_S = 15  # a test waits for it
    failed = job_loop.run(
        job_loop.Worker(
            handler=handler,
            lifespan=lifespan,
            failed=lambda: there("dead"),
            max_concurrency=slots,
            fitness=[fit],
            connected=lambda: note("connected"),
        )
    )
    sys.exit(3 if failed else 0)
