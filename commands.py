"""The command `python client.py`: arguments, what is printed where, and exit codes.

Text goes to stdout as it arrives, everything else to stderr. Keys are never
arguments, and nothing that was said is written to any file. The check list of
`doctor` is in `doctor`, the library in `client`.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NoReturn, TextIO, TypeVar

import client_config
import errors
from client import Answer, AsyncClient, AsyncStream, ClientSettings, Progress, Response
from crypto import Key, generate_key
from errors import ConfigError, SealedError

T = TypeVar("T")

USAGE_CODE = 2
BROKEN_PIPE_CODE = 141
INTERRUPTED_CODE = 130

_CONTROLS = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}

_DESCRIPTION = """\
Talk to a private vLLM worker through a platform that can read nothing of it.

  %(prog)s "prompt"     answer one prompt (the word `ask` may stand before it)
  %(prog)s < file       the same from a pipe; with a prompt, the file follows it
"""


def printable(text: str) -> str:
    """Return text whose control characters a terminal shows instead of obeying."""
    return text.translate(_CONTROLS)


def exit_codes() -> str:
    """Return the table of exit codes, one a line."""
    rows = {0: "success", 1: "another error", USAGE_CODE: "wrong arguments"}
    for name in dir(errors):
        kind = getattr(errors, name)
        if isinstance(kind, type) and issubclass(kind, SealedError) and "exit_code" in vars(kind):
            summary = (kind.__doc__ or "").split("\n")[0].rstrip(".")
            rows.setdefault(kind.exit_code, f"{name}: {summary[:1].lower()}{summary[1:]}")
    rows[INTERRUPTED_CODE] = "interrupted or cancelled; the job was cancelled"
    rows[BROKEN_PIPE_CODE] = "whoever read the output went away; the job was cancelled"
    lines = (f"  {code:>3}  {text}" for code, text in sorted(rows.items()))
    return "exit codes:\n" + "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE_CODE, f"{self.prog}: {printable(message)}\n")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 10**9:
        raise ValueError
    return value


def _options() -> _Parser:
    parser = _Parser(add_help=False)
    group = parser.add_argument_group("connection")
    group.add_argument("--endpoint", metavar="ID", help="endpoint id (RUNPOD_ENDPOINT_ID)")
    group.add_argument("--api-base", metavar="URL", help="platform (RUNPOD_API_BASE)")
    group.add_argument("--key-file", metavar="FILE", help="encryption key, mode 0600")
    group.add_argument("--api-key-file", metavar="FILE", help="API key, mode 0600")
    group.add_argument("--timeout", metavar="S", type=_seconds, help="longest time for an answer")
    group.add_argument("--wait", metavar="S", type=_seconds, help="longest time in the queue")
    group.add_argument("--ttl", metavar="S", type=_seconds, help="how long a request is valid")
    group.add_argument("-v", "--verbose", action="store_true", help="progress, terminal or not")
    return parser


def _generation() -> _Parser:
    parser = _Parser(add_help=False)
    group = parser.add_argument_group("generation")
    group.add_argument("-s", "--system", metavar="TEXT", help="system prompt")
    group.add_argument("-m", "--model", metavar="NAME", help="model, if the worker has several")
    group.add_argument(
        "-o",
        "--option",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="one of vLLM's sampling parameters; the value is JSON, or else text",
    )
    group.add_argument("-u", "--usage", action="store_true", help="usage and timings on stderr")
    group.add_argument("--no-stream", action="store_true", help="print the answer when it is whole")
    return parser


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        description=_DESCRIPTION,
        epilog=exit_codes(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    options, generation = _options(), _generation()

    def add(name: str, summary: str, *parents: _Parser) -> _Parser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary,
            parents=[*parents, options],
            epilog=exit_codes(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    ask = add("ask", "answer one prompt (the default)", generation)
    ask.add_argument("prompt", nargs="?")
    ask.add_argument("--json", action="store_true", help="the whole answer as one JSON object")
    add("chat", "converse; /clear forgets, /exit leaves", generation)
    request = add("request", "call an OpenAI or vLLM route, such as /v1/embeddings")
    request.add_argument("route")
    request.add_argument("--body", metavar="JSON", help="the body; @FILE reads a file, - stdin")
    request.add_argument("--method", choices=("GET", "POST"), help="POST with a body, else GET")
    serve = add("serve", "serve the OpenAI API on this machine, for other programs")
    serve.add_argument("--host", help="the address to listen on (GATEWAY_HOST)")
    serve.add_argument("--port", help="the port to listen on (GATEWAY_PORT)")
    commands.add_parser("keygen", help="make an encryption key", description="Make a key.")
    check = add("doctor", "check keys, platform, worker and clock")
    check.add_argument("--no-worker", action="store_true", help="do not start a worker (or pay)")
    add("health", "show the platform's counts of jobs and workers")
    add("status", "show the state of a job").add_argument("job_id", metavar="ID")
    add("cancel", "cancel a job").add_argument("job_id", metavar="ID")
    return parser


COMMANDS = frozenset(
    {"ask", "chat", "request", "keygen", "doctor", "health", "status", "cancel", "-h", "--help"}
)


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
        return "running"
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


def _settings(args: argparse.Namespace, *, with_key: bool = True) -> ClientSettings:
    return client_config.load(_overrides(args), with_key=with_key)


def _overrides(args: argparse.Namespace) -> dict[str, str | None]:
    def number(value: float | None) -> str | None:
        return None if value is None else f"{value:g}"

    return {
        "RUNPOD_ENDPOINT_ID": args.endpoint,
        "RUNPOD_API_BASE": args.api_base,
        "ENCRYPTION_KEY_FILE": args.key_file,
        "RUNPOD_API_KEY_FILE": args.api_key_file,
        "CLIENT_TIMEOUT_S": number(args.timeout),
        "CLIENT_WAIT_S": number(args.wait),
        "CLIENT_TTL_S": number(args.ttl),
    }


def _sampling(pairs: Sequence[Sequence[str]]) -> dict[str, Any]:
    sampling: dict[str, Any] = {}
    for name, text in pairs:
        try:
            sampling[name] = json.loads(text)
        except ValueError:
            sampling[name] = text
    return sampling


def _prompt(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    given: str | None = args.prompt
    piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    parts = [part for part in (given, piped) if part and part.strip()]
    if not parts:
        parser.error("no prompt: give one as an argument or on stdin")
    return "\n\n".join(parts)


def _usage_line(answer: Answer | Response) -> str:
    usage, timings = answer.usage or {}, answer.timings
    counts = (
        f"{usage.get('prompt_tokens', '?')} tokens in, {usage.get('completion_tokens', '?')} out"
    )
    times = ", ".join(
        f"{name} {timings[key]:.0f} ms"
        for key, name in (("queue_ms", "queue"), ("first_token_ms", "first"), ("total_ms", "total"))
        if isinstance(timings.get(key), int | float)
    )
    return f"{counts}; {times}; job {answer.job_id}"


async def _ask(args: argparse.Namespace, prompt: str, screen: Screen) -> int:
    async with AsyncClient(_settings(args)) as client:
        messages = [{"role": "user", "content": prompt}]
        whole = args.json or args.no_stream
        answer = await _converse(client, args, messages, screen, whole=whole, show=not args.json)
    if args.json:
        screen.json(answer.to_dict())
    if args.usage:
        screen.note(_usage_line(answer))
    return 0


async def _converse(
    client: AsyncClient,
    args: argparse.Namespace,
    messages: list[dict[str, str]],
    screen: Screen,
    *,
    whole: bool,
    show: bool = True,
) -> Answer:
    options: dict[str, Any] = {
        "system": args.system,
        "model": args.model,
        "sampling_params": _sampling(args.option),
        "on_progress": screen.progress,
    }
    try:
        if whole:
            answer: Answer = await client.chat(messages, **options)
            if show:
                _print_whole(answer, screen)
            return answer
        stream: AsyncStream
        async with client.chat(messages, stream=True, **options) as stream:
            async for delta in stream:
                if delta.index == 0:
                    screen.text(delta.text)
        answer = await stream.answer()
        _print_others(answer, screen)
        return answer
    finally:
        screen.clear()


def _print_whole(answer: Answer, screen: Screen) -> None:
    screen.text(answer.text)
    _print_others(answer, screen)


def _print_others(answer: Answer, screen: Screen) -> None:
    screen.end_text()
    for choice in answer.choices[1:]:
        screen.text(f"\n--- choice {choice.index} ---\n{choice.text}")
        screen.end_text()
    for choice in answer.choices:
        for call in choice.tool_calls:
            function = call["function"]
            screen.text(f"[tool call] {function['name']}({function['arguments']})\n")
    screen.end_text()


async def _request(args: argparse.Namespace, body: Any, screen: Screen) -> int:
    method = args.method or ("GET" if body is None else "POST")
    async with AsyncClient(_settings(args)) as client:
        options = {"method": method, "on_progress": screen.progress}
        if isinstance(body, dict) and body.get("stream") is True:
            async with client.request(args.route, body, stream=True, **options) as stream:
                async for event in stream:
                    screen.text(event.decode(errors="replace") + "\n\n")
        else:
            response = await client.request(args.route, body, stream=False, **options)
            screen.text(response.body.decode(errors="replace"))
    screen.end_text()
    return 0


def _body(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Any:
    text: str | None = args.body
    if text is None:
        return None
    try:
        if text == "-":
            text = sys.stdin.read()
        elif text.startswith("@"):
            with open(text[1:], encoding="utf-8") as file:
                text = file.read()
        body = json.loads(text)
    except (OSError, ValueError) as error:
        parser.error(f"--body: {error}")
    if not isinstance(body, dict):
        parser.error("--body is not a JSON object")
    return body


def _chat(args: argparse.Namespace, screen: Screen) -> int:
    """Read a turn, print its answer, until the input ends; what was said is kept in memory only."""
    settings = _settings(args)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its editing and its recall
        screen.note(
            "/clear forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
        )
    history: list[dict[str, str]] = []
    with asyncio.Runner() as runner:
        client = AsyncClient(settings)
        try:
            while (line := _read_line(interactive)) is not None:
                match line.strip():
                    case "":
                        continue
                    case "/exit" | "/quit":
                        break
                    case "/clear":
                        history.clear()
                        screen.note("forgotten")
                        continue
                    case command if command.startswith("/"):
                        screen.note(f"unknown command {command}; there are /clear and /exit")
                        continue
                turn = [*history, {"role": "user", "content": line}]
                try:
                    answer = runner.run(_converse(client, args, turn, screen, whole=args.no_stream))
                except KeyboardInterrupt:
                    screen.end_text()
                    screen.note("stopped; the job was cancelled")
                    if not interactive:
                        raise
                    continue
                except SealedError as error:
                    screen.end_text()
                    screen.note(f"error: {error}")
                    if not interactive:
                        return error.exit_code
                    continue
                history = [*turn, {"role": "assistant", "content": answer.text}]
                if args.usage:
                    screen.note(_usage_line(answer))
        finally:
            runner.run(client.close())
    return 0


def _read_line(interactive: bool) -> str | None:
    if not interactive:
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    try:
        return input("> ")
    except EOFError:
        print()
        return None


async def _plain(
    args: argparse.Namespace, call: Callable[[AsyncClient], Awaitable[Any]], screen: Screen
) -> int:
    async with AsyncClient(_settings(args, with_key=False)) as client:
        screen.json(await call(client))
    return 0


def _keygen() -> int:
    key = generate_key()
    print(key)
    print(
        f"key id {Key.parse(key).id}\n"
        "Set it as ENCRYPTION_KEY on the endpoint and here. Whoever has it can read everything;\n"
        "without it nobody can, you included.",
        file=sys.stderr,
    )
    return 0


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser, screen: Screen) -> int:
    match args.command:
        case "keygen":
            return _keygen()
        case "chat":
            return _chat(args, screen)
        case "ask":
            return asyncio.run(_ask(args, _prompt(args, parser), screen))
        case "request":
            return asyncio.run(_request(args, _body(args, parser), screen))
        case "doctor":
            return _doctor(args, screen)
        case "serve":
            return _serve(args)
        case "health":
            return asyncio.run(_plain(args, lambda client: client.health(), screen))
        case "status":
            return asyncio.run(_plain(args, lambda client: client.status(args.job_id), screen))
        case _:
            return asyncio.run(_plain(args, lambda client: client.cancel(args.job_id), screen))


def _serve(args: argparse.Namespace) -> int:
    # Only here: what it needs beside the client is an extra of the package.
    try:
        import gateway
        import gateway_config
    except ModuleNotFoundError as error:
        raise ConfigError(
            [f"{error.name} is not installed; run: pip install 'sealed-vllm[gateway]'"]
        ) from None
    overrides = {**_overrides(args), "GATEWAY_HOST": args.host, "GATEWAY_PORT": args.port}
    return gateway.run(gateway_config.load(overrides))


def _doctor(args: argparse.Namespace, screen: Screen) -> int:
    # Only here, for the time that its own imports take.
    import doctor

    def show(finding: doctor.Finding) -> None:
        screen.clear()
        screen.text(f"{finding.verdict:<4}  {finding.check}: {finding.told}\n")
        if finding.advice:
            screen.text(f"      → {finding.advice}\n")

    work: Coroutine[Any, Any, int] = doctor.examine(
        lambda with_key: _settings(args, with_key=with_key),
        wake=not args.no_worker,
        show=show,
        on_progress=screen.progress,
    )
    return asyncio.run(work)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        arguments = ["ask", *arguments]
    for stream in (sys.stdout, sys.stderr):
        _tolerate(stream)
    # Whoever ends this process wants the job ended too: the same way as Ctrl-C.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    parser = build_parser()
    args = parser.parse_args(arguments)
    screen = Screen(verbose=getattr(args, "verbose", False))
    try:
        return _run(args, parser, screen)
    except KeyboardInterrupt:
        screen.note("interrupted")
        return INTERRUPTED_CODE
    except BrokenPipeError:
        # Python would complain about the pipe once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE_CODE
    except ConfigError as error:
        screen.note(f"error: the settings cannot work\n{error}")
        return error.exit_code
    except SealedError as error:
        screen.note(f"error: {error}")
        return error.exit_code


def _tolerate(stream: TextIO) -> None:
    # A model may say what the terminal's encoding cannot.
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
