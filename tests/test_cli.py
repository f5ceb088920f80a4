"""`python client.py` as people and scripts meet it: transcripts, exit codes, Ctrl-C, keys."""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import commands_parser
import doctor
import errors
from commands_screen import printable
from keys import Key, generate_key
from local_runpod_queue import Status
from tests.cli import Done, Terminal, run, run_apart, start
from tests.echo import Echo
from tests.wait import until


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Echo]:
    with Echo(tmp_path_factory.mktemp("echo")) as running:
        yield running


# -- answers ---------------------------------------------------------------------------------------


def test_a_prompt_is_answered(echo: Echo) -> None:
    for do in (run, run_apart):
        assert do(echo.environ, "why is the sky blue?") == Done(0, "why is the sky blue?\n", "")


@pytest.mark.parametrize(
    ("args", "stdin", "out"),
    [
        (["-s", "be brief", "hello"], None, "be brief / hello\n"),
        (["--no-stream", "hello"], None, "hello\n"),
        ([], "from a pipe\n", "from a pipe\n"),
        (["about this:"], "from a pipe\n", "about this:\n\nfrom a pipe\n"),
        (["ask", "health"], None, "health\n"),
        (["-o", "n", "2", "x"], None, "x\n\n--- choice 1 ---\nx\n"),
        (["-o", "behaviour", "everything", "x"], None, 'x\n[tool call] look({"at":"sky"})\n'),
    ],
)
def test_prompts_and_options(echo: Echo, args: list[str], stdin: str | None, out: str) -> None:
    assert run(echo.environ, *args, stdin=stdin) == Done(0, out, "")


def test_values_of_options_are_json_or_text() -> None:
    pairs = [("a", "0.2"), ("b", "END"), ("c", '["x"]'), ("d", "true"), ("e", '"1"')]
    assert commands_parser.read_sampling(pairs) == {
        "a": 0.2,
        "b": "END",
        "c": ["x"],
        "d": True,
        "e": "1",
    }


def test_json_is_one_object_of_the_whole_answer(echo: Echo) -> None:
    done = run(echo.environ, "--json", "-o", "behaviour", "everything", "ünï \x1b")
    assert done.code == 0 and done.err == ""
    answer = json.loads(done.out)
    assert answer["text"] == "ünï \x1b"
    assert answer["choices"][0]["reasoning"] == "hmm, yes"
    assert answer["usage"]["total_tokens"] == 3
    assert len(answer["request_id"]) == 32
    assert done.out.isascii() and "\x1b" not in done.out


def test_usage_goes_to_stderr(echo: Echo) -> None:
    done = run(echo.environ, "-u", "one two")
    assert done.out == "one two\n"
    assert done.err == (
        f"1 tokens in, 2 out; queue 1 ms, first 2 ms, total 3 ms; job {echo.last_job().id}\n"
    )


def test_text_appears_while_it_is_written(echo: Echo) -> None:
    with start(echo.environ, "-o", "behaviour", "hang", "one two three four") as process:
        assert process.stdout
        text = ""
        # Would wait for ever if the text came with its end.
        while text != "one two three":
            text += process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)


def test_routes_can_be_called(echo: Echo, tmp_path: Path) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "a b"}]})
    assert run(echo.environ, "request", "/v1/chat/completions", "--body", body) == Done(
        0, '{"echo": "a b"}\n', ""
    )
    file = tmp_path / "body.json"
    file.write_text(body[:-1] + ', "stream": true}')
    done = run(echo.environ, "request", "/v1/chat/completions", "--body", f"@{file}")
    assert done.code == 0
    assert done.out.endswith("data: [DONE]\n\n") and done.out.count("data: ") == 3
    missing = run(echo.environ, "request", "/v1/nowhere")
    assert (missing.code, missing.out) == (4, "")
    assert "no such route" in missing.err


