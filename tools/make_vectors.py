"""Write vectors/*.json (SPEC.md section 12) with the worker's own code and fixed randomness.

`python tools/make_vectors.py` writes them, `--check` only compares. Every byte that would
be random is the hash of a label, so a second run changes nothing.
"""

import argparse
import base64
import hashlib
import hmac
import json
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from crypto import AnswerSealer, new_request, seal_request
from fernets import b64
from frames import Body, End, Event, FrameEncoder, Head, Note, Sse, Text
from keys import Key
from protocol import Request, pad_request
from simple_form import SimpleSealer

NOW = 1_790_000_000
AUDIENCE = "abc123endpoint"

Case = dict[str, Any]


def fixed(label: str, size: int) -> bytes:
    """Return `size` bytes that depend on the label only."""
    return hashlib.shake_256(label.encode()).digest(size)


def fernet_key(label: str) -> str:
    """Return a Fernet key that depends on the label only."""
    return base64.urlsafe_b64encode(fixed(label, 32)).decode()


@contextmanager
def ivs(*values: bytes) -> Iterator[None]:
    """Let Fernet take its IVs from `values`; all of them must be used."""
    left = list(values)
    with patch("cryptography.fernet.os.urandom", lambda _size: left.pop(0)):
        yield
    if left:
        raise AssertionError("an IV was not used")


KEY, OTHER = fernet_key("key"), fernet_key("other key")
WORKER_KEY, OTHER_KEY = Key.parse(KEY), Key.parse(OTHER)


def request_of(label: str = "request", **changes: Any) -> Request:
    """Return a request with fixed times, id and secret."""
    settings: dict[str, Any] = {
        "route": "/v1/chat/completions",
        "body": b'{"messages":[{"role":"user","content":"Gr\xc3\xbc\xc3\x9fe!"}]}',
        "audience": AUDIENCE,
        "ttl_s": 600,
        "now": lambda: NOW,
        "random": lambda size: fixed(label, size),
    }
    return new_request(**settings | changes)


def encrypt(key: Key, inside: bytes, iv: bytes, at: int = 0) -> str:
    """Return a Fernet ciphertext under the request key."""
    with ivs(iv):
        return key.request_fernet.encrypt_at_time(inside, at).decode()


def sealed_of(inside: bytes, label: str, key: Key = WORKER_KEY, at: int = 0) -> str:
    """Return the sealed form of any inside."""
    return f"1.{key.id}.{encrypt(key, inside, fixed(label, 16), at)}"


def of_version_81(ciphertext: str, key: str) -> str:
    """Return a Fernet ciphertext with version byte 0x81 and an HMAC that fits it."""
    signed = b"\x81" + base64.urlsafe_b64decode(ciphertext)[1:-32]
    tag = hmac.digest(base64.urlsafe_b64decode(key)[:16], signed, "sha256")
    return base64.urlsafe_b64encode(signed + tag).decode()


def flip(text: str, at: int) -> str:
    """Return `text` with the character at `at` replaced by another of the alphabet."""
    return text[:at] + ("B" if text[at] == "A" else "A") + text[at + 1 :]


def slack(ciphertext: str) -> str:
    """Return another spelling of the same bytes: an unused bit of the last character set."""
    body = ciphertext.rstrip("=")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return body[:-1] + alphabet[alphabet.index(body[-1]) + 1] + ciphertext[len(body) :]


def case(name: str, comment: str, expect: str, **members: Any) -> Case:
    """Return one case."""
    return {"name": name, "comment": comment, "expect": expect, **members}


def keys() -> list[Case]:
    """Cases of keys.json."""

    def derive(name: str, comment: str, key: str) -> Case:
        request = request_of(name)
        salt = fixed(name + " salt", 16)
        parsed = Key.parse(key)
        return case(
            name,
            comment,
            "derive",
            key=key,
            request_id=request.request_id,
            response_secret=request.response_secret,
            salt=salt.hex(),
            kid=parsed.id,
            request_key=fernet_text(parsed.request_fernet),
            response_key=fernet_text(parsed.response_fernet(request, salt)),
        )

    def refuse(name: str, comment: str, key: str, reason: str) -> Case:
        return case(name, comment, "refuse", key=key, reason=reason)

    return [
        derive("a key", "Everything section 2 derives.", KEY),
        derive("another key", "Other key, id and salt.", OTHER),
        derive("zero key", "The edge of the range.", "A" * 43 + "="),
        refuse("empty", "No key at all.", "", "length"),
        refuse("short", "31 bytes.", base64.urlsafe_b64encode(bytes(31)).decode(), "length"),
        refuse("long", "33 bytes.", base64.urlsafe_b64encode(bytes(33)).decode(), "length"),
        refuse("no padding", "The `=` is part of a Fernet key.", KEY[:-1], "length"),
        refuse("standard alphabet", "`+` and `/`.", "+/" + KEY[2:], "alphabet"),
        refuse("not ASCII", "A letter outside of the alphabet.", "é" + KEY[1:], "alphabet"),
        refuse("unused bits", "Decodes to the bytes of a key.", slack(KEY), "canonical"),
    ]


def fernet_text(fernet: Any) -> str:
    """Return the key that a Fernet object was made with."""
    return base64.urlsafe_b64encode(fernet._signing_key + fernet._encryption_key).decode()


