"""vLLM's engine arguments as settings: names, types and choices of the installed version.

Owns the way from upper-case environment names to vLLM's parsed arguments, read
off vLLM's own parser instead of a list of ours, and the few that are set where the operator has
not. Knows nothing of a running engine.
"""

import argparse
import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import NoReturn, get_args

from vllm.config import VllmConfig
from vllm.config.lora import MaxLoRARanks
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

import engine_loading
import machine_memory
from engine_adapters import Adapter
from errors import ConfigError

NOWHERE = "nowhere.invalid"
"""The only host that may be asked for media unless a setting names some; it cannot exist.

vLLM takes an empty list for leave to ask anybody. What a request names is refused before
(engine_tasks.py); this is for what that might not see.
"""

MAX_LORAS = 8
"""For how many adapters the device has room at once unless a setting says otherwise."""

LONG_PROMPTS = 4
"""How many long prompts are read side by side before the next one has to wait for one of them."""

MIN_PREFILL_TOKENS = 128
"""As small as the part of a prompt may become that is read in one step."""

# Owned by the worker, or would carry prompts out of the process.
_OWN_SETTINGS = {"model", "served_model_name", "hf_token", "gpu_memory_utilization"}
_FORBIDDEN_OPTIONS = {
    "revision": "MODELS names it, as in org/name@revision",
    "download_dir": "models lie in HF_HOME",
    "enable_log_requests": "it writes requests to the log",
    "enable_log_outputs": "it writes answers to the log",
    "enable_log_deltas": "it writes answers to the log",
    "otlp_traces_endpoint": "it sends what requests look like to another host",
}


# Arguments of vLLM's server that shape answers; those of its sockets have no meaning here.
_ANSWER_OPTIONS = {
    "lora_modules",
    "chat_template",
    "chat_template_content_format",
    "trust_request_chat_template",
    "default_chat_template_kwargs",
    "response_role",
    "return_tokens_as_token_ids",
    "enable_auto_tool_choice",
    "exclude_tools_when_tool_choice_none",
    "tool_call_parser",
    "tool_parser_plugin",
    "tool_server",
    "tool_strict_level",
    "enable_prompt_tokens_details",
    "enable_force_include_usage",
    "enable_log_outputs",
    "enable_log_deltas",
}


class _OptionError(Exception):
    pass


