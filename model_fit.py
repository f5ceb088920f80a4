"""Does a model fit: weights and KV cache against the memory there is, before anything is loaded.

An estimate from headers and settings, by vLLM's own arithmetic where it has one (blocks, heads per
device) and by a stated allowance where it measures (activations, CUDA). It stops a start only where
the numbers leave no doubt; in every other case it is a word in the log.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import machine_memory
import model_shape
from errors import ModelTooLarge
from machine_memory import CPU_KV_CACHE_SHARE, Memory, memory_size
from model_needs import (
    GIB,
    PROCESS_BYTES,
    FitSettings,
    allowance_bytes,
    seats,
    sequence_bytes,
    weights_bytes,
)
from model_shape import Shape

_MAX_DEVICES = 8
# Of an engine on GPUs: its processes, and what passes through pinned memory.
_HOST_BYTES = 4 * GIB
_STEP_TOKENS = 256
_USEFUL_TOKENS = 2048

# What GPUs are sold with, in GiB.
_SOLD = (8, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141, 180)
# A setting whose weights are as large as those of checkpoints in 4 bits, scales included.
_FOUR_BITS = "nvfp4_per_token"

Verdict = Literal["fits", "tight", "too large", "not known", "cannot run"]


@dataclass(frozen=True)
class Change:
    """Settings that would make the model fit, with what else they need, and what comes of them."""

    settings: Mapping[str, str]
    effect: str
    beside: str = ""
    """What no setting does: another GPU, another checkpoint."""


@dataclass(frozen=True)
class Estimate:
    """What a model takes on each device, and whether the device has it.

    Bytes are those of one device; `kv_tokens` and `max_num_seqs` those of the worker, all copies of
    the model in it together. `certain` is set where vLLM could only fail. A model that "cannot run"
    lacks no memory: these settings do not go with it. `why` is one sentence
    without its subject; `changes` are those that help.
    """

    verdict: Verdict
    certain: bool
    why: str
    weights_bytes: int
    budget_bytes: int | None
    allowance_bytes: int
    kv_bytes: int | None
    kv_bytes_per_token: int | None
    kv_tokens: int | None
    max_model_len: int | None
    max_num_seqs: int
    devices: int
    changes: tuple[Change, ...] = ()
    needs: Callable[[int], int] | None = dataclasses.field(default=None, repr=False, compare=False)
    """How many bytes of the KV cache a sequence of so many tokens takes."""

    def at_once(self, tokens: int | None) -> int | None:
        """Return how many sequences of so many tokens the engine holds at a time."""
        if not tokens or not self.kv_tokens or not self.kv_bytes_per_token or not self.needs:
            return None if self.kv_tokens is None else 0
        # Short sequences take more for each token where layers look at a window only.
        room = self.kv_tokens * self.kv_bytes_per_token
        return min(self.max_num_seqs, room // self.needs(tokens))


def check(
    path: Path,
    name: str,
    options: Mapping[str, str],
    gpu_memory_utilization: float,
    log: logging.Logger,
    memory: Memory | None = None,
) -> Estimate | None:
    """Estimate a model that is on disk, tell the log, and raise ModelTooLarge if it cannot fit.

    None where no estimate could be made: a start that may work is never stopped for that.
    """
    try:
        settings = FitSettings.read(options, gpu_memory_utilization)
        shape = model_shape.of_folder(path)
        memory = memory or machine_memory.here()
        found = estimate(shape, settings, memory)
    except Exception as error:  # files and configurations come in every form
        log.warning("%s: its size could not be estimated (%s)", name, type(error).__name__)
        return None
    if found.verdict == "too large" and found.certain:
        raise ModelTooLarge(f"{name} cannot fit: it {found.why}{advice(found)}")
    worry = found.verdict in ("tight", "too large", "cannot run")
    log.log(
        logging.WARNING if worry else logging.INFO,
        "%s: %s%s",
        name,
        found.why,
        advice(found) if worry else "",
    )
    return found


def host_bytes(found: Estimate | None, memory: Memory | None) -> int:
    """Return what the engine will take of the machine's own memory, as far as that is known."""
    if found is None or memory is None or memory.kind == "gpu":
        return _HOST_BYTES
    return (found.weights_bytes + found.allowance_bytes + (found.kv_bytes or 0)) * found.devices


def advice(found: Estimate) -> str:
    """Return what would make the model fit, to be set behind a sentence."""
    ways = []
    for each in found.changes:
        settings = " ".join(f"{name}={value}" for name, value in each.settings.items())
        ways.append(f"{', '.join(filter(None, (each.beside, settings)))}: {each.effect}")
    return "; what would help:\n- " + "\n- ".join(ways) if ways else ""


