"""The environment of the worker's process: what libraries and children find in it.

Owns that no child inherits a secret, and what has to stand there before vLLM, the Hub's library and
the SDK are imported. `environment` is the only door to it on the worker's side. What its variables
say to the worker is config.py's.
"""

import ctypes
import os
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from config import Settings

_SDK_KEY = "RUNPOD_AI_API_KEY"
_VLLM_LOGGING = Path(__file__).resolve().with_name("vllm_logging.json")

_SECRETS = (
    *("ENCRYPTION_KEY", "HPKE_PRIVATE_KEY", "REPLAY_REDIS_URL"),
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
    # The worker's own key for the job queue, and the account's, which RunPod sets in every pod.
    *(_SDK_KEY, "RUNPOD_API_KEY"),
)
"""What no child of the worker is to inherit."""

_START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


def environment() -> MutableMapping[str, str]:
    """Return the process's environment."""
    return os.environ


def take_secrets(environ: MutableMapping[str, str]) -> dict[str, str]:
    """Return a copy of the environment and remove the secrets from it, for the sake of children."""
    copy = dict(environ)
    for name in _SECRETS:
        if environ is os.environ:
            _erase(name)
        environ.pop(name, None)
    return copy


def lend_api_key(environ: MutableMapping[str, str], taken: Mapping[str, str]) -> None:
    """Put back what the SDK reads of the secrets, until `withdraw_api_key`."""
    if _SDK_KEY in taken:
        environ[_SDK_KEY] = taken[_SDK_KEY]


def withdraw_api_key(environ: MutableMapping[str, str]) -> None:
    """Remove what the SDK has read by now: later children have no use for it."""
    environ.pop(_SDK_KEY, None)


def _erase(name: str) -> None:
    """Overwrite a variable where /proc shows it, also of processes forked from this one."""
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    if address := libc.getenv(name.encode()):
        ctypes.memset(address, 0, len(ctypes.string_at(address)))


def prepare_libraries(environ: MutableMapping[str, str]) -> None:
    """Set what vLLM and the SDK read when they are imported; call before either is.

    Levels below INFO are raised: at DEBUG vLLM writes prompts. `VLLM_NO_USAGE_STATS`
    must be exactly 1.
    """
    environ.setdefault("RUNPOD_LOG_LEVEL", "INFO")
    if environ.get("VLLM_LOGGING_LEVEL", "INFO").upper() in ("DEBUG", "NOTSET"):
        environ["VLLM_LOGGING_LEVEL"] = "INFO"
    environ["VLLM_LOGGING_CONFIG_PATH"] = str(_VLLM_LOGGING)
    environ["VLLM_CONFIGURE_LOGGING"] = "1"
    environ["SAGEMAKER_CONTAINER_LOG_LEVEL"] = "ERROR"  # a part of vLLM's that logs requests
    environ["VLLM_NO_USAGE_STATS"] = "1"
    environ["VLLM_DO_NOT_TRACK"] = "1"
    # A host of ALLOWED_MEDIA_DOMAINS could send the worker on to any other.
    environ["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] = "0"
    environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    environ.pop("VLLM_API_KEY", None)  # would put a second lock on vLLM's application
    environ.pop("VLLM_SERVER_DEV_MODE", None)  # would add its development routes
    environ.pop("VLLM_DEBUG_LOG_API_SERVER_RESPONSE", None)  # would log answers


def prepare_temporary(environ: MutableMapping[str, str], folder: Path) -> None:
    """Have this process, vLLM and every child put temporary files and sockets into the folder."""
    environ["TMPDIR"] = environ["VLLM_RPC_BASE_PATH"] = str(folder)
    tempfile.tempdir = str(folder)


def prepare_hub(environ: MutableMapping[str, str], settings: Settings) -> None:
    """Point the Hub's library of every process at the model cache."""
    environ["HF_HOME"] = str(settings.hf_home)
    environ["HF_HUB_CACHE"] = str(settings.hub_cache)


def prepare_engine_processes(environ: MutableMapping[str, str], *, fork: bool, cpu: bool) -> None:
    """Let vLLM fork its engine core from this process, which has vLLM imported already, or not.

    Forking is vLLM's default and saves the core importing it all again. Its CPU engine asks for
    new processes for the sake of OpenMP, which only the core's own child computes with.
    """
    if not fork:
        environ[_START_METHOD] = "spawn"
    elif cpu:
        environ[_START_METHOD] = "fork"
        os.register_at_fork(after_in_child=lambda: environ.update({_START_METHOD: "spawn"}))


def prepare_compiling(
    environ: MutableMapping[str, str], folders: Mapping[str, str], *, cpu: bool
) -> None:
    """Point everything that compiles at its folder; call before vLLM is imported."""
    environ.update(folders)
    if cpu:
        # On a CPU, vLLM 0.32 fails to load what it has compiled ahead of time, and compiles again.
        environ.setdefault("VLLM_USE_AOT_COMPILE", "0")


def prepare_eager(environ: MutableMapping[str, str]) -> None:
    """Have nothing compiled; call before torch is imported.

    vLLM's ENFORCE_EAGER is for the model alone. How log probabilities are counted is compiled all
    the same, at the first request that wants them: half a minute on two cores, in which every
    other stream stands still.
    """
    environ.setdefault("TORCH_COMPILE_DISABLE", "1")
