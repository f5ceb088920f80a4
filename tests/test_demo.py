"""`make demo` and `make demo-gateway`: what a person sees, what is
searched for, and that nothing is left running.
"""

import base64
import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from crypto import AnswerSealer, new_request, seal_request
from frames import AnswerEvent, End, FrameEncoder, Text
from keys import KeyRing, generate_key
from local_runpod_http import Exchange
from tests.wait import until
from tests.workers import ROOT
from tools import demo, demo_gateway, demo_search, demo_stage

PROMPT = "What would you like to tell the platform?"
DEMO = [sys.executable, str(ROOT / "tools" / "demo.py")]
END = End({"total_tokens": 3}, {"total_ms": 1.0})


def left_running(log: Path) -> list[psutil.Process]:
    """Return the processes that write to the demo's log."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.readlink(f"/proc/{process.pid}/fd/1") == str(log):
                found.append(process)
    return found


@pytest.mark.parametrize(
    "carried",
    [
        PROMPT.encode(),
        json.dumps({"input": {"prompt": PROMPT}}).encode(),
        b"xx" + PROMPT[5:14].encode() + b"yy",
        *(base64.b64encode(b"?" * shift + PROMPT.encode() + b"?") for shift in range(3)),
    ],
)
def test_the_search_finds_text_in_the_clear(carried: bytes) -> None:
    assert demo_search.count_found(PROMPT, b"\0" + carried + b"\0")


def test_the_search_finds_escaped_text() -> None:
    text = 'Où est "la clé", Zoë?'
    assert demo_search.count_found(text, json.dumps(text).encode())
    assert demo_search.count_found(text, text.encode())


def test_the_search_finds_nothing_in_other_bytes() -> None:
    assert not demo_search.count_found(
        PROMPT, os.urandom(100_000) + base64.b64encode(os.urandom(100_000))
    )


def command_line(process: psutil.Process) -> list[str]:
    """Return a process's arguments, none where it has just ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_own_settings_of_a_person_do_not_reach_the_demo() -> None:
    given = {"MODEL_PATH": "/elsewhere", "ENCRYPTION_KEY": "k", "RUNPOD_API_KEY": "k", "PATH": "p"}
    assert demo_stage.clean_environment(given) == {"PATH": "p"}


def test_a_worker_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    code = f"""
import pathlib, sys
from tools import demo, demo_stage
demo_stage.LOG = pathlib.Path({str(log)!r})
demo_stage.WORKER = (sys.executable, "-c", "import sys; sys.exit('this is why')")
sys.exit(demo.main([{PROMPT!r}]))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 1
    assert "the worker did not start (exit code 1)" in ran.stderr
    assert str(log) in ran.stderr
    assert "this is why" in ran.stderr
    assert not left_running(log)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*DEMO, PROMPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            until(lambda: left_running(demo_stage.LOG), 60, "the worker started")
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert errors.strip() == "interrupted; nothing is left running"
    until(lambda: not left_running(demo_stage.LOG), 10, "the last process is gone")


def seen_in_a_terminal(command: list[str], timeout_s: float) -> tuple[int, list[str]]:
    """Run a command in a pseudo-terminal; return its exit code and what was read, as it came."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm", COLUMNS="100", LINES="50")
        os.execv(command[0], command)
    reads, deadline = [], time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 1)[0]:
                reads.append(os.read(terminal, 65536).decode(errors="replace"))
    except OSError:  # how a terminal ends
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status), reads
    finally:
        os.close(terminal)
    os.kill(pid, signal.SIGINT)
    raise AssertionError(f"not within {timeout_s} s: {''.join(reads)[-2000:]}")


@pytest.mark.parametrize("last", [[Text(0, " to the end of it" * 3), END], [END]])
def test_the_table_says_where_the_answer_ends(last: list[AnswerEvent]) -> None:
    request, key = new_request("generate", b"{}", audience="local", ttl_s=60), generate_key()
    first = KeyRing.parse(key).first
    sealer, encoder = AnswerSealer(request, first), FrameEncoder()
    answer: list[list[AnswerEvent]] = [[Text(0, "Light")], [Text(0, " is")], last]
    chunks = [
        chunk
        for events in answer
        for chunk in sealer.seal(encoder.encode(events), final=events is last)
    ]
    asked = json.dumps({"input": {"sealed": seal_request(request, first)}}).encode()
    screen = io.StringIO()
    demo.show_both_sides(
        Console(file=screen, width=100),
        PROMPT,
        key,
        [Exchange("client → platform", "POST", "/v2/local/run", asked, 0.0)]
        + [
            Exchange(
                "worker → platform",
                "POST",
                "/job-stream/pod-1/1",
                json.dumps({"output": chunk}).encode(),
                0.0,
            )
            for chunk in chunks
        ],
    )
    assert any(row.startswith(" (the end) ") for row in screen.getvalue().splitlines())


@pytest.mark.engine
def test_a_person_sees_the_answer_arrive_and_what_the_platform_saw() -> None:
    code, reads = seen_in_a_terminal([*DEMO, PROMPT], 600)
    seen = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", "".join(reads))
    assert code == 0, seen
    assert re.search(r"Starting the worker … \d+ s", seen), "no seconds while it starts"
    assert f'$ python client.py "{PROMPT}"' in seen
    began = next(number for number, text in enumerate(reads) if "python client.py" in text)
    ended = next(number for number, text in enumerate(reads) if "what the platform saw" in text)
    assert ended - began > 5, "the answer came in one piece"
    assert re.search(r"^ ?\(the end\)", seen, re.MULTILINE), seen
    assert "nothing of the prompt or of the answer is in there" in seen
    assert re.search(r"First token after \d+ ms on the worker", seen)
    assert seen.rstrip().splitlines()[-1].startswith("Stopping the worker: done")
    until(lambda: not left_running(demo_stage.LOG), 10, "the last process is gone")


@pytest.mark.engine
def test_a_person_sees_the_openai_sdk_answered_through_the_gateway() -> None:
    command = [sys.executable, str(ROOT / "tools" / "demo_gateway.py")]
    code, reads = seen_in_a_terminal(command, 600)
    seen = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", "".join(reads))
    assert code == 0, seen
    for name, value in (
        ("base URL", r"http://127\.0\.0\.1:\d+/v1"),
        ("endpoint", "local"),
        ("key id", "[0-9a-f]{16}"),
        ("worker", "awake"),
        ("version", "sealed-vllm .*, vLLM "),
        ("models", "SmolLM2-135M-Instruct"),
    ):
        assert re.search(rf"^{name} +{value}", seen, re.MULTILINE), (name, seen)
    assert "client = openai.OpenAI(base_url=" in seen
    began = next(number for number, text in enumerate(reads) if "openai.OpenAI" in text)
    ended = next(number for number, text in enumerate(reads) if "First words after" in text)
    assert ended - began > 5, "the answer came in one piece"
    assert "nothing of the prompt or of the answer is in there" in seen
    until(lambda: not left_running(demo_stage.LOG), 10, "the last process is gone")
    assert str(demo_gateway.GATEWAY[1]) not in {
        part for process in psutil.process_iter() for part in command_line(process)
    }
