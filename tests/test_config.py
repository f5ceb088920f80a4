"""The worker's settings: every name, every default, every fault, and no value in any of them."""

from pathlib import Path
from typing import Any

import pytest

import config
from config import SETTINGS, Settings
from keys import generate_key

OPTIONS = frozenset({"MAX_MODEL_LEN", "QUANTIZATION", "TENSOR_PARALLEL_SIZE", "TOOL_CALL_PARSER"})
NOWHERE = Path("/nowhere")
ENOUGH = {
    "MODELS": "org/name",
    "ENCRYPTION_KEY": generate_key(),
    "RUNPOD_ENDPOINT_ID": "endpoint",
    "HOME": "/home/somebody",
}


def read(**given: str) -> tuple[Settings, list[str]]:
    return config.read({**ENOUGH, **given}, OPTIONS, NOWHERE)


def test_what_must_be_set_is_enough() -> None:
    settings, faults = read()
    assert faults == []
    assert settings == Settings(
        models=("org/name",),
        encryption_key=ENOUGH["ENCRYPTION_KEY"],
        endpoint_id="endpoint",
        hf_home=config.default_hf_home(ENOUGH, NOWHERE),
    )


def test_what_must_be_set_is_missed_all_at_once() -> None:
    _, faults = config.read({}, OPTIONS, NOWHERE)
    assert [fault.split()[0] for fault in faults] == [
        "MODELS",
        "ENCRYPTION_KEY",
        "RUNPOD_ENDPOINT_ID",
    ]


@pytest.mark.parametrize(
    ("name", "text", "attribute", "value"),
    [
        ("MODELS", "a/b, /models/c ,d/e@main", "models", ("a/b", "/models/c", "d/e@main")),
        ("ENCRYPTION_KEY", " text ", "encryption_key", "text"),
        ("HPKE_PRIVATE_KEY", " a, b", "hpke_private_key", "a, b"),
        ("ALLOW_WITHOUT_HPKE", "1", "allow_without_hpke", True),
        ("HF_TOKEN", "token", "hf_token", "token"),
        ("HF_HOME", "/data", "hf_home", Path("/data")),
        ("HF_HOME", "~/data", "hf_home", Path.home() / "data"),
        ("HF_ENDPOINT", "http://hub", "hf_endpoint", "http://hub"),
        ("HF_HUB_OFFLINE", "1", "offline", True),
        ("MODEL_PATH", "/model", "model_path", Path("/model")),
        ("MODEL_DIRS", "/a:/b, c", "model_dirs", (Path("/a"), Path("/b"), Path("c"))),
        ("MODEL_SWAP", "true", "model_swap", True),
        ("SERVED_MODEL_NAME", "a,b", "served_model_name", ("a", "b")),
        ("GPU_MEMORY_UTILIZATION", "0.5", "gpu_memory_utilization", 0.5),
        ("MAX_CONCURRENCY", "7", "max_concurrency", 7),
        ("ALLOW_PLAINTEXT", "True", "allow_plaintext", True),
        ("ALLOW_PLAINTEXT", "off", "allow_plaintext", False),
        ("MAX_TTL_S", "60", "max_ttl_s", 60),
        ("CLOCK_SKEW_S", "0", "clock_skew_s", 0),
        ("STREAM_INTERVAL_MS", "100", "stream_interval_ms", 100),
        ("REPLAY_REDIS_URL", "redis://host", "replay_redis_url", "redis://host"),
        ("REPLAY_REDIS_UNAVAILABLE", "Accept", "may_do_without_redis", True),
        ("REPLAY_REDIS_UNAVAILABLE", "refuse", "may_do_without_redis", False),
        ("MAX_REQUEST_BYTES", "1024", "max_request_bytes", 1024),
        ("MAX_CHOICES", "1", "max_choices", 1),
        ("MAX_INPUTS", "10", "max_inputs", 10),
        ("MAX_QUEUE_S", "0", "max_queue_s", 0),
        ("ENGINE_STUCK_S", "30", "engine_stuck_s", 30),
        ("COMPILE_CACHE", "false", "compile_cache", False),
        ("RUNPOD_ENDPOINT_ID", "other", "endpoint_id", "other"),
        ("RUNPOD_POD_ID", "pod-1", "worker_id", "pod-1"),
    ],
)
def test_a_setting_is_read(name: str, text: str, attribute: str, value: Any) -> None:
    settings, faults = read(**{name: text})
    assert faults == []
    assert getattr(settings, attribute) == value


