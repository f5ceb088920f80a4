"""A worker on the real SDK, without an engine, that opens sealed requests and lets a word out.

The request's prompt is JSON: the `word`, a `place` to leave it and a `spelling`. With the place
`sealed` it answers as the real worker does. For the tests of the search for canaries.
"""

import base64
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import runpod

import log_guard
from crypto import RequestOpener
from frames import End, FrameEncoder, Head, Text
from keys import KeyRing
from protocol import MAX_TTL_S, SealedInput, pad, parse_generate, parse_job_input
from replies import SealedReply


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _openai(delta: str) -> str:
    return json.dumps({"id": "c", "choices": [{"index": 0, "delta": {"content": delta}}]})


def _unsealed(delta: str) -> str:
    """Return a chunk that is framed and padded but not encrypted."""
    inside = pad(b"", FrameEncoder().encode([Text(0, delta)]))
    return f"1.AAAA.{base64.urlsafe_b64encode(inside).decode()}"


WHOLE: dict[str, Callable[[str], str]] = {
    "plain": lambda word: f"said {word}.",
    "json": lambda word: json.dumps({"said": word}),
    "json in json": lambda word: json.dumps(json.dumps({"said": word})),
    "hex": lambda word: word.encode().hex(),
    "base64": _base64,
    "base64 after 1": lambda word: _base64(f"a{word}b"),
    "base64 after 2": lambda word: _base64(f"ab{word}cd"),
    "framed": _unsealed,
}
PIECES: dict[str, tuple[int, Callable[[str], str]]] = {
    "pieces": (2, lambda piece: piece),
    "letters": (1, lambda piece: piece),
    "pieces of json": (3, _openai),
    "pieces of base64": (3, _base64),
    "pieces of hex": (2, lambda piece: piece.encode().hex()),
    "framed pieces": (5, _unsealed),
}


def spelt(word: str, spelling: str) -> list[str]:
    """Return what is let out, one after the other."""
    if spelling in WHOLE:
        return [WHOLE[spelling](word)]
    size, spell = PIECES[spelling]
    return [spell(word[start : start + size]) for start in range(0, len(word), size)]


def leave(place: str, text: str) -> None:
    """Let a text out where no chunk goes."""
    match place:
        case "failure":
            raise ValueError(text)
        case "stdout":
            print(text, flush=True)
        case "stderr":
            print(text, file=sys.stderr, flush=True)
        case "file":
            with (Path(os.environ["TMPDIR"]) / "dump").open("a") as file:
                file.write(text + "\n")
        case "file name":
            Path(text[:80]).touch()
        case "command line":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", text])
        case "environment":
            subprocess.Popen(["/bin/sleep", "600"], env={"SAID": text})


async def handle(job: dict[str, Any]) -> AsyncIterator[Any]:
    parsed = parse_job_input(job["input"])
    assert isinstance(parsed, SealedInput)
    keys = KeyRing.parse(os.environ["ENCRYPTION_KEY"])
    opener = RequestOpener(keys, os.environ["RUNPOD_ENDPOINT_ID"], max_ttl_s=MAX_TTL_S)
    opened = opener.open(parsed.sealed)
    told = json.loads(str(parse_generate(bytes(opened.request.body)).prompt))
    for text in spelt(told["word"], told["spelling"]):
        if told["place"] == "chunk":
            yield text
        else:
            leave(told["place"], text)
    reply = SealedReply(opened.request, opened.key)
    for chunk in reply.render([Head(200, "generate", ""), Text(0, told["word"]), End(None, {})]):
        yield chunk


if __name__ == "__main__":
    log_guard.die_with_parent_when_forked()
    runpod.serverless.start(
        {
            "handler": handle,
            "return_aggregate_stream": True,
            "concurrency_modifier": lambda _: 64,
        }
    )
