"""`make demo`: one sealed prompt on this machine, and what the platform saw of it.

Starts the local platform and the real worker with the demo model, sends a prompt with the
command `client.py`, shows the answer as it arrives and then, side by side, what the person read
and what the platform carried. Searches the carried bytes for the text, and leaves no process.
"""

import argparse
import asyncio
import base64
import codecs
import contextlib
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import client_config
import config
from crypto import AnswerOpener, KeyRing, RequestOpener, generate_key
from frames import AnswerEvent, FrameDecoder
from frames import Text as TextFrame
from local_runpod import LocalRunpod
from local_runpod_http import Exchange
from local_runpod_workers import Workers
from protocol import MAX_TTL_S
from tools import demo_model

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Explain in three sentences why the sky is blue."
MAX_TOKENS = 120
WORKER = (sys.executable, str(ROOT / "rp_handler.py"))
WORKER_ID = "pod-1"
LOG = ROOT / ".cache" / "demo-worker.log"
RECORD_BYTES = 100_000_000
WINDOW = 8
"""Characters of the text that are searched for at a time; fewer could turn up by chance."""

LOG_WINDOW = 24
"""The same for the log, whose own words are English too."""

SHOWN_CHUNKS = 6


class DemoFailed(Exception):
    """What went wrong, for the person; `log` is worth looking at where it is set."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


# --- what is said on the screen ---------------------------------------------------------------


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


# --- what is looked for in the carried bytes ----------------------------------------------------


def spellings(text: str) -> Iterator[str]:
    """Yield the ways in which carried bytes could spell `text` in the clear."""
    yield text
    yield json.dumps(text)[1:-1]
    for shift in range(3):
        padded = base64.b64encode(b"\0" * shift + text.encode()).decode()
        # What depends on the bytes before and after the text is left out.
        yield padded[4 if shift else 0 :].rstrip("=")[:-1]


def pieces(text: str, window: int = WINDOW) -> set[bytes]:
    """Return every piece of `window` characters of every spelling of `text`."""
    return {
        spelt[start : start + window].encode()
        for spelt in spellings(text)
        for start in range(len(spelt) - window + 1)
    }


def count_found(text: str, carried: bytes, window: int = WINDOW) -> int:
    """Return how many pieces of `text` the carried bytes hold."""
    return sum(piece in carried for piece in pieces(text, window))


# --- the demo -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """What the client printed, and when."""

    text: str
    note: str
    first_text_s: float


def clean_environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without a person's own settings of worker and client."""
    own = {setting.name for setting in (*config.SETTINGS, *client_config.SETTINGS)}
    return {name: value for name, value in given.items() if name not in own}


async def run(prompt: str, screen: Screen) -> None:
    """Run the demo; DemoFailed with what to look at."""
    if not (demo_model.FOLDER / "config.json").exists():
        await asyncio.to_thread(demo_model.make)
    key = generate_key()
    environment = clean_environment(os.environ)
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.unlink(missing_ok=True)
    async with LocalRunpod(record_bytes=RECORD_BYTES) as platform:
        say = screen.console.print
        say(f"Local RunPod: {platform.base_url}/{platform.endpoint_id}")
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
            say(f"Its log: {LOG.relative_to(ROOT)}\n", style="dim")
            say(f"[bold]$ python client.py {json.dumps(prompt)}[/]")
            told = await ask(
                prompt,
                {
                    **environment,
                    "RUNPOD_API_BASE": platform.base_url,
                    "RUNPOD_ENDPOINT_ID": platform.endpoint_id,
                    "RUNPOD_API_KEY": platform.api_key,
                    "ENCRYPTION_KEY": key,
                },
            )
            say()
            if platform.exchanged_lost:
                raise DemoFailed("more was carried than the demo remembers; use a shorter prompt")
            exchanged = platform.exchanged
            show_both_sides(screen.console, prompt, key, exchanged)
            show_search(screen.console, prompt, told, exchanged)
            show_times(screen.console, told)
        finally:
            workers.stop()
            async with screen.step("Stopping the worker"):
                await living
    code = living.result()
    if code:
        raise DemoFailed(f"the worker ended with exit code {code}", LOG)


async def until_ready(platform: LocalRunpod, living: asyncio.Task[int]) -> None:
    """Wait until the worker asks for jobs."""
    while not ((found := platform.workers.get(WORKER_ID)) and found.ready):
        if living.done():
            raise DemoFailed(f"the worker did not start (exit code {living.result()})", LOG)
        await asyncio.wait({living}, timeout=0.1)


async def ask(prompt: str, environment: dict[str, str]) -> Told:
    """Run client.py and pass on what it prints as it prints it."""
    options = ["-u", "-o", "temperature", "0", "-o", "max_tokens", str(MAX_TOKENS)]
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROOT / "client.py"),
        prompt,
        *options,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # Ctrl-C is passed on below, once.
        start_new_session=True,
    )
    assert process.stdout and process.stderr
    errors = asyncio.create_task(process.stderr.read())
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, first_s = "", 0.0
    try:
        while data := await process.stdout.read(4096):
            first_s = first_s or time.monotonic() - began
            delta = decoder.decode(data)
            text += delta
            sys.stdout.write(delta)
            sys.stdout.flush()
        code = await process.wait()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            await process.wait()
        note = (await errors).decode(errors="replace")
    if code:
        raise DemoFailed(f"client.py ended with exit code {code}:\n{note}", LOG)
    return Told(text.removesuffix("\n"), note, first_s)


