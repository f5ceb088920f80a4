"""The cases of vectors/hpke.json (SPEC.md section 13), for make_vectors.py.

HPKE's only randomness that the package cryptography lets nobody choose is that of ML-KEM. Its
ciphertexts are therefore recorded in hpke_encapsulations.json, one for each of two keys
(`--record` makes them anew); everything else is computed here as RFC 9180 has it.
"""

import base64
import hashlib
import hmac
import json
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec.structs import replace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from crypto import AnswerSealer, new_request, seal_request
from fernets import b64
from hpke import Envelope, HpkePrivateKey, HpkePublicKey
from protocol import HpkeRequest, Request
from tools.make_vectors import (
    AUDIENCE,
    KEY,
    NOW,
    OTHER,
    OTHER_KEY,
    WORKER_KEY,
    Case,
    case,
    fixed,
    flip,
    ivs,
)

RECORDED = Path(__file__).with_name("hpke_encapsulations.json")
WORKER, REPLY = (HpkePrivateKey(fixed(f"hpke {name}", 32)) for name in ("worker", "reply"))
OLD = HpkePrivateKey(fixed("hpke old", 32))
X_WING_SEED = "7f9c2ba4e88f827d616045507605853ed73b8093f6efbc88eb1a6eacfa66ef26"
REQUEST_INFO = b"sealed-vllm/1 hpke-request"

_SUITE = b"HPKE" + struct.pack(">HHH", 0x647A, 0x0001, 0x0002)


def _mlkem(key: HpkePrivateKey) -> MLKEM768PrivateKey:
    return MLKEM768PrivateKey.from_seed_bytes(hashlib.shake_256(key.seed).digest(96)[:64])


def _extract(salt: bytes, label: bytes, content: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + _SUITE + label + content, "sha256")


def _expand(secret: bytes, label: bytes, info: bytes, size: int) -> bytes:
    # One block of HKDF-Expand: neither key nor nonce is longer than a SHA-256.
    labelled = struct.pack(">H", size) + b"HPKE-v1" + _SUITE + label + info + b"\x01"
    return hmac.digest(secret, labelled, "sha256")[:size]


def seal(key: HpkePrivateKey, content: bytes, info: bytes, label: str) -> bytes:
    """Return HPKE's output for a key of which an encapsulation is recorded."""
    recorded: dict[str, str] = json.loads(RECORDED.read_text(encoding="utf-8"))
    mlkem_ciphertext = base64.b64decode(recorded[key.public.id])
    ephemeral = X25519PrivateKey.from_private_bytes(fixed(f"ephemeral {label}", 32))
    x25519_ciphertext = ephemeral.public_key().public_bytes_raw()
    x25519_public = key.public.raw[1184:]
    shared = hashlib.sha3_256(
        _mlkem(key).decapsulate(mlkem_ciphertext)
        + ephemeral.exchange(X25519PublicKey.from_public_bytes(x25519_public))
        + x25519_ciphertext
        + x25519_public
        + b"\\.//^\\"
    ).digest()
    context = b"\0" + _extract(b"", b"psk_id_hash", b"") + _extract(b"", b"info_hash", info)
    secret = _extract(shared, b"secret", b"")
    aead = AESGCM(_expand(secret, b"key", context, 32))
    nonce = _expand(secret, b"base_nonce", context, 12)
    return mlkem_ciphertext + x25519_ciphertext + aead.encrypt(nonce, content, b"")


@contextmanager
def recorded(label: str) -> Iterator[None]:
    """Let everything that is sealed by HPKE be sealed with what is recorded."""
    private = {key.public.id: key for key in (WORKER, REPLY)}

    def sealing(self: HpkePublicKey, content: bytes, info: bytes) -> bytes:
        return seal(private[self.id], content, info, label)

    with patch.object(HpkePublicKey, "seal", sealing):
        yield


def request_of(label: str, **changes: Any) -> HpkeRequest:
    """Return a request with fixed times, id, secret and reply key."""
    settings: dict[str, Any] = {
        "route": "generate",
        "body": '{"prompt":"Grüße!"}'.encode(),
        "audience": AUDIENCE,
        "ttl_s": 600,
        "envelope": Envelope(WORKER.public, REPLY),
        "now": lambda: NOW,
        "random": lambda size: fixed(label, size),
    }
    request = new_request(**settings | changes)
    assert isinstance(request, HpkeRequest)
    return request


