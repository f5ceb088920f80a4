"""Public-key mode, from an attacker's side, and from end to end.

Each `check_…` states one promise. It is run twice: on the project as it is, and on a copy
weakened in one place (`WEAKENED`), where it has to fail.
"""

import asyncio
import base64
import json
import pickle
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.backends.openssl.backend import Backend
from msgspec.structs import replace as changed

import boot
import config
import crypto
import hpke
import protocol
import rp_handler
from client import AsyncClient, Client, ClientSettings
from config import Settings
from crypto import AnswerOpener, AnswerSealer, RequestOpener, new_request, seal_request
from errors import ConfigError, RecordError, Rejected, RequestError, TamperedChunk
from fernets import b64, unb64
from gateway_config import GatewaySettings
from hpke import Envelope, HpkeKeyRing, HpkePrivateKey, HpkePublicKey
from keys import Key, KeyRing, generate_key
from protocol import HpkeRequest, Request, pad_request
from tests import promises
from tests.cli import Done, run, run_apart
from tests.echo import Echo
from tests.gateways import RunningGateway

NOW = 1_790_000_000
PROMPT = "the-canary-of-the-prompt"
ANSWER = b"the-canary-of-the-answer"
KEY, OTHER = Key.parse(generate_key()), Key.parse(generate_key())
WORKER, OLD, STRANGER = (HpkePrivateKey.generate() for _ in range(3))


def request_of(envelope: Envelope | None, **changes: Any) -> Request:
    given: dict[str, Any] = {"audience": "endpoint", "ttl_s": 600, "now": lambda: NOW}
    body = b'{"prompt":"%s"}' % PROMPT.encode()
    return new_request("generate", **given | {"body": body, "envelope": envelope} | changes)


def without_reply_key(request: Request) -> Request:
    """Return a request without what public-key mode adds to it."""
    return Request(**{name: getattr(request, name) for name in Request.__struct_fields__})


def opener_of(*keys: HpkePrivateKey, **settings: Any) -> RequestOpener:
    ring = HpkeKeyRing(keys or (WORKER,))
    given: dict[str, Any] = {"max_ttl_s": 86400, "now": lambda: NOW, "hpke_keys": ring}
    given |= {"keys": KeyRing([KEY]), "audience": "endpoint"}
    return RequestOpener(**given | settings)


def sent(key: Key = KEY, **changes: Any) -> tuple[str, Request, Envelope]:
    """Return what a client sends, and what it keeps."""
    envelope = Envelope(WORKER.public)
    request = request_of(envelope, **changes)
    return seal_request(request, key, envelope), request, envelope


def answered(sealed: str, content: bytes = ANSWER) -> str:
    """Return the chunk with which the worker answers."""
    opened = opener_of(OLD, WORKER).open(sealed)
    [chunk] = AnswerSealer(opened.request, opened.key).seal(content, final=True)
    return chunk


def rejected(action: Callable[..., Any], *args: Any) -> Rejected:
    with pytest.raises(Rejected) as caught:
        action(*args)
    return caught.value


def raw(sealed: str) -> bytes:
    return unb64(sealed.rpartition(".")[2])


def enveloped(inside: str) -> str:
    """Return any inside in an envelope, as whoever has the public key can make it."""
    return "1.hpke." + b64(WORKER.public.seal(inside.encode(), b"sealed-vllm/1 hpke-request"))


def inside_of(sealed: str) -> str:
    """Return what an envelope holds, for whoever has the worker's private key."""
    opened = WORKER.open(raw(sealed), b"sealed-vllm/1 hpke-request")
    assert opened is not None
    return opened.decode()


# The promises -----------------------------------------------------------------------------


def check_round_trip() -> None:
    sealed, request, envelope = sent()
    opened = opener_of().open(sealed)
    assert opened.request.encode() == request.encode() and opened.key is KEY
    chunk = AnswerOpener(request, KEY, envelope.reply_key).open(answered(sealed))
    assert (chunk.payload, chunk.final) == (ANSWER, True)


def check_envelope_bits() -> None:
    sealed, _, _ = sent()
    worker = opener_of()
    content = bytearray(raw(sealed))
    for at in [*range(0, 1136, 16), *range(1136, len(content), 41), len(content) - 1]:
        content[at] ^= 1 << at % 8
        rejected(worker.open, "1.hpke." + b64(bytes(content)))
        content[at] ^= 1 << at % 8
    for spelt in (sealed + "=", sealed + "\n", sealed[:100] + "\n" + sealed[100:], sealed + "A"):
        rejected(worker.open, spelt)
    for size in (0, 100, 1120, 1135, 1136, 2000):
        rejected(worker.open, "1.hpke." + b64(bytes(content[:size])))


