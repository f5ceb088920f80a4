"""The gateway's page in a real Chromium: the real gateway, the local platform, echo workers.

Every visit ends with two checks: the page asked nobody but its own gateway, and the
browser's console holds no error, which is where it tells violations of the policy.
Pictures of the page are left in screenshots/ for people to look at.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Error,
    Locator,
    Page,
    Request,
    Route,
    expect,
    sync_playwright,
)

import gateway
import gateway_page
from local_runpod_queue import Status
from tests.echo import Echo
from tests.gateways import RunningGateway
from tests.wait import until

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "screenshots"
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
CHAT = "**/v1/chat/completions"
SECRET = "marzipan"
"""A word that only the person and the worker may see."""

# The page asks every 5 s, and the gateway's answer may be some seconds old.
expect.set_options(timeout=20_000)


def chromium() -> str:
    """Return the path of the browser; without one the tests fail and say what to do."""
    found = subprocess.run([ROOT / "tools" / "setup_browser.sh"], capture_output=True, text=True)
    if found.returncode:
        pytest.fail(found.stderr, pytrace=False)
    return found.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Echo]:
    """An endpoint with one worker that is awake."""
    with Echo(tmp_path_factory.mktemp("page")) as echo:
        yield echo


@pytest.fixture(scope="module")
def serving(echo: Echo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with RunningGateway(echo.environ, tmp_path_factory.mktemp("gateway")) as serving:
        yield serving


def posted(request: Request) -> dict[str, Any]:
    """Return the JSON object that a request carries."""
    body = json.loads(request.post_data or "null")
    assert isinstance(body, dict)
    return body


class Visit:
    """A person's tab at a gateway, and all that happened in it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        page.set_default_timeout(20_000)
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(url)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def by_id(self, name: str) -> Locator:
        return self.page.locator(f"#{name}")

    @property
    def message(self) -> Locator:
        return self.page.get_by_role("textbox", name="Message")

    @property
    def log(self) -> Locator:
        return self.page.get_by_role("region", name="Conversation")

    def say(self, text: str) -> None:
        """Send a message, and note the body of the request."""
        self.message.fill(text)
        with self.page.expect_request(CHAT) as asked:
            self.message.press("Enter")
        self.bodies.append(posted(asked.value))

    def until_answered(self, count: int = 1) -> None:
        expect(self.log.get_by_text("in all")).to_have_count(count, timeout=30_000)

    def leave(self, *, expected: str = "") -> None:
        """Close the tab; what it asked and said is held against it, but for errors `expected`."""
        assert not expected or any(re.search(expected, error) for error in self.errors)
        stray = [url for url in self.asked if not url.startswith((f"{self.url}/", "data:"))]
        errors = [each for each in self.errors if not (expected and re.search(expected, each))]
        self.page.context.close()
        assert not stray
        assert not errors


