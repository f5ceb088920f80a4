"""Keys of several clients: their options, their dates, what a refusal shows, and their limits.

What the real engine adds, the prefix cache and real usage, is in test_worker.py.
"""

import re
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_limits import ClientLimits, Place
from crypto import RequestOpener, new_request, seal_request
from errors import ConfigError, Rejected, RequestError
from key_terms import KeyTerms, parse_terms
from keys import Key, KeyRing, generate_key
from simple_form import open_simple

DAY = 86_400
NOVEMBER = 1_793_491_200
"""2026-11-01 00:00 UTC."""
KEY = generate_key()


# Options ----------------------------------------------------------------------------------


def terms(*options: str) -> KeyTerms:
    read, faults = parse_terms(options)
    assert not faults
    return read


def test_all_options() -> None:
    ring = KeyRing.parse(
        f"laptop={KEY};not_before=2026-11-01;not_after=2026-11-02;max_in_flight=4;\n"
        f"  max_tokens_per_minute=20000, server={generate_key()} ; revoked, {generate_key()}"
    )
    laptop, server, other = (key.terms for key in ring)
    assert laptop == KeyTerms(NOVEMBER, NOVEMBER + 2 * DAY, False, 4, 20_000)
    assert server == KeyTerms(revoked=True)
    assert other == KeyTerms()
    assert [key.name for key in ring] == ["laptop", "server", None]


def test_days_are_whole_and_times_have_a_zone() -> None:
    assert terms("not_after=2026-10-31").ends_at == NOVEMBER
    assert terms("not_after=2026-11-01T06:30Z").ends_at == NOVEMBER + 6.5 * 3600
    assert terms("not_before=2026-11-01T01:00:30+01:00").begins_at == NOVEMBER + 30
    one_day = terms("not_before=2026-11-01", "not_after=2026-11-01")
    good = [one_day.good_at(NOVEMBER + at) for at in (-0.1, 0, DAY - 0.1, DAY)]
    assert good == [False, True, True, False]


FAULTY = {
    "max_inflight=4": "number 1) that does not exist: did you mean max_in_flight",
    "Not-After=2027-01-01": "did you mean not_after",
    "max_in_flight": "max_in_flight without a value",
    "revoked=yes": "revoked with a value",
    "max_in_flight=0": "whole number from 1",
    "max_in_flight=1e3": "whole number from 1",
    "max_tokens_per_minute=9999999999": "to 999999999",
    "max_in_flight=४": "whole number",
    "not_after=tomorrow": "a day like 2027-01-31",
    "not_after=2027-02-30": "a day like 2027-01-31",
    "not_after=2027-01-01T12:00": "a time like 2027-01-31T18:00Z",
    "not_after=20270101": "a day like",
    "not_after=": "a day like",
    "": "there is a ; too many",
    "max_in_flight=1;max_in_flight=2": "max_in_flight twice",
    "not_before=2027-01-02;not_after=2027-01-01": "not before its not_after",
    KEY: "a comma, not a semicolon",
    f"server={KEY}": "a comma, not a semicolon",
    f"not_after={KEY}": "a day like",
    f"max_in_flight={KEY}": "whole number",
    f"revoked={KEY}": "revoked with a value",
}


