"""What a platform, or a stranger who can submit jobs, may hand to a worker.

Every attack runs first against a worker that is weakened in one place, where it has to succeed.
"""

import asyncio
import base64
import contextlib
import logging
import random
import time
import tracemalloc
from typing import Any

import pytest

from crypto import AnswerOpener, seal_request
from frames import End, FrameDecoder
from keys import Key
from protocol import MAX_REQUEST_BYTES, Request, pad_request
from tests.attack import weakened
from tests.attack.conftest import Shown, Tried
from tests.attack.hostile import ANSWER, REJECTION, Worker, World, altered
from tests.attack.weakened import Weakening
from tests.claims import Trials


async def not_rejected(world: World, job_inputs: list[Any]) -> Tried:
    """Count what is answered by anything but the one rejection."""
    before = len(world.worker.models.runs)
    answers = [await world.worker.answer(job_input) for job_input in job_inputs]
    others = sum(answer != REJECTION for answer in answers)
    return len(job_inputs), max(others, len(world.worker.models.runs) - before)


async def code_of(world: World, request: Request, worker: Worker | None = None) -> Any:
    """Return the code of the sealed error that a request is answered with, None where it ran."""
    worker = worker or world.worker
    chunks = await worker.answer(world.sealed(request))
    opener, decoder = AnswerOpener(request, world.key), FrameDecoder()
    end = [event for chunk in chunks for event in decoder.feed(opener.open(chunk).payload)][-1]
    assert isinstance(end, End)
    return end.error["code"] if end.error else None


# --- damage ---------------------------------------------------------------------------------


@pytest.mark.claim(
    "requests.flipped",
    "A request of which any one character was changed is answered like any other that cannot be "
    "opened, in both forms.",
)
@pytest.mark.parametrize("form", ["sealed", "encrypted_input"])
async def test_flipped(form: str, claim: Trials, shown: Shown) -> None:
    async def attack() -> Tried:
        world = World()
        text = world.text_of(form)
        places = list(range(len(text)))
        if not claim.full:
            places = random.Random(1).sample(places, 60)
        return await not_rejected(world, [{form: altered(text, at)} for at in places])

    await shown(attack, weakened.unauthenticated)


@pytest.mark.claim(
    "requests.rejection",
    "What cannot be opened is answered with one constant text, whatever the cause.",
)
async def test_no_cause_is_told(shown: Shown) -> None:
    async def attack() -> Tried:
        world, stranger = World(), World()
        _, kid, ciphertext = seal_request(world.request(), world.key).split(".")
        causes = [
            f"2.{kid}.{ciphertext}",
            f"1.{stranger.key.id}.{ciphertext}",
            f"1.{kid}.{ciphertext[:-9]}AAAA{ciphertext[-5:]}",
            f"1.{kid}." + "*" * len(ciphertext),
            f"1.{kid}",
            f"1.{kid}.{ciphertext[:400]}",
            stranger.sealed(stranger.request())["sealed"],
            sealed_bytes(world.key, b"{}"),
            sealed_bytes(world.key, b"[" * 200),
        ]
        return await not_rejected(world, [{"sealed": cause} for cause in causes])

    await shown(attack, weakened.telling)


def sealed_bytes(key: Key, content: bytes) -> str:
    """Seal whatever bytes as the JSON of a request."""
    return f"1.{key.id}.{key.request_fernet.encrypt_at_time(pad_request(content), 0).decode()}"


# --- reflection, other places ---------------------------------------------------------------


@pytest.mark.claim("requests.reflection")
async def test_an_answer_as_a_request(shown: Shown) -> None:
    """Also one whose text the attacker has chosen, so that it says a whole request."""

    async def attack() -> Tried:
        world = World()
        inside = world.request("run-me").encode().decode()
        world.worker.models.says = lambda _: inside
        chunks = await world.worker.answer(world.sealed(world.request()))
        bare = [chunk.split(".")[2] for chunk in chunks]
        back: list[Any] = [{"sealed": f"1.{world.key.id}.{text}"} for text in bare]
        back += [{"sealed": chunk} for chunk in chunks]
        back += [{"encrypted_input": text} for text in bare]
        return await not_rejected(world, back)

    await shown(attack, weakened.both_directions)


@pytest.mark.claim(
    "requests.endpoint", "A request that was sealed for one endpoint runs on no other."
)
async def test_another_endpoint(shown: Shown) -> None:
    async def attack() -> Tried:
        world = World()
        there = Worker(world.key_text, endpoint_id="there")
        ran = await world.ran([world.sealed(world.request()) for _ in range(20)], there)
        return 20, ran

    await shown(attack, weakened.anyone_anytime)


# --- replay ---------------------------------------------------------------------------------


