"""The worker: its life (boot, job loop, end) and the handler.

    job → its input's form → opened → engine → events → sealed → yielded

Owns that order, the one place where errors become chunks, and the log line of
each job; how an engine comes to be is boot.py's. What runs in vLLM's child
processes imports this file too, so vllm, torch and runpod are imported in
functions only.
"""

import asyncio
import contextlib
import contextvars
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import psutil

import config
import engine_tasks
import fitness
import log_guard
import process_hygiene
import worker_environment
from base_models import Run
from boot import Booted, boot
from client_limits import ClientLimits, Place
from config import Settings
from crypto import CELL_PAYLOAD_BYTES, RequestOpener
from errors import ConfigError, EngineDead, ModelError, Rejected, RequestError
from failed_starts import FailedStarts
from frames import AnswerEvent, Body, End, Head
from hpke import HpkeKeyRing
from keys import Key, KeyRing
from model_swap import Models
from pacing import paced, with_signs
from protocol import (
    GENERATE,
    WORKER,
    Call,
    PlaintextInput,
    SealedInput,
    SimpleInput,
    parse_job_input,
)
from replay_guard import ReplayGuard
from replies import PlaintextReply, Reply, SealedReply, SimpleReply, rejection
from request_attempt import RequestAttempt, Store
from request_bounds import Bounds, default_max_choices
from simple_form import open_simple

VERSION = "0.1.0"

log = logging.getLogger("worker")


@dataclass
class _Job:
    """One job's state, from being taken to its log line."""

    id: str
    key: str = "-"
    client: str = "-"
    route: str = "-"
    outcome: str = "cancelled"
    started: float = field(default_factory=time.perf_counter)
    run: Run | None = None
    as_events: bool = False
    """Whether it is answered in server-sent events (SPEC section 1.2)."""
    attempt: RequestAttempt | None = None
    """What remembers the request; None for one that is not to be remembered."""
    place: Place | None = None
    """What it takes of its client's limits."""

    def tokens(self) -> dict[str, Any]:
        """Return OpenAI's `usage` as far as it has come, empty where the engine was not asked."""
        usage = self.run.usage if self.run else None
        return (usage.tokens() if usage else None) or {}


@dataclass(frozen=True)
class _Asked:
    """An opened request; `error` is what it is answered with if the engine is not to see it."""

    call: Call
    reply: Reply
    key: Key | None
    """None for plaintext."""
    replay_id: str | None = None
    expires_at: int = 0
    error: RequestError | None = None


