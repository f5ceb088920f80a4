"""The gateway's door: which hosts, web pages, keys and sizes it lets in.

Owns the checks that come before any route and the answer to what no route
foresaw. Knows nothing of what the routes do.

A web page anywhere can make a browser on this machine send requests to a loopback
port. The Host allowlist stops pages whose name was made to point here (DNS
rebinding), the Origin check those that call this address by itself.
"""

import hmac
import logging
from collections.abc import Collection, Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from errors import RequestError, TooLarge
from gateway_errors import error_response
from log_guard import describe

log = logging.getLogger("gateway")

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


class Guard:
    """ASGI middleware; `open_paths` need no key, those below `own_doors` have keys of their own."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Iterable[str],
        origins: Collection[str],
        key: str,
        max_body_bytes: int,
        open_paths: Collection[str],
        own_doors: tuple[str, ...],
    ) -> None:
        self._app = app
        self._hosts = LOCAL_HOSTS | set(hosts)
        self._origins = origins
        self._key = key.encode()
        self._max_body_bytes = max_body_bytes
        self._open_paths = open_paths
        self._own_doors = own_doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request, or say why not."""
        if scope["type"] != "http":
            raise RuntimeError("the gateway speaks HTTP only")
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await error_response(refusal, scope["path"])(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, self._bounded(receive), watched)
        except TooLarge as error:
            await error_response(error, scope["path"])(scope, receive, send)
        except Exception as error:
            # Its text may hold what somebody wrote.
            log.error("unexpected %s", describe(type(error), error.__traceback__))
            if started:
                raise RuntimeError("the answer broke off") from None
            fault = RequestError(
                "an internal error of the gateway; its log says where", status=500, type="internal"
            )
            await error_response(fault, scope["path"])(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> RequestError | TooLarge | None:
        path = scope["path"]
        host = _name(f"//{headers.get('host', '')}")
        # The address that was called may be used: a name that was made to point to it is not it.
        address, _ = scope["server"]
        if host not in {*self._hosts, address} and "*" not in self._hosts:
            return RequestError(
                "the gateway is not known under this host name or address; "
                "if it should be, add it to GATEWAY_ALLOWED_HOSTS",
                status=403,
                type="forbidden",
                code="host_not_allowed",
            )
        if not (self._same_site(host, headers) or self._followed(path, headers)):
            return RequestError(
                "a web page of another site called the gateway; "
                "if it may, add its origin to GATEWAY_CORS_ORIGINS",
                status=403,
                type="forbidden",
                code="origin_not_allowed",
            )
        if not self._has_key(path, headers):
            return RequestError(
                "the gateway's key is missing or wrong; "
                "send the value of its GATEWAY_KEY as the API key",
                status=401,
                type="authentication_error",
                code="invalid_api_key",
            )
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            return self._too_large()
        return None

    def _same_site(self, host: str, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is None:
            return headers.get("sec-fetch-site", "none") in ("none", "same-origin")
        # The port is part of an origin: another server of this machine is another site.
        own = origin.partition("://")[2] == headers.get("host")
        return origin in self._origins or (own and _name(origin) == host)

    def _followed(self, path: str, headers: Headers) -> bool:
        """Whether a person followed a link to the page; the site it was on sees nothing of it."""
        return path in self._open_paths and headers.get("sec-fetch-dest") == "document"

    def _has_key(self, path: str, headers: Headers) -> bool:
        if not self._key or path in self._open_paths or path.startswith(self._own_doors):
            return True
        given = bearer(headers) or headers.get("x-api-key", "")
        return hmac.compare_digest(given.encode(), self._key)

    def _bounded(self, receive: Receive) -> Receive:
        left = self._max_body_bytes

        async def bounded() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> TooLarge:
        return TooLarge(
            f"the body has more than {self._max_body_bytes} bytes; shorten it "
            "(GATEWAY_MAX_BODY_BYTES is the gateway's limit, and the platform carries 10 MB sealed)"
        )


def bearer(headers: Headers) -> str:
    """Return the token of an `Authorization: Bearer` header, empty without one."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _name(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def not_found(path: str) -> Response:
    """Return the answer for a path that is none of the gateway's."""
    return error_response(
        RequestError(
            "there is no such path, neither here nor at the worker; the OpenAI API is below /v1",
            status=404,
            type="NotFoundError",
            code="not_found",
        ),
        path,
    )
