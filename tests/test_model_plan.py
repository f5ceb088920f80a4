"""`python utils.py plan` as people run it: on disk, and on a Hub of which only heads are read."""

import ast
import importlib.util
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import config
import model_needs
import model_plan
import utils
from tests.hub import Hub

ROOT = Path(utils.__file__).parent
TOKEN = "hf_secretTokenOfTheTest"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}
TOKEN_BYTES = 2 * 2 * 1 * 32 * 2
SHARD_ELEMENTS = 1_000_000


def shard(layer: int, elements: int = SHARD_ELEMENTS) -> bytes:
    """Return a file with one matrix of 16-bit numbers."""
    entry = {"dtype": "BF16", "shape": [2, elements // 2], "data_offsets": [0, 2 * elements]}
    header = json.dumps({f"model.layers.{layer}.mlp.weight": entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(2 * elements)


MODEL: dict[str, bytes] = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b"{}",
    "model-00001-of-00002.safetensors": shard(0),
    "model-00002-of-00002.safetensors": shard(1),
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    ).encode(),
    "consolidated.safetensors": shard(0),
    "small.gguf": b"GGUF" + bytes(5000),
    "large.gguf": b"GGUF" + bytes(9000),
}
ADAPTER: dict[str, bytes] = {
    "adapter_config.json": json.dumps({"base_model_name_or_path": "org/tiny"}).encode(),
    "adapter_model.safetensors": shard(0, 1000),
    "config.json": json.dumps(CONFIG).encode(),
}


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A Hub with `org/tiny` for everybody and `org/gated` for one account."""
    with Hub().serving() as hub:
        hub.add("org/tiny", MODEL)
        hub.add("org/gated", MODEL, gated=True)
        hub.add("org/words", {"README.md": b"# Nothing"})
        hub.add("org/adapter", ADAPTER)
        hub.add("org/torn", {**MODEL, "config.json": b'{"arch'})
        hub.tokens.add(TOKEN)
        yield hub


class Pod:
    """A machine with an empty volume, on which the command is run."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.home = folder / "volume"
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "HF_HOME": str(self.home),
            "HF_ENDPOINT": hub.url,
        }

    def plan(self, *words: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-W", "error", "utils.py", "plan", *words],
            cwd=ROOT,
            env=self.environ | environ,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def numbers(self, *words: str, **environ: str) -> dict[str, Any]:
        done = self.plan(*words, "--json", **environ)
        assert done.stdout, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@pytest.fixture
def pod(tmp_path: Path, hub: Hub) -> Pod:
    hub.forget()
    hub.faults.clear()
    return Pod(tmp_path, hub)


def test_a_model_on_the_hub_is_planned_by_its_heads(pod: Pod, hub: Hub) -> None:
    found = pod.numbers("org/tiny", "--gpu-memory", "24GB")
    assert found["weights_bytes"] == 4 * SHARD_ELEMENTS
    assert found["kv_bytes_per_token"] == TOKEN_BYTES
    assert (found["verdict"], found["max_model_len"]) == ("fits", 4096)
    assert found["at_once"]["4096"] == 256
    # Not the weights: the first 100 kB of each, which is what the Hub's library asks for.
    assert hub.count("GET /cdn/*") == 2
    assert hub.body_bytes < 300_000
    assert not pod.home.exists()


def test_a_model_on_disk_needs_no_hub(pod: Pod, hub: Hub, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", MODEL)
    found = pod.numbers(str(folder), "--gpu-memory", "24GB")
    assert (found["model"], found["weights_bytes"]) == ("mine", 4 * SHARD_ELEMENTS)
    assert not hub.requests


def test_a_gguf_is_planned_by_its_size(pod: Pod) -> None:
    found = pod.numbers("org/tiny/small.gguf", "--gpu-memory", "24GB")
    assert (found["weights_bytes"], found["verdict"]) == (5004, "not known")


def test_for_people_it_is_a_table_and_a_sentence(pod: Pod) -> None:
    done = pod.plan("org/tiny", "--gpu-memory", "24GB", "--gpus", "2")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "org/tiny on 2 x the GPU, 24.00 GiB"
    assert "  requests of 4,096 tokens at once" in done.stdout
    assert lines[-1].startswith("It fits: it takes 1.91 MiB for its weights on each device and ")


def test_what_does_not_fit_ends_with_what_would(pod: Pod) -> None:
    done = pod.plan("org/tiny", "--gpu-memory", "3MB")
    assert done.returncode == 5
    assert (
        "It does not fit: it takes 3.81 MiB for its weights, and the GPU has 3.00 MiB"
        in done.stdout
    )
    assert done.stdout.endswith("what would help:\n- a GPU with 8 GB: with these settings\n")


@pytest.mark.parametrize(
    ("words", "code", "verdict"),
    [
        (["--gpu-memory", "10MB"], 5, "It does not fit"),
        (["--gpu-memory", "1.5GB"], 6, "It may be too tight"),
        (["--gpu-memory", "24GB", "--gpus", "7"], 5, "It cannot run with these settings"),
    ],
)
def test_the_verdict_has_a_code_and_a_remedy(
    pod: Pod, words: list[str], code: int, verdict: str
) -> None:
    done = pod.plan("org/tiny", *words)
    assert done.returncode == code
    assert verdict in done.stdout
    assert "what would help:\n- " in done.stdout


def test_without_a_name_it_is_the_first_of_models(pod: Pod) -> None:
    found = pod.numbers("--gpu-memory", "24GB", MODELS="org/tiny, org/none")
    assert found["model"] == "org/tiny"
    done = pod.plan()
    assert done.returncode == 3
    assert "- name a model, such as org/name, or set MODELS" in done.stderr


def test_what_is_not_known_has_a_code(pod: Pod) -> None:
    assert pod.plan("org/tiny/small.gguf", "--gpu-memory", "24GB").returncode == 6


@pytest.mark.parametrize("size", ["24GB", "24gib", "24G", "24 GB", "24576MiB", "0.0234375TB"])
def test_a_size_has_its_unit(pod: Pod, size: str) -> None:
    assert pod.numbers("org/tiny", "--gpu-memory", size)["memory"]["total_bytes"] == 24 * 2**30


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpu-memory", "24"], "24 is not a size, such as 24GB; with its unit, 24GB?"),
        (["--gpu-memory", "-5GB"], "-5GB is not a size, such as 24GB"),
        (["--gpu-memory", "0GB"], "0GB is not a size"),
        (["--gpu-memory", "much"], "much is not a size"),
        (["--max-model-len", "much"], "much is not a number of tokens"),
        (["--gpus", "0"], "0 is not a whole number above 0"),
        (["--gpus", "-1"], "-1 is not a whole number above 0"),
        (["--gpus", "two"], "two is not a whole number above 0"),
    ],
)
def test_a_wrong_argument_is_one(pod: Pod, hub: Hub, words: list[str], says: str) -> None:
    done = pod.plan("org/tiny", *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert not hub.requests


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("QUANTIZATION=fp9", "QUANTIZATION is none of vLLM 0.32: did you mean fp8?"),
        ("QUANTIZATION=bitsandbytes", "QUANTIZATION is none of vLLM 0.32: one of auto_awq, "),
        ("TENSOR_PARALLEL_SIZE=two", "TENSOR_PARALLEL_SIZE is not a whole number above 0"),
        ("DATA_PARALLEL_SIZE=0", "DATA_PARALLEL_SIZE is not a whole number above 0"),
        ("MAX_MODEL_LEN=8kk", "MAX_MODEL_LEN is not a number above 0"),
        ("MAX_NUM_SEQS=-1", "MAX_NUM_SEQS is not a whole number above 0"),
        ("DTYPE=bfloat61", "DTYPE is none of vLLM 0.32: did you mean bfloat16?"),
        ("ENFORCE_EAGER=maybe", "ENFORCE_EAGER is neither true nor false"),
        ("CPU_OFFLOAD_GB=much", "CPU_OFFLOAD_GB is not a number"),
        ("TENSOR_PARALEL_SIZE=2", "did you mean TENSOR_PARALLEL_SIZE?"),
        ("GPU_MEMORY_UTILISATION=0.9", "did you mean GPU_MEMORY_UTILIZATION?"),
    ],
)
def test_a_setting_that_stops_a_start_stops_the_plan(
    pod: Pod, hub: Hub, setting: str, says: str
) -> None:
    name, _, value = setting.partition("=")
    done = pod.plan("org/tiny", "--gpu-memory", "24GB", **{name: value})
    assert done.returncode == 3
    assert says in done.stderr
    assert not hub.requests


