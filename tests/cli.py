"""Ways to run `python client.py` in tests: in this process, as one of its own, in a terminal."""

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import unittest.mock
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import commands
from tests.wait import until

CLIENT = Path(__file__).resolve().parent.parent / "client.py"


@dataclass
class Done:
    code: int
    out: str
    err: str


def start(
    environ: Mapping[str, str], *args: str, stdin: int | None = subprocess.DEVNULL
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(CLIENT), *args],
        env=dict(environ),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(environ: Mapping[str, str], *args: str, stdin: str | None = None) -> Done:
    """Run the command in this process, which saves it the half second of its imports."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    with (
        unittest.mock.patch.dict(os.environ, environ, clear=True),
        unittest.mock.patch.object(sys, "stdin", io.StringIO(stdin or "")),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = commands.main(args)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            for number, handler in signals.items():
                signal.signal(number, handler)
    texts = []
    for stream in (out, err):
        stream.flush()
        stream.seek(0)
        texts.append(stream.read())
    return Done(code, *texts)


def run_apart(environ: Mapping[str, str], *args: str) -> Done:
    """Run the command as its users do."""
    process = start(environ, *args)
    out, err = process.communicate(timeout=60)
    return Done(process.returncode, out, err)


class Terminal:
    """A command that runs in a terminal of its own."""

    def __init__(self, environ: Mapping[str, str], *args: str) -> None:
        self._fd, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, str(CLIENT), *args],
            env={**environ, "TERM": "xterm"},
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
        )
        os.close(child)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def until(self, text: str) -> None:
        until(lambda: self._read() and text in self.shown, 20, f"{text!r} on the terminal")

    def _read(self) -> bool:
        with contextlib.suppress(OSError):
            while select.select([self._fd], [], [], 0.05)[0]:
                self.shown += os.read(self._fd, 4096).decode()
        return True

    def end(self) -> int:
        code = self.process.wait(20)
        self._read()
        os.close(self._fd)
        return code
