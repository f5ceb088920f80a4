"""What a model takes on one device: weights, KV cache and the work itself, by settings.

Weights and KV cache by vLLM's own arithmetic; for what vLLM measures at start (activations, CUDA) a
stated allowance. Knows no verdict; of settings it knows those that decide about memory, and which
values of them vLLM would refuse.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from machine_memory import Memory
from model_shape import DTYPES, FLOATS, Shape

GIB = 2**30

# Bytes of a number in the KV cache, by KV_CACHE_DTYPE; what begins with fp8 or int8 takes one.
_KV_BYTES = {"bfloat16": 2.0, "float16": 2.0, "float32": 4.0}

# Bytes of a weight that vLLM quantises while it loads, scales included, by QUANTIZATION.
_ON_THE_FLY = {
    "fp8": 1.0,
    "fp8_per_tensor": 1.0,
    "fp8_per_channel": 1.0,
    "fp8_per_block": 1.0,
    "mxfp8": 1.03,
    "int8_per_channel_weight_only": 1.0,
    "nvfp4_per_token": 0.57,
}
QUANTIZATIONS = frozenset(_ON_THE_FLY) | {
    "auto_awq",
    "auto_gptq",
    "awq",
    "awq_marlin",
    "compressed-tensors",
    "deepseek_v4_fp8",
    "experts_int8",
    "fbgemm_fp8",
    "fp_quant",
    "gpt_oss_mxfp4",
    "gptq",
    "gptq_marlin",
    "humming",
    "inc",
    "modelopt",
    "modelopt_fp4",
    "modelopt_mixed",
    "modelopt_mxfp8",
    "moe_wna16",
    "mxfp4",
    "online",
    "quark",
    "torchao",
}
"""What QUANTIZATION may be in vLLM 0.32; a list of ours, for pods that have no vLLM."""

OPTION_NAMES = (
    "MAX_MODEL_LEN",
    "TENSOR_PARALLEL_SIZE",
    "PIPELINE_PARALLEL_SIZE",
    "DATA_PARALLEL_SIZE",
    "DTYPE",
    "QUANTIZATION",
    "KV_CACHE_DTYPE",
    "KV_CACHE_MEMORY_BYTES",
    "MAX_NUM_SEQS",
    "MAX_NUM_BATCHED_TOKENS",
    "BLOCK_SIZE",
    "ENFORCE_EAGER",
    "CPU_OFFLOAD_GB",
    "HF_OVERRIDES",
    "QUANTIZATION_CONFIG",
    "SPECULATIVE_CONFIG",
    "MODEL_IMPL",
    "OFFLOAD_GROUP_SIZE",
    "DECODE_CONTEXT_PARALLEL_SIZE",
)
"""The engine options that `FitSettings.read` looks at."""

# Settings that make another model of what the files hold, or divide it in ways not known here.
_REMODELLING = (
    *("HF_OVERRIDES", "QUANTIZATION_CONFIG", "SPECULATIVE_CONFIG", "MODEL_IMPL"),
    *("OFFLOAD_GROUP_SIZE", "DECODE_CONTEXT_PARALLEL_SIZE"),
)
_NO_CHANGE = ("", "0", "1")

_COUNTS = (
    "TENSOR_PARALLEL_SIZE",
    "PIPELINE_PARALLEL_SIZE",
    "DATA_PARALLEL_SIZE",
    "MAX_NUM_SEQS",
    "BLOCK_SIZE",
)
_AMOUNTS = ("MAX_MODEL_LEN", "MAX_NUM_BATCHED_TOKENS", "KV_CACHE_MEMORY_BYTES")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def faults(options: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each value that vLLM would refuse, and so no estimate stands for."""
    for name in filter(options.__contains__, _COUNTS):
        if not options[name].isdecimal() or not int(options[name]):
            yield f"{name} is not a whole number above 0"
    for name in filter(options.__contains__, _AMOUNTS):
        longest = name == "MAX_MODEL_LEN" and options[name].lower() in ("auto", "-1")
        if not longest and parse_tokens(options[name]) is None:
            yield f"{name} is not a number above 0, such as 8192 or 8k"
    if not _is_number(options.get("CPU_OFFLOAD_GB", "0")):
        yield "CPU_OFFLOAD_GB is not a number"
    if options.get("ENFORCE_EAGER", "true").lower() not in (*_TRUE, *_FALSE):
        yield "ENFORCE_EAGER is neither true nor false"
    if (dtype := options.get("DTYPE", "auto")) not in ("auto", *DTYPES):
        yield f"DTYPE is none of vLLM 0.32{_near(dtype, DTYPES)}"
    if (word := options.get("QUANTIZATION", "fp8").lower()) not in QUANTIZATIONS:
        yield f"QUANTIZATION is none of vLLM 0.32{_near(word, QUANTIZATIONS)}"