def test_every_setting_is_tried_above_and_described() -> None:
    tried = {
        mark.args[1][row][0]
        for mark in test_a_setting_is_read.pytestmark
        for row in range(len(mark.args[1]))
    }
    assert tried == {setting.name for setting in SETTINGS}
    fields = set(Settings.__dataclass_fields__) - {"engine_options"}
    assert {setting.attribute for setting in SETTINGS} == fields
    assert all(setting.meaning and setting.default for setting in SETTINGS)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("HF_HUB_OFFLINE", "maybe", "neither true nor false"),
        ("ALLOW_PLAINTEXT", "ja", "neither true nor false"),
        ("GPU_MEMORY_UTILIZATION", "plenty", "not a number"),
        ("GPU_MEMORY_UTILIZATION", "0", "not above 0 and at most 1"),
        ("GPU_MEMORY_UTILIZATION", "1.1", "not above 0 and at most 1"),
        ("GPU_MEMORY_UTILIZATION", "nan", "not above 0 and at most 1"),
        ("MAX_CONCURRENCY", "many", "not a whole number"),
        ("MAX_CONCURRENCY", "0", "not between 1 and 4096"),
        ("MAX_CONCURRENCY", "1.5", "not a whole number"),
        ("MAX_TTL_S", "-1", "not between"),
        ("CLOCK_SKEW_S", "3601", "not between 0 and 3600"),
        ("STREAM_INTERVAL_MS", "60001", "not between 0 and 60000"),
        ("REPLAY_REDIS_UNAVAILABLE", "ignore", "neither refuse nor accept"),
        ("MAX_REQUEST_BYTES", "1023", "not between 1024 and 15728640"),
        ("MAX_CHOICES", "0", "not between 1 and 16384"),
    ],
)
def test_a_value_that_cannot_be_is_named_and_not_quoted(name: str, text: str, says: str) -> None:
    _, faults = read(**{name: text})
    (fault,) = faults
    assert fault.startswith(f"{name} is ")
    assert says in fault
    if not text.isdigit():
        assert text not in fault


def test_all_faults_are_told_together() -> None:
    _, faults = config.read(
        {"MAX_CONCURRENCY": "x", "ALLOW_PLAINTEXT": "x", "MAX_MODEL_LENGTH": "9"}, OPTIONS, NOWHERE
    )
    assert len(faults) == 6


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_value_counts_as_not_set(text: str) -> None:
    settings, faults = read(MAX_CONCURRENCY=text, MAX_MODEL_LEN=text)
    assert faults == []
    assert settings.max_concurrency is None
    assert not settings.engine_options


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MAX_CONCURENCY", "MAX_CONCURRENCY"),
        ("ALLOW_PLAIN_TEXT", "ALLOW_PLAINTEXT"),
        ("ENCRYPTION_KEYS", "ENCRYPTION_KEY"),
        ("SERVED_MODEL_NAMES", "SERVED_MODEL_NAME"),
        ("MAX_MODEL_LENGTH", "MAX_MODEL_LEN"),
        ("QUANTISATION", "QUANTIZATION"),
        ("TENSOR_PARALELL_SIZE", "TENSOR_PARALLEL_SIZE"),
    ],
)
def test_a_misspelt_name_is_a_fault_that_names_the_right_one(name: str, meant: str) -> None:
    _, faults = read(**{name: "zzz"})
    assert faults == [f"{name} is not a setting: did you mean {meant}?"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MODEL_NAME", "MODELS"),
        ("MODEL_REVISION", "MODELS=org/name@revision"),
        ("OPENAI_SERVED_MODEL_NAME_OVERRIDE", "SERVED_MODEL_NAME"),
    ],
)
def test_the_official_workers_names_are_translated(name: str, meant: str) -> None:
    _, faults = read(**{name: "zzz"})
    assert faults == [f"{name} is not a setting of this worker: use {meant}"]


