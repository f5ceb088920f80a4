"""The webhook that Vapi, a provider of voice calls, asks for an assistant, tools and documents.

Owns who may call it and the shapes of Vapi's messages and answers. What is answered
stands in the person's own voice file (gateway_voice.py). Vapi's model is the gateway's
OpenAI route and needs nothing of this module. Source of every shape: docs.vapi.ai,
pages server-url/events, server-url/server-authentication and tools/custom-tools,
and the schemas of Vapi's OpenAPI description, as of August 2026.
"""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from errors import RequestError
from gateway_config import VapiSettings
from gateway_errors import error_response
from gateway_guard import bearer
from gateway_voice import Voice

PATH = "/vapi/webhook"

ASSISTANT_LIMIT_S = 6.0
"""Vapi gives up an `assistant-request` after 7.5 s end to end and advises to stay below 6."""

TRANSFER_LIMIT_S = 15.0
DOCUMENTS_LIMIT_S = 8.0
"""Vapi waits 20 s for a server unless told otherwise, and 10 s for documents."""

FRESH_S = 300.0
"""How far the time of a signed message may be from this machine's."""

WHOLE_ANSWERS = frozenset(
    {
        "assistant",
        "assistantId",
        "destination",
        "error",
        "squad",
        "squadId",
        "workflow",
        "workflowId",
    }
)
"""Members by which an answer to `assistant-request` is told from an assistant's object."""

log = logging.getLogger("gateway.vapi")


class Authentication:
    """Tells Vapi's messages from anybody else's, and a signed one from its repetition."""

    def __init__(self, settings: VapiSettings, now: Callable[[], float] = time.time) -> None:
        self._token = settings.token.encode()
        self._secret = settings.secret.encode()
        self._hmac_key = settings.hmac_key.encode()
        self._now = now
        self._seen: dict[bytes, float] = {}

    @property
    def reads_body(self) -> bool:
        """Whether a message must be read before it is known whose it is."""
        return bool(self._hmac_key)

    def by_header(self, headers: Headers) -> bool:
        """Return whether the message shows the token or the secret."""
        secret = headers.get("x-vapi-secret", "")
        return _same(bearer(headers), self._token) or _same(secret, self._secret)

    def by_signature(self, headers: Headers, body: bytes) -> bool:
        """Return whether the message is signed, of now, and seen for the first time.

        Source: the schema HMACAuthenticationPlan with its defaults: hex of HMAC over
        `{timestamp}.{body}`, in `x-signature`, `x-timestamp`. Vapi does not document the
        timestamp's unit, so that seconds and milliseconds are taken.
        """
        stamp = headers.get("x-timestamp", "")
        given = headers.get("x-signature", "").removeprefix("sha256=")
        if not (self._hmac_key and stamp.isascii() and stamp.isdecimal() and len(stamp) <= 16):
            return False
        signed = stamp.encode() + b"." + body
        digest = hmac.new(self._hmac_key, signed, hashlib.sha256).digest()
        if not hmac.compare_digest(digest.hex().encode(), given.lower().encode()):
            return False
        sent_s = int(stamp) / 1000 if len(stamp) > 11 else float(stamp)
        now_s = self._now()
        if abs(now_s - sent_s) > FRESH_S:
            return False
        # The key's owner alone gets here, so that no stranger can fill the memory.
        self._seen = {each: until_s for each, until_s in self._seen.items() if until_s >= now_s}
        if digest in self._seen:
            return False
        self._seen[digest] = sent_s + FRESH_S
        return True


def _same(given: str, secret: bytes) -> bool:
    # Header values are bytes that Starlette reads as Latin-1.
    return bool(secret) and hmac.compare_digest(given.encode("latin-1"), secret)


Answer = dict[str, Any]


