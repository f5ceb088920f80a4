"""What the platform does wrong in a storm, all of it at the same time.

Owns which faults there are and how often each strikes; a seed fixes the dice, and on which
request a die falls depends on the order in which requests happen to come.
"""

import random
from typing import Any

from local_runpod_faults import Fault, Faults

FAULTS: tuple[tuple[float, str, dict[str, Any]], ...] = (
    # The worker's posts. A chunk is dropped whose post is refused, and sent again when the
    # connection broke or the answer was 5xx, received or not.
    (0.010, "job-stream", {"reset": True}),
    (0.010, "job-stream", {"reset": True, "when": "after"}),
    (0.010, "job-stream", {"status": 404}),
    (0.010, "job-stream", {"status": 500}),
    (0.005, "job-stream", {"status": 502, "when": "after"}),
    (0.020, "job-stream", {"delay_s": 0.3}),
    (0.020, "job-stream", {"duplicate": 1}),
    (0.020, "job-stream", {"reorder": True}),
    (0.010, "job-stream", {"drop": True}),
    (0.020, "job-done", {"reset": True}),
    (0.010, "job-done", {"reset": True, "when": "after"}),
    (0.020, "job-done", {"status": 500}),
    (0.020, "job-done", {"status": 502, "when": "after"}),
    (0.030, "job-done", {"delay_s": 1.0}),
    # Its polls.
    (0.080, "job-take", {"duplicate": 1}),
    (0.050, "job-take", {"reset": True}),
    (0.050, "job-take", {"status": 500}),
    (0.050, "job-take", {"delay_s": 0.5}),
    (0.050, "job-stop", {"reset": True}),
    (0.050, "job-stop", {"status": 500}),
    (0.100, "ping", {"reset": True}),
    # The clients' requests.
    (0.020, "run", {"status": 500}),
    (0.020, "run", {"status": 429}),
    (0.010, "run", {"reset": True}),
    (0.010, "run", {"reset": True, "when": "after"}),
    (0.010, "stream", {"reset": True}),
    (0.010, "stream", {"reset": True, "when": "after"}),
    (0.010, "stream", {"status": 502}),
    (0.030, "stream", {"delay_s": 0.2}),
    (0.030, "status", {"reset": True}),
    (0.030, "status", {"status": 503}),
    (0.050, "cancel", {"reset": True}),
    (0.050, "cancel", {"status": 500, "when": "after"}),
    (0.030, "openai", {"status": 502}),
    (0.020, "openai", {"reset": True}),
    (0.050, "openai", {"cut": 3}),
    (0.030, "openai", {"cut": 5, "reset": True, "when": "after"}),
)


def raise_storm(faults: Faults, seed: int) -> list[Fault]:
    """Put all faults in force and return them."""
    dice = random.Random(seed)
    return [
        faults.add(operation, probability=probability, seed=dice.getrandbits(32), **what)
        for probability, operation, what in FAULTS
    ]


def told(storm: list[Fault]) -> str:
    """Return how often each operation was struck."""
    hits: dict[str, int] = {}
    for fault in storm:
        hits[fault.operation] = hits.get(fault.operation, 0) + fault.hits
    return ", ".join(f"{operation} {count}" for operation, count in hits.items())
