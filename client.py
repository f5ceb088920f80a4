"""The client: a library for talking to a sealed worker, and `python client.py`, the command.

    with Client() as client:
        print(client.chat("Why is the sky blue?").text)
        with client.chat("Tell me a story.", stream=True, temperature=0.7) as stream:
            for delta in stream:
                print(delta.text, end="")

`AsyncClient` is the same with `await`, `async with` and `async for`. Leaving a
stream early, an exception or a cancelled task cancels the job. What `submit` hands
over goes on by itself; `result` gets its answer, in another process too.

Owns the calls and the shapes they return. The command is in `commands`, the life
of a job in `job` and, once submitted, in `submissions`, the platform's HTTP in
`endpoint`, what is believed in `delivery`. Needs neither vllm, torch nor runpod.

Options of every call: `timeout_s` (until the answer is complete), `wait_s` (until
a worker takes the job), `ttl_s` (how long the request is valid, also for the
platform), `execution_timeout_s` (on the worker), `on_progress` (called with a
`Progress` while the answer has not begun). `chat` and `complete` also take `model`,
`tools`, `tool_choice`, `response_format`, `chat_template_kwargs`,
`add_generation_prompt` and `continue_final_message`; every other option is one of
vLLM's sampling parameters (SPEC section 8.1). An option that is None is not given.
"""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Literal, Self, TypeVar, overload

try:
    import httpx2
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    raise SystemExit(f"error: {error.name} is not installed; run: pip install .") from None

import client_config
from answers import Answer, Choice, Delta, Progress, Response, ResponseBuilder
from calls import Body, Calls, Messages, Method, Prompt
from client_config import ClientSettings
from errors import AnswerError
from job_records import SubmittedJob
from protocol import WORKER
from streams import (
    AsyncRawStream,
    AsyncStream,
    Pieces,
    RawStream,
    Stream,
    read_answer,
    read_response,
)
from transport import AsyncTransport, BlockingTransport, run_blocking

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncRawStream",
    "AsyncStream",
    "Choice",
    "Client",
    "ClientSettings",
    "Delta",
    "Progress",
    "RawStream",
    "Response",
    "Stream",
    "SubmittedJob",
]

T = TypeVar("T")
Awaited = Coroutine[Any, Any, T]


def _settings(
    settings: ClientSettings | None,
    endpoint_id: str | None,
    api_key: str | None,
    encryption_key: str | None,
    hpke_public_key: str | None,
    api_base: str | None,
) -> ClientSettings:
    given = {
        "RUNPOD_ENDPOINT_ID": endpoint_id,
        "RUNPOD_API_KEY": api_key,
        "ENCRYPTION_KEY": encryption_key,
        "HPKE_PUBLIC_KEY": hpke_public_key,
        "RUNPOD_API_BASE": api_base,
    }
    if settings is None:
        return client_config.load(given)
    if any(value is not None for value in given.values()):
        raise TypeError("give either settings or single values")
    return settings


def _object(response: Response) -> dict[str, Any]:
    value = response.json()
    if not isinstance(value, dict):
        raise AnswerError("the worker's description of itself is not an object")
    return value


def versions(worker: Mapping[str, Any]) -> str:
    """Return the versions in what a worker says of itself, for people."""
    names = {"worker": "sealed-vllm", "vllm": "vLLM", "protocol": "protocol"}
    return ", ".join(f"{names[key]} {worker[key]}" for key in names if key in worker)


