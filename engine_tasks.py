"""What the loaded model can do, and the refusal of what it cannot, before any work.

Owns the words for it (SPEC section 8.2), which route and which part of a body needs which of them,
and that nothing is fetched that a request names. Reads bodies as far as that goes and leaves the
rest to vLLM. Knows nothing of vLLM and of running requests.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from engine_forms import silence
from errors import RequestError
from protocol import GENERATE, Call

_OF_ROUTES = {
    "/v1/completions": "generate",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/messages/count_tokens": "chat",
    "/v1/embeddings": "embed",
    "/v1/score": "score",
    "/score": "score",
    "/v1/rerank": "score",
    "/v2/rerank": "score",
    "/rerank": "score",
    "/classify": "classify",
    "/pooling": "pool",
    "/v1/audio/transcriptions": "transcribe",
    "/v1/audio/translations": "transcribe",
}

_OF_MODALITIES = {"image": "vision", "audio": "audio", "video": "video"}

TASKS = (
    *("generate", "chat", "tools", "reasoning"),
    *("embed", "score", "classify", "pool", "transcribe"),
    *("vision", "audio", "video"),
)
"""Every word, in the order in which they are told."""

_INPUTS = {"vision": "images", "audio": "audio", "video": "videos"}

_OF_PARTS = {
    "image": "vision",
    "image_url": "vision",
    "input_image": "vision",
    "image_pil": "vision",
    "image_embeds": "vision",
    "audio_url": "audio",
    "input_audio": "audio",
    "audio_embeds": "audio",
    "video_url": "video",
    "video_embeds": "video",
}
"""What a part of a message needs, by its type or by the member that holds it."""

# The members of all routes in which parts can lie: of messages, of texts to embed or to rank.
_WITH_PARTS = (
    *("messages", "input", "query", "queries", "documents", "items"),
    *("text_1", "text_2", "data_1", "data_2"),
)
_URLS = ("image_url", "audio_url", "video_url", "source")


def tasks_of(
    routes: Iterable[str],
    modalities: Iterable[str],
    *,
    chat: bool,
    tools: bool,
    reasoning: bool,
) -> tuple[str, ...]:
    """Return the words for a model with these routes that takes these kinds of input.

    `chat` tells whether it has a chat template: vLLM has the routes without it too.
    """
    found = {_OF_ROUTES[route] for route in routes if route in _OF_ROUTES}
    if found != {"transcribe"}:  # what such a model hears stands in no message
        found |= {_OF_MODALITIES[name] for name in modalities if name in _OF_MODALITIES}
    if not chat:
        found.discard("chat")
    elif "chat" in found:
        found |= {word for word, there in (("tools", tools), ("reasoning", reasoning)) if there}
    return tuple(word for word in TASKS if word in found)


@dataclass(frozen=True)
class Abilities:
    """What the model can do and whence media may come; `check` refuses the rest."""

    tasks: tuple[str, ...]
    routes: tuple[str, ...]
    models: tuple[str, ...] = ()
    """The names that a request may give as its model; empty where that is vLLM's to say."""
    media_domains: tuple[str, ...] = ()
    """Hosts that may be asked for media; by default nobody is."""
    local_media: bool = False
    """Whether files of the worker may be named; vLLM checks which."""
    own_chat_template: bool = False
    """Whether a request may bring its chat template."""

    def check(self, call: Call) -> None:
        """Raise RequestError for what this model cannot do, with the list of what it can."""
        try:
            body = msgspec.json.decode(call.body) if call.body else {}
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return  # vLLM says so in its own words
        if isinstance(body, dict):
            model = body.get("model")
            if isinstance(model, str) and model and self.models and model not in self.models:
                raise self.no_such_model(model)
            self._check(call.route, body)

    def _check(self, route: str, body: Mapping[str, Any]) -> None:
        needed = _OF_ROUTES.get(route)
        if route == GENERATE:
            needed = "chat" if body.get("messages") is not None else "generate"
        if "generate" in self.tasks and needed == "chat" and "chat" not in self.tasks:
            if not (self.own_chat_template and body.get("chat_template")):
                raise RequestError(
                    "this model has no chat template, so it cannot chat: set CHAT_TEMPLATE on the "
                    f"worker, or send a prompt. It can {self._can()}",
                    param="messages",
                )
        elif needed is not None and needed not in self.tasks:
            raise self.no_such_route(route)
        for part in _parts(body):
            self._check_part(part)

    def no_such_model(self, model: str) -> RequestError:
        """Return the 404 that names what is served."""
        return RequestError(
            f"The model `{model}` does not exist; this worker has {', '.join(self.models)}",
            status=404,
            type="NotFoundError",
            param="model",
        )

    def no_such_route(self, route: str) -> RequestError:
        """Return the 404 that names what the loaded model can do, and its routes."""
        return RequestError(
            f"no such route: {route!r}; this model can {self._can()}, "
            f"and this worker has {', '.join(self.routes)}",
            status=404,
            type="NotFoundError",
        )

    def _can(self) -> str:
        return ", ".join(self.tasks)

    def _check_part(self, part: Mapping[str, Any]) -> None:
        kind = part.get("type")
        names = (kind, *part) if isinstance(kind, str) else part
        needed = next((_OF_PARTS[name] for name in names if name in _OF_PARTS), None)
        if needed is None:
            return
        if needed not in self.tasks:
            raise RequestError(
                f"this model takes no {_INPUTS[needed]}; it can {self._can()}", param="messages"
            )
        for url in _urls(part):
            self._check_url(url)

    def _check_url(self, url: str) -> None:
        scheme, _, _ = url.partition(":")
        match scheme.strip().lower():
            case "data":
                return
            case "http" | "https":
                try:
                    host = urlsplit(url).hostname
                except ValueError:
                    host = None
                if host in self.media_domains:
                    return
            case "file" if self.local_media:
                return
        allowed = (
            f"media come from {', '.join(self.media_domains)} only"
            if self.media_domains
            else "this worker fetches nothing that a request names"
        )
        raise RequestError(
            f"{allowed}: send them along as a data: URL, or add the host to ALLOWED_MEDIA_DOMAINS "
            "on the worker",
            param="messages",
        )


def proof(tasks: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the route and the body of the least that shows that a model with these tasks works."""
    if "generate" in tasks:
        # vLLM compiles how it counts log probabilities when it first has to: nobody should wait.
        return GENERATE, {"prompt": "Hello", "sampling_params": {"max_tokens": 1, "logprobs": 0}}
    if "transcribe" in tasks:
        return "/v1/audio/transcriptions", {"file": silence(), "max_completion_tokens": 1}
    return "/pooling", {"input": "Hello"}


def refusal(error: RequestError, route: str) -> dict[str, Any]:
    """Return an error in the form that vLLM's server has on this route."""
    if route.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": error.type, "message": error.message}}
    return error.body()


def _parts(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield every object of a body that can be a part of a message, the messages too."""
    waiting = [body[name] for name in _WITH_PARTS if name in body]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += [item for item in value if isinstance(item, dict | list)]
        elif isinstance(value, dict):
            yield value
            # Messages, results of tools, and texts to rank hold theirs in one of these.
            waiting += [value[name] for name in ("content", "output") if name in value]


def _urls(part: Mapping[str, Any]) -> Iterator[str]:
    for name in _URLS:
        value = part.get(name)
        if isinstance(value, dict):
            value = value.get("url")
        if isinstance(value, str):
            yield value
