"""The commands that ask and wait: `ask`, `chat` and `request`.

Owns how an answer is printed. Nothing that was said is written to any file; a job that
nobody waits for any more is cancelled by the client.
"""

import argparse
import asyncio
import contextlib
import sys
from typing import Any

import commands_interrupts
from client import Answer, AsyncClient, AsyncStream, Response
from commands_parser import read_method, read_sampling, read_settings
from commands_screen import Screen
from errors import SealedError


def usage_line(answer: Answer | Response) -> str:
    """Return counts and times of an answer in one line."""
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


async def ask(args: argparse.Namespace, prompt: str, screen: Screen) -> int:
    """Print the answer to one prompt."""
    async with AsyncClient(read_settings(args)) as client:
        messages = [{"role": "user", "content": prompt}]
        whole = args.json or args.no_stream
        answer = await _converse(client, args, messages, screen, whole=whole, show=not args.json)
    if args.json:
        screen.json(answer.to_dict())
    if args.usage:
        screen.note(usage_line(answer))
    return 0


def generation(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a prompt."""
    return {
        "system": args.system,
        "model": args.model,
        "sampling_params": read_sampling(args.option),
    }


async def _converse(
    client: AsyncClient,
    args: argparse.Namespace,
    messages: list[dict[str, str]],
    screen: Screen,
    *,
    whole: bool,
    show: bool = True,
) -> Answer:
    options = {**generation(args), "on_progress": screen.progress}
    try:
        if whole:
            answer: Answer = await client.chat(messages, **options)
            if show:
                print_answer(answer, screen)
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


def print_answer(answer: Answer, screen: Screen) -> None:
    """Print a whole answer: its first choice, then the others and the tool calls."""
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


async def request(args: argparse.Namespace, body: Any, screen: Screen) -> int:
    """Print what a route answers."""
    async with AsyncClient(read_settings(args)) as client:
        options = {"method": read_method(args), "on_progress": screen.progress}
        if isinstance(body, dict) and body.get("stream") is True:
            async with client.request(args.route, body, stream=True, **options) as stream:
                async for event in stream:
                    screen.text(event.decode(errors="replace") + "\n\n")
        else:
            response = await client.request(args.route, body, stream=False, **options)
            screen.text(response.body.decode(errors="replace"))
    screen.end_text()
    return 0


def chat(args: argparse.Namespace, screen: Screen) -> int:
    """Read a turn, print its answer, until the input ends; what was said is kept in memory only."""
    settings = read_settings(args)
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
                    case command if interactive and command.startswith("/"):
                        screen.note(f"unknown command {command}; there are /clear and /exit")
                        continue
                turn = [*history, {"role": "user", "content": line}]
                try:
                    answer = commands_interrupts.run_in(
                        runner, _converse(client, args, turn, screen, whole=args.no_stream)
                    )
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
                    screen.note(usage_line(answer))
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
