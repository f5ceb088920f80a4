"""The command line of the model cache, for people who prepare a volume: `python utils.py COMMAND`.

Owns arguments, output and exit codes. What a command does is done behind `utils`; settings come
from the environment through `config`, as the worker's do, so that both mean the same volume.

A command is one function with its arguments beside it and a line in COMMANDS. Results go to
stdout, progress and errors to stderr.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import config
import model_janitor
import model_lease
import model_plan
import readiness
import readiness_report
import utils
from config import Settings
from errors import ConfigError, ModelError, ModelOffline, SealedError
from model_cache import Repo, lock_folder_of, repo_id_of
from model_files import human_size
from model_lease import Pace
from model_needs import OPTION_NAMES
from utils import Verdict
from worker_environment import environment, prepare_hub, take_secrets

_DESCRIPTION = "Prepare and look after the models on a volume."
_EPILOG = """\
The settings are the worker's, from the environment. HF_HOME says where models are kept, which
is now %(cache)s; HF_TOKEN opens gated models.
A MODEL is what MODELS takes; separate several with spaces. fetch and verify without one take
those of MODELS. What goes wrong with one model does not keep them from the others.

exit codes: 0 success, 1 failure, 2 wrong arguments, 3 wrong settings, 4 damaged files,
            5 `plan`: does not fit, 6 `plan`: too tight or not known, 130 interrupted
"""
USAGE_CODE, DAMAGED_CODE, INTERRUPTED_CODE, ENDED_CODE = 2, 4, 130, 143

log = logging.getLogger("models")


class WrongArguments(SealedError):
    """Arguments that do not go together, or name nothing."""

    exit_code = USAGE_CODE


@dataclass(frozen=True)
class Command:
    """One command: `add_arguments` declares what it takes, `run` does it and returns a code."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Settings], int]


def _models(args: argparse.Namespace, settings: Settings) -> Sequence[str]:
    """Return the models that were named, else those of MODELS."""
    models: Sequence[str] = _named(args) or settings.models
    if not models:
        raise WrongArguments("name a model, such as org/name, or set MODELS")
    return models


def _named(args: argparse.Namespace) -> list[str]:
    """Return the models that were named; commas part them as in MODELS."""
    return [name for word in args.model for part in word.split(",") if (name := part.strip())]


def _each(models: Sequence[str], act: Callable[[str], int]) -> int:
    """Do something with every model, whatever becomes of the others; return the highest code."""
    code = 0
    for model in models:
        try:
            code = max(code, act(model))
        except ModelError as error:
            print(error, file=sys.stderr)
            code = max(code, error.exit_code)
    return code


def _home(settings: Settings) -> Path:
    """Return the cache to look into; one whose HF_HOME does not exist is a typing error."""
    if not settings.hf_home.is_dir():
        raise ConfigError([f"HF_HOME is {settings.hf_home}, where there is no folder: check it"])
    return settings.hub_cache


