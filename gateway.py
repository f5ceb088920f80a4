"""The gateway: an OpenAI-compatible server on this machine; what leaves the machine is sealed.

    python gateway.py        (or: python client.py serve)

Owns the assembly of its parts, the routes that are not a worker's, and the program.
What is passed on is `gateway_relay`'s, who may come in `gateway_guard`'s.
"""

import argparse
import asyncio
import contextlib
import ipaddress
import signal
import socket
import sys
import time
from collections.abc import Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

import gateway_api
import gateway_config
import gateway_page
import gateway_vapi
import gateway_voice
import log_guard
import process_hygiene
from client import AsyncClient, versions
from errors import ConfigError, RequestError, SealedError
from gateway_admin import Admin
from gateway_config import GatewaySettings
from gateway_errors import error_response
from gateway_guard import Guard
from gateway_metrics import CONTENT_TYPE, Metrics
from gateway_models import Catalog
from gateway_relay import Relay
from gateway_reply import Serving
from keys import KeyRing

VERSION = "0.1.0"

GRACE_S = 5
"""How long answers may go on after the gateway was asked to end; their jobs are then cancelled."""

CUT_OFF_S = 7
"""How long that, and telling the clients, may take."""

OPEN_PATHS = frozenset({"/health", "/ready", *gateway_page.FILES})
EXPOSED_HEADERS = ("x-request-id", "x-job-id", "x-should-retry")


class Gateway:
    """One gateway for one endpoint; `url` is known once it listens."""

    def __init__(self, settings: GatewaySettings, client: AsyncClient) -> None:
        self.settings = settings
        self.client = client
        self.metrics = Metrics()
        self.key_id = KeyRing.parse(settings.client.encryption_key).current(time.time()).id
        # With another key it is another deployment, though the endpoint may be the same.
        name = f"models-{settings.client.endpoint_id}-{self.key_id}.json"
        memory = (settings.client.state_dir / name).expanduser()
        self.catalog = Catalog(client, settings.models, settings.models_ttl_s, memory)
        self.url = ""
        self._serving = Serving(
            self.metrics, keepalive_s=settings.keepalive_s, on_answer=self.catalog.seen_awake
        )
        self._admin = Admin(client, settings.admin_token, self.status)
        voice_file = settings.vapi.voice_file
        self._voice = gateway_voice.load(voice_file) if voice_file else None

    def application(self) -> ASGIApp:
        """Return the ASGI application."""
        routes: list[BaseRoute] = [
            *gateway_page.routes(),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics),
            Route("/api/status", self._status),
            *gateway_api.routes(self.client, self._serving),
            *gateway_vapi.routes(self.settings.vapi, self._voice),
            *self._admin.routes(),
        ]
        for prefix in ("", "/v1"):
            routes += [
                Route(f"{prefix}/models", self._models),
                Route(f"{prefix}/models/{{model:path}}", self._model),
            ]
        routes.append(Route("/{path:path}", Relay(self.client, self._serving)))
        settings = self.settings
        guard = Middleware(
            Guard,
            hosts={*settings.allowed_hosts, settings.host},
            origins=settings.cors_origins,
            key=settings.key,
            max_body_bytes=settings.max_body_bytes,
            open_paths=OPEN_PATHS,
            own_doors=("/admin/", "/vapi/"),
        )
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=EXPOSED_HEADERS,
        )
        # A page's preflight carries no key, so it is answered before the guard asks for one.
        return Starlette(routes=routes, middleware=[cors, guard])

    async def end(self, grace_s: float) -> None:
        """Let answers go on for a while, end what is left, and stop asking for itself."""
        await self._serving.end(grace_s)
        await self._admin.close()
        await self.catalog.close()

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "version": VERSION})

    async def _ready(self, _: Request) -> Response:
        try:
            awake = await self.catalog.awake()
            workers = (await self.catalog.health()).get("workers")
        except SealedError as error:
            return error_response(error)
        return JSONResponse({"ready": awake, "workers": workers}, 200 if awake else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(self.metrics.text(), headers={"content-type": CONTENT_TYPE})

    async def _models(self, _: Request) -> Response:
        try:
            return JSONResponse({"object": "list", "data": await self.catalog.models()})
        except SealedError as error:
            return error_response(error)

    async def _model(self, request: Request) -> Response:
        wanted = request.path_params["model"]
        try:
            models = await self.catalog.models()
        except SealedError as error:
            return error_response(error)
        for model in models:
            if model.get("id") == wanted:
                return JSONResponse(model)
        return error_response(
            RequestError("no such model; /v1/models lists them", status=404, type="NotFoundError")
        )

    async def _status(self, _: Request) -> Response:
        return JSONResponse(await self.status())

    async def status(self) -> dict[str, object]:
        """Return what the status page shows."""
        told: dict[str, object] = {
            "version": VERSION,
            "base_url": f"{self.url}/v1",
            "endpoint": self.settings.client.endpoint_id,
            "key_id": self.key_id,
            "transport": self.settings.client.transport,
            "needs_key": bool(self.settings.key),
        }
        try:
            health = await self.catalog.health()
            told |= {
                "awake": await self.catalog.awake(),
                "workers": health.get("workers"),
                "jobs": health.get("jobs"),
            }
        except SealedError as error:
            told |= {"awake": None, "error": str(error)}
        return told | {
            "models": [model.get("id") for model in self.catalog.known],
            "worker": self.catalog.worker,
            "fault": str(self.catalog.fault) if self.catalog.fault else None,
            "requests": self.metrics.recent(),
        }


def banner(status: dict[str, object]) -> str:
    """Return what a person needs to know when the gateway has started."""
    worker = status.get("worker")
    models = status["models"]
    unknown = "not known" if status["fault"] else "not known while no worker is awake"
    workers = status.get("workers")
    match status["awake"]:
        case True if status["fault"]:
            state = f"awake, but: {status['fault']}"
        case True:
            state = "awake"
        case False if isinstance(workers, dict) and workers.get("initializing"):
            state = "starting"
        case False:
            state = "asleep; the first request wakes one and waits for it"
        case _:
            state = f"unknown: {status['error']}"
    lines = {
        "base URL": status["base_url"],
        "API key": "the value of GATEWAY_KEY" if status["needs_key"] else "anything",
        "endpoint": status["endpoint"],
        "key id": status["key_id"],
        "worker": state,
        "version": versions(worker) if isinstance(worker, dict) else unknown,
        "models": ", ".join(map(str, models))
        if isinstance(models, list) and models
        else f"{unknown} (GATEWAY_MODELS can name them)",
    }
    return "\n".join(f"{name:<9} {value}" for name, value in lines.items())


def run(settings: GatewaySettings) -> int:
    """Serve until SIGINT or SIGTERM and return the exit code; ConfigError where it cannot."""
    process_hygiene.seal_off()
    log_guard.install()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(settings))
    return 0


