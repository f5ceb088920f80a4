"""What is asked in a run, and the one text that answers it.

Half of the questions have a text that the model is made to say, to the letter; it has numbers
in it, so that a piece that is missing, doubled or out of place shows. The others are answered
greedily, and their text is what the engine said when it was asked alone. Floating-point sums
differ by their last bits with the number of requests in a batch, so only questions are taken
in which the most likely token was at every step ahead of the next by `MARGIN`.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from client import AsyncClient

MARGIN = 0.002
"""In log probability. In float32 the sums of a tiny model differ by a thousandth of this."""

SPOKEN = 10
GREEDY = 10
LENGTHS = (8, 24, 64)
"""Tokens of a greedy answer."""


@dataclass(frozen=True)
class Question:
    """One question, by which routes it may be asked, and its answer."""

    prompt: str
    answer: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def body(self, model: str) -> dict[str, Any]:
        """Return it as a body of OpenAI's chat route."""
        messages = [{"role": "user", "content": self.prompt}]
        return {"model": model, "messages": messages, **self.options}


def spoken(number: int) -> Question:
    """Return a question whose only possible answer is a text of our own."""
    answer = " ".join(f"{number} and {count} are {number + count}," for count in range(2 + number))
    return Question(
        f"Count from {number}.",
        answer,
        {"temperature": 0, "structured_outputs": {"choice": [answer]}},
    )


async def greedy(client: AsyncClient, number: int) -> Question | None:
    """Ask for a greedy answer, alone; None where two tokens were too close to call."""
    options: dict[str, Any] = {
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": LENGTHS[number % len(LENGTHS)],
    }
    prompt = f"Tell me about number {number}."
    answer = await client.chat(prompt, logprobs=2, **options)
    for token in answer.choices[0].logprobs:
        first, second = (entry["logprob"] for entry in token["top"][:2])
        if first - second < MARGIN:
            return None
    return Question(prompt, answer.text, options)


async def engine_questions(client: AsyncClient) -> list[Question]:
    """Return the questions for the real engine; at least one of each kind, or this fails."""
    found: list[Question] = []
    number = 0
    while len(found) < GREEDY:
        number += 1
        if number > 8 * GREEDY:
            raise AssertionError(f"only {len(found)} of {number} greedy answers are stable")
        if question := await greedy(client, number):
            found.append(question)
    return [*found, *(spoken(number) for number in range(1, SPOKEN + 1))]


def echo_questions() -> list[Question]:
    """Return the questions for an echo worker, which takes its time."""
    texts = [" ".join(f"{n}+{k}={n + k}" for k in range(3 + n)) for n in range(1, 9)]
    return [Question(text, text, {"pause_s": 0.02}) for text in texts]


async def ask_all(client: AsyncClient, questions: list[Question], concurrency: int) -> int:
    """Ask everything at once in fair weather and return how many answers were other ones."""
    room = asyncio.Semaphore(concurrency)

    async def one(question: Question) -> bool:
        async with room:
            answer = await client.chat(question.prompt, **question.options)
            return bool(answer.text != question.answer)

    return sum(await asyncio.gather(*map(one, questions)))
