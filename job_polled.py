"""A job on the platform's queue: /run, /stream until it is over, /status for what is missing.

Owns the polling and its pauses, the repair from /status and the cancelling by id
(SPEC sections 1.1 and 10). What both ways to the endpoint share is in `job`.
"""

import contextlib
import time
from typing import Any

import msgspec

from endpoint import StreamRead
from errors import JobError, Unreachable
from frames import AnswerEvent
from job import OVER, Job, verdict

FIRST_DELAY_S = 0.02
LONGEST_DELAY_S = 0.25
HELD_S = 0.5
"""An empty read that took this long was held by the platform; the next one may follow at once."""


class PolledJob(Job):
    """A job that is found again by its id."""

    _delay_s = 0.0

    async def _send(self) -> None:
        await self._endpoint.transport.whole(self._run())
        self._begin_watch()

    async def _run(self) -> None:
        body: dict[str, Any] = {"input": {"sealed": self._sealed}}
        if policy := self._limits.policy():
            body["policy"] = policy
        self.id = await self._endpoint.run(msgspec.json.encode(body), self._deadline_s)

    async def _abandon(self) -> None:
        if self.id:
            await self._endpoint.transport.whole(self._cancel())

    async def _leave(self) -> None:
        """There is nothing left."""

    async def _cancel(self) -> None:
        # Nobody is left to tell, and the platform ends the job by itself at its limits.
        with contextlib.suppress(JobError):
            await self._endpoint.cancel(self.id)

    async def _look(self) -> None:
        status = str((await self._endpoint.status(self.id)).get("status"))
        # Never back to a status that is older than what a read has told meanwhile.
        if self._queued:
            self._status = status

    async def _read(self) -> list[AnswerEvent]:
        limit_s = self._next_limit_s()
        try:
            read = await self._endpoint.stream(self.id, limit_s)
        except Unreachable:
            await self._check_limits()
            if time.monotonic() >= limit_s:
                return []  # cut short by our own limit, and taken in time
            raise
        self._status = read.status
        chunks = read.chunks
        events = self._delivery.take(chunks)
        if self._delivery.ended:
            self._over = True
            return events
        if read.status in OVER and not chunks:
            return await self._finish()
        if chunks:
            self._delay_s = 0.0
            if not events:  # they may hold a word of the worker
                await self._report()
            return events
        await self._check_limits()
        if self._reporter.wanted and not self._end_watch:
            await self._report()
        await self._pause(read)
        return []

    async def _pause(self, read: StreamRead) -> None:
        """Wait before the next read, longer and longer, where the platform does not hold reads."""
        if read.elapsed_s >= HELD_S:
            self._delay_s = 0.0
        else:
            self._delay_s = min(LONGEST_DELAY_S, max(FIRST_DELAY_S, 2 * self._delay_s))
            await self._endpoint.transport.sleep(self._delay_s)

    async def _check_limits(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._deadline_s:
            raise self._timed_out()
        if now_s < self._next_limit_s():
            return
        # The read was cut short, so the job may have been taken meanwhile.
        view = await self._endpoint.status(self.id, now_s + 5)
        self._status = str(view.get("status"))
        if self._queued:
            raise await self._no_worker()

    async def _finish(self) -> list[AnswerEvent]:
        """The platform says that the job is over, but the answer has no end yet."""
        self._over = True
        try:
            view = await self._endpoint.status(self.id, self._deadline_s)
        except JobError as error:
            if self._status == "COMPLETED":
                raise self._delivery.fault() from error
            view = {}
        if self._status != "COMPLETED":
            raise verdict(self._status, view, self._endpoint.id, self.key_id, self.public_key_id)
        output = view.get("output")
        chunks = output if isinstance(output, list) else [] if output is None else [output]
        events = self._delivery.take(chunks)
        if not self._delivery.ended:
            raise self._delivery.fault()
        return events
