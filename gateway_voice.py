"""The voice file: a person's own Python file with a phone line's assistant, tools and documents.

Owns how it is loaded and checked, and how its functions are run: blocking ones in a
thread, all of them within a limit, and so that nothing of a call gets into a log.
Knows nothing of Vapi's messages (gateway_vapi.py). `examples/voice.py` shows one.
"""

import asyncio
import contextlib
import inspect
import logging
import os
import stat
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from errors import ConfigError, RequestError

TOOL_LIMIT_S = 15.0
"""How long a tool may take unless the file says otherwise: less than the 20 s that Vapi waits."""

MAX_RUNNING = 32
"""Calls of blocking functions at once; one that hangs keeps its thread for good."""

MODULE = "voice_file"
HOOKS = ("assistant", "transfer", "documents")

log = logging.getLogger("gateway.voice")

Outcome = tuple[Any, BaseException | None]


class _Busy(Exception):
    """As many calls are running as may."""


class Voice:
    """What a voice file offers; RequestError, which quotes nothing, where a function fails."""

    def __init__(self, module: ModuleType, path: str) -> None:
        self._path = path
        self._running = 0
        self._tasks: set[asyncio.Future[Outcome]] = set()
        faults: list[str] = []
        self.assistant: Any = getattr(module, "ASSISTANT", None)
        """The assistant where it is the same for every call: its id or Vapi's object."""
        self.hooks = {name: _hook(module, name, faults) for name in HOOKS}
        self.tools = _tools(module, faults)
        self.tool_limit_s = getattr(module, "TOOL_LIMIT_S", TOOL_LIMIT_S)
        if not _is_number(self.tool_limit_s) or not 0 < self.tool_limit_s < float("inf"):
            faults.append("TOOL_LIMIT_S is not a positive number of seconds")
        if self.assistant is not None:
            faults += _assistant_faults(self.assistant)
            if self.hooks["assistant"]:
                faults.append("both ASSISTANT and assistant() are there; keep one")
        if not (faults or self.assistant or any(self.hooks.values()) or self.tools):
            faults.append("none of ASSISTANT, assistant, TOOLS, transfer and documents is there")
        if faults:
            raise ConfigError([f"{path}: {fault}" for fault in faults])

    def has(self, hook: str) -> bool:
        """Return whether the file defines one of HOOKS."""
        return self.hooks[hook] is not None

    async def ask(self, hook: str, message: dict[str, Any], limit_s: float) -> Any:
        """Call one of HOOKS with Vapi's message."""
        function = self.hooks[hook]
        if function is None:
            raise RequestError(f"{hook} is not set up")
        return await self._call(hook, function, (message,), {}, limit_s)

    async def use(self, tool: str, arguments: dict[str, Any]) -> str:
        """Call a tool and return its result as one line of text."""
        function = self.tools.get(tool)
        if function is None:
            raise RequestError("there is no tool of that name")
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError:
            raise RequestError("the arguments do not fit the tool") from None
        result = await self._call(tool, function, (), arguments, self.tool_limit_s)
        try:
            return as_line(result)
        except (TypeError, ValueError, RecursionError) as error:
            raise self._failed(tool, error) from None

    async def _call(
        self,
        name: str,
        function: Callable[..., Any],
        positional: tuple[Any, ...],
        named: dict[str, Any],
        limit_s: float,
    ) -> Any:
        work = asyncio.ensure_future(self._outcome(function, positional, named))
        # Held here, because the event loop itself does not keep what it runs.
        self._tasks.add(work)
        work.add_done_callback(self._tasks.discard)
        try:
            # Not asyncio.wait_for, which waits for a function that ignores its cancellation.
            await asyncio.wait({work}, timeout=limit_s)
        finally:
            late = not work.done()
            work.cancel()
        if late:
            log.warning("%s: %s took longer than %g s", self._path, name, limit_s)
            raise RequestError("it took too long")
        result, error = (None, None) if work.cancelled() else work.result()
        if isinstance(error, _Busy):
            log.warning("%s: %s was refused, %d calls are running", self._path, name, MAX_RUNNING)
            raise RequestError("too many calls are running")
        if error or work.cancelled():
            raise self._failed(name, error)
        return result

    async def _outcome(
        self, function: Callable[..., Any], positional: tuple[Any, ...], named: dict[str, Any]
    ) -> Outcome:
        # An outcome instead of an exception: whatever the event loop is left with, it would log.
        if inspect.iscoroutinefunction(function):
            return await _awaited(function(*positional, **named))
        result, error = await self._in_thread(lambda: function(*positional, **named))
        if inspect.iscoroutine(result):
            return await _awaited(result)
        return result, error

    async def _in_thread(self, call: Callable[[], Any]) -> Outcome:
        if self._running >= MAX_RUNNING:
            return None, _Busy()
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Outcome] = loop.create_future()

        def settle(found: Outcome) -> None:
            self._running -= 1
            if not outcome.done():
                outcome.set_result(found)

        def work() -> None:
            try:
                found: Outcome = (call(), None)
            except BaseException as error:
                found = (None, error)
            # The loop is closed where the gateway ended meanwhile.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, found)

        self._running += 1
        # No pool: at the end a pool waits for its threads, and a function may hang.
        threading.Thread(target=work, daemon=True).start()
        return await outcome

    def _failed(self, name: str, error: BaseException | None) -> RequestError:
        # Where and of what type, for the file's author; an exception's text may quote the caller.
        kind = type(error).__name__ if error else "cancelled"
        log.warning("%s: %s failed%s: %s", self._path, name, _where(error, self._path), kind)
        return RequestError("it failed")