def _here(model: str, models: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Return where `utils` looks for one of `models`."""
    return {
        "hub_cache": settings.hub_cache,
        "model_path": settings.model_path_of(model, models),
        "model_dirs": settings.model_dirs,
    }


def _reach(settings: Settings) -> dict[str, Any]:
    """Return how `utils` fills the cache from the Hub."""
    return {
        "hub_cache": settings.hub_cache,
        "token": settings.hf_token,
        "endpoint": settings.hf_endpoint,
        "worker": settings.worker_id,
        "log": log,
    }


# --- fetch ---


def _fetch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="*", metavar="MODEL")


def _fetch(args: argparse.Namespace, settings: Settings) -> int:
    models = _models(args, settings)

    def fetch(model: str) -> int:
        places = {**_here(model, models, settings), **_reach(settings)}
        snapshot = utils.resolve(model, offline=settings.offline, **places)
        print(snapshot.path)
        return 0

    log.info("models go to %s; set HF_HOME to have them elsewhere", settings.hub_cache)
    return _each(models, fetch)


# --- verify ---


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="*", metavar="MODEL")
    parser.add_argument(
        "--sha256", action="store_true", help="read every file and compare it with its hash"
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="remove damaged files and fetch them again; without --sha256 only what names, sizes "
        "and headers show is known to be damaged",
    )


def _verify(args: argparse.Namespace, settings: Settings) -> int:
    models = _models(args, settings)

    def verify(model: str) -> int:
        places = _here(model, models, settings)
        verdict = utils.verify(model, sha256=args.sha256, log=log, **places)
        if verdict.faults and args.repair:
            _print_verdict(verdict, args.sha256)
            if settings.offline:
                raise ModelOffline(f"{model} cannot be repaired: HF_HUB_OFFLINE is set, unset it")
            utils.repair(model, verdict, **_reach(settings))
            verdict = utils.verify(model, sha256=args.sha256, log=log, **places)
        _print_verdict(verdict, args.sha256)
        return DAMAGED_CODE if verdict.faults else 0

    return _each(models, verify)


def _print_verdict(verdict: Verdict, hashed: bool) -> None:
    snapshot = verdict.snapshot
    for file, reason in verdict.faults.items():
        print(f"{snapshot.name}: damaged: {file}: {reason}")
    state = f"{len(verdict.faults)} damaged" if verdict.faults else "whole"
    hashes = ""
    if hashed and verdict.hashed:
        hashes = f", {verdict.hashed} of them by their hash"
    elif hashed and not verdict.faults:
        hashes = ", none by its hash: only models that were fetched from the Hub have known hashes"
    size = human_size(snapshot.bytes)
    print(
        f"{snapshot.name}: {state}; {verdict.files} files checked{hashes}; {size}, {snapshot.path}"
    )


# --- report ---


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--last", type=_count, default=4, metavar="N", help="how many starts")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them into a PNG, too")


def _count(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def _report(args: argparse.Namespace, settings: Settings) -> int:
    _home(settings)
    records = readiness.kept(settings.records, args.last)
    print(readiness_report.report(records))
    if args.plot and records:
        try:
            readiness_report.plot(records, args.plot)
        except ImportError:
            print("--plot needs matplotlib: pip install matplotlib", file=sys.stderr)
            return 1
    return 0


# --- janitor ---


def _janitor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--remove", action="store_true", help="remove it; without this, only look")
    parser.add_argument(
        "--unused",
        action="store_true",
        help="also the snapshots that no branch stands for and MODELS does not name by commit",
    )


def _janitor(args: argparse.Namespace, settings: Settings) -> int:
    cache = _home(settings)
    found = list(model_janitor.left_by_the_dead(cache))
    if args.unused:
        commits = {model.rpartition("@")[2] for model in settings.models}
        found += model_janitor.unused(cache, commits)
    for litter in found:
        print(f"{litter.repo_id}: {litter.what}, {human_size(litter.bytes)}")
        if args.remove:
            litter.remove()
    size = human_size(sum(litter.bytes for litter in found))
    if not found:
        print(f"nothing to remove in {cache}")
    elif args.remove:
        print(f"removed, {size} freed")
    else:
        print(f"nothing was removed; --remove frees {size}")
    if young := model_janitor.too_young(cache):
        print(f"left alone: {young} unfinished downloads, written to within the last hour")
    return 0


# --- lease ---


def _lease_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="*", metavar="MODEL", help="without one: all that are held")
    parser.add_argument(
        "--release",
        action="store_true",
        help="take the leases of the models that are named from their holders; a dead one's needs "
        f"no help, it passes on after {Pace().stale_s:.0f} s",
    )


def _lease(args: argparse.Namespace, settings: Settings) -> int:
    cache = _home(settings)
    names = [cache / Repo.parse(model).storage_name for model in _named(args)]
    if args.release and not names:
        raise WrongArguments("name the models whose leases are to be released")
    told = False
    for storage in names or [cache / path.name for path in (cache / ".locks").glob("models--*")]:
        folder, name = lock_folder_of(storage), repo_id_of(storage)
        silent_s = model_lease.silence_s(folder)
        if args.release and (holder := model_lease.take_away(folder)):
            print(f"{name}: taken from {holder}")
        elif silent_s is not None and (held := model_lease.leases(folder)):
            holder = model_lease.holder_of(held[-1])
            dead = silent_s > Pace().stale_s
            state = "; it is dead, whoever wants the model next takes over" if dead else ""
            print(f"{name}: {holder}, seen {silent_s:.0f} s ago{state}")
        elif names:
            print(f"{name}: nobody holds it")
        else:
            continue
        told = True
    if not told:
        print(f"nobody downloads into {cache}")
    return 0


COMMANDS = (
    Command("fetch", "make models present and complete", _fetch_arguments, _fetch),
    Command("verify", "say whether the files of models are whole", _verify_arguments, _verify),
    Command(
        "janitor",
        "find what was left behind, untouched for an hour, and may go from the volume",
        _janitor_arguments,
        _janitor,
    ),
    Command("lease", "say who downloads what", _lease_arguments, _lease),
    Command(
        "plan",
        "say whether a model fits the memory there is, without loading or downloading it",
        model_plan.add_arguments,
        model_plan.run,
    ),
    Command("report", "show the last starts side by side", _report_arguments, _report),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    log.setLevel(logging.INFO)
    # Whoever ends the command ends it tidily: downloads are stopped, leases given back.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED_CODE))
    environ = take_secrets(environment())
    settings, faults = config.read_for_models(environ, OPTION_NAMES)
    args = _build_parser(settings).parse_args(argv)
    prepare_hub(environment(), settings)
    if args.command == "plan":  # the others take no notice of the engine's settings
        faults += config.misspelt(environ, model_plan.SETTING_NAMES)
    try:
        if faults:
            raise ConfigError(faults)
        command = next(command for command in COMMANDS if command.name == args.command)
        return command.run(args, settings)
    except ConfigError as error:
        print(f"the settings cannot work:\n{error}", file=sys.stderr)
        return error.exit_code
    except SealedError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED_CODE


def _build_parser(settings: Settings) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="utils.py",
        description=_DESCRIPTION,
        epilog=_EPILOG % {"cache": settings.hub_cache},
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        about = command.help[0].upper() + command.help[1:] + "."
        command.add_arguments(
            parsers.add_parser(command.name, help=command.help, description=about)
        )
    return parser
