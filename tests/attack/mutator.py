"""Makes wrong things of right ones, the same for the same seed."""

import base64
import json
import random
from collections.abc import Callable
from typing import Any

_PIECES = (
    *("", "\0", "\n", " ", "=", "==", ".", "..", "-", "_", "+", "/", "A" * 100, "gAAAAA"),
    *("é", "\ud800", "\uff11", "\u0661", "\U0001f512", "{", "}", "[" * 200, '"', "\\u0000"),
    *("1.", "2.", "null", "NaN", "1e999", "-1", "data: ", '{"error":"x"}', "%s%n", "../"),
)


class Mutator(random.Random):
    """Mutates texts, bytes and JSON values."""

    def text(self, text: str) -> str:
        """Return the text changed in one to four places."""
        for _ in range(self.choice((1, 1, 1, 2, 4))):
            text = self.choice(self._texts)(self, text)
        return text

    def _place(self, text: str) -> int:
        # Heads and tails are where formats live.
        return self.choice((0, 1, len(text), self.randint(0, len(text)), self.randint(0, 40)))

    def _replaced(self, text: str) -> str:
        at = self._place(text)
        return text[:at] + self.choice("AB=z.-_9\n\u00e9") + text[at + 1 :]

    def _inserted(self, text: str) -> str:
        at = self._place(text)
        return text[:at] + self.choice(_PIECES) + text[at:]

    def _removed(self, text: str) -> str:
        at = self._place(text)
        return text[:at] + text[at + self.choice((1, 2, 3, 4, 16, 64)) :]

    def _cut(self, text: str) -> str:
        return text[: self._place(text)]

    def _doubled(self, text: str) -> str:
        at, size = self._place(text), self.randint(1, 80)
        return text[: at + size] + text[at:]

    def _swapped(self, text: str) -> str:
        one, other = sorted((self._place(text), self._place(text)))
        return text[other:] + text[one:other] + text[:one]

    def _flipped(self, text: str) -> str:
        """Flip bits of what a last part in base64 stands for."""
        head, dot, tail = text.rpartition(".")
        try:
            raw = base64.urlsafe_b64decode(tail)
        except ValueError:
            return self._replaced(text)
        return head + dot + base64.urlsafe_b64encode(self.bits(raw)).decode()

    def _emptied(self, text: str) -> str:
        parts = text.split(".")
        parts[self.randrange(len(parts))] = self.choice(("", "A", "0" * 16))
        return ".".join(parts)

    def _case(self, text: str) -> str:
        return self.choice((text.swapcase(), text[::-1], text + text, text.strip("=")))

    _texts: tuple[Callable[["Mutator", str], str], ...] = (
        *(_replaced, _replaced, _inserted, _inserted, _removed, _cut, _doubled),
        *(_swapped, _flipped, _flipped, _flipped, _emptied, _case),
    )

    def bits(self, raw: bytes) -> bytes:
        """Return the bytes with one to three bits flipped, or some lost or added."""
        data = bytearray(raw)
        for _ in range(self.randint(1, 3)):
            if data:
                data[self.randrange(len(data))] ^= 1 << self.randrange(8)
        match self.randrange(8):
            case 0:
                return bytes(data[: self.randint(0, len(data))])
            case 1:
                return bytes(data) + self.randbytes(self.choice((1, 15, 16, 17)))
            case _:
                return bytes(data)

    def value(self, value: Any) -> Any:
        """Return a JSON value with something in it exchanged, added or left out."""
        if isinstance(value, dict) and value:
            name = self.choice(sorted(value))
            match self.randrange(6):
                case 0:
                    return {other: value[other] for other in value if other != name}
                case 1:
                    return {**value, self.choice(_PIECES): self._anything()}
                case 2:
                    return {
                        self.text(other) if other == name else other: value[other]
                        for other in value
                    }
                case _:
                    return {**value, name: self.value(value[name])}
        if isinstance(value, str) and self.randrange(3):
            return self.text(value)
        return self._anything()

    def _anything(self) -> Any:
        deep: Any = 1
        for _ in range(self.choice((1, 5, 99, 150, 800))):
            deep = self.choice(([deep], {"a": deep}))
        simple: tuple[Any, ...] = (
            None,
            True,
            -1,
            2**63,
            2**53,
            1e300,
            "",
            "x" * 5000,
            [],
            {},
            [1],
            {"a": 1},
        )
        return self.choice((*simple, deep, self.choice(_PIECES)))

    def json(self, content: bytes) -> bytes:
        """Return JSON of a mutated value, or JSON that is broken as a text."""
        if self.randrange(3):
            try:
                return json.dumps(self.value(json.loads(content))).encode()
            except (RecursionError, UnicodeEncodeError):
                return b"[" * 5000
        text = self.text(content.decode())
        return text.encode(errors="surrogatepass")
