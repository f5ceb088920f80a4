"""The command `python client.py`: which function serves which word, and exit codes.

The arguments are in `commands_parser`, what is printed where in `commands_screen`, how it is
interrupted in `commands_interrupts`, the commands that ask and wait in `commands_ask`, those of
submitted jobs in `commands_jobs`, the check list of `doctor` in `doctor`.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from typing import Any, TextIO

import commands_ask
import commands_interrupts
import commands_jobs
import hpke
from client import AsyncClient
from commands_parser import (
    BROKEN_PIPE_CODE,
    INTERRUPTED_CODE,
    build_parser,
    command_names,
    overrides,
    read_body,
    read_private_key,
    read_prompt,
    read_settings,
)
from commands_screen import Screen
from errors import ConfigError, SealedError
from keys import Key, generate_key


async def _plain(
    args: argparse.Namespace, call: Callable[[AsyncClient], Awaitable[Any]], screen: Screen
) -> int:
    async with AsyncClient(read_settings(args, with_key=False)) as client:
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


def _keygen_hpke() -> int:
    hpke.check_available()
    key = hpke.HpkePrivateKey.generate()
    print(f"HPKE_PRIVATE_KEY={key.text}\nHPKE_PUBLIC_KEY={key.public.text}")
    print(
        f"public key id {key.public.id}\n"
        "Set the first line on the endpoint, and only there, the second for every client.\n"
        "ENCRYPTION_KEY stays: it says who asks.",
        file=sys.stderr,
    )
    return 0


def _keygen_public(path: str) -> int:
    for key in hpke.HpkeKeyRing.parse(read_private_key(path)):
        print(f"HPKE_PUBLIC_KEY={key.public.text}")
        print(f"public key id {key.public.id}", file=sys.stderr)
    return 0


def _run(args: argparse.Namespace, parser: argparse.ArgumentParser, screen: Screen) -> int:
    match args.command:
        case "keygen" if args.public_of is not None:
            return _keygen_public(args.public_of)
        case "keygen":
            return _keygen_hpke() if args.hpke else _keygen()
        case "chat":
            return commands_ask.chat(args, screen)
        case "ask":
            return commands_interrupts.run(
                commands_ask.ask(args, read_prompt(args, parser), screen)
            )
        case "request":
            return commands_interrupts.run(
                commands_ask.request(args, read_body(args, parser), screen)
            )
        case "submit":
            return commands_jobs.submit(args, parser, screen)
        case "result":
            return commands_jobs.result(args, screen)
        case "jobs":
            return commands_jobs.jobs(args, screen)
        case "doctor":
            return _doctor(args, screen)
        case "serve":
            return _serve(args)
        case "health":
            return commands_interrupts.run(_plain(args, lambda client: client.health(), screen))
        case "status":
            return commands_interrupts.run(commands_jobs.status(args, screen))
        case _:
            return commands_interrupts.run(
                _plain(args, lambda client: client.cancel(args.job_id), screen)
            )


def _serve(args: argparse.Namespace) -> int:
    # Only here: what it needs beside the client is an extra of the package.
    try:
        import gateway
        import gateway_config
    except ModuleNotFoundError as error:
        raise ConfigError(
            [f"{error.name} is not installed; run in the clone: pip install '.[gateway]'"]
        ) from None
    given = {**overrides(args), "GATEWAY_HOST": args.host, "GATEWAY_PORT": args.port}
    return gateway.run(gateway_config.load(given))


def _doctor(args: argparse.Namespace, screen: Screen) -> int:
    # Only here, for the time that its own imports take.
    import doctor

    def show(finding: doctor.Finding) -> None:
        screen.clear()
        screen.text(f"{finding.verdict:<4}  {finding.check}: {finding.told}\n")
        if finding.advice:
            screen.text(f"      → {finding.advice}\n")

    work: Coroutine[Any, Any, int] = doctor.examine(
        lambda with_key: read_settings(args, with_key=with_key),
        wake=not args.no_worker,
        show=show,
        on_progress=screen.progress,
    )
    return commands_interrupts.run(work)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    names = command_names(parser)
    if not arguments or arguments[0] not in names:
        _check_misspelt(arguments, names, parser)
        arguments = ["ask", *arguments]
    for stream in (sys.stdout, sys.stderr):
        _tolerate(stream)
    commands_interrupts.listen()
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


def _check_misspelt(
    arguments: Sequence[str], names: Collection[str], parser: argparse.ArgumentParser
) -> None:
    # A prompt of one word that is nearly a command is more likely a slip, and a prompt costs money.
    word, *more = arguments or [""]
    alone = not more or more[0].startswith("-")
    if alone and (meant := difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.75)):
        parser.error(
            f"{word!r} is no command; is {meant[0]!r} meant? As a prompt it goes after the word ask"
        )


def _tolerate(stream: TextIO) -> None:
    # A model may say what the terminal's encoding cannot.
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
