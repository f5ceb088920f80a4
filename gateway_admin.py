"""The routes below /admin, for whoever runs the endpoint: its state, its queue, and a worker awake.

Owns their shapes and their token. Without a token they do not exist, for together
they can end everybody's jobs and start GPUs that cost money.
"""

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from client import AsyncClient
from errors import RequestError, SealedError
from gateway_body import parsed
from gateway_errors import error_response
from gateway_guard import bearer
from gateway_reply import stopped

WAIT_S = 60.0
"""How long /admin/warm waits unless asked otherwise."""

START_S = 1800
"""How long a worker may take to start, a first download of its model included."""

Endpoint = Callable[[Request], Awaitable[Any]]


class Wish(msgspec.Struct, forbid_unknown_fields=True):
    """The body of /admin/warm."""

    wait_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = WAIT_S


class Admin:
    """The administration of one endpoint; `about` tells what the gateway knows of it."""

    def __init__(
        self, client: AsyncClient, token: str, about: Callable[[], Awaitable[Mapping[str, Any]]]
    ) -> None:
        self._client = client
        self._token = token.encode()
        self._about = about
        self._waking: asyncio.Task[SealedError | None] | None = None

    def routes(self) -> list[BaseRoute]:
        """Return the routes; every other path below /admin is answered here too."""
        return [
            Route("/admin/status", self._guarded(self._status), methods=["GET"]),
            Route("/admin/purge-queue", self._guarded(self._purge), methods=["POST"]),
            Route("/admin/cancel/{job_id}", self._guarded(self._cancel), methods=["POST"]),
            Route("/admin/warm", self._guarded(self._warm), methods=["POST"]),
            Route("/admin/{path:path}", self._guarded(self._nothing), methods=["GET", "POST"]),
        ]

    async def close(self) -> None:
        """Give up waiting for a worker that was to be awake."""
        if self._waking:
            self._waking.cancel()
            await asyncio.wait({self._waking})

    def _guarded(self, answer: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                self._check(request)
                return JSONResponse(await answer(request))
            except SealedError as error:
                return error_response(error)

        return guarded

    def _check(self, request: Request) -> None:
        if not self._token:
            raise RequestError(
                "the admin routes are off; set GATEWAY_ADMIN_TOKEN",
                status=404,
                type="NotFoundError",
                code="not_found",
            )
        given = bearer(request.headers).encode("latin-1")
        if not hmac.compare_digest(given, self._token):
            raise RequestError(
                "the admin token is missing or wrong; "
                "send the value of GATEWAY_ADMIN_TOKEN as `Authorization: Bearer`",
                status=401,
                type="authentication_error",
                code="invalid_admin_token",
            )

    async def _status(self, _: Request) -> dict[str, Any]:
        return {**await self._about(), "platform": await self._client.health()}

    async def _purge(self, _: Request) -> dict[str, Any]:
        return await self._client.purge_queue()

    async def _cancel(self, request: Request) -> dict[str, Any]:
        return await self._client.cancel(request.path_params["job_id"])

    async def _warm(self, request: Request) -> dict[str, Any]:
        started_s = time.monotonic()
        wish = parsed(await request.body() or b"{}", Wish)
        if self._waking is None:
            self._waking = asyncio.ensure_future(self._wake())
        waking = self._waking
        # Whoever stops waiting leaves the job in the queue: it is what makes the worker start.
        await asyncio.wait({waking}, timeout=wish.wait_s)
        if waking.cancelled():
            raise stopped()
        if waking.done() and (error := waking.result()):
            raise error
        return {"awake": waking.done(), "took_s": round(time.monotonic() - started_s, 3)}

    async def _wake(self) -> SealedError | None:
        try:
            await self._client.worker(timeout_s=START_S, ttl_s=START_S)
        except SealedError as error:
            return error
        finally:
            self._waking = None
        return None

    async def _nothing(self, _: Request) -> None:
        raise RequestError(
            "there is no such admin route; there are GET /admin/status, POST /admin/purge-queue, "
            "POST /admin/cancel/{id} and POST /admin/warm",
            status=404,
            type="NotFoundError",
            code="not_found",
        )
