"""`make demo`: one sealed prompt on this machine, and what the platform saw of it.

Starts the local platform and the real worker with the demo model, sends a prompt with the
command `client.py`, shows the answer as it arrives and then, side by side, what the person read
and what the platform carried. Searches the carried bytes for the text, and leaves no process.
"""

import argparse
import asyncio
import codecs
import json
import re
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from crypto import AnswerOpener, RequestOpener
from frames import AnswerEvent, FrameDecoder
from frames import Text as TextFrame
from keys import KeyRing
from local_runpod_http import Exchange
from protocol import MAX_TTL_S
from tools.demo_search import WINDOW, show_search
from tools.demo_stage import LOG, ROOT, DemoFailed, Screen, perform, stage

PROMPT = "Explain in three sentences why the sky is blue."
MAX_TOKENS = 120
SHOWN_CHUNKS = 6


@dataclass(frozen=True)
class Told:
    """What the client printed, and when."""

    text: str
    note: str
    first_text_s: float


async def run(prompt: str, screen: Screen) -> None:
    """Run the demo; DemoFailed with what to look at."""
    async with stage(screen) as set_up:
        say = screen.console.print
        say(f"[bold]$ python client.py {json.dumps(prompt)}[/]")
        told = await ask(prompt, set_up.environment)
        say()
        if set_up.platform.exchanged_lost:
            raise DemoFailed("more was carried than the demo remembers; use a shorter prompt")
        exchanged = set_up.platform.exchanged
        show_both_sides(screen.console, prompt, set_up.key, exchanged)
        show_search(screen.console, prompt, told.text, exchanged)
        show_times(screen.console, told)


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
        # The end may come with the last words, or in a chunk of its own; a line of its own
        # keeps it whole where the words fill theirs.
        lines = [json.dumps(text, ensure_ascii=False)] if text else []
        if number == len(shown) - 1:
            lines.append("(the end)")
        add(Text("\n".join(lines)), chunk)
    console.print(table)


def body(exchange: Exchange) -> Any:
    """Return the decoded body."""
    return json.loads(exchange.body)


def text_of(events: list[AnswerEvent]) -> str:
    """Return the text that frames carry."""
    return "".join(event.delta for event in events if isinstance(event, TextFrame))


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
    return perform(lambda screen: run(prompt, screen))


if __name__ == "__main__":
    sys.exit(main())
