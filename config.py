"""The worker's settings: one frozen object, read from the environment once.

Owns names, defaults and checks of the worker's own settings. What vLLM's engine arguments mean is
engine_options.py's business; here they are names and text. What the environment is made into for
libraries and children is worker_environment.py's, the client's settings are client_config.py's.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOLUME = Path("/runpod-volume")
"""Where RunPod mounts a network volume."""

DEFAULT_GPU_MEMORY_UTILIZATION = 0.95
DEFAULT_MAX_TTL_S = 24 * 3600
DEFAULT_CLOCK_SKEW_S = 60
DEFAULT_MAX_REQUEST_BYTES = 8 * 1024 * 1024  # more than a sealed job sent by /run can carry
DEFAULT_MAX_INPUTS = 2048  # as many as OpenAI's own API takes
DEFAULT_MAX_QUEUE_S = 300
DEFAULT_ENGINE_STUCK_S = 120


@dataclass(frozen=True)
class Settings:
    """What the worker was told; secrets are in no repr."""

    models: tuple[str, ...] = ()
    encryption_key: str = field(default="", repr=False)
    hpke_private_key: str = field(default="", repr=False)
    allow_without_hpke: bool = False
    hf_token: str | None = field(default=None, repr=False)
    hf_home: Path = Path()
    hf_endpoint: str | None = None
    offline: bool = False
    model_path: Path | None = None
    model_dirs: tuple[Path, ...] = ()
    model_swap: bool = False
    served_model_name: tuple[str, ...] = ()
    gpu_memory_utilization: float = DEFAULT_GPU_MEMORY_UTILIZATION
    max_concurrency: int | None = None
    allow_plaintext: bool = False
    max_ttl_s: int = DEFAULT_MAX_TTL_S
    clock_skew_s: int = DEFAULT_CLOCK_SKEW_S
    stream_interval_ms: int = 0
    replay_redis_url: str = field(default="", repr=False)
    may_do_without_redis: bool = False
    max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES
    max_choices: int | None = None
    max_inputs: int = DEFAULT_MAX_INPUTS
    max_queue_s: int = DEFAULT_MAX_QUEUE_S
    engine_stuck_s: int = DEFAULT_ENGINE_STUCK_S
    compile_cache: bool = True
    endpoint_id: str = ""
    worker_id: str = ""
    engine_options: Mapping[str, str] = field(default_factory=dict)

    @property
    def hub_cache(self) -> Path:
        """The Hub's cache, below `hf_home`."""
        return self.hf_home / "hub"

    @property
    def own_folder(self) -> Path:
        """What the worker itself keeps on the volume, beside the Hub's cache."""
        return self.hf_home / "sealed-vllm"

    @property
    def records(self) -> Path:
        """The records of past starts."""
        return self.own_folder / "starts"

    def model_path_of(self, model: str, asked: Sequence[str]) -> Path | None:
        """Return where MODEL_PATH has the model: the first of MODELS, or else of those `asked`."""
        return self.model_path if model == (self.models or asked)[0] else None

    @property
    def failed_starts(self) -> Path:
        """What is kept of starts that did not come up."""
        return self.own_folder / "failing"

    @property
    def compile_archives(self) -> Path:
        """What workers have compiled, for each other."""
        return self.own_folder / "compile"


def _text(text: str) -> str:
    return text


def _list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _folder(text: str) -> Path:
    # No shell stands between a container's settings and this.
    return Path(text).expanduser()


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(Path(item.strip()) for item in re.split("[:,]", text) if item.strip())


_TRUE = ("true", "1", "yes", "on")
_FALSE = ("false", "0", "no", "off")


