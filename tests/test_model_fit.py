"""The estimate of a model's size, on models made of headers alone, and of the memory there is.

What the real engine makes of the same numbers is in test_engine.py and test_engine_routes.py.
"""

import json
import logging
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import machine_memory
import model_shape
from errors import ModelTooLarge
from machine_memory import Memory
from model_fit import Estimate, advice, check, estimate
from model_needs import FitSettings, parse_tokens, weights_bytes
from model_shape import Attention, Shape

GIB = 2**30
LOG = logging.getLogger("test.fit")

# Layers of Llama 3.1 8B: 8.03 billion parameters, and 8 heads of 128 numbers for keys and values.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
TOKEN_BYTES = 2 * 32 * 8 * 128 * 2
PARAMETERS = 2 * 128256 * 4096 + 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)


def headers(dtype: str = "BF16", size: int = 2) -> dict[str, Any]:
    """Return the header of a Llama's weights, which are nowhere."""
    shapes = {"model.embed_tokens.weight": (128256, 4096), "lm_head.weight": (128256, 4096)}
    for layer in range(32):
        for name, dims in {
            "self_attn.q_proj": (4096, 4096),
            "self_attn.k_proj": (1024, 4096),
            "self_attn.v_proj": (1024, 4096),
            "self_attn.o_proj": (4096, 4096),
            "mlp.gate_proj": (14336, 4096),
            "mlp.up_proj": (14336, 4096),
            "mlp.down_proj": (4096, 14336),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = dims
    found: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dims in shapes.items():
        end = at + size * math.prod(dims)
        found[name] = {"dtype": dtype, "shape": list(dims), "data_offsets": [at, end]}
        at = end
    return found


def llama(dtype: str = "BF16", size: int = 2, **config: Any) -> Shape:
    sizes = {"model.safetensors": size * PARAMETERS}
    return model_shape.of_parts(
        {**LLAMA, **config}, sizes, {"model.safetensors": headers(dtype, size)}
    )


def gpu(gib: float, count: int = 1) -> Memory:
    return Memory("gpu", "a GPU", count, int(gib * GIB), int(gib * GIB))


def cpu(gib: float) -> Memory:
    return Memory("cpu", "this machine", 1, int(gib * GIB), int(gib * GIB))


def fit(memory: Memory | None, shape: Shape | None = None, **settings: Any) -> Estimate:
    return estimate(shape or llama(), FitSettings(**settings), memory)


# --- weights ---


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 2 * PARAMETERS),
        ({"dtype": "float32"}, 4 * PARAMETERS),
        ({"tensor_parallel_size": 2}, PARAMETERS),
        # The stage that holds the embedding, or the head, or by this estimate both.
        ({"pipeline_parallel_size": 2}, PARAMETERS + 2 * 128256 * 4096),
        # What is quantised while it is loaded are the matrices inside layers.
        ({"quantization": "fp8"}, PARAMETERS + 2 * 128256 * 4096),
        ({"cpu_offload_bytes": GIB}, 2 * PARAMETERS - GIB),
    ],
)
def test_weights_are_what_the_headers_and_the_settings_say(
    settings: dict[str, Any], expected: int
) -> None:
    assert weights_bytes(llama(), FitSettings(**settings)) == expected


def test_32_bit_weights_are_loaded_as_16() -> None:
    assert weights_bytes(llama("F32", 4), FitSettings()) == 2 * PARAMETERS


def test_quantised_weights_count_as_they_are_stored() -> None:
    shape = llama("I8", 1, quantization_config={"quant_method": "gptq"})
    assert weights_bytes(shape, FitSettings(quantization="gptq")) == PARAMETERS


def test_a_tied_head_is_not_loaded() -> None:
    tied = weights_bytes(llama(tie_word_embeddings=True), FitSettings())
    assert tied == 2 * (PARAMETERS - 128256 * 4096)


def test_weights_without_headers_count_by_their_files() -> None:
    shape = model_shape.of_parts(
        {**LLAMA, "torch_dtype": "float32"}, {"a.bin": 4000, "b.bin": 400}, {}
    )
    assert weights_bytes(shape, FitSettings()) == 2200
    assert weights_bytes(Shape(1000), FitSettings(tensor_parallel_size=2)) == 500