def show_both_sides(console: Console, prompt: str, key: str, exchanged: list[Exchange]) -> None:
    """Print what the person read beside what the platform carried for it.

    The pairs are found by opening the carried bytes with the key, as worker and client do.
    """
    keys = KeyRing.parse(key)
    request = next(body(each)["input"]["sealed"] for each in exchanged if "/run" in each.path)
    opened = RequestOpener(keys, "local", max_ttl_s=MAX_TTL_S).open(request)
    chunks = [
        body(each)["output"]
        for each in exchanged
        if each.direction == "worker → platform" and "/job-stream/" in each.path
    ]
    opener, decoder = AnswerOpener(opened.request, keys.first), FrameDecoder()
    rows = [(chunk, text_of(decoder.feed(opener.open(chunk).payload))) for chunk in chunks]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("what you saw", ratio=2, overflow="fold")
    table.add_column("what the platform saw", ratio=3, no_wrap=True, overflow="ellipsis")
    table.add_column("characters", justify="right")
    excerpt = console.width // 2

    def add(read: Text, sealed: str) -> None:
        # The first 40 characters are version, key id or salt, and a constant.
        table.add_row(read, Text(f"{sealed[:8]}…{sealed[48 : 48 + excerpt]}"), f"{len(sealed):,}")

    add(Text(prompt, style="bold"), request)
    table.add_section()
    shown = rows if len(rows) <= SHOWN_CHUNKS + 1 else [*rows[: SHOWN_CHUNKS - 1], rows[-1]]
    for number, (chunk, text) in enumerate(shown):
        if number == len(shown) - 1 and len(shown) < len(rows):
            left = len(rows) - len(shown)
            sizes = sorted({len(chunk) for chunk, _ in rows})
            table.add_row(
                Text("…", style="dim"),
                Text(f"… {left} more chunks", style="dim"),
                Text(" or ".join(f"{size:,}" for size in sizes), style="dim"),
            )
        add(Text(json.dumps(text, ensure_ascii=False)) if text else Text("(the end)"), chunk)
    console.print(table)


def body(exchange: Exchange) -> Any:
    """Return the decoded body."""
    return json.loads(exchange.body)


def text_of(events: list[AnswerEvent]) -> str:
    """Return the text that frames carry."""
    return "".join(event.delta for event in events if isinstance(event, TextFrame))


def show_search(console: Console, prompt: str, told: Told, exchanged: list[Exchange]) -> None:
    """Search everything that was carried, and the worker's log, for the text; say what was found.

    DemoFailed if anything was.
    """
    carried = b"\n".join(each.path.encode() + b"\n" + each.body for each in exchanged)
    log = LOG.read_bytes()
    wanted = len(pieces(prompt) | pieces(told.text))
    console.print(
        f"\nSearched all {len(carried):,} bytes that the platform carried for {wanted:,} pieces of "
        f"prompt and answer,\nas plain text, as JSON and as base64, and the worker's log too:"
    )
    for place, where, window in (("platform", carried, WINDOW), ("log", log, LOG_WINDOW)):
        for what, text in (("prompt", prompt), ("answer", told.text)):
            if found := count_found(text, where, window):
                raise DemoFailed(f"{found} pieces of the {what} are readable in the {place}", LOG)
    console.print("[green]nothing of the prompt or of the answer is in there[/]")


def show_times(console: Console, told: Told) -> None:
    """Print the client's own figures."""
    found = re.search(r"(\d+) tokens in, (\d+) out; .*first (\d+) ms, total (\d+) ms", told.note)
    if not found:
        raise DemoFailed(f"client.py told no figures: {told.note}")
    tokens_in, tokens_out, first_ms, total_ms = map(int, found.groups())
    rate = (tokens_out - 1) / max(0.001, (total_ms - first_ms) / 1000)
    console.print(
        f"\n{tokens_in} tokens in, {tokens_out} out. First token after {first_ms} ms on the worker "
        f"({told.first_text_s:.1f} s after the\ncommand began), then {rate:.0f} tokens/s.\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the demo and return its exit code."""
    parser = argparse.ArgumentParser(prog="demo.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    prompt = parser.parse_args(argv).prompt
    if len(prompt) < WINDOW:
        parser.error(f"a prompt of fewer than {WINDOW} characters cannot be searched for")
    # The platform's own log is not for this screen.
    logging.getLogger("local_runpod").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    screen = Screen()
    errors = Console(stderr=True, highlight=False)
    try:
        asyncio.run(run(prompt, screen))
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


if __name__ == "__main__":
    sys.exit(main())