def requests() -> list[Case]:
    """Cases of requests.json."""
    plain = request_of()
    inside = pad_request(plain.encode())
    sealed = sealed_of(inside, "iv")
    _, kid, ciphertext = sealed.split(".")
    tight = request_of(body=b'{"prompt":"%s"}' % (b"x" * 712))
    tight = request_of(
        body=b'{"prompt":"%s"}' % (b"x" * (712 + 1020 - len(tight.encode()))),
    )
    looser = request_of(body=bytes(tight.body).replace(b"xx", b"xxx", 1))

    def produce(name: str, comment: str, request: Request) -> Case:
        iv = fixed(name, 16)
        with ivs(iv):
            sealed = seal_request(request, WORKER_KEY)
        content = request.encode().decode()
        return case(name, comment, "produce", key=KEY, json=content, iv=iv.hex(), sealed=sealed)

    def opens(name: str, comment: str, content: bytes, key: Key = WORKER_KEY) -> Case:
        sealed = sealed_of(pad_request(content), name, key)
        request = json.loads(content)
        both = [KEY, OTHER]
        return case(name, comment, "open", keys=both, sealed=sealed, request=request)

    def reject(name: str, comment: str, sealed: str, reason: str) -> Case:
        return case(name, comment, "reject", keys=[KEY, OTHER], sealed=sealed, reason=reason)

    def wrong_inside(name: str, comment: str, inside: bytes, reason: str) -> Case:
        return reject(name, comment, sealed_of(inside, name), reason)

    def wrong_json(name: str, comment: str, content: bytes, reason: str = "members") -> Case:
        return wrong_inside(name, comment, pad_request(content), reason)

    def changed(name: str, comment: str, **changes: Any) -> Case:
        members = {**json.loads(plain.encode()), **changes}
        kept = {member: value for member, value in members.items() if value is not ...}
        return wrong_json(name, comment, json.dumps(kept).encode())

    def check(name: str, comment: str, code: str | None, **changes: Any) -> Case:
        settings = {"audience": AUDIENCE, "now": NOW, "max_ttl_s": 86400, "clock_skew_s": 60}
        request = request_of(name, **changes.pop("request", {}))
        if "times" in changes:
            issued_at, expires_at = changes.pop("times")
            members = json.loads(request.encode())
            members |= {"issued_at": issued_at, "expires_at": expires_at}
            sealed = sealed_of(pad_request(json.dumps(members).encode()), name)
        else:
            sealed = sealed_of(pad_request(request.encode()), name)
        given: dict[str, Any] = {**settings, **changes}
        return case(name, comment, "check", keys=[KEY], sealed=sealed, **given, code=code)

    deep = b'{"a":' * 40 + b"[" * 200 + b"]" * 200 + b"}" * 40
    with_body = plain.encode().replace(bytes(plain.body), b"%s")
    return [
        produce("chat", "A chat completion with letters outside of ASCII.", plain),
        produce(
            "worker",
            "GET without a body.",
            request_of(route="worker", method="GET", body=None),
        ),
        produce("tight", "4 + 1020 bytes: the last that fit into 1024.", tight),
        produce("next step", "4 + 1021 bytes: 2048.", looser),
        opens(
            "first key",
            "Any member order and white space.",
            json.dumps(dict(reversed(json.loads(plain.encode()).items())), indent=2).encode(),
        ),
        opens("second key", "A worker with two keys chooses by kid.", plain.encode(), OTHER_KEY),
        opens("body null", "POST with a null body is in form.", request_of(body=None).encode()),
        opens(
            "depth 100",
            "As deep as allowed: the request, its body and 98 arrays in that.",
            with_body % (b'{"a":' + b"[" * 98 + b"]" * 98 + b"}"),
        ),
        opens(
            "member twice",
            "The last one counts.",
            plain.encode().replace(b'{"request_id"', b'{"audience":"x","request_id"'),
        ),
        opens(
            "leading U+FEFF in a text",
            "No byte order mark there, but a character like others.",
            with_body % b'{"prompt":"\xef\xbb\xbfHi"}',
        ),
        reject("empty", "Nothing.", "", "form"),
        reject("no dots", "Not three parts.", "sealed", "form"),
        reject("no ciphertext", "Two parts.", f"1.{kid}", "form"),
        reject("four parts", "A dot is not base64.", sealed + ".", "encoding"),
        reject("version 2", "Another version.", "2" + sealed[1:], "version"),
        reject(
            "several faults",
            "Version, key id and encoding: the first of the list counts.",
            f"2.{'0' * 16}.{ciphertext}.",
            "version",
        ),
        reject("version 01", "Versions are compared as text.", "0" + sealed, "version"),
        reject("unknown key id", "No such key.", f"1.{'0' * 16}.{ciphertext}", "unknown_key"),
        reject(
            "upper-case key id",
            "Hex digits are lower case.",
            f"1.{kid.upper()}.{ciphertext}",
            "unknown_key",
        ),
        reject(
            "other key's id",
            "A ciphertext under a key that is not the kid's.",
            f"1.{OTHER_KEY.id}.{ciphertext}",
            "authentication",
        ),
        reject("newline after", "Base64 readers skip it.", sealed + "\n", "encoding"),
        reject(
            "newline within",
            "Base64 readers skip it.",
            sealed[:500] + "\n" + sealed[500:],
            "encoding",
        ),
        reject("no padding", "Fernet has padding.", sealed.rstrip("="), "encoding"),
        reject("data after the padding", "Some readers stop at `=`.", sealed + "AAAA", "encoding"),
        reject("unused bits", "Decodes to the same bytes.", slack(sealed), "encoding"),
        reject("standard alphabet", "`+` where `-` belongs.", _other_alphabet(inside), "encoding"),
        reject(
            "not ASCII",
            "A letter outside of the alphabet.",
            sealed[:-9] + "é" + sealed[-8:],
            "encoding",
        ),
        reject(
            "current time",
            "A ciphertext made with Fernet's usual clock.",
            sealed_of(inside, "time", at=NOW),
            "timestamp",
        ),
        reject("empty ciphertext", "No timestamp to be zero.", f"1.{kid}.", "timestamp"),
        reject(
            "Fernet version 0x81",
            "The timestamp is zero and the HMAC fits, but Fernet's version byte is 0x80.",
            f"1.{kid}." + of_version_81(ciphertext, fernet_text(WORKER_KEY.request_fernet)),
            "authentication",
        ),
        reject("flipped IV", "A changed character in the IV.", flip(sealed, 40), "authentication"),
        reject(
            "flipped text",
            "A changed character in the middle.",
            flip(sealed, 700),
            "authentication",
        ),
        reject(
            "flipped tag",
            "A changed character in the tag.",
            flip(sealed, len(sealed) - 9),
            "authentication",
        ),
        reject("cut", "The last four characters are missing.", sealed[:-4], "authentication"),
        reject(
            "direct use",
            "Encrypted with the shared key, not with the request key.",
            f"1.{kid}." + _direct(inside),
            "authentication",
        ),
        wrong_inside("nothing inside", "No header.", b"", "length"),
        wrong_inside("three bytes", "Half a header.", b"\0\0\0", "length"),
        wrong_inside("not padded", "Ends with the JSON.", inside.rstrip(b"\0"), "length"),
        wrong_inside(
            "one cell too many",
            "Padded to 2048 where 1024 are enough.",
            inside + bytes(1024),
            "length",
        ),
        wrong_inside(
            "length too large",
            "Longer than what is there.",
            struct.pack(">I", 2**32 - 1) + inside[4:],
            "length",
        ),
        wrong_inside("padding not zero", "The last byte is 1.", inside[:-1] + b"\1", "padding"),
        wrong_json("not JSON", "Bare text.", b"hello", "json"),
        wrong_inside(
            "length too small",
            "The last byte of the JSON stands where padding belongs.",
            struct.pack(">I", len(plain.encode()) - 1) + inside[4:],
            "padding",
        ),
        wrong_json("cut JSON", "The last byte is missing.", plain.encode()[:-1], "json"),
        wrong_json(
            "not UTF-8", "A Latin-1 letter.", plain.encode().replace("ü".encode(), b"\xfc"), "json"
        ),
        wrong_json(
            "byte order mark", "Not part of JSON.", b"\xef\xbb\xbf" + plain.encode(), "json"
        ),
        wrong_json("NaN", "Not JSON.", with_body % b'{"temperature":NaN}', "json"),
        wrong_json("huge number", "Beyond a double.", with_body % b'{"temperature":1e999}', "json"),
        wrong_json(
            "lone surrogate", "Half a character.", with_body % b'{"prompt":"\\ud800"}', "json"
        ),
        wrong_json(
            "depth 101",
            "The request, its body and 99 arrays in that.",
            with_body % (b'{"a":' + b"[" * 99 + b"]" * 99 + b"}"),
            "json",
        ),
        wrong_json("240 deep", "Nested deeper than 100.", with_body % deep, "json"),
        wrong_json("array", "Not an object.", b"[]"),
        changed("member missing", "No audience.", audience=...),
        changed("unknown member", "A member that section 3 does not have.", priority=1),
        changed("request_id too short", "31 digits.", request_id=plain.request_id[1:]),
        changed("request_id upper case", "Hex digits are lower case.", request_id="A" * 32),
        changed(
            "response_secret padded",
            "b64 has no padding.",
            response_secret=plain.response_secret + "=",
        ),
        changed("response_secret too short", "31 bytes.", response_secret=b64(bytes(31))),
        changed(
            "response_secret unused bits",
            "Not canonical.",
            response_secret=slack(plain.response_secret),
        ),
        changed("time as text", "Times are integers.", issued_at=str(NOW)),
        changed("time with fraction", "Times are integers.", issued_at=NOW + 0.5),
        wrong_json(
            "time with a zero fraction",
            "Digits only.",
            plain.encode().replace(b'"issued_at":%d' % NOW, b'"issued_at":%d.0' % NOW),
        ),
        changed("time negative", "Before 1970.", issued_at=-1),
        changed("time too large", "2^53.", expires_at=2**53),
        changed("other method", "Only POST and GET.", method="PUT"),
        changed("GET with a body", "A body goes with POST only.", method="GET"),
        changed("body is text", "An object or null.", body="{}"),
        check("in time", "Nothing to say against it.", None),
        check(
            "other endpoint",
            "Meant for somebody else.",
            "wrong_audience",
            audience="another-endpoint",
        ),
        check("60 s early", "Within the skew.", None, now=NOW - 60),
        check("61 s early", "Past the skew.", "not_yet_valid", now=NOW - 61),
        check("60 s late", "Within the skew.", None, now=NOW + 660),
        check("61 s late", "Past the skew.", "expired", now=NOW + 661),
        check("one day", "The longest life.", None, request={"ttl_s": 86400}),
        check("one day and a second", "Too long.", "ttl_too_long", request={"ttl_s": 86401}),
        check("no life", "Expires when it is issued.", "expired", times=(NOW, NOW)),
        check("huge life", "As large as a time can be.", "ttl_too_long", times=(NOW, 2**53 - 1)),
    ]


