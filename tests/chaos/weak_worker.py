"""A worker with a weakness, by which the suite shows that it would notice one.

`WEAK_PROGRAM` is the worker's file, `WEAKNESS` one of

- `forgets`: now and then a piece of an answer is left out before it is sealed;
- `keeps`: what was cancelled goes on in the engine;
- `drops`: on SIGTERM it gives up its jobs.
"""

import os
import random
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

PROGRAM = os.environ["WEAK_PROGRAM"]


def forget() -> None:
    """Leave out pieces of answers."""
    from frames import AnswerEvent, Text
    from replies import SealedReply

    render = SealedReply.render
    dice = random.Random(1)

    def forgetful(self: SealedReply, events: Iterable[AnswerEvent]) -> Any:
        kept = [e for e in events if not (isinstance(e, Text) and dice.random() < 0.05)]
        return render(self, kept)

    SealedReply.render = forgetful  # type: ignore[method-assign]


def keep() -> None:
    """Abort nothing in the engine."""
    from vllm.v1.engine.async_llm import AsyncLLM

    async def nothing(*_: object, **__: object) -> None:
        pass

    AsyncLLM.abort = nothing  # type: ignore[method-assign]


def drop() -> None:
    """End as the SDK's own loop might, without a thought for what is running."""
    from job_loop import JobLoop

    told_to_stop = JobLoop.kill_worker

    def kill_worker(self: JobLoop) -> None:
        told_to_stop(self)
        for task in self.jobs_tasks.values():
            task.cancel()

    JobLoop.kill_worker = kill_worker


if __name__ == "__main__":
    sys.path.insert(0, str(Path(PROGRAM).parent))
    {"forgets": forget, "keeps": keep, "drops": drop}[os.environ["WEAKNESS"]]()
    sys.argv = [PROGRAM]
    runpy.run_path(PROGRAM, run_name="__main__")
elif __name__ == "__mp_main__":
    import log_guard

    log_guard.install_in_child()