class _Server(uvicorn.Server):
    def __init__(self, gateway: Gateway, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._gateway = gateway

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the answers that run, and no longer than for those."""
        ending = asyncio.ensure_future(self._gateway.end(GRACE_S))
        await super().shutdown(sockets)
        ending.cancel()  # where a second signal ended the wait


async def _serve(settings: GatewaySettings) -> None:
    listener = _listen(settings.host, settings.port)
    async with AsyncClient(settings.client) as client:
        gateway = Gateway(settings, client)
        host, port = listener.getsockname()[:2]
        gateway.url = f"http://{_address(host)}:{port}"
        server = _Server(
            gateway,
            uvicorn.Config(
                gateway.application(),
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                # For what `end` cannot reach, a request that never comes to its end, say.
                timeout_graceful_shutdown=GRACE_S + CUT_OFF_S,
            ),
        )
        greeting = asyncio.ensure_future(_greet(gateway))
        try:
            await server.serve([listener])
            # uvicorn raises the signal that ended it once more, which cancels this task; what
            # follows still has jobs to cancel.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        finally:
            greeting.cancel()
            await gateway.end(0)


async def _greet(gateway: Gateway) -> None:
    if text := warning(gateway.settings):
        print(f"WARNING: {text}", file=sys.stderr)
    with contextlib.suppress(SealedError):  # the banner tells it
        await gateway.catalog.models()
    await gateway.catalog.settled()
    print(banner(await gateway.status()), flush=True)


def warning(settings: GatewaySettings) -> str:
    """Return what is unsafe about where the gateway listens, empty if only this machine can."""
    if settings.is_loopback:
        return ""
    return (
        f"others than this machine can reach {settings.host}, by its address or under the names of "
        "GATEWAY_ALLOWED_HOSTS. On their way to the gateway prompts and answers travel in the clear"
        + ("" if settings.key else ", and without GATEWAY_KEY anybody may send some at your cost")
    )


def _address(host: str) -> str:
    """Return what stands in a URL for the address that is listened on."""
    address = ipaddress.ip_address(host)
    if address.is_unspecified:  # all addresses; this one is for this machine
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return f"[{host}]" if address.version == 6 else host


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            [f"GATEWAY_HOST, GATEWAY_PORT: cannot listen on {host}:{port}: {error.strerror}"]
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="gateway.py",
        description="Serve the OpenAI API on this machine; what leaves it is sealed.",
        epilog="Everything else is a variable, GATEWAY_KEY for example; README.md lists them. "
        "Keys are read from the environment or from files, never from arguments.",
    )
    parser.add_argument("--host", help="GATEWAY_HOST, the address to listen on")
    parser.add_argument("--port", help="GATEWAY_PORT, the port to listen on")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        return run(gateway_config.load({"GATEWAY_HOST": args.host, "GATEWAY_PORT": args.port}))
    except ConfigError as error:
        print(f"error: the settings cannot work\n{error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
