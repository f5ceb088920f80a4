"""What the gateway knows of its endpoint: the models, the worker, and who is awake.

Owns when the platform and the workers are asked. Asking the platform costs nothing;
asking a worker is a job, so only one that is awake is asked, and rarely. A list of
models is worth keeping: most of the time nobody is awake to give it.
"""

import asyncio
import contextlib
import logging
import os
import time
from pathlib import Path
from typing import Any

import msgspec

from client import AsyncClient
from errors import AnswerError, SealedError

log = logging.getLogger("gateway")

HEALTH_TTL_S = 2.0
ASK_TIMEOUT_S = 30.0
PATIENCE_S = 5.0
"""How long a request for the models waits for a worker to tell them (Open WebUI waits 10 s)."""


class _Listed(msgspec.Struct):
    data: list[dict[str, Any]]


class Catalog:
    """The endpoint's state as last seen."""

    def __init__(
        self, client: AsyncClient, names: tuple[str, ...], ttl_s: float, memory: Path
    ) -> None:
        """`names` stand in until a worker was asked; the file `memory` outlives a restart."""
        self._client = client
        self._ttl_s = ttl_s
        self._memory = memory
        self._asked_s = float("-inf")
        self._asking: asyncio.Task[None] | None = None
        self._health: dict[str, Any] | SealedError | None = None
        self._health_s = float("-inf")
        self._health_lock = asyncio.Lock()
        created = int(time.time())
        self._models: list[dict[str, Any]] = [
            {"id": name, "object": "model", "created": created, "owned_by": "gateway"}
            for name in names
        ]
        self.fault: SealedError | None = None
        """Why the last worker that was asked told nothing."""
        self.worker: dict[str, Any] | None = None
        """What a worker said of itself (SPEC section 8.2), None before one was asked."""
        if not names:
            self._remember()

    async def health(self) -> dict[str, Any]:
        """Return the platform's counts, at most HEALTH_TTL_S old; JobError where it cannot."""
        async with self._health_lock:
            if time.monotonic() - self._health_s > HEALTH_TTL_S:
                try:
                    self._health = await self._client.health()
                except SealedError as error:
                    self._health = error
                self._health_s = time.monotonic()
        if isinstance(self._health, SealedError):
            raise self._health
        return self._health or {}

    async def awake(self) -> bool:
        """Return whether a worker could take a job at once, or nearly; JobError as `health`."""
        workers = (await self.health()).get("workers")
        counts = workers if isinstance(workers, dict) else {}
        return any(counts.get(state) for state in ("idle", "running", "ready"))

    @property
    def known(self) -> list[dict[str, Any]]:
        """The models in OpenAI's form, as last told."""
        return self._models

    async def models(self) -> list[dict[str, Any]]:
        """Return the models in OpenAI's form; the first time a worker is awake, it is asked.

        None are known while nobody is awake. SealedError where none are known for a reason that a
        person has to mend.
        """
        if self.worker is None and self._may_ask():
            try:
                if await self.awake():
                    self._start_asking()
            except SealedError:
                if not self._models:
                    raise
        if self._asking and not self._models:
            await asyncio.wait({self._asking}, timeout=PATIENCE_S)
        if self.fault and not self._models:
            raise self.fault
        return self._models

    def seen_awake(self) -> None:
        """A worker has just answered somebody: if what is known is old, ask it too.

        At no other time is what was once known asked again: a tool that polls the models
        would keep an idle worker from going to sleep.
        """
        if self._may_ask():
            self._start_asking()

    def _may_ask(self) -> bool:
        return time.monotonic() - self._asked_s > self._ttl_s

    def _start_asking(self) -> None:
        if self._asking is None:
            self._asking = asyncio.ensure_future(self._ask())

    async def settled(self) -> None:
        """Wait until nobody is being asked."""
        if self._asking:
            await asyncio.wait({self._asking})

    async def _ask(self) -> None:
        try:
            told, listed = await asyncio.gather(
                self._client.worker(timeout_s=ASK_TIMEOUT_S),
                self._listed(),
            )
            self.worker, self._models = told, listed
            self.fault = None
            self._asked_s = time.monotonic()
            self._keep()
        except SealedError as error:
            self.fault = error
            # As text, for it is the answer to a question of the gateway's own.
            log.warning("no worker told its models: %s", str(self.fault))
            # Not again with every request.
            self._asked_s = time.monotonic() - self._ttl_s + PATIENCE_S
        finally:
            self._asking = None

    def _remember(self) -> None:
        # What cannot be read is asked for again.
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            self._models = msgspec.json.decode(self._memory.read_bytes(), type=_Listed).data

    def _keep(self) -> None:
        try:
            self._memory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            written = self._memory.with_suffix(f".{os.getpid()}")
            written.touch(mode=0o600)
            written.write_bytes(msgspec.json.encode(_Listed(self._models)))
            written.replace(self._memory)
        except OSError as error:
            log.warning("the list of models cannot be kept: %s", error.strerror)

    async def _listed(self) -> list[dict[str, Any]]:
        response = await self._client.request(
            "/v1/models", method="GET", stream=False, timeout_s=ASK_TIMEOUT_S
        )
        try:
            return msgspec.convert(response.json(), _Listed).data
        except msgspec.ValidationError as error:
            raise AnswerError(f"the worker's list of models is not one: {error}") from None

    async def close(self) -> None:
        """Stop asking."""
        if self._asking:
            self._asking.cancel()
            await asyncio.wait({self._asking})