def test_checkpoints_beside_a_model_are_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "model.safetensors").write_bytes(bytes(5000))
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(1000))
    assert model_shape.of_folder(tmp_path).file_bytes == 1000


@pytest.mark.parametrize(("value", "unclear"), [("8", "OFFLOAD_GROUP_SIZE"), ("0", "")])
def test_what_divides_a_model_in_other_ways_is_told(value: str, unclear: str) -> None:
    settings = FitSettings.read({"OFFLOAD_GROUP_SIZE": value}, 0.9)
    assert settings.unclear_of(Shape(1000)) == unclear


# --- the KV cache ---


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, Attention(32, 8, 256)),
        ({"num_key_value_heads": None, "head_dim": None}, Attention(32, 32, 256)),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, Attention(32, 1, 0, 576)),
        ({"sliding_window": 4096}, Attention(32, 8, 256, 0, 32, 4096)),
        ({"sliding_window": 4096, "use_sliding_window": False}, Attention(32, 8, 256)),
        (
            {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"] * 16},
            Attention(32, 8, 256, 0, 16, 512),
        ),
        ({"sliding_window": 512, "sliding_window_pattern": 6}, Attention(32, 8, 256, 0, 27, 512)),
        ({"num_kv_shared_layers": 12}, Attention(20, 8, 256)),
        ({"architectures": ["JambaForCausalLM"], "mamba_d_state": 16}, None),
        ({"layer_types": ["linear_attention"] * 32}, None),
        ({"architectures": ["BertModel"]}, None),
        ({"is_encoder_decoder": True}, None),
        ({"num_hidden_layers": None}, None),
        ({"num_key_value_heads": None, "block_configs": [{}] * 32}, None),
    ],
)
def test_attention_is_read_from_the_configuration(
    config: dict[str, Any], expected: Attention | None
) -> None:
    shape = llama(**config)
    assert shape.attention == expected
    assert bool(shape.unknown) == (expected is None)


