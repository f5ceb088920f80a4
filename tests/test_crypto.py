"""Keys, sealing and opening, from an attacker's side.

Each `check_…` states one promise through the public doors. It is run twice: on the project
as it is, and on a copy weakened in one place (`WEAKENED`), where it has to fail.
"""

import base64
import copy
import os
import pickle
import statistics
import string
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from heapq import heappop
from typing import Any

import pytest
from cryptography.fernet import Fernet, InvalidToken
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as changed

import crypto
import fernets
import simple_form
from crypto import AnswerOpener, AnswerSealer, OpenedChunk, RequestOpener, new_request, seal_request
from errors import ConfigError, Rejected, RequestError, TamperedChunk
from fernets import b64
from keys import Key, KeyRing, generate_key
from protocol import MAX_CHUNK_BYTES, MAX_REQUEST_BYTES, Request, pad_request, parse_generate
from replay_guard import ReplayGuard
from simple_form import OpenedSimple, SimpleSealer, open_simple, open_simple_answer
from tests import promises
from tests.attack.weakened import is_decodable, opened_if_known

NOW = 1_790_000_000
AUDIENCE = "endpoint"
PROMPT = "the-canary-of-the-prompt"
KEY = Key.parse(generate_key())
OTHER = Key.parse(generate_key())


def request_of(route: str = "generate", **settings: Any) -> Request:
    given: dict[str, Any] = {"audience": AUDIENCE, "ttl_s": 600, "now": lambda: NOW}
    body = b'{"prompt":"%s"}' % PROMPT.encode()
    return new_request(route, **given | {"body": body} | settings)


def opener_of(*keys: Key, now: float = NOW, **settings: Any) -> RequestOpener:
    given: dict[str, Any] = {"max_ttl_s": 86400, "clock_skew_s": 60, "now": lambda: now}
    return RequestOpener(KeyRing(keys or (KEY,)), AUDIENCE, **given | settings)


def rejected(action: Callable[..., Any], *args: Any) -> Rejected:
    with pytest.raises(Rejected) as caught:
        action(*args)
    return caught.value


