"""`python utils.py plan` as people run it: on disk, and on a Hub of which only heads are read."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A Hub with `org/tiny` for everybody and `org/gated` for one account."""
    with Hub().serving() as hub:
        hub.add("org/tiny", MODEL)
        hub.add("org/gated", MODEL, gated=True)
        hub.add("org/words", {"README.md": b"# Nothing"})
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
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, content in MODEL.items():
        (folder / name).write_bytes(content)
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
    assert done.returncode == 1
    assert (
        "It does not fit: it takes 3.81 MiB for its weights, and the GPU has 3.00 MiB"
        in done.stdout
    )


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
        (["org/tiny", "--gpu-memory", "much"], "--gpu-memory is not a size"),
        (["org/tiny", "--max-model-len", "much"], "--max-model-len is not a number"),
        (["org/tiny", "--gpus", "0"], "--gpus is not a number above 0"),
    ],
)
def test_an_error_is_a_sentence(pod: Pod, words: list[str], says: str) -> None:
    done = pod.plan(*words)
    assert done.returncode not in (0, 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_offline_the_hub_is_not_asked(pod: Pod, hub: Hub) -> None:
    done = pod.plan("org/tiny", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "HF_HUB_OFFLINE" in done.stderr
    assert not hub.requests


def test_a_hub_that_refuses_is_named(pod: Pod, hub: Hub) -> None:
    hub.fault("status", path="/api/models/*", status=403)
    done = pod.plan("org/tiny")
    assert done.returncode == 1 and "denies access to org/tiny" in done.stderr
