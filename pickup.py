"""Pickup: the answer of a job that was submitted and let go.

Owns the waiting, which leaves no trace: /status is asked until the job is over, so whoever is
interrupted, or asks twice, takes nothing from whoever asks next, and nothing is cancelled.
Needs neither key (SPEC section 2). Knows nothing of where a SubmittedJob was kept.
"""

import time
from collections.abc import Callable
from typing import Any

from answers import Answer, AnswerBuilder, Progress, Response, ResponseBuilder
from crypto import AnswerOpener
from delivery import Delivery
from endpoint import Endpoint
from errors import NotOver, RecordError
from fernets import unb64
from frames import AnswerEvent
from hpke import HpkePrivateKey, check_available
from job import OVER, verdict
from job_records import SubmittedJob
from keys import KeyId
from progress import Reporter
from protocol import GENERATE

FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 2.0
LOOK_S = 5.0
"""How long one look may take, however short the wait is meant to be."""


async def collect(
    endpoint: Endpoint,
    job: SubmittedJob,
    *,
    timeout_s: float | None,
    on_progress: Callable[[Progress], None] | None,
) -> Answer | Response:
    """Wait for the end of a job, `timeout_s` at most, and return its authenticated answer.

    NotOver when the wait has ended before the job. The answer of a route is returned whatever
    its status.
    """
    view = await _wait(endpoint, job, timeout_s, on_progress)
    events = await _events(endpoint, job, view)
    builder: AnswerBuilder | ResponseBuilder
    builder = AnswerBuilder() if job.route == GENERATE else ResponseBuilder()
    for _ in builder.feed(events):
        pass
    if isinstance(builder, AnswerBuilder):
        return builder.answer(job.id, job.request_id)
    return builder.response(job.id, job.request_id)


async def _wait(
    endpoint: Endpoint,
    job: SubmittedJob,
    timeout_s: float | None,
    on_progress: Callable[[Progress], None] | None,
) -> dict[str, Any]:
    reporter = Reporter(endpoint, on_progress)
    started_s = time.monotonic()
    submitted_s = started_s - max(0.0, time.time() - job.issued_at)
    deadline_s = started_s + (float("inf") if timeout_s is None else timeout_s)
    delay_s = FIRST_DELAY_S
    while True:
        view = await endpoint.status(job.id, max(deadline_s, time.monotonic() + LOOK_S))
        status = str(view.get("status"))
        if status in OVER:
            return view
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            where = "still in the queue" if status == "IN_QUEUE" else "running"
            raise NotOver(f"job {job.id} is {where}; it goes on, ask for its result later")
        if reporter.wanted:
            await reporter.report(status, job.id, submitted_s)
        await endpoint.transport.sleep(min(delay_s, left_s))
        delay_s = min(2 * delay_s, LONGEST_DELAY_S)


async def _events(endpoint: Endpoint, job: SubmittedJob, view: dict[str, Any]) -> list[AnswerEvent]:
    # Nothing is released before the end, so an attempt that was broken off does no harm.
    opener = AnswerOpener(job, KeyId(job.key_id), _reply_key(job))
    delivery = Delivery(opener, streamed=False)
    status = str(view.get("status"))
    events: list[AnswerEvent] = []
    if status == "COMPLETED":
        output = view.get("output")
        events = delivery.take(output if isinstance(output, list) else [output] if output else [])
    # What reads consume is touched only where the platform has nothing else.
    while not delivery.ended and (chunks := (await endpoint.stream(job.id, float("inf"))).chunks):
        events += delivery.take(chunks)
    if delivery.ended:
        return events
    if status == "COMPLETED":
        raise delivery.fault()
    raise verdict(status, view, endpoint.id, job.key_id, job.public_key_id)


def _reply_key(job: SubmittedJob) -> HpkePrivateKey | None:
    if job.reply_seed is None:
        return None
    check_available()
    try:
        return HpkePrivateKey(unb64(job.reply_seed))
    except ValueError:
        raise RecordError(
            f"the record of job {job.id} is damaged; its answer stays closed"
        ) from None
