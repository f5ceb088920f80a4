"""What every demo stands on: a local platform, one real worker, and a screen for a person.

Starts them, shows how far they are, and leaves no process.
"""

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.text import Text

import client_config
import config
import gateway_config
from keys import generate_key
from local_runpod import LocalRunpod
from local_runpod_workers import Workers
from tools import demo_model

ROOT = Path(__file__).resolve().parent.parent
WORKER = (sys.executable, str(ROOT / "rp_handler.py"))
WORKER_ID = "pod-1"
LOG = ROOT / ".cache" / "demo-worker.log"
RECORD_BYTES = 100_000_000


class DemoFailed(Exception):
    """What went wrong, for the person; `log` is worth looking at where it is set."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


class Screen:
    """Steps with elapsed seconds: a spinner in a terminal, lines elsewhere."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = 100

    @contextlib.asynccontextmanager
    async def step(self, doing: str, detail: Callable[[], str] = str) -> AsyncIterator[None]:
        """Show what is being done, for how long, and where it stands."""
        began = time.monotonic()
        showing = asyncio.create_task(self._show(doing, detail, began))
        try:
            yield
        finally:
            showing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await showing
        self.console.print(f"{doing}: [green]done[/] in {time.monotonic() - began:.1f} s")

    async def _show(self, doing: str, detail: Callable[[], str], began: float) -> None:
        def line() -> Text:
            text = Text(f"{doing} … {time.monotonic() - began:.0f} s  ")
            text.append(detail(), style="dim")
            # One line; three columns are the spinner's.
            text.truncate(self.console.width - 3, overflow="ellipsis")
            return text

        if not self.console.is_terminal:
            while True:
                self.console.print(line())
                await asyncio.sleep(10)
        with self.console.status(line(), spinner="line") as status:
            while True:
                await asyncio.sleep(0.2)
                status.update(line())


def last_message(log: Path) -> str:
    """Return the newest message in the log, without time, level and logger."""
    for line in reversed(tail(log, 50)):
        if found := re.search(r"^[\d-]+ [\d:,]+ [A-Z]+ [\w.]+: (.+)", line):
            return found[1]
    return "importing vLLM"


def tail(log: Path, count: int) -> list[str]:
    """Return the last lines of a log."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line for line in lines if line.strip()][-count:]


@dataclass(frozen=True)
class Stage:
    """A platform with one worker of the demo model that takes jobs."""

    platform: LocalRunpod
    key: str
    environment: dict[str, str]
    """What a client, or a gateway, is started with."""


@contextlib.asynccontextmanager
async def stage(screen: Screen) -> AsyncIterator[Stage]:
    """Set the stage and clear it away; DemoFailed with what to look at."""
    if not (demo_model.FOLDER / "config.json").exists():
        await asyncio.to_thread(demo_model.make)
    key = generate_key()
    environment = clean_environment(os.environ)
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.unlink(missing_ok=True)
    async with LocalRunpod(record_bytes=RECORD_BYTES) as platform:
        screen.console.print(f"Local RunPod: {platform.base_url}/{platform.endpoint_id}")
        workers = Workers(
            platform=platform,
            command=["sh", "-c", 'exec "$@" >"$0" 2>&1', str(LOG), *WORKER],
            environment={
                **environment,
                "MODELS": str(demo_model.FOLDER),
                "ENCRYPTION_KEY": key,
                "ENFORCE_EAGER": "true",
                "MAX_MODEL_LEN": "2048",
                "HF_HUB_OFFLINE": "true",
            },
            restarts=0,
            grace_s=30,
        )
        living = asyncio.create_task(workers.run())
        try:
            async with screen.step("Starting the worker", lambda: last_message(LOG)):
                await until_ready(platform, living)
            screen.console.print(f"Its log: {LOG.relative_to(ROOT)}\n", style="dim")
            yield Stage(
                platform,
                key,
                {
                    **environment,
                    "RUNPOD_API_BASE": platform.base_url,
                    "RUNPOD_ENDPOINT_ID": platform.endpoint_id,
                    "RUNPOD_API_KEY": platform.api_key,
                    "ENCRYPTION_KEY": key,
                },
            )
        finally:
            workers.stop()
            async with screen.step("Stopping the worker"):
                await living
    code = living.result()
    if code:
        raise DemoFailed(f"the worker ended with exit code {code}", LOG)


def clean_environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without a person's own settings of worker, client and gateway."""
    tables = (config.SETTINGS, client_config.SETTINGS, gateway_config.SETTINGS)
    own = {setting.name for table in tables for setting in table}
    return {name: value for name, value in given.items() if name not in own}


async def until_ready(platform: LocalRunpod, living: asyncio.Task[int]) -> None:
    """Wait until the worker asks for jobs."""
    while not ((found := platform.workers.get(WORKER_ID)) and found.ready):
        if living.done():
            raise DemoFailed(f"the worker did not start (exit code {living.result()})", LOG)
        await asyncio.wait({living}, timeout=0.1)


def perform(play: Callable[[Screen], Coroutine[Any, Any, None]]) -> int:
    """Run a demo and return its exit code; what goes wrong is told."""
    # The platform's own log is not for this screen.
    logging.getLogger("local_runpod").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    errors = Console(stderr=True, highlight=False)
    try:
        asyncio.run(play(Screen()))
    except KeyboardInterrupt:
        errors.print("interrupted; nothing is left running")
        return 130
    except DemoFailed as failure:
        errors.print(f"demo: {failure}", style="red", markup=False, soft_wrap=True)
        if failure.log:
            errors.print(
                f"the worker's log, {failure.log}, ends with:", markup=False, soft_wrap=True
            )
            for line in tail(failure.log, 20):
                errors.print(f"  {line}", markup=False, soft_wrap=True)
        return 1
    return 0