Open = Callable[..., Visit]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Open a tab at a gateway; `expected` are the errors that its console may hold."""
    visits: list[tuple[Visit, str]] = []

    def open_tab(serving: RunningGateway, *, expected: str = "", **options: Any) -> Visit:
        context = browser.new_context(**options)
        visits.append((Visit(context.new_page(), serving.url), expected))
        return visits[-1][0]

    yield open_tab
    for each, expected in visits:
        each.leave(expected=expected)


def test_it_shows_the_endpoint_and_who_is_awake(
    visit: Open, serving: RunningGateway, echo: Echo
) -> None:
    tab = visit(serving)
    expect(tab.by_id("state")).to_have_text("Awake")
    expect(tab.by_id("base-url")).to_have_text(f"{serving.url}/v1")
    expect(tab.by_id("endpoint")).to_have_text(echo.platform.endpoint_id)
    expect(tab.by_id("key-id")).to_have_text(re.compile(r"[0-9a-f]{16}"))
    expect(tab.by_id("models")).to_have_text("echo")
    expect(tab.by_id("worker")).to_have_text("echo")
    expect(tab.by_id("gateway")).to_have_text(gateway.VERSION)
    expect(tab.by_id("idle")).to_have_text("1")
    expect(tab.by_id("queued")).to_have_text("0")
    expect(tab.page.get_by_role("combobox", name="Model")).to_have_value("echo")
    assert serving.http.get("/api/status").json()["key_id"] == tab.by_id("key-id").text_content()


def test_a_chat_passes_sealed_and_its_text_is_only_text(
    visit: Open, serving: RunningGateway, echo: Echo
) -> None:
    tab = visit(serving)
    tab.say(f"{SECRET} <b>not bold</b> <img src=x onerror=alert(1)>")
    tab.until_answered()
    answer = tab.log.locator(".answer")
    expect(answer).to_have_text(f"{SECRET} <b>not bold</b> <img src=x onerror=alert(1)>")
    assert tab.log.locator("b, img, script").count() == 0
    assert SECRET.encode() not in echo.carried

    tab.say("and then?")
    tab.until_answered(2)
    assert [each["role"] for each in tab.bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert SECRET in tab.bodies[1]["messages"][1]["content"]
    assert tab.bodies[1]["stream"] is True
    assert tab.bodies[1]["model"] == "echo"

    row = tab.page.locator("#request-rows tr").first
    expect(row.locator(".route")).to_have_text("/v1/chat/completions")
    expect(row.locator(".status")).to_have_text("200")
    assert SECRET not in str(tab.page.locator("#requests").text_content())


def test_nothing_of_a_conversation_is_kept(visit: Open, serving: RunningGateway) -> None:
    tab = visit(serving)
    tab.say(SECRET)
    tab.until_answered()
    tab.message.fill(SECRET)
    assert tab.page.evaluate("[{...localStorage}, {...sessionStorage}]") == [{}, {}]
    assert tab.page.context.cookies() == []
    assert tab.page.evaluate("indexedDB.databases()") == []
    tab.page.get_by_role("button", name="Clear").click()
    expect(tab.log).not_to_contain_text(SECRET)
    tab.say("again")
    assert SECRET not in json.dumps(tab.bodies[-1])
    tab.until_answered()
    tab.page.reload()
    expect(tab.by_id("state")).to_have_text("Awake")
    expect(tab.log.locator(".said")).to_have_count(0)
    expect(tab.message).to_have_value("")


def hang(route: Route) -> None:
    """Let the worker say its words and then nothing more."""
    body = {**posted(route.request), "behaviour": "hang"}
    route.continue_(post_data=json.dumps(body))


@pytest.mark.parametrize("how", ["button", "Escape", "tab closed"])
def test_stopping_cancels_the_job(
    visit: Open, serving: RunningGateway, echo: Echo, how: str
) -> None:
    tab = visit(serving)
    tab.page.route(CHAT, hang)
    tab.say("one two three")
    # The words are there although the answer has no end: it streams.
    expect(tab.log.locator(".answer")).to_have_text("one two three")
    job = echo.last_job()
    echo.until_hanging(job.id)
    expect(tab.page.get_by_role("button", name="Send")).to_be_hidden()
    if how == "button":
        tab.page.get_by_role("button", name="Stop").click()
    elif how == "Escape":
        tab.page.keyboard.press("Escape")
    else:
        tab.page.close()
    echo.until_cancelled(job.id)
    if how != "tab closed":
        expect(tab.log.get_by_text("Stopped after")).to_be_visible()
        expect(tab.message).to_be_focused()
        expect(tab.page.get_by_role("button", name="Stop")).to_be_hidden()


def test_the_first_message_wakes_a_worker(visit: Open, tmp_path: Path) -> None:
    with (
        Echo(tmp_path, workers=0) as echo,
        RunningGateway(echo.environ, tmp_path / "gateway") as serving,
    ):
        tab = visit(serving)
        expect(tab.by_id("state")).to_have_text("Asleep")
        expect(tab.log).to_contain_text("Your first message wakes one")
        # Nobody was there yet to tell the models: the worker chooses.
        expect(tab.page.get_by_role("combobox", name="Model")).to_be_disabled()
        tab.say("first")
        expect(tab.log.get_by_text("Waiting for a worker")).to_be_visible()
        expect(tab.log.locator(".clock")).to_have_text(re.compile("0:0[1-9]"))
        assert "model" not in tab.bodies[0]
        tab.page.get_by_role("button", name="Stop").click()
        until(lambda: echo.last_job().status is Status.CANCELLED, 10, "cancelled in the queue")

        tab.say("good morning")
        expect(tab.log.get_by_text("Waiting for a worker")).to_be_visible()
        expect(tab.by_id("queued")).to_have_text("1")
        echo.start("pod-1")
        tab.until_answered()
        expect(tab.log.locator(".answer").last).to_have_text("good morning")
        expect(tab.by_id("state")).to_have_text("Awake")
        expect(tab.by_id("models")).to_have_text("echo")
        expect(tab.page.get_by_role("combobox", name="Model")).to_be_enabled()


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\r\n\r\n"


WORD = event({"choices": [{"index": 0, "delta": {"content": "half an"}}]})


@pytest.mark.parametrize(
    ("body", "told"),
    [
        pytest.param(
            WORD + event({"error": {"message": "the GPU is on fire", "code": "job_failed"}}),
            "the GPU is on fire",
            id="error event",
        ),
        pytest.param(WORD, "its end never came", id="no end"),
        pytest.param(WORD + "data: {oops\n\n", "not an answer", id="not JSON"),
    ],
)
def test_an_answer_that_fails_half_way_says_so_and_can_be_asked_again(
    visit: Open, serving: RunningGateway, body: str, told: str
) -> None:
    tab = visit(serving)
    tab.page.route(CHAT, lambda route: route.fulfill(body=": still here\n\n" + body), times=1)
    tab.say("a question")
    expect(tab.log.locator(".answer")).to_have_text("half an")
    expect(tab.log.get_by_role("alert")).to_contain_text(told)
    tab.page.get_by_role("button", name="Try again").click()
    tab.until_answered()
    expect(tab.log.locator(".answer")).to_have_text("a question")
    expect(tab.log.locator(".said")).to_have_count(1)


def test_an_answer_that_failed_is_not_told_to_the_model(
    visit: Open, serving: RunningGateway
) -> None:
    tab = visit(serving)
    tab.page.route(CHAT, lambda route: route.fulfill(body=WORD), times=1)
    tab.say("a question")
    expect(tab.log.get_by_role("alert")).to_be_visible()
    tab.say("another")
    assert tab.bodies[-1]["messages"] == [{"role": "user", "content": "another"}]
    tab.until_answered()


def test_reasoning_stands_apart_and_is_not_sent_back(visit: Open, serving: RunningGateway) -> None:
    thinking = [
        event({"choices": [{"index": 0, "delta": {name: text}}]})
        for name, text in (("reasoning", "Hmm, "), ("reasoning", "yes."), ("content", "Blue."))
    ]
    tab = visit(serving)
    tab.page.route(
        CHAT,
        lambda route: route.fulfill(body="".join(thinking) + "data: [DONE]\n\n"),
        times=1,
    )
    tab.say("Why?")
    expect(tab.log.locator(".answer")).to_have_text("Blue.")
    tab.log.get_by_text("Reasoning").click()
    expect(tab.log.locator(".thought")).to_have_text("Hmm, yes.")
    tab.until_answered()
    tab.say("Really?")
    assert tab.bodies[-1]["messages"][1] == {"role": "assistant", "content": "Blue."}
    tab.until_answered(2)


def test_a_gateway_with_a_key_asks_for_it(visit: Open, echo: Echo, tmp_path: Path) -> None:
    with RunningGateway(echo.environ, tmp_path, GATEWAY_KEY="open-sesame!") as on:
        tab = visit(on, expected="401")
        expect(tab.by_id("state")).to_have_text("Locked")
        expect(tab.message).to_be_hidden()
        field = tab.page.get_by_role("textbox", name="Local key")
        field.fill("wrong")
        field.press("Enter")
        expect(tab.by_id("key-fault")).to_have_text("The gateway refused this key.")
        expect(field).to_have_value("")
        field.fill("open-sesame!")
        tab.page.get_by_role("button", name="Unlock").click()
        expect(tab.by_id("state")).to_have_text("Awake")
        expect(field).to_be_hidden()
        tab.say("hello there")
        tab.until_answered()
        assert tab.page.evaluate("Object.values(localStorage)") == []
        assert tab.page.evaluate("Object.values(sessionStorage)") == ["open-sesame!"]
        assert not [url for url in tab.asked if "sesame" in url]
        tab.page.reload()
        expect(tab.by_id("state")).to_have_text("Awake")
        tab.page.get_by_role("button", name="Forget the local key").click()
        expect(tab.by_id("state")).to_have_text("Locked")
        assert tab.page.evaluate("Object.values(sessionStorage)") == []


def test_it_says_when_the_gateway_or_the_endpoint_is_gone(
    visit: Open, echo: Echo, tmp_path: Path
) -> None:
    environ = {**echo.environ, "RUNPOD_API_BASE": "http://127.0.0.1:9/v2"}
    with RunningGateway(environ, tmp_path) as on:
        tab = visit(on, expected="ERR_CONNECTION_REFUSED|ERR_EMPTY_RESPONSE|503|502")
        expect(tab.by_id("state")).to_have_text("Endpoint unreachable")
        expect(tab.by_id("notice")).to_contain_text("The endpoint cannot be reached")
        tab.say("anybody?")
        expect(tab.log.get_by_role("alert")).to_be_visible()
        on.stop()
        expect(tab.by_id("state")).to_have_text("Gateway unreachable")
        expect(tab.by_id("notice")).to_contain_text("The gateway does not answer")
        tab.say("and now?")
        expect(tab.log.get_by_role("alert").last).to_contain_text("The gateway does not answer")


def test_the_keyboard_writes_lines_and_sends(visit: Open, serving: RunningGateway) -> None:
    tab = visit(serving)
    expect(tab.page.get_by_role("button", name="Send")).to_be_disabled()
    tab.message.press_sequentially("one")
    tab.message.press("Shift+Enter")
    tab.message.press_sequentially("two")
    expect(tab.message).to_have_value("one\ntwo")
    with tab.page.expect_request(CHAT) as asked:
        tab.message.press("Enter")
    assert posted(asked.value)["messages"][0]["content"] == "one\ntwo"
    expect(tab.message).to_have_value("")
    tab.until_answered()


def test_the_base_url_can_be_copied(visit: Open, serving: RunningGateway) -> None:
    tab = visit(serving, permissions=["clipboard-read", "clipboard-write"])
    expect(tab.by_id("state")).to_have_text("Awake")
    tab.page.get_by_role("button", name="Copy").click()
    expect(tab.page.get_by_role("button", name="Copied")).to_be_visible()
    assert tab.page.evaluate("navigator.clipboard.readText()") == f"{serving.url}/v1"


def test_the_policy_stops_what_the_page_never_does(visit: Open, serving: RunningGateway) -> None:
    tab = visit(serving, expected="Content Security Policy|TrustedHTML|TrustedScript")
    with pytest.raises(Error, match="TrustedHTML"):
        tab.page.evaluate("document.body.innerHTML = '<b>x</b>'")
    tab.page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.append("globalThis.ran = true");
            document.body.append(script);
        }"""
    )
    assert tab.page.evaluate("globalThis.ran") is None
    with pytest.raises(Error, match="Failed to fetch"):
        tab.page.evaluate("fetch('http://127.0.0.2:9/')")
    assert [error for error in tab.errors if "connect-src" in error]
    # The browser tells the tab's recorder of a request that it then does not make.
    tab.asked.clear()


