"""The commands for jobs that outlive a connection: `submit`, `result`, `jobs`, `status`.

Owns what becomes of a record: it is removed once its answer was shown, never before.
"""

import argparse
from dataclasses import asdict
from datetime import datetime
from typing import Any

import client_config
import commands_interrupts
from client import Answer, AsyncClient, Response
from commands_ask import generation, print_answer, usage_line
from commands_parser import (
    INTERRUPTED_CODE,
    read_body,
    read_method,
    read_prompt,
    read_settings,
)
from commands_screen import Screen
from errors import JobError, PlatformFault, RecordError, RequestError, Unconfirmed
from job_records import JobRecords


def submit(args: argparse.Namespace, parser: argparse.ArgumentParser, screen: Screen) -> int:
    """Hand over a job and print its id."""
    if args.route is None:
        if args.body is not None or args.method is not None:
            parser.error("--body and --method belong to --route")
        work = _submit(args, screen, read_prompt(args, parser), None)
    elif args.prompt is not None or args.system or args.model or args.option:
        parser.error("a --route takes a --body, no prompt and no options of one")
    else:
        work = _submit(args, screen, "", read_body(args, parser))
    return commands_interrupts.run(work)


async def _submit(args: argparse.Namespace, screen: Screen, prompt: str, body: Any) -> int:
    async with AsyncClient(read_settings(args)) as client:
        try:
            if args.route is None:
                job = await client.submit(prompt, **generation(args))
            else:
                job = await client.submit_request(args.route, body, method=read_method(args))
        except (Unconfirmed, PlatformFault) as error:
            screen.note(
                f"error: {error}\nIf the platform's console shows the job, `result` with its id "
                "opens its answer; the record is kept."
            )
            return error.exit_code
    screen.text(job.id + "\n")
    return 0


def result(args: argparse.Namespace, screen: Screen) -> int:
    """Print the answer of a submitted job."""
    try:
        return commands_interrupts.run(_result(args, screen))
    except KeyboardInterrupt:
        screen.note(f"interrupted; the job goes on, `result {args.job_id}` asks again")
        return INTERRUPTED_CODE


async def _result(args: argparse.Namespace, screen: Screen) -> int:
    code = 0
    async with AsyncClient(read_settings(args, with_key=False)) as client:
        try:
            answer = await client.result(
                args.job_id, timeout_s=0 if args.no_wait else None, on_progress=screen.progress
            )
        except RequestError as error:
            # What the worker said under seal is the answer, an error too.
            screen.note(f"error: {error}")
            code = error.exit_code
        else:
            _print(answer, args, screen)
        finally:
            screen.clear()
        if not args.keep and (job := client.records.find(args.job_id)):
            client.records.discard(job)
    return code


def _print(answer: Answer | Response, args: argparse.Namespace, screen: Screen) -> None:
    if isinstance(answer, Answer):
        if args.json:
            screen.json(answer.to_dict())
        else:
            print_answer(answer, screen)
    else:
        body = answer.body.decode(errors="replace")
        if args.json:
            screen.json({**asdict(answer), "body": body})
        else:
            screen.text(body)
            screen.end_text()
    if args.usage:
        screen.note(usage_line(answer))


def jobs(args: argparse.Namespace, screen: Screen) -> int:
    """List the records, the oldest first."""
    records = JobRecords(client_config.load_state_dir())
    records.forget()
    found, faults = records.listed()
    rows = [{**job.public(), "record": str(records.path(job))} for job in found]
    if args.json:
        screen.json(rows)
    else:
        for job, row in zip(found, rows, strict=True):
            at = datetime.fromtimestamp(job.issued_at).strftime("%Y-%m-%d %H:%M:%S")
            screen.text(f"{job.id or '(no id)'}  {job.endpoint_id}  {at}  {row['record']}\n")
        if not rows and not faults:
            screen.note(f"no submitted job waits in {records.folder}")
    for fault in faults:
        screen.note(f"error: {fault}")
    return RecordError.exit_code if faults else 0


async def status(args: argparse.Namespace, screen: Screen) -> int:
    """Print what the platform says of a job, and what is recorded of it."""
    async with AsyncClient(read_settings(args, with_key=False)) as client:
        recorded: dict[str, Any] = {}
        try:
            if record := client.records.find(args.job_id):
                recorded = {"record": record.public()}
        except RecordError as error:
            screen.note(f"error: {error}")
        try:
            state = await client.status(args.job_id)
            state.pop("output", None)  # ciphertext; `result` opens it
            screen.json({**state, **recorded})
        except JobError:
            if recorded:
                screen.json({"id": args.job_id, **recorded})
            raise
    return 0
