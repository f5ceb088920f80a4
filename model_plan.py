"""`python utils.py plan MODEL`: whether a model fits, here or on other devices, before a start.

Owns the command's arguments and what it prints; the numbers come from `model_fit`.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import machine_memory
import utils
from config import Settings
from errors import ConfigError
from machine_memory import Memory, memory_size
from model_fit import Estimate, advice, estimate
from model_needs import FitSettings, parse_tokens

_TYPICAL_TOKENS = (1024, 4096, 16384)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("model", metavar="MODEL", help="what MODELS takes")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="of another GPU, such as 24GB")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="per worker; without TENSOR_PARALLEL_SIZE it is N too"
    )
    parser.add_argument("--max-model-len", metavar="N", help="instead of MAX_MODEL_LEN")
    parser.add_argument("--json", action="store_true", help="print the estimate as JSON")


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Print the estimate; return 1 where the model does not fit."""
    memory, wanted = _devices(args, settings)
    name, shape = utils.shape_of(
        args.model,
        hub_cache=settings.hub_cache,
        model_path=settings.model_path,
        model_dirs=settings.model_dirs,
        token=settings.hf_token,
        endpoint=settings.hf_endpoint,
        offline=settings.offline,
    )
    found = estimate(shape, wanted, memory)
    if args.json:
        whole: dict[str, Any] = {"model": name, **dataclasses.asdict(found)}
        whole["memory"] = dataclasses.asdict(memory) if memory else None
        whole["at_once"] = {str(tokens): found.at_once(tokens) for tokens in _lengths(found)}
        print(json.dumps(whole, indent=2))
    else:
        print("\n".join(lines(name, found, memory)))
    return 1 if found.verdict == "too large" else 0


def _devices(args: argparse.Namespace, settings: Settings) -> tuple[Memory | None, FitSettings]:
    faults = []
    options = dict(settings.engine_options)
    if args.max_model_len is not None:
        options["MAX_MODEL_LEN"] = args.max_model_len
        if parse_tokens(args.max_model_len) is None:
            faults.append("--max-model-len is not a number of tokens, such as 8192 or 8k")
    # GPUs are sold in binary units, whatever they are called: 80GB shows as 81,559 MiB.
    memory_bytes = parse_tokens((args.gpu_memory or "").upper().removesuffix("B"))
    if args.gpu_memory is not None and memory_bytes is None:
        faults.append("--gpu-memory is not a size, such as 24GB")
    if args.gpus is not None and args.gpus < 1:
        faults.append("--gpus is not a number above 0")
    if faults:
        raise ConfigError(faults)
    if args.gpus and not options.keys() & {"TENSOR_PARALLEL_SIZE", "PIPELINE_PARALLEL_SIZE"}:
        options["TENSOR_PARALLEL_SIZE"] = str(args.gpus)
    memory, wanted = (
        machine_memory.here(),
        FitSettings.read(options, settings.gpu_memory_utilization),
    )
    if memory_bytes:
        count = args.gpus or wanted.devices * wanted.data_parallel_size
        memory = Memory("gpu", "the GPU", count, memory_bytes, memory_bytes)
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
    }[found.verdict]
    yield f"{verdict}: it {found.why}{advice(found)}{'' if found.changes else '.'}"


def _size(size_bytes: int | None) -> str:
    return "not known" if size_bytes is None else memory_size(size_bytes)


def _count(number: int | None) -> str:
    return "not known" if number is None else f"{number:,}"