def test_every_control_has_a_name_and_every_id_is_its_own(
    visit: Open, serving: RunningGateway
) -> None:
    tab = visit(serving)
    expect(tab.by_id("state")).to_have_text("Awake")
    unnamed = tab.page.evaluate(
        """() => {
            const named = (each) => each.labels?.length || each.textContent.trim()
                && !each.matches("input, select, textarea");
            return [...document.querySelectorAll("button, input, select, textarea")]
                .filter((each) => !named(each)).map((each) => each.outerHTML);
        }"""
    )
    assert unnamed == []
    twice = tab.page.evaluate(
        """() => {
            const ids = [...document.querySelectorAll("[id]")].map((each) => each.id);
            return ids.filter((id, index) => ids.indexOf(id) !== index);
        }"""
    )
    assert twice == []
    dangling = tab.page.evaluate(
        """() => [...document.querySelectorAll("[aria-labelledby], [aria-describedby], [for]")]
            .flatMap((each) => ["aria-labelledby", "aria-describedby", "for"]
                .flatMap((name) => (each.getAttribute(name) ?? "").split(" ")))
            .filter((id) => id && !document.getElementById(id))"""
    )
    assert dangling == []
    assert tab.page.evaluate("document.documentElement.lang") == "en"
    assert tab.page.get_by_role("heading", level=1).count() == 1


