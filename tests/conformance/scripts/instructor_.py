"""instructor against the gateway; see harness.py."""

from typing import Any, Literal

import instructor
import openai
from harness import API_KEY, BASE_URL, Facts, asked, main, scenario
from pydantic import BaseModel


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    warm: bool


def client(mode: instructor.Mode) -> instructor.Instructor:
    """Return instructor over openai-python."""
    return instructor.from_openai(openai.OpenAI(base_url=BASE_URL, api_key=API_KEY), mode=mode)


def asked_once(name: str, **options: Any) -> Facts:
    """Return the arguments of a call that is not repeated."""
    return asked(name, **{"max_tokens": 150, "max_retries": 0, **options})


@scenario
def by_schema() -> Facts:
    found = client(instructor.Mode.JSON_SCHEMA).create(
        **asked_once("by_schema"), response_model=Weather
    )
    return {"parsed": found.model_dump()}


@scenario
def by_tool() -> Facts:
    found = client(instructor.Mode.TOOLS).create(**asked_once("by_tool"), response_model=Weather)
    return {"parsed": found.model_dump()}


@scenario
def partial() -> Facts:
    """The model grows while the answer is streamed."""
    steps = client(instructor.Mode.JSON_SCHEMA).create_partial(
        **asked_once("partial"), response_model=Weather
    )
    seen = [step.model_dump() for step in steps]
    return {"chunks": len(seen), "parsed": seen[-1]}


@scenario
def unknown_model() -> Facts:
    try:
        client(instructor.Mode.JSON_SCHEMA).create(
            **asked_once("unknown_model", model="nobody"), response_model=Weather
        )
    except Exception as error:
        # Its own exception, around that of the SDK.
        return {"error": type(error).__name__, "message": str(error)}
    return {"error": None}


if __name__ == "__main__":
    main()
