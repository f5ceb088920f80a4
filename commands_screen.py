"""The command's screen: text to stdout, everything else to stderr, nothing that steers a terminal.

Owns what is printed where and the progress line. Knows nothing of jobs or arguments.
"""

import json
import sys
from typing import Any

from answers import Progress

_CONTROLS = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def printable(text: str) -> str:
    """Return text whose control characters a terminal shows instead of obeying."""
    return text.translate(_CONTROLS)


class Screen:
    """Where output goes: text to stdout, the rest to stderr, a progress line if it is wanted."""

    def __init__(self, *, verbose: bool = False) -> None:
        self._terminal = sys.stdout.isatty()
        self._progress_terminal = sys.stderr.isatty()
        self._shows_progress = verbose or self._progress_terminal
        self._line_open = False
        self._ends_line = True

    def text(self, text: str) -> None:
        """Print a piece of the answer at once."""
        if not text:
            return
        self.clear()
        sys.stdout.write(printable(text) if self._terminal else text)
        sys.stdout.flush()
        self._ends_line = text.endswith("\n")

    def end_text(self) -> None:
        """End the last line of the answer."""
        if not self._ends_line:
            sys.stdout.write("\n")
            sys.stdout.flush()
        self._ends_line = True

    def json(self, value: Any) -> None:
        """Print a value as JSON."""
        self.clear()
        # In ASCII no character of it can steer a terminal.
        print(json.dumps(value, indent=2 if self._terminal else None), flush=True)

    def note(self, text: str) -> None:
        """Print a line to stderr."""
        self.clear()
        if self._terminal and not self._ends_line:
            self.end_text()
        print(printable(text), file=sys.stderr, flush=True)

    def progress(self, progress: Progress) -> None:
        """Show where the job stands."""
        if not self._shows_progress:
            return
        words = _progress_words(progress)
        if self._progress_terminal:
            sys.stderr.write(f"\r\x1b[K{words}")
            self._line_open = True
        else:
            sys.stderr.write(f"{words}\n")
        sys.stderr.flush()

    def clear(self) -> None:
        """Take the progress line away."""
        if self._line_open:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._line_open = False


def _progress_words(progress: Progress) -> str:
    if progress.state == "running":
        return f"running: {printable(progress.note)}" if progress.note else "running"
    words = f"queued {progress.waited_s:.0f} s"
    workers = progress.workers
    if workers is None:
        return words
    starting = workers.get("initializing", 0)
    if idle := workers.get("idle", 0):
        words += f", {idle} worker{'s' if idle > 1 else ''} idle"
    else:
        words += ", no worker idle"
    return words + (f", {starting} starting" if starting else "")
