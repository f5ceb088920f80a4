"""The client's settings: one frozen object from the environment and from key files.

Owns names, defaults and checks of the client's settings and the rule that key
files are readable by their owner alone. `environment` is the only reader of the
environment on the client's side. Knows nothing of what a key looks like inside
(keys.py) or of endpoints.
"""

import difflib
import ipaddress
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import urlsplit

from errors import ConfigError

DEFAULT_API_BASE = "https://api.runpod.ai/v2"
DEFAULT_TTL_S = 3600
DEFAULT_TRANSPORT = "run"
TRANSPORTS = ("run", "openai")
DEFAULT_STATE_DIR = "~/.local/state/sealed-vllm"
MAX_KEY_FILE_BYTES = 64 * 1024

_ENDPOINT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Setting(NamedTuple):
    """One row of the settings table in the documentation."""

    name: str
    default: str
    meaning: str


SETTINGS = (
    Setting("RUNPOD_ENDPOINT_ID", "", "the endpoint to talk to"),
    Setting("RUNPOD_API_KEY", "", "the platform's API key"),
    Setting("RUNPOD_API_KEY_FILE", "", "a file of mode 0600 that holds it"),
    Setting(
        "ENCRYPTION_KEY", "", "the key shared with the worker; of several the first that is good"
    ),
    Setting("ENCRYPTION_KEY_FILE", "", "a file of mode 0600 that holds it"),
    Setting(
        "HPKE_PUBLIC_KEY",
        "",
        "the public half of the worker's `HPKE_PRIVATE_KEY`; with it no request travels without "
        "public-key mode",
    ),
    Setting("RUNPOD_API_BASE", DEFAULT_API_BASE, "the platform's address"),
    Setting(
        "CLIENT_TIMEOUT_S", "", "longest time for a whole answer; empty: the platform's limits"
    ),
    Setting(
        "CLIENT_WAIT_S", "", "longest time in the queue; empty: as long as the platform keeps it"
    ),
    Setting(
        "CLIENT_TTL_S",
        "",
        f"how long a request is valid, also for the platform; empty: {DEFAULT_TTL_S}, "
        "for the worker only",
    ),
    Setting(
        "CLIENT_TRANSPORT",
        DEFAULT_TRANSPORT,
        "how requests travel: `run` (`/run`, then `/stream`), or `openai` (the endpoint's OpenAI "
        "route: one streamed answer, no job id, and cut by the platform if it is long)",
    ),
    Setting(
        "CLIENT_STATE_DIR",
        "`$XDG_STATE_HOME/sealed-vllm`, or `~/.local/state/sealed-vllm`",
        "where `submit` keeps what opens the answers of its jobs, and the gateway the names of the "
        "models",
    ),
)


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What a client needs to know; keys are in no repr."""

    endpoint_id: str
    api_key: str = field(repr=False)
    encryption_key: str = field(repr=False)
    """One Fernet key or several, as keys.KeyRing reads them; empty where none is needed."""
    api_base: str = DEFAULT_API_BASE
    timeout_s: float | None = None
    wait_s: float | None = None
    ttl_s: int | None = None
    transport: str = DEFAULT_TRANSPORT
    state_dir: Path = Path(DEFAULT_STATE_DIR)
    """Where the records of submitted jobs are kept; made when the first one is."""
    hpke_public_key: str = ""
    """The worker's public key, as hpke.HpkePublicKey reads it; empty: without public-key mode."""

    @property
    def shows_api_key(self) -> bool:
        """Whether the API key crosses a network, if only a private one, without TLS."""
        url = urlsplit(self.api_base)
        return url.scheme == "http" and not is_this_machine(url.hostname or "")

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], *, with_key: bool = True) -> Self:
        """Read the settings; ConfigError naming every fault at once, no value of a key in it.

        Without `with_key` the encryption key may be missing: health, status and cancel need none.
        """
        reader = Reader(environ)
        settings = cls.read(reader, with_key=with_key)
        if reader.faults:
            raise ConfigError(reader.faults)
        return settings

    @classmethod
    def read(cls, reader: "Reader", *, with_key: bool = True) -> Self:
        """Read the settings; faults stay with the reader."""
        reader.check_names("CLIENT_", [setting.name for setting in SETTINGS])
        return cls(
            endpoint_id=reader.endpoint_id(),
            api_key=reader.secret("RUNPOD_API_KEY", required=True),
            encryption_key=reader.secret("ENCRYPTION_KEY", required=with_key),
            api_base=reader.api_base(),
            timeout_s=reader.seconds("CLIENT_TIMEOUT_S"),
            wait_s=reader.seconds("CLIENT_WAIT_S"),
            ttl_s=reader.whole_seconds("CLIENT_TTL_S"),
            transport=reader.choice("CLIENT_TRANSPORT", TRANSPORTS),
            state_dir=reader.state_dir(),
            hpke_public_key=reader.public_key(),
        )


def load(
    overrides: Mapping[str, str | None] | None = None, *, with_key: bool = True
) -> ClientSettings:
    """Read the settings from the process's environment; what `overrides` gives takes its place."""
    return ClientSettings.from_environ(environment(overrides or {}), with_key=with_key)


def load_state_dir() -> Path:
    """Return the folder of what is kept between two runs; no other setting needs to be right."""
    return Reader(environment({})).state_dir()