def _near(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, sorted(words), n=1)
    return f": did you mean {close[0]}?" if close else f": one of {', '.join(sorted(words))}"


@dataclass(frozen=True)
class FitSettings:
    """The settings of vLLM that decide how much memory a model takes."""

    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    dtype: str = "auto"
    quantization: str = ""
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float = 0.95
    kv_cache_memory_bytes: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    enforce_eager: bool = False
    cpu_offload_bytes: int = 0
    remodelled_by: str = ""
    """The setting that makes an estimate from the files worthless, if one does."""

    @classmethod
    def read(cls, options: Mapping[str, str], gpu_memory_utilization: float) -> "FitSettings":
        """Read vLLM's engine options as text; what is malformed is taken as not set.

        To refuse it is the business of vLLM's own parser, or of `faults` where that is not at hand.
        """

        def number(name: str) -> int | None:
            return parse_tokens(options.get(name, ""))

        def word(name: str) -> str:
            return options.get(name, "").strip().lower()

        offload = options.get("CPU_OFFLOAD_GB", "").strip()
        remodelled = next(
            (name for name in _REMODELLING if options.get(name, "").strip() not in _NO_CHANGE), ""
        )
        return cls(
            max_model_len=number("MAX_MODEL_LEN"),
            tensor_parallel_size=number("TENSOR_PARALLEL_SIZE") or 1,
            pipeline_parallel_size=number("PIPELINE_PARALLEL_SIZE") or 1,
            data_parallel_size=number("DATA_PARALLEL_SIZE") or 1,
            dtype=word("DTYPE") or "auto",
            quantization=word("QUANTIZATION"),
            kv_cache_dtype=word("KV_CACHE_DTYPE") or "auto",
            gpu_memory_utilization=gpu_memory_utilization,
            kv_cache_memory_bytes=number("KV_CACHE_MEMORY_BYTES"),
            max_num_seqs=number("MAX_NUM_SEQS"),
            max_num_batched_tokens=number("MAX_NUM_BATCHED_TOKENS"),
            block_size=number("BLOCK_SIZE"),
            enforce_eager=word("ENFORCE_EAGER") in _TRUE,
            cpu_offload_bytes=int(float(offload) * GIB) if _is_number(offload) else 0,
            remodelled_by=remodelled,
        )

    def unclear_of(self, shape: Shape) -> str:
        """Return the setting that makes an estimate of this model worthless, if one does."""
        own = self.quantization and self.quantization not in _ON_THE_FLY
        # By itself it names how the files are quantised; these are not, vLLM does it.
        return self.remodelled_by or ("QUANTIZATION" if own and not shape.quantization else "")

    @property
    def devices(self) -> int:
        """How many devices hold one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


def weights_bytes(shape: Shape, settings: FitSettings) -> int:
    """Return the bytes of the weights on the device that holds most of them."""
    target = _dtype_bytes(shape, settings)
    smaller = 0.0 if shape.quantization else _ON_THE_FLY.get(settings.quantization, 0.0)
    if not shape.tensors:
        stored = DTYPES.get(shape.dtype)
        ratio = (smaller or target) / stored if stored and not shape.quantization else 1.0
        return int(shape.file_bytes * ratio / settings.devices)
    in_layers = others = 0.0
    for tensor in shape.tensors:
        if shape.is_tied and tensor.name.endswith("lm_head.weight"):
            continue
        size = float(tensor.stored_bytes)
        if tensor.dtype in FLOATS and not shape.quantization:
            size = tensor.elements * (smaller if smaller and tensor.is_linear else target)
        if tensor.in_layer:
            in_layers += size
        else:
            others += size
    stages = settings.pipeline_parallel_size
    layers = shape.number("num_hidden_layers", "n_layer", "num_layers") or stages
    largest_stage = in_layers * math.ceil(layers / stages) / layers
    total = (largest_stage + others) / settings.tensor_parallel_size
    return max(0, int(total) - settings.cpu_offload_bytes)


def _dtype_bytes(shape: Shape, settings: FitSettings) -> int:
    """Return the bytes of a number of the loaded model: vLLM makes 16 bits of 32 by itself."""
    return DTYPES.get(settings.dtype, 2)


PROCESS_BYTES = GIB // 2
"""Of the allowance what no setting takes away: a process's CUDA context and libraries."""


