"""The exception tree: everything this project raises on purpose.

SealedError
├── ConfigError             the settings cannot work; names every fault at once
├── ModelError              the model's files cannot be made ready
│   ├── ModelNotFound         no such repository, revision or folder (or it is private)
│   ├── ModelGated            access must be granted, or the token is wrong
│   ├── ModelOffline          not in the cache and the Hub cannot be reached
│   ├── ModelIncomplete       files are missing, truncated or of the wrong size
│   ├── DiskFull              the volume has no room; says how many GB are needed
│   └── ModelTooLarge         the devices have no room; says what it takes and what to change
├── RequestError            an opened request that cannot be served; becomes an OpenAI error
│   └── EngineDead            the engine process died; this worker will exit
├── RecordError             a submitted job's record cannot be written or used (client side)
├── Rejected                a request that could not be opened; constant, tells nothing
├── AnswerError             an answer that must not be believed (client side)
│   ├── TamperedChunk         a chunk fails authentication or is malformed
│   │   └── OtherVersion        it claims to be of another version of the protocol
│   ├── MissingChunk          a chunk was lost on the way and could not be repaired
│   ├── RestartedAnswer       the platform ran the job again after delivery had begun
│   └── TruncatedAnswer       the job ended without its authenticated end
└── JobError                the platform could not run the job (client side)
    ├── Unreachable           no connection to the platform
    │   └── Unconfirmed         it broke while a job was submitted: the platform may have it
    ├── WrongApiKey           the platform refused the API key
    ├── EndpointNotFound      no endpoint or job of that id
    ├── TooLarge              the sealed request exceeds what the platform carries
    ├── RateLimited           the platform asks to slow down
    ├── PlatformFault         the platform answered with an error of its own
    ├── NoWorker              no worker took the job within the wait
    ├── JobFailed             the job failed on the platform
    ├── JobTimedOut           the job ran or waited past its limit
    ├── JobCancelled          the job was cancelled
    └── NotOver               a submitted job has no answer yet

Messages are shown to people: they say what is wrong and what to do, and never
quote a secret, a prompt or an answer. `exit_code` is what the commands end with,
`status` the HTTP status that the gateway answers with.
"""

from collections.abc import Sequence
from typing import Any


class SealedError(Exception):
    """Base of every error raised on purpose; `str()` of it is fit to be shown."""

    exit_code = 1
    status: int = 500


class ConfigError(SealedError):
    """Settings that cannot work; `faults` holds one sentence each."""

    exit_code = 3

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(f"- {fault}" for fault in self.faults))


class ModelError(SealedError):
    """The model's files cannot be made ready."""


class ModelNotFound(ModelError):
    """No such repository, revision or folder, or it is private to another account."""


class ModelGated(ModelError):
    """The repository asks for access that the token does not have."""


class ModelOffline(ModelError):
    """The model is not cached and the Hub cannot be reached or is switched off."""


class ModelIncomplete(ModelError):
    """Files of the model are missing, truncated or of the wrong size."""


class DiskFull(ModelError):
    """The volume has no room for the model."""


class ModelTooLarge(ModelError):
    """The memory of the devices has no room for the model with these settings."""


class RequestError(SealedError):
    """A request that was opened but cannot be served.

    `status` is the HTTP status an OpenAI server would answer with; the other
    fields are those of OpenAI's error object.
    """

    exit_code = 4

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "BadRequestError",
        param: str | None = None,
        code: str | int | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.param = param
        self.code = status if code is None else code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object, `{"error": {message, type, param, code}}`.

        Where it is known when the same may be asked again, `retry_after_s` says it.
        """
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.retry_after_s is not None:
            error["retry_after_s"] = self.retry_after_s
        return {"error": error}

    @classmethod
    def from_body(cls, body: Any, status: int) -> "RequestError":
        """Rebuild the error from an OpenAI (or FastAPI `detail`) error object."""
        error = body.get("error") if isinstance(body, dict) else None
        if not isinstance(error, dict):
            detail = body.get("detail") if isinstance(body, dict) else None
            return cls(str(detail or f"the worker answered with status {status}"), status=status)
        retry_after_s = error.get("retry_after_s")
        return cls(
            str(error.get("message", "")),
            status=status,
            type=str(error.get("type", "")),
            param=error.get("param"),
            code=error.get("code"),
            retry_after_s=retry_after_s if isinstance(retry_after_s, int) else None,
        )


class EngineDead(RequestError):
    """The engine process died while it held this request."""

    def __init__(self) -> None:
        super().__init__(
            "the engine of this worker died; the worker restarts, send the request again",
            status=503,
            type="EngineDeadError",
            code="engine_dead",
        )


class Rejected(SealedError):
    """A request that could not be opened; carries nothing but its constant text.

    The causes (wrong key, damaged, malformed) are not told apart: SPEC section 7.
    A client adds its `advice`, a worker never does.
    """

    exit_code = 5
    status = 403
    TEXT = "request rejected: it could not be opened with a key of this worker"

    def __init__(self, advice: str = "") -> None:
        super().__init__(self.TEXT + advice)


class RecordError(SealedError):
    """The record of a submitted job cannot be written, found or used."""

    exit_code = 20


class AnswerError(SealedError):
    """An answer that must not be believed."""

    exit_code = 6
    status = 502


class TamperedChunk(AnswerError):
    """A chunk that fails authentication or does not have the form of SPEC section 5."""


class OtherVersion(TamperedChunk):
    """A chunk that claims to be of another version of the protocol."""

    exit_code = 23


class MissingChunk(AnswerError):
    """A chunk that never arrived."""

    exit_code = 7


class RestartedAnswer(AnswerError):
    """A second attempt's chunks after the first attempt's were delivered."""

    exit_code = 8


class TruncatedAnswer(AnswerError):
    """A job that ended without the final chunk."""

    exit_code = 9


class JobError(SealedError):
    """The platform could not run the job."""

    exit_code = 10
    status = 502


class Unreachable(JobError):
    """No connection to the platform."""

    exit_code = 11


class Unconfirmed(Unreachable):
    """The connection broke while a job was submitted; the platform may have it or not."""

    exit_code = 22


class WrongApiKey(JobError):
    """The platform refused the API key (401 or 403)."""

    exit_code = 12
    status = 401


class EndpointNotFound(JobError):
    """No endpoint or job of that id (404)."""

    exit_code = 13
    status = 404


class TooLarge(JobError):
    """The sealed request is larger than the platform carries."""

    exit_code = 14
    status = 413


class RateLimited(JobError):
    """The platform answered 429 for longer than the client was willing to wait."""

    exit_code = 15
    status = 429


class PlatformFault(JobError):
    """The platform answered 5xx, or something that is not its API."""

    exit_code = 19


class NoWorker(JobError):
    """No worker took the job within the wait."""

    exit_code = 16
    status = 503


class JobFailed(JobError):
    """The platform reports the job as FAILED."""

    exit_code = 17


class JobTimedOut(JobError):
    """The platform reports the job as TIMED_OUT, or the wait for it ended."""

    exit_code = 18
    status = 504


class JobCancelled(JobError):
    """The job was cancelled; 130 is what a shell reports after Ctrl-C."""

    exit_code = 130
    status = 409


class NotOver(JobError):
    """A submitted job has no answer yet; it goes on."""

    exit_code = 21
    status = 504
