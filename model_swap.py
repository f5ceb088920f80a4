"""Which base model the engine holds, and whose turn it is.

Owns the engine of the process, which may be exchanged for one of another model, the calls that
wait for that, and their order. Knows nothing of jobs, of encryption or of vLLM.

The policy, with MODEL_SWAP:

1. A call for the loaded model goes straight to the engine while nobody waits for another one.
2. Once somebody does, the loaded model has the rest of its turn, which is as long as its loading
   took, so that a worker that is wanted for two models serves at least half of the time. A turn
   also ends when nothing was asked for LINGER_S: callers that ask again at once are kept together.
3. After its turn no call for it is admitted. Those that run finish; then the engine is exchanged
   for one with the model of the call that has waited longest.
4. A model that has been loaded gets every call that waits for it, in the order they came.

So no call is overtaken by more than one turn of each other model, whatever is asked meanwhile.
A model that cannot be loaded is not tried again: its calls are refused with the reason, and the
model before it comes back. If that fails too, this worker is dead.
"""

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from base_models import (
    LISTING,
    BaseModel,
    Engine,
    Listing,
    Run,
    listed,
    model_name,
    not_loaded,
    not_served,
)
from errors import ConfigError, EngineDead, RequestError, SealedError
from frames import AnswerEvent, Note
from protocol import Call
from readiness import Timed

log = logging.getLogger("worker.models")

LINGER_S = 1.0
"""How long a loaded model without calls is kept for the next one within its turn."""

HEALTH_INTERVAL_S = 0.25
"""How often an engine that starts is asked whether it lives."""

NOTE_EVERY_S = 10.0
"""How often somebody who waits is told so, besides when there is news."""


