"""What a platform may do to the chunks of an answer, and what the client then tells its caller.

Every attack runs first against a copy that is weakened in one place, where it has to succeed.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest

from errors import AnswerError, Rejected
from tests.attack import weakened
from tests.attack.conftest import Shown, Tried
from tests.attack.hostile import ANSWER, Worker, World, altered, as_is
from tests.attack.weakened import Weakening
from tests.claims import FULL, Trials

OTHER = "another text that nobody asked for"
FORGED = "forged by the platform"
WAYS = [(True, "run"), (False, "openai")]
if FULL:
    WAYS += [(True, "openai"), (False, "run")]

Chunks = list[Any]


async def play(
    world: World, vary: Callable[..., list[Chunks]], *honest: str, ways: Any = WAYS
) -> Tried:
    """Deliver each variant that `vary` makes of an answer's chunks, in each of the ways."""
    tried = deceived = 0
    for streamed, way in ways:
        left: int | None = None
        while left is None or left:
            made: list[Chunks] = []

            def pick(
                *attempts: Chunks, left: int | None = left, made: list[Chunks] = made
            ) -> Chunks:
                made += vary(*attempts)
                return made[0 if left is None else len(made) - left]

            world.platform.to_client = pick
            outcome = await world.ask(ANSWER, streamed=streamed, transport=way)
            tried += 1
            deceived += outcome.deceives(*(honest or (ANSWER,)))
            left = (len(made) if left is None else left) - 1
            if deceived and World.weakened:
                return tried, deceived
    return tried, deceived


def without_one(chunks: Chunks) -> list[Chunks]:
    return [chunks[:n] + chunks[n + 1 :] for n in range(len(chunks))]


def two_swapped(chunks: Chunks) -> list[Chunks]:
    return [
        [*chunks[:n], chunks[n + 1], chunks[n], *chunks[n + 2 :]] for n in range(len(chunks) - 1)
    ]


def one_twice(chunks: Chunks) -> list[Chunks]:
    return [
        [*chunks[:later], chunks[n], *chunks[later:]]
        for n in range(len(chunks))
        for later in range(n, len(chunks) + 1)
    ]


def cut_short(chunks: Chunks) -> list[Chunks]:
    return [chunks[:n] for n in range(len(chunks))]


