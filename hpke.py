"""Public-key mode's keys: a worker's pair, a request's one-time pair (SPEC.md section 13).

Owns the form that these keys have in settings, the HPKE suite, whether this machine has it, and
the share that an answer's key is made with. Knows nothing of what else is sealed (crypto.py) or
of the environment.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm

from errors import ConfigError
from fernets import b64, hkdf, unb64

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from cryptography.hazmat.primitives.hpke import Suite

SEED_BYTES = 32
PUBLIC_BYTES = 1216
OVERHEAD_BYTES = 1136
"""By how much HPKE's output is longer than its input: encapsulated key and tag."""

REPLY_SECRET_BYTES = 32
SHARE_BYTES = REPLY_SECRET_BYTES + OVERHEAD_BYTES

_PRIVATE, _PUBLIC = "hpke-private.", "hpke-public."
_MLKEM_SEED_BYTES, _MLKEM_PUBLIC_BYTES, _X25519_BYTES = 64, 1184, 32
_COPY_PRIVATE = "copy it again, or make a pair with `python client.py keygen --hpke`"
_COPY_PUBLIC = "copy it again from whoever runs the endpoint"


@functools.cache
def _suite() -> "Suite":
    # Not at the top: a client that does without public-key mode runs where there is no ML-KEM.
    from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

    return Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def check_available() -> None:
    """Raise ConfigError unless public-key mode works on this machine, shown by a round trip."""
    try:
        key = HpkePrivateKey(os.urandom(SEED_BYTES))
        works = key.open(key.public.seal(b"probe", b"probe"), b"probe") == b"probe"
    except (ImportError, AttributeError, UnsupportedAlgorithm):
        works = False
    if not works:
        raise ConfigError(
            [
                "public-key mode needs X25519 with ML-KEM-768, which this installation of the "
                "package cryptography does not have; install version 48 or later from its own "
                "wheels (pip install --upgrade cryptography). Without it nothing is sent and "
                "nothing is served"
            ]
        )


def _check_order(key: "X25519PublicKey") -> None:
    """Raise ValueError for a point of low order, with which nothing can be sealed."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    try:
        X25519PrivateKey.from_private_bytes(b"\1" * _X25519_BYTES).exchange(key)
    except ValueError:
        raise ValueError("is no key of X25519: it was altered") from None


class HpkePublicKey:
    """A public key; what is sealed to it opens with its private key alone."""

    __slots__ = ("_key", "id", "raw")

    def __init__(self, raw: bytes) -> None:
        """Take the bytes of a public key; ValueError if they are none."""
        from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
        from cryptography.hazmat.primitives.hpke import MLKEM768X25519PublicKey

        if len(raw) != PUBLIC_BYTES:
            raise ValueError(f"a public key has {PUBLIC_BYTES} bytes")
        self.raw = raw
        try:
            mlkem = MLKEM768PublicKey.from_public_bytes(raw[:_MLKEM_PUBLIC_BYTES])
        except ValueError:
            raise ValueError("is no key of ML-KEM-768: it was altered") from None
        x25519 = X25519PublicKey.from_public_bytes(raw[_MLKEM_PUBLIC_BYTES:])
        _check_order(x25519)
        self._key = MLKEM768X25519PublicKey(mlkem, x25519)
        self.id = hkdf(raw, "sealed-vllm/1 hpke-key-id")[:8].hex()

    @classmethod
    def parse(cls, text: str) -> "HpkePublicKey":
        """Read HPKE_PUBLIC_KEY; ConfigError that says what is wrong."""
        check_available()
        try:
            return cls(_decode(text, _PUBLIC, PUBLIC_BYTES))
        except ValueError as error:
            fault = f"HPKE_PUBLIC_KEY {error}; {_COPY_PUBLIC}"
        # Not inside of `except`, as in Key.parse: a private key may have been given by mistake.
        raise ConfigError([fault])

    @property
    def text(self) -> str:
        """The key as settings have it."""
        return _PUBLIC + b64(self.raw)

    def seal(self, content: bytes, info: bytes) -> bytes:
        """Return `content` sealed to this key, for the use that `info` names."""
        return _suite().encrypt(content, self._key, info=info)

    def share(self, request_id: str) -> tuple[bytes, bytes]:
        """Return a new share for the answer to a request, and the secret in it (section 13.2)."""
        reply_secret = os.urandom(REPLY_SECRET_BYTES)
        return self.seal(reply_secret, _share_info(request_id)), reply_secret

    def __repr__(self) -> str:
        return f"HpkePublicKey(id={self.id!r})"


class HpkePrivateKey:
    """A private key, made of a seed of 32 bytes."""

    __slots__ = ("_key", "public", "seed")

    def __init__(self, seed: bytes) -> None:
        from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
        from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey

        if len(seed) != SEED_BYTES:
            raise ValueError(f"a private key's seed has {SEED_BYTES} bytes")
        self.seed = seed
        expanded = hashlib.shake_256(seed).digest(_MLKEM_SEED_BYTES + _X25519_BYTES)
        mlkem = MLKEM768PrivateKey.from_seed_bytes(expanded[:_MLKEM_SEED_BYTES])
        x25519 = X25519PrivateKey.from_private_bytes(expanded[_MLKEM_SEED_BYTES:])
        self._key = MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public = HpkePublicKey(
            mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()
        )

    @classmethod
    def generate(cls, random: Callable[[int], bytes] = os.urandom) -> "HpkePrivateKey":
        """Return a new key from the system's random source."""
        return cls(random(SEED_BYTES))

    @property
    def text(self) -> str:
        """The key as settings have it."""
        return _PRIVATE + b64(self.seed)

    def open(self, sealed: bytes, info: bytes) -> bytes | None:
        """Return what was sealed to this key for the use that `info` names, or None."""
        try:
            return _suite().decrypt(sealed, self._key, info=info)
        except (InvalidTag, ValueError):
            return None

    def reply_secret(self, share: bytes, request_id: str) -> bytes:
        """Return the secret of a share; ValueError if it was not made for that request."""
        secret = self.open(share, _share_info(request_id))
        if secret is None:
            raise ValueError("a share that was not made for this request")
        return secret

    def __repr__(self) -> str:
        return f"HpkePrivateKey(id={self.public.id!r})"

    def __reduce__(self) -> Any:
        raise TypeError("keys are not pickled")


