"""The vectors: produced anew, fulfilled by the project and by a second client.

The second client below was written from SPEC.md alone with stock Fernet, HKDF and json, and
shares no code with the project: what it opens, another language can open.
"""

import base64
import json
import os
import re
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as changed

import crypto
import simple_form
from delivery import Delivery
from errors import (
    AnswerError,
    ConfigError,
    MissingChunk,
    Rejected,
    RequestError,
    RestartedAnswer,
    TamperedChunk,
    TruncatedAnswer,
)
from frames import Body, End, Event, FrameEncoder, Head, Sse, Text
from keys import Key, KeyRing, generate_key
from protocol import Request, parse_generate
from tools import make_vectors

ROOT = Path(crypto.__file__).parent
Case = dict[str, Any]

MEMBERS = {
    ("keys", "derive"): "key request_id response_secret salt kid request_key response_key",
    ("keys", "refuse"): "key reason",
    ("requests", "produce"): "key json iv sealed",
    ("requests", "open"): "keys sealed request",
    ("requests", "reject"): "keys sealed reason",
    ("requests", "check"): "keys sealed audience now max_ttl_s clock_skew_s code",
    ("answers", "produce"): "key request_id response_secret salt payloads ivs chunks",
    ("answers", "open"): "key request_id response_secret chunks frames",
    ("answers", "refuse"): "key request_id response_secret chunks reason",
    ("simple", "produce"): "key content now iv encrypted_input",
    ("simple", "open"): "keys encrypted_input now max_ttl_s clock_skew_s kid body",
    ("simple", "reject"): "keys encrypted_input now max_ttl_s clock_skew_s reason",
    ("simple", "answer"): "key chunks objects",
    ("hpke", "derive"): "private_key public_key key_id",
    ("hpke", "refuse_key"): "public_key reason",
    ("hpke", "refuse_private_key"): "private_key reason",
    ("hpke", "open"): "private_keys keys sealed request",
    ("hpke", "reject"): "private_keys keys sealed reason",
    ("hpke", "answer"): "key reply_private_key request_id response_secret chunks payloads",
    ("hpke", "refuse_answer"): "key reply_private_key request_id response_secret chunks reason",
}
REASONS = {
    "keys": "length alphabet canonical",
    "requests": "form version unknown_key encoding timestamp authentication length padding json "
    "members",
    "answers": "form version encoding timestamp authentication length padding flags frame missing "
    "truncated restarted conflict after_end replayed",
    "simple": "encoding authentication too_old too_new",
    "hpke": "prefix encoding length key form envelope inside members share authentication",
}


# The second client ------------------------------------------------------------------------


class Refused(Exception):
    """The second client's only exception; its text is the reason."""


