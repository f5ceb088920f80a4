"""What a failed download means to people: the error that says what is wrong and what to do.

Knows every kind of `hub_download.Failure`; decides nothing.
"""

import re

from errors import (
    DiskFull,
    ModelError,
    ModelGated,
    ModelIncomplete,
    ModelNotFound,
    ModelOffline,
)
from hub_download import Failure, Hub
from model_cache import HUB, Repo
from model_progress import Manifest


def error_of(
    failure: Failure, repo: Repo, hub: Hub, manifest: Manifest | None, attempts: int
) -> ModelError:
    """Return the error for a download that has failed for good after so many attempts."""
    name, detail = repo.id, _plain(failure.detail, hub.token)
    page = f"{(hub.endpoint or HUB).rstrip('/')}/{repo.id}"
    tokens = "https://huggingface.co/settings/tokens"
    match failure.kind:
        case "gated" if hub.token is None:
            return ModelGated(
                f"{name} is gated: accept its licence at {page} and set HF_TOKEN to a token of "
                f"that account ({tokens})"
            )
        case "gated":
            return ModelGated(
                f"{name} is gated and the account of HF_TOKEN has no access: accept its licence at "
                f"{page} with that account; a fine-grained token also needs the permission to "
                f"read public gated repositories ({tokens})"
            )
        case "token" if hub.token is None:
            return ModelGated(
                f"the Hub shows {name} to nobody without a token (401): set HF_TOKEN to one of an "
                f"account that may read it ({tokens})"
            )
        case "token":
            return ModelGated(
                "the Hub refuses HF_TOKEN (401), it is wrong, expired or revoked: make a new one "
                f"at {tokens}, or unset it for a public model"
            )
        case "forbidden":
            return ModelGated(
                f"the Hub denies access to {name} (403): check at {page} that the account of "
                f"HF_TOKEN may read it ({detail})"
            )
        case "repository":
            private = (
                "if it is private or gated, set HF_TOKEN"
                if hub.token is None
                else "if it is private, HF_TOKEN must belong to an account that may read it"
            )
            return ModelNotFound(f"there is no model {name} on the Hub: check the name; {private}")
        case "revision":
            return ModelNotFound(
                f"{name} has no revision {repo.revision!r}: its revisions are listed at "
                f"{(hub.endpoint or HUB).rstrip('/')}/api/models/{repo.id}/refs"
            )
        case "weights" | "config":
            return ModelNotFound(f"{name}: {detail}")
        case "room":
            needs = "its size is not known yet"
            if manifest is not None:
                missing = manifest.total - manifest.finished_bytes(hub.cache / repo.storage_name)
                needs = (
                    f"it needs {missing / 1e9:.2f} GB more ({manifest.total / 1e9:.2f} GB in all)"
                )
            return DiskFull(
                f"no room for {name} in {hub.cache}: {needs}; enlarge the network volume, remove "
                "other models from it, or set HF_HOME to a folder on a larger one"
            )
        case "unwritable":
            return ModelError(
                f"cannot write to {hub.cache} ({detail}): set HF_HOME to a folder on a writable "
                "volume, or put the whole model there beforehand"
            )
        case "incomplete" | "entry":
            return ModelIncomplete(
                f"{name} is still incomplete after {attempts} downloads ({detail}): what the Hub "
                f"serves does not match its own listing; try another revision of {page}"
            )
        case "network" | "busy" | "stalled" | "died" | "expired":
            return ModelOffline(
                f"{name} could not be downloaded from {hub.endpoint or HUB}, "
                f"{explained(failure, hub.token)}: check the network and HF_ENDPOINT and start "
                "again (finished files are kept), or put the model on the volume beforehand"
            )
        case _:
            return ModelError(f"{name} could not be downloaded: {detail}")


def explained(failure: Failure, token: str | None) -> str:
    """Return what has happened, for a failure that may pass."""
    what = {
        "network": "the connection failed or broke off",
        "busy": "the Hub is busy or limits requests",
        "stalled": "the download stalled",
        "died": "the download process died",
        "incomplete": "files came incomplete",
        "expired": "the address of a file was refused",
    }[failure.kind]
    return f"{what} ({_plain(failure.detail, token)})"


def _plain(text: str, token: str | None) -> str:
    """One short line without the token and without the signed query of a URL."""
    if token:
        text = text.replace(token, "***")
    return re.sub(r"\?[^\s'\"]+", "?…", " ".join(text.split()))[:300]