class HpkeKeyRing(Sequence[HpkePrivateKey]):
    """The private keys of a worker, in the order of its settings."""

    def __init__(self, keys: Sequence[HpkePrivateKey]) -> None:
        if not keys:
            raise ValueError("a key ring holds at least one key")
        self._keys = tuple(keys)
        # Begins as something sealed does, so that what has no form costs what a wrong key costs.
        self._decoy = self._keys[0].public.seal(b"", b"decoy")

    @classmethod
    def parse(cls, text: str) -> "HpkeKeyRing":
        """Read HPKE_PRIVATE_KEY; ConfigError naming every fault, quoting nothing."""
        check_available()
        keys: list[HpkePrivateKey] = []
        faults: list[str] = []
        numbers: dict[str, int] = {}
        entries = text.split(",")
        for number, entry in enumerate(entries, 1):
            which = "HPKE_PRIVATE_KEY" + (f", key {number}," if len(entries) > 1 else "")
            if not entry.strip() and len(entries) > 1:
                faults.append(f"{which} is empty; remove the comma too many")
                continue
            try:
                key = HpkePrivateKey(_decode(entry, _PRIVATE, SEED_BYTES))
            except ValueError as error:
                faults.append(f"{which} {error}; {_COPY_PRIVATE}")
                continue
            if numbers.setdefault(key.public.id, number) != number:
                faults.append(f"{which} is the same as key {numbers[key.public.id]}")
            keys.append(key)
        if faults:
            raise ConfigError(faults)
        return cls(keys)

    def open(self, sealed: bytes | None, info: bytes, *, decoy_bytes: int) -> bytes | None:
        """Return what was sealed to one of these keys, or None; every key is tried every time.

        None, and what is too short, cost as much as `decoy_bytes` bytes that do not open.
        """
        if sealed is None or len(sealed) < OVERHEAD_BYTES:
            sealed = self._decoy.ljust(decoy_bytes, b"\0")
        found = None
        for key in self._keys:
            opened = key.open(sealed, info)
            found = opened if found is None else found
        return found

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[HpkePrivateKey]:
        return iter(self._keys)

    def __getitem__(self, index: Any) -> Any:
        return self._keys[index]


@dataclass(frozen=True, slots=True)
class Envelope:
    """What public-key mode adds to one request: the worker's key, and one that only its answer has.

    The private half of `reply_key` never travels, so the answer stays closed to whoever comes by
    every other key later (SPEC section 13.3).
    """

    worker_key: HpkePublicKey
    reply_key: HpkePrivateKey = field(default_factory=HpkePrivateKey.generate)


def _share_info(request_id: str) -> bytes:
    return f"sealed-vllm/1 hpke-share {request_id}".encode()


def _decode(text: str, prefix: str, size: int) -> bytes:
    """Decode a key; ValueError finishing the sentence "HPKE_… …"."""
    text = text.strip()
    other = _PUBLIC if prefix == _PRIVATE else _PRIVATE
    if not text:
        raise ValueError("is empty")
    if text.startswith(other):
        kinds = ("private", "public") if prefix == _PRIVATE else ("public", "private")
        raise ValueError(f"is to hold the {kinds[0]} key of a pair, and holds its {kinds[1]} key")
    if not text.startswith(prefix):
        raise ValueError(f"does not begin with {prefix} as such a key does")
    try:
        return unb64(text.removeprefix(prefix), size)
    except ValueError:
        chars = -(-size * 4 // 3)
        raise ValueError(
            f"is not {prefix} and {chars} characters of URL-safe base64 "
            f"(it has {len(text) - len(prefix)}, or was altered)"
        ) from None