def pad_to(size: int) -> int:
    if size <= 1 << 20:
        return next(1024 << k for k in range(11) if size <= 1024 << k)
    return -(-size // (1 << 20)) * (1 << 20)


def canonical(text: str, *, padded: bool = True) -> bytes:
    if not padded and "=" in text:
        raise Refused("encoding")
    full = text if padded else text + "=" * (-len(text) % 4)
    try:
        data = base64.urlsafe_b64decode(full)
        same = base64.urlsafe_b64encode(data).decode() == full
    except ValueError:
        same = False
    if not same:
        raise Refused("encoding")
    return data


def derive(secret: bytes, info: str, salt: bytes = b"") -> bytes:
    out = HKDF(algorithm=SHA256(), length=32, salt=salt, info=info.encode()).derive(secret)
    return base64.urlsafe_b64encode(out)


def key_secret(key: str) -> bytes:
    return base64.urlsafe_b64decode(key)


def key_id(key: str) -> str:
    derived = derive(key_secret(key), "sealed-vllm/1 key-id")
    return base64.urlsafe_b64decode(derived)[:8].hex()


def request_key(key: str) -> bytes:
    return derive(key_secret(key), "sealed-vllm/1 request " + key_id(key))


def response_key(key: str, request_id: str, response_secret: str, salt: bytes) -> bytes:
    info = f"sealed-vllm/1 response {key_id(key)} {request_id}"
    return derive(canonical(response_secret, padded=False), info, salt)


def fernet_open(key: bytes, ciphertext: str) -> bytes:
    data = canonical(ciphertext)
    if data[1:9] != bytes(8):
        raise Refused("timestamp")
    try:
        return Fernet(key).decrypt(ciphertext)
    except InvalidToken:
        raise Refused("authentication") from None


def strip_padding(inside: bytes, header: int, length: int) -> bytes:
    if header + length > len(inside) or pad_to(header + length) != len(inside):
        raise Refused("length")
    if any(inside[header + length :]):
        raise Refused("padding")
    return inside[header : header + length]


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    return 0


def read_json(data: bytes) -> Any:
    def no(_: str) -> None:
        raise ValueError

    def number(text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise ValueError
        return value

    try:
        value = json.loads(data.decode(), parse_constant=no, parse_float=number)
        json.dumps(value, ensure_ascii=False).encode()
        if depth(value) > 100:
            raise ValueError
    except ValueError:
        raise Refused("json") from None
    return value


def seal_json(key: str, text: str, iv: bytes) -> str:
    content = text.encode()
    inside = struct.pack(">I", len(content)) + content
    inside += bytes(pad_to(len(inside)) - len(inside))
    with patch("os.urandom", lambda _: iv):
        ciphertext = Fernet(request_key(key)).encrypt_at_time(inside, 0)
    return f"1.{key_id(key)}.{ciphertext.decode()}"


def open_request(keys: list[str], sealed: str, more: str = "") -> dict[str, Any]:
    parts = sealed.split(".", 2)
    if len(parts) != 3 or len(sealed) > 15_728_640:
        raise Refused("form")
    if parts[0] != "1":
        raise Refused("version")
    by_id = {key_id(key): key for key in keys}
    if parts[1] not in by_id:
        raise Refused("unknown_key")
    inside = fernet_open(request_key(by_id[parts[1]]), parts[2])
    if len(inside) < 4:
        raise Refused("length")
    request = read_json(strip_padding(inside, 4, struct.unpack_from(">I", inside)[0]))
    names = "request_id response_secret issued_at expires_at audience route method body"
    try:
        ok = (
            set(request) == {*names.split(), *more.split()}
            and re.fullmatch("[0-9a-f]{32}", request["request_id"]) is not None
            and len(canonical(request["response_secret"], padded=False)) == 32
            and all(type(request[name]) is int for name in ("issued_at", "expires_at"))
            and all(0 <= request[name] < 2**53 for name in ("issued_at", "expires_at"))
            and isinstance(request["audience"], str)
            and isinstance(request["route"], str)
            and request["method"] in ("GET", "POST")
            and (request["body"] is None or isinstance(request["body"], dict))
            and (request["method"] == "POST" or request["body"] is None)
        )
    except (TypeError, Refused):
        ok = False
    if not ok:
        raise Refused("members")
    return dict(request)


def check_request(
    request: dict[str, Any], audience: str, now: int, max_ttl_s: int, clock_skew_s: int
) -> str | None:
    if request["audience"] != audience:
        return "wrong_audience"
    if request["issued_at"] > now + clock_skew_s:
        return "not_yet_valid"
    expires_at, issued_at = request["expires_at"], request["issued_at"]
    if expires_at <= issued_at or expires_at < now - clock_skew_s:
        return "expired"
    return "ttl_too_long" if expires_at - issued_at > max_ttl_s else None


def open_chunk(
    key: str, request_id: str, response_secret: str, chunk: Any
) -> tuple[bytes, int, bool, bytes]:
    parts = chunk.split(".", 2) if isinstance(chunk, str) else []
    if len(parts) != 3 or len(chunk) > 699_173:
        raise Refused("form")
    if parts[0] != "1":
        raise Refused("version")
    salt = canonical(parts[1], padded=False)
    if len(salt) != 16:
        raise Refused("encoding")
    inside = fernet_open(response_key(key, request_id, response_secret, salt), parts[2])
    if len(inside) < 9:
        raise Refused("length")
    seq, flags, length = struct.unpack_from(">IBI", inside)
    payload = strip_padding(inside, 9, length)
    if flags not in (0, 1):
        raise Refused("flags")
    return salt, seq, flags == 1, payload


def seal_chunk(key: str, request: dict[str, Any], salt: bytes, seq: int, payload: bytes) -> str:
    inside = struct.pack(">IBI", seq, 1, len(payload)) + payload
    inside += bytes(pad_to(len(inside)) - len(inside))
    derived = response_key(key, request["request_id"], request["response_secret"], salt)
    text = base64.urlsafe_b64encode(salt).decode().rstrip("=")
    return f"1.{text}.{Fernet(derived).encrypt_at_time(inside, 0).decode()}"


class Attempt:
    """What came under one salt."""

    def __init__(self) -> None:
        self.chunks: dict[int, tuple[str, bool, bytes]] = {}
        self.next_seq = 0
        self.payload = b""
        self.frames: list[list[Any]] = []
        self.ended = False

    def take(self, chunk: str, seq: int, final: bool, payload: bytes) -> None:
        if self.chunks.setdefault(seq, (chunk, final, payload))[0] != chunk:
            raise Refused("conflict")
        finals = [seq for seq, (_, final, _) in self.chunks.items() if final]
        if finals and max(self.chunks) > min(finals):
            raise Refused("after_end")
        while self.next_seq in self.chunks:
            _, final, payload = self.chunks[self.next_seq]
            self.next_seq += 1
            self.payload += payload
            try:
                self.frames, rest = read_frames(self.payload)
            except (Refused, ValueError, TypeError, KeyError, struct.error, IndexError):
                raise Refused("frame") from None
            if self.is_note and len(self.frames) > 1:
                raise Refused("frame")
            self.ended = bool(self.frames) and self.frames[-1][0] == "END"
            if self.ended != final or (final and rest):
                raise Refused("frame")

    @property
    def begun(self) -> bool:
        return any(name not in ("HEAD", "NOTE") for name, *_ in self.frames)

    @property
    def is_note(self) -> bool:
        return bool(self.frames) and self.frames[0][0] == "NOTE"

    @property
    def points(self) -> str | None:
        """The error code, where that is all there is and it names no fault of the answer."""
        if not self.ended or any(name not in ("HEAD", "END") for name, *_ in self.frames):
            return None
        code = (self.frames[-1][1]["error"] or {}).get("code")
        return code if code in ("already_running", "replayed") else None


def open_answer(
    chunks: list[str], opened: Callable[[str], tuple[bytes, int, bool, bytes]]
) -> list[list[Any]]:
    attempts: dict[bytes, Attempt] = {}
    delivered: Attempt | None = None
    for chunk in chunks:
        salt, seq, final, payload = opened(chunk)
        attempt = attempts.setdefault(salt, Attempt())
        attempt.take(chunk, seq, final, payload)
        if not attempt.begun or (attempt.points and attempt is not delivered):
            continue
        if delivered not in (None, attempt):
            raise Refused("restarted")
        delivered = attempt
        if attempt.ended:
            return attempt.frames
    answers = [attempt for attempt in attempts.values() if not attempt.is_note]
    left = [attempt for attempt in answers if not attempt.points]
    if answers and not left:
        raise Refused(str(answers[0].points))
    if delivered and len(left) > 1:
        raise Refused("restarted")
    missing = any(attempt.next_seq <= max(attempt.chunks) for attempt in left)
    raise Refused("missing" if missing else "truncated")


def read_frames(data: bytes) -> tuple[list[list[Any]], bytes]:
    """Return the whole frames of `data` and what is left of it."""
    frames: list[list[Any]] = []
    templates: list[list[bytes]] = []
    at, kind = 0, 0
    while len(data) - at >= 5:
        first = at == 0
        after_end = kind == 8
        kind, length = struct.unpack_from(">BI", data, at)
        content = data[at + 5 : at + 5 + length]
        if len(content) != length:
            break
        if after_end or (kind == 1 and not first):
            raise ValueError
        at += 5 + length
        if frame := read_frame(kind, content, templates):
            frames.append(frame)
    return frames, data[at:]


def read_frame(kind: int, content: bytes, templates: list[list[bytes]]) -> list[Any] | None:
    match kind:
        case 1:
            head = read_object(content, status=int, kind=str, content_type=str)
            if head["status"] == 102:
                return ["NOTE", read_object(content, note=str)["note"]]
            if head["kind"] not in ("generate", "body", "sse"):
                raise ValueError
            return ["HEAD", head]
        case 2:
            return ["TEXT", struct.unpack_from(">H", content)[0], content[2:].decode()]
        case 3:
            event = read_json(content)
            if not isinstance(event, dict):
                raise ValueError
            return ["EVENT", event]
        case 4:
            return ["BODY", content.hex()]
        case 5:
            content.decode()
            templates.append(content.split(b"\0"))
            if len(templates) > 64 or len(templates[-1]) < 2:
                raise ValueError
            return None
        case 6:
            pieces = templates[struct.unpack_from(">H", content)[0]]
            holes = content[2:].split(b"\0")
            if len(holes) != len(pieces) - 1:
                raise ValueError
            line = b"".join(a + b for a, b in zip(pieces, [*holes, b""], strict=True))
            return ["SSE", line.decode()]
        case 7:
            return ["SSE", content.decode()]
        case 8:
            null = type(None)
            end = read_object(content, usage=(dict, null), timings=dict, error=(dict, null))
            return ["END", end]
    raise ValueError


def read_object(content: bytes, **members: Any) -> dict[str, Any]:
    value = read_json(content)
    if not all(isinstance(value[name], kind) for name, kind in members.items()):
        raise ValueError
    return {name: value[name] for name in members}


def open_simple(
    keys: list[str], ciphertext: str, now: int, max_ttl_s: int, clock_skew_s: int
) -> tuple[str, Any]:
    data = canonical(ciphertext)
    for key in keys:
        try:
            content = Fernet(key).decrypt(ciphertext)
        except InvalidToken:
            continue
        at = int.from_bytes(data[1:9], "big")
        if now < at - clock_skew_s:
            raise Refused("too_new")
        if now > at + max_ttl_s:
            raise Refused("too_old")
        text = content.decode()
        if text.lstrip(" \t\r\n").startswith("{"):
            try:
                return key_id(key), read_json(text.encode())
            except Refused:
                return key_id(key), None
        return key_id(key), {"messages": [{"role": "user", "content": text}]}
    raise Refused("authentication")


def refusal(action: Callable[[], Any]) -> str | None:
    try:
        action()
    except Refused as refused:
        return str(refused)
    return None


# The cases --------------------------------------------------------------------------------


def cases(file: str, *expects: str) -> pytest.MarkDecorator:
    """Return a decorator that runs a test with every case of `file` that expects this."""
    found = json.loads((ROOT / "vectors" / f"{file}.json").read_text(encoding="utf-8"))["cases"]
    chosen = [case for case in found if case["expect"] in expects]
    assert chosen
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case["name"])


@pytest.mark.parametrize("name", make_vectors.FILES)
def test_the_files_are_what_the_tool_makes(name: str) -> None:
    assert (ROOT / "vectors" / name).read_text(encoding="utf-8") == make_vectors.build()[name], (
        "run python tools/make_vectors.py, or mend what changed the protocol"
    )


@pytest.mark.parametrize("file", REASONS)
def test_every_case_has_the_members_and_reasons_that_the_spec_lists(file: str) -> None:
    data = json.loads((ROOT / "vectors" / f"{file}.json").read_text(encoding="utf-8"))
    assert set(data) == {"comment", "cases"}
    names = [case["name"] for case in data["cases"]]
    reasons = {case["reason"] for case in data["cases"] if "reason" in case}
    assert reasons == set(REASONS[file].split())
    spec = (ROOT / "SPEC.md").read_text(encoding="utf-8").partition("## 12.")[2]
    for reason in reasons:
        assert f"`{reason}`" in spec
    for case in data["cases"]:
        wanted = MEMBERS[file, case["expect"]].split()
        assert set(case) == {"name", "comment", "expect", *wanted}, case["name"]
        same = [
            case["expect"] == other["expect"]
            for other in data["cases"]
            if other["name"] == case["name"]
        ]
        assert sum(same) == 1, f"{case['name']} is not the only one of {len(names)}"


@cases("keys", "derive")
def test_keys_derive(case: Case) -> None:
    salt = bytes.fromhex(case["salt"])
    assert key_id(case["key"]) == case["kid"]
    assert request_key(case["key"]).decode() == case["request_key"]
    derived = response_key(case["key"], case["request_id"], case["response_secret"], salt)
    assert derived.decode() == case["response_key"]

    key = Key.parse(case["key"])
    assert key.id == case["kid"]
    opened = Fernet(case["request_key"]).decrypt(key.request_fernet.encrypt(b"x"))
    assert opened == b"x"
    fernet = key.response_fernet(request_with(case), salt)
    assert Fernet(case["response_key"]).decrypt(fernet.encrypt(b"x")) == b"x"


@cases("keys", "refuse")
def test_keys_refuse(case: Case) -> None:
    with pytest.raises(ConfigError) as caught:
        Key.parse(case["key"])
    words = {
        "length": ("44 characters", "empty"),
        "alphabet": ("characters other than",),
        "canonical": ("not canonical",),
    }
    assert any(word in str(caught.value) for word in words[case["reason"]])


def request_with(case: Case) -> Request:
    request = crypto.new_request("worker", None, audience="a", ttl_s=1, method="GET")
    return changed(request, request_id=case["request_id"], response_secret=case["response_secret"])


def opener(case: Case) -> crypto.RequestOpener:
    return crypto.RequestOpener(
        KeyRing.parse(",".join(case["keys"])),
        case.get("audience", ""),
        max_ttl_s=case.get("max_ttl_s", 0),
        clock_skew_s=case.get("clock_skew_s", 0),
        now=lambda: case.get("now", 0),
    )


@cases("requests", "produce")
def test_requests_produce(case: Case) -> None:
    iv = bytes.fromhex(case["iv"])
    assert seal_json(case["key"], case["json"], iv) == case["sealed"]
    opened = opener({"keys": [case["key"]]}).open(case["sealed"])
    assert opened.request.encode().decode() == case["json"]
    with patch("cryptography.fernet.os.urandom", lambda _: iv):
        assert crypto.seal_request(opened.request, opened.key) == case["sealed"]


@cases("requests", "open")
def test_requests_open(case: Case) -> None:
    assert open_request(case["keys"], case["sealed"]) == case["request"]
    assert json.loads(opener(case).open(case["sealed"]).request.encode()) == case["request"]


@cases("requests", "reject")
def test_requests_reject(case: Case) -> None:
    assert refusal(partial(open_request, case["keys"], case["sealed"])) == case["reason"]
    with pytest.raises(Rejected):
        opener(case).open(case["sealed"])


@cases("requests", "check")
def test_requests_check(case: Case) -> None:
    limits = {name: case[name] for name in ("audience", "now", "max_ttl_s", "clock_skew_s")}
    assert check_request(open_request(case["keys"], case["sealed"]), **limits) == case["code"]
    worker = opener(case)
    request = worker.open(case["sealed"]).request
    if case["code"] is None:
        worker.check(request)
        return
    with pytest.raises(RequestError) as caught:
        worker.check(request)
    assert caught.value.code == case["code"]
    spec = (ROOT / "SPEC.md").read_text(encoding="utf-8")
    assert re.search(rf"\| `{case['code']}` \| {caught.value.status} \|", spec)


@cases("answers", "produce")
def test_answers_produce(case: Case) -> None:
    sealer = crypto.AnswerSealer(
        request_with(case), Key.parse(case["key"]), salt=bytes.fromhex(case["salt"])
    )
    left = [bytes.fromhex(iv) for iv in case["ivs"]]
    chunks: list[str] = []
    with patch("cryptography.fernet.os.urandom", lambda _: left.pop(0)):
        for item in case["payloads"]:
            chunks += sealer.seal(bytes.fromhex(item["payload"]), final=item["final"])
    assert chunks == case["chunks"]
    opened = [open_chunk(*ids(case), chunk) for chunk in chunks]
    assert [payload.hex() for *_, payload in opened] == [
        item["payload"] for item in case["payloads"]
    ]
    assert [final for _, _, final, _ in opened] == [item["final"] for item in case["payloads"]]


def ids(case: Case) -> tuple[str, str, str]:
    return case["key"], case["request_id"], case["response_secret"]


def delivered(case: Case) -> list[list[Any]]:
    """Open an answer with the project's client; raises its errors."""
    chunk_opener = crypto.AnswerOpener(request_with(case), Key.parse(case["key"]))
    delivery = Delivery(chunk_opener, streamed=True)
    events = [event for chunk in case["chunks"] for event in delivery.take([chunk])]
    if not delivery.ended:
        raise delivery.fault()
    return joined(make_vectors.listed(events))


def joined(frames: list[list[Any]]) -> list[list[Any]]:
    """Join neighbouring texts of one choice: where they are cut is not part of the answer."""
    result: list[list[Any]] = []
    for frame in frames:
        if frame[0] == "TEXT" and result and result[-1][:2] == frame[:2]:
            result[-1] = [*frame[:2], result[-1][2] + frame[2]]
        else:
            result.append(frame)
    return result


@cases("answers", "open")
def test_answers_open(case: Case) -> None:
    assert open_answer(case["chunks"], partial(open_chunk, *ids(case))) == case["frames"]
    assert delivered(case) == joined(case["frames"])


@cases("answers", "refuse")
def test_answers_refuse(case: Case) -> None:
    action = partial(open_answer, case["chunks"], partial(open_chunk, *ids(case)))
    assert refusal(action) == case["reason"]
    sequence = {
        "frame": AnswerError,
        "missing": MissingChunk,
        "truncated": TruncatedAnswer,
        "restarted": RestartedAnswer,
        "conflict": TamperedChunk,
        "after_end": TamperedChunk,
        "replayed": RequestError,
    }
    with pytest.raises(sequence.get(case["reason"], AnswerError)) as caught:
        delivered(case)
    if case["reason"] == "replayed":
        assert isinstance(caught.value, RequestError) and caught.value.code == "replayed"
    if case["reason"] not in sequence and case["name"] != "not skipped":
        assert isinstance(caught.value, TamperedChunk)
        chunk_opener = crypto.AnswerOpener(request_with(case), Key.parse(case["key"]))
        with pytest.raises(TamperedChunk):
            chunk_opener.open(case["chunks"][0])


def simple_limits(case: Case) -> dict[str, Any]:
    return {"max_ttl_s": case["max_ttl_s"], "clock_skew_s": case["clock_skew_s"]}


@cases("simple", "produce")
def test_simple_produce(case: Case) -> None:
    with patch("os.urandom", lambda _: bytes.fromhex(case["iv"])):
        ciphertext = Fernet(case["key"]).encrypt_at_time(case["content"].encode(), case["now"])
    assert ciphertext.decode() == case["encrypted_input"]


@cases("simple", "open")
def test_simple_open(case: Case) -> None:
    ciphertext, now = case["encrypted_input"], case["now"]
    limits = simple_limits(case)
    wanted = case["kid"], case["body"]
    assert open_simple(case["keys"], ciphertext, now, **limits) == wanted
    ring = KeyRing.parse(",".join(case["keys"]))
    opened = simple_form.open_simple(ring, ciphertext, now=lambda: now, **limits)
    assert opened.key.id == case["kid"]
    if case["body"] is None:
        with pytest.raises(RequestError):
            parse_generate(opened.body)
    else:
        assert json.loads(opened.body) == case["body"]


@cases("simple", "reject")
def test_simple_reject(case: Case) -> None:
    ciphertext, now = case["encrypted_input"], case["now"]
    limits = simple_limits(case)
    action = partial(open_simple, case["keys"], ciphertext, now, **limits)
    assert refusal(action) == case["reason"]
    ring = KeyRing.parse(",".join(case["keys"]))
    with pytest.raises(Rejected):
        simple_form.open_simple(ring, ciphertext, now=lambda: now, **limits)


@cases("simple", "answer")
def test_simple_answer(case: Case) -> None:
    opened = [Fernet(case["key"]).decrypt(chunk) for chunk in case["chunks"]]
    assert [json.loads(content) for content in opened] == case["objects"]
    assert {len(content) for content in opened} == {1024}
    key = Key.parse(case["key"])
    assert [simple_form.open_simple_answer(key, chunk) for chunk in case["chunks"]] == case[
        "objects"
    ]


# The two clients against each other -------------------------------------------------------

texts = st.text(st.characters(codec="utf-8"))
answers = st.lists(
    st.one_of(
        st.builds(Text, st.integers(0, 65535), texts),
        st.builds(Body, st.binary()),
        st.builds(lambda text: Event({"index": 0, "reasoning": text}), texts),
        st.builds(lambda text: Sse(b'data: {"content":' + json.dumps(text).encode() + b"}"), texts),
    ),
    max_size=8,
)


@given(st.lists(answers, min_size=1, max_size=4), st.dictionaries(texts, texts, max_size=3))
@settings(max_examples=60, deadline=None)
def test_what_the_worker_seals_the_second_client_opens(
    groups: list[list[Any]], members: dict[str, str]
) -> None:
    key = generate_key()
    body = json.dumps(members).encode()
    issued = crypto.new_request("/v1/x", body, audience="a", ttl_s=60)
    request = open_request([key], crypto.seal_request(issued, Key.parse(key)))
    assert request["body"] == members

    encoder = FrameEncoder()
    sealer = crypto.AnswerSealer(issued, Key.parse(key))
    events: list[Any] = [Head(200, "generate", "application/json")]
    end = End({"total_tokens": 3}, {"total_ms": 1.5})
    chunks = sealer.seal(encoder.encode(events))
    for group in groups:
        chunks += sealer.seal(encoder.encode(group))
        events += group
    chunks += sealer.seal(encoder.encode([end]), final=True)

    reader = partial(open_chunk, key, request["request_id"], request["response_secret"])
    frames = open_answer(chunks, reader)
    assert bodies_joined(frames) == bodies_joined(make_vectors.listed([*events, end]))


def bodies_joined(frames: list[list[Any]]) -> list[list[Any]]:
    result: list[list[Any]] = []
    for frame in joined(frames):
        if frame[0] == "BODY" and result and result[-1][0] == "BODY":
            result[-1] = ["BODY", result[-1][1] + frame[1]]
        else:
            result.append(frame)
    return result


@given(st.dictionaries(texts, texts, max_size=3), st.binary(max_size=2000))
@settings(max_examples=40, deadline=None)
def test_what_the_second_client_seals_the_project_opens(
    members: dict[str, str], payload: bytes
) -> None:
    key = generate_key()
    request = {
        "body": members,
        "route": "generate",
        "method": "POST",
        "audience": "a",
        "issued_at": 5,
        "expires_at": 65,
        "request_id": os.urandom(16).hex(),
        "response_secret": base64.urlsafe_b64encode(os.urandom(32)).decode().rstrip("="),
    }
    sealed = seal_json(key, json.dumps(request, ensure_ascii=False), os.urandom(16))
    opened = opener({"keys": [generate_key(), key]}).open(sealed)
    assert json.loads(opened.request.encode()) == request

    chunk = seal_chunk(key, request, os.urandom(16), 7, payload)
    answer = crypto.AnswerOpener(opened.request, opened.key).open(chunk)
    assert (answer.seq, answer.final, answer.payload) == (7, True, payload)
