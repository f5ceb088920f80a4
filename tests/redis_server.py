"""A real redis-server of the test's own, which it may stop, freeze and start anew."""

import contextlib
import functools
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import redis

from tests.wait import until
from tests.workers import ROOT

PASSWORD = "a password that no log may tell"


@functools.cache
def program() -> str:
    """Return the path of redis-server; without one the tests fail and say what to do."""
    found = subprocess.run([ROOT / "tools" / "setup_redis.sh"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


class RedisServer:
    """One server on loopback; `client` is a look into it beside the workers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self.url = f"redis://:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{self.port}/0"
        self.client: Any = redis.Redis.from_url(self.url)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        options = {
            "port": self.port,
            "bind": "127.0.0.1",
            "requirepass": PASSWORD,
            "save": "",
            "dir": self._folder,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self._process = subprocess.Popen([program(), *words], stdout=subprocess.DEVNULL)

        def answers() -> bool:
            with contextlib.suppress(redis.ConnectionError):
                return bool(self.client.ping())
            return False

        until(answers, 20, "redis-server")

    def stop(self) -> None:
        """Kill it; what it held is lost."""
        if self._process:
            self._process.kill()
            self._process.wait()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Let it accept connections and answer nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def marks(self) -> dict[bytes, bytes]:
        """Return everything that it holds."""
        return {name: self.client.get(name) for name in self.client.scan_iter()}

    def __enter__(self) -> "RedisServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.stop()