@pytest.mark.parametrize("options", FAULTY, ids=list(FAULTY.values()))
def test_faulty_options_are_told_and_never_quoted(options: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KeyRing.parse(f"phone={generate_key()},laptop={generate_key()};{options}")
    (fault,) = caught.value.faults
    assert fault.startswith("encryption key 2 has ") and FAULTY[options] in fault
    shown = "".join(traceback.format_exception(caught.value))
    for start in range(0, 36):
        assert KEY[start : start + 8] not in shown


@given(st.lists(st.text(max_size=40), max_size=4))
def test_any_options_are_terms_or_faults(options: list[str]) -> None:
    read, faults = parse_terms(options)
    assert isinstance(read, KeyTerms)
    for fault in faults:
        assert fault.isascii()


def test_a_log_tells_each_key_and_no_secret() -> None:
    text = f"laptop={KEY};not_after=2026-10-31;max_in_flight=4"
    (key,) = KeyRing.parse(text)
    told = key.about(NOVEMBER)
    assert told == f"key {key.id} (laptop), ended 2026-11-01 00:00 UTC, max_in_flight 4"
    assert "good until 2026-11-01 00:00 UTC" in key.about(NOVEMBER - 1)


def test_a_client_takes_the_first_key_that_is_good() -> None:
    old, new = generate_key(), generate_key()
    ring = KeyRing.parse(f"laptop={old};not_after=2026-10-31,laptop={new};not_before=2026-10-25")
    days = [ring.current(NOVEMBER + days * DAY) is ring[0] for days in (-30, -3, 0, 30)]
    assert days == [True, True, False, False]
    with pytest.raises(ConfigError, match=r"no encryption key is good now: key .* \(laptop\), rev"):
        KeyRing.parse(f"laptop={old};revoked").current(NOVEMBER)
    with pytest.raises(ConfigError, match="ask whoever runs the endpoint for a new key, or"):
        KeyRing.parse(f"laptop={old};not_after=2026-10-01").current(NOVEMBER)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        (KEY[:-1], "copy it again, with its = at the end, or make one"),
        (KEY[:-2] + "=", "copy it again, with its = at the end, or make one"),
        (f"{KEY},", "encryption key 2 is empty; remove the comma too many"),
        ("", "the encryption key is empty; make one"),
    ],
    ids=range(4),  # keys differ from process to process
)
def test_a_key_that_was_copied_badly_is_not_answered_by_a_new_one(text: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KeyRing.parse(text)
    assert remedy in str(caught.value)
    assert KEY[:8] not in str(caught.value)


# Rejection --------------------------------------------------------------------------------

NOW = 1_790_000_000.0
UNUSABLE = ("revoked", "not_after=2020-01-01", "not_before=2099-01-01")


def opener(text: str) -> RequestOpener:
    return RequestOpener(KeyRing.parse(text), "endpoint", max_ttl_s=86_400, now=lambda: NOW)


def sealed(key: Key) -> str:
    request = new_request(
        "generate", b'{"prompt":"x"}', audience="endpoint", ttl_s=60, now=lambda: NOW
    )
    return seal_request(request, key)


def outcome(call: Callable[[], Any]) -> str:
    try:
        call()
    except Rejected as error:
        return f"{type(error).__name__}: {error}"
    return "opened"


@pytest.mark.claim(
    "clients.revoked",
    "A key that was revoked, has ended or is not good yet opens nothing, and nobody can tell it "
    "from one that the worker does not have; while a rotation overlaps, old and new key work.",
)
@pytest.mark.parametrize("option", UNUSABLE)
def test_a_key_that_is_not_good_is_like_one_that_is_not_there(option: str) -> None:
    (key,) = KeyRing.parse(f"laptop={KEY}")
    simple = key.simple_fernet.encrypt_at_time(b"hello", int(NOW)).decode()

    def tried(text: str) -> list[str]:
        ring = KeyRing.parse(text)
        return [
            outcome(lambda: opener(text).open(sealed(key))),
            outcome(lambda: open_simple(ring, simple, max_ttl_s=60, now=lambda: NOW)),
        ]

    other = generate_key()
    assert tried(f"laptop={KEY};max_in_flight=1,{other}") == ["opened", "opened"]
    strangers = tried(other)
    assert set(strangers) == {f"Rejected: {Rejected.TEXT}"}
    assert tried(f"laptop={KEY};{option},{other}") == strangers


def too_soon(self: RequestOpener, sealed: Any) -> Any:
    """Turn away keys that are not good before the work is done, as a careless copy would."""
    key = self._keys.get(sealed.split(".")[1])
    return None if key and not key.terms.good_at(self._now()) else real_open(self, sealed)


real_open = RequestOpener._open


def slowdown(option: str) -> float:
    """Return how much longer an unknown key takes than one with `option`, on large requests."""
    (key,) = KeyRing.parse(KEY)
    opens = opener(f"{KEY};{option}")
    text = "x" * 500_000
    known, unknown = f"1.{key.id}.gAAAAAAAAAAA{text}", f"1.{'0' * 16}.gAAAAAAAAAAA{text}"
    times: dict[str, list[float]] = {known: [], unknown: []}
    for _ in range(15):
        for sealed, taken in times.items():
            began = time.perf_counter()
            outcome(lambda sealed=sealed: opens.open(sealed))  # type: ignore[misc]
            taken.append(time.perf_counter() - began)
    return statistics.median(times[unknown]) / statistics.median(times[known])


@pytest.mark.claim("clients.revoked")
def test_neither_does_it_answer_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.5 < slowdown("revoked") < 2
    monkeypatch.setattr(RequestOpener, "_open", too_soon)
    assert slowdown("revoked") > 5


@pytest.mark.claim("clients.revoked")
def test_revoked_keys_are_opened_by_a_weakened_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests above can fail."""
    monkeypatch.setattr(KeyTerms, "good_at", lambda *_: True)
    (key,) = KeyRing.parse(KEY)
    assert outcome(lambda: opener(f"{KEY};revoked").open(sealed(key))) == "opened"


@pytest.mark.claim("clients.revoked")
def test_rotation_overlaps_and_then_ends() -> None:
    old, new = generate_key(), generate_key()
    ring = f"laptop={old};not_after=2026-11-07,laptop={new};not_before=2026-11-01"
    seen = []
    for day in (-1, 1, 8):
        now = float(NOVEMBER + day * DAY)
        opens = RequestOpener(KeyRing.parse(ring), "e", max_ttl_s=86_400, now=lambda now=now: now)  # type: ignore[misc]
        seen.append([outcome(lambda k=k, o=opens: o.open(sealed(k))) for k in KeyRing.parse(ring)])  # type: ignore[misc]
    rejected = f"Rejected: {Rejected.TEXT}"
    assert seen == [["opened", rejected], ["opened", "opened"], [rejected, "opened"]]


# Limits -----------------------------------------------------------------------------------


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Asking:
    """Requests of clients, each with what it has cost so far."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.limits = ClientLimits(self.clock)

    def enter(self, *options: str, client: str = "laptop", tokens: int = 0) -> Place:
        place = self.limits.enter(client, terms(*options))
        place.cost = lambda: tokens
        return place

    def refusal(self, *options: str, client: str = "laptop") -> RequestError:
        with pytest.raises(RequestError) as caught:
            self.limits.enter(client, terms(*options))
        error = caught.value
        assert (error.status, error.code) == (429, "rate_limit_exceeded")
        assert error.body()["error"]["retry_after_s"] == error.retry_after_s
        return error


@pytest.mark.claim(
    "clients.limits",
    "No client has more requests in flight, or begins one after more tokens within a minute, than "
    "its key allows.",
)
def test_requests_in_flight() -> None:
    asking = Asking()
    first, _ = asking.enter("max_in_flight=2"), asking.enter("max_in_flight=2")
    refused = asking.refusal("max_in_flight=2")
    assert refused.type == "requests" and refused.retry_after_s == 1
    assert re.search(r"^2 requests .* its limit is 2 \(max_in_flight\)", refused.message)
    asking.enter("max_in_flight=2", client="server")
    for _ in range(2):
        first.leave()
    asking.enter("max_in_flight=2")
    asking.refusal("max_in_flight=2")


@pytest.mark.claim("clients.limits")
def test_tokens_within_a_minute() -> None:
    asking = Asking()
    limit = "max_tokens_per_minute=100"
    for _ in range(2):
        asking.enter(limit, tokens=60).leave()
        asking.clock.now += 10
    refused = asking.refusal(limit)
    assert refused.type == "tokens"
    assert re.search(r"used 120 tokens .* limit is 100 .* again in 41 s", refused.message)
    asking.enter(limit, client="server")
    asking.clock.now += refused.retry_after_s or 0
    asking.enter(limit).leave()
    asking.clock.now += 3600
    asking.enter(limit, tokens=100).leave()
    assert asking.refusal(limit).retry_after_s == 61


@pytest.mark.claim("clients.limits")
def test_running_requests_count_as_they_go() -> None:
    asking = Asking()
    limit = "max_tokens_per_minute=100"
    running = asking.enter(limit)
    running.cost = lambda: 99
    asking.enter(limit).leave()
    running.cost = lambda: 100
    asking.refusal(limit)
    asking.clock.now += 62
    asking.enter(limit).leave()  # counted when it was spent, not until the request ends
    running.cost = lambda: 150
    running.leave()
    running.leave()
    asking.enter(limit).leave()
    asking.enter(limit, tokens=50).leave()
    asking.refusal(limit)


def test_keys_of_one_name_count_together_and_each_has_its_own_limit() -> None:
    asking = Asking()
    old, new = KeyRing.parse(f"laptop={KEY};max_in_flight=3,laptop={generate_key()}")
    assert old.client == new.client == "laptop"
    for key in (new, new, new):
        asking.limits.enter(key.client, key.terms)
    asking.refusal("max_in_flight=3")
    asking.limits.enter(new.client, new.terms)
    (unnamed,) = KeyRing.parse(generate_key())
    assert unnamed.client == unnamed.id


def test_what_is_counted_is_bounded() -> None:
    asking = Asking()
    for _ in range(10_000):
        asking.enter(tokens=1).leave()
        asking.clock.now += 0.5
    assert len(asking.limits._clients["laptop"]._spent) <= 62
