"""The demos' last word: is anything of prompt or answer in what the platform carried?"""

import base64
import json
from collections.abc import Iterator

from rich.console import Console

from local_runpod_http import Exchange
from tools.demo_stage import LOG, DemoFailed

WINDOW = 8
"""Characters of the text that are searched for at a time; fewer could turn up by chance."""

LOG_WINDOW = 24
"""The same for the log, whose own words are English too."""


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


def show_search(console: Console, prompt: str, answer: str, exchanged: list[Exchange]) -> None:
    """Search everything that was carried, and the worker's log, for the text; say what was found.

    DemoFailed if anything was.
    """
    carried = b"\n".join(each.path.encode() + b"\n" + each.body for each in exchanged)
    log = LOG.read_bytes()
    wanted = len(pieces(prompt) | pieces(answer))
    console.print(
        f"\nSearched all {len(carried):,} bytes that the platform carried for {wanted:,} pieces of "
        f"prompt and answer,\nas plain text, as JSON and as base64, and the worker's log too:"
    )
    for place, where, window in (("platform", carried, WINDOW), ("log", log, LOG_WINDOW)):
        for what, text in (("prompt", prompt), ("answer", answer)):
            if found := count_found(text, where, window):
                raise DemoFailed(f"{found} pieces of the {what} are readable in the {place}", LOG)
    console.print("[green]nothing of the prompt or of the answer is in there[/]")