class Handler:
    """Answers jobs; `handle` is what the SDK calls for each."""

    def __init__(
        self,
        settings: Settings,
        keys: KeyRing,
        models: Models,
        hpke_keys: HpkeKeyRing | None = None,
        store: Store | None = None,
    ) -> None:
        """`store` is what the workers of the endpoint remember together, if they do."""
        self._settings = settings
        self._keys = keys
        self._models = models
        self._opener = RequestOpener(
            keys,
            settings.endpoint_id,
            max_ttl_s=settings.max_ttl_s,
            clock_skew_s=settings.clock_skew_s,
            hpke_keys=hpke_keys,
            allow_without_hpke=settings.allow_without_hpke,
        )
        self._guard = ReplayGuard(clock_skew_s=settings.clock_skew_s)
        self._store = store
        self._limits = ClientLimits()
        self._bounds = Bounds(
            settings.max_request_bytes,
            settings.max_choices or default_max_choices(models.max_concurrency),
            settings.max_inputs,
        )
        # Clients must not be able to guess another one's salt.
        self._salt = os.urandom(16).hex()
        self._closing: set[asyncio.Task[None]] = set()
        self.max_concurrency = settings.max_concurrency or models.max_concurrency

    async def handle(self, job: Mapping[str, Any]) -> AsyncIterator[Any]:
        """Yield the chunks of the answer to `job`; no exception and no plaintext leaves here."""
        state = _Job(str(job.get("id", "-")))
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a job is answered by a task of its own")
        # A stop during a POST leaves this generator suspended; the task's end does not wait for it.
        # Its line tells the job by itself, so it has no need of the mark that other lines get.
        task.add_done_callback(lambda _: self._end(state), context=contextvars.Context())
        log_guard.current_job.set(f"job={state.id}")
        try:
            asked = self._open(job.get("input"), state)
        except Exception as error:
            state.outcome = "rejected"
            if not isinstance(error, Rejected):
                self._internal(state, error)
            for item in rejection(state.as_events):
                yield item
            return
        try:
            async for chunk in self._answer(asked, state):
                yield chunk
        except Exception as error:
            for chunk in asked.reply.render([self._failure(error, state)]):
                yield chunk
        if state.attempt:
            state.attempt.finish()

    # --- opening ---

    def _open(self, job_input: Any, state: _Job) -> _Asked:
        """Return what is asked, with its error if it is to be refused; or raise Rejected."""
        try:
            parsed = parse_job_input(job_input)
        except RequestError as error:
            if not self._settings.allow_plaintext:
                raise Rejected from None
            return _Asked(Call("", "POST", b""), _PlainError(), None, error=error)
        match parsed:
            case SealedInput(sealed, as_events):
                state.as_events = as_events
                opened = self._opener.open(sealed)
                asked = _Asked(
                    opened.request.call,
                    SealedReply(opened.request, opened.key, as_events=as_events),
                    opened.key,
                    opened.replay_id,
                    opened.request.expires_at,
                )
            case SimpleInput(encrypted_input):
                if self._opener.needs_hpke:
                    self._opener.open(encrypted_input)  # for its work: a rejection costs the same
                    raise Rejected
                simple = open_simple(
                    self._keys,
                    encrypted_input,
                    max_ttl_s=self._settings.max_ttl_s,
                    clock_skew_s=self._settings.clock_skew_s,
                )
                asked = _Asked(
                    Call(GENERATE, "POST", simple.body),
                    SimpleReply(simple.key),
                    simple.key,
                    simple.replay_id,
                    simple.expires_at,
                )
            case PlaintextInput(call):
                if not self._settings.allow_plaintext:
                    raise Rejected
                asked = _Asked(call, PlaintextReply(parsed), None)
        state.key = asked.key.id if asked.key else "plaintext"
        state.client = (asked.key.name if asked.key else None) or "-"
        log_guard.current_job.set(f"job={state.id} key={state.key} client={state.client}")
        state.route = asked.call.route if self._known(asked.call.route) else "unknown"
        try:
            if isinstance(parsed, SealedInput):
                self._opener.check(opened.request)
            if asked.key and asked.replay_id is not None:
                state.attempt = RequestAttempt(
                    self._guard, self._store, asked.key, asked.replay_id, asked.expires_at
                )
        except RequestError as error:
            return replace(asked, error=error)
        return asked

    def _known(self, route: str) -> bool:
        return route in (GENERATE, WORKER) or route in self._models.routes

    # --- answering ---

    async def _answer(self, asked: _Asked, state: _Job) -> AsyncIterator[Any]:
        reply = asked.reply
        batches = self._events(asked, state)
        if self._settings.stream_interval_ms and isinstance(reply, SealedReply):
            chunks: AsyncIterator[Any] = paced(
                (reply.payload(batch) async for batch in batches),
                reply.seal,
                self._settings.stream_interval_ms / 1000,
                CELL_PAYLOAD_BYTES,
            )
        else:
            chunks = (chunk async for batch in batches for chunk in reply.render(batch))
            if isinstance(reply, SealedReply) and reply.as_events:
                chunks = with_signs(chunks, reply.padding)
        async for chunk in chunks:
            yield chunk

    async def _events(self, asked: _Asked, state: _Job) -> AsyncIterator[list[AnswerEvent]]:
        """Yield the events of the answer; whatever goes wrong becomes its End."""
        refused = 0
        try:
            if asked.error is not None:
                raise asked.error
            if state.attempt:
                await state.attempt.begin_everywhere()
            if asked.key and asked.call.method == "POST":
                state.place = self._limits.enter(asked.key.client, asked.key.terms)
                state.place.cost = lambda: state.tokens().get("total_tokens", 0)
            if asked.call.route == WORKER:
                yield self._worker(asked.call)
            elif refusal := self._refused(asked.call):
                refused = _refusal(refusal)
                yield refusal
            else:
                until = asked.expires_at + self._settings.clock_skew_s
                state.run = self._models.run(
                    asked.call,
                    f"{self._salt}:{state.key}",
                    until if asked.expires_at else None,
                )
                async for batch in state.run.batches():
                    refused |= _refusal(batch)
                    if state.place:
                        state.place.count()
                    yield batch
            state.outcome = f"error:{refused}" if refused else "done"
        except Exception as error:
            yield [self._failure(error, state)]

    def _refused(self, call: Call) -> list[AnswerEvent]:
        """Return the answer to a call that asks for too much, nothing for any other."""
        try:
            self._bounds.check(call)
        except RequestError as error:
            if call.route == GENERATE:
                raise
            body = json.dumps(engine_tasks.refusal(error, call.route)).encode()
            return [Head(error.status, "body", "application/json"), Body(body), End(None, {})]
        return []

    def _failure(self, error: Exception, state: _Job) -> End:
        """Return the end of an answer that went wrong, and note its outcome."""
        if not isinstance(error, RequestError):
            self._internal(state, error)
            error = RequestError("the worker failed", status=500, type="InternalServerError")
        else:
            state.outcome = f"error:{error.code}"
        usage = state.run.usage if state.run else None
        return End(
            usage.tokens() if usage else None,
            dict(usage.timings()) if usage else {},
            {**error.body()["error"], "status": error.status},
        )

    def _internal(self, state: _Job, error: Exception) -> None:
        # Its message may quote the request: only its type and place are told.
        log.error("a job failed: %s", log_guard.describe(type(error), error.__traceback__))
        state.outcome = "error:internal"

    def _worker(self, call: Call) -> list[AnswerEvent]:
        """Answer the `worker` route (SPEC section 8.2)."""
        if call.method != "GET":
            raise RequestError("worker takes GET", status=405)
        about = {"worker": VERSION, "protocol": 1, "time": time.time(), **self._models.about()}
        body = json.dumps(about).encode()
        return [Head(200, "body", "application/json"), Body(body), End(None, {})]

    # --- ending ---

    def _end(self, state: _Job) -> None:
        """Log the job, and stop what of it still runs in the engine."""
        if state.attempt:
            state.attempt.abandon()
        if state.place:
            state.place.leave()
        run = state.run
        usage = run.usage if run else None
        tokens = state.tokens()
        times = usage.timings() if usage else {}
        log.info(
            "job=%s key=%s client=%s route=%s prompt_tokens=%s completion_tokens=%s queue_ms=%s "
            "first_token_ms=%s total_ms=%.1f outcome=%s",
            state.id,
            state.key,
            state.client,
            state.route,
            tokens.get("prompt_tokens", 0),
            tokens.get("completion_tokens", 0),
            times.get("queue_ms"),
            times.get("first_token_ms"),
            1000 * (time.perf_counter() - state.started),
            state.outcome,
        )
        if run is not None:
            closing = asyncio.ensure_future(run.aclose())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def drain(self) -> None:
        """Wait until every ended job has left the engine."""
        while self._closing:
            await asyncio.wait(self._closing)


