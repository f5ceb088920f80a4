"""The local platform's HTTP: what the `runpod` SDK speaks and what the REST API documents.

Owns routes, keys, limits, held polls and the carrying out of faults. The worker's
side is that of the SDK 1.12.0 (`rp_job.py`, `rp_http.py`, `rp_ping.py`), the client's
side RunPod's documented REST API. What is undocumented there is settled here: chunks
of a lost attempt stay readable, results of a job that is over are answered 200 and
dropped, `/stream` is held. Refuses to know what jobs say: bodies pass as they came,
and only `Record`, when asked for, remembers them.
"""

import asyncio
import json
import logging
import secrets
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from aiohttp import web

from local_runpod_faults import WORKER_OPERATIONS, Fault, Faults
from local_runpod_queue import Job, Queue, Status, Worker

log = logging.getLogger("local_runpod")
_T = TypeVar("_T")

MAX_RUN_BYTES = 10_000_000
MAX_RUNSYNC_BYTES = 20_000_000
MAX_CHUNK_BYTES = 1_000_000
MAX_OUTPUT_BYTES = 20_000_000
_MAX_READ_BYTES = 64_000_000


@dataclass(kw_only=True)
class Options:
    """What a platform can be told.

    - `api_key`: what clients send as a bearer token; `worker_key`: what workers send. Made up
      unless given;
    - `hold_s`: how long a worker's poll is held; `stream_hold_s`: how long a client's `/stream`
      is held while nothing arrives, 0 to answer at once;
    - `gone_after_s`: a worker that dropped a held poll and sent nothing but pings since is gone;
      `silent_after_s`: so is one that sent nothing at all;
    - `retries`: how often a job outlives its worker; `kept_s`, `kept_sync_s`: how long the result
      of `/run` and of `/runsync` is kept;
    - `record_bytes`: how many bytes of bodies `exchanged` remembers, the newest; 0 is none;
    - `allow_faults`: serve `/control/faults`.
    """

    endpoint_id: str = "local"
    api_key: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    worker_key: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    host: str = "127.0.0.1"
    port: int = 0
    hold_s: float = 20.0
    stream_hold_s: float = 10.0
    ping_interval_ms: int = 10_000
    gone_after_s: float = 10.0
    silent_after_s: float = 60.0
    retries: int = 3
    kept_s: float = 1800.0
    kept_sync_s: float = 60.0
    record_bytes: int = 0
    allow_faults: bool = False


class Exchange(NamedTuple):
    """One body that crossed the platform, and when by the monotonic clock.

    `direction` is `client → platform` or another such.
    """

    direction: str
    method: str
    path: str
    body: bytes
    at_s: float


class Record:
    """The newest bodies that crossed the platform, up to `max_bytes` in all."""

    def __init__(self, max_bytes: int) -> None:
        self.entries: deque[Exchange] = deque()
        self.lost = 0
        self._max_bytes = max_bytes
        self._bytes = 0

    def add(self, party: str, sent: bool, request: web.Request, body: bytes) -> None:
        """Remember a body that came from a worker or a client, or was sent to it."""
        if not self._max_bytes:
            return
        path = request.path
        if query := "&".join(f"{k}={v}" for k, v in request.query.items() if k != "key"):
            path += f"?{query}"
        direction = f"platform → {party}" if sent else f"{party} → platform"
        self.entries.append(Exchange(direction, request.method, path, body, time.monotonic()))
        self._bytes += len(path) + len(body)
        while self._bytes > self._max_bytes:
            oldest = self.entries.popleft()
            self._bytes -= len(oldest.path) + len(oldest.body)
            self.lost += 1


@dataclass
class Call:
    """A request as the operations see it."""

    request: web.Request
    body: bytes
    job_id: str | None
    worker_id: str | None
    faults: list[Fault]

    def tampered(self, body: bytes) -> bytes:
        """Return what the faults make of a body."""
        for fault in self.faults:
            if fault.tamper and body:
                body = fault.tamper(body)
        return body

    def query_number(self, name: str, default: int, low: int, high: int) -> int:
        """Return a whole number of the query, held within its limits."""
        text = self.request.query.get(name, "")
        if not text:
            return default
        try:
            return min(max(int(text), low), high)
        except ValueError:
            raise Refused(400, f"{name} must be a whole number") from None


