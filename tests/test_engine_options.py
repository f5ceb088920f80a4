"""vLLM's engine arguments as settings, read off the installed vLLM."""

import dataclasses
import warnings
from pathlib import Path

import pytest

import config
from errors import ConfigError

config.prepare_libraries(config.environment(), Path(__file__).parent.parent / "vllm_logging.json")
with warnings.catch_warnings():  # torch warns of itself while it is imported
    warnings.simplefilter("ignore")
    from vllm.engine.arg_utils import AsyncEngineArgs

    from engine_options import EngineOptions, serve_args


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