def without_reply_key(request: HpkeRequest) -> Request:
    """Return the request as it would be without public-key mode."""
    return Request(**{name: getattr(request, name) for name in Request.__struct_fields__})


def enveloped(inside: str, label: str, info: bytes = REQUEST_INFO) -> str:
    """Return any inside in an envelope."""
    return "1.hpke." + b64(seal(WORKER, inside.encode(), info, label))


def sealed_bare(request: Request, label: str) -> str:
    """Return a request sealed as section 3 has it, with whatever members."""
    with ivs(fixed(f"{label} iv", 16)), patch("crypto.HpkeRequest", type(None)):
        return seal_request(request, WORKER_KEY)


def cases() -> list[Case]:
    """Return the cases of hpke.json."""
    return [*_keys(), *_requests(), *_answers()]


def _keys() -> Iterator[Case]:
    for name, comment, key in (
        ("a pair", "From a seed to both halves.", WORKER),
        (
            "the seed of X-Wing's first vector",
            "draft-connolly-cfrg-xwing-kem gives the same public key.",
            HpkePrivateKey(bytes.fromhex(X_WING_SEED)),
        ),
    ):
        yield case(
            name,
            comment,
            "derive",
            private_key=key.text,
            public_key=key.public.text,
            key_id=key.public.id,
        )
    text, raw = WORKER.public.text, WORKER.public.raw
    for name, comment, broken, reason in (
        ("a private key", "The other half.", WORKER.text, "prefix"),
        ("cut", "A character short.", text[:-1], "encoding"),
        ("another character", "No base64.", text[:-1] + "*", "encoding"),
        ("a byte short", "1,215 bytes.", "hpke-public." + b64(raw[:-1]), "length"),
        (
            "no ML-KEM key",
            "Out of range.",
            "hpke-public." + b64(b"\xff" * 1184 + raw[1184:]),
            "key",
        ),
        ("low order", "The point 0.", "hpke-public." + b64(raw[:1184] + bytes(32)), "key"),
    ):
        yield case(name, comment, "refuse_key", public_key=broken, reason=reason)
    text = WORKER.text
    for name, comment, broken, reason in (
        ("a public key", "The other half.", WORKER.public.text, "prefix"),
        ("another character", "No base64.", text[:-1] + "*", "encoding"),
        ("padding", "b64 has none.", text + "=", "encoding"),
        ("a byte short", "31 bytes.", "hpke-private." + b64(WORKER.seed[:-1]), "length"),
        ("a byte long", "33 bytes.", "hpke-private." + b64(WORKER.seed + b"\0"), "length"),
    ):
        yield case(name, comment, "refuse_private_key", private_key=broken, reason=reason)