async def _awaited(work: Coroutine[Any, Any, Any]) -> Outcome:
    try:
        return await work, None
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        return None, error


def as_line(result: Any) -> str:
    """Return a tool's result as Vapi takes it: text without line breaks.

    Source: docs.vapi.ai/tools/custom-tools-troubleshooting, "Common format mistakes".
    """
    if result is None:
        return "done"
    text = result if isinstance(result, str) else msgspec.json.encode(result).decode()
    return " ".join(text.splitlines())


def load(path: str) -> Voice:
    """Read and run a voice file; ConfigError says what is wrong with it."""
    try:
        # Checked on the opened file, and run as read, so that it cannot be exchanged in between.
        with Path(path).expanduser().open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            source = file.read() if stat.S_ISREG(mode) else b""
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror}"]) from None
    if not stat.S_ISREG(mode):
        raise ConfigError([f"{path} is not a regular file"])
    if mode & 0o022:
        raise ConfigError(
            [
                f"{path} can be written by others (mode {stat.S_IMODE(mode):04o}), and the gateway "
                f"runs what stands in it; run: chmod go-w {path}"
            ]
        )
    module = ModuleType(MODULE)
    module.__file__ = path
    # Dataclasses and type hints look their module up.
    sys.modules[MODULE] = module
    try:
        exec(compile(source, path, "exec"), module.__dict__)  # noqa: S102 - what the file is for
    except SyntaxError as error:
        raise ConfigError(
            [f"{path} is not valid Python: {error.msg}, line {error.lineno}"]
        ) from None
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}{_where(error, path)}: {error}"
        raise ConfigError([f"{path} cannot be loaded: {said}"]) from None
    return Voice(module, path)


def _where(error: BaseException | None, path: str) -> str:
    """Return the file's own line that led to an error, as the end of a clause."""
    frames = traceback.extract_tb(error.__traceback__ if error else None)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    return f" at line {lines[-1]}" if lines else ""


def _hook(module: ModuleType, name: str, faults: list[str]) -> Callable[..., Any] | None:
    function = getattr(module, name, None)
    if function is None:
        return None
    if not callable(function):
        faults.append(f"{name} is not a function")
        return None
    signature = _signature(function)
    try:
        if signature:
            signature.bind({})
    except TypeError:
        faults.append(f"{name} does not take one argument, the message")
    return function  # type: ignore[no-any-return]


def _tools(module: ModuleType, faults: list[str]) -> dict[str, Callable[..., Any]]:
    listed = getattr(module, "TOOLS", [])
    if not isinstance(listed, list | tuple):
        faults.append("TOOLS is not a list")
        return {}
    tools: dict[str, Callable[..., Any]] = {}
    for number, function in enumerate(listed):
        name = getattr(function, "__name__", "")
        signature = _signature(function)
        if not (signature and name.isidentifier()):
            faults.append(f"TOOLS[{number}] is not a function with a name")
        elif name in tools:
            faults.append(f"TOOLS names {name} twice")
        elif any(
            parameter.kind is parameter.POSITIONAL_ONLY
            for parameter in signature.parameters.values()
        ):
            faults.append(f"{name} has parameters without a name, and a tool is called by name")
        else:
            tools[name] = function
    return tools


def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _assistant_faults(assistant: Any) -> list[str]:
    if not isinstance(assistant, str | dict) or not assistant:
        return ["ASSISTANT is neither an assistant's id nor Vapi's assistant object"]
    try:
        msgspec.json.encode(assistant)
    except (TypeError, ValueError, RecursionError) as error:
        return [f"ASSISTANT cannot be written as JSON: {error}"]
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
