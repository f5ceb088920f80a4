"""The check list of `client.py doctor`: what works, what does not and what to do about it.

Owns the order of the checks and their advice. Prints nothing itself and knows no
arguments.
"""

import importlib.metadata
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Literal

from client import AsyncClient, ClientSettings, Progress, versions
from errors import ConfigError, NoWorker, Rejected, RequestError, SealedError
from hpke import HpkePublicKey
from keys import KeyRing
from protocol import CLOCK_SKEW_S, VERSION

CLOCK_WARNING_S = CLOCK_SKEW_S / 2
"""A clock this wrong still works, but not by much."""

Verdict = Literal["ok", "note", "WARN", "FAIL", "skip"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check."""

    check: str
    verdict: Verdict
    told: str
    advice: str = ""


class _Patient:
    def __init__(self, show: Callable[[Finding], None]) -> None:
        self._show = show
        self.exit_code = 0

    def ok(self, check: str, told: str) -> None:
        self._show(Finding(check, "ok", told))

    def note(self, check: str, told: str) -> None:
        self._show(Finding(check, "note", told))

    def warn(self, check: str, told: str, advice: str) -> None:
        self._show(Finding(check, "WARN", told, advice))

    def skip(self, check: str, told: str) -> None:
        self._show(Finding(check, "skip", told))

    def fail(self, check: str, error: SealedError | str, advice: str = "") -> None:
        code = error.exit_code if isinstance(error, SealedError) else 1
        self.exit_code = self.exit_code or code
        told, _, more = str(error).partition("\n")
        self._show(Finding(check, "FAIL", told, advice or more))


async def examine(
    load: Callable[[bool], ClientSettings],
    *,
    wake: bool,
    show: Callable[[Finding], None],
    on_progress: Callable[[Progress], None],
) -> int:
    """Make every check that can be made; return 0, or the exit code of the first that failed.

    `load` reads the settings, with or without the encryption key; without `wake` no job is sent.
    """
    patient = _Patient(show)
    settings = _settings(patient, load)
    if settings is None:
        return patient.exit_code
    key_id = _key_id(patient, settings)
    if not _public_key(patient, settings):
        key_id = ""
    if not key_id:
        settings = replace(settings, encryption_key="", hpke_public_key="")
    async with AsyncClient(settings) as client:
        reachable = await _platform(patient, client, settings)
        if not wake:
            patient.skip("worker", "not asked, as told")
        elif not key_id or not reachable:
            patient.skip("worker", "not asked, because of what failed above")
        else:
            await _worker(patient, client, key_id, on_progress)
    _versions(patient)
    return patient.exit_code


def _settings(patient: _Patient, load: Callable[[bool], ClientSettings]) -> ClientSettings | None:
    try:
        settings = load(True)
    except ConfigError as error:
        for fault in error.faults:
            patient.fail("settings", fault)
        patient.exit_code = error.exit_code
        try:
            settings = load(False)
        except ConfigError:
            return None
    else:
        way = "its OpenAI route" if settings.transport == "openai" else "/run and /stream"
        told = f"endpoint {settings.endpoint_id} at {settings.api_base}, by {way}"
        patient.ok("settings", told)
    return settings


def _key_id(patient: _Patient, settings: ClientSettings) -> str:
    if not settings.encryption_key:
        return ""
    try:
        key = KeyRing.parse(settings.encryption_key).current(time.time())
    except ConfigError as error:
        for fault in error.faults:
            patient.fail("encryption key", fault)
        patient.exit_code = error.exit_code
        return ""
    told = ["well-formed", f"key id {key.id}", *([f"named {key.name}"] if key.name else ())]
    patient.ok("encryption key", ", ".join([*told, *key.terms.words(time.time())]))
    return key.id


def _public_key(patient: _Patient, settings: ClientSettings) -> bool:
    if not settings.hpke_public_key:
        patient.note(
            "public-key mode",
            "off; whoever gets the encryption key can read what was recorded "
            "(README, Public-key mode)",
        )
        return True
    try:
        worker_key = HpkePublicKey.parse(settings.hpke_public_key)
    except ConfigError as error:
        for fault in error.faults:
            patient.fail("public-key mode", fault)
        patient.exit_code = error.exit_code
        return False
    patient.ok(
        "public-key mode",
        f"on, the worker's public key has the id {worker_key.id}; nothing is sent without it",
    )
    return True


async def _platform(patient: _Patient, client: AsyncClient, settings: ClientSettings) -> bool:
    if settings.shows_api_key:
        patient.warn(
            "platform",
            "RUNPOD_API_BASE begins with http://: whoever is on the way reads the API key",
            "use https://, unless nobody else is in that network",
        )
    started_s = time.monotonic()
    try:
        reply = await client.endpoint.probe()
        took_ms = (time.monotonic() - started_s) * 1000
        health = await client.health()
    except SealedError as error:
        patient.fail("platform", error)
        return False
    safe = "" if settings.api_base.startswith("https:") else ", without TLS"
    patient.ok("platform", f"reached in {took_ms:.0f} ms, API key accepted{safe}")
    counts = []
    for group in ("workers", "jobs"):
        values = health.get(group)
        if isinstance(values, dict):
            shown = ", ".join(f"{name} {value}" for name, value in values.items() if value)
            counts.append(f"{group}: {shown or 'none'}")
    patient.ok("endpoint", "; ".join(counts) or "answers")
    if reply.date:
        try:
            theirs_s = parsedate_to_datetime(reply.date).timestamp()
        except ValueError:
            return True
        _clock(patient, "clock, by the platform", time.time() - theirs_s, 1.0)
    return True


async def _worker(
    patient: _Patient,
    client: AsyncClient,
    key_id: str,
    on_progress: Callable[[Progress], None],
) -> None:
    before_s = time.time()
    started_s = time.monotonic()
    try:
        told = await client.worker(on_progress=on_progress)
    except Rejected as error:
        patient.fail("worker", error)
        return
    except RequestError as error:
        advice = {
            "wrong_audience": "set RUNPOD_ENDPOINT_ID to the endpoint that this worker serves",
            "not_yet_valid": "set this machine's clock: it is ahead of the worker's",
            "expired": "set this machine's clock: it is behind the worker's",
            "ttl_too_long": "use a shorter --ttl",
        }.get(str(error.code), "")
        patient.fail("worker", error, advice)
        return
    except NoWorker as error:
        patient.fail("worker", error, "look at the endpoint's log for why no worker starts")
        return
    except SealedError as error:
        patient.fail("worker", error)
        return
    took_s = time.monotonic() - started_s
    patient.ok("worker", f"opened a request under key {key_id} and answered in {took_s:.1f} s")
    patient.ok("worker's versions", versions(told))
    models = told.get("models")
    patient.ok("worker's models", ", ".join(map(str, models)) if isinstance(models, list) else "?")
    theirs_s = told.get("time")
    if isinstance(theirs_s, int | float):
        # The worker read its clock at some time between the two readings here.
        after_s = before_s + took_s
        offset_s = max(0.0, before_s - theirs_s) or min(0.0, after_s - theirs_s)
        _clock(patient, "clock, by the worker", offset_s, took_s)


def _clock(patient: _Patient, check: str, offset_s: float, uncertain_s: float) -> None:
    ahead = "ahead" if offset_s > 0 else "behind"
    told = f"{abs(offset_s):.0f} s {ahead}" if abs(offset_s) > uncertain_s else "right"
    if abs(offset_s) > CLOCK_WARNING_S:
        advice = f"set this machine's clock; a worker refuses requests beyond {CLOCK_SKEW_S} s"
        patient.fail(check, told, advice)
    else:
        patient.ok(check, f"{told}, to within {max(1.0, uncertain_s):.0f} s")


def _versions(patient: _Patient) -> None:
    names = ("cryptography", "httpx2", "msgspec")
    installed = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    patient.ok("this side", f"protocol {VERSION}, Python {platform.python_version()}, {installed}")