def _requests() -> Iterator[Case]:
    def opens(name: str, comment: str, private_keys: list[HpkePrivateKey]) -> Case:
        request = request_of(name)
        with recorded(name), ivs(fixed(f"{name} iv", 16)):
            sealed = seal_request(request, WORKER_KEY, Envelope(WORKER.public, REPLY))
        return case(
            name,
            comment,
            "open",
            private_keys=[key.text for key in private_keys],
            keys=[OTHER, KEY],
            sealed=sealed,
            request=json.loads(request.encode()),
        )

    def rejects(name: str, comment: str, sealed: str, reason: str, *keys: HpkePrivateKey) -> Case:
        return case(
            name,
            comment,
            "reject",
            private_keys=[key.text for key in keys or (WORKER,)],
            keys=[KEY],
            sealed=sealed,
            reason=reason,
        )

    yield opens("one private key", "The envelope, and what is in it.", [WORKER])
    yield opens("several private keys", "Every key is tried.", [OLD, WORKER])
    good = request_of("good")
    inside = sealed_bare(good, "good")
    sealed = enveloped(inside, "good")
    bare = without_reply_key(good)
    no_key = replace(good, reply_key=b64(REPLY.public.raw[:1184] + bytes(32)))
    unknown = inside.replace(WORKER_KEY.id, OTHER_KEY.id)
    yield rejects("no envelope", "A worker with a private key takes none.", inside, "form")
    yield rejects("padding", "b64 has none.", sealed + "=", "encoding")
    yield rejects("flipped encapsulation", "In ML-KEM's part.", flip(sealed, 100), "envelope")
    yield rejects(
        "flipped tag", "Its last byte but two.", flip(sealed, len(sealed) - 3), "envelope"
    )
    yield rejects("another private key", "Not this worker's.", sealed, "envelope", OLD)
    yield rejects(
        "another use",
        "Sealed to the right key with another info.",
        enveloped(inside, "another use", b"sealed-vllm/1 hpke-share " + good.request_id.encode()),
        "envelope",
    )
    yield rejects(
        "too short", "Less than an encapsulation.", "1.hpke." + b64(bytes(99)), "envelope"
    )
    yield rejects("unknown key inside", "A kid that is none.", enveloped(unknown, "kid"), "inside")
    yield rejects(
        "bytes after it", "S and four more.", enveloped(inside + "AAAA", "more"), "inside"
    )
    yield rejects("an envelope inside", "Only one.", enveloped(sealed, "twice"), "inside")
    yield rejects(
        "flipped inside",
        "Of the sealed request in the envelope.",
        enveloped(flip(inside, 60), "flipped inside"),
        "inside",
    )
    yield rejects(
        "no reply key",
        "A request as without public-key mode, in an envelope.",
        enveloped(sealed_bare(bare, "bare"), "bare"),
        "members",
    )
    yield rejects(
        "a reply key that is none",
        "Of low order.",
        enveloped(sealed_bare(no_key, "low order"), "low order"),
        "members",
    )


def _answers() -> Iterator[Case]:
    def chunks_of(name: str, request: HpkeRequest) -> list[str]:
        reply_secret = fixed(f"{name} reply secret", 32)
        with recorded(name), patch("hpke.os.urandom", lambda _: reply_secret):
            sealer = AnswerSealer(request, WORKER_KEY)
        with ivs(fixed(f"{name} 0", 16), fixed(f"{name} 1", 16)):
            return [*sealer.seal(b"first"), *sealer.seal(b"last", final=True)]

    def members(request: HpkeRequest) -> dict[str, Any]:
        return {
            "key": KEY,
            "reply_private_key": REPLY.text,
            "request_id": request.request_id,
            "response_secret": request.response_secret,
        }

    request = request_of("answer")
    chunks = chunks_of("answer", request)
    yield case(
        "answer",
        "Two chunks; each carries the share, and any opens by itself.",
        "answer",
        **members(request),
        chunks=chunks,
        payloads=[b"first".hex(), b"last".hex()],
    )
    other = request_of("another answer")
    version, _, ciphertext = chunks[0].split(".")
    theirs = chunks_of("another answer", other)
    bare = without_reply_key(request)
    with ivs(fixed("bare 0", 16)):
        [without] = AnswerSealer(bare, WORKER_KEY, salt=bytes(16)).seal(b"first")
    for name, comment, chunk, reason in (
        ("a salt", "An answer as without public-key mode.", without, "share"),
        ("of another request", "Its share was made for that one.", theirs[0], "share"),
        ("flipped share", "In X25519's part.", flip(chunks[0], 1480), "share"),
        (
            "another share",
            "A share of this request, but not of this chunk.",
            f"{version}.{chunks_of('second attempt', request)[0].split('.')[1]}.{ciphertext}",
            "authentication",
        ),
        ("flipped ciphertext", "As in section 5.", flip(chunks[0], 1600), "authentication"),
    ):
        yield case(
            name, comment, "refuse_answer", **members(request), chunks=[chunk], reason=reason
        )


if __name__ == "__main__" and sys.argv[1:] == ["--record"]:
    from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey

    RECORDED.write_text(
        json.dumps(
            {
                key.public.id: base64.b64encode(
                    MLKEM768PublicKey.from_public_bytes(key.public.raw[:1184]).encapsulate()[1]
                ).decode()
                for key in (WORKER, REPLY)
            },
            indent=1,
        )
        + "\n"
    )
