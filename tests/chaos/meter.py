"""Measures processes from outside: memory, files, CPU; and tells a trend from noise.

Memory is what is anonymous or shared by the worker's own processes (`Pss_Anon`, `Pss_Shmem`):
pages of files are in memory for everybody, and how they are shared out depends on who else runs.
"""

import contextlib
import math
import signal
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.wait import until


def memory_bytes(processes: Iterable[psutil.Process]) -> int:
    """Return what the processes hold of memory, what they share counted once."""
    total_kib = 0
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    total_kib += int(line.split()[1])
    return 1024 * total_kib


def files(processes: Iterable[psutil.Process]) -> int:
    """Return how many file descriptors the processes have open."""
    count = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            count += process.num_fds()
    return count


def cpu_s(processes: Iterable[psutil.Process]) -> float:
    """Return the CPU time that the processes have used."""
    total_s = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total_s += times.user + times.system
    return total_s


def tasks(process: psutil.Process, probe: Path) -> int:
    """Ask a worker's process how many asyncio tasks it has; see hooks/sitecustomize.py."""
    probe.unlink(missing_ok=True)
    process.send_signal(signal.SIGUSR2)
    until(probe.exists, 10, "the number of tasks")
    return int(probe.read_text())


@dataclass(frozen=True)
class Trend:
    """How a quantity went: its level, and its growth over the whole time with 95 % confidence."""

    level: float
    growth: float
    low: float
    high: float

    def excludes(self, growth: float) -> bool:
        """Return whether as much growth as this can be excluded."""
        return self.high < growth

    def __str__(self) -> str:
        return (
            f"level {self.level:.4g}, growth {self.growth:+.3g} "
            f"(95 % confidence {self.low:+.3g} to {self.high:+.3g})"
        )


BLOCKS = 12
T_975 = 2.228
"""97.5 % of Student's t distribution of `BLOCKS` - 2 degrees of freedom lie below."""


def trend(samples: Sequence[float]) -> Trend:
    """Return the trend of equally spaced samples.

    Neighbours are alike, which would make a straight line through all of them look more certain
    than it is: it goes through the medians of `BLOCKS` spans of time instead.
    """
    if len(samples) < 2 * BLOCKS:
        raise ValueError(f"{len(samples)} samples are too few, it takes {2 * BLOCKS}")
    size = len(samples) / BLOCKS
    medians = [
        statistics.median(samples[math.ceil(n * size) : math.ceil((n + 1) * size)])
        for n in range(BLOCKS)
    ]
    slope, start = statistics.linear_regression(range(BLOCKS), medians)
    residues = sum((value - start - slope * n) ** 2 for n, value in enumerate(medians))
    squares = BLOCKS * (BLOCKS**2 - 1) / 12
    spread = T_975 * math.sqrt(residues / (BLOCKS - 2) / squares) * BLOCKS
    growth = slope * BLOCKS
    return Trend(statistics.median(samples), growth, growth - spread, growth + spread)
