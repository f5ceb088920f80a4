"""What a worker under test is started with beside its own code: a clock that can be set.

Python imports a module of this name before anything else. To all of the worker's Python the
machine's clock is off by the seconds that the file of `CHAOS_CLOCK` holds, from the moment
they stand there; the monotonic clock goes on, as it does when a real clock is set. On SIGUSR2
the process writes to the file of `CHAOS_PROBE` how many asyncio tasks it has.
"""

import mmap
import os
import signal
import struct
import time

if path := os.environ.get("CHAOS_CLOCK"):
    with open(path, "rb") as file:
        _offset = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    _time, _time_ns = time.time, time.time_ns

    def _offset_s() -> float:
        (seconds,) = struct.unpack("<d", _offset[:8])
        return float(seconds)

    time.time = lambda: _time() + _offset_s()
    time.time_ns = lambda: _time_ns() + int(_offset_s() * 1e9)

if probe := os.environ.get("CHAOS_PROBE", ""):

    def _tell(*_: object) -> None:
        from asyncio import tasks

        living = sum(not task.done() for task in list(tasks._all_tasks))  # type: ignore[attr-defined]
        with open(f"{probe}.new", "w") as file:
            file.write(str(living))
        os.replace(f"{probe}.new", probe)

    signal.signal(signal.SIGUSR2, _tell)