def check_no_downgrade_of_requests() -> None:
    bare = seal_request(request_of(None), KEY)
    rejected(opener_of().open, bare)
    # Not even with the member that belongs in an envelope, nor without it in one.
    sealed, _, _ = sent()
    for opener in (opener_of(), opener_of(allow_without_hpke=True)):
        rejected(opener.open, inside_of(sealed))
        rejected(opener.open, enveloped(bare))
    assert opener_of(allow_without_hpke=True).open(bare).key is KEY


def check_no_downgrade_of_the_simple_form() -> None:
    settings = Settings(endpoint_id="endpoint")
    models: Any = SimpleNamespace(max_concurrency=1, routes=())
    handler = rp_handler.Handler(settings, KeyRing([KEY]), models, HpkeKeyRing([WORKER]))
    text = KEY.simple_fernet.encrypt(b"hello").decode()
    for job_input in ({"encrypted_input": text}, {"encrypted_input": sent()[0]}):
        rejected(handler._open, job_input, rp_handler._Job("job"))


def check_no_downgrade_of_answers() -> None:
    """Also not by somebody who has come by what the request said."""
    _, request, envelope = sent()
    [chunk] = AnswerSealer(without_reply_key(request), KEY).seal(ANSWER, final=True)
    with pytest.raises(TamperedChunk):
        AnswerOpener(request, KEY, envelope.reply_key).open(chunk)


def check_a_client_never_sends_without() -> None:
    envelope = Envelope(WORKER.public)
    settings = ClientSettings("e", "k", generate_key(), hpke_public_key=WORKER.public.text)
    with Client(settings) as client:
        job = client._calls.job("worker", None, streamed=False, method="GET", options={})
        assert job._sealed.startswith("1.hpke.")
    for request, wrapping in ((request_of(envelope), None), (request_of(None), envelope)):
        with pytest.raises(ValueError, match="travels in an envelope"):
            seal_request(request, KEY, wrapping)


def check_the_public_key_alone_asks_nothing() -> None:
    sealed, _, _ = sent(OTHER)
    rejected(opener_of().open, sealed)
    named = inside_of(sealed).replace(OTHER.id, KEY.id)
    rejected(opener_of().open, enveloped(named))


def check_the_reply_key_is_the_clients() -> None:
    """Whoever has the private key, and not the shared one, cannot put another in its place."""
    sealed, request, _ = sent()
    mine = changed(request, reply_key=b64(STRANGER.public.raw))
    forged = OTHER.request_fernet.encrypt_at_time(pad_request(mine.encode()), 0).decode()
    rejected(opener_of().open, enveloped(f"1.{KEY.id}.{forged}"))
    version, kid, ciphertext = inside_of(sealed).split(".")
    inner = bytearray(base64.urlsafe_b64decode(ciphertext))
    for at in range(9, len(inner), 37):
        inner[at] ^= 1
        damaged = base64.urlsafe_b64encode(inner).decode()
        rejected(opener_of().open, enveloped(f"{version}.{kid}.{damaged}"))
        inner[at] ^= 1


def check_the_key_id_is_hidden() -> None:
    mine, _, _ = sent()
    theirs, _, _ = sent(OTHER)
    for sealed, key in ((mine, KEY), (theirs, OTHER)):
        assert key.id not in sealed and key.id.encode() not in raw(sealed)
    assert len(mine) == len(theirs)


def check_requests_survive_a_leak_of_the_shared_key() -> None:
    sealed, _, _ = sent()
    rejected(RequestOpener(KeyRing([KEY]), "endpoint", max_ttl_s=86400).open, sealed)
    for guess in (STRANGER, OLD):
        rejected(opener_of(guess).open, sealed)


def check_requests_survive_a_leak_of_the_private_key() -> None:
    sealed, _, _ = sent()
    assert PROMPT not in inside_of(sealed)
    attacker = opener_of(keys=KeyRing([OTHER]))
    rejected(attacker.open, sealed)
    rejected(attacker.open, enveloped(inside_of(sealed).replace(KEY.id, OTHER.id)))


