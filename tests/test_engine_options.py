"""vLLM's engine arguments as settings, read off the installed vLLM."""

import dataclasses
import importlib.util
import warnings
from pathlib import Path
from typing import get_args

import pytest

import model_prefetch
from errors import ConfigError
from worker_environment import environment, prepare_libraries

prepare_libraries(environment())
with warnings.catch_warnings():  # torch warns of itself while it is imported
    warnings.simplefilter("ignore")
    from vllm.engine.arg_utils import AsyncEngineArgs

    from engine_options import EngineOptions, serve_args

TINY = Path(__file__).parent.parent / "models" / "tiny-llama"


@pytest.fixture(scope="module")
def options() -> EngineOptions:
    return EngineOptions()


def test_the_names_are_those_of_the_installed_vllm(options: EngineOptions) -> None:
    names = options.names()
    assert {
        "MAX_MODEL_LEN",
        "TENSOR_PARALLEL_SIZE",
        "QUANTIZATION",
        "TOOL_CALL_PARSER",
        "REASONING_PARSER",
        "ENFORCE_EAGER",
        "CHAT_TEMPLATE",
        "LORA_MODULES",
        "MAX_NUM_SEQS",
        "DTYPE",
    } <= names
    arguments = {entry.name.upper() for entry in dataclasses.fields(AsyncEngineArgs)}
    assert len(names & arguments) > 150
    # The worker's own, and what concerns sockets that it does not have.
    assert not names & {"MODEL", "SERVED_MODEL_NAME", "HF_TOKEN", "GPU_MEMORY_UTILIZATION"}
    assert not names & {"HOST", "PORT", "API_KEY", "SSL_KEYFILE", "ROOT_PATH", "MIDDLEWARE"}


@pytest.mark.parametrize(
    ("name", "text", "attribute", "value"),
    [
        ("MAX_MODEL_LEN", "2048", "max_model_len", 2048),
        ("MAX_MODEL_LEN", "4k", "max_model_len", 4000),
        ("TENSOR_PARALLEL_SIZE", "2", "tensor_parallel_size", 2),
        ("DTYPE", "bfloat16", "dtype", "bfloat16"),
        ("ENFORCE_EAGER", "true", "enforce_eager", True),
        ("ENFORCE_EAGER", "FALSE", "enforce_eager", False),
        ("ENABLE_PREFIX_CACHING", "1", "enable_prefix_caching", True),
        ("ENABLE_PREFIX_CACHING", "no", "enable_prefix_caching", False),
        ("TRUST_REMOTE_CODE", "off", "trust_remote_code", False),
        ("SEED", "-1", "seed", -1),
        ("CHAT_TEMPLATE", "{{ x }} y", "chat_template", "{{ x }} y"),
        ("LIMIT_MM_PER_PROMPT", '{"image": 2}', "limit_mm_per_prompt", {"image": 2}),
        ("DEFAULT_CHAT_TEMPLATE_KWARGS", '{"a": 1}', "default_chat_template_kwargs", {"a": 1}),
        ("HF_OVERRIDES", '{"rope_theta": 1}', "hf_overrides", {"rope_theta": 1}),
        ("LONG_PREFILL_TOKEN_THRESHOLD", "8", "long_prefill_token_threshold", 8),
    ],
)
def test_values_get_their_types(name: str, text: str, attribute: str, value: object) -> None:
    assert getattr(serve_args("m", ["n"], {name: text}, 0.5), attribute) == value


@pytest.mark.parametrize("text", ["a=/x b=/y", '["a=/x", "b=/y"]'])
def test_a_list_is_words_or_json(text: str) -> None:
    args = serve_args("m", ["n"], {"LORA_MODULES": text, "ENABLE_LORA": "true"}, 0.5)
    assert [(lora.name, lora.path) for lora in args.lora_modules] == [("a", "/x"), ("b", "/y")]


def test_json_items_of_a_list_stay_json() -> None:
    text = '[{"name": "a", "path": "/x"}]'
    args = serve_args("m", ["n"], {"LORA_MODULES": text, "ENABLE_LORA": "true"}, 0.5)
    assert [(lora.name, lora.path) for lora in args.lora_modules] == [("a", "/x")]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("MAX_MODEL_LEN", "abc", "abc"),
        ("TENSOR_PARALLEL_SIZE", "x", "int"),
        ("TENSOR_PARALLEL_SIZE", "1.5", "int"),
        ("TENSOR_PARALLEL_SIZE", "", "int"),
        ("DTYPE", "float12", "choice"),
        ("ENFORCE_EAGER", "maybe", "neither true nor false"),
        ("LIMIT_MM_PER_PROMPT", "{image", ""),
        ("LORA_MODULES", "[1,", ""),
        ("LORA_MODULES", '"unclosed', ""),
        ("LORA_MODULES", "a", ""),
        ("CHAT_TEMPLATE_CONTENT_FORMAT", "xml", "choice"),
        ("REVISION", "main", "org/name@revision"),
        ("DOWNLOAD_DIR", "/models", "HF_HOME"),
        ("ENABLE_LOG_REQUESTS", "true", "log"),
        ("ENABLE_LOG_OUTPUTS", "true", "log"),
        ("OTLP_TRACES_ENDPOINT", "http://x", "another host"),
    ],
)
def test_a_wrong_value_is_a_fault_that_names_the_setting(
    options: EngineOptions, name: str, text: str, says: str
) -> None:
    (fault,) = options.faults({name: text})
    assert fault.startswith(f"{name} ")
    assert says in fault
    assert "usage:" not in fault and "\n" not in fault.strip()


