"""What a call of the client becomes: its options sorted, its body as JSON, its job.

Owns which options there are and where each goes, for the blocking and the async client
alike. Knows nothing of how either waits.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import client_config
from answers import Answer, AnswerBuilder, Delta, Progress, Response, ResponseBuilder
from client_config import ClientSettings
from crypto import new_request
from endpoint import Endpoint
from errors import ConfigError, RequestError
from hpke import Envelope, HpkePublicKey
from job import Job, Limits
from job_polled import PolledJob
from job_records import TTL_S, JobRecords, SubmittedJob
from job_route import RouteJob
from keys import KeyRing
from protocol import GENERATE, GenerateBody, parse_generate
from streams import Pieces
from submissions import Submissions
from transport import Transport

Messages = str | Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int]
Body = Mapping[str, Any] | None
Method = Literal["POST", "GET"]

_LIMITS = frozenset(Limits.__dataclass_fields__)
_WAITING = ("timeout_s", "wait_s", "on_progress")
_BODY_MEMBERS = frozenset(GenerateBody.__struct_fields__) - {
    "messages",
    "prompt",
    "sampling_params",
    "stream",
}


class Calls:
    """What both clients do before and after they wait for something."""

    def __init__(self, settings: ClientSettings, transport: Transport) -> None:
        self._settings = settings
        self.endpoint = Endpoint(transport, settings.api_base, settings.endpoint_id)
        self.records = JobRecords(settings.state_dir)
        self.submissions = Submissions(self.endpoint, self.records)
        self._keys = None
        if settings.encryption_key:
            self._keys = KeyRing.parse(settings.encryption_key)
        self._worker_key = None
        if settings.hpke_public_key:
            self._worker_key = HpkePublicKey.parse(settings.hpke_public_key)

    def job(
        self,
        route: str,
        content: bytes | None,
        *,
        streamed: bool,
        method: Method = "POST",
        options: Mapping[str, Any],
    ) -> Job:
        if self._keys is None:
            raise ConfigError(["ENCRYPTION_KEY is not set; a request cannot be sealed without it"])
        options = dict(options)
        on_progress = options.pop("on_progress", None)
        if unknown := set(options) - _LIMITS:
            raise TypeError(f"unknown option: {', '.join(sorted(unknown))}")
        settings = self._settings
        given = {name: value for name, value in options.items() if value is not None}
        defaults = {
            "timeout_s": settings.timeout_s,
            "wait_s": settings.wait_s,
            "ttl_s": settings.ttl_s,
        }
        limits = Limits(**{**defaults, **given})
        envelope = Envelope(self._worker_key) if self._worker_key else None
        request = new_request(
            route,
            content,
            audience=settings.endpoint_id,
            ttl_s=limits.ttl_s or client_config.DEFAULT_TTL_S,
            method=method,
            envelope=envelope,
        )
        kind = RouteJob if settings.transport == "openai" else PolledJob
        return kind(
            self.endpoint,
            request,
            # Of the moment: a process that goes on for months changes over by itself.
            self._keys.current(time.time()),
            envelope,
            streamed=streamed,
            limits=limits,
            on_progress=on_progress,
        )

    def chat(
        self, messages: Messages, system: str | None, stream: bool, options: Mapping[str, Any]
    ) -> Pieces[Delta, AnswerBuilder]:
        listed = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        first = [] if system is None else [{"role": "system", "content": system}]
        return self._generate({"messages": [*first, *listed]}, stream, options)

    def complete(
        self, prompt: Prompt, stream: bool, options: Mapping[str, Any]
    ) -> Pieces[Delta, AnswerBuilder]:
        given = prompt if isinstance(prompt, str) else list(prompt)
        return self._generate({"prompt": given}, stream, options)

    def _generate(
        self, given: dict[str, Any], stream: bool, options: Mapping[str, Any]
    ) -> Pieces[Delta, AnswerBuilder]:
        calls: dict[str, Any] = {}
        body: dict[str, Any] = {**given, "stream": stream}
        sampling = dict(options.get("sampling_params") or {})
        for name, value in options.items():
            if value is None or name == "sampling_params":
                continue
            kind = body if name in _BODY_MEMBERS else sampling
            if name in _LIMITS or name == "on_progress":
                kind = calls
            kind[name] = value
        if sampling:
            body["sampling_params"] = sampling
        content = encode(body)
        parse_generate(content)
        job = self.job(GENERATE, content, streamed=stream, options=calls)
        return Pieces(job, AnswerBuilder())

    def request(
        self,
        route: str,
        body: Mapping[str, Any] | None,
        method: Method,
        stream: bool | None,
        options: Mapping[str, Any],
    ) -> tuple[Pieces[bytes, ResponseBuilder], bool]:
        if stream is None:
            stream = body is not None and body.get("stream") is True
        elif body is not None and (stream or "stream" in body):
            body = {**body, "stream": stream}
        content = None if body is None else encode(body)
        job = self.job(route, content, streamed=stream, method=method, options=options)
        return Pieces(job, ResponseBuilder()), stream

    def lasting(self, options: Mapping[str, Any]) -> "Calls":
        """Return a core whose jobs may outlast their client; TypeError for options of waiting."""
        if waiting := [name for name in _WAITING if options.get(name) is not None]:
            raise TypeError(f"nobody waits for a submitted job: {', '.join(waiting)}")
        settings = replace(
            self._settings,
            # Only there does a job have an id.
            transport="run",
            # The platform forgets the job when its request expires: no worker starts it in vain.
            ttl_s=self._settings.ttl_s or TTL_S,
        )
        return Calls(settings, self.endpoint.transport)

    async def result(
        self,
        job: SubmittedJob | str,
        timeout_s: float | None,
        check: bool,
        on_progress: Callable[[Progress], None] | None,
    ) -> Answer | Response:
        limit_s = self._settings.timeout_s if timeout_s is None else timeout_s
        answer = await self.submissions.result(job, timeout_s=limit_s, on_progress=on_progress)
        if check and isinstance(answer, Response) and (error := answer.error()):
            raise error
        return answer


def encode(body: Mapping[str, Any]) -> bytes:
    """Return a body as JSON; RequestError for what JSON cannot hold."""
    try:
        text = json.dumps(body, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        reason = "lone surrogates" if isinstance(error, UnicodeError) else str(error)
        raise RequestError(f"the request cannot be written as JSON: {reason}") from None
