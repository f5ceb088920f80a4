"""Streams: reading one answer piece by piece, blocking or on an event loop.

Owns the iterating, the order of pieces and failures, and the promise that a job
whose stream is left is cancelled. Knows nothing of requests (client.py) or of
what is on the wire (job.py and below).
"""

from collections import deque
from typing import Any, Generic, Protocol, Self, TypeVar

from answers import Answer, AnswerBuilder, Delta, Response, ResponseBuilder
from errors import AnswerError, SealedError
from frames import AnswerEvent, Head
from job import Job
from transport import run_blocking

T = TypeVar("T")


class _Builder(Protocol):
    def feed(self, events: list[AnswerEvent], /) -> Any:
        """Yield the pieces of the events."""


B = TypeVar("B", bound=_Builder)


class Pieces(Generic[T, B]):
    """A job and what has been read of its answer."""

    def __init__(self, job: Job, builder: B) -> None:
        self.job = job
        self.builder = builder
        self.ready: deque[T] = deque()
        self.failure: SealedError | None = None
        self.done = False

    async def fill(self) -> None:
        """Wait for the next pieces; the pieces before a failure come first."""
        try:
            events = await self.job.events()
            self.done = not events
            for piece in self.builder.feed(events):
                self.ready.append(piece)
        except SealedError as failure:
            self.failure = failure
            await self.job.close()

    async def next(self) -> T | None:
        """Return the next piece, None after the last."""
        while not self.ready:
            if self.failure:
                raise self.failure
            if self.done:
                return None
            await self.fill()
        return self.ready.popleft()

    async def batch(self) -> list[T]:
        """Return all pieces that are there, waiting for the first; none after the last."""
        first = await self.next()
        if first is None:
            return []
        pieces = [first, *self.ready]
        self.ready.clear()
        return pieces

    async def rest(self) -> None:
        """Read the answer to its end."""
        while await self.next() is not None:
            pass


async def read_answer(pieces: Pieces[Delta, AnswerBuilder]) -> Answer:
    """Wait for the end and return the whole answer."""
    await pieces.rest()
    return pieces.builder.answer(pieces.job.id, pieces.job.request_id)


async def read_response(pieces: Pieces[bytes, ResponseBuilder], check: bool) -> Response:
    """Wait for the end and return the response; with `check` one that is an error is raised."""
    await pieces.rest()
    response = pieces.builder.response(pieces.job.id, pieces.job.request_id)
    if check and (error := response.error()):
        raise error
    return response


async def read_head(pieces: Pieces[bytes, ResponseBuilder], check: bool) -> Head:
    """Wait for the status alone; with `check` an error is waited for to its end and raised."""
    while (head := pieces.builder.head) is None:
        if pieces.failure:
            raise pieces.failure
        if pieces.done:
            raise AnswerError("the answer ended without a status")
        await pieces.fill()
    if check and head.status >= 400:
        await read_response(pieces, check)
    return head


class _StreamBase(Generic[T, B]):
    def __init__(self, pieces: Pieces[T, B]) -> None:
        self._pieces = pieces

    @property
    def job_id(self) -> str:
        """The platform's id of the job, empty before it was submitted."""
        return self._pieces.job.id

    @property
    def request_id(self) -> str:
        """The id of the sealed request."""
        return self._pieces.job.request_id

    @property
    def note(self) -> str:
        """The worker's last word on the wait, such as `loading model org/name`; mostly empty."""
        return self._pieces.job.note


class _SyncStream(_StreamBase[T, B]):
    """Iterates an answer; leaving the `with` block cancels what has not ended."""

    def __enter__(self) -> Self:
        run_blocking(self._pieces.job.submit())
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._pieces.ready:
            return self._pieces.ready.popleft()
        piece = run_blocking(self._pieces.next())
        if piece is None:
            raise StopIteration
        return piece

    def close(self) -> None:
        """Cancel the job unless its answer has ended."""
        run_blocking(self._pieces.job.close())


class _AsyncStream(_StreamBase[T, B]):
    """Iterates an answer; leaving the `async with` block cancels what has not ended."""

    async def __aenter__(self) -> Self:
        await self._pieces.job.submit()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        if self._pieces.ready:
            return self._pieces.ready.popleft()
        piece = await self._pieces.next()
        if piece is None:
            raise StopAsyncIteration
        return piece

    async def close(self) -> None:
        """Cancel the job unless its answer has ended."""
        await self._pieces.job.close()


class Stream(_SyncStream[Delta, AnswerBuilder]):
    """The deltas of one answer."""

    def answer(self) -> Answer:
        """Read to the end, if need be, and return the whole answer."""
        return run_blocking(read_answer(self._pieces))


class AsyncStream(_AsyncStream[Delta, AnswerBuilder]):
    """The deltas of one answer."""

    async def answer(self) -> Answer:
        """Read to the end, if need be, and return the whole answer."""
        return await read_answer(self._pieces)


class RawStream(_SyncStream[bytes, ResponseBuilder]):
    """The server-sent events of one answer, each its lines without the blank one.

    Where the route does not stream, the pieces of its body. With `check` a status of
    400 or more is raised as RequestError.
    """

    def __init__(self, pieces: Pieces[bytes, ResponseBuilder], check: bool) -> None:
        super().__init__(pieces)
        self._check = check

    def head(self) -> Head:
        """Wait for and return status, kind and content type."""
        return run_blocking(read_head(self._pieces, self._check))

    def __next__(self) -> bytes:
        if self._pieces.builder.head is None:
            self.head()
        return super().__next__()

    def response(self) -> Response:
        """Read to the end, if need be, and return everything that came."""
        return run_blocking(read_response(self._pieces, self._check))


class AsyncRawStream(_AsyncStream[bytes, ResponseBuilder]):
    """The server-sent events of one answer; see RawStream."""

    def __init__(self, pieces: Pieces[bytes, ResponseBuilder], check: bool) -> None:
        super().__init__(pieces)
        self._check = check

    async def head(self) -> Head:
        """Wait for and return status, kind and content type."""
        return await read_head(self._pieces, self._check)

    async def __anext__(self) -> bytes:
        if self._pieces.builder.head is None:
            await self.head()
        return await super().__anext__()

    async def batch(self) -> list[bytes]:
        """Wait for at least one piece and return all that are there; none after the last."""
        if self._pieces.builder.head is None:
            await self.head()
        return await self._pieces.batch()

    async def response(self) -> Response:
        """Read to the end, if need be, and return everything that came."""
        return await read_response(self._pieces, self._check)
