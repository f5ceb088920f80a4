"""What a worker lets out: every byte on the wire, what its processes write and show, its files.

Owns where one has to look. Knows nothing of what is looked for.
"""

import contextlib
import socket
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from local_runpod import LocalRunpod
from tests.workers import ROOT, RunningWorker

_SHARED_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
_MAX_FILE_BYTES = 64 * 2**20


class Wire:
    """A way to a port of this machine that keeps every byte that passes, in both directions."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._kept: list[bytearray] = []
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    @property
    def port(self) -> int:
        """The port that leads there."""
        return int(self._listener.getsockname()[1])

    def worker_env(self, platform: LocalRunpod, name: str) -> dict[str, str]:
        """Return what leads a worker of the platform this way."""
        env = platform.worker_env(name)
        return {name: self.url(value) for name, value in env.items()}

    def url(self, url: object) -> str:
        """Return an address of the platform by this way."""
        return str(url).replace(f":{self._to}/", f":{self.port}/")

    @property
    def carried(self) -> bytes:
        """All bytes, connection by connection."""
        with self._lock:
            return b"\0".join(bytes(one) for one in self._kept)

    def __enter__(self) -> Self:
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        # A close alone does not wake up who waits for a connection.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        with self._lock:
            for end in self._open:
                _shut(end)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                near.close()
                continue
            with self._lock:
                self._open |= {near, far}
            left = [near, far]
            for here, there in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(here, there, left), daemon=True).start()

    def _pump(self, here: socket.socket, there: socket.socket, left: list[socket.socket]) -> None:
        kept = bytearray()
        with self._lock:
            self._kept.append(kept)
        with contextlib.suppress(OSError):
            while data := here.recv(65536):
                with self._lock:
                    kept += data
                there.sendall(data)
        # The platform learns at once that a held poll was given up, and the other way round.
        _shut(here)
        _shut(there)
        with self._lock:
            left.remove(here)
            if not left:
                for end in (here, there):
                    self._open.discard(end)
                    end.close()


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


class Traces:
    """All that one worker lets out, by where it was found."""

    def __init__(self, platform: LocalRunpod, worker: RunningWorker, *wires: Wire) -> None:
        self.worker = worker
        self.shown: dict[str, bytes] = {}
        self.platform = platform
        self._wires = wires

    def look(self) -> None:
        """Note what /proc shows of each process now; what it does not show is fine too."""
        for process in self.worker.processes():
            folder = Path(f"/proc/{process.pid}")
            for name in ("cmdline", "environ", "comm"):
                with contextlib.suppress(OSError):
                    self.shown[f"{name} of {process.pid}"] = (folder / name).read_bytes()

    def sources(self) -> dict[str, bytes]:
        """Return everything that came out so far."""
        assert self.platform.exchanged_lost == 0
        found = {"log": self.worker.raw_log, **self.shown}
        found |= {f"wire {number}": wire.carried for number, wire in enumerate(self._wires)}
        # By job, so that what one answer holds in pieces stands together.
        bodies: defaultdict[str, list[bytes]] = defaultdict(list)
        for exchange in self.platform.exchanged:
            job = exchange.path.partition("?")[0].rpartition("/")[2]
            bodies[f"{exchange.direction}, {job}"] += [exchange.path.encode(), exchange.body]
        found |= {place: b"\n".join(parts) for place, parts in bodies.items()}
        for path in self._files():
            # Of sockets and of what vanishes meanwhile the name is all there is.
            found[f"name of {path}"] = str(path).encode()
            with contextlib.suppress(OSError):
                if path.is_file() and not path.is_symlink():
                    found[f"file {path}"] = path.read_bytes()
        return found

    def _files(self) -> Iterator[Path]:
        yield from self.worker.folder.rglob("*")
        for folder in (*map(Path, _SHARED_FOLDERS), ROOT):
            for path in folder.iterdir():
                with contextlib.suppress(OSError):
                    stat = path.lstat()
                    if stat.st_mtime >= self.worker.began_s and stat.st_size < _MAX_FILE_BYTES:
                        yield path