def _flag(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError("is neither true nor false")


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError("is not a whole number") from None
        if not low <= value <= high:
            raise ValueError(f"is not between {low} and {high}")
        return value

    return parse


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("is not a number") from None
    if not 0 < value <= 1:
        raise ValueError("is not above 0 and at most 1")
    return value


def _one_of(words: Mapping[str, Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if text.lower() not in words:
            raise ValueError(f"is neither {' nor '.join(words)}")
        return words[text.lower()]

    return parse


@dataclass(frozen=True)
class Setting:
    """One setting of the worker; the documentation's table is made of these."""

    name: str
    attribute: str
    parse: Callable[[str], Any]
    default: str
    meaning: str


SETTINGS = (
    Setting(
        "MODELS",
        "models",
        _list,
        "required",
        "Hugging Face ids (`org/name`, `org/name@revision`) or folders, separated by commas; "
        "all are kept on the volume, the first is served, see `MODEL_SWAP`",
    ),
    Setting(
        "ENCRYPTION_KEY",
        "encryption_key",
        _text,
        "required",
        "the key shared with your clients (`client.py keygen`); several as `name=key,name=key`, "
        "each with options of its own, see [Keys of several clients](#keys-of-several-clients)",
    ),
    Setting(
        "HPKE_PRIVATE_KEY",
        "hpke_private_key",
        _text,
        "none",
        "public-key mode beside it (`client.py keygen --hpke`); several, separated by commas, "
        "while clients change over",
    ),
    Setting(
        "ALLOW_WITHOUT_HPKE",
        "allow_without_hpke",
        _flag,
        "false",
        "with `HPKE_PRIVATE_KEY`, also serve requests without public-key mode, sealed ones and "
        "Fernet alone; plaintext has its own setting, `ALLOW_PLAINTEXT`",
    ),
    Setting("HF_TOKEN", "hf_token", _text, "none", "for gated or private models"),
    Setting(
        "HF_HOME",
        "hf_home",
        _folder,
        "`/runpod-volume/huggingface-cache` with a volume, else `~/.cache/huggingface`",
        "where models are kept",
    ),
    Setting("HF_ENDPOINT", "hf_endpoint", _text, "the Hub", "another address of the Hub"),
    Setting("HF_HUB_OFFLINE", "offline", _flag, "false", "use what is on disk, never the network"),
    Setting(
        "MODEL_PATH",
        "model_path",
        Path,
        "none",
        "a folder that holds the model; `MODELS` then only names it",
    ),
    Setting(
        "MODEL_DIRS",
        "model_dirs",
        _paths,
        "none",
        "folders, separated by colons or commas, searched for models before the cache: for "
        "`org/name`, `name` or `org--name` in each",
    ),
    Setting(
        "MODEL_SWAP",
        "model_swap",
        _flag,
        "false",
        "load another model of `MODELS` when a request names it, in place of the one before",
    ),
    Setting(
        "SERVED_MODEL_NAME",
        "served_model_name",
        _list,
        "the id in `MODELS`",
        "what requests call the first model; several names separated by commas",
    ),
    Setting(
        "GPU_MEMORY_UTILIZATION",
        "gpu_memory_utilization",
        _fraction,
        str(DEFAULT_GPU_MEMORY_UTILIZATION),
        "share of the GPU's memory that vLLM takes; on a CPU `KV_CACHE_MEMORY_BYTES` counts",
    ),
    Setting(
        "MAX_CONCURRENCY",
        "max_concurrency",
        _integer(1, 4096),
        "the engine's `MAX_NUM_SEQS`",
        "jobs taken at once",
    ),
    Setting(
        "ALLOW_PLAINTEXT",
        "allow_plaintext",
        _flag,
        "false",
        "also serve unencrypted jobs in the official worker's forms",
    ),
    Setting(
        "MAX_TTL_S",
        "max_ttl_s",
        _integer(1, 30 * 24 * 3600),
        str(DEFAULT_MAX_TTL_S),
        "longest life of a request, in seconds",
    ),
    Setting(
        "CLOCK_SKEW_S",
        "clock_skew_s",
        _integer(0, 3600),
        str(DEFAULT_CLOCK_SKEW_S),
        "how far a client's clock may be off, in seconds",
    ),
    Setting(
        "STREAM_INTERVAL_MS",
        "stream_interval_ms",
        _integer(0, 60_000),
        "0",
        "paced mode: one chunk of constant size every so many milliseconds; 0 is off",
    ),
    Setting(
        "REPLAY_REDIS_URL",
        "replay_redis_url",
        _text,
        "none",
        "a Redis, as `redis://:password@host:6379/0` or `rediss://…`, in which the workers of an "
        "endpoint remember together which requests were answered",
    ),
    Setting(
        "REPLAY_REDIS_UNAVAILABLE",
        "may_do_without_redis",
        _one_of({"refuse": False, "accept": True}),
        "refuse",
        "what happens to requests while that Redis cannot be asked: `refuse` (503), or `accept` "
        "by what each worker remembers by itself",
    ),
    Setting(
        "MAX_REQUEST_BYTES",
        "max_request_bytes",
        _integer(1024, 15 * 1024 * 1024),
        str(DEFAULT_MAX_REQUEST_BYTES),
        "longest body of a request, in bytes",
    ),
    Setting(
        "MAX_CHOICES",
        "max_choices",
        _integer(1, 16384),
        "half of `MAX_NUM_SEQS`, at most 128",
        "answers that one request may ask for: `n`, times its prompts where it has several",
    ),
    Setting(
        "MAX_INPUTS",
        "max_inputs",
        _integer(1, 1_000_000),
        str(DEFAULT_MAX_INPUTS),
        "texts that one request may have embedded, classified, scored or ranked",
    ),
    Setting(
        "MAX_QUEUE_S",
        "max_queue_s",
        _integer(0, 24 * 3600),
        str(DEFAULT_MAX_QUEUE_S),
        "seconds after which a request without its first token is refused with 503; 0 is never",
    ),
    Setting(
        "ENGINE_STUCK_S",
        "engine_stuck_s",
        _integer(0, 24 * 3600),
        str(DEFAULT_ENGINE_STUCK_S),
        "seconds without a step of the engine, with work waiting, after which the worker ends so "
        "that the platform replaces it; 0 is never",
    ),
    Setting(
        "COMPILE_CACHE",
        "compile_cache",
        _flag,
        "true",
        "keep what vLLM compiles at a start on the volume, for the next one",
    ),
    Setting(
        "RUNPOD_ENDPOINT_ID",
        "endpoint_id",
        _text,
        "set by RunPod",
        "the endpoint that requests must be meant for",
    ),
    Setting(
        "RUNPOD_POD_ID",
        "worker_id",
        _text,
        "set by RunPod",
        "the worker's name in leases and in the records of starts",
    ),
)

# Names of the official worker that people bring along.
_FOREIGN = {
    "MODEL_NAME": "MODELS",
    "MODEL": "MODELS",
    "MODEL_REVISION": "MODELS=org/name@revision",
    "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "SERVED_MODEL_NAME",
    "HUGGING_FACE_HUB_TOKEN": "HF_TOKEN",
}


def read(
    environ: Mapping[str, str],
    option_names: Iterable[str],
    volume: Path = VOLUME,
) -> tuple[Settings, list[str]]:
    """Return the settings, and a sentence for each fault in them; faulty ones have their default.

    `option_names` are vLLM's engine arguments in upper case; those that are set become
    `engine_options`, checked elsewhere. No value is ever quoted.
    """
    options = frozenset(option_names) - {setting.name for setting in SETTINGS}
    settings, faults = read_for_models(environ, options, volume)
    if not settings.models:
        faults.append("MODELS is not set: name a model of the Hub, such as org/name, or a folder")
    if not settings.encryption_key:
        faults.append(
            "ENCRYPTION_KEY is not set: make one with `client.py keygen`, the client needs the same"
        )
    if "HPKE_PRIVATE_KEY" in environ and not environ["HPKE_PRIVATE_KEY"].strip():
        # A secret that was not filled in must not switch public-key mode off.
        faults.append("HPKE_PRIVATE_KEY is empty: set it, or remove it to do without it")
    if not settings.endpoint_id:
        faults.append("RUNPOD_ENDPOINT_ID is not set: RunPod and local_runpod.py set it")
    return settings, faults + misspelt(environ, options)


def read_for_models(
    environ: Mapping[str, str], option_names: Iterable[str] = (), volume: Path = VOLUME
) -> tuple[Settings, list[str]]:
    """Return the settings for work on models alone, of which nothing is required."""
    values: dict[str, Any] = {}
    faults: list[str] = []
    for setting in SETTINGS:
        text = environ.get(setting.name, "").strip()
        if not text:
            continue
        try:
            values[setting.attribute] = setting.parse(text)
        except ValueError as error:
            faults.append(f"{setting.name} {error}")
    values.setdefault("hf_home", default_hf_home(environ, volume))
    values["engine_options"] = {
        name: environ[name].strip()
        for name in sorted(option_names)
        if environ.get(name, "").strip()
    }
    return Settings(**values), faults


def default_hf_home(environ: Mapping[str, str], volume: Path = VOLUME) -> Path:
    """Return the cache on the network volume where one is attached, else the user's own."""
    if volume.is_dir():
        return volume / "huggingface-cache"
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"


def misspelt(environ: Mapping[str, str], options: Iterable[str]) -> list[str]:
    """Return a sentence for each name that comes near to a setting's, or is another worker's."""
    known = sorted({*options, *(setting.name for setting in SETTINGS)})
    faults = []
    for name in sorted(environ.keys() - set(known)):
        if name in _FOREIGN:
            faults.append(f"{name} is not a setting of this worker: use {_FOREIGN[name]}")
        elif len(name) > 5 and not name.startswith(("VLLM_", "RUNPOD_", "HF_HUB_", "CLIENT_")):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.88)
            if close:
                faults.append(f"{name} is not a setting: did you mean {close[0]}?")
    return faults


def local_compile_folder(environ: Mapping[str, str], settings: Settings) -> Path | None:
    """Return where the local disk keeps what is compiled; None where it is not kept."""
    if not settings.compile_cache:
        return None
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "sealed-vllm" / "compile"
