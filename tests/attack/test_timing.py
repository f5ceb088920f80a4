"""Whether the time that a rejection takes tells its cause.

Causes are tried in random order, so that a busy machine disturbs all alike, and compared by
Mann-Whitney's U. Over enough trials every difference becomes significant, also one of a microsecond
in a Python string: what counts is its size. The bound is on how often an attacker who has to tell
two causes apart by one measurement, taken inside the worker, would be right.
"""

import itertools
import random
import time
from collections.abc import Mapping

import numpy
import pytest
from scipy.stats import mannwhitneyu

from tests.attack import weakened
from tests.attack.hostile import REJECTION, World
from tests.claims import Trials

MAX_SHIFT = 0.1
ROUGH_SHIFT = 0.3
"""Largest difference of medians, as a part of the time that a rejection takes; and over so few
trials that it is known roughly."""

PROMPT_CHARS = 200_000


def causes(world: World) -> dict[str, str]:
    """Return requests of one length that cannot be opened, each for another reason."""
    stranger = World()
    prompt = "x" * PROMPT_CHARS
    sealed = world.sealed(world.request(prompt))["sealed"]
    _, kid, ciphertext = sealed.split(".")
    strange = stranger.sealed(stranger.request(prompt))["sealed"]
    made = {
        "damaged at its end": f"1.{kid}.{ciphertext[:-9]}AAAA{ciphertext[-5:]}",
        "damaged at its beginning": f"1.{kid}.{ciphertext[:40]}AAAA{ciphertext[44:]}",
        "wrong key": strange.replace(stranger.key.id, kid),
        "unknown key": strange,
        "another version": "2" + sealed[1:],
        "no base64": f"1.{kid}." + "*" * len(ciphertext),
        "other base64": f"1.{kid}.{ciphertext[:60]}+{ciphertext[61:]}",
        "another time": f"1.{kid}.gAAAAABl{ciphertext[8:]}",
        "no form": "x" * len(sealed),
    }
    assert len({len(text) for text in made.values()}) == 1
    return made


async def measured(world: World, inputs: Mapping[str, str], rounds: int) -> dict[str, list[float]]:
    """Return how long each was worked on, in seconds."""
    order, took_s = random.Random(1), {name: list[float]() for name in inputs}
    for _ in range(rounds):
        for name in order.sample(sorted(inputs), len(inputs)):
            began_s = time.thread_time()
            answered = await world.worker.answer({"sealed": inputs[name]})
            took_s[name].append(time.thread_time() - began_s)
            assert answered == REJECTION
    return took_s


def told_apart(took_s: Mapping[str, list[float]]) -> tuple[float, float, str]:
    """Return the largest shift of medians between two causes, how often one is right, and which."""
    found = []
    for (one, first), (other, second) in itertools.combinations(took_s.items(), 2):
        low, high = sorted((float(numpy.median(first)), float(numpy.median(second))))
        u = mannwhitneyu(first, second)
        right = abs(u.statistic / (len(first) * len(second)) - 0.5) + 0.5
        found.append((high / low - 1, right, f"{one} / {other}, p={u.pvalue:.2g}"))
    return max(found)


@pytest.mark.claim(
    "requests.time",
    "The time that a rejection takes differs by less than a tenth from cause to cause.",
)
async def test_the_time_of_a_rejection(claim: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    inputs = causes(world)
    with monkeypatch.context() as patch:
        weakened.early_exit(patch)
        shift, right, _ = told_apart(await measured(world, inputs, 20))
        assert shift > ROUGH_SHIFT and right > 0.9, "an early exit was not noticed"
    limit = MAX_SHIFT if claim.full else ROUGH_SHIFT
    # A machine that does something else at times can spoil one run; a real difference stays.
    for _ in range(3):
        took_s = await measured(world, inputs, claim.count(40, 300))
        shift, right, which = told_apart(took_s)
        if shift < limit:
            break
    medians = [float(numpy.median(values)) * 1e6 for values in took_s.values()]
    claim.detail(
        f"medians of {len(inputs)} causes {min(medians):.0f} to {max(medians):.0f} µs; told apart "
        f"best: {which}, right in {right:.0%} of cases"
    )
    claim.trials(sum(map(len, took_s.values())), int(shift >= limit))