def tampered(action: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(TamperedChunk):
        action(*args)


def refused(action: Callable[..., Any], *args: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        action(*args)
    return caught.value


def code_of(action: Callable[..., Any], *args: Any) -> Any:
    return refused(action, *args).code


def flipped(text: str, start: int = 0) -> Iterator[str]:
    """Yield every text that differs in one bit of one decoded byte of its ciphertext."""
    head, dot, ciphertext = text.rpartition(".")
    raw = bytearray(base64.urlsafe_b64decode(ciphertext))
    for at in range(start, len(raw)):
        raw[at] ^= 1 << at % 8
        yield head + dot + base64.urlsafe_b64encode(raw).decode()
        raw[at] ^= 1 << at % 8


def respelt(text: str) -> list[str]:
    """Return other spellings of `text` that lenient base64 readers decode to the same bytes."""
    alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
    body = text.rstrip("=")
    pads = text[len(body) :]
    spellings = [text + "\n", "\n".join((text[:300], text[300:])), text + "====", " " + text]
    if pads:
        spellings.append(body[:-1] + alphabet[alphabet.index(body[-1]) + 1] + pads)
    if set(text) & set("-_"):
        spellings.append(text.replace("-", "+").replace("_", "/"))
    return spellings


# The promises -----------------------------------------------------------------------------


def check_request_bits() -> None:
    sealed = seal_request(request_of(), KEY)
    worker = opener_of()
    for damaged in flipped(sealed):
        rejected(worker.open, damaged)
    for at in range(len(sealed)):
        damaged = sealed[:at] + ("B" if sealed[at] == "A" else "A") + sealed[at + 1 :]
        rejected(worker.open, damaged)


def check_chunk_bits() -> None:
    request = request_of()
    [chunk] = AnswerSealer(request, KEY).seal(b"answer", final=True)
    client = AnswerOpener(request, KEY)
    for damaged in flipped(chunk):
        tampered(client.open, damaged)
    for at in range(len(chunk)):
        damaged = chunk[:at] + ("B" if chunk[at] == "A" else "A") + chunk[at + 1 :]
        tampered(client.open, damaged)
    assert client.open(chunk).payload == b"answer"


def check_one_spelling() -> None:
    request = request_of()
    worker, client = opener_of(), AnswerOpener(request, KEY)
    for _ in range(3):
        for other in respelt(seal_request(request, KEY)):
            rejected(worker.open, other)
        for other in respelt(AnswerSealer(request, KEY).seal(b"")[0]):
            tampered(client.open, other)
        simple = KEY.simple_fernet.encrypt_at_time(b"hello", NOW).decode()
        for other in respelt(simple):
            rejected(simple_of, other)


def check_no_clock() -> None:
    request = request_of()
    sealed = KEY.request_fernet.encrypt(pad_request(request.encode())).decode()
    rejected(lambda: opener_of().open(f"1.{KEY.id}.{sealed}"))
    for text in (seal_request(request, KEY), *AnswerSealer(request, KEY).seal(b"x")):
        raw = base64.urlsafe_b64decode(text.rpartition(".")[2])
        assert raw[1:9] == bytes(8)


def check_padding_is_zero() -> None:
    inside = pad_request(request_of().encode())[:-1] + b"\1"
    sealed = KEY.request_fernet.encrypt_at_time(inside, 0).decode()
    rejected(lambda: opener_of().open(f"1.{KEY.id}.{sealed}"))


def check_answer_is_bound_to_request() -> None:
    mine, theirs = request_of(), request_of()
    [chunk] = AnswerSealer(theirs, KEY).seal(b"their answer", final=True)
    tampered(lambda: AnswerOpener(mine, KEY).open(chunk))
    same_secret = changed(theirs, request_id=mine.request_id)
    tampered(lambda: AnswerOpener(same_secret, KEY).open(chunk))


def check_answer_is_bound_to_client() -> None:
    request = request_of()
    [chunk] = AnswerSealer(request, OTHER).seal(b"", final=True)
    tampered(lambda: AnswerOpener(request, KEY).open(chunk))


def check_answer_is_bound_to_attempt() -> None:
    request = request_of()
    client = AnswerOpener(request, KEY)
    first, second = AnswerSealer(request, KEY), AnswerSealer(request, KEY)
    [one], [two] = first.seal(b"one"), second.seal(b"two")
    assert client.open(one).salt != client.open(two).salt
    swapped = ".".join((*one.split(".")[:2], two.split(".")[2]))
    tampered(lambda: client.open(swapped))


def check_no_reflection() -> None:
    """Two fences: the keys differ, and neither inside has the other's form."""
    request = request_of()
    sealed = seal_request(request, KEY)
    [chunk] = AnswerSealer(request, KEY).seal(b"", final=True)
    rejected(lambda: opener_of().open(f"1.{KEY.id}.{chunk.rpartition('.')[2]}"))
    salt = chunk.split(".")[1]
    tampered(lambda: AnswerOpener(request, KEY).open(f"1.{salt}.{sealed.rpartition('.')[2]}"))


def check_keys_have_a_direction() -> None:
    request = request_of()
    sealed = seal_request(request, KEY).rpartition(".")[2]
    for fernet in (KEY.response_fernet(request, bytes(16)), KEY.simple_fernet):
        with pytest.raises(InvalidToken):
            fernet.decrypt(sealed)


def check_order_and_end() -> None:
    request = request_of()
    sealer, client = AnswerSealer(request, KEY), AnswerOpener(request, KEY)
    chunks = sealer.seal(b"a") + sealer.seal(b"b" * (2 * MAX_CHUNK_BYTES)) + sealer.seal(b"")
    chunks += sealer.seal(b"c" * MAX_CHUNK_BYTES, final=True)
    opened = [client.open(chunk) for chunk in chunks]
    assert [chunk.seq for chunk in opened] == list(range(len(chunks)))
    assert [chunk.final for chunk in opened] == [False] * (len(chunks) - 1) + [True]
    with pytest.raises(ValueError, match="ended"):
        sealer.seal(b"more")


def check_sizes_tell_nothing() -> None:
    request = request_of()
    sealer = AnswerSealer(request, KEY)
    sizes = {len(chunk) for size in (0, 1, 500, 1015) for chunk in sealer.seal(b"x" * size)}
    assert sizes | {len(sealer.seal(b"", final=True)[0])} == {1489}
    prompts = [b'{"prompt":"%s"}' % (b"x" * size) for size in (1, 300, 600)]
    assert {len(seal_request(request_of(body=body), KEY)) for body in prompts} == {1483}
    answer = SimpleSealer(KEY)
    assert len({len(answer.seal({"text": "x" * size})) for size in (0, 1, 900)}) == 1


def hostile_requests() -> dict[str, Any]:
    sealed = seal_request(request_of(), KEY)
    _, _, ciphertext = sealed.split(".")
    return {
        "a flipped tag": sealed[:-9] + ("B" if sealed[-9] == "A" else "A") + sealed[-8:],
        "a wrong key": seal_request(request_of(), OTHER).replace(OTHER.id, KEY.id),
        "an unknown key": f"1.{OTHER.id}.{ciphertext}",
        "no base64": f"1.{KEY.id}." + "*" * len(ciphertext),
        "bad at its end": sealed[:-1] + "*",
        "another version": "2" + sealed[1:],
        "no form": "x" * len(sealed),
        "a current timestamp": f"1.{KEY.id}."
        + KEY.request_fernet.encrypt(pad_request(request_of().encode())).decode(),
        "a bad inside": f"1.{KEY.id}."
        + KEY.request_fernet.encrypt_at_time(bytes(1024), 0).decode(),
    }


def check_one_rejection() -> None:
    worker = opener_of()
    seen = set()
    for sealed in [*hostile_requests().values(), None, {}, "", "x" * (MAX_REQUEST_BYTES + 1)]:
        error = rejected(worker.open, sealed)
        text = "".join(traceback.format_exception(error)).rpartition("\n\n")[2]
        seen.add((str(error), repr(error.args), text.splitlines()[-1]))
        assert error.__cause__ is None and error.__context__ is None
    assert seen == {(Rejected.TEXT, repr((Rejected.TEXT,)), f"errors.Rejected: {Rejected.TEXT}")}


def check_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the bytes that pass through the HMAC: exact, where clocks are not."""
    hashed: list[int] = []
    verify = Fernet._verify_signature

    def counting(self: Fernet, data: bytes) -> None:
        hashed.append(len(data))
        verify(self, data)

    worker = opener_of()
    for name, sealed in hostile_requests().items():
        hashed.clear()
        with monkeypatch.context() as patched:
            patched.setattr(Fernet, "_verify_signature", counting)
            rejected(worker.open, sealed)
        assert len(hashed) == 1, f"{name}: {len(hashed)} times"
        assert abs(hashed[0] - 3 * 1464 // 4) < 30, f"{name}: {hashed[0]} bytes"


def check_same_time() -> None:
    """Rounds are interleaved and medians compared, so a busy machine disturbs all alike."""
    ciphertext = seal_request(request_of(body=b'{"a":"%s"}' % bytes(200_000).hex().encode()), KEY)
    ciphertext = ciphertext.split(".")[2][:-8] + "AAAAAAA="
    damaged = {"known": f"1.{KEY.id}.{ciphertext}", "unknown": f"1.{OTHER.id}.{ciphertext}"}
    worker = opener_of()
    times: dict[str, list[float]] = {name: [] for name in damaged}
    for _ in range(60):
        for name, sealed in damaged.items():
            began = time.perf_counter()
            rejected(worker.open, sealed)
            times[name].append(time.perf_counter() - began)
    known, unknown = (statistics.median(values) for values in times.values())
    assert 0.7 < known / unknown < 1.4, f"{known * 1e6:.0f} and {unknown * 1e6:.0f} µs"


def check_time_and_place() -> None:
    request = request_of()
    opener_of().check(request)
    opener_of(now=NOW - 60).check(request)
    opener_of(now=NOW + 660).check(request)
    assert code_of(lambda: opener_of(now=NOW - 61).check(request)) == "not_yet_valid"
    assert code_of(lambda: opener_of(now=NOW + 661).check(request)) == "expired"
    assert code_of(lambda: opener_of(max_ttl_s=599).check(request)) == "ttl_too_long"
    other = RequestOpener(KeyRing([KEY]), "other", max_ttl_s=86400, now=lambda: NOW)
    assert code_of(lambda: other.check(request)) == "wrong_audience"


class Clock:
    def __init__(self) -> None:
        self.time = float(NOW)

    def __call__(self) -> float:
        return self.time


def check_replay() -> None:
    clock = Clock()
    guard = ReplayGuard(clock, passed=clock)
    guard.begin("a", NOW + 600)
    assert code_of(lambda: guard.begin("a", NOW + 600)) == "already_running"
    guard.finish("a")
    for passed_s in (0, 300, 600, 660):
        clock.time = NOW + passed_s
        assert code_of(lambda: guard.begin("a", NOW + 600)) == "replayed"


def check_retry() -> None:
    guard = ReplayGuard(Clock())
    for _ in range(3):
        guard.begin("a", NOW + 600)
        guard.abandon("a")
    ReplayGuard(Clock()).begin("a", NOW + 600)


def check_clock_set_back() -> None:
    clock = Clock()
    guard = ReplayGuard(clock, passed=clock)
    guard.begin("a", NOW + 600)
    guard.finish("a")
    clock.time = NOW + 700
    guard.begin("b", NOW + 1200)
    assert len(guard) == 1, "what has expired is forgotten"
    clock.time = NOW
    assert code_of(lambda: guard.begin("a", NOW + 600)) == "expired"
    guard.begin("c", NOW + 601)


def check_clock_that_jumped() -> None:
    clock, passed = Clock(), Clock()
    guard = ReplayGuard(clock, passed=passed)
    guard.begin("a", NOW + 86_400)
    guard.finish("a")
    clock.time = NOW + 1_000_000
    guard.begin("b", NOW + 1_000_600)
    clock.time = NOW
    assert code_of(lambda: guard.begin("a", NOW + 86_400)) == "replayed"
    guard.begin("c", NOW + 600)  # nobody else pays for it


def check_memory_is_bounded() -> None:
    clock = Clock()
    guard = ReplayGuard(clock, max_entries=100, passed=clock)
    for number in range(100):
        guard.begin(str(number), NOW + 600)
        guard.finish(str(number))
    error = refused(lambda: guard.begin("more", NOW + 600))
    assert (error.code, error.status) == ("replay_guard_full", 503)
    assert code_of(lambda: guard.begin("0", NOW + 600)) == "replayed"
    clock.time = NOW + 662
    guard.begin("more", NOW + 1200)
    assert len(guard) == 1


def simple_of(text: Any, *keys: Key, now: float = NOW) -> OpenedSimple:
    ring = KeyRing(keys or (KEY,))
    return open_simple(ring, text, max_ttl_s=86400, clock_skew_s=60, now=lambda: now)


def check_simple_time() -> None:
    text = KEY.simple_fernet.encrypt_at_time(b"hello", NOW).decode()
    for passed_s in (-60, 0, 86400):
        assert simple_of(text, now=NOW + passed_s).expires_at == NOW + 86400
    for passed_s in (-61, 86401):
        rejected(partial(simple_of, text, now=NOW + passed_s))


CHECKS = promises.checks_of(globals())


@pytest.mark.claim(
    "seal.rules",
    "Each rule of the seal (SPEC.md, sections 2 to 7 and 9) holds, and a copy without it fails the "
    "same test.",
)
@pytest.mark.parametrize("name", CHECKS)
def test_promise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    promises.run(CHECKS[name], monkeypatch)


# The weakened copies ----------------------------------------------------------------------


REAL_RESPONSE = Key.response_fernet


def tell_cause(self: RequestOpener, sealed: Any) -> Any:
    try:
        inside = KEY.request_fernet.decrypt(sealed.split(".")[2])
    except (InvalidToken, AttributeError, IndexError) as error:
        raise Rejected from error
    return inside


def unchecked_padding(inside: bytes) -> bytes:
    return inside[4 : 4 + int.from_bytes(inside[:4], "big")]


def unpadded(prefix: bytes, content: bytes) -> bytes:
    return prefix + content


def always_final(salt: bytes, inside: bytes) -> OpenedChunk:
    seq, _, length = crypto._CHUNK_HEADER.unpack_from(inside)
    return OpenedChunk(salt, seq, True, inside[9 : 9 + length])


def no_request(self: Key, request: Request, salt: bytes, *_: Any) -> Fernet:
    return fernets.fernet(fernets.hkdf(self._secret, self.id, salt))


def no_id(self: Key, request: Request, salt: bytes, *_: Any) -> Fernet:
    info = "sealed-vllm/1 response " + self.id
    secret = base64.urlsafe_b64decode(request.response_secret + "=")
    return fernets.fernet(fernets.hkdf(secret, info, salt))


def no_client(self: Key, request: Request, salt: bytes, *_: Any) -> Fernet:
    return REAL_RESPONSE(KEY, request, salt)


def no_salt(self: Key, request: Request, salt: bytes, *_: Any) -> Fernet:
    return REAL_RESPONSE(self, request, bytes(16))


def no_direction(self: Key, request: Request, salt: bytes, *_: Any) -> Fernet:
    return self.request_fernet


def nothing(*_args: Any) -> None:
    return None


def forget_without_date(self: ReplayGuard) -> None:
    while self._by_expiry and self._by_expiry[0][0] < self._now() - 61:
        self._finished.discard(heappop(self._by_expiry)[2])


def forget_too_soon(self: ReplayGuard) -> None:
    while self._by_expiry and self._by_expiry[0][0] <= self._now():
        self._finished.discard(heappop(self._by_expiry)[2])


def forget_by_the_clock(self: ReplayGuard) -> None:
    while self._by_expiry and self._by_expiry[0][0] < self._now() - 61:
        expires_at, _, request_id = heappop(self._by_expiry)
        self._finished.discard(request_id)
        self._forgotten_until = max(self._forgotten_until, expires_at)


def finish_by_abandoning(self: ReplayGuard, request_id: str) -> None:
    self.finish(request_id)


def any_time(*args: Any) -> Any:
    keys, text, max_ttl_s, skew_s, _now = args
    at = int.from_bytes(base64.urlsafe_b64decode(text)[1:9], "big")
    return REAL_OPEN_SIMPLE(keys, text, max_ttl_s, skew_s, at)


REAL_OPEN_SIMPLE = simple_form._open_simple


def any_form(*_args: Any) -> Any:
    return OpenedChunk(b"", 0, True, b"")


# A name, the check that has to fail, and what is replaced: owner, attribute, replacement, …
WEAKENED: dict[str, tuple[Any, ...]] = {
    "one key both ways and any form": (
        "no_reflection",
        *(Key, "response_fernet", no_direction),
        *(crypto, "_parse_chunk", any_form),
    ),
    "HMAC of requests ignored": ("request_bits", Fernet, "_verify_signature", nothing),
    "HMAC of chunks ignored": ("chunk_bits", Fernet, "_verify_signature", nothing),
    "any base64 taken": ("one_spelling", crypto, "is_canonical", is_decodable),
    "any timestamp taken": ("no_clock", crypto, "TIME_ZERO", "gA"),
    "padding not looked at": ("padding_is_zero", crypto, "unpad_request", unchecked_padding),
    "no response secret": ("answer_is_bound_to_request", Key, "response_fernet", no_request),
    "no request id": ("answer_is_bound_to_request", Key, "response_fernet", no_id),
    "no key id": ("answer_is_bound_to_client", Key, "response_fernet", no_client),
    "no salt": ("answer_is_bound_to_attempt", Key, "response_fernet", no_salt),
    "one key both ways": ("keys_have_a_direction", Key, "response_fernet", no_direction),
    "every chunk final": ("order_and_end", crypto, "_parse_chunk", always_final),
    "no padding": ("sizes_tell_nothing", crypto, "pad", unpadded),
    "the cause told": ("one_rejection", RequestOpener, "_open", tell_cause),
    "early exit, counted": ("same_work", RequestOpener, "_open", opened_if_known),
    "early exit, timed": ("same_time", RequestOpener, "_open", opened_if_known),
    "time and place not checked": ("time_and_place", RequestOpener, "check", nothing),
    "finished ones forgotten": ("replay", ReplayGuard, "finish", ReplayGuard.abandon),
    "forgotten within the skew": ("replay", ReplayGuard, "_forget", forget_too_soon),
    "abandoned ones remembered": ("retry", ReplayGuard, "abandon", finish_by_abandoning),
    "forgotten without a date": ("clock_set_back", ReplayGuard, "_forget", forget_without_date),
    "forgotten by the clock alone": (
        *("clock_that_jumped", ReplayGuard, "_forget", forget_by_the_clock),
    ),
    "never forgotten": ("memory_is_bounded", ReplayGuard, "_forget", nothing),
    "any age taken": ("simple_time", simple_form, "_open_simple", any_time),
}


@pytest.mark.claim("seal.rules")
@pytest.mark.parametrize("name", WEAKENED)
def test_a_weakened_copy_breaks_the_promise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, *patches = WEAKENED[name]
    promises.weaken(patches, monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, RequestError, InvalidToken)):
        promises.run(CHECKS[check], monkeypatch)


def test_every_promise_has_a_weakened_copy() -> None:
    assert {check for check, *_ in WEAKENED.values()} == set(CHECKS)


# Requests ---------------------------------------------------------------------------------


def test_round_trip_with_several_keys_and_rotation() -> None:
    request = request_of()
    both = opener_of(OTHER, KEY)
    for key in (KEY, OTHER):
        opened = both.open(seal_request(request, key))
        assert opened.key is key
        assert opened.request.encode() == request.encode()
    rejected(lambda: opener_of(OTHER).open(seal_request(request, KEY)))


def test_ids_are_each_clients_own() -> None:
    request = request_of()
    both = opener_of(KEY, OTHER)
    opened = [both.open(seal_request(request, key)).replay_id for key in (KEY, OTHER)]
    assert len(set(opened)) == 2


def test_nothing_of_the_request_is_readable() -> None:
    sealed = seal_request(request_of(), KEY)
    raw = base64.urlsafe_b64decode(sealed.rpartition(".")[2])
    for text in (PROMPT, AUDIENCE, "generate", "prompt"):
        assert text.encode() not in raw
    assert seal_request(request_of(), KEY) != sealed


def test_every_request_has_its_own_id_and_secret() -> None:
    requests = [request_of() for _ in range(100)]
    assert len({request.request_id for request in requests}) == 100
    assert len({request.response_secret for request in requests}) == 100


@pytest.mark.parametrize(
    ("body", "method"),
    [(b"[]", "POST"), (b"", "POST"), (b"{", "POST"), (b"{}", "GET"), (b'"x"', "POST"),
     (b'{"a":NaN}', "POST"), (b'{"a":"\\ud800"}', "POST"), (b"[" * 10_000, "POST"),
     (b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}", "POST"), (b"\xff", "POST")],
)  # fmt: skip
def test_what_a_worker_would_reject_is_not_sent(body: bytes, method: Any) -> None:
    error = refused(lambda: request_of(body=body, method=method))
    assert "cannot be sent" in str(error)


def test_a_request_beyond_the_limit_is_refused_before_it_is_sealed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request = request_of(body=b'{"a":"%s"}' % (b"x" * 3000))
    size = len(seal_request(request, KEY))
    monkeypatch.setattr(crypto, "MAX_REQUEST_BYTES", size)
    assert opener_of().open(seal_request(request, KEY)).request.encode() == request.encode()
    monkeypatch.setattr(crypto, "MAX_REQUEST_BYTES", size - 1)
    error = refused(seal_request, request, KEY)
    assert (error.status, error.code) == (413, "too_large")


def test_an_oversized_request_costs_nothing() -> None:
    text = "1." + KEY.id + "." + "A" * MAX_REQUEST_BYTES
    began = time.perf_counter()
    rejected(lambda: opener_of().open(text))
    assert time.perf_counter() - began < 0.05


HOSTILE: list[Any] = [
    None, 1, True, b"1.x.y", {}, {"sealed": "x"}, [], "", ".", "..", "1..", "1.", "\0" * 100,
    "1." + KEY.id, f"1.{KEY.id}.", f"1.{KEY.id}.=", f"1.{KEY.id}.====", f"1.{KEY.id}.gAAAAAAAAAAA",
    f"1.{KEY.id}." + "gAAAAAAAAAAA" * 40, f"1.{KEY.id}." + "A" * 1464, "ü" * 1464, "\ud800" * 1464,
    "[" * 10_000, f"1.{KEY.id}." + "é" * 1464, "." * 10_000, "1." + "A" * 22 + ".gAAAAAAAAAAA",
]  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_input_ends_in_the_one_error(hostile: Any) -> None:
    rejected(lambda: opener_of().open(hostile))
    rejected(lambda: simple_of(hostile))
    tampered(lambda: AnswerOpener(request_of(), KEY).open(hostile))
    tampered(lambda: open_simple_answer(KEY, hostile))


@given(st.text(max_size=200), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_text_ends_in_the_one_error(text: str, prefixed: bool) -> None:
    sealed = f"1.{KEY.id}.gAAAAAAAAAAA{text}" if prefixed else text
    rejected(lambda: opener_of().open(sealed))
    rejected(lambda: simple_of(text))
    tampered(lambda: AnswerOpener(request_of(), KEY).open(f"1.{'A' * 22}.gAAAAAAAAAAA{text}"))


@given(st.binary(max_size=1500), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_inside_under_the_right_key_ends_in_the_one_error(inside: bytes, pad: bool) -> None:
    inside = pad_request(inside) if pad else inside
    ciphertext = KEY.request_fernet.encrypt_at_time(inside, 0).decode()
    rejected(lambda: opener_of().open(f"1.{KEY.id}.{ciphertext}"))


@pytest.mark.parametrize("clock_s", [-3600, 3600])
def test_messages_say_by_how_much_the_clock_is_wrong(clock_s: int) -> None:
    request = request_of(ttl_s=600)
    error = refused(lambda: opener_of(now=NOW + clock_s).check(request))
    assert "3600 s" in error.message and "clock" in error.message
    assert AUDIENCE not in error.message


# Replays ----------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["begin", "finish", "abandon", "wait", "set back"]),
            st.integers(0, 3),
            st.integers(0, 300),
        ),
        max_size=60,
    )
)
@settings(max_examples=200, deadline=None)
def test_no_order_of_events_lets_a_request_be_answered_twice(
    steps: list[tuple[str, int, int]],
) -> None:
    clock = Clock()
    guard = ReplayGuard(clock, passed=clock)
    expires_at = {str(number): NOW + 100 * number for number in range(4)}
    running: set[str] = set()
    answered: set[str] = set()
    for step, number, seconds in steps:
        name = str(number)
        match step:
            case "begin":
                try:
                    guard.begin(name, expires_at[name])
                except RequestError:
                    continue
                assert name not in running
                # What has expired on the worker's clock is refused before the guard is asked.
                assert name not in answered or expires_at[name] + 60 < clock.time
                running.add(name)
            case "finish":
                guard.finish(name)
                answered |= running & {name}
                running.discard(name)
            case "abandon":
                guard.abandon(name)
                running.discard(name)
            case "wait":
                clock.time += seconds
            case "set back":
                clock.time -= seconds


# Answers ----------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=3000), max_size=5), st.binary(max_size=3000))
@settings(max_examples=50, deadline=None)
def test_payloads_come_back(payloads: list[bytes], last: bytes) -> None:
    request = request_of()
    sealer, client = AnswerSealer(request, KEY), AnswerOpener(request, KEY)
    chunks = [chunk for payload in payloads for chunk in sealer.seal(payload)]
    opened = [client.open(chunk) for chunk in chunks + sealer.seal(last, final=True)]
    assert [chunk.payload for chunk in opened] == [*payloads, last]
    assert len({chunk.salt for chunk in opened}) == 1


def test_chunks_stay_below_the_platforms_limit() -> None:
    request = request_of()
    chunks = AnswerSealer(request, KEY).seal(os.urandom(3_000_000), final=True)
    assert max(map(len, chunks)) < 1_000_000
    client = AnswerOpener(request, KEY)
    assert len(b"".join(client.open(chunk).payload for chunk in chunks)) == 3_000_000


def test_a_chunk_larger_than_allowed_is_refused_though_authentic() -> None:
    request = request_of()
    salt = bytes(16)
    inside = crypto._CHUNK_HEADER.pack(0, 0, 600_000).ljust(2**20, b"\0")
    ciphertext = KEY.response_fernet(request, salt).encrypt_at_time(inside, 0).decode()
    tampered(lambda: AnswerOpener(request, KEY).open(f"1.{b64(salt)}.{ciphertext}"))


def test_foreign_salts_do_not_fill_the_clients_memory() -> None:
    client = AnswerOpener(request_of(), KEY)
    [chunk] = AnswerSealer(request_of(), KEY).seal(b"")
    for _ in range(50):
        foreign = f"1.{b64(os.urandom(16))}.{chunk.rpartition('.')[2]}"
        tampered(client.open, foreign)
    assert not client._attempts


def test_a_salt_has_its_length() -> None:
    with pytest.raises(ValueError, match="16 bytes"):
        AnswerSealer(request_of(), KEY, salt=b"short")


# The simple form --------------------------------------------------------------------------


def test_simple_body_and_rotation() -> None:
    for key in (KEY, OTHER):
        text = key.simple_fernet.encrypt_at_time(b'{"prompt":"Hi"}', NOW).decode()
        opened = simple_of(text, OTHER, KEY)
        assert (opened.key, opened.body) == (key, b'{"prompt":"Hi"}')
        assert "Hi" not in repr(opened)
    rejected(lambda: simple_of(text, KEY))


def test_simple_replay_id_is_the_ciphertexts_own() -> None:
    first, second = (KEY.simple_fernet.encrypt_at_time(b"x", NOW).decode() for _ in range(2))
    assert simple_of(first).replay_id == simple_of(first, OTHER, KEY).replay_id
    assert simple_of(first).replay_id != simple_of(second).replay_id


@pytest.mark.parametrize("content", [b'{"prompt":', b" {", b"\xff\xfe", b'{"a":NaN}'])
def test_simple_content_that_is_broken_is_not_a_prompt(content: bytes) -> None:
    text = KEY.simple_fernet.encrypt_at_time(content, NOW).decode()
    assert simple_of(text).body == content


def test_a_simple_answer_sent_back_is_no_prompt() -> None:
    chunk = SimpleSealer(KEY).seal({"text": "write me a poem"})
    opened = open_simple(KeyRing([KEY]), chunk, max_ttl_s=60)
    error = refused(lambda: parse_generate(opened.body))
    assert "unknown field" in error.message


def test_simple_answers_are_numbered_and_long_text_is_cut() -> None:
    sealer = SimpleSealer(KEY)
    text = "\0é" * 60_000
    chunks = sealer.seal_all({"text": text, "index": 1, "done": True})
    chunks += sealer.seal_all({"usage": None})
    assert max(map(len, chunks)) < 1_000_000
    opened = [open_simple_answer(KEY, chunk) for chunk in chunks]
    assert [obj["seq"] for obj in opened] == list(range(len(chunks)))
    assert "".join(obj.get("text", "") for obj in opened) == text
    assert [obj.get("done", False) for obj in opened[:-1]] == [False] * (len(opened) - 2) + [True]
    assert all(obj["index"] == 1 for obj in opened[:-1])
    assert "text" not in opened[-1]
    with pytest.raises(ValueError, match="at most"):
        sealer.seal({"text": "x" * 600_000})


@pytest.mark.parametrize("content", [b"[]", b"no json", b'{"text":"x"}', b"\xff"])
def test_what_is_no_simple_answer_is_refused(content: bytes) -> None:
    tampered(lambda: open_simple_answer(KEY, KEY.simple_fernet.encrypt(content).decode()))


# Keys -------------------------------------------------------------------------------------


@given(st.text(max_size=120))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_key_ring_or_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        KeyRing.parse(text)


SECRET = generate_key()


FAULTY = [
    SECRET[:-1],
    SECRET[:20],
    SECRET + "x",
    SECRET * 2,
    SECRET + "\n" + SECRET,
    SECRET[:-2] + "é=",
    SECRET[:-2] + "*=",
    base64.urlsafe_b64decode(SECRET).hex(),
    f"a={SECRET},b={SECRET}",
    f"{SECRET},",
    f"{SECRET[:-1]}={SECRET}",
    f"two words={SECRET}",
    f"a={SECRET[:-1]}",
]


@pytest.mark.parametrize("text", FAULTY, ids=range(len(FAULTY)))
def test_faults_of_keys_are_told_and_never_quote(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KeyRing.parse(text)
    shown = "".join(traceback.format_exception(caught.value))
    message = str(caught.value)
    assert "encryption key" in message
    for start in range(0, 36):
        assert SECRET[start : start + 8] not in message
    assert SECRET not in shown


def test_all_faults_of_a_key_ring_come_together() -> None:
    key = generate_key()
    with pytest.raises(ConfigError) as caught:
        KeyRing.parse(f"a={key},two words={generate_key()},short,b={key}")
    assert [fault.split(" ", 3)[2] for fault in caught.value.faults] == ["2", "3", "4"]


def test_key_rings_keep_order_and_names() -> None:
    one, two = generate_key(), generate_key()
    ring = KeyRing.parse(f" laptop={one} , {two}\n")
    assert [key.name for key in ring] == ["laptop", None]
    assert ring.first is ring[0] and len(ring) == 2
    assert ring.get(Key.parse(two).id) is ring[1]
    assert ring.get("x") is None
    with pytest.raises(ValueError, match="at least one"):
        KeyRing([])
    with pytest.raises(ValueError, match="the same"):
        KeyRing([KEY, KEY])


def test_keys_do_not_show_themselves() -> None:
    text = generate_key()
    key = Key.parse(text, name="laptop")
    secret = base64.urlsafe_b64decode(text)
    for shown in (repr(key), str(key), f"{KeyRing([key])}"):
        assert text not in shown and repr(secret) not in shown
    for action in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError):
            action(key)
