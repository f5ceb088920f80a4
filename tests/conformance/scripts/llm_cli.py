"""The `llm` command against the gateway; see harness.py.

Its settings live in a folder of their own. The models stand in extra-openai-models.yaml, as
its documentation says for servers that speak OpenAI's format.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from harness import API_KEY, BASE_URL, MODEL, SCHEMA, Facts, main, prompt, scenario

COMMAND = str(Path(sys.executable).with_name("llm"))
FOLDER = Path.cwd() / "llm"
OPTIONS = ["-o", "temperature", "0", "-o", "max_tokens", "40"]
LONGER = ["-o", "temperature", "0", "-o", "max_tokens", "150"]
ENVIRONMENT = {**os.environ, "LLM_USER_PATH": str(FOLDER)}


def prepare() -> None:
    """Write what a person writes once."""
    (FOLDER / "templates").mkdir(parents=True, exist_ok=True)
    common = f"  api_base: {BASE_URL}\n  api_key_name: gateway\n"
    abilities = "  supports_schema: true\n  supports_tools: true\n"
    (FOLDER / "extra-openai-models.yaml").write_text(
        f"- model_id: sealed\n  model_name: {MODEL}\n{common}{abilities}"
        f"- model_id: sealed-completion\n  model_name: {MODEL}\n  completion: true\n{common}"
        f"- model_id: sealed-responses\n  model_name: {MODEL}\n  responses: true\n{common}"
        f"- model_id: nobody\n  model_name: nobody\n{common}"
    )
    (FOLDER / "templates" / "sailor.yaml").write_text(
        "model: sealed\nsystem: You are a sailor.\nprompt: 'Answer briefly: $input'\n"
        "options:\n  temperature: 0\n  max_tokens: 40\n"
    )
    (FOLDER / "keys.json").write_text(json.dumps({"gateway": API_KEY}))


def llm(*arguments: str, typed: str = "") -> Facts:
    """Run the command and return what it printed."""
    done = subprocess.run(
        [COMMAND, *arguments],
        env=ENVIRONMENT,
        input=typed,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return {"text": done.stdout.removesuffix("\n"), "note": done.stderr, "code": done.returncode}


@scenario
def whole() -> Facts:
    return llm("-m", "sealed", *OPTIONS, "--no-stream", prompt("whole"))


@scenario
def streamed() -> Facts:
    return llm("-m", "sealed", *OPTIONS, prompt("streamed"))


@scenario
def usage() -> Facts:
    return llm("-m", "sealed", *OPTIONS, "-u", prompt("usage"))


@scenario
def system() -> Facts:
    return llm("-m", "sealed", *OPTIONS, "-s", "You are a sailor.", prompt("system"))


@scenario
def template() -> Facts:
    """Model, system prompt and options out of a file."""
    return llm("-t", "sailor", prompt("template"))


@scenario
def chat() -> Facts:
    """Two turns of a conversation that a person types."""
    return llm("chat", "-m", "sealed", *OPTIONS, typed=f"{prompt('chat')}\nAnd then?\nexit\n")


@scenario
def continued() -> Facts:
    """A second turn, for which the command sends the first one along."""
    first = llm("-m", "sealed", *OPTIONS, prompt("continued", "Say hello."))
    return {"first": first["text"], **llm("-c", *OPTIONS, prompt("continued-on", "And bye?"))}


@scenario
def schema() -> Facts:
    return llm(
        "-m", "sealed", *LONGER, "--schema", json.dumps(SCHEMA), "--no-stream", prompt("schema")
    )


@scenario
def schema_streamed() -> Facts:
    return llm("-m", "sealed", *LONGER, "--schema", json.dumps(SCHEMA), prompt("schema_streamed"))


@scenario
def completion() -> Facts:
    return llm("-m", "sealed-completion", *OPTIONS, prompt("completion", "The sea is a"))


@scenario
def responses() -> Facts:
    return llm("-m", "sealed-responses", *OPTIONS, prompt("responses"))


@scenario
def endpoint() -> Facts:
    """The way without a file of settings."""
    arguments = ["--key", API_KEY, "-m", MODEL, *OPTIONS]
    return llm("openai", "endpoint", BASE_URL, *arguments, prompt("endpoint"))


@scenario
def endpoint_models() -> Facts:
    return llm("openai", "endpoint", BASE_URL, "--key", API_KEY, "--models")


@scenario
def unknown_model() -> Facts:
    return llm("-m", "nobody", prompt("unknown_model"))


@scenario
def broken() -> Facts:
    options = ["-o", "temperature", "0", "-o", "max_tokens", "300"]
    return llm("-m", "sealed", *options, prompt("broken"))


@scenario
def cancelled() -> Facts:
    """Ctrl-C in the middle of an answer."""
    options = ["-o", "temperature", "0", "-o", "max_tokens", "1500"]
    process = subprocess.Popen(
        [COMMAND, "-m", "sealed", *options, prompt("cancelled")],
        env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    return {"chunks": len(first), "code": process.returncode}


if __name__ == "__main__":
    prepare()
    main()