class Webhook:
    """Answers Vapi's messages from a voice file."""

    def __init__(self, voice: Voice, authentication: Authentication) -> None:
        self._voice = voice
        self._authentication = authentication
        self._answers: dict[str, Callable[[dict[str, Any]], Awaitable[Answer]]] = {
            "assistant-request": self._assistant,
            "tool-calls": self._tools,
            "transfer-destination-request": self._transfer,
            "knowledge-base-request": self._documents,
        }

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        try:
            message = await self._message(request)
            answering = self._answers.get(message["type"])
            # The others only tell what happened: the call's status, its transcript, its end.
            return _json(await answering(message) if answering else {})
        except RequestError as error:
            return error_response(error)

    async def _message(self, request: Request) -> dict[str, Any]:
        known = self._authentication.by_header(request.headers)
        if not known and self._authentication.reads_body:
            known = self._authentication.by_signature(request.headers, await request.body())
        if not known:
            raise RequestError(
                "this is not shown to come from Vapi, or it is old or repeated; compare the "
                "credential in Vapi's dashboard with the gateway's GATEWAY_VAPI_ settings",
                status=401,
                type="AuthenticationError",
            )
        try:
            body = msgspec.json.decode(await request.body())
        except ValueError:
            raise RequestError("the body is not JSON") from None
        message = body.get("message") if isinstance(body, dict) else None
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            raise RequestError("the body is not one of Vapi's messages", param="message")
        return message

    async def _assistant(self, message: dict[str, Any]) -> Answer:
        found = self._voice.assistant
        if self._voice.has("assistant"):
            found = await self._ask("assistant", message, ASSISTANT_LIMIT_S)
        match found:
            case str() if found:
                return {"assistantId": found}
            case dict() if found.keys() & WHOLE_ANSWERS:
                return found
            case dict() if found:
                return {"assistant": found}
            case _:
                # Spoken to the caller.
                return {"error": "Sorry, this number cannot take your call at the moment."}

    async def _transfer(self, message: dict[str, Any]) -> Answer:
        match await self._ask("transfer", message, TRANSFER_LIMIT_S):
            case str(number) if number.startswith("sip:"):
                return {"destination": {"type": "sip", "sipUri": number}}
            case str(number) if number:
                return {"destination": {"type": "number", "number": number}}
            case dict() as answer if answer.keys() & {"destination", "error"}:
                return answer
            case dict() as destination if destination:
                return {"destination": destination}
            case _:
                return {"error": "The call cannot be transferred at the moment."}

    async def _documents(self, message: dict[str, Any]) -> Answer:
        match await self._ask("documents", message, DOCUMENTS_LIMIT_S):
            case dict() as answer:
                return answer
            case list(found) | tuple(found):
                return {
                    "documents": [
                        {"content": each, "similarity": 1.0} if isinstance(each, str) else each
                        for each in found
                    ]
                }
            case _:
                return {"documents": []}

    async def _ask(self, hook: str, message: dict[str, Any], limit_s: float) -> Any:
        """Return what the file's function says, None where it says nothing that can be sent."""
        if not self._voice.has(hook):
            return None
        try:
            said = await self._voice.ask(hook, message, limit_s)
            return msgspec.json.decode(msgspec.json.encode(said))
        except RequestError:
            return None
        except (TypeError, ValueError, RecursionError):
            log.warning("%s() returned what JSON cannot hold", hook)
            return None

    async def _tools(self, message: dict[str, Any]) -> Answer:
        calls = message.get("toolCallList")
        if not isinstance(calls, list):
            raise RequestError("the message has no list of tool calls", param="toolCallList")
        # Vapi ignores every status but 200, so that a failure is a result of its own. The
        # results must stand in the order of the calls.
        return {"results": await asyncio.gather(*map(self._tool, calls))}

    async def _tool(self, call: Any) -> dict[str, str]:
        call = call if isinstance(call, dict) else {}
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        name = call.get("name") or function.get("name")
        result = {"name": str(name or ""), "toolCallId": str(call.get("id") or "")}
        try:
            return {
                **result,
                "result": await self._voice.use(str(name), _arguments(call, function)),
            }
        except RequestError as error:
            return {**result, "error": error.message}


def _arguments(call: dict[str, Any], function: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments from any of the places where Vapi's pages show them."""
    places = (
        call.get("parameters"),
        call.get("arguments"),
        function.get("arguments"),
        function.get("parameters"),
    )
    given: Any = next((each for each in places if each is not None), {})
    if isinstance(given, str):
        try:
            given = msgspec.json.decode(given) if given.strip() else {}
        except ValueError:
            given = None
    if not isinstance(given, dict):
        raise RequestError("the arguments are not a JSON object")
    return given


def routes(
    settings: VapiSettings, voice: Voice | None, now: Callable[[], float] = time.time
) -> list[BaseRoute]:
    """Return the webhook's route; without a voice file or anything secret it answers 404.

    The body is bounded by whoever mounts this.
    """
    if voice is None or not settings.on:
        return [Route(PATH, _off, methods=["POST"])]
    return [Route(PATH, Webhook(voice, Authentication(settings, now)).__call__, methods=["POST"])]


async def _off(request: Request) -> Response:
    return error_response(
        RequestError(
            "the Vapi webhook is off; set GATEWAY_VAPI_FILE and one of GATEWAY_VAPI_TOKEN, "
            "GATEWAY_VAPI_SECRET and GATEWAY_VAPI_HMAC_KEY",
            status=404,
            type="NotFoundError",
        )
    )


def _json(answer: Answer) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