def check_answers_survive_a_leak_of_both() -> None:
    """Of one who recorded everything, and then has the long-term keys of both sides."""
    sealed, _, _ = sent()
    chunk = answered(sealed)
    # What section 13.3 says is open is open: else this would show nothing.
    request = opener_of().open(sealed).request
    assert PROMPT in request.encode().decode()
    _, share, ciphertext = chunk.split(".")
    info = f"sealed-vllm/1 hpke-share {request.request_id}".encode()
    for secret in (None, b"", bytes(32), WORKER.open(unb64(share), info)):
        fernet = KEY.response_fernet(request, unb64(share), secret)
        with pytest.raises(InvalidToken):
            fernet.decrypt(ciphertext)
    for reply_key in (None, WORKER):
        with pytest.raises(TamperedChunk):
            AnswerOpener(request, KEY, reply_key).open(chunk)


def check_one_time_keys_are_used_once() -> None:
    requests = [sent()[1] for _ in range(5)]
    assert len({r.reply_key for r in requests if isinstance(r, HpkeRequest)}) == 5
    sealed, request, envelope = sent()
    chunks = [answered(sealed) for _ in range(3)]
    opener = AnswerOpener(request, KEY, envelope.reply_key)
    assert len({opener.open(chunk).salt for chunk in chunks}) == 3


def check_answers_are_bound_to_their_request() -> None:
    """Even where two requests have the same one-time key, which a client does not do."""
    mine, theirs = (request_of(Envelope(WORKER.public, STRANGER)) for _ in range(2))
    [chunk] = AnswerSealer(theirs, KEY).seal(ANSWER, final=True)
    for request in (mine, changed(theirs, request_id=mine.request_id)):
        with pytest.raises(TamperedChunk):
            AnswerOpener(request, KEY, STRANGER).open(chunk)
    # The share is bound as well, so that no secret is taken for another request's.
    with pytest.raises(ValueError, match="not made for this request"):
        STRANGER.reply_secret(unb64(chunk.split(".")[1]), mine.request_id)


def hostile_requests() -> dict[str, str]:
    sealed, _, _ = sent()
    bare = seal_request(request_of(None), KEY)
    size = len(inside_of(sealed))
    return {
        "a flipped tag": sealed[:-9] + ("B" if sealed[-9] == "A" else "A") + sealed[-8:],
        "a wrong key": "1.hpke." + b64(STRANGER.public.seal(bytes(size), b"x")),
        "another use": "1.hpke." + b64(WORKER.public.seal(bytes(size), b"x")),
        "no base64": "1.hpke." + "*" * (len(sealed) - 7),
        "zeros": "1.hpke." + "A" * (len(sealed) - 7),
        "another version": "2" + sealed[1:],
        "without an envelope": "1." + KEY.id + "." + "A" * (len(sealed) - 19),
        "a real one without": inside_of(sealed).ljust(len(sealed), "A"),
        "a wrong inside": enveloped("x" * size),
        "an unknown client": sent(OTHER)[0],
        "a bare one inside": enveloped(bare.ljust(size, "A")),
        "no text inside": "1.hpke."
        + b64(WORKER.public.seal(b"\xff" * size, b"sealed-vllm/1 hpke-request")),
    }


def check_one_rejection() -> None:
    seen = set()
    others: list[Any] = [None, {}, "", "1.hpke.", "1.hpke"]
    for sealed in [*hostile_requests().values(), *others]:
        error = rejected(opener_of().open, sealed)
        seen.add((str(error), repr(error.args), traceback.format_exception_only(error)[-1]))
        assert error.__cause__ is None and error.__context__ is None
    assert len(seen) == 1