def allowance_bytes(shape: Shape, settings: FitSettings, memory: Memory | None) -> int:
    """Return what the work itself may take on a device: a stated guess, vLLM measures it.

    0.5 GiB for the process (CUDA context, libraries), as much again for messages between devices,
    1 GiB for CUDA graphs unless ENFORCE_EAGER; for a batch of MAX_NUM_BATCHED_TOKENS 4 hidden and 3
    intermediate vectors each; for each of MAX_NUM_SEQS sequences 2 vectors of 32-bit logits.
    """
    gpu = memory is not None and memory.kind == "gpu"
    places, batch = seats(memory)
    fixed = PROCESS_BYTES * (2 if settings.devices > 1 else 1)
    if gpu and not settings.enforce_eager:
        fixed += GIB
    hidden = shape.number("hidden_size", "n_embd") or 0
    experts = shape.number("num_experts_per_tok") or 1
    inner = (shape.number("moe_intermediate_size") or 0) * experts
    inner = inner or (shape.number("intermediate_size") or 4 * hidden) * experts
    tokens = settings.max_num_batched_tokens or batch
    vectors = 4 * hidden + 3 * inner // settings.tensor_parallel_size
    logits = (settings.max_num_seqs or places) * (shape.number("vocab_size") or 0) * 4 * 2
    return fixed + tokens * vectors * _dtype_bytes(shape, settings) + logits


def seats(memory: Memory | None) -> tuple[int, int]:
    """Return vLLM's defaults of MAX_NUM_SEQS and MAX_NUM_BATCHED_TOKENS (0.32, its server's)."""
    if memory is None or memory.kind == "cpu":
        return 128, 2048
    if memory.total_bytes >= 160 * GIB:
        return 1024, 16384
    if memory.total_bytes >= 70 * GIB and "a100" not in memory.name.lower():
        return 1024, 8192
    return 256, 2048


def sequence_bytes(
    shape: Shape, settings: FitSettings, memory: Memory | None
) -> Callable[[int], int] | None:
    """Return how many bytes of a device's KV cache a sequence of so many tokens takes."""
    attention, kind = shape.attention, settings.kv_cache_dtype
    if attention is None:
        return None
    if kind == "auto":
        kept = any(map(shape.quantization.get, ("kv_cache_scheme", "kv_cache_quant_algo")))
        size = 1.0 if kept else float(_dtype_bytes(shape, settings))
    elif kind.startswith(("fp8", "int8")):
        size = 1.0
    elif kind in _KV_BYTES:
        size = _KV_BYTES[kind]
    else:
        return None
    stages = settings.pipeline_parallel_size
    heads = max(1, attention.heads // settings.tensor_parallel_size)
    numbers = attention.latent or heads * attention.numbers_per_head
    windowed = math.ceil(attention.windowed_layers / stages)
    whole = math.ceil(attention.layers / stages) - windowed
    batch = settings.max_num_batched_tokens or seats(memory)[1]

    def needs(tokens: int) -> int:
        # A window is kept together with the batch that moves it on.
        seen = min(tokens, attention.window + batch) if windowed else 0
        return int((whole * tokens + windowed * seen) * numbers * size)

    return needs


def parse_tokens(text: str) -> int | None:
    """Read a number as vLLM does (4096, 4k = 4,000, 4K = 4,096); None for anything else."""
    factors = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    factors |= {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    text = text.strip()
    factor = factors.get(text[-1:], 1)
    digits = text[:-1] if factor > 1 else text
    if not _is_number(digits):
        return None
    value = int(float(digits) * factor)
    return value if value > 0 else None


def _is_number(text: str) -> bool:
    whole, _, fraction = text.partition(".")
    return whole.isdecimal() and (not fraction or fraction.isdecimal())