def cut_within(chunks: Chunks) -> list[Chunks]:
    return [
        [*chunks[:n], chunks[n][:at], *chunks[n + 1 :]]
        for n in range(len(chunks))
        for at in (1, 26, len(chunks[n]) // 2, len(chunks[n]) - 1)
    ]


@pytest.mark.claim(
    "answers.order",
    "Chunks of an answer that are dropped, swapped, doubled or cut off, at every boundary, "
    "make the true text or an error, never another text.",
)
@pytest.mark.parametrize(
    ("vary", "weakening"),
    [
        (without_one, weakened.naive),
        (two_swapped, weakened.naive),
        (one_twice, weakened.naive),
        (cut_short, weakened.naive),
        (cut_within, weakened.trusting),
    ],
)
@pytest.mark.usefixtures("mode")
async def test_order(
    vary: Callable[[Chunks], list[Chunks]],
    weakening: Weakening,
    shown: Shown,
) -> None:
    await shown(lambda: play(World(), vary), weakening)


@pytest.mark.claim(
    "answers.end",
    "A job that the platform calls completed is an error without its authenticated last chunk.",
)
@pytest.mark.usefixtures("mode")
async def test_completed_without_the_end(shown: Shown) -> None:
    async def attack() -> Tried:
        world, believed = World(), 0
        world.platform.status = "COMPLETED"
        for streamed, way in WAYS:
            for lost in range(1, 7):
                world.platform.to_client = lambda chunks, lost=lost: chunks[:-lost]
                outcome = await world.ask(ANSWER, streamed=streamed, transport=way)
                believed += outcome.error is None
        return 6 * len(WAYS), believed

    await shown(attack, weakened.naive)


@pytest.mark.claim(
    "answers.flipped",
    "A chunk of which any one character was changed is refused, and nothing of it is shown.",
)
@pytest.mark.usefixtures("mode")
async def test_flipped(claim: Trials, shown: Shown) -> None:
    async def attack() -> Tried:
        world, believed = World(), 0
        chunk = (await world.worker.answer(world.sealed(world.request())))[0]
        places = list(range(len(chunk)))
        if not claim.full:
            # And some of the tag, without which the weakened copy would be as good.
            places = random.Random(1).sample(places, 40) + places[-40:-4:4]
        for at in places:

            def spoil(chunks: Chunks, at: int = at) -> Chunks:
                return [chunks[0], altered(chunks[1], at), *chunks[2:]]

            world.platform.to_client = spoil
            outcome = await world.ask(ANSWER, streamed=True)
            believed += not isinstance(outcome.error, AnswerError) or outcome.deceives(ANSWER)
            if believed and World.weakened:
                break
        return len(places), believed

    await shown(attack, weakened.unauthenticated)


@pytest.mark.claim(
    "answers.splice",
    "Chunks of two attempts, of two requests or of two clients are never put together to an "
    "answer, nor is one taken for another's.",
)
@pytest.mark.usefixtures("mode")
async def test_two_attempts(shown: Shown) -> None:
    def spliced(first: Chunks, second: Chunks) -> list[Chunks]:
        return [
            first[:cut] + second[begin:]
            for cut in range(1, len(first) + 1)
            for begin in range(len(second))
        ]

    async def attack() -> Tried:
        world = World()
        second = Worker(world.key_text)
        second.models.says = lambda _: OTHER
        world.platform.workers.append(second)
        return await play(world, spliced, ANSWER, OTHER)

    await shown(attack, weakened.naive)


@pytest.mark.claim("answers.splice")
@pytest.mark.parametrize("whose", ["another request", "another client"])
@pytest.mark.usefixtures("mode")
async def test_answers_of_others(whose: str, shown: Shown) -> None:
    async def attack() -> Tried:
        world = World()
        other = world if whose == "another request" else World()
        foreign = await other.worker.answer(other.sealed(other.request(OTHER)))

        def exchanged(chunks: Chunks) -> list[Chunks]:
            ones = [[*chunks[:n], foreign[n], *chunks[n + 1 :]] for n in range(len(foreign))]
            return [foreign, *ones]

        return await play(world, exchanged)

    await shown(attack, weakened.one_answer_key)


@pytest.mark.claim(
    "requests.reflection",
    "A request sent back is no answer, and an answer sent back is no request, in either form.",
)
async def test_a_request_as_an_answer(shown: Shown) -> None:
    async def attack() -> Tried:
        world = World()

        def reflected(chunks: Chunks) -> list[Chunks]:
            version, salt, _ = chunks[0].split(".")
            sealed = world.platform.inputs[-1]["sealed"]
            as_chunk = f"{version}.{salt}.{sealed.split('.')[2]}"
            return [[sealed], [as_chunk], [*chunks[:3], as_chunk, *chunks[3:]]]

        return await play(world, reflected)

    await shown(attack, weakened.both_directions)


@pytest.mark.claim(
    "answers.downgrade",
    "What is not sealed, or of another version, is never shown as an answer; a forged rejection is "
    "an error, after which nothing is sent less sealed than before.",
)
@pytest.mark.usefixtures("mode")
async def test_plaintext_as_an_answer(shown: Shown) -> None:
    whole = {"choices": [{"message": {"content": FORGED}}]}
    items: list[Any] = [FORGED, {"text": FORGED}, whole, [FORGED], "1." + FORGED, "2.a.b", "", 7]

    def forged(chunks: Chunks) -> list[Chunks]:
        later = ["2" + chunks[0][1:], *chunks[1:]]
        among = [[*chunks[:n], item, *chunks[n:]] for item in items for n in (1, 6)]
        return [later, *([item] for item in items), *among]

    await shown(lambda: play(World(), forged), weakened.trusting)


@pytest.mark.claim("answers.downgrade")
@pytest.mark.usefixtures("mode")
async def test_a_forged_rejection(shown: Shown) -> None:
    async def attack() -> Tried:
        world, fooled = World(), 0
        for streamed, way in WAYS:
            for after in (0, 1, 4, 7):
                world.platform.to_client = lambda chunks, after=after: [
                    *chunks[:after],
                    {"error": Rejected.TEXT},
                ]
                outcome = await world.ask(ANSWER, streamed=streamed, transport=way)
                fooled += outcome.error is None or outcome.deceives(ANSWER)
                world.platform.to_client = as_is
                again = await world.ask(ANSWER, streamed=streamed, transport=way)
                fooled += again.text != ANSWER
        fooled += sum(
            not names <= {"sealed", "stream"} for names in map(set, world.platform.inputs)
        )
        return 8 * len(WAYS), fooled

    await shown(attack, weakened.trusting)
