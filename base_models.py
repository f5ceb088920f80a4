"""The base models of MODELS, and which of them a call is for.

Owns their names, what a call's `model` means among several of them, the refusal of what is not to
be had, and how they are listed. Knows nothing of turns, nor of vLLM: engines are built by what it
is given.
"""

import collections
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from errors import RequestError
from frames import AnswerEvent, Body, End, Head
from protocol import Call
from readiness import Timed

LISTING = "/v1/models"


class Run(Protocol):
    """One call on its way, as `engine_run.Run` has it."""

    @property
    def usage(self) -> Any: ...

    def batches(self) -> AsyncIterator[list[AnswerEvent]]: ...

    async def aclose(self) -> None: ...


class Engine(Protocol):
    """What is needed of `engine.Engine`."""

    @property
    def max_concurrency(self) -> int: ...

    @property
    def dead(self) -> bool: ...

    routes: tuple[str, ...]

    def about(self) -> dict[str, Any]: ...

    async def start(self, timed: Timed = ..., /) -> None: ...

    def run(self, call: Call, cache_salt: str) -> Run: ...

    async def stop(self) -> None: ...


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A model that an engine of its own serves, under the first of its names and the others.

    `build` loads it, blocking, off the loop or before there is one; ConfigError where it cannot.
    """

    names: tuple[str, ...]
    build: Callable[[], Engine]

    @property
    def name(self) -> str:
        return self.names[0]


def clashes(models: Sequence[BaseModel]) -> list[str]:
    """Return a sentence for each name that several models have."""
    count = collections.Counter(name for model in models for name in model.names)
    return [
        f"MODELS has {number} models called {name}: requests could not tell them apart"
        for name, number in count.items()
        if number > 1
    ]


class _Named(msgspec.Struct):
    model: str | None = None


_model_of = msgspec.json.Decoder(_Named).decode


def model_name(call: Call) -> str | None:
    """Return the model that a call names, empty if it names none, None where any will do."""
    if call.method != "POST":
        return None
    try:
        return _model_of(call.body).model or ""
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None  # whichever engine refuses it


def names(models: Iterable[BaseModel]) -> str:
    """Return every name of the models, for people."""
    return ", ".join(name for model in models for name in model.names)


def not_served(name: str, loaded: Sequence[BaseModel], others: Sequence[BaseModel]) -> RequestError:
    """Return the error for a model that is not in MODELS, and says which are."""
    words = f"serves {names(loaded)}" if loaded else "loads another model"
    if others:
        words += f" and loads {names(others)} when asked to"
    return _not_found(f"the model {name!r} is not served; this worker {words}")


def not_loaded(model: BaseModel, loaded: BaseModel) -> RequestError:
    """Return the error for a model that could be had with another setting."""
    return _not_found(
        f"{model.name} is on this worker's volume but not loaded; it serves {names([loaded])}: set "
        f"MODEL_SWAP=true to have it exchanged on demand, or deploy an endpoint with {model.name} "
        "as its first model"
    )


def _not_found(message: str) -> RequestError:
    return RequestError(message, status=404, type="NotFoundError", param="model")


async def listed(engine: Engine) -> list[dict[str, Any]]:
    """Return the models that an engine lists, in OpenAI's form."""
    run = engine.run(Call(LISTING, "GET", b""), "listing")
    events = [event async for batch in run.batches() for event in batch]
    await run.aclose()
    body = b"".join(event.data for event in events if isinstance(event, Body))
    entries: list[dict[str, Any]] = msgspec.json.decode(body)["data"]
    return entries


class Listing:
    """The answer of /v1/models, used like a Run: what is loaded, and what could be."""

    usage = None

    def __init__(
        self, engine_lists: Sequence[dict[str, Any]], *, loaded: bool, others: Sequence[BaseModel]
    ) -> None:
        """`engine_lists` is what the last engine has listed, `loaded` whether that still holds."""
        example = engine_lists[0]
        common = {name: example[name] for name in ("object", "created", "owned_by")}
        self._data = [{**entry, "loaded": True} for entry in engine_lists if loaded]
        self._data += [
            {"id": name, **common, "loaded": False} for model in others for name in model.names
        ]

    async def batches(self) -> AsyncIterator[list[AnswerEvent]]:
        """Yield the answer."""
        body = msgspec.json.encode({"object": "list", "data": self._data})
        yield [Head(200, "body", "application/json"), Body(body), End(None, {})]

    async def aclose(self) -> None:
        """There is nothing to stop."""
