"""The search for canaries finds each spelling, and nothing where there is nothing.

In bytes made up here, and in all that a weakened worker lets out.
"""

import base64
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from local_runpod import LocalRunpod
from tests.attack.canaries import Words, letters, search
from tests.attack.traces import Traces, Wire
from tests.attack.weak_worker import PIECES, WHOLE
from tests.claims import Trials
from tests.wait import until
from tests.workers import Caller, RunningWorker

WEAK = Path(__file__).with_name("weak_worker.py")
PLACES = {
    "chunk": "worker → platform",
    "failure": "worker → platform",
    "stdout": "log",
    "stderr": "log",
    "file": "file ",
    "file name": "name of ",
    "command line": "cmdline of ",
    "environment": "environ of ",
}
"""Where the weakened worker leaves a word, and what of its traces then holds it."""

SPELLINGS = (*WHOLE, *PIECES)


@pytest.mark.parametrize("before", ["", "a", "ab", "abc"])
@pytest.mark.parametrize(
    ("spelling", "spell"),
    [
        ("plain", lambda text: text.encode()),
        ("json", lambda text: json.dumps({"a": text}).encode()),
        ("json", lambda text: json.dumps(json.dumps({"a": text})).encode()),
        ("hex", lambda text: text.encode().hex().encode()),
        ("hex", lambda text: text.encode().hex().upper().encode()),
        ("base64", lambda text: base64.b64encode(text.encode())),
        ("base64", lambda text: base64.urlsafe_b64encode(text.encode())),
        ("base64", lambda text: base64.encodebytes((text + " ").encode() * 3)),
    ],
)
def test_whole(before: str, spelling: str, spell: Callable[[str], bytes]) -> None:
    word = Words()("prompt")
    content = spell(f"{before}{word} and more")
    assert spelling in {hit.spelling for hit in search([word], {"x": content})}
    # Each half of a word gives it away.
    for half in (word[:20], word[20:]):
        assert search([word], {"x": spell(before + half)})
    assert not search([Words()("prompt")], {"x": content})


def _ciphertext() -> bytes:
    return base64.urlsafe_b64encode(os.urandom(1100))


