"""What the platform learns from sizes and times of the answers it carries.

Answers of a real model, recorded with their times, are given again by the product's handler, sealed
and sent by the real SDK; the platform's own record is all that the classifier sees. Against a copy
that leaves out the padding it tells the topics.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from local_runpod import LocalRunpod
from tests.attack import corpus
from tests.attack.guessing import Seen, guess
from tests.claims import FULL, Trials
from tests.wait import until
from tests.workers import Caller, RunningWorker

REPLAY = Path(__file__).with_name("replay_worker.py")

ANSWERS, TOKENS, SPEED = (240, 40, 1) if FULL else (48, 12, 10)
"""How many answers, and of how many tokens; in `make test` the engine is faster than it was."""

INTERVAL_MS = 500 // SPEED
"""Of paced mode: about two tokens' time."""

AT_ONCE = 40
"""More, and the times would tell how busy this machine is."""

AT_CHANCE = 0.001
"""A result that chance has less often than this is none of chance's."""


class Platforms:
    """What was seen of all answers, by the kind of worker; each kind is looked at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, list[Seen]] = {}

    def see(
        self, *, paced: bool = False, unpadded: bool = False, rhythm: bool = False
    ) -> list[Seen]:
        """Have every answer given, and return what the platform saw."""
        weakness = ",".join(["unpadded"] * unpadded + ["rhythm"] * rhythm)
        kind = f"{weakness}{'-paced' * paced}"
        if kind not in self._seen:
            self._seen[kind] = self._run(kind or "default", weakness, INTERVAL_MS * paced)
        return self._seen[kind]

    def _run(self, kind: str, weakness: str, interval_ms: int) -> list[Seen]:
        with (
            LocalRunpod(hold_s=5, stream_hold_s=5, record_bytes=10**9) as platform,
            RunningWorker(
                platform,
                self._folder / kind,
                program=REPLAY,
                AUDIT_WEAKNESS=weakness,
                AUDIT_SPEED=str(SPEED),
                STREAM_INTERVAL_MS=str(interval_ms),
                MAX_CONCURRENCY=str(AT_ONCE),
                RUNPOD_LOG_LEVEL="ERROR",
            ) as worker,
            Caller(platform, worker.key) as caller,
        ):
            worker.ready()
            params = {"max_tokens": TOKENS}
            bodies = ({"prompt": str(n), "sampling_params": params} for n in range(ANSWERS))
            ids = [caller.send("generate", body).job_id for body in bodies]
            jobs = [platform.jobs[id] for id in ids]
            until(lambda: all(job.status.final for job in jobs), 900, "the jobs are over")
            assert {str(job.status) for job in jobs} == {"COMPLETED"}
            assert platform.exchanged_lost == 0
            seen = {
                id: Seen(answer.topic, [], [])
                for id, answer in zip(ids, corpus.recorded(), strict=False)
            }
            taken_s: dict[str, float] = {}
            for exchange in platform.exchanged:
                path = exchange.path.partition("?")[0]
                if exchange.direction == "platform → worker" and "/job-take" in path:
                    given = json.loads(exchange.body or b"[]")
                    for job in given if isinstance(given, list) else [given]:
                        taken_s[job["id"]] = exchange.at_s
                elif exchange.direction == "worker → platform" and "/job-stream/" in path:
                    id = path.rpartition("/")[2]
                    seen[id].sizes.append(len(exchange.body))
                    seen[id].times_s.append(exchange.at_s - taken_s[id])
            return list(seen.values())


@pytest.fixture(scope="module")
def platforms(tmp_path_factory: pytest.TempPathFactory) -> Platforms:
    return Platforms(tmp_path_factory.mktemp("sizes"))


def different(seen: Sequence[Seen]) -> int:
    """Return how many answers have other sizes than most with as many chunks."""
    usual: defaultdict[int, Counter[tuple[int, ...]]] = defaultdict(Counter)
    for one in seen:
        usual[len(one.sizes)][tuple(one.sizes)] += 1
    return len(seen) - sum(counter.most_common(1)[0][1] for counter in usual.values())


@pytest.mark.claim(
    "sizes.equal",
    "Answers of as many chunks have the same sizes, chunk by chunk, whatever is said.",
)
def test_sizes_are_the_same_for_all_answers(platforms: Platforms, claim: Trials) -> None:
    assert different(platforms.see(unpadded=True)) > ANSWERS / 2
    for seen in (platforms.see(), platforms.see(paced=True)):
        claim.trials(len(seen), different(seen))
    sizes = {size for one in platforms.see() for size in one.sizes}
    claim.detail(f"{ANSWERS} answers, default and paced, of chunks of {sizes} bytes")


@pytest.mark.claim(
    "times.paced",
    "In paced mode, sizes and times of answers that take as long tell a classifier nothing of "
    "their topic.",
)
def test_topics_are_not_told_in_paced_mode(platforms: Platforms, claim: Trials) -> None:
    unpadded = guess(platforms.see(unpadded=True))
    default = guess(platforms.see())
    paced = guess(platforms.see(paced=True))
    figures = f"unpadded {unpadded}, default {default}, paced {paced}"
    if FULL:  # so few answers as there are otherwise teach a classifier little
        assert unpadded.p < 0.01 and unpadded.auprc > unpadded.high, figures
    claim.trial(paced.p >= AT_CHANCE)
    claim.detail(
        f"AUPRC of four topics in {ANSWERS} answers of {TOKENS} tokens: {figures}; "
        f"by chance {paced.chance:.2f} ({paced.low:.2f} to {paced.high:.2f})"
    )


@pytest.mark.claim("times.paced")
def test_nor_where_the_engine_has_a_rhythm_for_each_topic(
    platforms: Platforms, claim: Trials
) -> None:
    """As speculative decoding has one for text that is easily guessed, only plainer."""
    default = guess(platforms.see(rhythm=True))
    paced = guess(platforms.see(rhythm=True, paced=True))
    assert default.p < 0.01 and default.auprc > 0.9, default
    claim.trial(paced.p >= AT_CHANCE)
    claim.detail(f"with an engine whose rhythm tells the topic: default {default}, paced {paced}")