@pytest.mark.claim(
    "requests.replay",
    "A request that was answered is not run again by the same worker, in either form.",
)
async def test_replay(shown: Shown) -> None:
    async def attack() -> Tried:
        world, again = World(), 0
        for n in range(20):
            form = ("sealed", "encrypted_input")[n % 2]
            job_input = {form: world.text_of(form)}
            assert await world.ran([job_input]) == 1
            again += await world.ran([job_input] * 3)
        return 60, again

    await shown(attack, weakened.forgetful)


@pytest.mark.claim("requests.replay")
async def test_replay_while_it_runs(shown: Shown) -> None:
    async def attack() -> Tried:
        world = World()
        world.worker.models.hold = asyncio.Event()
        job_input = world.sealed(world.request())
        first = asyncio.ensure_future(world.worker.answer(job_input))
        while not world.worker.models.runs:
            await asyncio.sleep(0)
        more = [asyncio.ensure_future(world.worker.answer(job_input)) for _ in range(10)]
        for _ in range(100):
            await asyncio.sleep(0)
        world.worker.models.hold.set()
        await asyncio.gather(first, *more)
        return 10, len(world.worker.models.runs) - 1

    await shown(attack, weakened.careless)


@pytest.mark.claim(
    "requests.spelling",
    "There is one spelling of a request: re-encoded base64 is rejected before it is looked at.",
)
@pytest.mark.parametrize("form", ["sealed", "encrypted_input"])
async def test_respelt(form: str, shown: Shown) -> None:
    async def attack() -> Tried:
        world, tried, succeeded = World(), 0, 0
        for _ in range(10):
            version_and_key, dot, ciphertext = world.text_of(form).rpartition(".")
            spellings = [{form: version_and_key + dot + text} for text in respelt(ciphertext)]
            counted = await not_rejected(world, spellings)
            tried, succeeded = tried + counted[0], succeeded + counted[1]
        return tried, succeeded

    await shown(attack, weakened.any_base64)


def respelt(text: str) -> list[str]:
    """Return other spellings of the bytes that a base64 text stands for."""
    lines = "\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    spellings = [
        *(text + more for more in ("\n", " ", "=", "==", "A", "====", "\0", "garbage")),
        *(more + text for more in ("\n", " ", "\ufeff")),
        lines,
        base64.b64encode(base64.urlsafe_b64decode(text)).decode(),
        text.rstrip("="),
        text[:9] + "\r\n" + text[9:],
    ]
    stem, pads = text.rstrip("="), len(text) - len(text.rstrip("="))
    if pads:
        # The last character has bits that no byte uses.
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        last = alphabet[alphabet.index(stem[-1]) + 1]
        spellings.append(stem[:-1] + last + "=" * pads)
    return [spelling for spelling in spellings if spelling != text]


@pytest.mark.claim(
    "requests.clocks",
    "What has expired, or was sealed by a clock more than 60 s ahead, is not run; clocks less than "
    "that apart work.",
)
async def test_clocks(shown: Shown) -> None:
    async def attack() -> Tried:
        world, now, wrong = World(), time.time(), 0
        cases = [(-3600, 60), (-86_000, 3600), (-123, 60), (63, 60), (3600, 86_000), (0, 90_000)]
        for off_s, ttl_s in cases:
            request = world.request(now=lambda off_s=off_s: now + off_s, ttl_s=ttl_s)
            wrong += await code_of(world, request) is None
        for off_s in (-57, 57):
            request = world.request(now=lambda off_s=off_s: now + off_s)
            wrong += await code_of(world, request) is not None
        for off_s in (-90_000, 63):
            text = world.key.simple_fernet.encrypt_at_time(b"x", int(now) + off_s).decode()
            wrong += await world.worker.answer({"encrypted_input": text}) != REJECTION
        return 10, wrong

    await shown(attack, weakened.anyone_anytime)


@pytest.mark.claim(
    "requests.retry",
    "A request whose answer never reached its end runs again when the platform hands it out anew, "
    "on the same worker and on another.",
)
async def test_retry(shown: Shown) -> None:
    async def attack() -> Tried:
        world, refused = World(), 0
        for _ in range(20):
            request = world.request(ANSWER)
            await die_over(world.worker, world.sealed(request))
            refused += await code_of(world, request) is not None
            refused += await code_of(world, request, Worker(world.key_text)) is not None
        return 40, refused

    await shown(attack, weakened.unforgiving)


async def die_over(worker: Worker, job_input: Any) -> None:
    """Cancel a job whose last word has not come, as the end of a worker does."""
    ran, worker.models.hold = len(worker.models.runs), asyncio.Event()
    dying = asyncio.ensure_future(worker.answer(job_input))
    while len(worker.models.runs) == ran:
        await asyncio.sleep(0)
    dying.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await dying
    await asyncio.sleep(0)
    worker.models.hold = None