def split(word: str, size: int) -> list[str]:
    return [word[start : start + size] for start in range(0, len(word), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "spell",
    [
        lambda piece: piece.encode(),
        lambda piece: json.dumps({"output": " " + piece}).encode(),
        lambda piece: json.dumps({"id": "c", "choices": [{"delta": {"content": piece}}]}).encode(),
        lambda piece: json.dumps({"output": piece.encode().hex()}).encode(),
        lambda piece: base64.b64encode(f" {piece} ".encode()),
        lambda piece: json.dumps({"data": json.dumps({"output": piece})}).encode(),
        lambda piece: b"2026-11-21 worker: said %s, job=1" % piece.encode(),
    ],
)
def test_in_pieces(size: int, spell: Callable[[str], bytes]) -> None:
    # Another job's word, of which no piece is one of this word, and ciphertexts come between.
    word, other = "jkqvwxzJKQVWXZjqwzKV", "kjvqxwJzQKWVZXqjzwVK"
    lines = []
    for piece, others in zip(split(word, size), split(other, size), strict=True):
        lines += [spell(piece), _ciphertext(), spell(others)]
    assert {hit.spelling for hit in search([word], {"x": b"\n".join(lines)})} == {"pieces"}
    if size > 1:  # of two words' letters any word can be made
        assert not search([letters()], {"x": b"\n".join(lines)})
        del lines[3]
        assert not search([word], {"x": b"\n".join(lines)})


def test_pieces_among_bytes_that_are_no_text() -> None:
    """As a chunk that is padded but not encrypted has them."""
    word = Words().name("answer")
    chunks = [base64.b64encode(bytes(9) + p.encode() + bytes(1000)) for p in split(word, 5)]
    assert search([word], {"x": b"\n".join(chunks)})


def test_nothing_is_found_in_what_no_program_wrote_as_text() -> None:
    """Such as what a compiler keeps, which has every letter and every digit somewhere."""
    words = Words()
    used = [words("prompt"), words.name("tool"), str(words.number("seed")), words.digits("min_p")]
    assert not search(used, {"file": os.urandom(2_000_000)})


def test_numbers_and_keys() -> None:
    words = Words()
    number = words.number("seed")
    assert search(words.of("seed"), {"x": json.dumps({"seed": number}).encode()})
    key = base64.urlsafe_b64encode(os.urandom(32)).decode()
    assert search([key], {"x": b"ENCRYPTION_KEY=" + key.encode()})


def test_nothing_is_found_among_random_bytes() -> None:
    words = [Words()("prompt") for _ in range(40)]
    chunks = [
        b"1.%s.%s" % (base64.urlsafe_b64encode(os.urandom(16))[:22], _ciphertext())
        for _ in range(1000)
    ]
    assert not search(words, {"ciphertexts": b"\n".join(chunks)})


# --- a weakened worker ----------------------------------------------------------------------


class Weak:
    """A weakened worker, and the search of all that it let out."""

    def __init__(self, caller: Caller, traces: Traces) -> None:
        self.words = Words()
        self._caller = caller
        self._traces = traces

    def leave(self, places: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
        """Have it leave a word in each place in a spelling, and return them."""
        words, jobs = {}, []
        for place, spelling in places:
            words[place, spelling] = word = self.words(f"{place} {spelling}")
            told = json.dumps({"word": word, "place": place, "spelling": spelling})
            sent = self._caller.send("generate", {"prompt": told})
            jobs.append(self._traces.platform.jobs[sent.job_id])
        until(lambda: all(job.status.final for job in jobs), 60, "the jobs are over")
        return words

    def found(self, words: Iterable[str]) -> dict[str, set[str]]:
        """Return where each word is found."""
        self._traces.look()
        found: dict[str, set[str]] = {word: set() for word in words}
        for hit in search(found, self._traces.sources()):
            found[hit.word].add(hit.source)
        return found


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weak]:
    """Nothing but its program is another than where the real worker is searched."""
    folder = tmp_path_factory.mktemp("weak")
    with (
        LocalRunpod(hold_s=5, stream_hold_s=5, record_bytes=10**8) as platform,
        Wire(platform.port) as wire,
        RunningWorker(
            platform,
            folder,
            private=True,
            program=WEAK,
            RUNPOD_LOG_LEVEL="ERROR",
            **wire.worker_env(platform, "pod-1"),
        ) as worker,
        Caller(platform, worker.key) as caller,
    ):
        yield Weak(caller, Traces(platform, worker.ready(), wire))


@pytest.mark.claim(
    "leaks.search", "The search finds a word that a weakened worker lets out, however it is spelt."
)
def test_a_weakened_worker_is_found_out(weak: Weak, claim: Trials) -> None:
    leaks = {(place, "plain") for place in PLACES}
    leaks |= {(place, spelling) for place in ("chunk", "stderr") for spelling in SPELLINGS}
    leaks |= {("file", spelling) for spelling in PIECES}
    words = weak.leave([*leaks, *(("sealed", spelling) for spelling in SPELLINGS)])
    found = weak.found(words.values())
    for (place, spelling), word in words.items():
        sources = found[word]
        if place == "sealed":
            ok = not sources
        else:
            ok = any(PLACES[place] in source for source in sources)
            # What went to the platform was on the wire, and nothing else was.
            sent = any(source.startswith("wire") for source in sources)
            ok &= sent == (place in ("chunk", "failure")) or spelling in PIECES
        claim.trial(ok)
        if not ok:
            claim.detail(f"{place}, {spelling}: {sorted(sources)}")
    claim.detail(f"{len(PLACES)} places, {len(SPELLINGS)} spellings")