@dataclass
class Reply:
    """What an operation answers; `undo` runs when the answer could not be written."""

    body: bytes = b""
    status: int = 200
    undo: Callable[[], None] | None = None


class Refused(Exception):
    """A request that gets an error status and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


Operation = Callable[[Call], Awaitable["Reply | web.StreamResponse"]]


class Http:
    """The operations of the platform over one queue."""

    def __init__(self, options: Options, queue: Queue, faults: Faults, record: Record) -> None:
        self._options = options
        self._queue = queue
        self._faults = faults
        self._record = record

    def application(self) -> web.Application:
        """Return the aiohttp application that serves both sides."""
        app = web.Application(client_max_size=_MAX_READ_BYTES)

        def add(method: str, path: str, operation: str, serve: Operation) -> None:
            async def handle(request: web.Request) -> web.StreamResponse:
                return await self._serve(request, operation, serve)

            app.router.add_route(method, path, handle)

        at = "/v2/{endpoint}"
        # The router tries them in this order, and nearly all requests are of these two.
        add("POST", at + "/job-stream/{worker}/{job}", "job-stream", self._job_stream)
        add("GET", at + "/stream/{job}", "stream", self._stream)
        add("GET", at + "/job-take/{worker}", "job-take", self._job_take)
        add("GET", at + "/job-take-batch/{worker}", "job-take", self._job_take)
        add("GET", at + "/job-stop/{worker}", "job-stop", self._job_stop)
        add("POST", at + "/job-done/{worker}/{job}", "job-done", self._job_done)
        add("GET", at + "/ping/{worker}", "ping", self._ping)
        add("POST", at + "/run", "run", self._run)
        add("POST", at + "/runsync", "runsync", self._runsync)
        add("GET", at + "/status/{job}", "status", self._status)
        add("POST", at + "/cancel/{job}", "cancel", self._cancel)
        add("POST", at + "/retry/{job}", "retry", self._retry)
        add("POST", at + "/purge-queue", "purge-queue", self._purge_queue)
        add("GET", at + "/health", "health", self._health)
        add("*", at + "/openai/{route:.+}", "openai", self._openai)
        if self._options.allow_faults:
            add("*", "/control/faults", "control", self._control_faults)
        add("*", "/{path:.*}", "unknown", self._unknown)
        return app

    async def _serve(
        self, request: web.Request, operation: str, serve: Operation
    ) -> web.StreamResponse:
        party = "worker" if operation in WORKER_OPERATIONS else "client"
        ids = request.match_info
        call = Call(request, b"", ids.get("job"), ids.get("worker"), [])
        reply: Reply | web.StreamResponse | None = None
        try:
            try:
                call.body = await request.read()
                self._record.add(party, False, request, call.body)
                self._authorize(request, party)
                call.faults = self._faults.strike(operation, call.job_id, call.worker_id)
                if early := await self._fail(call, "before"):
                    return early
                call.body = call.tampered(call.body) if call.body else b""
                reply = await serve(call)
            except Refused as refused:
                reply = _json({"error": str(refused)}, refused.status)
            except web.HTTPRequestEntityTooLarge:
                reply = _json({"error": f"the body exceeds {_MAX_READ_BYTES} bytes"}, 413)
            if late := await self._fail(call, "after"):
                return late
            if isinstance(reply, web.StreamResponse):
                return reply
            body = reply.body if call.body else call.tampered(reply.body)
            content_type = "application/json" if body else "text/plain"
            response = web.Response(body=body, status=reply.status, content_type=content_type)
            await response.prepare(request)
            await response.write_eof()
        except (ConnectionError, asyncio.CancelledError):
            if isinstance(reply, Reply) and reply.undo:
                reply.undo()
            raise
        self._record.add(party, True, request, body)
        return response

    def _authorize(self, request: web.Request, party: str) -> None:
        if party == "worker":
            given, wanted = request.query.get("key", ""), self._options.worker_key
        else:
            header = request.headers.get("Authorization", "")
            given, wanted = header.removeprefix("Bearer ").strip(), self._options.api_key
        if not secrets.compare_digest(given.encode(), wanted.encode()):
            raise Refused(401, "unauthorized: send the API key as Authorization: Bearer KEY")
        served = self._options.endpoint_id
        if request.match_info.get("endpoint", served) != served:
            raise Refused(404, f"no such endpoint; this platform serves {served}")

    async def _fail(self, call: Call, when: str) -> web.Response | None:
        for fault in call.faults:
            if fault.when != when:
                continue
            await asyncio.sleep(fault.delay_s)
            if fault.reset:
                _reset(call.request)
                return web.Response(status=500)
            if fault.status is not None:
                return web.json_response({"error": "injected fault"}, status=fault.status)
        return None

    # -- the worker's side ---------------------------------------------------------------------

    def _worker(self, call: Call) -> Worker:
        worker = self._queue.worker(call.worker_id or "")
        worker.seen_s = time.monotonic()
        worker.dropped_s = None
        worker.gone = False
        return worker

    async def _job_take(self, call: Call) -> Reply:
        worker = self._worker(call)
        if not worker.ready:
            worker.ready = True
            log.info("worker %s is ready", worker.id)
        if worker.draining:
            # The SDK polls again at once until SIGTERM reaches it.
            await asyncio.sleep(min(self._options.hold_s, 0.3))
        count = call.query_number("batch_size", 1, 1, 1000)
        until_s = time.monotonic() + self._options.hold_s
        jobs = await self._poll(
            worker, self._queue.take(worker, count, until_s, lambda: _present(call.request))
        )
        if not jobs:
            return Reply(status=204)
        for job in jobs:
            for _ in range(sum(fault.duplicate for fault in call.faults)):
                self._queue.deliver_again(job)
        sent: list[dict[str, Any]] = [{"id": job.id, "input": job.input} for job in jobs]
        batch = "job-take-batch" in call.request.path
        reply = _json(sent if batch else sent[0])

        def undo() -> None:
            self._queue.put_back(worker, jobs)
            self._dropped(worker)

        reply.undo = undo
        return reply

    async def _job_stop(self, call: Call) -> Reply:
        worker = self._worker(call)
        until_s = time.monotonic() + self._options.hold_s
        ids = await self._poll(worker, self._queue.stops(worker, until_s))
        if not ids:
            return Reply(status=204)
        reply = _json({"jobsToStop": ids})
        reply.undo = lambda: worker.to_stop.extend(ids)
        return reply

    async def _poll(self, worker: Worker, wait: Awaitable[_T]) -> _T:
        worker.polls += 1
        try:
            return await wait
        except asyncio.CancelledError:
            self._dropped(worker)
            raise
        finally:
            worker.polls -= 1
            worker.seen_s = time.monotonic()

    def _dropped(self, worker: Worker) -> None:
        if self._queue.closing:
            return
        worker.dropped_s = dropped_s = time.monotonic()

        def check() -> None:
            if worker.dropped_s == dropped_s and not worker.polls:
                self._queue.lose(worker, "dropped its connection")

        asyncio.get_running_loop().call_later(self._options.gone_after_s, check)

    async def watch_workers(self) -> None:
        """Take silent workers as gone, for as long as this runs."""
        while True:
            await asyncio.sleep(self._options.silent_after_s / 4)
            oldest_s = time.monotonic() - self._options.silent_after_s
            for worker in self._queue.workers.values():
                silent = max(worker.seen_s, worker.pinged_s) < oldest_s
                if silent and worker.ready and not worker.polls:
                    self._queue.lose(worker, "silent")

    async def _job_stream(self, call: Call) -> Reply:
        worker = self._worker(call)
        job = self._job(call)
        if len(call.body) > MAX_CHUNK_BYTES:
            raise Refused(413, f"a stream chunk holds at most {MAX_CHUNK_BYTES} bytes")
        chunk = _parse(call.body)
        if not isinstance(chunk, dict) or "output" not in chunk:
            raise Refused(400, "a stream chunk is a JSON object with an output")
        if not any(fault.drop for fault in call.faults):
            self._queue.add_chunk(
                job,
                worker,
                call.body,
                copies=1 + sum(fault.duplicate for fault in call.faults),
                hold_back=any(fault.reorder for fault in call.faults),
            )
        return Reply()

    async def _job_done(self, call: Call) -> Reply:
        self._worker(call)
        job = self._job(call)
        if any(fault.drop for fault in call.faults):
            return Reply()
        if len(call.body) > MAX_OUTPUT_BYTES:
            self._queue.finish(job, error=f"the output exceeds {MAX_OUTPUT_BYTES} bytes")
            raise Refused(413, f"an output holds at most {MAX_OUTPUT_BYTES} bytes")
        result = _parse(call.body)
        if not isinstance(result, dict):
            raise Refused(400, "a result is a JSON object")
        error = result.get("error")
        self._queue.finish(
            job,
            output=result.get("output"),
            error=error if error is None or isinstance(error, str) else json.dumps(error),
        )
        return Reply()

    async def _ping(self, call: Call) -> Reply:
        # A ping proves nothing about the worker itself: the SDK's ping process outlives it.
        if worker := self._queue.workers.get(call.worker_id or ""):
            worker.pinged_s = time.monotonic()
            worker.pings += 1
        return _json({})

    # -- the client's side ---------------------------------------------------------------------

    def _job(self, call: Call) -> Job:
        job = self._queue.jobs.get(call.job_id or "")
        if job is None:
            raise Refused(404, "no such job, or its result is no longer kept")
        return job

    def _submit(self, call: Call, *, sync: bool) -> Job:
        limit = MAX_RUNSYNC_BYTES if sync else MAX_RUN_BYTES
        if len(call.body) > limit:
            raise Refused(413, f"the body exceeds {limit} bytes")
        body = _parse(call.body)
        if not isinstance(body, dict) or not isinstance(body.get("input"), dict):
            raise Refused(400, "the body must be a JSON object whose input is an object")
        if body.get("webhook") or body.get("s3Config"):
            raise Refused(400, "webhook and s3Config are not part of this platform")
        policy = body.get("policy") or {}
        if not isinstance(policy, dict):
            raise Refused(400, "policy must be an object")
        return self._queue.submit(
            body["input"],
            prefix="sync-" if sync else "",
            execution_timeout_s=_policy_s(policy, "executionTimeout", 600_000),
            ttl_s=_policy_s(policy, "ttl", 86_400_000),
            kept_s=self._options.kept_sync_s if sync else self._options.kept_s,
        )

    async def _run(self, call: Call) -> Reply:
        job = self._submit(call, sync=False)
        return _json({"id": job.id, "status": "IN_QUEUE"})

    async def _runsync(self, call: Call) -> Reply:
        wait_s = call.query_number("wait", 90_000, 1000, 300_000) / 1000
        job = self._submit(call, sync=True)
        await self._until_over(job, wait_s)
        return _json(job.view())

    async def _until_over(self, job: Job, wait_s: float) -> None:
        until_s = time.monotonic() + wait_s
        while not (job.status.final or self._queue.closing):
            if not await job.changed.wait(until_s):
                break

    async def _status(self, call: Call) -> Reply:
        return _json(self._job(call).view())

    async def _stream(self, call: Call) -> Reply:
        job = self._job(call)
        until_s = time.monotonic() + self._options.stream_hold_s
        while not (job.chunks or job.status.final or self._queue.closing):
            if not self._options.stream_hold_s or not await job.changed.wait(until_s):
                break
        chunks = job.read() if _present(call.request) else []
        status = f'{{"status": "{job.status}", "stream": ['.encode()
        return Reply(status + b", ".join(chunks) + b"]}", undo=lambda: job.unread(chunks))

    async def _cancel(self, call: Call) -> Reply:
        job = self._job(call)
        self._queue.cancel(job)
        return _json({"id": job.id, "status": str(job.status)})

    async def _retry(self, call: Call) -> Reply:
        job = self._job(call)
        if job.status not in (Status.FAILED, Status.TIMED_OUT):
            raise Refused(400, f"only a failed or timed-out job can be retried; it is {job.status}")
        self._queue.retry(job)
        return _json({"id": job.id, "status": str(job.status)})

    async def _purge_queue(self, call: Call) -> Reply:
        return _json({"removed": self._queue.purge(), "status": "completed"})

    async def _health(self, call: Call) -> Reply:
        return _json(self._queue.health())

    async def _unknown(self, call: Call) -> Reply:
        raise Refused(404, "no such path, or not with this method")

    # -- the OpenAI route ----------------------------------------------------------------------

    async def _openai(self, call: Call) -> "Reply | web.StreamResponse":
        if len(call.body) > MAX_RUN_BYTES:
            raise Refused(413, f"the body exceeds {MAX_RUN_BYTES} bytes")
        given: dict[str, Any] = {"openai_route": "/" + call.request.match_info["route"]}
        if call.body:
            given["openai_input"] = _parse(call.body)
        job = self._queue.submit(
            given,
            prefix="",
            execution_timeout_s=600,
            ttl_s=86_400,
            kept_s=self._options.kept_sync_s,
        )
        body = given.get("openai_input")
        try:
            if isinstance(body, dict) and body.get("stream") is True:
                return await self._openai_stream(call, job)
            await self._until_over(job, 600)
            return self._openai_reply(job)
        finally:
            # Nobody else knows this job's id.
            self._queue.cancel(job)

    def _openai_reply(self, job: Job) -> Reply:
        if job.status is not Status.COMPLETED:
            message = job.error or f"the job ended as {job.status}"
            return _json({"error": {"message": message, "type": "job_error", "code": 500}}, 500)
        parts = [json.loads(chunk)["output"] for chunk in job.read()]
        if not parts:
            parts = job.output if isinstance(job.output, list) else [job.output]
        if all(isinstance(part, str) for part in parts):
            return Reply("".join(parts).encode())
        return _json(parts[0] if len(parts) == 1 else parts)

    async def _openai_stream(self, call: Call, job: Job) -> "Reply | web.StreamResponse":
        until_s = time.monotonic() + 600
        while not (job.chunks or job.status.final or self._queue.closing):
            if not await job.changed.wait(until_s):
                break
        if not job.chunks and job.status is not Status.COMPLETED:
            return self._openai_reply(job)
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(call.request)
        cuts = [fault for fault in call.faults if fault.cut]
        left = min((fault.cut for fault in cuts), default=sys.maxsize)
        while left:
            over = job.status.final or self._queue.closing
            for chunk in job.read()[:left]:
                left -= 1
                part = json.loads(chunk)["output"]
                text = part if isinstance(part, str) else f"data: {json.dumps(part)}\n\n"
                self._record.add("client", True, call.request, text.encode())
                await response.write(text.encode())
            if over or not (job.chunks or job.status.final or await job.changed.wait(until_s)):
                break
        if not any(fault.reset for fault in cuts):
            await response.write_eof()
        return response

    # -- faults over HTTP ----------------------------------------------------------------------

    async def _control_faults(self, call: Call) -> Reply:
        if call.request.method == "DELETE":
            self._faults.clear()
        elif call.request.method == "POST":
            try:
                self._faults.add_json(_parse(call.body))
            except ValueError as error:
                raise Refused(400, str(error)) from None
        return _json({"faults": [fault.view() for fault in self._faults.active]})


def _json(value: Any, status: int = 200) -> Reply:
    return Reply(json.dumps(value).encode(), status)


def _parse(body: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None


def _policy_s(policy: dict[str, Any], name: str, default_ms: int) -> float:
    value = policy.get(name, default_ms)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise Refused(400, f"policy.{name} must be a positive number of milliseconds")
    return value / 1000


def _present(request: web.Request) -> bool:
    """Return whether the request's client is still there, as the kernel knows it this moment."""
    transport = request.transport
    if transport is None or transport.is_closing():
        return False
    with transport.get_extra_info("socket").dup() as peer:
        try:
            return bool(peer.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False


def _reset(request: web.Request) -> None:
    if request.transport:
        linger = struct.pack("ii", 1, 0)
        request.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, linger
        )
        request.transport.abort()