class _OptionParser(FlexibleArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _OptionError(message)


def _parser() -> argparse.ArgumentParser:
    return make_arg_parser(_OptionParser())  # type: ignore[no-untyped-call]


class EngineOptions:
    """The installed vLLM's engine arguments, as settings of the environment.

    Read off vLLM's own argument parser, so names, types and choices are those of
    the installed version.
    """

    def __init__(self) -> None:
        known = {entry.name for entry in dataclasses.fields(AsyncEngineArgs)} | _ANSWER_OPTIONS
        self._actions = {
            action.dest.upper(): action for action in _parser()._actions if action.dest in known
        }

    def names(self) -> frozenset[str]:
        """Return the upper-case names of every engine argument that may be set."""
        return frozenset(
            name for name, action in self._actions.items() if action.dest not in _OWN_SETTINGS
        )

    def argv(self, name: str, text: str) -> list[str]:
        """Return the command-line words of one setting; ValueError says what is wrong with it."""
        action = self._actions[name]
        if action.dest in _FORBIDDEN_OPTIONS:
            raise ValueError(f"is not available: {_FORBIDDEN_OPTIONS[action.dest]}")
        words = _words(action, text)
        try:
            _parser().parse_args(words)
        except (_OptionError, argparse.ArgumentError, ValueError, TypeError) as error:
            raise ValueError(_plain(str(error))) from None
        if action.dest == "load_format" and (fault := engine_loading.format_fault(text)):
            raise ValueError(fault)
        return words

    def faults(self, options: Mapping[str, str], models: Sequence[str] = ()) -> list[str]:
        """Return a sentence for each option that is wrong, and each model that cannot be loaded."""
        faults = [fault for model in models if (fault := engine_loading.model_fault(model))]
        for name, text in options.items():
            try:
                self.argv(name, text)
            except ValueError as error:
                faults.append(f"{name} {error}")
        return faults


def _words(action: argparse.Action, text: str) -> list[str]:
    flag = next(option for option in action.option_strings if option.startswith("--"))
    if action.nargs == 0:
        match text.strip().lower():
            case "true" | "1" | "yes" | "on":
                return [flag]
            case "false" | "0" | "no" | "off":
                negated = [option for option in action.option_strings if option.startswith("--no-")]
                return negated[:1]
        raise ValueError("is neither true nor false")
    if action.nargs in ("+", "*"):
        if text.lstrip().startswith("["):
            items = json.loads(text)
            return [flag, *(item if isinstance(item, str) else json.dumps(item) for item in items)]
        return [flag, *shlex.split(text)]
    return [f"{flag}={text}"]


def _plain(message: str) -> str:
    """Return argparse's message without the option's spelling in front of it."""
    return message.rpartition("argument ")[2].partition(": ")[2] or message


# --- adapters ---------------------------------------------------------------------------------


def lora_options(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Return the settings with which vLLM takes all of the adapters."""
    if not adapters:
        return {}
    most = max(adapter.rank for adapter in adapters)
    return {
        "ENABLE_LORA": "true",
        "MAX_LORAS": str(min(len(adapters), MAX_LORAS)),
        # In the machine's memory there is room for all: none is read from the disk again.
        "MAX_CPU_LORAS": str(len(adapters)),
        "MAX_LORA_RANK": str(next((rank for rank in _RANKS if rank >= most), _RANKS[-1])),
    }


_RANKS = sorted(get_args(MaxLoRARanks))


def adapter_faults(
    adapters: Sequence[Adapter], served_model_names: Sequence[str], options: Mapping[str, str]
) -> list[str]:
    """Return a sentence for each adapter that these settings leave no room for."""
    faults = []
    most = int(options.get("MAX_LORA_RANK") or _RANKS[-1])
    for adapter in adapters:
        if adapter.rank > most:
            cure = "raise MAX_LORA_RANK" if most < _RANKS[-1] else "vLLM takes none above"
            faults.append(
                f"the adapter {adapter.name} has rank {adapter.rank}, above {most}: {cure}"
            )
        if adapter.name in served_model_names:
            faults.append(f"the adapter {adapter.name} has the name of its base model")
    if adapters and options.get("ENABLE_LORA", "true").lower() in ("false", "0", "no", "off"):
        faults.append("ENABLE_LORA is off, but MODELS has adapters: unset it")
    return faults


# --- fairness ---------------------------------------------------------------------------------


def share_prefill(config: VllmConfig, options: Mapping[str, str]) -> None:
    """Leave most of a step to others where a long prompt is not alone, unless a setting says how.

    By vLLM's default a long prompt takes whole steps until it is read, and nobody who comes after
    it gets a token before. Alone, it still has whole steps.
    """
    scheduler = config.scheduler_config
    if scheduler.enable_chunked_prefill and "LONG_PREFILL_TOKEN_THRESHOLD" not in options:
        scheduler.long_prefill_token_threshold = min(
            max(scheduler.max_num_batched_tokens // LONG_PROMPTS, MIN_PREFILL_TOKENS),
            config.model_config.max_model_len,
        )


# --- the engine -------------------------------------------------------------------------------


def serve_args(
    model: str,
    served_model_names: Sequence[str],
    options: Mapping[str, str],
    gpu_memory_utilization: float,
    adapters: Sequence[Adapter] = (),
) -> argparse.Namespace:
    """Return vLLM's parsed arguments; ConfigError names every option that is wrong."""
    typed = EngineOptions()
    faults = typed.faults(options, [model])
    if faults := faults or adapter_faults(adapters, served_model_names, options):
        raise ConfigError(faults)
    options = {**lora_options(adapters), **options}
    argv = [word for name, text in options.items() for word in typed.argv(name, text)]
    argv += [f"--model={model}", "--served-model-name", *served_model_names]
    argv += [f"--gpu-memory-utilization={gpu_memory_utilization}"]
    if "DISABLE_LOG_STATS" not in options:
        argv += ["--disable-log-stats"]  # 2 to 5 µs per token, for figures that nobody reads here
    if current_platform.is_cpu() and "KV_CACHE_MEMORY_BYTES" not in options:
        # vLLM would take gpu_memory_utilization of all memory, and fail where that is not free.
        share = int(machine_memory.CPU_KV_CACHE_SHARE * machine_memory.total_bytes())
        argv += [f"--kv-cache-memory-bytes={share}"]
    if strategy := engine_loading.strategy(model, options):
        argv += [f"--safetensors-load-strategy={strategy}"]
    args = _parser().parse_args(argv)
    args.allowed_media_domains = args.allowed_media_domains or [NOWHERE]
    try:
        validate_parsed_serve_args(args)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError([str(error)]) from None
    return args
