"""What the scripts of this folder share: scenarios by name, each reported as one line of JSON.

A script is run in an environment that has its client and nothing of this project:

    BASE_URL=http://127.0.0.1:PORT/v1 API_KEY=... MODEL=... python openai_python.py [SCENARIO...]

A scenario returns what the client made of the answer. What it ought to be is not decided here
but in the tests beside, which know what the worker says to the native client.
"""

import asyncio
import json
import os
import sys
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
Scenario = Callable[[], Facts | Coroutine[Any, Any, Facts]]

BASE_URL = os.environ.get("BASE_URL", "")
API_KEY = os.environ.get("API_KEY", "")
MODEL = os.environ.get("MODEL", "")
MANY = 32
CLIENT = Path(sys.argv[0]).stem

SCHEMA: Facts = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}

_scenarios: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    """Register a function as the scenario of its name."""
    _scenarios[function.__name__] = function
    return function


def prompt(name: str, text: str = "Tell me about the sea.") -> str:
    """Return a prompt that can be told from all others, wherever it turns up."""
    return f"My name is tourmaline-{CLIENT}-{name}. {text}"


def asked(name: str, **options: Any) -> Facts:
    """Return the body of a chat completion."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt(name)}],
        "temperature": 0,
        "max_tokens": 40,
        **options,
    }


def said(name: str, number: int) -> str:
    """Return what the model is made to say to one of many at once."""
    return f"Number {number} of {CLIENT} {name} says {number * number}."


def main() -> None:
    """Run the scenarios named on the command line, or all."""
    for name in sys.argv[1:] or _scenarios:
        try:
            answer = _scenarios[name]()
            facts = answer if isinstance(answer, dict) else asyncio.run(answer)
        except BaseException as error:
            facts = {"raised": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}
        print(json.dumps({"scenario": name, **facts}), flush=True)