def test_a_multimodal_model_is_measured_by_its_language_model() -> None:
    config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": LLAMA}
    shape = model_shape.of_parts(config, {}, {})
    assert shape.attention == Attention(32, 8, 256)
    assert (shape.max_model_len, shape.dtype) == (131072, "bfloat16")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, TOKEN_BYTES),
        ({"kv_cache_dtype": "fp8"}, TOKEN_BYTES // 2),
        ({"kv_cache_dtype": "fp8_e4m3"}, TOKEN_BYTES // 2),
        ({"tensor_parallel_size": 4}, TOKEN_BYTES // 4),
        # 8 heads cannot be cut into 16.
        ({"tensor_parallel_size": 16}, TOKEN_BYTES // 8),
        ({"pipeline_parallel_size": 2}, TOKEN_BYTES // 2),
        ({"kv_cache_dtype": "of tomorrow"}, None),
    ],
)
def test_a_token_takes_its_part_of_the_cache(
    settings: dict[str, Any], expected: int | None
) -> None:
    assert fit(gpu(80), **settings).kv_bytes_per_token == expected


def test_layers_with_a_window_keep_no_more_than_that() -> None:
    half = ["sliding_attention", "full_attention"] * 16
    whole = fit(gpu(80), llama()).kv_bytes_per_token
    windowed = fit(gpu(80), llama(sliding_window=512, layer_types=half)).kv_bytes_per_token
    assert whole is not None and windowed is not None
    assert 0.5 < windowed / whole < 0.6


def test_short_requests_take_more_of_each_token_where_there_are_windows() -> None:
    shape = llama(sliding_window=1024, sliding_window_pattern=6)
    found = fit(gpu(80), shape, max_num_seqs=10_000, max_num_batched_tokens=1024)
    assert found.kv_bytes
    for tokens in (1024, 4096, 131_072):
        seen = 5 * tokens + 27 * min(tokens, 2048)
        expected = found.kv_bytes / (seen * TOKEN_BYTES / 32)
        assert found.at_once(tokens) == pytest.approx(expected, rel=0.01, abs=1)


def test_an_explicit_cache_is_counted_in_whole_blocks() -> None:
    found = fit(gpu(80), kv_cache_memory_bytes=33 * TOKEN_BYTES, max_model_len=16)
    assert found.kv_tokens == 32
    assert found.at_once(16) == 2
    assert fit(gpu(80), kv_cache_memory_bytes=33 * TOKEN_BYTES, block_size=32).kv_tokens == 32


def test_each_copy_of_the_model_serves_on_its_own() -> None:
    one, two = fit(gpu(80)), fit(gpu(80, 2), data_parallel_size=2)
    assert one.kv_tokens is not None
    assert (two.kv_tokens, two.devices) == (2 * one.kv_tokens, 2)


def test_not_more_run_at_once_than_the_scheduler_takes() -> None:
    assert fit(gpu(80), max_num_seqs=7).at_once(16) == 7


# --- the verdict ---


@pytest.mark.parametrize(
    ("memory", "settings", "verdict", "certain"),
    [
        (gpu(80), {}, "fits", True),
        (gpu(24), {"max_model_len": 8192}, "fits", True),
        # Weights alone.
        (gpu(12), {}, "too large", True),
        (cpu(12), {}, "too large", True),
        # The whole context, wished for by nobody: vLLM will say so, and may be told otherwise.
        (gpu(24), {}, "too large", False),
        (gpu(24), {"max_model_len": 131072}, "too large", True),
        (cpu(64), {"max_model_len": 131072}, "too large", True),
        (cpu(64), {"max_model_len": 32768}, "fits", True),
        # Only the guess stands between it and fitting.
        (gpu(24), {"max_model_len": 60000}, "tight", False),
        # What is not known stops nothing.
        (None, {}, "not known", False),
        (gpu(1), {"remodelled_by": "HF_OVERRIDES"}, "not known", False),
        (gpu(1), {"quantization": "experts_int8"}, "not known", False),
        (gpu(12), {"cpu_offload_bytes": 1}, "too large", False),
        # Processes share a machine's memory.
        (
            cpu(25),
            {"tensor_parallel_size": 2, "max_model_len": 8192, "kv_cache_memory_bytes": 5 * GIB},
            "tight",
            False,
        ),
    ],
)
def test_the_verdict_is_certain_only_where_vllm_could_only_fail(
    memory: Memory | None, settings: dict[str, Any], verdict: str, certain: bool
) -> None:
    found = fit(memory, **settings)
    assert (found.verdict, found.certain) == (verdict, certain)


def test_gpus_that_are_not_there_are_told_but_left_to_vllm() -> None:
    found = fit(gpu(80), tensor_parallel_size=2, pipeline_parallel_size=2)
    assert (found.verdict, found.certain, found.changes) == ("too large", False, ())
    assert "is to run on 4 GPUs, and this worker has 1" in found.why


def test_a_cache_of_unknown_kind_stops_nothing() -> None:
    found = fit(gpu(24), llama(architectures=["MambaForCausalLM"]), max_model_len=10**9)
    assert (found.verdict, found.certain) == ("not known", False)
    assert "is not" in found.why
    assert fit(gpu(12), llama(architectures=["MambaForCausalLM"])).verdict == "too large"


def test_experts_spread_over_copies_are_not_judged() -> None:
    found = fit(gpu(12, 2), llama(num_experts=8), data_parallel_size=2)
    assert (found.verdict, found.certain) == ("too large", False)


@pytest.mark.parametrize("settings", [{}, {"max_model_len": 131072}])
@pytest.mark.parametrize("gib", [8, 12, 16, 18, 24])
def test_every_change_that_is_proposed_helps(gib: float, settings: dict[str, Any]) -> None:
    found = fit(gpu(gib), **settings)
    assert found.verdict == "too large"
    assert found.changes
    for change in found.changes:
        if change.beside:
            continue  # another GPU or checkpoint: below
        options = {name.upper(): str(value) for name, value in settings.items()}
        changed = FitSettings.read({**options, **change.settings}, 0.95)
        assert estimate(llama(), changed, gpu(gib, changed.devices)).verdict == "fits", change


def test_the_longest_that_fits_is_the_longest() -> None:
    (change, *_) = fit(gpu(24)).changes
    assert change.settings.keys() == {"MAX_MODEL_LEN"}
    longest = int(change.settings["MAX_MODEL_LEN"])
    assert fit(gpu(24), max_model_len=longest).verdict == "fits"
    assert fit(gpu(24), max_model_len=longest + 256).verdict == "tight"


@pytest.mark.parametrize("gib", [0.01, 1, 12, 24])
def test_the_gpu_that_is_proposed_holds_the_model_and_the_next_smaller_does_not(gib: float) -> None:
    (last,) = (change for change in fit(gpu(gib)).changes if change.beside.startswith("a GPU"))
    assert last.beside == "a GPU with 40 GB"
    assert fit(gpu(40)).verdict == "fits"
    assert fit(gpu(32)).verdict != "fits"


def test_a_gpu_without_room_for_the_process_is_too_small() -> None:
    small = model_shape.of_parts({**LLAMA, "num_hidden_layers": 1}, {}, {})
    found = fit(gpu(0.4), small, max_model_len=16)
    assert (found.verdict, found.certain) == ("too large", False)
    assert "512.00 MiB for the process itself" in found.why


def test_cuda_graphs_are_given_up_where_nothing_else_helps() -> None:
    small = model_shape.of_parts({**LLAMA, "num_hidden_layers": 1}, {}, {})
    found = fit(gpu(1.9), small, max_model_len=16)
    assert [dict(change.settings) for change in found.changes] == [{"ENFORCE_EAGER": "true"}, {}]


def test_heads_are_divided_evenly_or_not_at_all() -> None:
    found = fit(gpu(80, 7), tensor_parallel_size=7)
    assert (found.verdict, found.certain) == ("cannot run", True)
    assert found.why == "has 32 attention heads, which cannot be divided evenly over 7 devices"
    assert [dict(change.settings) for change in found.changes] == [
        {"TENSOR_PARALLEL_SIZE": "4"},
        {"TENSOR_PARALLEL_SIZE": "1", "PIPELINE_PARALLEL_SIZE": "7"},
    ]
    assert "\n- TENSOR_PARALLEL_SIZE=1 PIPELINE_PARALLEL_SIZE=7: layers " in advice(found)
    for change in found.changes:
        settings = FitSettings.read(change.settings, 0.95)
        assert estimate(llama(), settings, gpu(80, 7)).verdict == "fits"
    assert fit(None, tensor_parallel_size=7).verdict == "cannot run"
    changed = fit(gpu(80, 7), tensor_parallel_size=7, remodelled_by="HF_OVERRIDES")
    assert changed.verdict == "not known"


def test_a_machine_without_gpu_may_get_a_larger_cache() -> None:
    found = fit(cpu(64), max_model_len=100_000)
    assert "KV_CACHE_MEMORY_BYTES" in {name for each in found.changes for name in each.settings}
    assert "TENSOR_PARALLEL_SIZE" not in {name for each in found.changes for name in each.settings}


# --- a start ---


def model(folder: Path, config: Mapping[str, Any] | None = None) -> Path:
    """Put down a model whose weights are a header before nothing."""
    (folder / "config.json").write_text(json.dumps(LLAMA if config is None else config))
    header = json.dumps(headers()).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder


def test_a_start_ends_with_numbers_and_with_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(ModelTooLarge) as raised:
        check(model(tmp_path), "org/big", {"MAX_MODEL_LEN": "4k"}, 0.9, LOG, gpu(12))
    text = str(raised.value)
    assert text.startswith("org/big cannot fit: it takes 14.96 GiB for its weights, and a GPU has")
    assert "12.00 GiB, of which vLLM takes 10.80 GiB" in text
    assert "\n- a checkpoint in 4 bits (AWQ, GPTQ): weights of 5." in text
    assert "\n- a GPU with 20 GB: with these settings" in text
    assert "\n- TENSOR_PARALLEL_SIZE=2: 2 GPUs per worker, weights of 7.48 GiB on each" in text


def test_a_doubt_is_a_word_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = check(model(tmp_path), "org/big", {}, 0.95, LOG, gpu(24))
    assert found is not None and found.verdict == "too large"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "MAX_MODEL_LEN=" in record.getMessage()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": "many"},
        {"architectures": ["LlamaForCausalLM"], "text_config": 3, "num_hidden_layers": 0},
        {**LLAMA, "num_attention_heads": 0},
        {**LLAMA, "layer_types": [1, None]},
        {**LLAMA, "architectures": 5},
        {**LLAMA, "rope_scaling": {"factor": "x", "type": "yarn"}},
        [],
    ],
)
def test_a_strange_configuration_stops_no_start(tmp_path: Path, config: Any) -> None:
    check(model(tmp_path, config), "org/strange", {}, 0.95, LOG, gpu(80))


def test_files_without_a_header_stop_no_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    assert check(tmp_path, "org/odd", {}, 0.95, LOG, gpu(80)) is None
    assert "could not be estimated" in caplog.text


@pytest.mark.parametrize(
    ("text", "number"),
    [("4096", 4096), ("4k", 4000), ("4K", 4096), ("1.5k", 1500), ("2G", 2 * GIB)]
    + [(text, None) for text in ("", "auto", "-1", "0", "x", "4kk", "k", "1e3")],
)
def test_numbers_are_read_as_vllm_reads_them(text: str, number: int | None) -> None:
    assert parse_tokens(text) == number


# --- the memory ---


def kernel(root: Path, groups: str, files: Mapping[str, str]) -> Path:
    """Lay out what the kernel shows of a machine with 64 GiB, 32 of them available."""
    texts = {
        "proc/meminfo": f"MemTotal: {64 * 2**20} kB\nMemAvailable: {32 * 2**20} kB\n",
        "proc/self/cgroup": groups,
        **files,
    }
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "sys/fs/cgroup/"
V1 = "sys/fs/cgroup/memory/"


@pytest.mark.parametrize(
    ("groups", "files", "total_gib", "available_gib"),
    [
        ("0::/\n", {}, 64, 32),
        ("0::/\n", {V2 + "memory.max": "max\n", V2 + "memory.current": "1"}, 64, 32),
        (
            "0::/\n",
            {
                V2 + "memory.max": f"{8 * GIB}\n",
                V2 + "memory.current": f"{5 * GIB}\n",
                V2 + "memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
            },
            8,
            5,
        ),
        # The limit of a group above binds as well.
        (
            "0::/a/b\n",
            {
                V2 + "a/memory.max": f"{4 * GIB}",
                V2 + "a/memory.current": f"{GIB}",
                V2 + "a/memory.stat": "anon 1",
                V2 + "a/b/memory.max": "max",
                V2 + "a/b/memory.current": "0",
            },
            4,
            3,
        ),
        (
            "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n",
            {
                V1 + "memory.limit_in_bytes": f"{16 * GIB}",
                V1 + "memory.usage_in_bytes": f"{6 * GIB}",
                V1 + "memory.stat": f"cache 1\ntotal_inactive_file {GIB}\n",
            },
            16,
            11,
        ),
        # Version 1 writes "no limit" as a number beyond every machine.
        (
            "4:memory:/\n",
            {
                V1 + "memory.limit_in_bytes": "9223372036854771712",
                V1 + "memory.usage_in_bytes": "1",
                V1 + "memory.stat": "",
            },
            64,
            32,
        ),
    ],
)
def test_a_container_has_the_memory_of_its_limit(
    tmp_path: Path, groups: str, files: Mapping[str, str], total_gib: int, available_gib: int
) -> None:
    root = kernel(tmp_path, groups, files)
    assert machine_memory.total_bytes(root) == total_gib * GIB
    assert machine_memory.available_bytes(root) == available_gib * GIB


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        (
            "NVIDIA H100 80GB HBM3, 81559, 81000\n",
            Memory("gpu", "NVIDIA H100 80GB HBM3", 1, 81559 * 2**20, 81000 * 2**20),
        ),
        # Of unequal ones the smallest counts.
        (
            "NVIDIA L4, 23034, 22000\nNVIDIA T4, 15360, 15000\n",
            Memory("gpu", "NVIDIA T4", 2, 15360 * 2**20, 15000 * 2**20),
        ),
        ("NVIDIA GB10, [N/A], [N/A]\n", None),
        ("", None),
    ],
)
def test_gpus_are_those_that_the_driver_shows(
    tmp_path: Path, printed: str, expected: Memory | None
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{printed}END\n")
    tool.chmod(0o755)
    assert machine_memory.gpus(str(tool)) == expected


def test_without_a_driver_there_are_no_gpus(tmp_path: Path) -> None:
    assert machine_memory.gpus(str(tmp_path / "none")) is None
    failing = tmp_path / "nvidia-smi"
    failing.write_text("#!/bin/sh\nexit 9\n")
    failing.chmod(0o755)
    assert machine_memory.gpus(str(failing)) is None