def test_health_status_cancel(echo: Echo) -> None:
    environ = {name: value for name, value in echo.environ.items() if name != "ENCRYPTION_KEY"}
    health = run(environ, "health")
    assert json.loads(health.out)["workers"]["ready"] == 1
    run(echo.environ, "x")
    job_id = echo.last_job().id
    echo.until_completed(job_id)
    status = json.loads(run(environ, "status", job_id).out)
    assert status["status"] == "COMPLETED"
    assert "output" not in status  # ciphertext, which no person reads
    assert json.loads(run(environ, "cancel", job_id).out)["id"] == job_id
    unknown = run(environ, "status", "nope")
    assert (unknown.code, unknown.out) == (13, "")


@pytest.mark.parametrize("args", [["serv"], ["serv", "--port", "1"], ["SERVE"]])
def test_a_slip_is_no_prompt(echo: Echo, args: list[str]) -> None:
    before = len(echo.platform.jobs)
    slip = run(echo.environ, *args)
    assert (slip.code, slip.out) == (2, "")
    assert "'serve' meant" in slip.err
    assert len(echo.platform.jobs) == before
    assert run(echo.environ, "ask", args[0]).out == f"{args[0]}\n"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["what", "is", "this"], "put a prompt of several words in quotes"),
        (["--timeout", "soon", "x"], "soon is not a positive number of seconds"),
    ],
)
def test_what_was_typed_wrong_is_told(args: list[str], told: str) -> None:
    done = run({}, *args)
    assert done.code == 2
    assert told in done.err


def test_what_is_no_text_is_told(echo: Echo) -> None:
    process = start({**echo.environ, "PYTHONIOENCODING": "utf-8:strict"}, stdin=subprocess.PIPE)
    assert process.stdin
    os.write(process.stdin.fileno(), b"\xff\xfe")
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert err.endswith("what stands on stdin is no text in this terminal's encoding\n")


def test_a_setting_that_is_nearly_named_is_told(echo: Echo) -> None:
    environ = {**echo.environ, "CLIENT_TIMEOUT": "1", "CLIENT_ID": "another program's"}
    done = run(environ, "x")
    assert done.code == 3
    assert "CLIENT_TIMEOUT is no setting; is CLIENT_TIMEOUT_S meant?" in done.err
    assert "CLIENT_ID" not in done.err


def test_keygen() -> None:
    done = run({}, "keygen")
    assert done.code == 0
    assert f"key id {Key.parse(done.out).id}" in done.err


# -- failures --------------------------------------------------------------------------------------


def test_every_kind_of_error_has_its_exit_code(echo: Echo) -> None:
    good = echo.environ
    cases: list[tuple[int, Mapping[str, str], list[str]]] = [
        (2, good, ["--no-such-flag", "x"]),
        (2, good, []),
        (2, good, ["--timeout", "soon", "x"]),
        (3, {"PATH": good["PATH"]}, ["x"]),
        (4, good, ["-o", "behaviour", "too long", "x"]),
        (5, {**good, "ENCRYPTION_KEY": generate_key()}, ["x"]),
        (6, good, ["-o", "behaviour", "plaintext", "a b c d"]),
        (9, good, ["-o", "behaviour", "no end", "x"]),
        (11, {**good, "RUNPOD_API_BASE": "http://127.0.0.1:9"}, ["x"]),
        (12, {**good, "RUNPOD_API_KEY": "wrong"}, ["x"]),
        (13, good, ["--endpoint", "elsewhere", "x"]),
        (17, good, ["-o", "behaviour", "fail", "a b c d"]),
        (18, good, ["-o", "behaviour", "hang", "--timeout", "0.5", "a b c d"]),
    ]
    for code, environ, args in cases:
        done = run(environ, *args)
        assert done.code == code, (args, done)
        assert done.err
    assert run_apart({}, "x").code == 3


def test_exit_codes_are_documented() -> None:
    told = run({}, "--help").out
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.SealedError):
            assert re.search(rf"^ +{kind.exit_code}  ", told, re.MULTILINE), kind
    for code in (0, 2, 130, 141):
        assert re.search(rf"^ +{code}  ", told, re.MULTILINE)
    assert run({}, "chat", "--help").out.endswith(told[told.index("exit codes:") :])


def test_kinds_of_failure_do_not_share_a_code() -> None:
    shared = {"EngineDead", "TamperedChunk"}  # not told apart from their parents
    kinds = [
        kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type)
        and issubclass(kind, errors.SealedError)
        and not issubclass(kind, errors.ModelError)
        and name not in shared
    ]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes) > 15
    assert commands_parser.USAGE_CODE not in codes