def test_all_faults_come_together(options: EngineOptions) -> None:
    wrong = {"MAX_MODEL_LEN": "abc", "DTYPE": "float12", "ENFORCE_EAGER": "maybe"}
    with pytest.raises(ConfigError) as raised:
        serve_args("m", ["n"], {**wrong, "SEED": "1"}, 0.5)
    assert [fault.split()[0] for fault in raised.value.faults] == list(wrong)


def test_a_value_cannot_bring_another_option() -> None:
    assert serve_args("m", ["n"], {"QUANTIZATION": "--model=other"}, 0.5).model == "m"


def test_what_belongs_together_is_checked_together() -> None:
    with pytest.raises(ConfigError, match="tool"):
        serve_args("m", ["n"], {"ENABLE_AUTO_TOOL_CHOICE": "true"}, 0.5)


def test_on_a_cpu_the_cache_has_a_sane_size_unless_it_is_set() -> None:
    import psutil

    total = psutil.virtual_memory().total
    assert 0 < serve_args("m", ["n"], {}, 0.5).kv_cache_memory_bytes < total / 2
    own = serve_args("m", ["n"], {"KV_CACHE_MEMORY_BYTES": "1048576"}, 0.5)
    assert own.kv_cache_memory_bytes == 1048576


@pytest.mark.parametrize("name", ["dummy", "safetensors", "AUTO", "mistral", "sharded_state"])
def test_load_formats_reach_the_engine_s_configuration(name: str) -> None:
    extra = {"MODEL_LOADER_EXTRA_CONFIG": '{"num_threads": 3}'}
    args = serve_args(str(TINY), ["n"], {"LOAD_FORMAT": name, **extra}, 0.5)
    config = AsyncEngineArgs.from_cli_args(args).create_load_config()
    assert config.load_format == name.lower()
    assert config.model_loader_extra_config == {"num_threads": 3}


NEEDS_A_PACKAGE = {
    "fastsafetensors": "fastsafetensors",
    "instanttensor": "instanttensor",
    "modelexpress": "modelexpress",
    "runai_streamer": "runai-model-streamer[s3]",
    "runai_streamer_sharded": "runai-model-streamer[s3]",
    "tensorizer": "tensorizer",
}


@pytest.mark.parametrize(("name", "package"), NEEDS_A_PACKAGE.items())
def test_a_load_format_without_its_package_says_what_to_add(
    options: EngineOptions, name: str, package: str
) -> None:
    module = package.partition("[")[0].replace("-", "_")
    if importlib.util.find_spec(module):
        pytest.skip(f"{package} is installed")
    (fault,) = options.faults({"LOAD_FORMAT": name})
    assert fault.startswith(f"LOAD_FORMAT {name} needs the Python package {package}, which is not")
    assert f"RUN pip install '{package}'" in fault


@pytest.mark.parametrize("name", NEEDS_A_PACKAGE)
def test_a_load_format_with_its_package_reaches_the_engine_s_configuration(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: present)
    args = serve_args(str(TINY), ["n"], {"LOAD_FORMAT": name}, 0.5)
    assert AsyncEngineArgs.from_cli_args(args).create_load_config().load_format == name


def test_every_load_format_of_vllm_is_known_with_what_it_needs(options: EngineOptions) -> None:
    from vllm.model_executor.model_loader import LoadFormats

    plain = {name for name in get_args(LoadFormats) if not options.faults({"LOAD_FORMAT": name})}
    needy = {name for name in NEEDS_A_PACKAGE if name in get_args(LoadFormats)}
    assert plain | needy == set(get_args(LoadFormats))
    # A format that is new here may need a package that nobody has looked up.
    assert plain - needy <= {
        *("auto", "hf", "dummy", "ipc_cache", "mistral", "npcache", "pt", "safetensors"),
        *("sharded_state",),
    }


def test_a_load_format_that_nobody_knows_is_told_at_once(options: EngineOptions) -> None:
    (fault,) = options.faults({"LOAD_FORMAT": "safetensor"})
    assert fault.startswith("LOAD_FORMAT safetensor is not a format of this vLLM: choose from auto")


@pytest.mark.parametrize("model", ["org/name/file.gguf", "/models/file.GGUF"])
def test_gguf_without_the_plugin_is_refused_before_anything_is_loaded(
    options: EngineOptions, model: str
) -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if "gguf" in QUANTIZATION_METHODS:
        pytest.skip("this vLLM loads GGUF")
    (fault,) = options.faults({}, [model, "org/name"])
    assert fault.startswith(f"{model} is a GGUF file")
    assert "vllm-gguf-plugin" in fault
    with pytest.raises(ConfigError, match="vllm-gguf-plugin"):
        serve_args(model, ["n"], {}, 0.5)


def test_from_a_volume_weights_are_prefetched_unless_said_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert serve_args(str(TINY), ["n"], {}, 0.5).safetensors_load_strategy is None
    monkeypatch.setattr(model_prefetch, "file_system", lambda *_: "fuse")
    assert serve_args(str(TINY), ["n"], {}, 0.5).safetensors_load_strategy == "prefetch"
    own = {"SAFETENSORS_LOAD_STRATEGY": "lazy"}
    assert serve_args(str(TINY), ["n"], own, 0.5).safetensors_load_strategy == "lazy"