def test_the_keyboard_reaches_every_control_and_shows_where_it_is(
    visit: Open, serving: RunningGateway
) -> None:
    tab = visit(serving)
    expect(tab.by_id("models")).to_have_text("echo")
    tab.message.fill("something")
    tab.page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(7):
        tab.page.keyboard.press("Tab")
        reached.append(
            tab.page.evaluate(
                "[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
            )
        )
    names = [name for name, _ in reached]
    assert set(names) >= {"base-url", "copy", "model", "log", "message", "send"}
    assert {style for _, style in reached if _} == {"solid"}


STYLE = (gateway_page.FOLDER / "page.css").read_text()


def palettes() -> list[dict[str, str]]:
    """Return the colours of both schemes by name."""
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    )
    return [light, dark]


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", palettes(), ids=["light", "dark"])
def test_texts_and_controls_stand_out_from_what_is_behind_them(palette: dict[str, str]) -> None:
    behind = ("ground", "panel", "sunken")
    pairs = [(text, ground, 4.5) for text in ("text", "muted") for ground in behind]
    pairs += [("text", "tint", 4.5), ("on-accent", "accent", 4.5), ("bad", "bad-tint", 4.5)]
    pairs += [(text, "panel", 4.5) for text in ("bad", "wait")] + [("bad", "ground", 4.5)]
    pairs += [(mark, "panel", 3) for mark in ("control", "accent")]
    pairs += [(dot, "ground", 3) for dot in ("good", "wait", "rest", "bad", "control")]
    faint = {
        (front, back): round(ratio, 2)
        for front, back, least in pairs
        if (ratio := contrast(palette[front], palette[back])) < least
    }
    assert not faint


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 360), ("dark", 360)]
)
def test_it_fits_and_can_be_looked_at(
    visit: Open, serving: RunningGateway, scheme: str, width: int
) -> None:
    tab = visit(
        serving, color_scheme=scheme, viewport={"width": width, "height": 800}, locale="en-GB"
    )
    expect(tab.by_id("models")).to_have_text("echo")
    tab.say("Why is the sky blue?")
    tab.until_answered()
    tab.say("a" * 300)
    tab.until_answered(2)
    expect(tab.page.locator("#request-rows tr").first).to_be_visible()
    PICTURES.mkdir(exist_ok=True)
    tab.page.screenshot(path=PICTURES / f"page-{scheme}-{width}.png", full_page=True)
    wide = tab.page.evaluate(
        """() => [document.documentElement, ...document.querySelectorAll("main *")]
            .filter((each) => getComputedStyle(each).display !== "inline")
            .filter((each) => each.scrollWidth > each.clientWidth + 1)
            .filter((each) => !each.closest(".visually-hidden, thead, #base-url"))
            .map((each) => each.outerHTML.slice(0, 80))"""
    )
    assert wide == []