def test_half_an_answer_ends_its_line_and_tells_the_error(echo: Echo) -> None:
    done = run(echo.environ, "-o", "behaviour", "no end", "one two")
    assert done.out == "one two"
    assert done.err.startswith("error: the job ended without the authenticated end")


def test_all_faults_of_the_settings_are_told(echo: Echo) -> None:
    done = run({"PATH": echo.environ["PATH"]}, "x")
    assert done.err.count("\n- ") == 3
    for name in ("RUNPOD_ENDPOINT_ID", "RUNPOD_API_KEY", "ENCRYPTION_KEY"):
        assert f"- {name} is not set" in done.err


def test_keys_come_from_files_of_their_owner_alone(echo: Echo, tmp_path: Path) -> None:
    environ = dict(echo.environ)
    args = []
    for flag, name in (("--key-file", "ENCRYPTION_KEY"), ("--api-key-file", "RUNPOD_API_KEY")):
        file = tmp_path / name
        file.write_text(environ.pop(name) + "\n")
        file.chmod(0o600)
        args += [flag, str(file)]
    assert run(environ, *args, "hello").out == "hello\n"
    # A file given by hand wins over what the environment holds.
    assert run({**environ, "RUNPOD_API_KEY": "wrong"}, *args, "hello").out == "hello\n"
    (tmp_path / "ENCRYPTION_KEY").chmod(0o644)
    refused = run(environ, *args, "hello")
    assert refused.code == 3
    assert f"run: chmod 600 {tmp_path}/ENCRYPTION_KEY" in refused.err


def test_there_are_no_flags_for_keys() -> None:
    flags = set(re.findall(r"--[a-z-]+", run({}, "ask", "--help").out))
    assert {flag for flag in flags if "key" in flag} == {"--key-file", "--api-key-file"}


# -- Ctrl-C ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("more", [[], ["--no-stream"]])
def test_an_interrupt_cancels_the_job(echo: Echo, number: int, more: list[str]) -> None:
    seen = len(echo.noted("hanging"))
    process = start(echo.environ, *more, "-o", "behaviour", "hang", "one two three four")
    job_id = until(lambda: echo.noted("hanging")[seen:], 20)[0]
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "interrupted\n"
    echo.until_cancelled(job_id)


def test_an_end_in_a_scripts_background_cancels_the_job(echo: Echo) -> None:
    seen = len(echo.noted("hanging"))
    # A shell has its background ignore interrupts, and nohup hang-ups.
    ignored = (signal.SIGINT, signal.SIGHUP)
    handlers = [signal.signal(number, signal.SIG_IGN) for number in ignored]
    try:
        process = start(echo.environ, "-o", "behaviour", "hang", "one two three four")
    finally:
        for number, handler in zip(ignored, handlers, strict=True):
            signal.signal(number, handler)
    job_id = until(lambda: echo.noted("hanging")[seen:], 20)[0]
    for number in (*ignored, signal.SIGTERM):
        assert process.poll() is None
        process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "interrupted\n"
    echo.until_cancelled(job_id)


def test_an_interrupt_while_the_job_is_submitted_cancels_it(echo: Echo) -> None:
    with echo.fault("run", when="after", delay_s=1.0):
        seen = len(echo.platform.jobs)
        process = start(echo.environ, "-o", "behaviour", "hang", "one two three four")
        until(lambda: len(echo.platform.jobs) > seen, 20)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 130
    echo.until_cancelled(echo.last_job().id, worker_too=False)


def test_a_reader_that_goes_away_cancels_the_job(echo: Echo) -> None:
    words = " ".join(str(n) for n in range(500))
    process = start(echo.environ, "-o", "pause_s", "0.05", words)
    assert process.stdout and process.stderr
    assert process.stdout.read(1) == "0"
    process.stdout.close()
    assert process.wait(20) == 141
    with process.stderr as stderr:
        assert stderr.read() == ""
    assert echo.last_job().status is Status.CANCELLED


# -- terminals -------------------------------------------------------------------------------------


