"""Thousands of mutated requests and chunks: nothing crashes, hangs, or tells what was wrong."""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from crypto import AnswerOpener, AnswerSealer, RequestOpener
from errors import AnswerError, Rejected, TamperedChunk
from frames import FrameEncoder, Head, Text
from keys import KeyRing
from protocol import Request, pad_request, parse_request, unpad_request
from replies import rejection
from tests.attack import weakened
from tests.attack.hostile import ANSWER, HERE, World
from tests.attack.mutator import Mutator
from tests.attack.weakened import Weakening
from tests.claims import Trials

CANARY = "canary-Zq7Xw2Kp9"
HANG_S = 2.0
"""How long one trial may keep a core busy; what waits longer than LIMIT_S hangs too."""

REJECTIONS = (rejection(False), rejection(True))


@dataclass
class Found:
    """What a run of the fuzzer has seen."""

    tried: int = 0
    faults: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    def note(self, number: int, fault: str) -> None:
        self.faults.append(f"trial {number}: {fault}")

    def __add__(self, other: "Found") -> "Found":
        return Found(
            self.tried + other.tried,
            self.faults + other.faults,
            max(self.longest_s, other.longest_s),
        )


def seed_of(claim: Trials, short: int) -> int:
    """Return the seed of a run, under `make attack` another each time, and keep it."""
    seed = int(time.time()) if claim.full else short
    claim.detail(f"seed {seed}")
    return seed


def settle(claim: Trials, seed: int, found: Found) -> None:
    """Count what a run has found; one that hung has failed."""
    assert found.longest_s < HANG_S, f"seed {seed}: it hung for {found.longest_s:.1f} s"
    print(f"seed {seed}: {found.faults[:5]}")
    claim.trials(found.tried, len(found.faults))


# --- requests -------------------------------------------------------------------------------


def bases(world: World) -> list[Any]:
    """Return job inputs that would be answered."""
    small, large = (world.sealed(world.request(CANARY * n)) for n in (1, 400))
    return [
        small,
        small,
        large,
        {"openai_input": {**small, "stream": True}},
        {"encrypted_input": world.text_of("encrypted_input", CANARY)},
    ]


def mutated_outside(mutator: Mutator, base: Any) -> Any:
    """Return a job's input as somebody without the key could make it of one that was seen."""
    if mutator.randrange(5) == 0:
        return mutator.value(base)
    inside = base.get("openai_input", base)
    form = "sealed" if "sealed" in inside else "encrypted_input"
    wrong = {**inside, form: mutator.text(inside[form])}
    return {"openai_input": wrong} if "openai_input" in base else wrong


async def fuzz_outside(world: World, seed: int, count: int, log: pytest.LogCaptureFixture) -> Found:
    """Mutate what the platform sees; every result has to be rejected like every other."""
    mutator, found, known = Mutator(seed), Found(), bases(world)
    for number in range(count):
        base = mutator.choice(known)
        job_input = mutated_outside(mutator, base)
        if job_input in known:
            continue
        found.tried += 1
        began_s = time.process_time()
        try:
            answered = await world.worker.answer(job_input)
        except Exception as error:
            found.note(number, f"raised {type(error).__name__}")
            continue
        found.longest_s = max(found.longest_s, time.process_time() - began_s)
        if answered not in REJECTIONS:
            found.note(number, f"answered with {str(answered)[:80]}")
    faults_of_log(found, log)
    if world.worker.models.runs:
        found.note(-1, "something reached the engine")
    return found


async def fuzz_inside(world: World, seed: int, count: int, log: pytest.LogCaptureFixture) -> Found:
    """Mutate what is sealed, as a hostile client with a key can: a sealed error, or rejected."""
    mutator, found = Mutator(seed), Found()
    for number in range(count):
        request = world.request(CANARY)
        content = mutator.json(request.encode())
        inside = (
            pad_request(content) if mutator.randrange(4) else mutator.bits(pad_request(content))
        )
        ciphertext = world.key.request_fernet.encrypt_at_time(inside, 0).decode()
        found.tried += 1
        try:
            answered = await world.worker.answer({"sealed": f"1.{world.key.id}.{ciphertext}"})
        except Exception as error:
            found.note(number, f"raised {type(error).__name__}")
            continue
        if answered in REJECTIONS:
            continue
        if CANARY in str(answered) or not opens(world, inside, answered):
            found.note(number, "answered with something that is not sealed")
    faults_of_log(found, log)
    return found


def opens(world: World, inside: bytes, answered: list[Any]) -> bool:
    try:
        opener = AnswerOpener(parse_request(unpad_request(inside), Request), world.key)
        return bool([opener.open(chunk) for chunk in answered])
    except (ValueError, TamperedChunk):
        return False


def faults_of_log(found: Found, log: pytest.LogCaptureFixture) -> None:
    """What is logged holds no word of a request, and no exception that nobody foresaw."""
    for record in log.records:
        if record.name == "worker" and record.levelno >= logging.ERROR:
            found.note(-1, f"unforeseen: {record.getMessage()[-60:]}")
        if CANARY in record.getMessage():
            found.note(-1, "a request is in the log")
    log.clear()


