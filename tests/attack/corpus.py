"""The corpus of the audit of sizes and times: questions of four topics, and a model's answers.

`answers.jsonl` holds what the demo model said to each, when, token by token;
`tools/record_answers.py` makes it anew.
"""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

RECORDED = Path(__file__).with_name("answers.jsonl")
TOKENS = 40
"""How many tokens every answer has: how long an answer took is no secret (SPEC section 11)."""

_FRAMES = (
    "What should I know about {}?",
    "Tell me in detail about {}.",
    "Explain {} to a beginner.",
    "I have a question about {}. Where do I start?",
    "Give me advice on {}.",
)
_SUBJECTS = {
    "medicine": (
        "chest pain at night|diabetes in children|migraine and its causes|high blood pressure|"
        "an infected wound|side effects of antibiotics|depression after birth|lung cancer|"
        "a broken ankle|asthma attacks|food poisoning|memory loss in old age"
    ),
    "programming": (
        "sorting a list in Python|recursion in C|a loop over a dictionary|regular expressions|"
        "writing a class in Java|unit tests in Python|pointers in C|SQL joins|"
        "reading a file line by line|a binary search function|lambda functions|git branches"
    ),
    "cooking": (
        "baking sourdough bread|a lentil soup|roasting a chicken|tomato sauce for pasta|"
        "chocolate cake|a quick omelette|fried rice|pickled vegetables|"
        "mushroom risotto|apple pie|grilled salmon|pancakes for breakfast"
    ),
    "law": (
        "getting a divorce|money laundering|a contract that was broken|inheritance and wills|"
        "being arrested by the police|filing for bankruptcy|custody of children|tax evasion|"
        "a landlord who keeps the deposit|insider trading|asylum in another country|copyright"
    ),
}


def questions() -> list[tuple[str, str]]:
    """Return every topic with its questions, 60 each, in turns."""
    by_topic = [
        [(topic, frame.format(subject)) for frame, subject in product(_FRAMES, words.split("|"))]
        for topic, words in _SUBJECTS.items()
    ]
    return [question for turn in zip(*by_topic, strict=True) for question in turn]


@dataclass(frozen=True)
class Recorded:
    """One answer: `deltas[i]` left the engine `times_ms[i]` after it was asked; many are words."""

    topic: str
    question: str
    times_ms: list[float]
    deltas: list[str]


def recorded() -> list[Recorded]:
    """Return the recorded answers, topics in turns."""
    return [Recorded(**json.loads(line)) for line in RECORDED.read_text().splitlines()]