def test_control_characters_are_shown_not_obeyed() -> None:
    assert printable("a\tb\n") == "a\tb\n"
    assert printable("\x1b]0;x\x07\r\x7f\x9b") == "␛]0;x␇␍␡\ufffd"
    assert not any(
        printable(chr(n)) == chr(n) for n in [*range(9), *range(11, 32), *range(127, 160)]
    )


def test_a_terminal_is_safe_from_the_model_and_a_pipe_gets_every_byte(echo: Echo) -> None:
    evil = "red \x1b[31m bell \x07 end"
    assert run(echo.environ, evil).out == evil + "\n"
    terminal = Terminal(echo.environ, evil)
    terminal.until("end")
    assert terminal.end() == 0
    assert "red ␛[31m bell ␇ end" in terminal.shown
    assert "\x1b[31m" not in terminal.shown and "\x07" not in terminal.shown


def test_a_terminal_shows_the_queue(tmp_path: Path) -> None:
    with Echo(tmp_path, workers=0) as echo:
        terminal = Terminal(echo.environ, "--wait", "2.5", "hello")
        # Told while the platform holds the read for 10 s.
        terminal.until("queued 2 s, no worker idle")
        assert terminal.end() == 16
        assert "no worker took the job within 2.5 s" in terminal.shown
        verbose = run(echo.environ, "-v", "--wait", "0.5", "hello")
        assert verbose.code == 16
        quiet = run(echo.environ, "--wait", "0.5", "hello")
        assert quiet.err.count("\n") == 1


def test_the_wait_is_shown_in_the_words_of_the_worker(echo: Echo) -> None:
    words = ["-o", "notes", json.dumps(["loading model b \x1b[31m"]), "-o", "pause_s", "0.2"]
    done = run(echo.environ, "-v", "hello", *words)
    assert (done.code, done.out) == (0, "hello\n")
    assert "running: loading model b ␛[31m\n" in done.err


def test_a_conversation_in_a_terminal(echo: Echo, tmp_path: Path) -> None:
    environ = {**echo.environ, "HOME": str(tmp_path)}
    terminal = Terminal(environ, "chat")
    terminal.until("> ")
    terminal.type("first\n")
    terminal.until("first\r\n> ")
    terminal.type("second\n")
    # The echo says everything that was sent: the first turn and its answer are part of it.
    terminal.until("first / first / second")
    terminal.type("/clear\n")
    terminal.until("forgotten")
    terminal.type("third\n")
    terminal.until("third\r\n> ")
    terminal.type("/what\n")
    terminal.until("unknown command /what")
    terminal.type("/exit\n")
    assert terminal.end() == 0
    assert "\x1b[31m" not in terminal.shown
    assert list(tmp_path.iterdir()) == [], "nothing that was said is kept"


