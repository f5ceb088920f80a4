"""Canaries: words that occur nowhere else, and the search for them in whatever a worker let out.

Owns how a word may be spelt: as it is, escaped in JSON, in hex, in base64 at any offset, and in
pieces, each of which may be spelt in these ways. Knows nothing of where the bytes come from.
"""

import base64
import binascii
import contextlib
import json
import re
import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple
from urllib.parse import quote

# Rare in texts and in identifiers, so that pieces of a word are not found where none are.
_LETTERS = "jkqvwxzJKQVWXZ"
_WIDE = [chr(number) for number in range(0x13A0, 0x13F0)]
"""Three bytes each in UTF-8, and an escape each in JSON."""

_LETTER_COUNT, _WIDE_COUNT = 20, 8
_RUNS = re.compile(r"[A-Za-z0-9]{10,}|[^\x00-\x7f]{4,}")
_TOKENS = re.compile(rb"[A-Za-z0-9+/_-]+={0,2}")
_ALNUM = re.compile(rb"[A-Za-z0-9]+")
_LONGEST_TOKEN = 64
_LEAST_AMONG_NOISE = 4
"""A shorter piece is none in a longer token, or in bytes that are no text: there any letter is.
Nor is one of digits, which are everywhere."""

_NEAR_LINES = 50
"""How far apart two pieces of a word may stand: other jobs write between them."""


class Hit(NamedTuple):
    """A word that was found."""

    word: str
    source: str
    spelling: str


class Words:
    """Canaries, by what they are used for."""

    def __init__(self) -> None:
        self.used: dict[str, str] = {}

    def __call__(self, purpose: str) -> str:
        """Return the word of that purpose: letters, and others that JSON may escape."""
        return self.used.setdefault(
            purpose, letters() + "".join(secrets.choice(_WIDE) for _ in range(_WIDE_COUNT))
        )

    def name(self, purpose: str) -> str:
        """Return one where only letters may stand."""
        return self.used.setdefault(purpose, letters())

    def number(self, purpose: str) -> int:
        """Return one that is a number, below 2^63."""
        return int(self.used.setdefault(purpose, str(10**18 + secrets.randbelow(8 * 10**18))))

    def digits(self, purpose: str) -> str:
        """Return one that is as many digits as follow the point in JSON."""
        return self.used.setdefault(
            purpose, "".join(secrets.choice("123456789") for _ in range(14))
        )

    def of(self, kind: str) -> list[str]:
        """Return all whose purpose begins so."""
        return [word for purpose, word in self.used.items() if purpose.startswith(kind)]


def letters() -> str:
    """Return a new word of letters alone."""
    return "".join(secrets.choice(_LETTERS) for _ in range(_LETTER_COUNT))


def _runs(word: str) -> list[str]:
    """Return the parts of a word that are searched, each of which gives it away."""
    return _RUNS.findall(word) or [word]


def _base64(plain: bytes) -> Iterator[bytes]:
    """Yield what base64 has of `plain` wherever it begins: after 0, 1 or 2 bytes of a group."""
    for offset in range(3):
        shifted = bytes(offset) + plain
        text = base64.b64encode(shifted)[-(-offset * 4 // 3) : len(shifted) * 8 // 6]
        yield text
        yield text.translate(bytes.maketrans(b"+/", b"-_"))


def spellings(word: str) -> set[tuple[bytes, str]]:
    """Return how a whole word may stand in bytes, and what that spelling is called."""
    found: set[tuple[bytes, str]] = set()
    for run in _runs(word):
        plain = run.encode()
        found |= {(plain, "plain"), (quote(plain).encode(), "plain")}
        found |= {(plain.hex().encode(), "hex"), (plain.hex().upper().encode(), "hex")}
        found |= {(text, "base64") for text in _base64(plain)}
        if not run.isascii():
            escaped = json.dumps(run)[1:-1]
            capital = re.sub(r"\\u(....)", lambda code: "\\u" + code[1].upper(), escaped)
            for text in (escaped, capital, repr(plain)[2:-1]):
                # JSON within JSON escapes the escapes.
                found |= {(text.replace("\\", "\\" * n).encode(), "json") for n in (1, 2, 4)}
    return found


def search(words: Iterable[str], sources: Mapping[str, bytes]) -> set[Hit]:
    """Return which word stands in which source, whole or in pieces, and how it is spelt."""
    words = list(words)
    spelt = [(word, *spelling) for word in words for spelling in spellings(word)]
    places: Places = defaultdict(list)
    for word in words:
        run = _runs(word)[0].encode()
        least = _LEAST_AMONG_NOISE if run.isdigit() else 1
        for start in range(len(run)):
            for end in range(start + least, len(run) + 1):
                places[run[start:end]].append((word, start, end == len(run)))
    hits = set()
    for name, content in sources.items():
        # Base64 comes in lines too, which JSON escapes.
        unbroken = content.replace(b"\\n", b"").replace(b"\r", b"").replace(b"\n", b"")
        for word, text, spelling in spelt:
            if text in content or text in unbroken:
                hits.add(Hit(word, name, spelling))
        hits |= {Hit(word, name, "pieces") for word in _in_pieces(places, content)}
    return hits


Places = defaultdict[bytes, list[tuple[str, int, bool]]]
"""For each piece: the words it is of, where it begins in them, and whether it is their end."""


def _in_pieces(places: Places, content: bytes) -> set[str]:
    """Return the words of which all pieces stand in `content`, in order and near each other."""
    found = set()
    # Up to which letter a word has been read, and in which line that was.
    read: dict[tuple[str, int], int] = {}
    for number, line in enumerate(content.splitlines()):
        for piece in _pieces(line, places):
            for word, start, is_end in sorted(places[piece], key=lambda place: -place[1]):
                since = number if start == 0 else read.get((word, start))
                if since is not None and number - since <= _NEAR_LINES:
                    read[word, start + len(piece)] = number
                    if is_end:
                        found.add(word)
    return found


def _pieces(line: bytes, known: Mapping[bytes, object]) -> Iterator[bytes]:
    noise = not _is_text(line.translate(None, b"\t\x1b"))  # which logs have too
    for token in _TOKENS.findall(line):
        for text in (token, *_decoded(token)):
            chance = noise or (len(token) > _LONGEST_TOKEN if text is token else not _is_text(text))
            least = _LEAST_AMONG_NOISE if chance else 1
            for piece in _ALNUM.findall(text):
                if len(piece) >= least and piece in known:
                    yield piece


def _is_text(decoded: bytes) -> bool:
    try:
        return decoded.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _decoded(token: bytes) -> Iterator[bytes]:
    """Yield what a token may be an encoding of."""
    with contextlib.suppress(ValueError):
        yield bytes.fromhex(token.decode())
    bare = token.rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    with contextlib.suppress(binascii.Error):
        yield base64.b64decode(bare + b"=" * (-len(bare) % 4))
