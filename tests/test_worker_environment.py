"""The environment of the worker's process: no secret for children, and what libraries are told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import worker_environment
from tests.workers import ROOT


def test_secrets_are_taken_out_of_an_environment() -> None:
    secrets = ("ENCRYPTION_KEY", "HPKE_PRIVATE_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    environ = {**dict.fromkeys(secrets, "secret"), "PATH": "p"}
    environ |= {"RUNPOD_AI_API_KEY": "a", "RUNPOD_API_KEY": "b"}
    before = dict(environ)
    taken = worker_environment.take_secrets(environ)
    assert taken == before
    assert environ == {"PATH": "p"}
    worker_environment.lend_api_key(environ, taken)
    assert environ == {"PATH": "p", "RUNPOD_AI_API_KEY": "a"}
    worker_environment.withdraw_api_key(environ)
    assert environ == {"PATH": "p"}


def test_secrets_are_erased_where_proc_shows_them(tmp_path: Path) -> None:
    """The kernel shows the environment that a process was started with, also of its forks."""
    program = (
        "import os, sys, pathlib; sys.path.insert(0, sys.argv[1]); import worker_environment\n"
        "before = pathlib.Path('/proc/self/environ').read_bytes()\n"
        "taken = worker_environment.take_secrets(worker_environment.environment())\n"
        "after = pathlib.Path('/proc/self/environ').read_bytes()\n"
        "print(b'S3CRET' in before, b'S3CRET' in after, taken['ENCRYPTION_KEY'])\n"
        "sys.stdout.flush()\n"
        "os.fork() or print(b'S3CRET' in pathlib.Path('/proc/self/environ').read_bytes())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(Path(worker_environment.__file__).parent)],
        env={**os.environ, "ENCRYPTION_KEY": "S3CRET"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", "False", "S3CRET", "False"], done


def test_libraries_are_told_not_to_log_content_or_report() -> None:
    environ = {
        "VLLM_LOGGING_LEVEL": "debug",
        "VLLM_API_KEY": "k",
        "VLLM_CONFIGURE_LOGGING": "0",
        "VLLM_DEBUG_LOG_API_SERVER_RESPONSE": "1",
    }
    worker_environment.prepare_libraries(environ)
    assert environ == {
        "RUNPOD_LOG_LEVEL": "INFO",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_LOGGING_CONFIG_PATH": str(ROOT / "vllm_logging.json"),
        "VLLM_CONFIGURE_LOGGING": "1",
        "SAGEMAKER_CONTAINER_LOG_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@pytest.mark.parametrize("level", ["INFO", "WARNING", "ERROR"])
def test_a_quieter_log_is_left_quiet(level: str) -> None:
    environ = {"VLLM_LOGGING_LEVEL": level, "RUNPOD_LOG_LEVEL": "ERROR"}
    worker_environment.prepare_libraries(environ)
    assert environ["VLLM_LOGGING_LEVEL"] == level
    assert environ["RUNPOD_LOG_LEVEL"] == "ERROR"


def test_what_compiles_is_told_its_folder_and_not_to_compile_ahead_on_a_cpu() -> None:
    for environ, cpu, expected in (
        ({"VLLM_CACHE_ROOT": "/old"}, False, {"VLLM_CACHE_ROOT": "/new"}),
        ({}, True, {"VLLM_CACHE_ROOT": "/new", "VLLM_USE_AOT_COMPILE": "0"}),
        (
            {"VLLM_USE_AOT_COMPILE": "1"},
            True,
            {"VLLM_CACHE_ROOT": "/new", "VLLM_USE_AOT_COMPILE": "1"},
        ),
    ):
        told = dict(environ)
        worker_environment.prepare_compiling(told, {"VLLM_CACHE_ROOT": "/new"}, cpu=cpu)
        assert told == expected


def test_where_nothing_is_to_be_compiled_torch_is_told() -> None:
    told: dict[str, str] = {}
    worker_environment.prepare_eager(told)
    assert told == {"TORCH_COMPILE_DISABLE": "1"}
    chosen = {"TORCH_COMPILE_DISABLE": "0"}
    worker_environment.prepare_eager(chosen)
    assert chosen == {"TORCH_COMPILE_DISABLE": "0"}
