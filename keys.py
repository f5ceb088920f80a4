"""The pre-shared keys, and what is derived from them (SPEC.md section 2).

Owns the form that keys have in settings (their options are key_terms.py's), key ids, and which key
is for what. Knows nothing of what is sealed under them (crypto.py, simple_form.py) or of the
environment.
"""

import base64
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from cryptography.fernet import Fernet

from errors import ConfigError
from fernets import fernet, hkdf, is_canonical, unb64
from key_terms import NO_TERMS, KeyTerms, parse_terms
from protocol import RESPONSE_SECRET_BYTES

KEY_BYTES = 32

_LABEL = "sealed-vllm/1 "
_MAX_NAME_CHARS = 32
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{_MAX_NAME_CHARS - 1}}}")


def generate_key() -> str:
    """Return a new Fernet key from the system's random source."""
    return Fernet.generate_key().decode()


class Asked(Protocol):
    """The part of a request that its answer is sealed under."""

    @property
    def request_id(self) -> str:
        """The request's id."""

    @property
    def response_secret(self) -> str:
        """The request's response secret, as it travels."""


class KeyId:
    """The id of a key, which is all of the key that its answers are opened with."""

    __slots__ = ("id",)

    def __init__(self, id: str) -> None:
        self.id = id

    def response_fernet(
        self, request: Asked, salt: bytes, reply_secret: bytes | None = None
    ) -> Fernet:
        """Return the Fernet of one attempt's response key (SPEC sections 2 and 13.2)."""
        secret = unb64(request.response_secret, RESPONSE_SECRET_BYTES)
        use = "response"
        if reply_secret is not None:
            secret += reply_secret
            use = "hpke-response"
        return fernet(hkdf(secret, f"{_LABEL}{use} {self.id} {request.request_id}", salt))


class Key(KeyId):
    """One pre-shared key and what SPEC section 2 derives from it."""

    __slots__ = ("_request", "_secret", "_simple", "name", "terms")

    def __init__(self, secret: bytes, name: str | None = None, terms: KeyTerms = NO_TERMS) -> None:
        if len(secret) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes")
        self._secret = secret
        self.name = name
        self.terms = terms
        super().__init__(hkdf(secret, _LABEL + "key-id")[:8].hex())
        self._request = fernet(hkdf(secret, f"{_LABEL}request {self.id}"))
        self._simple = fernet(secret)

    @classmethod
    def parse(cls, text: str, name: str | None = None) -> "Key":
        """Read a Fernet key; ConfigError that says what is wrong and never quotes it."""
        try:
            return cls(_key_bytes(text), name)
        except ValueError as error:
            fault = f"the encryption key {error}"
        # Not inside of `except`: no error that knows the text is to be this one's context.
        raise ConfigError([fault])

    @property
    def request_fernet(self) -> Fernet:
        """The Fernet of the request key."""
        return self._request

    @property
    def simple_fernet(self) -> Fernet:
        """The Fernet of the key itself, for the simple form only (SPEC section 9)."""
        return self._simple

    @property
    def client(self) -> str:
        """Whose key it is: keys of one name are one client's."""
        return self.name or self.id

    def local_secret(self, use: str) -> bytes:
        """Return 32 bytes for a `use` of the worker's own, none of which travels (section 2)."""
        return hkdf(self._secret, f"{_LABEL}local {use}")

    def about(self, now: float) -> str:
        """Return the key's id, its name and its terms, for people."""
        named = f" ({self.name})" if self.name else ""
        return ", ".join([f"key {self.id}{named}", *self.terms.words(now)])

    def __repr__(self) -> str:
        return f"Key(id={self.id!r}, name={self.name!r})"

    def __reduce__(self) -> Any:
        raise TypeError("keys are not pickled")


def _key_bytes(text: str) -> bytes:
    """Decode a Fernet key; ValueError finishing the sentence "the key …"."""
    text = text.strip()
    make = "make one with `python client.py keygen`"
    if not text:
        raise ValueError(f"is empty; {make}")
    hint = f"copy it again, with its = at the end, or {make}"
    if not text.isascii() or text.strip("=").strip(_ALPHABET):
        raise ValueError(f"has characters other than A-Z a-z 0-9 - _ (and = at its end); {hint}")
    if len(text) != 44 or not text.endswith("=") or text.endswith("=="):
        raise ValueError(
            f"is not 44 characters of URL-safe base64 ending in one = (it has {len(text)}); {hint}"
        )
    if not is_canonical(text):
        raise ValueError(f"is not canonical: its last character before = was altered; {hint}")
    return base64.urlsafe_b64decode(text)


_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


class KeyRing(Sequence[Key]):
    """The keys of a worker, in the order of its settings."""

    def __init__(self, keys: Sequence[Key]) -> None:
        if not keys:
            raise ValueError("a key ring holds at least one key")
        self._keys = tuple(keys)
        self._by_id = {key.id: key for key in keys}
        if len(self._by_id) != len(self._keys):
            raise ValueError("two keys are the same")

    @classmethod
    def parse(cls, text: str) -> "KeyRing":
        """Read `key` or `name=key;option=value,name2=key2`, with the options of key_terms.py.

        ConfigError naming every fault, quoting nothing.
        """
        keys: list[Key] = []
        faults: list[str] = []
        by_id: dict[str, int] = {}
        entries = text.split(",")
        for number, entry in enumerate(entries, 1):
            which = "the encryption key" if len(entries) == 1 else f"encryption key {number}"
            given, *options = entry.split(";")
            name, _, rest = given.strip().partition("=")
            # A key ends in `=` itself, so only what follows an `=` makes the part before it a name.
            named = bool(rest.strip("="))
            if named and not _NAME.fullmatch(name):
                faults.append(
                    f"{which} has a name that is not 1 to {_MAX_NAME_CHARS} of A-Z a-z 0-9 . _ -, "
                    "or a comma between two keys is missing"
                )
            terms, of_terms = parse_terms(options)
            faults += [f"{which} {fault}" for fault in of_terms]
            if not entry.strip() and len(entries) > 1:
                faults.append(f"{which} is empty; remove the comma too many")
                continue
            try:
                key = Key(_key_bytes(rest if named else given), name if named else None, terms)
            except ValueError as error:
                faults.append(f"{which} {error}")
                continue
            if by_id.setdefault(key.id, number) != number:
                faults.append(f"{which} is the same as encryption key {by_id[key.id]}")
            keys.append(key)
        if faults:
            raise ConfigError(faults)
        return cls(keys)

    def get(self, kid: str) -> Key | None:
        """Return the key of that id."""
        return self._by_id.get(kid)

    @property
    def first(self) -> Key:
        """The first key."""
        return self._keys[0]

    def current(self, now: float) -> Key:
        """Return the first key that is good at that moment; ConfigError if there is none."""
        for key in self._keys:
            if key.terms.good_at(now):
                return key
        told = "; ".join(key.about(now) for key in self._keys)
        raise ConfigError(
            [
                f"no encryption key is good now: {told}; ask whoever runs the endpoint for a new "
                "key, or correct this machine's clock"
            ]
        )

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    def __getitem__(self, index: Any) -> Any:
        return self._keys[index]

    def __repr__(self) -> str:
        return f"KeyRing({list(self._keys)!r})"