# --- downgrade ------------------------------------------------------------------------------


@pytest.mark.claim(
    "requests.downgrade",
    "Plaintext in any form, sealed requests with anything beside them and other versions are "
    "rejected like noise.",
)
async def test_plaintext(shown: Shown) -> None:
    async def attack() -> Tried:
        world = World()
        sealed = world.sealed(world.request())
        plain = [
            {"prompt": "x"},
            {"messages": [{"role": "user", "content": "x"}]},
            {"openai_route": "/v1/models", "openai_input": {}},
            {"openai_input": {"prompt": "x"}},
            {"route": "/v1/models", "method": "GET"},
            {"sealed": {"prompt": "x"}},
            {"encrypted_input": '{"prompt":"x"}'},
            {"encrypted_input": base64.urlsafe_b64encode(b'{"prompt":"x"}').decode()},
            {**sealed, "prompt": "x"},
            {**sealed, "allow_plaintext": True},
            {},
            None,
            "x",
            [sealed],
        ]
        return await not_rejected(world, plain)

    await shown(attack, weakened.plaintext_too)


@pytest.mark.claim("requests.downgrade")
async def test_other_versions(shown: Shown) -> None:
    async def attack() -> Tried:
        world = World()
        rest = world.sealed(world.request())["sealed"][2:]
        versions = ("0", "2", "", "01", "1 ", "99", "\u0661")
        return await not_rejected(world, [{"sealed": f"{name}.{rest}"} for name in versions])

    await shown(attack, weakened.any_version)


# --- denial of service ----------------------------------------------------------------------


@pytest.mark.claim(
    "requests.sizes",
    "A huge request, deep JSON, lengths beyond the buffer and text that is not ASCII are rejected "
    "like noise: no exception, no memory, no time beyond one pass over what the platform carries.",
)
@pytest.mark.parametrize("what", ["huge", "deep", "length", "text"])
async def test_denial_of_service(what: str, shown: Shown, caplog: pytest.LogCaptureFixture) -> None:
    weakenings: dict[str, Weakening] = {
        "huge": weakened.any_size,
        "deep": weakened.any_depth,
        "length": weakened.any_length,
        "text": weakened.crashing,
    }

    async def attack() -> Tried:
        world, succeeded = World(), 0
        job_inputs = hostile_inputs(what, world)
        for job_input in job_inputs:
            caplog.clear()
            tracemalloc.start()
            began_s = time.perf_counter()
            with caplog.at_level(logging.ERROR):
                answered = await world.worker.answer(job_input)
            took_s = time.perf_counter() - began_s
            peak_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            succeeded += bool(
                answered != REJECTION or caplog.records or took_s > 2 or peak_bytes > 1 << 22
            )
        return len(job_inputs), succeeded

    await shown(attack, weakenings[what])


def hostile_inputs(what: str, world: World) -> list[Any]:
    sealed = world.sealed(world.request())["sealed"]
    _, kid, ciphertext = sealed.split(".")
    match what:
        case "huge":
            sizes = (MAX_REQUEST_BYTES + 1, 2 * MAX_REQUEST_BYTES)
            huge = [f"1.{kid}.gAAAAAAAAAAA" + "A" * (size // 4 * 4) for size in sizes]
            return [{form: text} for form in ("sealed", "encrypted_input") for text in huge]
        case "deep":
            inside = world.request().encode()
            deep = [b'{"prompt":' + b * 3000 + e * 3000 + b"}" for b, e in ((b"[", b"]"),)]
            deep += [b'{"prompt":' + b'{"a":' * 150 + b"1" + b"}" * 150 + b"}"]
            bodies = [inside.replace(b'{"prompt":"x"}', body) for body in deep]
            return [{"sealed": sealed_bytes(world.key, body)} for body in bodies]
        case "length":
            encrypt = world.key.request_fernet.encrypt_at_time
            lengths = (2**32 - 1, 2**31, 1025, 1021, 16 * 1024 * 1024)
            insides = [n.to_bytes(4, "big") + bytes(1020) for n in lengths] + [
                b"",
                b"\0",
                b"\0\0\0",
            ]
            return [{"sealed": f"1.{kid}.{encrypt(inside, 0).decode()}"} for inside in insides]
        case _:
            texts = [
                "é" * 2000,
                "\ud800" * 100,
                "\0" * 500,
                "\uff11" * 99,
                "\u0663" * 40,
                "\U0001f512" * 400,
            ]
            return [
                {"sealed": made}
                for text in texts
                for made in (
                    text,
                    f"1.{kid}.{text}",
                    f"1.{text}.{ciphertext}",
                    f"1.{kid}.{ciphertext[:200]}{text}{ciphertext[200:]}",
                )
            ]