class _PlainError:
    """The reply to plaintext that has no known form."""

    def render(self, events: Iterable[AnswerEvent]) -> list[Any]:
        return [
            {"error": json.dumps({"error": event.error})}
            for event in events
            if isinstance(event, End)
        ]


def _refusal(batch: list[AnswerEvent]) -> int:
    """Return the HTTP status with which one of vLLM's routes refuses, else 0."""
    head = batch[0] if batch else None
    return head.status if isinstance(head, Head) and head.status >= 400 else 0


# --- life -----------------------------------------------------------------------------------


def main() -> int:
    """Run the worker until it is told to stop; return its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    process_hygiene.seal_off()
    environ = worker_environment.environment()
    worker_environment.prepare_libraries(environ)
    log_guard.install()
    taken = worker_environment.take_secrets(environ)
    own, _ = config.read_for_models(taken)
    failed_starts = FailedStarts(own.failed_starts, own.endpoint_id, own.worker_id)
    temporary = process_hygiene.TemporaryFolder(environ.get("TMPDIR"))
    try:
        worker_environment.prepare_temporary(environ, temporary.path)
        failed_starts.begin(log)
        booted = boot(taken, failed_starts)
        worker_environment.lend_api_key(environ, taken)
        return serve(booted)
    except SystemExit:  # SIGTERM before there was a loop to tell
        failed_starts.withdraw()
        raise
    except (ConfigError, ModelError) as error:
        log.error("the worker cannot start:\n%s", str(error))
        failed_starts.keep_reason(f"{type(error).__name__}: {error}", log)
        return 1
    except Exception as error:
        failed_starts.keep_reason(type(error).__name__, log)
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_children()
        temporary.remove()


def serve(booted: Booted) -> int:
    """Take jobs by the SDK until SIGTERM (0) or until the engine has died (1)."""
    models, readiness = booted.models, booted.readiness
    handler = Handler(booted.settings, booted.keys, models, booted.hpke_keys, booted.store)
    began_at = time.time()
    import job_loop

    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        log_guard.guard_exceptions()  # the SDK has put its own hook in place by now
        readiness.add("taking jobs", began_at, time.time())
        await models.start(readiness.phase)
        if booted.store:
            await booted.store.start()
        booted.ready()
        about = models.about()
        log.info("ready: %s, %s", ", ".join(about["models"]), ", ".join(about["tasks"]))
        yield
        await handler.drain()
        if booted.store:
            await booted.store.close()
        if models.dead:
            log.error("%s; this worker ends so that the platform replaces it", EngineDead().message)
        else:
            await models.stop()

    failed = job_loop.run(
        job_loop.Worker(
            handler=handler.handle,
            lifespan=lifespan,
            failed=lambda: models.dead,
            max_concurrency=handler.max_concurrency,
            fitness=fitness.checks(
                booted.keys,
                booted.settings.endpoint_id,
                booted.model_files,
                lambda: models.dead,
            ),
            connected=lambda: worker_environment.withdraw_api_key(worker_environment.environment()),
        )
    )
    return 1 if failed else 0


def end_children() -> None:
    """Kill every process this one started and that is still there.

    But the one that removes the engine's shared memory: it does so, and ends, when the
    others are gone.
    """
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "multiprocessing.resource_tracker" not in " ".join(child.cmdline()):
                child.kill()


def _run() -> int:
    try:
        return main()
    except SystemExit as stop:  # SIGTERM before there was a loop to tell
        return int(stop.code or 0)
    except BaseException as error:
        log.error("the worker ends: %s", log_guard.describe(type(error), error.__traceback__))
        return 1


if __name__ == "__main__":
    code = _run()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of the engine and the SDK must not be able to hold a worker that has ended.
    os._exit(code)
elif __name__ == "__mp_main__":  # a process of vLLM's, started anew with this file
    process_hygiene.seal_off()
    log_guard.install_in_child()
