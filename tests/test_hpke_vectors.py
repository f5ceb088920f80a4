"""Public-key mode's vectors, fulfilled by the project and by the second client of test_vectors.py.

The second client takes HPKE from the package cryptography, as another language would take it from
a library; the tool that makes the vectors computes it by itself.
"""

import hashlib
import json
from functools import partial
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite

from crypto import AnswerOpener, RequestOpener
from errors import ConfigError, Rejected, TamperedChunk
from hpke import HpkeKeyRing, HpkePublicKey
from keys import Key, KeyRing
from tests.test_vectors import (
    Case,
    Refused,
    canonical,
    cases,
    derive,
    key_id,
    open_request,
    refusal,
    request_with,
    strip_padding,
)

SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


# The second client ------------------------------------------------------------------------


def private_parts(text: str) -> tuple[MLKEM768PrivateKey, X25519PrivateKey]:
    seed = canonical(text.removeprefix("hpke-private."), padded=False)
    expanded = hashlib.shake_256(seed).digest(96)
    return (
        MLKEM768PrivateKey.from_seed_bytes(expanded[:64]),
        X25519PrivateKey.from_private_bytes(expanded[64:]),
    )


def public_of(private: str) -> bytes:
    mlkem, x25519 = private_parts(private)
    return mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()


def read_public(raw: bytes) -> None:
    if len(raw) != 1216:
        raise Refused("length")
    try:
        MLKEM768PublicKey.from_public_bytes(raw[:1184])
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(raw[1184:]))
    except ValueError:
        raise Refused("key") from None


def parse_public(text: str) -> None:
    if not text.startswith("hpke-public."):
        raise Refused("prefix")
    read_public(canonical(text.removeprefix("hpke-public."), padded=False))


def parse_private(text: str) -> None:
    if not text.startswith("hpke-private."):
        raise Refused("prefix")
    if len(canonical(text.removeprefix("hpke-private."), padded=False)) != 32:
        raise Refused("length")


def hpke_open(private: str, sealed: bytes, info: str) -> bytes | None:
    try:
        return SUITE.decrypt(
            sealed, MLKEM768X25519PrivateKey(*private_parts(private)), info=info.encode()
        )
    except InvalidTag:
        return None


def open_enveloped(private_keys: list[str], keys: list[str], sealed: str) -> dict[str, Any]:
    if not sealed.startswith("1.hpke."):
        raise Refused("form")
    content = canonical(sealed.removeprefix("1.hpke."), padded=False)
    opened = [hpke_open(key, content, "sealed-vllm/1 hpke-request") for key in private_keys]
    inside = next((one for one in opened if one is not None), None)
    if inside is None:
        raise Refused("envelope")
    try:
        request = open_request(keys, inside.decode(), more="reply_key")
    except Refused as refused:
        raise Refused("members" if str(refused) == "members" else "inside") from None
    try:
        read_public(canonical(request["reply_key"], padded=False))
    except Refused:
        raise Refused("members") from None
    return request


def open_shared(case: Case, chunk: str) -> bytes:
    version, share_text, ciphertext = chunk.split(".")
    share = canonical(share_text, padded=False)
    info = "sealed-vllm/1 hpke-share " + case["request_id"]
    reply_secret = hpke_open(case["reply_private_key"], share, info)
    if version != "1" or len(share) != 1168 or reply_secret is None:
        raise Refused("share")
    secret = canonical(case["response_secret"], padded=False) + reply_secret
    info = f"sealed-vllm/1 hpke-response {key_id(case['key'])} {case['request_id']}"
    try:
        inside = Fernet(derive(secret, info, share)).decrypt(ciphertext)
    except InvalidToken:
        raise Refused("authentication") from None
    return strip_padding(inside, 9, int.from_bytes(inside[5:9], "big"))


# The cases --------------------------------------------------------------------------------


def opener(case: Case) -> RequestOpener:
    return RequestOpener(
        KeyRing.parse(",".join(case["keys"])),
        "",
        max_ttl_s=0,
        hpke_keys=HpkeKeyRing.parse(",".join(case["private_keys"])),
    )


@cases("hpke", "derive")
def test_keys_derive(case: Case) -> None:
    raw = public_of(case["private_key"])
    assert canonical(case["public_key"].removeprefix("hpke-public."), padded=False) == raw
    [key] = HpkeKeyRing.parse(case["private_key"])
    assert (key.public.text, key.public.id) == (case["public_key"], case["key_id"])


@cases("hpke", "refuse_key")
def test_keys_refuse(case: Case) -> None:
    assert refusal(partial(parse_public, case["public_key"])) == case["reason"]
    with pytest.raises(ConfigError):
        HpkePublicKey.parse(case["public_key"])


@cases("hpke", "refuse_private_key")
def test_private_keys_refuse(case: Case) -> None:
    assert refusal(partial(parse_private, case["private_key"])) == case["reason"]
    with pytest.raises(ConfigError):
        HpkeKeyRing.parse(case["private_key"])


@cases("hpke", "open")
def test_requests_open(case: Case) -> None:
    opened = open_enveloped(case["private_keys"], case["keys"], case["sealed"])
    assert opened == case["request"]
    assert json.loads(opener(case).open(case["sealed"]).request.encode()) == case["request"]


@cases("hpke", "reject")
def test_requests_reject(case: Case) -> None:
    given = case["private_keys"], case["keys"], case["sealed"]
    assert refusal(partial(open_enveloped, *given)) == case["reason"]
    with pytest.raises(Rejected):
        opener(case).open(case["sealed"])


def answer_opener(case: Case) -> AnswerOpener:
    [reply_key] = HpkeKeyRing.parse(case["reply_private_key"])
    return AnswerOpener(request_with(case), Key.parse(case["key"]), reply_key)


@cases("hpke", "answer")
def test_answers_open(case: Case) -> None:
    assert [open_shared(case, chunk).hex() for chunk in case["chunks"]] == case["payloads"]
    client = answer_opener(case)
    assert [client.open(chunk).payload.hex() for chunk in case["chunks"]] == case["payloads"]


@cases("hpke", "refuse_answer")
def test_answers_refuse(case: Case) -> None:
    [chunk] = case["chunks"]
    assert refusal(partial(open_shared, case, chunk)) == case["reason"]
    with pytest.raises(TamperedChunk):
        answer_opener(case).open(chunk)