def estimate(shape: Shape, settings: FitSettings, memory: Memory | None) -> Estimate:
    """Return what a model takes and whether it fits, with the changes that would help."""
    found = _estimate(shape, settings, memory)
    if memory is None or found.verdict in ("fits", "not known"):
        return found
    if memory.kind == "gpu" and found.devices > memory.count and found.verdict == "too large":
        return found  # what is lacking is not memory
    return dataclasses.replace(found, changes=tuple(_changes(shape, settings, memory)))


def _estimate(shape: Shape, settings: FitSettings, memory: Memory | None) -> Estimate:
    weights = weights_bytes(shape, settings)
    length = settings.max_model_len or shape.max_model_len
    allowance = allowance_bytes(shape, settings, memory)
    needs = sequence_bytes(shape, settings, memory)
    per_token = math.ceil(needs(length) / length) if needs and length else None
    on_gpu = memory is not None and memory.kind == "gpu"
    budget = room = None
    if memory is not None and on_gpu:
        budget = int(memory.total_bytes * settings.gpu_memory_utilization)
        room = settings.kv_cache_memory_bytes or max(0, budget - weights - allowance)
    elif memory is not None:
        budget = memory.total_bytes // settings.devices // settings.data_parallel_size
        room = settings.kv_cache_memory_bytes or int(CPU_KV_CACHE_SHARE * memory.total_bytes)
    tokens = None
    if room is not None and needs and per_token and length:
        block = settings.block_size or (16 if on_gpu else 128)
        tokens = room // (per_token * block) * block * settings.data_parallel_size
    one = needs(length) if needs and length else None
    verdict, certain, why = _judge(shape, settings, memory, weights, allowance, room, one, length)
    return Estimate(
        verdict,
        certain,
        why,
        weights,
        budget,
        allowance,
        room,
        per_token,
        tokens,
        length,
        (settings.max_num_seqs or seats(memory)[0]) * settings.data_parallel_size,
        settings.devices * settings.data_parallel_size,
        needs=needs,
    )


def _judge(
    shape: Shape,
    settings: FitSettings,
    memory: Memory | None,
    weights: int,
    allowance: int,
    room: int | None,
    one: int | None,
    length: int | None,
) -> tuple[Verdict, bool, str]:
    """Return the verdict, whether it is beyond doubt, and a sentence with the numbers."""
    each = " on each device" if settings.devices > 1 else ""
    takes = f"takes {memory_size(weights)} for its weights{each}"
    heads, parts = _heads(shape), settings.tensor_parallel_size
    if heads % parts and not settings.remodelled_by:
        why = f"has {heads} attention heads, which cannot be divided evenly over {parts} devices"
        return "cannot run", True, why
    if memory is None or room is None:
        return "not known", False, f"{takes}; the memory of this machine's devices is not known"
    if unclear := settings.unclear_of(shape):
        return "not known", False, f"{takes} unless {unclear} changes that"
    gpu = memory.kind == "gpu"
    wanted = settings.devices * settings.data_parallel_size
    if gpu and wanted > memory.count:
        return (
            "too large",
            False,
            (
                f"is to run on {wanted} GPUs, and this worker has {memory.count}: change the "
                "endpoint's GPUs per worker, or TENSOR_PARALLEL_SIZE and its like"
            ),
        )
    reserved = settings.kv_cache_memory_bytes or (0 if gpu else room)
    has = memory.total_bytes
    budget, share = has, f"{memory.name} has {memory_size(has)}"
    if gpu and settings.kv_cache_memory_bytes is None:
        budget = int(has * settings.gpu_memory_utilization)
        share += f", of which vLLM takes {memory_size(budget)}"
    # Processes of the engine that share a machine's memory take it together.
    together = 1 if gpu else wanted
    sure = not (settings.cpu_offload_bytes or _divided_unclearly(shape, settings))
    if weights * together > budget:
        return "too large", sure, f"{takes}, and {share}"
    if one is None:
        unknown = shape.unknown or "its longest sequence is not named"
        return "not known", False, f"{takes}; what a token needs beside them is not: {unknown}"
    asked = settings.max_model_len is not None
    wish = f"{memory_size(one)} for one sequence of {length:,} tokens"
    if reserved and one > reserved:
        return "too large", asked, f"needs {wish}, and its KV cache has {memory_size(reserved)}"
    if gpu and weights + one > budget:
        return "too large", asked and sure, f"{takes} and {wish}, and {share}"
    if gpu and weights + PROCESS_BYTES + one > budget:
        process = f"{memory_size(PROCESS_BYTES)} for the process itself"
        return "too large", False, f"{takes}, {wish} and {process}, and {share}"
    if (weights + allowance + max(one, reserved)) * together > budget:
        return (
            "tight",
            False,
            (f"{takes}, {wish} and perhaps {memory_size(allowance)} for the work itself; {share}"),
        )
    return "fits", True, f"{takes} and {wish}; {share}"