def environment(overrides: Mapping[str, str | None]) -> dict[str, str]:
    """Return the process's environment with what `overrides` gives in its place."""
    merged = dict(os.environ)
    for name, value in overrides.items():
        if value is None:
            continue
        merged[name] = value
        # What is given by hand wins over its other form that happens to be in the environment.
        other = name.removesuffix("_FILE") if name.endswith("_FILE") else f"{name}_FILE"
        merged.pop(other, None)
    return merged


def read_key_file(path: str) -> str:
    """Return the text of a key file; ValueError, finishing "the file …", if others can read it."""
    try:
        # Checked on the opened file, so that it cannot be exchanged in between.
        with Path(path).expanduser().open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise ValueError(f"{path} is not a regular file")
            if mode & 0o077:
                raise ValueError(
                    f"{path} can be read by others (mode {stat.S_IMODE(mode):04o}); "
                    f"run: chmod 600 {path}"
                )
            content = file.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > MAX_KEY_FILE_BYTES:
        raise ValueError(f"{path} is too large to be a key file")
    try:
        text = content.decode("ascii").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file") from None
    if not text:
        raise ValueError(f"{path} is empty")
    return text


class Reader:
    """Reads settings one by one and collects their `faults`."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.faults: list[str] = []

    def text(self, name: str) -> str:
        """Return the value without the white space around it."""
        return self._environ.get(name, "").strip()

    def secret(self, name: str, *, required: bool) -> str:
        """Return a secret, given itself or by a file; empty where it is neither."""
        value, path = self.text(name), self.text(f"{name}_FILE")
        if value and path:
            self.faults.append(f"both {name} and {name}_FILE are set; keep one")
            return ""
        if path:
            try:
                value = read_key_file(path)
            except ValueError as error:
                self.faults.append(f"{name}_FILE: the file {error}")
                return ""
        if not value and required:
            self.faults.append(
                f"{name} is not set; set it, or {name}_FILE to a file of mode 0600 that holds it"
            )
        if name == "RUNPOD_API_KEY" and not (value.isascii() and value.isprintable()):
            self.faults.append(f"{name} holds characters that no API key has")
            return ""
        return value

    def public_key(self) -> str:
        """Return the worker's public key; what looks like a slip must not switch it off."""
        name = "HPKE_PUBLIC_KEY"
        if name in self._environ and not self.text(name):
            self.faults.append(f"{name} is empty; set it, or remove it to do without it")
        for other in self._environ:
            if other.startswith("HPKE") and other not in (name, "HPKE_PRIVATE_KEY"):
                self.faults.append(f"{other} is no setting; is {name} meant?")
        if self.text("HPKE_PRIVATE_KEY") and name not in self._environ:
            self.faults.append(
                f"HPKE_PRIVATE_KEY belongs on the endpoint only; remove it here, and set {name} "
                "(python client.py keygen --public-of prints it)"
            )
        return self.text(name)

    def check_names(self, prefix: str, names: Sequence[str]) -> None:
        """Find settings that are nearly named; other programs' may begin like them."""
        for name in self._environ:
            if name.startswith(prefix) and name not in names:
                for meant in difflib.get_close_matches(name, names, n=1, cutoff=0.88):
                    self.faults.append(f"{name} is no setting; is {meant} meant?")

    def endpoint_id(self) -> str:
        """Return the endpoint's id."""
        name = "RUNPOD_ENDPOINT_ID"
        value = self.text(name)
        if not value:
            self.faults.append(f"{name} is not set; it is the id in the endpoint's address")
        elif not _ENDPOINT_ID.fullmatch(value):
            self.faults.append(f"{name} holds characters other than A-Z a-z 0-9 - _")
        return value

    def api_base(self) -> str:
        """Return the platform's address."""
        name = "RUNPOD_API_BASE"
        value = self.text(name) or DEFAULT_API_BASE
        try:
            url = urlsplit(value)
            host, _ = url.hostname, url.port
        except ValueError:
            host, url = None, urlsplit("")
        if url.scheme not in ("http", "https") or not host or url.query or url.fragment:
            self.faults.append(f"{name} is not an address such as {DEFAULT_API_BASE}")
        elif url.username or url.password:
            self.faults.append(f"{name} holds a user name or password; remove it")
        elif url.scheme == "http" and not is_local(host):
            self.faults.append(
                f"{name} begins with http://, which would send the API key in the clear; "
                "use https:// (http:// is for this machine and private networks)"
            )
        return value.rstrip("/")

    def state_dir(self) -> Path:
        """Return the folder of what is kept between two runs."""
        given, state_home = self.text("CLIENT_STATE_DIR"), self.text("XDG_STATE_HOME")
        if given:
            return Path(given)
        # A relative XDG_STATE_HOME counts as none, by the XDG base directory specification.
        if Path(state_home).is_absolute():
            return Path(state_home) / "sealed-vllm"
        return Path(DEFAULT_STATE_DIR)

    def seconds(self, name: str) -> float | None:
        """Return a positive number of seconds, None where it is not set."""
        text = self.text(name)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < 10**9:
            self.faults.append(f"{name} is not a positive number of seconds")
            return None
        return value

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """Return one of `choices`, the first where none is given."""
        value = self.text(name) or choices[0]
        if value not in choices:
            self.faults.append(f"{name} is none of {', '.join(choices)}")
        return value

    def whole_seconds(self, name: str) -> int | None:
        """Return a whole number of seconds, None where it is not set."""
        value = self.seconds(name)
        if value is not None and value < 1:
            self.faults.append(f"{name} is less than one second")
        return None if value is None else int(value)


def is_this_machine(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_local(host: str) -> bool:
    """Return whether a host name is this machine's or one of a private network."""
    if is_this_machine(host):
        return True
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host