def test_ctrl_c_in_a_conversation_stops_the_answer_and_goes_on(echo: Echo) -> None:
    seen = len(echo.noted("hanging"))
    terminal = Terminal(echo.environ, "chat", "-o", "behaviour", "hang")
    terminal.until("> ")
    terminal.type("one two three four\n")
    job_id = until(lambda: echo.noted("hanging")[seen:], 20)[0]
    terminal.process.send_signal(signal.SIGINT)
    terminal.until("stopped; the job was cancelled")
    echo.until_cancelled(job_id)
    terminal.type("short\n")
    terminal.until("short\r\n> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_a_conversation_from_a_pipe(echo: Echo) -> None:
    assert run(echo.environ, "chat", stdin="a\nb\n/clear\nc\n").out == "a\na / a / b\nc\n"
    assert run(echo.environ, "chat", stdin="/etc/passwd ?\n").out == "/etc/passwd ?\n"


# -- doctor ----------------------------------------------------------------------------------------


def verdicts(done: Done) -> dict[str, str]:
    rows = [line for line in done.out.splitlines() if line[:1].strip()]
    return {line[6:].split(": ")[0]: line[:4].strip() for line in rows}


@pytest.mark.parametrize(
    ("transport", "told"), [("run", "by /run and /stream"), ("openai", "by its OpenAI route")]
)
def test_doctor_finds_everything_in_order(echo: Echo, transport: str, told: str) -> None:
    done = run({**echo.environ, "CLIENT_TRANSPORT": transport}, "doctor")
    assert told in done.out
    assert done.code == 0, done.out
    assert verdicts(done) == dict.fromkeys(
        [
            "settings",
            "encryption key",
            "platform",
            "endpoint",
            "clock, by the platform",
            "worker",
            "worker's versions",
            "worker's models",
            "clock, by the worker",
            "this side",
        ],
        "ok",
    ) | {"public-key mode": "note"}
    assert "off; whoever gets the encryption key can read what was recorded" in done.out
    assert f"key id {Key.parse(echo.key).id}" in done.out
    assert echo.key not in done.out and echo.platform.api_key not in done.out


def test_doctor_names_what_is_wrong_and_what_to_do(echo: Echo) -> None:
    good = echo.environ
    wrong_key = run({**good, "ENCRYPTION_KEY": generate_key()}, "doctor")
    assert wrong_key.code == 5 and verdicts(wrong_key)["worker"] == "FAIL"
    assert "→ The worker has another encryption key" in wrong_key.out
    broken_key = run({**good, "ENCRYPTION_KEY": "abc"}, "doctor")
    assert broken_key.code == 3 and verdicts(broken_key)["encryption key"] == "FAIL"
    assert verdicts(broken_key)["platform"] == "ok" and verdicts(broken_key)["worker"] == "skip"
    assert "keygen" in broken_key.out
    wrong_api_key = run({**good, "RUNPOD_API_KEY": "x"}, "doctor")
    assert wrong_api_key.code == 12 and verdicts(wrong_api_key)["platform"] == "FAIL"
    nothing = run({}, "doctor")
    assert nothing.code == 3 and nothing.out.count("FAIL") == 3
    assert (
        "note  public-key mode: off"
        in run(
            {name: value for name, value in good.items() if name != "ENCRYPTION_KEY"}, "doctor"
        ).out
    )
    asleep = run(good, "doctor", "--no-worker")
    assert asleep.code == 0 and verdicts(asleep)["worker"] == "skip"


def test_doctor_tells_until_when_a_key_is_good(echo: Echo) -> None:
    environ = {**echo.environ, "ENCRYPTION_KEY": f"laptop={echo.key};not_after=2099-12-31"}
    done = run(environ, "doctor", "--no-worker")
    assert "named laptop, good until 2100-01-01 00:00 UTC\n" in done.out


def test_doctor_warns_of_an_api_key_that_travels_in_the_clear(echo: Echo) -> None:
    assert "WARN" not in run(echo.environ, "doctor", "--no-worker").out
    # Linux takes 0.0.0.0 for this machine; by its form it is no loopback.
    base = echo.platform.base_url.replace("127.0.0.1", "0.0.0.0")
    done = run({**echo.environ, "RUNPOD_API_BASE": base}, "doctor", "--no-worker")
    assert done.code == 0
    assert "WARN  platform: RUNPOD_API_BASE begins with http://" in done.out
    public = run({**echo.environ, "RUNPOD_API_BASE": "http://example.com/v2"}, "doctor")
    assert public.code == 3 and verdicts(public) == {"settings": "FAIL"}


def test_doctor_sees_a_wrong_clock(tmp_path: Path) -> None:
    with Echo(tmp_path, clock_s=-600) as echo:
        done = run(echo.environ, "doctor")
    assert done.code == 4 and verdicts(done)["worker"] == "FAIL"
    assert "→ set this machine's clock: it is ahead of the worker's" in done.out


@pytest.mark.parametrize(
    ("offset_s", "uncertain_s", "verdict", "told"),
    [
        (0.2, 1.0, "ok", "right"),
        (20.0, 1.0, "ok", "20 s ahead"),
        (-45.0, 1.0, "FAIL", "45 s behind"),
        (45.0, 1.0, "FAIL", "45 s ahead"),
    ],
)
def test_doctor_judges_clocks(offset_s: float, uncertain_s: float, verdict: str, told: str) -> None:
    findings: list[doctor.Finding] = []
    doctor._clock(doctor._Patient(findings.append), "clock", offset_s, uncertain_s)
    assert findings[0].verdict == verdict
    assert findings[0].told.startswith(told)