def _divided_unclearly(shape: Shape, settings: FitSettings) -> bool:
    # vLLM spreads experts over the copies of a model too.
    return shape.has_experts and settings.data_parallel_size > 1


def _heads(shape: Shape) -> int:
    return shape.number("num_attention_heads", "n_head") or 0


def _changes(shape: Shape, settings: FitSettings, memory: Memory) -> Iterator[Change]:
    """Yield what makes the model fit, each tried out; with a shorter context where that is left."""
    many = dataclasses.replace(memory, count=_MAX_DEVICES**2)  # as many as it takes
    helps = False
    for new, effect in _ways(shape, settings, memory):
        if change := _tried(shape, settings, many, new, effect):
            helps = True
            yield change
            more = new.get("tensor_parallel_size", 0) > settings.tensor_parallel_size
            if more and "MAX_MODEL_LEN" not in change.settings:
                break  # still more devices would do as well
    if memory.kind == "cpu":
        return
    if not helps and not settings.enforce_eager:
        new = {"enforce_eager": True}
        if change := _tried(shape, settings, many, new, "no CUDA graphs, 1 GiB less, but slower"):
            yield change
    for gib in _SOLD:
        larger = dataclasses.replace(many, total_bytes=gib * GIB)
        if gib * GIB > memory.total_bytes and _estimate(shape, settings, larger).verdict == "fits":
            each = "a GPU" if settings.devices == 1 else "GPUs"
            yield Change({}, "with these settings", f"{each} with {gib} GB")
            return


def _tried(
    shape: Shape, settings: FitSettings, memory: Memory, new: dict[str, Any], effect: str
) -> Change | None:
    """Return the change that makes the model fit, with a shorter context if that is left to us."""
    changed = dataclasses.replace(settings, **new)
    found = _estimate(shape, changed, memory)
    if found.verdict != "fits" and (not new or settings.max_model_len is None):
        needs = sequence_bytes(shape, changed, memory)
        if needs is None or not found.kv_bytes or not found.max_model_len:
            return None
        new["max_model_len"] = _largest(needs, found.kv_bytes, found.max_model_len)
        if new["max_model_len"] < min(_USEFUL_TOKENS, found.max_model_len):
            return None
        found = _estimate(shape, dataclasses.replace(settings, **new), memory)
    if found.verdict != "fits":
        return None
    beside = ""
    if new.get("quantization") == _FOUR_BITS:
        beside = "a checkpoint in 4 bits (AWQ, GPTQ)"
    texts = {name.upper(): str(value).lower() for name, value in new.items() if value != _FOUR_BITS}
    size = f"weights of {memory_size(found.weights_bytes)}"
    return Change(texts, effect.format(size=size), beside)


def _ways(
    shape: Shape, settings: FitSettings, memory: Memory
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield settings to try, with what to say of them; the first is none but a shorter context."""
    heads, parts = _heads(shape), settings.tensor_parallel_size
    if heads % parts:
        divisor = max(count for count in range(1, parts) if heads % count == 0)
        yield {"tensor_parallel_size": divisor}, "a number that the heads can be divided by"
        stages = settings.pipeline_parallel_size * parts
        if (shape.number("num_hidden_layers", "n_layer") or 0) >= stages:
            new = {"tensor_parallel_size": 1, "pipeline_parallel_size": stages}
            yield new, "layers are divided instead of heads"
        return
    yield {}, "the longest that fits"
    needs = sequence_bytes(shape, settings, memory)
    length = settings.max_model_len or shape.max_model_len
    if memory.kind == "cpu":
        if needs and length:
            yield {"kv_cache_memory_bytes": needs(length)}, "room for one sequence"
        return
    if not shape.quantization and not settings.quantization:
        yield {"quantization": "fp8"}, "{size}"
        yield {"quantization": _FOUR_BITS}, "{size}"
    if settings.kv_cache_dtype == "auto" and needs:
        yield {"kv_cache_dtype": "fp8"}, "half the KV cache"
    count = parts * 2
    while count <= _MAX_DEVICES and heads % count == 0:
        gpus = count * settings.pipeline_parallel_size * settings.data_parallel_size
        yield {"tensor_parallel_size": count}, f"{gpus} GPUs per worker, {{size}} on each"
        count *= 2


def _largest(needs: Callable[[int], int], room: int, most: int) -> int:
    """Return the most tokens, in whole steps, whose sequence the room holds."""
    low, high = 0, most // _STEP_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needs(_STEP_TOKENS * middle) <= room else (low, middle - 1)
    return _STEP_TOKENS * low
