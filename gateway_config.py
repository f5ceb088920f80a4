"""The gateway's settings: one frozen object, from the environment and from key files.

Owns names, defaults and checks of what only the gateway needs; the client's own
settings are `client_config`'s, through which everything is read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

import client_config
from client_config import ClientSettings, Reader, Setting
from errors import ConfigError

DEFAULT_PORT = 8000
DEFAULT_MAX_BODY_BYTES = 7_400_000
"""Sealed, it has a third more and padding, and /run carries 10 MB."""

_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?|[0-9a-f:]*:[0-9a-f:.]*")
"""A name, an IPv4 or an IPv6 address."""

SETTINGS = (
    Setting("GATEWAY_HOST", "127.0.0.1", "the address to listen on"),
    Setting("GATEWAY_PORT", str(DEFAULT_PORT), "the port to listen on; 0 is any that is free"),
    Setting("GATEWAY_KEY", "", "a key that local clients must send as their API key"),
    Setting("GATEWAY_KEY_FILE", "", "a file of mode 0600 that holds it"),
    Setting("GATEWAY_ADMIN_TOKEN", "", "opens the routes below /admin; without it there are none"),
    Setting("GATEWAY_ADMIN_TOKEN_FILE", "", "a file of mode 0600 that holds it"),
    Setting(
        "GATEWAY_ALLOWED_HOSTS",
        "",
        "host names, besides this machine's own, under which the gateway may be reached; "
        "comma-separated, `*` is any",
    ),
    Setting(
        "GATEWAY_CORS_ORIGINS",
        "",
        "origins of web pages, such as https://chat.example.com, that may call the gateway "
        "from a browser; comma-separated",
    ),
    Setting("GATEWAY_MAX_BODY_BYTES", str(DEFAULT_MAX_BODY_BYTES), "largest body that is accepted"),
    Setting("GATEWAY_MODELS", "", "models to list until a worker was asked; comma-separated"),
    Setting("GATEWAY_MODELS_TTL_S", "300", "how long the list of models is taken as current"),
    Setting("GATEWAY_KEEPALIVE_S", "5", "how long a stream may be silent before a comment is sent"),
    Setting("GATEWAY_VAPI_FILE", "", "a voice file, which turns the Vapi webhook on"),
    Setting("GATEWAY_VAPI_TOKEN", "", "Vapi shows it as `Authorization: Bearer`"),
    Setting("GATEWAY_VAPI_TOKEN_FILE", "", "a file of mode 0600 that holds it"),
    Setting("GATEWAY_VAPI_SECRET", "", "Vapi shows it as `X-Vapi-Secret`"),
    Setting("GATEWAY_VAPI_SECRET_FILE", "", "a file of mode 0600 that holds it"),
    Setting("GATEWAY_VAPI_HMAC_KEY", "", "Vapi signs its messages with it (HMAC, SHA256)"),
    Setting("GATEWAY_VAPI_HMAC_KEY_FILE", "", "a file of mode 0600 that holds it"),
)


@dataclass(frozen=True, slots=True)
class VapiSettings:
    """The voice file and by what Vapi is known; whichever of the three is set is enough."""

    voice_file: str = ""
    token: str = field(default="", repr=False)
    secret: str = field(default="", repr=False)
    hmac_key: str = field(default="", repr=False)

    @classmethod
    def read(cls, reader: Reader) -> Self:
        """Read the settings; faults stay with the reader."""
        settings = cls(
            voice_file=reader.text("GATEWAY_VAPI_FILE"),
            token=reader.secret("GATEWAY_VAPI_TOKEN", required=False),
            secret=reader.secret("GATEWAY_VAPI_SECRET", required=False),
            hmac_key=reader.secret("GATEWAY_VAPI_HMAC_KEY", required=False),
        )
        if settings.voice_file and not settings.on:
            reader.faults.append(
                "GATEWAY_VAPI_FILE is set, but nothing by which Vapi is known; set one of "
                "GATEWAY_VAPI_TOKEN, GATEWAY_VAPI_SECRET and GATEWAY_VAPI_HMAC_KEY"
            )
        if settings.on and not settings.voice_file:
            reader.faults.append("GATEWAY_VAPI_FILE is not set; without it the webhook is off")
        return settings

    @property
    def on(self) -> bool:
        """Whether there is something by which Vapi is known."""
        return bool(self.token or self.secret or self.hmac_key)


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """What the gateway needs to know beside the client's settings; keys are in no repr."""

    client: ClientSettings
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    key: str = field(default="", repr=False)
    admin_token: str = field(default="", repr=False)
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    models: tuple[str, ...] = ()
    models_ttl_s: float = 300.0
    keepalive_s: float = 5.0
    vapi: VapiSettings = field(default_factory=VapiSettings)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """Read the settings; ConfigError naming every fault at once, no value of a key in it."""
        reader = Reader(environ)
        settings = cls(
            client=ClientSettings.read(reader),
            host=reader.text("GATEWAY_HOST") or "127.0.0.1",
            port=_whole(reader, "GATEWAY_PORT", DEFAULT_PORT, 0, 65535),
            key=_token(reader, "GATEWAY_KEY"),
            admin_token=_token(reader, "GATEWAY_ADMIN_TOKEN"),
            allowed_hosts=_hosts(reader),
            cors_origins=_origins(reader),
            max_body_bytes=_whole(
                reader, "GATEWAY_MAX_BODY_BYTES", DEFAULT_MAX_BODY_BYTES, 1, 2**31
            ),
            models=_list(reader, "GATEWAY_MODELS"),
            models_ttl_s=reader.seconds("GATEWAY_MODELS_TTL_S") or 300.0,
            keepalive_s=reader.seconds("GATEWAY_KEEPALIVE_S") or 5.0,
            vapi=VapiSettings.read(reader),
        )
        _check_names(reader, environ)
        if settings.key and settings.key == settings.admin_token:
            reader.faults.append(
                "GATEWAY_KEY and GATEWAY_ADMIN_TOKEN are the same; an admin's has to be another"
            )
        if reader.faults:
            raise ConfigError(reader.faults)
        return settings

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the gateway."""
        return client_config.is_this_machine(self.host)


def load(overrides: Mapping[str, str | None]) -> GatewaySettings:
    """Read the settings from the process's environment; what `overrides` gives takes its place."""
    return GatewaySettings.from_environ(client_config.environment(overrides))


