"""From the environment to a loaded engine, as fast as the machine allows.

    own settings → preparation (a process: models on disk) ┐
                   vLLM imported, its options checked      ┴→ what is compiled already → the engine

Owns that order, the record of where the time went, and that every fault is told at once. The
handler and the job loop are rp_handler.py's.
"""

import contextlib
import functools
import logging
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import compile_key
import config
import engine_adapters
import engine_phases
import fitness
from base_models import BaseModel, clashes
from compile_cache import CompileCache, LocalFolder
from config import Settings
from engine_adapters import Family
from errors import ConfigError
from failed_starts import FailedStarts
from hpke import HpkeKeyRing
from keys import KeyRing
from model_needs import OPTION_NAMES, FitSettings
from model_swap import Models
from preparation import Job, Preparation
from readiness import Readiness
from utils import Snapshot
from worker_environment import environment, prepare_compiling, prepare_eager, prepare_hub

if TYPE_CHECKING:
    from engine import Engine
    from engine_options import EngineOptions
    from replay_store import ReplayStore

log = logging.getLogger("worker")


@dataclass(frozen=True)
class _Checked:
    """What the environment says, found to be without a fault."""

    settings: Settings
    keys: KeyRing
    hpke_keys: HpkeKeyRing | None
    store: "ReplayStore | None"


@dataclass(frozen=True)
class Booted:
    """What a start has brought: everything that a handler needs."""

    settings: Settings
    keys: KeyRing
    hpke_keys: HpkeKeyRing | None
    """None without public-key mode."""
    store: "ReplayStore | None"
    """What the workers of the endpoint remember together, if they do."""
    models: Models
    model_files: Mapping[Path, int]
    """Their sizes when they were made ready."""
    compile_cache: CompileCache | None
    readiness: Readiness
    preparation: Preparation
    failed_starts: FailedStarts

    def ready(self) -> None:
        """Tell and keep the record of this start; the worker takes jobs from now on."""
        self.preparation.finish()
        self.failed_starts.clear()
        readiness = self.readiness
        readiness.about["vllm"] = self.models.about()["vllm"]
        log.info("%s", readiness.table())
        log.info("start=%s", readiness.line())
        try:
            readiness.keep(self.settings.records, self.settings.worker_id)
        except OSError as error:
            log.warning("the record of this start is not kept: %s", error.strerror)
        if self.compile_cache:
            # A daemon: an end that comes before it is done does not wait for it.
            threading.Thread(target=self.compile_cache.publish, args=(log,), daemon=True).start()


def boot(environ: Mapping[str, str], failed_starts: FailedStarts) -> Booted:
    """Return a loaded engine and what belongs to it; ConfigError or ModelError with every fault."""
    readiness = Readiness()
    # vLLM's options are not known before its import; its own settings are enough to begin.
    early, _ = config.read(environ, (*OPTION_NAMES, "LOAD_FORMAT"))
    prepare_hub(environment(), early)
    preparation = _prepare(early, readiness)
    local = _local_folder(environ, early)
    needs = FitSettings.read(early.engine_options, early.gpu_memory_utilization)
    if needs.enforce_eager and compile_key.on_cpu():
        prepare_eager(environment())
    with tempfile.NamedTemporaryFile(prefix="sealed-vllm-start-") as phases:
        environment()[engine_phases.VARIABLE] = phases.name
        with readiness.phase("imports"):
            from engine import Engine  # noqa: F401 - the longest import; `load` finds it done
            from engine_options import EngineOptions
        checked = _checked(environ, EngineOptions())
        settings = checked.settings
        snapshots = preparation.snapshots()
        model_files = fitness.files_of(snapshot.path for snapshot in snapshots)
        bases = _bases(engine_adapters.families(snapshots), settings)
        compile_cache = None
        if local:
            compile_cache = _hydrated(local, settings, checked.keys, snapshots[0], readiness)
        with readiness.phase("engine core"):
            models = Models(bases, bases[0].build(), may_swap=settings.model_swap)
        for name, (began_at, ended_at) in engine_phases.noted(Path(phases.name)).items():
            readiness.add(name, began_at, ended_at)
    readiness.about |= {
        "model": snapshots[0].name,
        "revision": snapshots[0].revision,
        "source": snapshots[0].source,
        "bytes": snapshots[0].bytes,
    }
    _tell_keys(checked)
    return Booted(
        settings=settings,
        keys=checked.keys,
        hpke_keys=checked.hpke_keys,
        store=checked.store,
        models=models,
        model_files=model_files,
        compile_cache=compile_cache,
        readiness=readiness,
        preparation=preparation,
        failed_starts=failed_starts,
    )