def _other_alphabet(inside: bytes) -> str:
    """Return a sealed request in the standard alphabet, one that has characters to tell it by."""
    for number in range(100):
        sealed = sealed_of(inside, f"alphabet {number}")
        if "-" in sealed and "_" in sealed:
            return sealed.replace("-", "+").replace("_", "/")
    raise AssertionError("unlikely")


def _direct(inside: bytes) -> str:
    with ivs(fixed("direct", 16)):
        return WORKER_KEY.simple_fernet.encrypt_at_time(inside, 0).decode()


def answers() -> list[Case]:
    """Cases of answers.json."""
    request = request_of("answer")
    given = {
        "key": KEY,
        "request_id": request.request_id,
        "response_secret": request.response_secret,
    }
    salt = fixed("salt", 16)

    def seal(
        payloads: list[bytes], salt: bytes = salt, *, final: bool = True, label: str = "answer"
    ) -> tuple[list[str], list[bytes]]:
        sealer = AnswerSealer(request, WORKER_KEY, salt=salt)
        chunks: list[str] = []
        used: list[bytes] = []
        for number, payload in enumerate(payloads):
            pieces = max(1, -(-len(payload) // (512 * 1024 - 9)))
            values = [
                fixed(f"{label} {salt.hex()} {number} {piece}", 16) for piece in range(pieces)
            ]
            with ivs(*values):
                chunks += sealer.seal(payload, final=final and number == len(payloads) - 1)
            used += values
        return chunks, used

    end = End({"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}, {"total_ms": 12.5})
    head = Head(200, "generate", "application/json")
    story: list[Any] = [head, Text(0, "Hel"), Text(0, "lo é"), Text(1, "Hi")]
    finish = Event({"index": 0, "finish_reason": "stop", "stop_reason": None})

    def lines(*texts: str) -> list[Any]:
        event = 'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"content":"%s"}}]}'
        return [Sse((event % text).encode()) for text in texts]

    def frames(*groups: list[Any]) -> list[bytes]:
        encoder = FrameEncoder()
        return [encoder.encode(group) for group in groups]

    def raw(kind: int, data: bytes) -> bytes:
        return struct.pack(">BI", kind, len(data)) + data

    def produce(name: str, comment: str, payloads: list[bytes]) -> Case:
        salt = fixed(name, 16)
        chunks, used = seal(payloads, salt)
        listed = [
            {"payload": payload.hex(), "final": number == len(payloads) - 1}
            for number, payload in enumerate(payloads)
        ]
        return case(
            name,
            comment,
            "produce",
            **given,
            salt=salt.hex(),
            payloads=listed,
            ivs=[iv.hex() for iv in used],
            chunks=chunks,
        )

    def opens(name: str, comment: str, chunks: list[str], frames: list[Any]) -> Case:
        return case(name, comment, "open", **given, chunks=chunks, frames=listed(frames))

    def refuse(name: str, comment: str, chunks: list[str], reason: str) -> Case:
        return case(name, comment, "refuse", **given, chunks=chunks, reason=reason)

    def wrong_frames(name: str, comment: str, payload: bytes) -> Case:
        return refuse(name, comment, seal([payload], fixed(name, 16))[0], "frame")

    fernet = WORKER_KEY.response_fernet(request, salt)

    def wrong_inside(name: str, comment: str, inside: bytes, reason: str, at: int = 0) -> Case:
        with ivs(fixed(name, 16)):
            text = fernet.encrypt_at_time(inside, at).decode()
        return refuse(name, comment, [f"1.{b64(salt)}.{text}"], reason)

    payloads = frames(story, [Text(0, ", wörld")], [finish, end])
    chunks, _ = seal(payloads)
    again, _ = seal(payloads, fixed("second salt", 16))
    sse = frames(
        [Head(200, "sse", "text/event-stream"), *lines("Hel", 'l\\"o', "")],
        [*lines(" world"), Sse(b"data: [DONE]"), end],
    )
    failed = End(
        None,
        {},
        {
            "message": "no",
            "type": "BadRequestError",
            "param": None,
            "code": "expired",
            "status": 408,
        },
    )
    ended_early = End(None, {"queue_ms": 3.5, "first_token_ms": None, "total_ms": 8})
    # One template for each of 64 letters, and the last of them filled.
    shapes = b"".join(raw(5, b"data: %d \0" % number) for number in range(64))
    body_head = frames([Head(200, "body", "text/plain")])[0]

    def points(code: str) -> End:
        said = {
            "message": "another attempt answers",
            "type": "BadRequestError",
            "param": None,
            "code": code,
            "status": 409,
        }
        return End(None, {}, said)

    def pointing(code: str) -> list[str]:
        return seal(frames([points(code)]), fixed(code, 16))[0]

    def note(text: str, name: str) -> list[str]:
        return seal(frames([Note(text)]), fixed(name, 16), final=False)[0]

    body = [Head(404, "body", "application/json"), Body(b'{"error":{"message":"no"}}'), end]
    joined = b"".join(payloads)
    cuts = [0, 2, joined.index("é".encode()) + 1, joined.index(b"12.5") + 2, len(joined)]
    pieces = [joined[a:b] for a, b in pairwise(cuts)]
    whole = [head, Text(0, "Hello é"), Text(1, "Hi"), Text(0, ", wörld"), finish, end]
    ended = frames([head, end])[0]
    head_only, ended_only = frames([head], [end])
    strange = Head(200, cast(Any, "other"), "text/plain")
    good = struct.pack(">IBI", 0, 1, len(ended)) + ended
    inside = good.ljust(1024, b"\0")
    first = chunks[0]
    _version, salt_text, ciphertext = first.split(".")
    foreign = AnswerSealer(request_of("somebody else"), WORKER_KEY, salt=salt)
    other_key = AnswerSealer(request, OTHER_KEY, salt=salt)
    with ivs(fixed("foreign", 16)):
        [foreign_chunk] = foreign.seal(ended, final=True)
    with ivs(fixed("other key", 16)):
        [other_chunk] = other_key.seal(ended, final=True)
    with ivs(fixed("reflected", 16)):
        reflected = seal_request(request, WORKER_KEY)
    conflicting, _ = seal([ended, *payloads[1:]], label="conflict")
    over, _ = seal([ended], fixed("after", 16))
    more, _ = seal([ended, b""], fixed("after", 16), label="more")
    ordinary, _ = seal([head_only, b"", b""], fixed("late", 16), final=False)
    early, _ = seal([head_only, ended_only], fixed("late", 16), label="early")
    return [
        produce("three chunks", "Texts, an event and the end.", payloads),
        produce(
            "padding only",
            "Chunks without payload before and after.",
            [b"", frames([head])[0], b"", frames([end])[0]],
        ),
        produce(
            "sizes",
            "1015 bytes fit into the smallest chunk, 1016 do not.",
            [
                body_head + raw(4, bytes(1015 - 5 - len(body_head))),
                raw(4, bytes(1011)),
                frames([end])[0],
            ],
        ),
        opens(
            "generate",
            "Three chunks in order.",
            chunks,
            [head, Text(0, "Hello é"), Text(1, "Hi"), Text(0, ", wörld"), finish, end],
        ),
        opens(
            "out of order",
            "The platform delivers as it likes.",
            [chunks[2], chunks[0], chunks[1]],
            [head, Text(0, "Hello é"), Text(1, "Hi"), Text(0, ", wörld"), finish, end],
        ),
        opens(
            "doubled",
            "Equal chunks that arrive again are dropped.",
            [chunks[0], chunks[0], chunks[1], chunks[2], chunks[1]],
            [head, Text(0, "Hello é"), Text(1, "Hi"), Text(0, ", wörld"), finish, end],
        ),
        opens(
            "frames across payloads",
            "Cut within a header, a letter and a number of END, which may begin early.",
            seal([*pieces[:2], b"", *pieces[2:]], fixed("cut", 16))[0],
            whole,
        ),
        opens(
            "new salt after padding",
            "The first attempt died before it said anything.",
            [seal([b"", b""], fixed("dead", 16), final=False)[0][0], *chunks],
            whole,
        ),
        opens(
            "new salt after HEAD",
            "HEAD alone commits to nothing, so nothing was delivered.",
            [seal([head_only], fixed("headed", 16), final=False)[0][0], *chunks],
            whole,
        ),
        opens(
            "new salt after a gap",
            "Of the first attempt only its second chunk came: nothing to deliver.",
            [again[1], *chunks],
            whole,
        ),
        opens(
            "already_running within",
            "A second worker was handed the job while the first one answers.",
            [*chunks[:2], *pointing("already_running"), chunks[2]],
            whole,
        ),
        opens(
            "replayed before",
            "An END that points at another attempt, then that attempt.",
            [*pointing("replayed"), *chunks],
            whole,
        ),
        opens(
            "notes",
            "Words on the wait, each an attempt of its own: before the answer, and late.",
            [*note("loading model org/b", "n1"), *chunks[:2], *note("late", "n2"), chunks[2]],
            whole,
        ),
        opens(
            "U+FEFF",
            "It is kept, at the beginning of a text too.",
            seal(frames([head, Text(0, "\ufeffHi"), end]), fixed("feff", 16))[0],
            [head, Text(0, "\ufeffHi"), end],
        ),
        opens(
            "64 templates",
            "As many as allowed; the last has number 63.",
            seal([shapes + raw(6, b"\0\x3fx") + frames([end])[0]], fixed("64", 16))[0],
            [Sse(b"data: 63 x"), end],
        ),
        opens(
            "timings",
            "Null where unknown.",
            seal(frames([ended_early]), fixed("timings", 16))[0],
            [ended_early],
        ),
        opens(
            "templates",
            "Server-sent events: TEMPLATE and FILL, with an escaped quote and an "
            "empty hole, and one in full.",
            seal(sse, fixed("sse", 16))[0],
            [
                Head(200, "sse", "text/event-stream"),
                *lines("Hel", 'l\\"o', "", " world"),
                Sse(b"data: [DONE]"),
                end,
            ],
        ),
        opens(
            "two holes",
            "A template with three pieces.",
            seal(
                [raw(5, b'data: {"a":"\0","b":"\0"}') + raw(6, b"\0\0x\0y") + frames([end])[0]],
                fixed("holes", 16),
            )[0],
            [Sse(b'data: {"a":"x","b":"y"}'), end],
        ),
        opens(
            "body", "An error object of vLLM's own.", seal(frames(body), fixed("body", 16))[0], body
        ),
        opens(
            "error",
            "An error after authentication: END alone.",
            seal(frames([failed]), fixed("error", 16))[0],
            [failed],
        ),
        opens(
            "unknown members",
            "To be ignored.",
            seal(
                [raw(8, b'{"usage":null,"timings":{"x":1},"error":null,"later":1}')],
                fixed("later", 16),
            )[0],
            [End(None, {"x": 1})],
        ),
        opens(
            "large chunk",
            "More than one cell.",
            seal(frames([Body(fixed("large", 3000)), end]), fixed("large salt", 16))[0],
            [Body(fixed("large", 3000)), end],
        ),
        refuse("empty", "Nothing.", [""], "form"),
        refuse("plaintext", "Text that the worker did not seal.", ["Hello"], "form"),
        case(
            "not a string",
            "An object where the platform should hand out a string.",
            "refuse",
            **given,
            chunks=[{"text": "Hello"}],
            reason="form",
        ),
        refuse("version 2", "Another version.", ["2" + first[1:]], "version"),
        refuse("salt padded", "b64 has no padding.", [f"1.{salt_text}==.{ciphertext}"], "encoding"),
        refuse("salt too short", "15 bytes.", [f"1.{b64(salt[:15])}.{ciphertext}"], "encoding"),
        refuse(
            "salt unused bits", "Not canonical.", [f"1.{slack(salt_text)}.{ciphertext}"], "encoding"
        ),
        refuse("newline after", "Base64 readers skip it.", [first + "\n"], "encoding"),
        refuse("unused bits", "Decodes to the same bytes.", [slack(first)], "encoding"),
        refuse(
            "other salt",
            "The salt is part of the key.",
            [f"1.{b64(fixed('o', 16))}.{ciphertext}"],
            "authentication",
        ),
        refuse("flipped", "A changed character.", [flip(first, 700)], "authentication"),
        refuse(
            "other request",
            "A chunk of the answer to another request.",
            [foreign_chunk],
            "authentication",
        ),
        refuse(
            "other client", "A chunk under another client's key.", [other_chunk], "authentication"
        ),
        refuse(
            "reflected",
            "The request itself, made to look like a chunk.",
            [f"1.{salt_text}.{reflected.split('.')[2]}"],
            "authentication",
        ),
        wrong_inside("current time", "Made with Fernet's usual clock.", inside, "timestamp", NOW),
        refuse(
            "Fernet version 0x81",
            "The timestamp is zero and the HMAC fits, but Fernet's version byte is 0x80.",
            [f"1.{salt_text}." + of_version_81(ciphertext, fernet_text(fernet))],
            "authentication",
        ),
        refuse(
            "not skipped",
            "A chunk that does not open spoils the answer, though all others came.",
            [chunks[0], flip(chunks[1], 700), *chunks[1:]],
            "authentication",
        ),
        wrong_inside("nothing inside", "No header.", b"", "length"),
        wrong_inside("a few bytes inside", "Half a header.", good[:8], "length"),
        wrong_inside("header only", "A header without padding.", bytes(9), "length"),
        wrong_inside("not padded", "Ends with the payload.", good, "length"),
        wrong_inside(
            "one cell too many", "2048 where 1024 are enough.", inside + bytes(1024), "length"
        ),
        wrong_inside(
            "length too large",
            "Longer than what is there.",
            inside[:5] + struct.pack(">I", 1016) + inside[9:],
            "length",
        ),
        wrong_inside("padding not zero", "The last byte is 1.", inside[:-1] + b"\1", "padding"),
        wrong_inside(
            "unknown flag", "Only bit 0 is used.", inside[:4] + b"\3" + inside[5:], "flags"
        ),
        wrong_frames("unknown frame", "Type 9.", raw(9, b"") + ended),
        refuse(
            "END before the final chunk",
            "END is whole in a chunk that is not final; an empty final one follows.",
            seal([ended, b""], fixed("early end", 16))[0],
            "frame",
        ),
        wrong_frames(
            "after a note",
            "A note is all there is of its attempt.",
            frames([Note("x"), end])[0],
        ),
        wrong_frames(
            "a note without its words",
            "Status 102, but no `note`.",
            raw(1, b'{"status":102,"kind":"body","content_type":""}') + ended_only,
        ),
        wrong_frames("END missing", "The final chunk ends without END.", frames([head])[0]),
        wrong_frames("half a frame", "The final chunk ends within a frame.", ended + b"\2\0\0"),
        wrong_frames("after END", "A frame follows.", ended + raw(2, b"\0\0x")),
        wrong_frames("HEAD not first", "A text came before.", raw(2, b"\0\0x") + ended),
        wrong_frames(
            "no template",
            "A FILL of a template that is not there.",
            raw(6, b"\0\0x") + frames([end])[0],
        ),
        wrong_frames(
            "wrong number of holes",
            "Two holes for two pieces.",
            raw(5, b"a\0b") + raw(6, b"\0\0x\0y") + frames([end])[0],
        ),
        wrong_frames("65 templates", "64 are allowed.", raw(5, b"a\0b") * 65 + frames([end])[0]),
        wrong_frames("one piece", "A template without a hole.", raw(5, b"a") + ended_only),
        wrong_frames("unknown kind", "HEAD of another kind.", frames([strange, end])[0]),
        wrong_frames(
            "HEAD lacks a member",
            "No content type.",
            raw(1, b'{"status":200,"kind":"body"}') + ended_only,
        ),
        wrong_frames("END lacks a member", "No error.", raw(8, b'{"usage":null,"timings":{}}')),
        wrong_frames("END not an object", "A list.", raw(8, b"[]")),
        wrong_frames("EVENT not an object", "A list.", raw(3, b"[]") + ended_only),
        wrong_frames("EVENT broken", "JSON is cut.", raw(3, b'{"index":0') + ended_only),
        wrong_frames("TEXT too short", "Half a choice.", raw(2, b"\0") + ended_only),
        wrong_frames(
            "FILL too short", "Half a number.", raw(5, b"a\0b") + raw(6, b"\0") + ended_only
        ),
        wrong_frames("SSE not UTF-8", "Half a letter.", raw(7, b"data: \xc3") + ended_only),
        wrong_frames("text not UTF-8", "Half a letter.", raw(2, b"\0\0\xc3") + frames([end])[0]),
        refuse("first missing", "The first chunk never came.", chunks[1:], "missing"),
        refuse("middle missing", "One within never came.", [chunks[0], chunks[2]], "missing"),
        refuse("last missing", "The job ended without the final chunk.", chunks[:2], "truncated"),
        refuse(
            "last missing beside a note",
            "A note is no second attempt: it is still the final chunk that lacks.",
            [*note("loading model org/b", "n3"), *chunks[:2]],
            "truncated",
        ),
        refuse(
            "only replayed beside a note",
            "A note is no answer either.",
            [*note("loading model org/b", "n4"), *pointing("replayed")],
            "replayed",
        ),
        refuse("nothing", "The job ended without any chunk.", [], "truncated"),
        refuse(
            "second attempt", "A new salt after delivery began.", [chunks[0], *again], "restarted"
        ),
        refuse("spliced", "The end of another attempt.", [*chunks[:2], again[2]], "restarted"),
        refuse(
            "conflict",
            "Two different chunks of one number.",
            [chunks[0], conflicting[0], *chunks[1:]],
            "conflict",
        ),
        refuse(
            "after the final chunk",
            "The end comes, but a later number was there.",
            [more[1], *over],
            "after_end",
        ),
        refuse(
            "ordinary chunk before the final one",
            "Number 2, which is not final, came before number 1, which is.",
            [ordinary[2], early[1], early[0]],
            "after_end",
        ),
        refuse(
            "ordinary chunk after the final one",
            "Number 1, which is final, came before number 2, while number 0 was waited for.",
            [early[1], ordinary[2], early[0]],
            "after_end",
        ),
        refuse(
            "only replayed",
            "Every attempt points at another one: that error is the outcome.",
            pointing("replayed"),
            "replayed",
        ),
        refuse(
            "an attempt that said something",
            "An attempt that said something and then points at another is an answer.",
            [
                chunks[0],
                *seal(frames([Text(0, "x"), points("replayed")]), fixed("said", 16))[0],
            ],
            "restarted",
        ),
    ]


def listed(frames: list[Any]) -> list[list[Any]]:
    """Return frames as names and data, in JSON."""
    result: list[list[Any]] = []
    for frame in frames:
        match frame:
            case Head(status, kind, content_type):
                data = {"status": status, "kind": kind, "content_type": content_type}
                result.append(["HEAD", data])
            case Text(index, delta):
                result.append(["TEXT", index, delta])
            case Event(data):
                result.append(["EVENT", data])
            case Body(data):
                result.append(["BODY", data.hex()])
            case Sse(data):
                result.append(["SSE", data.decode()])
            case End(usage, timings, error):
                result.append(["END", {"usage": usage, "timings": timings, "error": error}])
    return result


def simple() -> list[Case]:
    """Cases of simple.json."""
    limits = {"max_ttl_s": 86400, "clock_skew_s": 60}

    def encrypt(content: bytes, label: str, key: Key = WORKER_KEY) -> str:
        with ivs(fixed(label, 16)):
            return key.simple_fernet.encrypt_at_time(content, NOW).decode()

    def produce(name: str, comment: str, content: str) -> Case:
        return case(
            name,
            comment,
            "produce",
            key=KEY,
            content=content,
            now=NOW,
            iv=fixed(name, 16).hex(),
            encrypted_input=encrypt(content.encode(), name),
        )

    def opens(
        name: str, comment: str, content: str, body: Any, key: Key = WORKER_KEY, now: int = NOW
    ) -> Case:
        return case(
            name,
            comment,
            "open",
            keys=[KEY, OTHER],
            now=now,
            **limits,
            encrypted_input=encrypt(content.encode(), name, key),
            kid=key.id,
            body=body,
        )

    def reject(name: str, comment: str, text: str, reason: str, now: int = NOW) -> Case:
        return case(
            name,
            comment,
            "reject",
            keys=[KEY],
            now=now,
            **limits,
            encrypted_input=text,
            reason=reason,
        )

    def bare(text: str) -> Any:
        return {"messages": [{"role": "user", "content": text}]}

    good = encrypt(b"hello", "good")
    objects: list[dict[str, Any]] = [
        {"text": "Hel"},
        {"text": "lo", "index": 0},
        {"text": "", "done": True, "finish_reason": "stop", "usage": None},
    ]
    sealer = SimpleSealer(WORKER_KEY)
    chunks = []
    with patch("cryptography.fernet.time.time", lambda: NOW):
        for number, obj in enumerate(objects):
            with ivs(fixed(f"simple {number}", 16)):
                chunks.append(sealer.seal(obj))
    request = '{"prompt":"Hi","sampling_params":{"max_tokens":5}}'
    return [
        produce("bare text", "A prompt.", "Grüße!"),
        produce("body", "A `generate` body.", request),
        opens("text", "Becomes a user message.", "Grüße!", bare("Grüße!")),
        opens("object", "Taken as it is.", request, json.loads(request)),
        opens("spaces before", "An object all the same.", "\n " + request, json.loads(request)),
        opens("JSON, not an object", "Bare text.", "[1]", bare("[1]")),
        opens("empty text", "A message all the same.", "", bare("")),
        opens("U+FEFF first", "Neither white space nor dropped.", "\ufeff{}", bare("\ufeff{}")),
        opens("U+00A0 first", "Not JSON's white space.", "\u00a0{}", bare("\u00a0{}")),
        opens(
            "broken JSON",
            "It begins with `{`, so it is never bare text: no body, and the answer is an error.",
            '{"prompt":',
            None,
        ),
        opens("second key", "Every key is tried.", "hello", bare("hello"), OTHER_KEY),
        opens("60 s early", "Within the skew.", "hello", bare("hello"), now=NOW - 60),
        opens("one day later", "The longest life.", "hello", bare("hello"), now=NOW + 86400),
        reject("empty", "Nothing.", "", "authentication"),
        reject("newline after", "Base64 readers skip it.", good + "\n", "encoding"),
        reject("unused bits", "Decodes to the same bytes.", slack(good), "encoding"),
        reject(
            "Fernet version 0x81",
            "The HMAC fits, but Fernet's version byte is 0x80.",
            of_version_81(good, KEY),
            "authentication",
        ),
        reject("flipped", "A changed character.", flip(good, 60), "authentication"),
        reject(
            "wrong key",
            "A key that the worker does not have.",
            encrypt(b"hello", "wrong", OTHER_KEY),
            "authentication",
        ),
        reject(
            "sealed request",
            "Derived keys are not the shared key.",
            sealed_of(pad_request(request_of().encode()), "iv").split(".")[2],
            "authentication",
        ),
        reject("61 s early", "Past the skew.", good, "too_new", NOW - 61),
        reject("a second too late", "Past the longest life.", good, "too_old", NOW + 86401),
        case(
            "answer",
            "Three chunks; spaces fill them to 1024 bytes.",
            "answer",
            key=KEY,
            chunks=chunks,
            objects=[{"seq": n, **obj} for n, obj in enumerate(objects)],
        ),
    ]


def hpke() -> list[Case]:
    """Cases of hpke.json."""
    from tools import hpke_vectors  # it is made with what stands above

    return hpke_vectors.cases()


FILES: dict[str, tuple[str, Callable[[], list[Case]]]] = {
    "keys.json": ("Fernet keys and what SPEC.md section 2 derives from them.", keys),
    "requests.json": ("Requests: SPEC.md sections 3, 4 and 7.", requests),
    "answers.json": ("Answers: SPEC.md sections 5, 6 and 10.", answers),
    "simple.json": ("The simple form: SPEC.md section 9.", simple),
    "hpke.json": ("Public-key mode: SPEC.md section 13.", hpke),
}


def build() -> dict[str, str]:
    """Return the text of every file by its name."""
    return {
        name: json.dumps({"comment": comment, "cases": cases()}, indent=1, ensure_ascii=False)
        + "\n"
        for name, (comment, cases) in FILES.items()
    }


def main() -> int:
    """Write the files, or compare them with `--check`; 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = False
    for name, text in build().items():
        path = ROOT / "vectors" / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale = True
        print(f"{'stale' if check else 'wrote'}: vectors/{name}")
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
