"""The command's arguments: the parser, its help, and what arguments become.

Owns names, options, exit codes and how settings, prompts and bodies are read from what
was typed or piped. Keys are never arguments. Knows nothing of what a command does.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import client_config
import errors
from client_config import ClientSettings
from commands_screen import printable
from errors import ConfigError, SealedError

USAGE_CODE = 2
BROKEN_PIPE_CODE = 141
INTERRUPTED_CODE = 130

_DESCRIPTION = """\
Talk to a private vLLM worker through a platform that can read nothing of it.

  %(prog)s "prompt"     answer one prompt (the word `ask` may stand before it)
  %(prog)s < file       the same from a pipe; with a prompt, the file follows it
"""


def exit_codes() -> str:
    """Return the table of exit codes, one a line."""
    rows = {0: "success", 1: "another error", USAGE_CODE: "wrong arguments"}
    for name in dir(errors):
        kind = getattr(errors, name)
        if isinstance(kind, type) and issubclass(kind, SealedError) and "exit_code" in vars(kind):
            summary = (kind.__doc__ or "").split("\n")[0].rstrip(".")
            rows.setdefault(kind.exit_code, f"{name}: {summary[:1].lower()}{summary[1:]}")
    rows[INTERRUPTED_CODE] = "interrupted or cancelled; the job too, unless it was submitted"
    rows[BROKEN_PIPE_CODE] = (
        "whoever read the output went away; the job was cancelled, unless it was submitted"
    )
    lines = (f"  {code:>3}  {text}" for code, text in sorted(rows.items()))
    return "exit codes:\n" + "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):  # argparse's own words
            message += "; put a prompt of several words in quotes"
        self.print_usage(sys.stderr)
        self.exit(USAGE_CODE, f"{self.prog}: {printable(message)}\n")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 10**9:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


_LIMITS = {
    "--timeout": "longest time for an answer",
    "--wait": "longest time in the queue",
    "--ttl": "how long a request is valid",
}


def _connection(*limits: str) -> _Parser:
    parser = _Parser(add_help=False)
    group = parser.add_argument_group("connection")
    group.add_argument("--endpoint", metavar="ID", help="endpoint id (RUNPOD_ENDPOINT_ID)")
    group.add_argument("--api-base", metavar="URL", help="platform (RUNPOD_API_BASE)")
    group.add_argument("--key-file", metavar="FILE", help="encryption key, mode 0600")
    group.add_argument("--api-key-file", metavar="FILE", help="API key, mode 0600")
    for name in limits:
        group.add_argument(name, metavar="S", type=_seconds, help=_LIMITS[name])
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
    return parser


def _printing(*, streams: bool, json: bool) -> _Parser:
    parser = _Parser(add_help=False)
    group = parser.add_argument_group("printing")
    group.add_argument("-u", "--usage", action="store_true", help="usage and timings on stderr")
    if streams:
        group.add_argument(
            "--no-stream", action="store_true", help="print the answer when it is whole"
        )
    if json:
        group.add_argument(
            "--json", action="store_true", help="the whole answer as one JSON object"
        )
    return parser


def _body() -> _Parser:
    parser = _Parser(add_help=False)
    group = parser.add_argument_group("route")
    group.add_argument("--body", metavar="JSON", help="the body; @FILE reads a file, - stdin")
    group.add_argument("--method", choices=("GET", "POST"), help="POST with a body, else GET")
    return parser


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        description=_DESCRIPTION,
        epilog=exit_codes(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    connection = _connection(*_LIMITS)
    generation, body = _generation(), _body()

    def add(name: str, summary: str, *parents: _Parser) -> _Parser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary,
            parents=parents,
            epilog=exit_codes(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    printing = _printing(streams=True, json=True)
    ask = add("ask", "answer one prompt (the default)", generation, printing, connection)
    ask.add_argument("prompt", nargs="?")
    printing = _printing(streams=True, json=False)
    add("chat", "converse; /clear forgets, /exit leaves", generation, printing, connection)
    request = add(
        "request", "call an OpenAI or vLLM route, such as /v1/embeddings", body, connection
    )
    request.add_argument("route")
    submit = add(
        "submit", "hand over a job, print its id and go", generation, body, _connection("--ttl")
    )
    submit.add_argument("prompt", nargs="?")
    submit.add_argument("--route", help="call a route instead, as `request` does")
    printing = _printing(streams=False, json=True)
    result = add(
        "result", "print the answer of a submitted job", printing, _connection("--timeout")
    )
    result.add_argument("job_id", metavar="ID")
    result.add_argument("--no-wait", action="store_true", help="if there is none yet, say so")
    result.add_argument("--keep", action="store_true", help="so that it can be asked for again")
    jobs = add("jobs", "list the jobs that were submitted and not collected")
    jobs.add_argument("--json", action="store_true", help="as a JSON list")
    status = add("status", "show the state of a job, and what is recorded of it", _connection())
    status.add_argument("job_id", metavar="ID")
    add("cancel", "cancel a job", _connection()).add_argument("job_id", metavar="ID")
    serve = add("serve", "serve the OpenAI API on this machine, for other programs", connection)
    serve.add_argument("--host", help="the address to listen on (GATEWAY_HOST)")
    serve.add_argument("--port", help="the port to listen on (GATEWAY_PORT)")
    keygen = commands.add_parser(
        "keygen", help="make an encryption key", description="Make a key, or a pair of keys."
    )
    keygen.add_argument(
        "--hpke", action="store_true", help="make a worker's key pair for public-key mode"
    )
    keygen.add_argument(
        "--public-of",
        metavar="FILE",
        help="make none: print the public key that belongs to the HPKE_PRIVATE_KEY in FILE "
        "(mode 0600), or - for stdin",
    )
    check = add("doctor", "check keys, platform, worker and clock", connection)
    check.add_argument("--no-worker", action="store_true", help="do not start a worker (or pay)")
    add("health", "show the platform's counts of jobs and workers", _connection())
    return parser


def command_names(parser: argparse.ArgumentParser) -> frozenset[str]:
    """Return the words that begin a command, all others a prompt."""
    return frozenset(subparsers(parser)) | {"-h", "--help"}


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    (commands,) = (
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    return dict(commands.choices)


def read_settings(args: argparse.Namespace, *, with_key: bool = True) -> ClientSettings:
    """Return the settings, those of the arguments before those of the environment."""
    return client_config.load(overrides(args), with_key=with_key)


def overrides(args: argparse.Namespace) -> dict[str, str | None]:
    """Return the settings that were given as arguments, as variables of the environment."""

    def number(name: str) -> str | None:
        value = getattr(args, name, None)
        return None if value is None else str(value)

    return {
        "RUNPOD_ENDPOINT_ID": args.endpoint,
        "RUNPOD_API_BASE": args.api_base,
        "ENCRYPTION_KEY_FILE": args.key_file,
        "RUNPOD_API_KEY_FILE": args.api_key_file,
        "CLIENT_TIMEOUT_S": number("timeout"),
        "CLIENT_WAIT_S": number("wait"),
        "CLIENT_TTL_S": number("ttl"),
    }


def read_sampling(pairs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return sampling parameters: values are JSON, or else text."""
    sampling: dict[str, Any] = {}
    for name, text in pairs:
        try:
            sampling[name] = json.loads(text)
        except ValueError:
            sampling[name] = text
    return sampling


def read_prompt(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """Return the prompt of the arguments, of stdin, or both."""
    given: str | None = args.prompt
    try:
        piped = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    except UnicodeDecodeError:
        parser.error("what stands on stdin is no text in this terminal's encoding")
    parts = [part for part in (given, piped) if part and part.strip()]
    if not parts:
        parser.error("no prompt: give one as an argument or on stdin")
    return "\n\n".join(parts)


def read_body(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Any:
    """Return the body of a route, None without one."""
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


def read_private_key(path: str) -> str:
    """Return HPKE_PRIVATE_KEY from a file, by itself or as `keygen --hpke` prints it.

    ConfigError for a file that is none or that others can read.
    """
    if path == "-":
        text = sys.stdin.read()
    else:
        try:
            text = client_config.read_key_file(path)
        except ValueError as error:
            raise ConfigError([f"--public-of: the file {error}"]) from None
    name = "HPKE_PRIVATE_KEY="
    named = [line.removeprefix(name) for line in text.splitlines() if line.startswith(name)]
    return named[0] if named else text


def read_method(args: argparse.Namespace) -> Literal["GET", "POST"]:
    """Return the method with which a route is called."""
    return args.method or ("GET" if args.body is None else "POST")