def load(family: Family, names: Sequence[str], settings: Settings) -> "Engine":
    """Load a base model, served under `names` (its own if empty), with its adapters beside it."""
    from engine import Engine

    return Engine(
        str(family.path),
        list(names) or [family.name],
        settings.engine_options,
        settings.gpu_memory_utilization,
        family.adapters,
        max_queue_s=settings.max_queue_s,
        stuck_s=settings.engine_stuck_s,
    )


def _bases(families: Sequence[Family], settings: Settings) -> list[BaseModel]:
    """Return the base models and how each is loaded; ConfigError if two have the same name."""
    bases: list[BaseModel] = []
    for family in families:
        # The first one's names are the operator's to choose; the others keep their own.
        names = () if bases else settings.served_model_name
        adapters = (adapter.name for adapter in family.adapters)
        build = functools.partial(load, family, names, settings)
        bases.append(BaseModel((*(names or (family.name,)), *adapters), build))
    if faults := clashes(bases):
        raise ConfigError(faults)
    return bases


def _prepare(settings: Settings, readiness: Readiness) -> Preparation:
    return Preparation(
        Job(
            models=settings.models,
            hub_cache=str(settings.hub_cache),
            model_path=str(settings.model_path) if settings.model_path else None,
            model_dirs=[str(folder) for folder in settings.model_dirs],
            token=settings.hf_token,
            endpoint=settings.hf_endpoint,
            offline=settings.offline,
            worker=settings.worker_id,
            options=settings.engine_options,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            may_swap=settings.model_swap,
        ),
        readiness,
    )


def _local_folder(environ: Mapping[str, str], settings: Settings) -> LocalFolder | None:
    """Claim this process's folder for what is compiled, and point vLLM at it."""
    parent = config.local_compile_folder(environ, settings)
    if parent is None:
        return None
    try:
        local = LocalFolder(parent)
    except OSError as error:
        log.warning("what is compiled is not kept: %s: %s", parent, error.strerror)
        return None
    variables = local.environment()
    prepare_compiling(environment(), variables, cpu=compile_key.on_cpu())
    return local


def _hydrated(
    local: LocalFolder, settings: Settings, keys: KeyRing, model: Snapshot, readiness: Readiness
) -> CompileCache:
    """Fill the local folder with what earlier workers have compiled for the model."""
    cache = CompileCache(
        local.path,
        settings.compile_archives,
        compile_key.key_of(model.name, model.path, model.revision, settings.engine_options),
        # Whoever may hold a key that was given up must not be able to plant code with it.
        [key.local_secret("compile cache") for key in keys if not key.terms.over_at(time.time())],
    )
    with readiness.phase("compile cache") as facts:
        if found := cache.hydrate(log):
            facts |= {"source": found.source, "files": found.files, "bytes": found.bytes}
    return cache


def _checked(environ: Mapping[str, str], options: "EngineOptions") -> _Checked:
    """Return what the environment says, or raise ConfigError with every fault of it."""
    settings, faults = config.read(environ, options.names())
    faults += options.faults(settings.engine_options, settings.models[:1])
    keys = hpke_keys = store = None
    with _collecting(faults):
        if settings.encryption_key:
            keys = KeyRing.parse(settings.encryption_key)
            faults += _hopeless(keys)
    with _collecting(faults):
        if settings.hpke_private_key:
            hpke_keys = HpkeKeyRing.parse(settings.hpke_private_key)
    with _collecting(faults):
        if settings.replay_redis_url:
            from replay_store import ReplayStore

            store = ReplayStore(
                settings.replay_redis_url,
                settings.endpoint_id,
                clock_skew_s=settings.clock_skew_s,
                may_do_without=settings.may_do_without_redis,
            )
    if faults or keys is None:  # no key is a fault too, which config.read has found
        raise ConfigError(faults)
    return _Checked(settings, keys, hpke_keys, store)


@contextlib.contextmanager
def _collecting(faults: list[str]) -> Iterator[None]:
    """Put the faults of a ConfigError that is raised inside to the others."""
    try:
        yield
    except ConfigError as error:
        faults += error.faults


def _tell_keys(checked: _Checked) -> None:
    for key in checked.keys:
        log.info("%s", key.about(time.time()))
    for hpke_key in checked.hpke_keys or ():
        log.info("public key %s", hpke_key.public.id)
    if checked.hpke_keys and checked.settings.allow_without_hpke:
        log.warning(
            "ALLOW_WITHOUT_HPKE: requests without public-key mode are served too, sealed ones and "
            "Fernet alone"
        )


def _hopeless(keys: KeyRing) -> list[str]:
    """Return a sentence if no key will ever be good again."""
    now = time.time()
    if any(not key.terms.over_at(now) for key in keys):
        return []
    told = "; ".join(key.about(now) for key in keys)
    return [f"ENCRYPTION_KEY has no key that is good now or will be: {told}"]
