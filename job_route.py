"""A job on the endpoint's OpenAI route: one request, one answer that is read while it comes.

Owns the sealed body on that route, the reading of its events and what a connection
that ends too early means (SPEC section 1.2). There is no id, hence nothing to repair
or to find again: who closes the connection cancels the job. What both ways to the
endpoint share is in `job`.
"""

import contextlib
import time

import msgspec

from endpoint import SENT_ONCE, said
from errors import (
    ConfigError,
    JobError,
    PlatformFault,
    Rejected,
    SealedError,
    TruncatedAnswer,
    Unreachable,
)
from frames import AnswerEvent
from job import Job, verdict
from transport import Events

LEAVE_S = 1.0
"""How long the platform may take to end an answer that has been read to its end."""


class RouteJob(Job):
    """A job that lives as long as its connection."""

    _body = b""
    _answer: Events | None = None

    async def _send(self) -> None:
        if self._limits.execution_timeout_s is not None:
            raise ConfigError(
                ["execution_timeout_s cannot be told by the OpenAI route: set CLIENT_TRANSPORT=run"]
            )
        # It leaves with the first read: the answer's head comes when a worker has the job, and
        # whoever submits is not to wait for that.
        self._body = msgspec.json.encode({"sealed": self._sealed, "stream": True})
        self._begin_watch()

    async def _open(self) -> Events:
        limit_s = self._next_limit_s()
        try:
            answer = await self._endpoint.open(self._body, limit_s)
        except Unreachable:
            if time.monotonic() >= limit_s:
                raise await self._too_late(limit_s) from None
            raise
        self._body = b""
        if not answer.streams:
            raise self._refused(answer)
        return answer

    def _refused(self, answer: Events) -> SealedError:
        """Return what it means that the platform answered, but not with events."""
        words = said(answer.body) or ""
        if Rejected.TEXT in words or (words and answer.status in (200, 500)):
            return self._failure(words)
        if not answer.body and answer.status == 200:
            return self._cut("ended")
        if answer.status == 200:
            return self._endpoint.not_the_api(answer)
        return PlatformFault(f"the platform answered {answer.status} {words[:200]}; {SENT_ONCE}")

    async def _read(self) -> list[AnswerEvent]:
        if self._answer is None:
            self._answer = await self._open()
        limit_s = self._next_limit_s()
        try:
            data = await self._answer.next(limit_s)
        except TimeoutError:
            raise await self._too_late(limit_s) from None
        except ConnectionError as error:
            raise self._cut(f"broke ({error})") from None
        if data is None:
            raise self._cut("ended")
        failure = data if self._queued and data == Rejected.TEXT else None
        if data.startswith("{"):
            failure = said(data.encode())
        if failure:
            self._over = True
            raise self._failure(failure)
        self._status = "IN_PROGRESS"
        events = self._delivery.take([data])
        await self._report()
        self._over = self._delivery.ended
        return events

    def _failure(self, words: str) -> SealedError:
        view = {"error": words}
        return verdict("FAILED", view, self._endpoint.id, self.key_id, self.public_key_id)

    def _cut(self, how: str) -> SealedError:
        fault = self._delivery.fault()
        if not isinstance(fault, TruncatedAnswer):
            return fault
        return TruncatedAnswer(
            f"the connection {how} before the authenticated end of the answer; what arrived is "
            "not the whole answer. Platforms cut long answers of their OpenAI route: send the "
            "request again with CLIENT_TRANSPORT=run"
        )

    async def _too_late(self, limit_s: float) -> JobError:
        return self._timed_out() if limit_s >= self._deadline_s else await self._no_worker()

    async def _look(self) -> None:
        """There is nothing to look at."""

    async def _abandon(self) -> None:
        answer, self._answer = self._answer, None
        if answer:
            await answer.close()

    async def _leave(self) -> None:
        """Let the platform end the answer; closing before would cancel a job that is done."""
        answer, self._answer = self._answer, None
        if answer:
            with contextlib.suppress(TimeoutError, ConnectionError):
                until_s = time.monotonic() + LEAVE_S
                while await answer.next(until_s) is not None:
                    pass
            await answer.close()
