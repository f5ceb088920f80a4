"""What is used of Fernet: keys derived by HKDF, and ciphertexts in their one spelling.

Owns the canonical encoding (SPEC.md section 7), derivation, and what is known of a ciphertext
without its key: its length, and how one without a clock begins. Knows nothing of whose keys
these are (keys.py) nor of what is sealed (crypto.py, simple_form.py).
"""

import base64

from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
# The last characters before one and before two `=` that leave no unused bit set.
_LAST = {1: frozenset("AEIMQUYcgkosw048"), 2: frozenset("AQgw")}

TIME_ZERO = "gAAAAAAAAAAA"
"""How a ciphertext made at time 0 begins: the version byte and eight zero bytes."""


def is_canonical(text: str) -> bool:
    """Whether `text` is what encoding its decoded bytes gives again (SPEC section 7)."""
    # All of it is looked at in one pass, so that the time does not tell what is wrong, nor where.
    other = text.encode(errors="replace").translate(None, _ALPHABET)
    if len(text) % 4 or other not in (b"", b"=", b"=="):
        return False
    pads = len(other)
    return not pads or (text.endswith("=" * pads) and text[-1 - pads] in _LAST[pads])


def b64(data: bytes) -> str:
    """Return URL-safe base64 without padding (SPEC section 1)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64(text: str, size: int | None = None) -> bytes:
    """Decode `b64`, of exactly `size` bytes if given; ValueError for any other spelling."""
    padded = text + "=" * (-len(text) % 4)
    if text.endswith("=") or not is_canonical(padded):
        raise ValueError("not canonical base64")
    data = base64.urlsafe_b64decode(padded)
    if size is not None and len(data) != size:
        raise ValueError("wrong length")
    return data


def hkdf(secret: bytes, info: str, salt: bytes | None = None) -> bytes:
    """Return 32 bytes derived from `secret` for the use that `info` names (SPEC section 1)."""
    return HKDF(SHA256(), length=32, salt=salt, info=info.encode()).derive(secret)


def fernet(secret: bytes) -> Fernet:
    """Return the Fernet of a key of 32 bytes."""
    return Fernet(base64.urlsafe_b64encode(secret))


def sealed_length(inside_bytes: int) -> int:
    """Return how many characters Fernet makes of `inside_bytes`."""
    return 4 * -(-(57 + 16 * (inside_bytes // 16 + 1)) // 3)