def _list(reader: Reader, name: str) -> tuple[str, ...]:
    return tuple(item for item in map(str.strip, reader.text(name).split(",")) if item)


def _whole(reader: Reader, name: str, default: int, low: int, high: int) -> int:
    text = reader.text(name)
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and low <= int(text) <= high):
        reader.faults.append(f"{name} is not a whole number from {low} to {high}")
        return default
    return int(text)


def _check_names(reader: Reader, environ: Mapping[str, str]) -> None:
    reader.check_names("GATEWAY_", [setting.name for setting in SETTINGS])
    # Each would leave the gateway open whose owner has set it.
    for name in ("GATEWAY_API_KEY", "GATEWAY_TOKEN"):
        if name in environ:
            reader.faults.append(f"{name} is no setting; is GATEWAY_KEY meant?")


def _token(reader: Reader, name: str) -> str:
    token = reader.secret(name, required=False)
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        reader.faults.append(f"{name} holds blanks, or characters that a header cannot carry")
    return token


def _hosts(reader: Reader) -> tuple[str, ...]:
    hosts = tuple(host.lower() for host in _list(reader, "GATEWAY_ALLOWED_HOSTS"))
    for host in hosts:
        if host != "*" and not _HOST.fullmatch(host):
            reader.faults.append(
                f"GATEWAY_ALLOWED_HOSTS: {host} is not a host name such as chat.example.com "
                "(no scheme, no port, no path)"
            )
    return hosts


def _origins(reader: Reader) -> tuple[str, ...]:
    origins = _list(reader, "GATEWAY_CORS_ORIGINS")
    for origin in origins:
        url = urlsplit(origin)
        if url.scheme not in ("http", "https") or origin != f"{url.scheme}://{url.netloc}":
            reader.faults.append(
                f"GATEWAY_CORS_ORIGINS: {origin} is not an origin such as "
                "https://chat.example.com (no path, no * here)"
            )
    return origins
