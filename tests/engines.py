"""Real engines for tests: how one is started, asked, and looked into.

An engine start takes about 20 s, so a module shares one, and one event loop with it:
vLLM binds to the loop of its first request.
"""

import asyncio
import contextlib
import json
import shutil
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine_memory
import model_shape
from engine_adapters import Adapter
from frames import AnswerEvent, Body, End, Event, Head, Sse, Text
from model_fit import estimate
from model_needs import FitSettings
from protocol import GENERATE, Call
from readiness import Readiness
from worker_environment import environment, prepare_libraries

ROOT = Path(__file__).parent.parent
prepare_libraries(environment())
# Bound to a core that everything else needs too, an engine can keep it for seconds.
environment().setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

with warnings.catch_warnings():  # torch warns of itself while it is imported
    warnings.simplefilter("ignore")
    import vllm

    from engine import Engine as Engine
    from engine_run import Run as Run  # vLLM reads the environment when it is imported

DEMO = ROOT / "models" / "SmolLM2-135M-Instruct"
TINY = ROOT / "models" / "tiny-llama"
CHAT = "/v1/chat/completions"

SMALL = {"ENFORCE_EAGER": "true", "KV_CACHE_MEMORY_BYTES": str(256 * 2**20)}
"""Settings that every engine of the tests has."""


def build(model: Path, name: str, adapters: Sequence[Adapter] = (), /, **options: str) -> Engine:
    """Return an engine that is loaded but not started; slow."""
    if vllm.__version__.startswith("0.30"):
        # It checks each request for the backend that suits it, and runs all on that of the first.
        options.setdefault("STRUCTURED_OUTPUTS_CONFIG", '{"backend": "xgrammar"}')
    with warnings.catch_warnings():
        # The core is a fork of this process: its libraries' warnings must not be errors there.
        warnings.simplefilter("default")
        return Engine(str(model), [name], {**SMALL, **options}, 0.5, adapters)


@contextlib.asynccontextmanager
async def started(engine: Engine) -> AsyncIterator[Engine]:
    """Start the engine in this loop and end its processes afterwards."""
    try:
        await engine.start(Readiness().phase)
        yield engine
    finally:
        await engine.stop()


@dataclass
class Answer:
    """What a run produced, put together."""

    head: Head | None = None
    texts: dict[int, str] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    body: bytes = b""
    sse: list[bytes] = field(default_factory=list)
    end: End | None = None
    batches: list[list[AnswerEvent]] = field(default_factory=list)

    def add(self, batch: list[AnswerEvent]) -> None:
        assert self.end is None, "a batch after End"
        self.batches.append(batch)
        for event in batch:
            match event:
                case Head():
                    assert self.head is None and len(self.batches) == 1, "a late Head"
                    self.head = event
                case Text(index, delta):
                    self.texts[index] = self.texts.get(index, "") + delta
                case Event(data):
                    self.events.append(data)
                case Body(data):
                    self.body += data
                case Sse(data):
                    self.sse.append(data)
                case End():
                    self.end = event

    @property
    def status(self) -> int:
        assert self.head is not None
        return self.head.status

    @property
    def text(self) -> str:
        return self.texts.get(0, "")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def chunks(self) -> list[Any]:
        """The objects of a streamed answer."""
        data = [event.split(b"data: ", 1)[1] for event in self.sse]
        return [json.loads(item) for item in data if item != b"[DONE]"]

    @property
    def usage(self) -> dict[str, Any]:
        assert self.end is not None and self.end.usage is not None
        return self.end.usage

    @property
    def cached_tokens(self) -> int:
        return int(self.usage["prompt_tokens_details"]["cached_tokens"])

    def all(self, name: str, index: int = 0) -> list[Any]:
        """Return a member's values over the events of a choice."""
        return [
            event[name]
            for event in self.events
            if event.get("index", index) == index and name in event
        ]

    @property
    def finish_reason(self) -> Any:
        (reason,) = self.all("finish_reason")
        return reason

    @property
    def logprobs(self) -> list[dict[str, Any]]:
        return [entry for entries in self.all("logprobs") for entry in entries]


def call(route: str, body: Any, method: str = "POST") -> Call:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Call(route, method, b"" if method == "GET" else data)


async def read(run: Run, pause_s: float = 0.0) -> Answer:
    """Read a run to its end, pausing after every batch like a slow reader."""
    answer = Answer()
    try:
        async for batch in run.batches():
            answer.add(batch)
            if pause_s:
                await asyncio.sleep(pause_s)
    finally:
        await run.aclose()
    assert answer.end is not None, "no End"
    return answer


async def ask(
    engine: Engine, route: str, body: Any, *, method: str = "POST", salt: str = "salt"
) -> Answer:
    return await read(engine.run(call(route, body, method), salt))


async def generate(
    engine: Engine, *, salt: str = "salt", stream: bool = True, **body: Any
) -> Answer:
    """Ask the `generate` route; what is no member of a body is a sampling parameter."""
    members = {
        "messages",
        "prompt",
        "sampling_params",
        "model",
        "tools",
        "tool_choice",
        "response_format",
        "chat_template_kwargs",
        "add_generation_prompt",
        "continue_final_message",
    }
    params = {name: body.pop(name) for name in list(body) if name not in members}
    if params:
        body["sampling_params"] = {"temperature": 0, **params}
    return await ask(engine, GENERATE, {"stream": stream, **body}, salt=salt)


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


async def eventually(
    condition: Callable[[], Awaitable[bool] | bool], timeout_s: float = 10.0
) -> bool:
    """Return whether the condition came true in time."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        value = condition()
        if await value if isinstance(value, Awaitable) else value:
            return True
        if time.monotonic() > deadline_s:
            return False
        await asyncio.sleep(0.01)


def cache_tokens(engine: Engine) -> tuple[int, int]:
    """Return the tokens in the engine's KV cache, as it counted them and as was estimated."""
    cache = engine.llm.vllm_config.cache_config
    estimated = estimate(
        model_shape.of_folder(Path(engine.args.model)),
        FitSettings(
            max_model_len=engine.args.max_model_len,
            kv_cache_memory_bytes=engine.args.kv_cache_memory_bytes,
        ),
        machine_memory.machine(),
    ).kv_tokens
    assert cache.num_gpu_blocks and estimated
    return cache.num_gpu_blocks * cache.block_size, estimated


def running(engine: Engine) -> int:
    """Return how many requests the engine's front has not finished."""
    return engine.llm.get_num_unfinished_requests()


async def idle(engine: Engine) -> bool:
    """Return whether nothing runs, in the engine's own process either: it holds no KV block.

    The prefix cache can be reset only when no request uses a block of it.
    """
    return running(engine) == 0 and bool(await engine.llm.reset_prefix_cache())


def make_thinker(folder: Path) -> Path:
    """Make the tiny model with tokens `<think>` and `</think>`, in the place of unused ones."""
    model = folder / "thinker"
    shutil.copytree(TINY, model)
    names = {"<jupyter_start>": "<think>", "<jupyter_text>": "</think>"}
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for token in tokenizer["added_tokens"]:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "special": False}
    vocabulary = tokenizer["model"]["vocab"]
    for old, new in names.items():
        vocabulary[new] = vocabulary.pop(old)
    path.write_text(json.dumps(tokenizer))
    path = model / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("extra_special_tokens", None)
    settings.pop("additional_special_tokens", None)
    path.write_text(json.dumps(settings))
    return model
