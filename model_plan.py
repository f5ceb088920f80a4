"""`python utils.py plan MODEL`: whether a model fits, here or on other devices, before a start.

Owns the command's arguments and what it prints; the numbers come from `model_fit`.
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import machine_memory
import model_needs
import utils
from config import Settings
from errors import ConfigError, ModelError
from machine_memory import Memory, memory_size
from model_fit import Estimate, advice, estimate
from model_needs import OPTION_NAMES, FitSettings, parse_tokens

# What may stand in the environment; of vLLM's other settings this one is near to one of ours.
SETTING_NAMES = (*OPTION_NAMES, "STREAM_INTERVAL")

_TYPICAL_TOKENS = (1024, 4096, 16384)


_CODES = {"fits": 0, "too large": 5, "cannot run": 5, "tight": 6, "not known": 6}
EXIT_CODES = """\
exit codes: 0 it fits, 5 it does not, 6 it may be too tight, or that is not known;
            1, 2, 3, 130 as for the other commands
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.epilog = EXIT_CODES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    # So that -5GB is taken for a value, and refused as one, instead of for an unknown option.
    parser._negative_number_matcher = re.compile(r"-\d")
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="what MODELS takes; without one, its first"
    )
    parser.add_argument(
        "--gpu-memory", type=_gpu_memory, metavar="SIZE", help="of another GPU, such as 24GB"
    )
    parser.add_argument(
        "--gpus",
        type=_gpus,
        metavar="N",
        help="per worker; without TENSOR_PARALLEL_SIZE it is N too",
    )
    parser.add_argument(
        "--max-model-len", type=_tokens, metavar="N", help="instead of MAX_MODEL_LEN"
    )
    parser.add_argument("--json", action="store_true", help="print the estimate as JSON")


def _gpu_memory(text: str) -> int:
    """Read a size; GPUs are sold in binary units, whatever they are called (80GB: 81,559 MiB)."""
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT])(?:i?B)?", text, re.IGNORECASE)
    found = parse_tokens(size.group(1) + size.group(2).upper()) if size else None
    if found is None:
        unit = f"; with its unit, {text}GB?" if text.isdecimal() else ""
        raise argparse.ArgumentTypeError(f"{text} is not a size, such as 24GB{unit}")
    return found


def _gpus(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _tokens(text: str) -> str:
    if parse_tokens(text) is None:
        raise argparse.ArgumentTypeError(f"{text} is not a number of tokens, such as 8192 or 8k")
    return text


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Print the estimate; return the exit code of its verdict."""
    faults = list(model_needs.faults(settings.engine_options))
    model = args.model or next(iter(settings.models), None)
    if model is None:
        faults.append("name a model, such as org/name, or set MODELS")
    if model is None or faults:
        raise ConfigError(faults)
    memory, wanted = _devices(args, settings)
    name, shape = utils.shape_of(
        model,
        hub_cache=settings.hub_cache,
        model_path=settings.model_path_of(model, [model]),
        model_dirs=settings.model_dirs,
        token=settings.hf_token,
        endpoint=settings.hf_endpoint,
        offline=settings.offline,
    )
    if shape.adapter_of is not None:
        base = f", {shape.adapter_of}" if shape.adapter_of else ""
        raise ModelError(
            f"{name} is a LoRA adapter and runs on its base model: plan that{base} "
            f"(the adapter adds {_size(shape.file_bytes)})"
        )
    found = estimate(shape, wanted, memory)
    if args.json:
        whole: dict[str, Any] = {"model": name, **dataclasses.asdict(found)}
        del whole["needs"]
        whole["memory"] = dataclasses.asdict(memory) if memory else None
        whole["at_once"] = {str(tokens): found.at_once(tokens) for tokens in _lengths(found)}
        print(json.dumps(whole, indent=2))
    else:
        print("\n".join(lines(name, found, memory)))
    return _CODES[found.verdict]


def _devices(args: argparse.Namespace, settings: Settings) -> tuple[Memory | None, FitSettings]:
    options = dict(settings.engine_options)
    if args.max_model_len is not None:
        options["MAX_MODEL_LEN"] = args.max_model_len
    if args.gpus and not options.keys() & {"TENSOR_PARALLEL_SIZE", "PIPELINE_PARALLEL_SIZE"}:
        options["TENSOR_PARALLEL_SIZE"] = str(args.gpus)
    memory = machine_memory.here()
    wanted = FitSettings.read(options, settings.gpu_memory_utilization)
    if args.gpu_memory:
        count = args.gpus or wanted.devices * wanted.data_parallel_size
        memory = Memory("gpu", "the GPU", count, args.gpu_memory, args.gpu_memory)
    elif args.gpus and memory and memory.kind == "cpu":
        raise ConfigError(["there is no GPU here: --gpus needs --gpu-memory, such as 24GB"])
    return memory, wanted


def _lengths(found: Estimate) -> list[int]:
    longest = found.max_model_len or 0
    return [
        *(tokens for tokens in _TYPICAL_TOKENS if tokens < longest),
        *([longest] * bool(longest)),
    ]


def lines(name: str, found: Estimate, memory: Memory | None) -> Iterator[str]:
    """Yield the plan for people; `memory` is None where the devices are not known here."""
    each = " on each device" if found.devices > 1 else ""
    rows = [
        (f"weights{each}", _size(found.weights_bytes)),
        (
            "the work itself, a guess that vLLM replaces by a measurement",
            _size(found.allowance_bytes),
        ),
        (f"room for the KV cache{each}", _size(found.kv_bytes)),
        (f"a token in the KV cache{each}", _size(found.kv_bytes_per_token)),
        ("tokens in the KV cache", _count(found.kv_tokens)),
        *(
            (f"requests of {tokens:,} tokens at once", _count(found.at_once(tokens)))
            for tokens in _lengths(found)
        ),
    ]
    where = "devices that nobody here knows"
    if memory is not None:
        where = f"{memory.name}, {_size(memory.total_bytes)}"
        if memory.kind == "gpu" or found.devices > 1:
            where = f"{found.devices} x {where}"
    yield f"{name} on {where}"
    yield ""
    width = max(len(label) for label, _ in rows)
    yield from (f"  {label:{width}}  {value:>12}" for label, value in rows)
    yield ""
    verdict = {
        "fits": "It fits",
        "tight": "It may be too tight",
        "too large": "It does not fit",
        "not known": "Whether it fits is not known",
        "cannot run": "It cannot run with these settings",
    }[found.verdict]
    yield f"{verdict}: it {found.why}{advice(found)}{'' if found.changes else '.'}"


def _size(size_bytes: int | None) -> str:
    return "not known" if size_bytes is None else memory_size(size_bytes)


def _count(number: int | None) -> str:
    return "not known" if number is None else f"{number:,}"