@pytest.mark.claim(
    "fuzz.requests",
    "Mutated requests are all rejected with the same text: no crash, no hang, nothing of them in "
    "answers or logs, and none reaches the engine.",
)
async def test_requests(
    claim: Trials, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    seed = seed_of(claim, 5)
    for weakening in (weakened.unauthenticated, weakened.crashing, weakened.telling):
        with monkeypatch.context() as patch:
            weakening(patch)
            found = await fuzz_outside(World(), seed, 400, caplog)
            assert found.faults, f"{weakening.__name__} was not noticed"
    found = await fuzz_outside(World(), seed, claim.count(400, 10_500), caplog)
    monkeypatch.setattr(World, "public_key_mode", True)
    found += await fuzz_outside(World(), seed, claim.count(100, 3_000), caplog)
    settle(claim, seed, found)


@pytest.mark.claim(
    "fuzz.insides",
    "A client with a key that seals nonsense gets the rejection or a sealed error: no crash, and "
    "nothing unsealed.",
)
async def test_insides(
    claim: Trials, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    seed = seed_of(claim, 6)
    with monkeypatch.context() as patch:
        weakened.crashing(patch)
        found = await fuzz_inside(World(), seed, 400, caplog)
        assert found.faults, "a worker that crashes was not noticed"
    found = await fuzz_inside(World(), seed, claim.count(400, 10_000), caplog)
    settle(claim, seed, found)


# --- chunks ---------------------------------------------------------------------------------


async def fuzz_chunks(world: World, seed: int, count: int, *, to_first: bool = False) -> Found:
    """Mutate the text of one chunk: refused, nothing of it shown, and the platform sees no why."""
    mutator, found = Mutator(seed), Found()
    reactions: dict[str, set[tuple[str, ...]]] = {"run": set(), "openai": set()}
    for number in range(count):
        if to_first and found.faults:
            break
        way, streamed = mutator.choice(("run", "openai")), mutator.random() < 0.5
        spoilt: list[bool] = []

        def spoil(chunks: list[Any], spoilt: list[bool] = spoilt) -> list[Any]:
            at = mutator.randrange(len(chunks))
            wrong: Any = mutator.text(chunks[at])
            if mutator.randrange(10) == 0:
                wrong = mutator.value({"text": chunks[at]})
            spoilt.append(wrong not in chunks and not lost_on_the_way(wrong))
            return [*chunks[:at], wrong, *chunks[at + 1 :]]

        world.platform.to_client = spoil
        world.platform.calls.clear()
        began_s = time.process_time()
        try:
            outcome = await world.ask(ANSWER, streamed=streamed, transport=way)
        except Exception as error:
            found.tried += 1
            found.note(number, f"raised {type(error).__name__}")
            continue
        found.longest_s = max(found.longest_s, time.process_time() - began_s)
        if outcome.deceives(ANSWER):
            found.note(number, f"showed {outcome.text[:40]!r}")
        if not spoilt[0]:
            continue
        found.tried += 1
        if isinstance(outcome.error, TamperedChunk):
            reactions[way].add(tuple(world.platform.calls))
        elif not isinstance(outcome.error, Rejected) or way == "run":
            found.note(number, f"ended in {outcome.error!r}")
    for way, seen in reactions.items():
        if len(seen) > 1:
            found.note(-1, f"by {way} the platform sees {seen}")
    return found


def lost_on_the_way(wrong: Any) -> bool:
    """Whether it is no chunk any more: the platform's own words, or an event cut in two."""
    return not isinstance(wrong, str) or wrong.startswith("{") or not wrong.isprintable()


async def fuzz_payloads(world: World, seed: int, count: int) -> Found:
    """Mutate what is sealed in a chunk, as a broken worker may: an error of the right type."""
    mutator, found = Mutator(seed), Found()
    opener = RequestOpener(KeyRing([world.key]), HERE, max_ttl_s=90_000)
    for number in range(count):

        def spoil(_: list[Any]) -> list[Any]:
            request: Request = opener.open(world.platform.inputs[-1]["sealed"]).request
            payload = FrameEncoder().encode([Head(200, "generate", ""), Text(0, ANSWER)])
            sealer = AnswerSealer(request, world.key)
            return sealer.seal(mutator.bits(payload), final=mutator.random() < 0.5)

        world.platform.to_client = spoil
        found.tried += 1
        try:
            outcome = await world.ask(ANSWER, streamed=mutator.random() < 0.5)
        except Exception as error:
            found.note(number, f"raised {type(error).__name__}: {error}")
            continue
        if not isinstance(outcome.error, AnswerError):
            found.note(number, f"ended in {outcome.error!r}")
    return found


@pytest.mark.claim(
    "fuzz.chunks",
    "Mutated chunks are all refused: no crash, no hang, nothing of them shown, and the client's "
    "calls do not tell the platform what was wrong.",
)
async def test_chunks(claim: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = seed_of(claim, 7)
    weakenings: tuple[Weakening, ...] = (weakened.trusting, weakened.unauthenticated)
    for weakening in weakenings:
        with monkeypatch.context() as patch:
            weakening(patch)
            found = await fuzz_chunks(World(), seed, 4_000, to_first=True)
            assert found.faults, f"{weakening.__name__} was not noticed"
    monkeypatch.setattr(World, "public_key_mode", claim.full and bool(seed % 2))
    found = await fuzz_chunks(World(), seed, claim.count(150, 12_600))
    settle(claim, seed, found)


@pytest.mark.claim(
    "fuzz.payloads",
    "An authentic answer of broken form is an error of the client's own type, never an exception "
    "that a program does not expect.",
)
async def test_payloads(claim: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = seed_of(claim, 8)
    with monkeypatch.context() as patch:
        weakened.naive(patch)
        found = await fuzz_payloads(World(), seed, 150)
        assert found.faults, "a client that believes everything was not noticed"
    found = await fuzz_payloads(World(), seed, claim.count(150, 1_000))
    settle(claim, seed, found)