ANY_ENVIRONMENT = """
    PATH HOME HOSTNAME LANG LC_ALL PWD OLDPWD SHLVL TERM USER LOGNAME SHELL EDITOR PS1 TZ
    DEBIAN_FRONTEND LD_LIBRARY_PATH LD_PRELOAD PYTHONUNBUFFERED PYTHONPATH VIRTUAL_ENV
    NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NVIDIA_REQUIRE_CUDA CUDA_VERSION
    CUDA_HOME CUDA_VISIBLE_DEVICES NCCL_VERSION NV_CUDA_LIB_VERSION TORCH_CUDA_ARCH_LIST
    VLLM_USAGE_SOURCE VLLM_LOGGING_LEVEL VLLM_CACHE_ROOT HF_HUB_CACHE
    HF_HUB_ENABLE_HF_TRANSFER TOKENIZERS_PARALLELISM OMP_NUM_THREADS MKL_NUM_THREADS
    RUNPOD_POD_ID RUNPOD_API_KEY RUNPOD_AI_API_KEY RUNPOD_WEBHOOK_GET_JOB RUNPOD_DC_ID
    RUNPOD_GPU_COUNT RUNPOD_MEM_GB RUNPOD_CPU_COUNT RUNPOD_PUBLIC_IP RUNPOD_TCP_PORT_22
    RUNPOD_VOLUME_ID PUBLIC_KEY JUPYTER_PASSWORD UV_CACHE_DIR PIP_INDEX_URL HTTP_PROXY
    HTTPS_PROXY NO_PROXY SSL_CERT_FILE
"""


def test_what_stands_in_any_environment_is_no_fault() -> None:
    """Names of shells, containers, CUDA images and RunPod pods."""
    names = ANY_ENVIRONMENT.split()
    _, faults = read(**dict.fromkeys(names, "x"))
    assert faults == []


def test_engine_options_are_taken_as_they_are() -> None:
    settings, faults = read(MAX_MODEL_LEN=" 2048 ", QUANTIZATION="awq", UNRELATED="x")
    assert faults == []
    assert settings.engine_options == {"MAX_MODEL_LEN": "2048", "QUANTIZATION": "awq"}


def test_models_are_kept_on_the_volume_where_there_is_one(tmp_path: Path) -> None:
    settings, _ = config.read(ENOUGH, OPTIONS, tmp_path)
    assert settings.hf_home == tmp_path / "huggingface-cache"
    assert settings.hub_cache == tmp_path / "huggingface-cache" / "hub"


def test_models_are_kept_with_the_user_where_there_is_none() -> None:
    settings, _ = read(XDG_CACHE_HOME="/cache")
    assert settings.hf_home == Path("/cache/huggingface")
    assert read(HF_HOME="/elsewhere")[0].hf_home == Path("/elsewhere")
    assert read()[0].hf_home == Path.home() / ".cache" / "huggingface"


def test_secrets_are_in_no_repr() -> None:
    settings, _ = read(HF_TOKEN="hf_secret", HPKE_PRIVATE_KEY="hpke_secret")
    assert ENOUGH["ENCRYPTION_KEY"] not in repr(settings)
    assert "hf_secret" not in repr(settings) and "hpke_secret" not in repr(settings)


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"XDG_CACHE_HOME": "/cache"}, Path("/cache/sealed-vllm/compile")),
        ({"COMPILE_CACHE": "on"}, Path.home() / ".cache/sealed-vllm/compile"),
        ({"COMPILE_CACHE": "off"}, None),
    ],
)
def test_what_is_compiled_is_kept_unless_that_is_switched_off(
    environ: dict[str, str], folder: Path | None
) -> None:
    settings, _ = config.read(environ, ())
    assert config.local_compile_folder(environ, settings) == folder