def check_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count decapsulations and the bytes that pass through the HMAC: exact, unlike clocks."""
    opened: list[int] = []
    hashed: list[int] = []
    real_open, real_verify = HpkePrivateKey.open, Fernet._verify_signature

    def counting_open(self: HpkePrivateKey, sealed: bytes, info: bytes) -> bytes | None:
        opened.append(len(sealed))
        return real_open(self, sealed, info)

    def counting_verify(self: Fernet, data: bytes) -> None:
        hashed.append(len(data))
        real_verify(self, data)

    worker = opener_of(WORKER, OLD)
    for name, sealed in hostile_requests().items():
        opened.clear()
        hashed.clear()
        with monkeypatch.context() as patched:
            patched.setattr(HpkePrivateKey, "open", counting_open)
            patched.setattr(Fernet, "_verify_signature", counting_verify)
            rejected(worker.open, sealed)
        size = len(sealed) * 3 // 4
        assert len(opened) == 2 and all(abs(n - size) < 20 for n in opened), (name, opened)
        assert len(hashed) == 1 and abs(hashed[0] - (size - 1136) * 3 // 4) < 60, (name, hashed)


def check_sizes_tell_nothing() -> None:
    bodies = [b'{"prompt":"%s"}' % (b"x" * size) for size in (1, 60, 120)]
    assert {len(sent(body=body)[0]) for body in bodies} == {5318}
    sealed, _, _ = sent()
    assert {len(answered(sealed, b"x" * size)) for size in (0, 1, 500, 1015)} == {3025}


def check_rotation() -> None:
    sealed, _, _ = sent()
    for ring in ((WORKER,), (OLD, WORKER), (WORKER, OLD), (STRANGER, WORKER, OLD)):
        assert opener_of(*ring).open(sealed).key is KEY
    rejected(opener_of(OLD, STRANGER).open, sealed)


CHECKS = promises.checks_of(globals())


@pytest.mark.parametrize("name", CHECKS)
def test_promise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    promises.run(CHECKS[name], monkeypatch)


# The weakened copies ----------------------------------------------------------------------


REAL_RESPONSE = Key.response_fernet
REAL_OPEN = RequestOpener._open
REAL_SEAL = seal_request
REAL_ATTEMPT = AnswerOpener._attempt


def takes_bare(self: RequestOpener, sealed: Any) -> Any:
    """An opener that takes what it can open, as one would write it at first."""
    return self._open_bare(sealed, Request) or REAL_OPEN(self, sealed)


def looks_first(self: RequestOpener, sealed: Any) -> Any:
    return REAL_OPEN(self, sealed) if str(sealed).startswith("1.hpke.") else None


def without_envelope(request: Request, key: Key, envelope: Any = None) -> str:
    content = pad_request(without_reply_key(request).encode())
    return f"1.{key.id}." + key.request_fernet.encrypt_at_time(content, 0).decode()


def key_id_outside(request: Request, key: Key, envelope: Any = None) -> str:
    return REAL_SEAL(request, key, envelope).replace("hpke", key.id)


def tells_cause(self: RequestOpener, sealed: Any) -> Any:
    if REAL_OPEN(self, sealed) is None and str(sealed).startswith("1.hpke."):
        raise RequestError("the envelope does not open")
    raise Rejected from None


def no_reply_secret(self: Key, request: Any, salt: bytes, *_: Any) -> Fernet:
    return REAL_RESPONSE(self, request, salt)


def any_answer(self: AnswerOpener, salt_text: str) -> Any:
    self._reply_key = self._reply_key if len(salt_text) > 22 else None
    return REAL_ATTEMPT(self, salt_text)


def first_key_only(self: HpkeKeyRing, sealed: Any, info: bytes, *, decoy_bytes: int) -> Any:
    return self._keys[0].open(sealed or b"", info)


def stops_when_found(self: HpkeKeyRing, sealed: Any, info: bytes, *, decoy_bytes: int) -> Any:
    for key in self._keys if sealed else ():
        if (opened := key.open(sealed, info)) is not None:
            return opened
    return None


def nothing(*_: Any, **__: Any) -> None:
    return None


def in_the_clear(self: HpkePublicKey, content: bytes, info: bytes) -> bytes:
    return bytes(1136) + content


def read_in_the_clear(self: HpkePrivateKey, sealed: bytes, info: bytes) -> bytes:
    return sealed[1136:]


def any_use(self: HpkePublicKey, content: bytes, info: bytes) -> bytes:
    return hpke._suite().encrypt(content, self._key, info=b"")


def any_use_opened(self: HpkePrivateKey, sealed: bytes, info: bytes) -> bytes | None:
    try:
        return hpke._suite().decrypt(sealed, self._key, info=b"")
    except Exception:
        return None


def not_padded(content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + content


# A name, the check that has to fail, and what is replaced: owner, attribute, replacement, …
HERE = sys.modules[__name__]
CLEAR = (
    *(HpkePublicKey, "seal", in_the_clear),
    *(HpkePrivateKey, "open", read_in_the_clear),
)
WEAKENED: dict[str, tuple[Any, ...]] = {
    "no envelope key": ("round_trip", HpkeKeyRing, "open", nothing),
    "an envelope that is none": ("envelope_bits", *CLEAR),
    "bare requests taken": ("no_downgrade_of_requests", RequestOpener, "_open", takes_bare),
    "simple requests taken": (
        *("no_downgrade_of_the_simple_form", RequestOpener, "needs_hpke"),
        property(lambda _: False, nothing),
    ),
    "bare answers taken": ("no_downgrade_of_answers", AnswerOpener, "_attempt", any_answer),
    "sent without": ("a_client_never_sends_without", HERE, "seal_request", without_envelope),
    "no shared key": (
        *("the_public_key_alone_asks_nothing", Key, "request_fernet"),
        KEY.request_fernet,
    ),
    "a reply key outside": (
        *("the_reply_key_is_the_clients", Key, "request_fernet"),
        KEY.request_fernet,
    ),
    "key id outside": ("the_key_id_is_hidden", HERE, "seal_request", key_id_outside),
    "the shared key opens all": (
        *("requests_survive_a_leak_of_the_shared_key", HERE, "seal_request"),
        without_envelope,
    ),
    "only the envelope": (
        *("requests_survive_a_leak_of_the_private_key", Key, "request_fernet"),
        KEY.request_fernet,
    ),
    "no reply secret": ("answers_survive_a_leak_of_both", Key, "response_fernet", no_reply_secret),
    "the worker's key for answers": (
        *("answers_survive_a_leak_of_both", HERE, "Envelope"),
        lambda worker_key: hpke.Envelope(worker_key, WORKER),
    ),
    "one key for all answers": (
        *("one_time_keys_are_used_once", HERE, "Envelope"),
        lambda worker_key: hpke.Envelope(worker_key, WORKER),
    ),
    "shares for any use": (
        "answers_are_bound_to_their_request",
        *(HpkePublicKey, "seal", any_use),
        *(HpkePrivateKey, "open", any_use_opened),
    ),
    "the cause told": ("one_rejection", RequestOpener, "_open", tells_cause),
    "early exit without an envelope": ("same_work", RequestOpener, "_open", looks_first),
    "early exit when found": ("same_work", HpkeKeyRing, "open", stops_when_found),
    "no padding": ("sizes_tell_nothing", crypto, "pad_request", not_padded),
    "the first key only": ("rotation", HpkeKeyRing, "open", first_key_only),
}


@pytest.mark.parametrize("name", WEAKENED)
def test_a_weakened_copy_breaks_the_promise(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, *patches = WEAKENED[name]
    promises.weaken(patches, monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, RequestError, Rejected)):
        promises.run(CHECKS[check], monkeypatch)


def test_every_promise_has_a_weakened_copy() -> None:
    assert {check for check, *_ in WEAKENED.values()} == set(CHECKS)


# Keys and settings ------------------------------------------------------------------------


def faults_of(action: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        action(*args)
    assert WORKER.text[20:] not in "".join(traceback.format_exception(caught.value))
    return str(caught.value)


def test_a_pair_is_that_of_x_wing() -> None:
    """The first test vector of draft-connolly-cfrg-xwing-kem, as far as a key pair goes."""
    seed = "7f9c2ba4e88f827d616045507605853ed73b8093f6efbc88eb1a6eacfa66ef26"
    public = HpkePrivateKey(bytes.fromhex(seed)).public.raw
    assert public.hex().startswith(
        "e2236b35a8c24b39b10aa1323a96a919a2ced88400633a7b07131713fc14b2b5"
    )


def test_keys_are_read_as_they_are_written() -> None:
    assert HpkeKeyRing.parse(f" {OLD.text} ,{WORKER.text}\n")[1].public.raw == WORKER.public.raw
    assert HpkePublicKey.parse(WORKER.public.text).id == WORKER.public.id
    for key in (WORKER, HpkeKeyRing([WORKER])):
        assert b64(WORKER.seed) not in repr(key)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(WORKER)
    with pytest.raises(ValueError, match="at least one"):
        HpkeKeyRing([])


LOW_ORDER = "hpke-public." + b64(WORKER.public.raw[:1184] + bytes(32))
NO_MLKEM = "hpke-public." + b64(b"\xff" * 1184 + WORKER.public.raw[1184:])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        (generate_key(), "does not begin with hpke-public."),
        (WORKER.text, "holds its private key"),
        (WORKER.public.text[:-1], "1622 characters"),
        (WORKER.public.text + "A", "1622 characters"),
        (WORKER.public.text[:-1] + "*", "was altered"),
        (LOW_ORDER, "no key of X25519"),
        (NO_MLKEM, "no key of ML-KEM-768"),
    ],
    ids=range(8),  # keys differ from process to process
)
def test_faults_of_a_public_key_are_told(text: str, says: str) -> None:
    fault = faults_of(HpkePublicKey.parse, text)
    assert fault.startswith("- HPKE_PUBLIC_KEY ") and says in fault
    assert fault.endswith("copy it again from whoever runs the endpoint")


def test_faults_of_private_keys_are_told_together_and_never_quote() -> None:
    faults = faults_of(
        HpkeKeyRing.parse,
        f"{WORKER.text},{WORKER.public.text},{WORKER.text},{OLD.text[:-1]},{generate_key()},",
    ).splitlines()
    assert [fault.split()[3] for fault in faults] == ["2,", "3,", "4,", "5,", "6,"]
    for fault, says in zip(
        faults,
        ("holds its public key", "same as key 1", "43 characters", "does not begin", "is empty"),
        strict=True,
    ):
        assert says in fault
    assert faults[-1].endswith("remove the comma too many")
    assert faults_of(HpkeKeyRing.parse, "x").startswith("- HPKE_PRIVATE_KEY does not")


@pytest.mark.parametrize(
    "reply_key", [LOW_ORDER, NO_MLKEM, "hpke-public.AAAA", "hpke-public."], ids=range(4)
)
def test_a_reply_key_that_is_none_is_rejected(reply_key: str) -> None:
    envelope = Envelope(WORKER.public)
    request = request_of(envelope)
    broken = changed(request, reply_key=reply_key.removeprefix("hpke-public."))
    rejected(opener_of().open, seal_request(broken, KEY, envelope))


def client_settings(**changes: str) -> ClientSettings:
    given = {"RUNPOD_ENDPOINT_ID": "e", "RUNPOD_API_KEY": "k", "ENCRYPTION_KEY": generate_key()}
    return ClientSettings.from_environ(given | changes)


def test_a_slip_does_not_switch_it_off() -> None:
    """Neither a secret that was not filled in nor a name that nobody reads."""
    assert client_settings(HPKE_PUBLIC_KEY="x").hpke_public_key == "x"
    assert "HPKE_PUBLIC_KEY is empty" in faults_of(lambda: client_settings(HPKE_PUBLIC_KEY=" "))
    for name in ("HPKE_PUBLICKEY", "HPKE_KEY", "HPKE_PUBLIC_KEYS"):
        told = faults_of(partial(client_settings, **{name: "x"}))
        assert f"{name} is no setting; is HPKE_PUBLIC_KEY meant?" in told
    _, faults = config.read({"HPKE_PRIVATE_KEY": ""}, ())
    assert any("HPKE_PRIVATE_KEY is empty" in fault for fault in faults)
    _, faults = config.read({"HPKE_PRIVAT_KEY": "x"}, ())
    assert "HPKE_PRIVAT_KEY is not a setting: did you mean HPKE_PRIVATE_KEY?" in faults
    told = faults_of(lambda: client_settings(HPKE_PRIVATE_KEY=WORKER.text))
    assert told == (
        "- HPKE_PRIVATE_KEY belongs on the endpoint only; remove it here, and set HPKE_PUBLIC_KEY "
        "(python client.py keygen --public-of prints it)"
    )
    both = {"HPKE_PRIVATE_KEY": WORKER.text, "HPKE_PUBLIC_KEY": WORKER.public.text}
    assert client_settings(**both).hpke_public_key == WORKER.public.text
    given = {"HPKE_PUBLIC_KEY": "", "RUNPOD_ENDPOINT_ID": "e", "RUNPOD_API_KEY": "k"}
    assert "HPKE_PUBLIC_KEY is empty" in faults_of(GatewaySettings.from_environ, given)


def no_mlkem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backend, "mlkem_supported", lambda _: False)


def no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.hpke", None)


def no_kem(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoKem:
        pass

    monkeypatch.setattr("cryptography.hazmat.primitives.hpke.KEM", NoKem)


@pytest.mark.parametrize("lack", [no_mlkem, no_module, no_kem])
def test_without_hpke_nothing_starts(
    lack: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hpke._suite.cache_clear()
    with monkeypatch.context() as patched:
        lack(patched)
        for action, text in (
            (HpkeKeyRing.parse, WORKER.text),
            (HpkePublicKey.parse, WORKER.public.text),
        ):
            assert "needs X25519 with ML-KEM-768" in faults_of(action, text)
        settings = client_settings(HPKE_PUBLIC_KEY=WORKER.public.text)
        told = faults_of(Client, settings)
        pyproject = Path(protocol.__file__).with_name("pyproject.toml")
        assert "Without it nothing is sent" in told
        [least] = re.findall(r'"cryptography>=(\d+)"', pyproject.read_text())
        assert f"install version {least} or later" in told
        # Whoever does without the mode is not asked for it.
        Client(client_settings()).close()
        sealed = seal_request(request_of(None), KEY)
        RequestOpener(KeyRing([KEY]), "endpoint", max_ttl_s=86400).open(sealed)
    hpke._suite.cache_clear()


def test_a_worker_tells_every_fault_of_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoOptions:
        def names(self) -> frozenset[str]:
            return frozenset()

        def faults(self, *_: Any) -> list[str]:
            return []

    options: Any = NoOptions()
    environ = {
        "MODELS": "org/name",
        "RUNPOD_ENDPOINT_ID": "e",
        "ENCRYPTION_KEY": "bad",
        "HPKE_PRIVATE_KEY": WORKER.public.text,
    }
    faults = faults_of(boot._checked, environ, options)
    assert "the encryption key" in faults and "HPKE_PRIVATE_KEY" in faults
    environ |= {"ENCRYPTION_KEY": generate_key(), "HPKE_PRIVATE_KEY": f"{WORKER.text},{OLD.text}"}
    ring = boot._checked(environ, options).hpke_keys
    assert ring is not None and len(ring) == 2


def test_numbers_in_the_text_are_the_codes() -> None:
    spec = (Path(protocol.__file__).parent / "SPEC.md").read_text(encoding="utf-8")
    section = spec.partition("## 13.")[2]
    sealed, _, _ = sent(body=None, method="GET")
    largest = crypto._CHUNK_PREFIX_CHARS - crypto._SALT_CHARS + crypto._SHARE_CHARS
    for number in (
        hpke.PUBLIC_BYTES,
        hpke.OVERHEAD_BYTES,
        hpke.SHARE_BYTES,
        protocol.MAX_REQUEST_BYTES,
        len(sealed),
        len(answered(sealed)),
        largest + crypto._MAX_CIPHERTEXT_CHARS,
    ):
        assert f"{number:,}" in section, number
    found = re.search(r"a JSON of at most ([\d,]+) bytes", section)
    assert found
    room = int(found[1].replace(",", "")) - len(sent(body=b'{"a":""}')[1].encode())
    full = sent(body=b'{"a":"%s"}' % (b"x" * room))[0]
    assert len(full) <= protocol.MAX_REQUEST_BYTES
    with pytest.raises(RequestError, match="too large"):
        sent(body=b'{"a":"%s"}' % (b"x" * (room + 1)))


# From end to end --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Echo]:
    with Echo(tmp_path_factory.mktemp("hpke"), hpke=True) as echo:
        yield echo


def test_keygen_prints_a_pair() -> None:
    done = run({}, "keygen", "--hpke")
    assert done.code == 0
    private, public = (line.partition("=") for line in done.out.splitlines())
    assert (private[0], public[0]) == ("HPKE_PRIVATE_KEY", "HPKE_PUBLIC_KEY")
    key = HpkeKeyRing.parse(private[2])[0]
    assert HpkePublicKey.parse(public[2]).raw == key.public.raw
    assert f"public key id {key.public.id}" in done.err
    assert b64(key.seed) not in done.err


def test_keygen_tells_the_public_key_of_a_private_one(tmp_path: Path) -> None:
    file = tmp_path / "private"
    for text in (WORKER.text, f"HPKE_PRIVATE_KEY={WORKER.text}\nHPKE_PUBLIC_KEY=x\n"):
        file.write_text(text)
        file.chmod(0o600)
        for done in (
            run({}, "keygen", "--hpke", "--public-of", str(file)),
            run({}, "keygen", "--public-of", "-", stdin=text),
        ):
            told = f"public key id {WORKER.public.id}\n"
            assert done == Done(0, f"HPKE_PUBLIC_KEY={WORKER.public.text}\n", told)
    file.chmod(0o644)
    refused = run({}, "keygen", "--public-of", str(file))
    assert (refused.code, refused.out) == (ConfigError.exit_code, "")
    assert f"run: chmod 600 {file}" in refused.err
    wrong = run({}, "keygen", "--public-of", "-", stdin=WORKER.public.text)
    assert wrong.code == ConfigError.exit_code and "holds its public key" in wrong.err


@pytest.mark.parametrize("transport", ["run", "openai"])
def test_answers_come_by_every_way(echo: Echo, transport: str) -> None:
    settings = replace(echo.settings, transport=transport)
    with Client(settings) as client:
        assert client.chat(PROMPT).text == PROMPT
        with client.chat("one two three", stream=True, notes=["loading"]) as stream:
            assert "".join(delta.text for delta in stream) == "one two three"

    async def ask() -> str:
        async with AsyncClient(settings) as client:
            return (await client.chat(PROMPT)).text

    assert asyncio.run(ask()) == PROMPT


def test_what_travels_tells_neither_who_nor_what(echo: Echo) -> None:
    assert run(echo.environ, PROMPT).out == PROMPT + "\n"
    kid = KeyRing.parse(echo.key).first.id
    for needle in (kid, PROMPT, base64.b64encode(PROMPT.encode()).decode()[:20]):
        assert needle.encode() not in echo.carried
    assert b"1.hpke." in echo.carried


def test_a_submitted_job_is_taken_up_by_another_process(echo: Echo) -> None:
    job_id = run(echo.environ, "submit", PROMPT).out.strip()
    echo.until_completed(job_id)
    [path] = list(echo.state.iterdir())
    assert "reply_seed" in path.read_text() and PROMPT not in path.read_text()
    seed = json.loads(path.read_text())["reply_seed"]
    assert seed not in run(echo.environ, "jobs", "--json").out
    assert seed.encode() not in echo.carried
    assert run_apart(echo.environ, "result", "--keep", job_id).out == PROMPT + "\n"
    damaged = path.read_text().replace(seed, seed[:-1] + "B")
    path.write_text(damaged)
    with Client(echo.settings) as client, pytest.raises(RecordError, match="damaged"):
        client.result(job_id)
    path.unlink()


def test_a_client_without_the_public_key_is_told_what_to_look_at(echo: Echo) -> None:
    for public_key in ("", STRANGER.public.text):
        settings = replace(echo.settings, hpke_public_key=public_key)
        with Client(settings) as client, pytest.raises(Rejected) as caught:
            client.chat(PROMPT)
        assert "HPKE_PUBLIC_KEY here belongs to its HPKE_PRIVATE_KEY" in str(caught.value)
        told = f"its id here is {STRANGER.public.id};" if public_key else "here none is set;"
        assert told in str(caught.value)


@pytest.mark.parametrize("public_key", ["", STRANGER.public.text], ids=["none", "another"])
def test_a_submitted_job_that_was_rejected_tells_the_public_key_too(
    echo: Echo, public_key: str
) -> None:
    environ = {name: value for name, value in echo.environ.items() if name != "HPKE_PUBLIC_KEY"}
    job_id = run(
        {**environ, **({"HPKE_PUBLIC_KEY": public_key} if public_key else {})}, "submit", PROMPT
    ).out.strip()
    done = run(environ, "result", job_id)
    assert done.code == Rejected.exit_code
    assert (f"its id here is {STRANGER.public.id};" in done.err) == bool(public_key)
    assert ("here none is set;" in done.err) != bool(public_key)


def test_a_worker_without_the_pair_rejects_what_is_in_an_envelope(tmp_path: Path) -> None:
    with Echo(tmp_path) as echo:
        settings = replace(echo.settings, hpke_public_key=WORKER.public.text)
        with Client(settings) as client, pytest.raises(Rejected):
            client.chat(PROMPT)
        assert b"1.hpke." in echo.carried


def test_doctor_looks_at_it(echo: Echo) -> None:
    done = run(echo.environ, "doctor")
    assert echo.hpke_key is not None
    assert done.code == 0 and f"id {echo.hpke_key.public.id}" in done.out
    done = run({**echo.environ, "HPKE_PUBLIC_KEY": echo.key}, "doctor")
    assert done.code == ConfigError.exit_code
    assert "FAIL  public-key mode: HPKE_PUBLIC_KEY does not begin" in done.out


def test_the_gateway_uses_it(echo: Echo, tmp_path: Path) -> None:
    before = len(echo.carried)
    with RunningGateway(echo.environ, tmp_path / "gateway") as gateway:
        body = {"model": "echo", "messages": [{"role": "user", "content": PROMPT}]}
        answer = gateway.http.post("/v1/chat/completions", json=body)
        assert answer.json() == {"echo": PROMPT}
    carried = echo.carried[before:]
    assert b"1.hpke." in carried and KeyRing.parse(echo.key).first.id.encode() not in carried