class Models:
    """The base models of this worker; the engine holds one of them, at first the first."""

    def __init__(
        self,
        models: Sequence[BaseModel],
        engine: Engine,
        *,
        may_swap: bool,
        linger_s: float = LINGER_S,
        note_every_s: float = NOTE_EVERY_S,
    ) -> None:
        """`engine` is what the first model's `build` has returned."""
        self._models = tuple(models)
        self._may_swap = may_swap and len(self._models) > 1
        self._engine: Engine | None = engine
        self._loaded: BaseModel | None = self._models[0]
        self._loading: BaseModel | None = None
        self._failed: dict[BaseModel, RequestError] = {}
        self._swap: asyncio.Task[None] | None = None
        self._lost = False
        self._queue: list[_Call] = []
        self._running: set[_Call] = set()
        self._turn_ends_s = float("-inf")
        self._idle_since_s = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        # One thread for good: the engine's processes end with the thread that has started them.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load-model")
        self._linger_s = linger_s
        self.note_every_s = note_every_s
        self.max_concurrency = engine.max_concurrency
        self.routes: tuple[str, ...] = ()
        self._about: dict[str, Any] = {}
        self._listed: list[dict[str, Any]] = []

    @property
    def dead(self) -> bool:
        """Whether nothing can be answered any more."""
        return self._lost or (self._engine is not None and self._engine.dead)

    async def start(self, timed: Timed = contextlib.nullcontext) -> None:
        """Start the first model's engine inside the running loop; `timed` as the engine has it."""
        if self._engine is not None:
            await self._start(self._engine, timed)

    async def stop(self) -> None:
        """End the engine; one that is just being loaded ends with this process."""
        if self._timer:
            self._timer.cancel()
        if self._swap:
            self._swap.cancel()
        elif self._engine is not None:
            await self._engine.stop()

    def about(self) -> dict[str, Any]:
        """Return what the `worker` route tells of the engine and the models (SPEC section 8.2)."""
        if not self._may_swap:
            return self._engine.about() if self._engine else self._about
        about = self._engine.about() if self._engine and not self._swap else self._about
        return {
            **about,
            "models": about["models"] if self._loaded else [],
            "swappable": [name for model in self._swappable() for name in model.names],
            "loading": self._loading.name if self._loading else None,
        }

    def run(self, call: Call, cache_salt: str, expires_at: float | None = None) -> Run:
        """Begin one call, which waits if it has to; `expires_at` (Unix time) ends the wait.

        RequestError for a model that is not to be had.
        """
        engine = self._engine
        if len(self._models) == 1 and engine is not None:
            return engine.run(call, cache_salt)
        model = self._wanted(call)
        if not self._may_swap:
            if engine is None:
                raise EngineDead
            if model and model is not self._loaded:
                raise not_loaded(model, self._models[0])
            return engine.run(call, cache_salt)
        if call.route == LISTING and call.method == "GET":
            loaded = self._loaded is not None
            return Listing(self._listed, loaded=loaded, others=self._swappable())
        return _Call(self, model, call, cache_salt, expires_at)

    # --- which model ---

    def _wanted(self, call: Call) -> BaseModel | None:
        """Return the model that a call is for, None where any will do."""
        name = model_name(call)
        if not name:
            return None if name is None else self._models[0]
        for model in self._models:
            if name in model.names:
                return model
        loaded = [self._loaded] if self._loaded else []
        raise not_served(name, loaded, self._swappable())

    def _swappable(self) -> list[BaseModel]:
        return [
            model
            for model in self._models
            if self._may_swap and model is not self._loaded and model not in self._failed
        ]

    # --- whose turn it is ---

    def enter(self, call: "_Call") -> None:
        """Take a call into the queue, which may admit it at once."""
        self._queue.append(call)
        self._step()

    def leave(self, call: "_Call") -> None:
        """Forget a call that is over, or that nobody waits for any more."""
        if call in self._queue:
            self._queue.remove(call)
        if call in self._running:
            self._running.remove(call)
            if not self._running:
                self._idle_since_s = time.monotonic()
        self._step()

    def _step(self) -> None:
        """Admit whom the policy admits, and begin a swap that is due."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self.dead:
            self._tell()
        if self.dead or self._swap:
            return
        here = {None, self._loaded, *self._failed}
        others = [call for call in self._queue if call.model not in here]
        now_s = time.monotonic()
        due_s = self._turn_ends_s if others else float("inf")
        if others and not self._running:
            due_s = min(due_s, self._idle_since_s + self._linger_s)
        if now_s < due_s:
            self._admit(None, self._loaded)
        if others and not self._running:
            if now_s < due_s:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(due_s - now_s, self._step)
            elif self._loaded and others[0].model:
                swap = self._exchange(self._loaded, others[0].model)
                self._swap = asyncio.create_task(swap)
        self._tell()

    def _admit(self, *models: BaseModel | None) -> None:
        """Let the calls for these models into the engine."""
        for call in [call for call in self._queue if call.model in models]:
            self._queue.remove(call)
            self._running.add(call)
            call.engine = self._engine

    def _tell(self) -> None:
        """Have every call that waits look at how things stand."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def news(self, timeout_s: float) -> None:
        """Wait until something has changed for those who wait, or until the timeout."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    def word(self, call: "_Call") -> str:
        """Return how things stand for a call that waits; an error where it waits in vain."""
        if self.dead:
            raise EngineDead
        if call.model in self._failed:
            raise self._failed[call.model]
        if self._loading:
            return f"loading model {self._loading.name}"
        name = call.model.name if call.model else ""
        return f"waiting for model {name} while the worker finishes with another one"

    # --- the swap ---

    async def _exchange(self, old: BaseModel, new: BaseModel) -> None:
        began_s = time.monotonic()
        log.info("%s goes, %s is loaded", old.name, new.name)
        self._loaded, self._loading = None, new
        engine, self._engine = self._engine, None
        self._tell()
        try:
            if engine is not None:
                await engine.stop()
                del engine
                # What `Engine.start` has frozen is garbage now.
                gc.unfreeze()
                gc.collect()
            for model in (new, old):
                self._loading = model
                self._tell()
                loaded_s = time.monotonic()
                if await self._load(model):
                    now_s = time.monotonic()
                    log.info("%s is loaded, after %.1f s", model.name, now_s - began_s)
                    self._loaded = model
                    self._turn_ends_s = now_s + now_s - loaded_s
                    break
        except Exception as error:
            log.error("the engine could not be exchanged: %s", type(error).__name__)
        finally:
            self._lost = self._loaded is None
            self._loading = self._swap = None
        self._idle_since_s = float("-inf")
        self._admit(self._loaded)
        self._step()

    async def _load(self, model: BaseModel) -> bool:
        """Have the engine hold a model; or say why it cannot and return False."""
        engine: Engine | None = None
        try:
            loop = asyncio.get_running_loop()
            engine = await loop.run_in_executor(self._loader, model.build)
            await _unless_dead(engine, self._start(engine))
        except Exception as error:
            reason = str(error) if isinstance(error, SealedError) else type(error).__name__
            if isinstance(error, ConfigError):
                reason = "; ".join(error.faults)
            log.error("%s cannot be loaded: %s", model.name, reason)
            self._failed[model] = RequestError(
                f"{model.name} cannot be loaded on this worker: {reason}",
                status=503,
                type="ServiceUnavailableError",
                param="model",
                code="model_not_loadable",
            )
            if engine is not None:
                await engine.stop()
            return False
        self._engine = engine
        return True

    async def _start(self, engine: Engine, timed: Timed = contextlib.nullcontext) -> None:
        await engine.start(timed)
        self.routes, self._about = engine.routes, engine.about()
        if self._may_swap:
            self._listed = await listed(engine)


class _Call:
    """A call that waits for its turn, and then is a run of the engine."""

    def __init__(
        self,
        models: Models,
        model: BaseModel | None,
        call: Call,
        cache_salt: str,
        expires_at: float | None,
    ) -> None:
        self.model = model
        self.engine: Engine | None = None
        """Set when it is admitted."""
        self._models = models
        self._asked = call
        self._cache_salt = cache_salt
        self._expires_at = float("inf") if expires_at is None else expires_at
        self._started = time.perf_counter()
        self._run: Run | None = None
        self._closed = False

    @property
    def usage(self) -> Any:
        """The run's usage, None before there is a run."""
        return self._run.usage if self._run else None

    async def batches(self) -> AsyncIterator[list[AnswerEvent]]:
        """Yield a note on every change while it waits, then what the engine produces."""
        self._models.enter(self)
        async for note in self._wait():
            yield [note]
        if self._closed or self.engine is None:
            raise RequestError("the request was cancelled", status=499, type="Cancelled")
        self._run = self.engine.run(self._asked, self._cache_salt)
        self._run.usage.started = self._started
        async for batch in self._run.batches():
            yield batch

    async def _wait(self) -> AsyncIterator[Note]:
        said, said_s = "", 0.0
        while self.engine is None and not self._closed:
            left_s = self._expires_at - time.time()
            if left_s < 0:
                raise RequestError(
                    "the request expired while it waited for its model; send a new one, valid "
                    "for longer",
                    status=408,
                    code="expired",
                )
            word, now_s = self._models.word(self), time.monotonic()
            again_s = said_s + self._models.note_every_s - now_s
            if word != said or again_s <= 0:
                said, said_s = word, now_s
                yield Note(word)
            else:
                await self._models.news(min(again_s, left_s))

    async def aclose(self) -> None:
        """Stop what still runs of it and make room; it no longer waits."""
        self._closed = True
        try:
            if self._run is not None:
                await self._run.aclose()
        finally:
            self.engine = None
            self._models.leave(self)


async def _unless_dead(engine: Engine, start: Coroutine[Any, Any, None]) -> None:
    """Wait for an engine's start; ConfigError if it dies meanwhile, which may end no wait."""
    starting = asyncio.create_task(start)
    try:
        while not (await asyncio.wait({starting}, timeout=HEALTH_INTERVAL_S))[0]:
            if engine.dead:
                raise ConfigError(["its engine died while it started"])
        starting.result()
    finally:
        starting.cancel()