def test_the_words_of_quantization_are_those_of_vllm() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent / "model_executor/layers/quantization/__init__.py"
    (names,) = (
        node.value
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "QuantizationMethods"
    )
    assert isinstance(names, ast.Subscript)
    assert set(ast.literal_eval(names.slice)) == model_needs.QUANTIZATIONS


def test_no_other_setting_of_vllm_is_taken_for_a_misspelt_one() -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    source = ast.parse((Path(spec.origin).parent / "engine/arg_utils.py").read_text())
    names = {
        node.target.id.upper()
        for node in ast.walk(source)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert len(names) > 150
    names -= {"MODEL", "TOKENIZER"}
    assert not config.misspelt(dict.fromkeys(names, "x"), model_plan.SETTING_NAMES)


def test_the_settings_are_the_worker_s(pod: Pod) -> None:
    settings = {"MAX_MODEL_LEN": "2k", "KV_CACHE_DTYPE": "fp8", "MAX_NUM_SEQS": "3"}
    found = pod.numbers("org/tiny", "--gpu-memory", "24GB", **settings)
    assert found["kv_bytes_per_token"] == TOKEN_BYTES // 2
    assert (found["max_model_len"], found["max_num_seqs"]) == (2000, 3)
    asked = pod.numbers("org/tiny", "--gpu-memory", "24GB", "--max-model-len", "1K", **settings)
    assert asked["max_model_len"] == 1024
    divided = pod.numbers("org/tiny", "--gpu-memory", "24GB", "--gpus", "2")
    assert (divided["devices"], divided["weights_bytes"]) == (2, 2 * SHARD_ELEMENTS)
    staged = pod.numbers(
        "org/tiny", "--gpu-memory", "24GB", "--gpus", "2", PIPELINE_PARALLEL_SIZE="2"
    )
    assert staged["devices"] == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["org/none"], "there is no model org/none"),
        (["org/tiny@nowhere"], "no revision 'nowhere'"),
        (["org/gated"], "accept its licence"),
        (["org/words"], "no weights"),
        (["org/tiny/other.gguf"], "no other.gguf"),
        (["org/torn"], "config.json of org/torn on the Hub is damaged"),
        (
            ["org/adapter"],
            "org/adapter is a LoRA adapter and runs on its base model: plan that, org/",
        ),
    ],
)
def test_an_error_is_a_sentence(pod: Pod, words: list[str], says: str) -> None:
    done = pod.plan(*words)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({**MODEL, "config.json": b'{"arch'}, "config.json: not JSON"),
        ({**MODEL, "config.json": b"[]"}, "/torn/config.json is damaged"),
        (
            {
                "config.json": MODEL["config.json"],
                "model.safetensors": struct.pack("<Q", 2) + b"{}x",
            },
            "model.safetensors",
        ),
        (ADAPTER, "torn is a LoRA adapter and runs on its base model: plan that, org/tiny"),
    ],
)
def test_what_cannot_be_planned_on_disk_is_named(
    pod: Pod, tmp_path: Path, files: Mapping[str, bytes], says: str
) -> None:
    done = pod.plan(str(write(tmp_path / "torn", files)))
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_damaged_configuration_in_the_cache_is_not_passed_over(pod: Pod, hub: Hub) -> None:
    fetched = utils.resolve("org/tiny", hub_cache=pod.home / "hub", endpoint=hub.url)
    (fetched.path / "config.json").resolve().write_bytes(b"x" * len(MODEL["config.json"]))
    done = pod.plan("org/tiny", "--gpu-memory", "24GB")
    assert done.returncode == 1
    assert "config.json is damaged" in done.stderr and "--sha256 --repair" in done.stderr


def test_a_hub_that_nobody_answers_for_is_told_at_once_and_once(pod: Pod) -> None:
    began = time.monotonic()
    done = pod.plan("org/tiny", HF_ENDPOINT="http://127.0.0.1:1")
    assert time.monotonic() - began < 10
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "http://127.0.0.1:1" in line and "HF_ENDPOINT" in line


def test_a_busy_hub_is_asked_again_without_a_word(pod: Pod, hub: Hub) -> None:
    hub.fault("status", path="/api/models/*/tree/*", status=503)
    done = pod.plan("org/tiny", "--gpu-memory", "24GB")
    assert (done.returncode, done.stderr) == (0, "")


def test_offline_the_hub_is_not_asked(pod: Pod, hub: Hub) -> None:
    done = pod.plan("org/tiny", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "HF_HUB_OFFLINE" in done.stderr
    assert not hub.requests


def test_a_hub_that_refuses_is_named(pod: Pod, hub: Hub) -> None:
    hub.fault("status", path="/api/models/*", status=403)
    done = pod.plan("org/tiny")
    assert done.returncode == 1 and "denies access to org/tiny" in done.stderr