class Client:
    """A blocking client of one endpoint; may be shared by threads, its streams may not.

    Settings that are not given come from the environment (client_config.SETTINGS).
    """

    def __init__(
        self,
        settings: ClientSettings | None = None,
        *,
        endpoint_id: str | None = None,
        api_key: str | None = None,
        encryption_key: str | None = None,
        hpke_public_key: str | None = None,
        api_base: str | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        settings = _settings(
            settings, endpoint_id, api_key, encryption_key, hpke_public_key, api_base
        )
        self._transport = BlockingTransport(settings.api_base, settings.api_key, transport)
        self._calls = Calls(settings, self._transport)
        self.endpoint = self._calls.endpoint
        self.records = self._calls.records

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        run_blocking(self._transport.close())

    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[False] = False, **options: Any
    ) -> Answer: ...
    @overload
    def chat(self, messages: Messages, *, stream: Literal[True], **options: Any) -> Stream: ...
    def chat(
        self,
        messages: Messages,
        *,
        system: str | None = None,
        stream: bool = False,
        **options: Any,
    ) -> Answer | Stream:
        """Answer a conversation, or a single user's text, through the model's chat template."""
        pieces = self._calls.chat(messages, system, stream, options)
        return Stream(pieces) if stream else run_blocking(read_answer(pieces))

    @overload
    def complete(
        self, prompt: Prompt, *, stream: Literal[False] = False, **options: Any
    ) -> Answer: ...
    @overload
    def complete(self, prompt: Prompt, *, stream: Literal[True], **options: Any) -> Stream: ...
    def complete(self, prompt: Prompt, *, stream: bool = False, **options: Any) -> Answer | Stream:
        """Continue a text or a list of token ids, without a chat template."""
        pieces = self._calls.complete(prompt, stream, options)
        return Stream(pieces) if stream else run_blocking(read_answer(pieces))

    @overload
    def request(
        self, route: str, body: Body = None, *, stream: Literal[True], **options: Any
    ) -> RawStream: ...
    @overload
    def request(
        self, route: str, body: Body = None, *, stream: Literal[False], **options: Any
    ) -> Response: ...
    @overload
    def request(self, route: str, body: Body = None, **options: Any) -> Response | RawStream: ...
    def request(
        self,
        route: str,
        body: Body = None,
        *,
        method: Method = "POST",
        stream: bool | None = None,
        check: bool = True,
        **options: Any,
    ) -> Response | RawStream:
        """Call an OpenAI or vLLM route such as `/v1/embeddings`.

        Streams if the body asks for it, unless `stream` says otherwise. With `check` a status
        of 400 or more is raised as RequestError.
        """
        pieces, streams = self._calls.request(route, body, method, stream, options)
        return RawStream(pieces, check) if streams else run_blocking(read_response(pieces, check))

    def submit(
        self,
        messages: Messages,
        *,
        system: str | None = None,
        record: bool = True,
        **options: Any,
    ) -> SubmittedJob:
        """Submit a conversation, and leave it; `result` gets its answer.

        Without `record` what opens the answer is in no file, only in what is returned. The
        options are those of `chat` but for the ones about waiting; `ttl_s` is a day.
        """
        core = self._calls.lasting(options)
        pieces = core.chat(messages, system, False, options)
        return run_blocking(core.submissions.submit(pieces.job, record=record))

    def submit_request(
        self,
        route: str,
        body: Body = None,
        *,
        method: Method = "POST",
        record: bool = True,
        **options: Any,
    ) -> SubmittedJob:
        """Submit a call of an OpenAI or vLLM route, and leave it; see `submit`."""
        core = self._calls.lasting(options)
        pieces, _ = core.request(route, body, method, None, options)
        return run_blocking(core.submissions.submit(pieces.job, record=record))

    def result(
        self,
        job: SubmittedJob | str,
        *,
        timeout_s: float | None = None,
        check: bool = True,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Answer | Response:
        """Wait for a submitted job, or the id of a recorded one, and return its answer.

        NotOver after `timeout_s`; 0 looks once. The job goes on then, and its record stays
        until `records.discard`. With `check` a route's status of 400 or more is raised as
        RequestError.
        """
        return run_blocking(self._calls.result(job, timeout_s, check, on_progress))

    def worker(self, **options: Any) -> dict[str, Any]:
        """Return what a worker says of itself: versions, models, limits, clock (SPEC 8.2)."""
        return _object(self.request(WORKER, method="GET", stream=False, **options))

    def health(self) -> dict[str, Any]:
        """Return the platform's counts of jobs and workers."""
        return run_blocking(self.endpoint.health())

    def status(self, job_id: str) -> dict[str, Any]:
        """Return a job's state as the platform reports it."""
        return run_blocking(self.endpoint.status(job_id))

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a job."""
        return run_blocking(self.endpoint.cancel(job_id))

    def purge_queue(self) -> dict[str, Any]:
        """Remove every job that no worker has taken."""
        return run_blocking(self.endpoint.purge_queue())


class AsyncClient:
    """`Client` for an event loop; `chat`, `complete` and `request` are awaited unless streamed."""

    def __init__(
        self,
        settings: ClientSettings | None = None,
        *,
        endpoint_id: str | None = None,
        api_key: str | None = None,
        encryption_key: str | None = None,
        hpke_public_key: str | None = None,
        api_base: str | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        settings = _settings(
            settings, endpoint_id, api_key, encryption_key, hpke_public_key, api_base
        )
        self._transport = AsyncTransport(settings.api_base, settings.api_key, transport)
        self._calls = Calls(settings, self._transport)
        self.endpoint = self._calls.endpoint
        self.records = self._calls.records

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    @overload
    def chat(
        self, messages: Messages, *, stream: Literal[False] = False, **options: Any
    ) -> Awaited[Answer]: ...
    @overload
    def chat(self, messages: Messages, *, stream: Literal[True], **options: Any) -> AsyncStream: ...
    def chat(
        self,
        messages: Messages,
        *,
        system: str | None = None,
        stream: bool = False,
        **options: Any,
    ) -> Awaited[Answer] | AsyncStream:
        """Answer a conversation; see Client.chat."""
        pieces = self._calls.chat(messages, system, stream, options)
        return AsyncStream(pieces) if stream else read_answer(pieces)

    @overload
    def complete(
        self, prompt: Prompt, *, stream: Literal[False] = False, **options: Any
    ) -> Awaited[Answer]: ...
    @overload
    def complete(self, prompt: Prompt, *, stream: Literal[True], **options: Any) -> AsyncStream: ...
    def complete(
        self, prompt: Prompt, *, stream: bool = False, **options: Any
    ) -> Awaited[Answer] | AsyncStream:
        """Continue a text; see Client.complete."""
        pieces = self._calls.complete(prompt, stream, options)
        return AsyncStream(pieces) if stream else read_answer(pieces)

    @overload
    def request(
        self, route: str, body: Body = None, *, stream: Literal[True], **options: Any
    ) -> AsyncRawStream: ...
    @overload
    def request(
        self, route: str, body: Body = None, *, stream: Literal[False], **options: Any
    ) -> Awaited[Response]: ...
    @overload
    def request(
        self, route: str, body: Body = None, **options: Any
    ) -> Awaited[Response] | AsyncRawStream: ...
    def request(
        self,
        route: str,
        body: Body = None,
        *,
        method: Method = "POST",
        stream: bool | None = None,
        check: bool = True,
        **options: Any,
    ) -> Awaited[Response] | AsyncRawStream:
        """Call an OpenAI or vLLM route; see Client.request."""
        pieces, streams = self._calls.request(route, body, method, stream, options)
        return AsyncRawStream(pieces, check) if streams else read_response(pieces, check)

    def send(
        self,
        route: str,
        content: bytes | None,
        *,
        method: Method = "POST",
        streamed: bool,
        **options: Any,
    ) -> AsyncRawStream:
        """Call a route with a body that is JSON already, and return the answer as it comes.

        With `streamed` false nothing of it is released before its end. An error status is
        part of the answer, not raised.
        """
        job = self._calls.job(route, content, streamed=streamed, method=method, options=options)
        return AsyncRawStream(Pieces(job, ResponseBuilder()), check=False)

    async def submit(
        self,
        messages: Messages,
        *,
        system: str | None = None,
        record: bool = True,
        **options: Any,
    ) -> SubmittedJob:
        """Submit a conversation; see Client.submit."""
        core = self._calls.lasting(options)
        pieces = core.chat(messages, system, False, options)
        return await core.submissions.submit(pieces.job, record=record)

    async def submit_request(
        self,
        route: str,
        body: Body = None,
        *,
        method: Method = "POST",
        record: bool = True,
        **options: Any,
    ) -> SubmittedJob:
        """Submit a call of an OpenAI or vLLM route; see Client.submit."""
        core = self._calls.lasting(options)
        pieces, _ = core.request(route, body, method, None, options)
        return await core.submissions.submit(pieces.job, record=record)

    async def result(
        self,
        job: SubmittedJob | str,
        *,
        timeout_s: float | None = None,
        check: bool = True,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Answer | Response:
        """Wait for a submitted job and return its answer; see Client.result."""
        return await self._calls.result(job, timeout_s, check, on_progress)

    async def worker(self, **options: Any) -> dict[str, Any]:
        """Return what a worker says of itself; see Client.worker."""
        return _object(await self.request(WORKER, method="GET", stream=False, **options))

    async def health(self) -> dict[str, Any]:
        """Return the platform's counts of jobs and workers."""
        return await self.endpoint.health()

    async def status(self, job_id: str) -> dict[str, Any]:
        """Return a job's state as the platform reports it."""
        return await self.endpoint.status(job_id)

    async def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a job."""
        return await self.endpoint.cancel(job_id)

    async def purge_queue(self) -> dict[str, Any]:
        """Remove every job that no worker has taken."""
        return await self.endpoint.purge_queue()


if __name__ == "__main__":
    from commands import main

    raise SystemExit(main())