def test_the_files_come_with_a_policy_and_are_not_sent_twice(serving: RunningGateway) -> None:
    for path in gateway_page.FILES:
        first = serving.http.get(path)
        assert first.status_code == 200
        policy = set(first.headers["content-security-policy"].split("; "))
        assert policy >= {"default-src 'none'", "script-src 'self'", "connect-src 'self'"}
        assert policy >= {"base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"}
        assert not [rule for rule in policy if "unsafe" in rule or "*" in rule or "http" in rule]
        assert first.headers["x-content-type-options"] == "nosniff"
        assert first.headers["referrer-policy"] == "no-referrer"
        etag = first.headers["etag"]
        for known in (etag, f'"other", W/{etag}', "*"):
            again = serving.http.get(path, headers={"If-None-Match": known})
            assert (again.status_code, again.content) == (304, b""), known
            assert again.headers["etag"] == etag
        changed = serving.http.get(path, headers={"If-None-Match": '"other"'})
        assert changed.content == first.content


def test_links_of_other_sites_lead_to_the_page_and_to_nothing_else(serving: RunningGateway) -> None:
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}
    assert serving.http.get("/", headers=followed).status_code == 200
    assert serving.http.get("/api/status", headers=followed).status_code == 403
    embedded = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "script"}
    assert serving.http.get("/page.js", headers=embedded).status_code == 403


def test_an_installed_package_holds_the_page(tmp_path: Path) -> None:
    source, installed = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(ROOT / "page", source / "page")
    for pattern in ("*.py", "pyproject.toml", "README.md", "LICENSE"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    subprocess.run(
        [sys.executable, "-c", build],
        cwd=source,
        env={"PATH": os.environ["PATH"]},
        check=True,
        capture_output=True,
    )
    (wheel,) = source.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(installed)
    code = "import gateway_page; print(gateway_page.FOLDER, len(gateway_page.routes()))"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=installed,
        env={"PATH": os.environ["PATH"]},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert printed.split() == [str(installed / "page"), "3"]


def test_a_missing_browser_fails_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMIUM", "no-such-browser")
    with pytest.raises(pytest.fail.Exception, match="CHROMIUM is no-such-browser"):
        chromium()
