"""The real gateway as a process."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import httpx2

from tests.wait import until

GATEWAY = Path(__file__).resolve().parent.parent / "gateway.py"


class RunningGateway:
    """`python gateway.py` on a free port; `settings` are added to the client's `environ`."""

    def __init__(
        self,
        environ: Mapping[str, str],
        folder: Path,
        *,
        arguments: Sequence[str] = ("--port", "0"),
        **settings: str,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._log = folder / "out", folder / "log"
        with self._out.open("wb") as out, self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(GATEWAY), *arguments],
                env={
                    "PATH": os.environ["PATH"],
                    "GATEWAY_KEEPALIVE_S": "0.1",
                    "CLIENT_STATE_DIR": str(folder / "state"),
                    **environ,
                    **settings,
                },
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
            )
        self.http = httpx2.Client(timeout=60)

    @property
    def banner(self) -> str:
        """What it printed on stdout."""
        return self._out.read_text()

    @property
    def log(self) -> str:
        """What it wrote on stderr."""
        return self._log.read_text()

    @property
    def url(self) -> str:
        """Its address, without /v1."""
        line = self.banner.splitlines()[0]
        return line.split()[-1].removesuffix("/v1")

    def __enter__(self) -> Self:
        def told() -> bool:
            assert self.process.poll() is None, self.log
            return "models" in self.banner

        until(told, 60, "the gateway's banner")
        self.http.base_url = httpx2.URL(self.url)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Ask it to end, as a terminal does, and return its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)
