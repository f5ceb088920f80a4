"""Submissions: jobs that are handed over and left, and taken up again by whoever has their record.

Owns the order in which a record and its job come into being and what is done when that is
broken off. Knows nothing of files (job_records.py) or of waiting (pickup.py).
"""

from collections.abc import Callable
from dataclasses import replace

from answers import Answer, Progress, Response
from endpoint import Endpoint
from errors import PlatformFault, RecordError, RequestError, SealedError, TamperedChunk, Unconfirmed
from fernets import b64
from job import Job
from job_records import JobRecords, SubmittedJob
from pickup import collect

OnProgress = Callable[[Progress], None] | None


class Submissions:
    """The submitted jobs of one endpoint."""

    def __init__(self, endpoint: Endpoint, records: JobRecords) -> None:
        self._endpoint = endpoint
        self._records = records

    async def submit(self, job: Job, *, record: bool) -> SubmittedJob:
        """Hand a job to the platform and let it go; with `record`, not before that is on disk."""
        request = job.request
        submitted = SubmittedJob(
            endpoint_id=self._endpoint.id,
            key_id=job.key_id,
            request_id=request.request_id,
            response_secret=request.response_secret,
            public_key_id=job.public_key_id,
            reply_seed=b64(job.envelope.reply_key.seed) if job.envelope else None,
            route=request.route,
            issued_at=request.issued_at,
            expires_at=request.expires_at,
        )
        if record:
            self._records.add(submitted)
        try:
            await job.submit()
        except BaseException as error:
            # With an id it was cancelled; without one, the platform may have it for all we know.
            if record and (job.id or _was_refused(error)):
                self._records.discard(submitted)
            raise
        if record:
            return self._records.confirm(submitted, job.id)
        return replace(submitted, id=job.id)

    async def result(
        self, job: SubmittedJob | str, *, timeout_s: float | None, on_progress: OnProgress
    ) -> Answer | Response:
        """Wait for a job, or the id of a recorded one, and return its answer; see pickup.collect.

        RecordError for an id without a record and for a job of another endpoint.
        """
        found = job if isinstance(job, SubmittedJob) else self._records.find(job)
        if found:
            return await self._collect(found, timeout_s, on_progress)
        return await self._identify(str(job), timeout_s, on_progress)

    async def _collect(
        self, job: SubmittedJob, timeout_s: float | None, on_progress: OnProgress
    ) -> Answer | Response:
        if job.endpoint_id != self._endpoint.id:
            raise RecordError(
                f"job {job.id} was submitted to endpoint {job.endpoint_id}, and the settings name "
                f"{self._endpoint.id}; set RUNPOD_ENDPOINT_ID (or --endpoint) to {job.endpoint_id}"
            )
        return await collect(self._endpoint, job, timeout_s=timeout_s, on_progress=on_progress)

    async def _identify(
        self, job_id: str, timeout_s: float | None, on_progress: OnProgress
    ) -> Answer | Response:
        """Try the records whose job's id was never told: the one that opens the answer is it."""
        for job in self._records.unconfirmed():
            if job.endpoint_id != self._endpoint.id:
                continue
            try:
                answer = await self._collect(replace(job, id=job_id), timeout_s, on_progress)
            except TamperedChunk:
                continue
            except RequestError:
                self._records.confirm(job, job_id)
                raise
            self._records.confirm(job, job_id)
            return answer
        raise RecordError(
            f"there is no record of job {job_id} in {self._records.folder}: its answer was "
            "collected and the record removed, or the job was submitted from somewhere else"
        )


def _was_refused(error: BaseException) -> bool:
    """Whether a failed submission says that the platform does not have the job."""
    return isinstance(error, SealedError) and not isinstance(error, Unconfirmed | PlatformFault)
