"""A hostile platform in memory, between the real client and the real worker's handler.

The engine alone is replaced: it says back what it is asked to (`EchoModels`). What the platform
does to jobs and answers is given as functions, so that thousands of attacks take seconds.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

import protocol
from client import AsyncClient
from client_config import ClientSettings
from config import Settings
from crypto import new_request, seal_request
from errors import Rejected, SealedError
from frames import AnswerEvent, End, Event, Head, Text
from hpke import Envelope, HpkeKeyRing, HpkePrivateKey
from keys import KeyRing, generate_key
from protocol import Call, Request
from rp_handler import Handler

HERE = "here"
REJECTION = [{"error": Rejected.TEXT}]
ANSWER = "seven words make seven chunks, no less"
PAIR = HpkePrivateKey.generate()
LIMIT_S = 20.0
"""How long one job may take before it counts as hanging."""


class EchoModels:
    """An engine that says its prompt back word by word; `runs` holds what it was asked."""

    routes = ("/v1/models",)
    max_concurrency = 32

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.salts: list[str] = []
        self.says: Callable[[str], str] = lambda prompt: prompt
        self.hold: asyncio.Event | None = None
        """What the last word waits for."""

    def run(self, call: Call, cache_salt: str, expires_at: float | None) -> "EchoRun":
        body = protocol.parse_generate(call.body)
        prompt = body.messages[-1]["content"] if body.messages else body.prompt
        self.runs.append(str(prompt))
        self.salts.append(cache_salt)
        return EchoRun(self.says(str(prompt)), self.hold)


class EchoRun:
    """One call of it."""

    usage = None

    def __init__(self, text: str, hold: asyncio.Event | None) -> None:
        self._words = text.split(" ")
        self._hold = hold

    async def batches(self) -> AsyncIterator[list[AnswerEvent]]:
        yield [Head(200, "generate", "text/plain"), Text(0, self._words[0])]
        for word in self._words[1:]:
            yield [Text(0, " " + word)]
        if self._hold:
            await self._hold.wait()
        yield [Event({"index": 0, "finish_reason": "stop"}), End(None, {})]

    async def aclose(self) -> None:
        """There is nothing to stop."""


class Worker:
    """One worker: the real handler over an echo."""

    def __init__(self, keys: str, endpoint_id: str = HERE) -> None:
        self.models = EchoModels()
        models: Any = self.models
        pairs = HpkeKeyRing([PAIR]) if World.public_key_mode else None
        self.handler = Handler(
            Settings(endpoint_id=endpoint_id), KeyRing.parse(keys), models, pairs
        )

    async def answer(self, job_input: Any, job_id: str = "job") -> list[Any]:
        """Return what the worker yields for a job; a hang or an exception of it is raised."""

        async def handle() -> list[Any]:
            return [item async for item in self.handler.handle({"id": job_id, "input": job_input})]

        return await asyncio.wait_for(asyncio.ensure_future(handle()), LIMIT_S)


def altered(text: str, at: int) -> str:
    """Return the text with another character in one place."""
    return text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]


def as_is(chunks: list[Any], *_others: list[Any]) -> list[Any]:
    """The platform as it should be."""
    return chunks


class Platform(httpx2.AsyncBaseTransport):
    """RunPod's API as far as a client needs it, run by an attacker.

    A job is run on each of `workers`; `to_client` makes what the client gets of what these have
    yielded. `status` is what the job is said to have become, if not what it has.
    """

    def __init__(self, *workers: Worker) -> None:
        self.workers = list(workers)
        self.to_client: Callable[..., list[Any]] = as_is
        self.status = ""
        self.inputs: list[Any] = []
        self.calls: list[str] = []
        self._outputs: dict[str, list[Any]] = {}
        self._unread: dict[str, list[Any]] = {}

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        operation, _, job_id = request.url.path.partition(f"/{HERE}/")[2].partition("/")
        self.calls.append(operation)
        match operation:
            case "run":
                return replied({"id": await self._run(await body_of(request))})
            case "openai":
                return await self._events(await body_of(request))
            case "stream":
                unread, self._unread[job_id] = self._unread[job_id], []
                chunks = [{"output": item} for item in unread if not is_failure(item)]
                return replied({"status": self._state(job_id), "stream": chunks})
            case "status":
                output = [item for item in self._outputs[job_id] if not is_failure(item)]
                failures = [item for item in self._outputs[job_id] if is_failure(item)]
                view = {"id": job_id, "status": self._state(job_id), "output": output}
                return replied(view | (failures[0] if failures else {}))
            case _:
                return replied({"id": job_id, "status": "CANCELLED"})

    async def _run(self, body: Any) -> str:
        job_id = f"job-{len(self._outputs)}"
        self.inputs.append(body["input"])
        yielded = [await worker.answer(body["input"], job_id) for worker in self.workers]
        self._outputs[job_id] = self._unread[job_id] = self.to_client(*yielded)
        return job_id

    async def _events(self, body: Any) -> httpx2.Response:
        self.inputs.append(body)
        yielded = [await worker.answer({"openai_input": body}) for worker in self.workers]
        attempts = [
            [item[6:-2] if isinstance(item, str) else item for item in items] for items in yielded
        ]
        text = "".join(
            f"data: {item if isinstance(item, str) else json.dumps(item)}\n\n"
            for item in self.to_client(*attempts)
        )
        content = text.encode(errors="surrogatepass")
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=content)

    def _state(self, job_id: str) -> str:
        failed = any(map(is_failure, self._outputs[job_id]))
        return self.status or ("FAILED" if failed else "COMPLETED")


def is_failure(item: Any) -> bool:
    """Tell what the SDK makes a failed job of."""
    return isinstance(item, dict) and "error" in item


def replied(value: Any) -> httpx2.Response:
    # With everything escaped, so that a lone surrogate gets as far as the client.
    return httpx2.Response(200, content=json.dumps(value).encode())


async def body_of(request: httpx2.Request) -> Any:
    return json.loads(await request.aread())


@dataclass
class Outcome:
    """What a caller was told: pieces as they came, and the error in the end, if any."""

    pieces: list[str] = field(default_factory=list)
    error: SealedError | None = None

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)

    def deceives(self, *honest: str) -> bool:
        """Whether something was presented as an answer that no worker gave."""
        if self.error is None:
            return self.text not in honest
        return not any(text.startswith(self.text) for text in honest)


class World:
    """A client, a platform and a worker that share a key."""

    public_key_mode = False
    weakened = False
    """Whether a copy is attacked that is weakened: one success is enough."""

    def __init__(self) -> None:
        self.key_text = generate_key()
        self.key = KeyRing.parse(self.key_text).first
        self.worker = Worker(self.key_text)
        self.platform = Platform(self.worker)
        self.envelope = Envelope(PAIR.public) if self.public_key_mode else None

    def client(self, transport: str = "run") -> AsyncClient:
        """Return a client whose every request the platform gets."""
        settings = ClientSettings(
            HERE,
            "rpa",
            self.key_text,
            "http://127.0.0.1:9/v2",
            transport=transport,
            hpke_public_key=PAIR.public.text if self.public_key_mode else "",
        )
        return AsyncClient(settings, transport=self.platform)

    async def ask(self, text: str, *, streamed: bool, transport: str = "run") -> Outcome:
        """Ask as a program would."""
        outcome = Outcome()
        async with self.client(transport=transport) as client:
            try:
                if streamed:
                    async with client.chat(text, stream=True) as stream:
                        async for delta in stream:
                            outcome.pieces.append(delta.text)
                else:
                    outcome.pieces.append((await client.chat(text)).text)
            except SealedError as error:
                outcome.error = error
        return outcome

    def request(self, prompt: str = "x", **options: Any) -> Request:
        """Return a request of this world's client."""
        body = json.dumps({"prompt": prompt}, separators=(",", ":")).encode()
        given = {"audience": HERE, "ttl_s": 600, "envelope": self.envelope, **options}
        return new_request("generate", body, **given)

    def sealed(self, request: Request) -> dict[str, str]:
        """Return it as a job's input."""
        return {"sealed": seal_request(request, self.key, self.envelope)}

    def text_of(self, form: str, prompt: str = "x") -> str:
        """Return the text of a new request in a form: `sealed` or `encrypted_input`."""
        request = self.request(prompt)
        if form == "sealed":
            return self.sealed(request)[form]
        return self.key.simple_fernet.encrypt(bytes(request.body)).decode()

    async def ran(self, job_inputs: Sequence[Any], worker: Worker | None = None) -> int:
        """Return how many of these jobs reached the engine."""
        worker = worker or self.worker
        before = len(worker.models.runs)
        for job_input in job_inputs:
            await worker.answer(job_input)
        return len(worker.models.runs) - before
