"""What workers remember together, on a real redis-server; two stores stand for two workers.

Two workers as processes are in test_replay_workers.py.
"""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import config
import worker_environment
from errors import ConfigError, RequestError
from keys import KeyRing, generate_key
from replay_guard import ReplayGuard
from replay_store import ReplayStore
from request_attempt import RequestAttempt
from tests.claims import Trials
from tests.redis_server import PASSWORD, RedisServer

LEASE_S, RENEW_S = 1.0, 0.2
LATER = 600


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(running: RedisServer) -> RedisServer:
    running.client.flushall()
    return running


@contextlib.asynccontextmanager
async def worker(server: RedisServer, **options: Any) -> AsyncIterator[ReplayStore]:
    """A worker's store, with times that suit a test."""
    times = {"lease_s": LEASE_S, "renew_s": RENEW_S, "timeout_s": 1.0, "clock_skew_s": 60}
    store = ReplayStore(server.url, "endpoint", **{**times, **options})
    await store.start()
    try:
        yield store
    finally:
        await store.close()


async def died(store: ReplayStore) -> None:
    """End a worker as SIGKILL does: nothing is told, nothing is renewed."""
    assert store._renewing
    store._renewing.cancel()
    store._attempts.clear()


def expiry() -> int:
    return int(time.time()) + LATER


async def refusal(store: ReplayStore, name: str) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await store.begin(name, expiry())
    return caught.value


async def eventually(condition: Callable[[], object], timeout_s: float = 10) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s
        await asyncio.sleep(0.01)


# Answered once ----------------------------------------------------------------------------


async def answered_elsewhere(server: RedisServer) -> str:
    """Answer a request on one worker and send it to another one; return what became of it."""
    async with worker(server) as one, worker(server) as two:
        await one.begin("r", expiry())
        one.finish("r")
        await eventually(lambda: not one._attempts)
        try:
            await two.begin("r", expiry())
        except RequestError as error:
            assert error.status == 409
            return str(error.code)
        return "ran"


@pytest.mark.claim(
    "requests.shared_replay",
    "With a shared store (a real Redis) a request that one worker answered runs on no other, and "
    "of many deliveries at once one runs.",
)
async def test_a_request_that_one_worker_answered_is_refused_by_another(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await answered_elsewhere(server) == "replayed"
    assert LATER + 60 < server.client.ttl("r") <= LATER + 2 * 60 + 1
    server.client.flushall()
    monkeypatch.setattr(ReplayStore, "finish", ReplayStore.abandon)
    assert await answered_elsewhere(server) == "ran"


@pytest.mark.claim("requests.shared_replay")
async def test_of_many_at_once_one_runs(server: RedisServer, claim: Trials) -> None:
    """Twenty deliveries to two workers; each that begins takes its time and is answered."""
    ran = 0

    async def deliver(store: ReplayStore) -> str:
        nonlocal ran
        try:
            await store.begin("r", expiry())
        except RequestError as error:
            return str(error.code)
        ran += 1
        await asyncio.sleep(2 * LEASE_S)  # longer than a lease that nobody renews
        store.finish("r")
        return "answered"

    async with worker(server) as one, worker(server) as two:
        outcomes = await asyncio.gather(*(deliver(store) for store in (one, two) * 10))
    claim.trials(20, ran - 1)
    assert sorted(outcomes) == ["answered", *["replayed"] * 19]


async def test_a_mark_goes_when_the_request_has_expired(server: RedisServer) -> None:
    async with worker(server, clock_skew_s=0) as one:
        await one.begin("r", int(time.time()) + 1)
        one.finish("r")
        await eventually(lambda: server.marks().get(b"r") == b"answered")
        await eventually(lambda: not server.marks())
        assert not one._attempts


async def test_a_clock_that_jumps_ahead_ends_no_mark_early(server: RedisServer) -> None:
    ahead_s = 0
    async with worker(server, now=lambda: time.time() + ahead_s) as one:
        await one.begin("r", expiry())
        ahead_s = 7 * 86_400
        one.finish("r")
        await eventually(lambda: server.marks().get(b"r") == b"answered")
    assert server.client.ttl("r") > LATER


# Retries ----------------------------------------------------------------------------------


@pytest.mark.claim("requests.retry")
async def test_a_retry_after_a_worker_died_runs_when_the_lease_is_over(
    server: RedisServer,
) -> None:
    async with worker(server) as one, worker(server) as two:
        await one.begin("r", expiry())
        retry = asyncio.create_task(two.begin("r", expiry()))
        await asyncio.wait([retry], timeout=2 * LEASE_S)
        assert not retry.done(), "it ran while the other worker lived"
        began = time.monotonic()
        await died(one)
        await asyncio.wait_for(retry, 10)
        assert time.monotonic() - began < LEASE_S + 5
        two.finish("r")


async def test_a_retry_runs_at_once_when_the_other_attempt_was_given_up(
    server: RedisServer,
) -> None:
    async with worker(server, lease_s=60) as one, worker(server) as two:
        await one.begin("r", expiry())
        one.abandon("r")
        await asyncio.wait_for(two.begin("r", expiry()), 5)


async def test_a_retry_that_waits_hears_of_the_answer(server: RedisServer) -> None:
    async with worker(server) as one, worker(server) as two:
        await one.begin("r", expiry())
        retry = asyncio.create_task(refusal(two, "r"))
        await asyncio.wait([retry], timeout=0.5)
        one.finish("r")
        assert (await asyncio.wait_for(retry, 5)).code == "replayed"


async def test_who_waits_is_told_of_the_expiry(server: RedisServer) -> None:
    async with worker(server, clock_skew_s=0) as one, worker(server, clock_skew_s=0) as two:
        await one.begin("r", expiry())
        with pytest.raises(RequestError) as caught:
            await two.begin("r", int(time.time()))
        assert caught.value.code == "expired"


async def test_a_worker_that_stood_still_neither_ends_nor_shortens_another_ones_mark(
    server: RedisServer,
) -> None:
    async with worker(server) as one, worker(server, lease_s=60) as two:
        await one.begin("r", expiry())
        assert one._renewing
        one._renewing.cancel()
        await two.begin("r", expiry())
        await one._tell_all()
        assert server.client.ttl("r") > 50
        one.abandon("r")
        await one.close()
        assert server.marks()
        two.finish("r")
        await eventually(lambda: server.marks().get(b"r") == b"answered")
        assert server.client.ttl("r") > LATER


# A store that is not there -------------------------------------------------------------------


@pytest.mark.claim(
    "requests.store_gone",
    "While the shared store is gone, or does not answer, requests are refused, "
    "and run once when it is back.",
)
async def test_while_the_store_is_gone_requests_are_refused(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with worker(server) as one:
        await one.begin("running", expiry())
        server.stop()
        try:
            error = await refusal(one, "r")
            assert (error.status, error.code) == (503, "replay_store_unavailable")
            one.finish("running")
            await refusal(one, "r")
        finally:
            server.start()
        await eventually(lambda: server.marks() == {b"running": b"answered"})
        await one.begin("r", expiry())
    assert caplog.text.count("the replay store is not available: ConnectionError") == 1
    assert caplog.text.count("the replay store answers again") == 1
    assert PASSWORD not in caplog.text


@pytest.mark.claim("requests.store_gone")
async def test_a_store_that_does_not_answer_is_waited_for_no_longer_than_said(
    server: RedisServer,
) -> None:
    async with worker(server, timeout_s=2) as one:
        with server.frozen():
            began = time.monotonic()
            assert (await refusal(one, "r")).code == "replay_store_unavailable"
            assert time.monotonic() - began < 4
        await asyncio.wait_for(one.begin("r", expiry()), 5)


async def test_where_it_may_do_without_requests_run_and_are_marked_later(
    server: RedisServer,
) -> None:
    async with worker(server, may_do_without=True) as one:
        server.stop()
        try:
            await one.begin("r", expiry())
        finally:
            server.start()
        await eventually(lambda: server.marks())
        async with worker(server) as two:
            retry = asyncio.create_task(refusal(two, "r"))
            await asyncio.wait([retry], timeout=0.5)
            one.finish("r")
            assert (await asyncio.wait_for(retry, 5)).code == "replayed"


async def test_a_worker_that_ends_tells_what_it_answered(server: RedisServer) -> None:
    async with worker(server, renew_s=3600) as one:
        await one.begin("r", expiry())
        one.finish("r")
    assert server.marks() == {b"r": b"answered"}


# Together with a worker's own memory ----------------------------------------------------------


async def test_here_and_everywhere(server: RedisServer) -> None:
    (key,) = KeyRing.parse(generate_key())
    guards = ReplayGuard(), ReplayGuard()
    async with worker(server) as one, worker(server) as two:

        def attempt(number: int) -> RequestAttempt:
            return RequestAttempt(guards[number], (one, two)[number], key, "kid.id", expiry())

        first = attempt(0)
        await first.begin_everywhere()
        with pytest.raises(RequestError) as caught:
            attempt(0)
        assert caught.value.code == "already_running"
        first.abandon()
        first.finish()  # too late: it was given up
        second = attempt(1)
        await second.begin_everywhere()
        second.finish()
        second.abandon()  # too late: it was answered
        with pytest.raises(RequestError) as caught:
            attempt(1)
        assert caught.value.code == "replayed"
        third = attempt(0)
        with pytest.raises(RequestError) as caught:
            await third.begin_everywhere()
        assert caught.value.code == "replayed"


async def test_the_store_learns_neither_ids_nor_keys(server: RedisServer) -> None:
    keys = KeyRing.parse(f"laptop={generate_key()},phone={generate_key()}")
    request_id = "0123456789abcdef" * 2
    guard = ReplayGuard()
    async with worker(server) as one:
        for key in keys:
            await RequestAttempt(
                guard, one, key, f"{key.id}.{request_id}", expiry()
            ).begin_everywhere()
        names = {name.decode() for name in server.marks()}
        held = repr(server.marks())
        other = ReplayStore(server.url, "another endpoint", clock_skew_s=60)
        elsewhere = other.name(keys[0].local_secret("replay store"), f"{keys[0].id}.{request_id}")
        await other.close()
    assert len(names) == 2 and elsewhere not in names
    assert all(re.fullmatch("sealed-vllm:[0-9a-f]{32}", name) for name in names)
    for secret in (request_id, *(key.id for key in keys), "laptop"):
        assert secret not in held


# Cost -----------------------------------------------------------------------------------------


class _Delayed:
    """A path to the server on which everything takes `delay_s` each way."""

    def __init__(self, port: int, delay_s: float) -> None:
        self._port = port
        self._delay_s = delay_s

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                await asyncio.sleep(self._delay_s)
                writer.write(data)
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(self._pipe(reader, to_writer), self._pipe(to_reader, writer))

    async def __aenter__(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def __aexit__(self, *_: object) -> None:
        self._server.close()


async def test_requests_wait_for_one_round_trip(server: RedisServer) -> None:
    trip_s = 1.5
    async with _Delayed(server.port, trip_s / 2) as port:
        url = server.url.replace(str(server.port), str(port))
        store = ReplayStore(url, "endpoint", clock_skew_s=60, renew_s=3600, timeout_s=20)
        await store.start()
        took = []
        for number in range(3):
            began = time.perf_counter()
            await store.begin(f"r{number}", expiry())
            took.append(time.perf_counter() - began)
            store.finish(f"r{number}")
            await eventually(lambda: not store._attempts)
        began = time.perf_counter()
        await asyncio.gather(*(store.begin(f"{number}", expiry()) for number in range(32)))
        together_s = time.perf_counter() - began
        await store.close()
    assert trip_s <= sorted(took)[1] < 2 * trip_s
    assert trip_s <= together_s < 2 * trip_s


# Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["host:6379", f"http://:{PASSWORD}@host", f"redis://:{PASSWORD}@host:port"]
)
def test_what_is_no_address_is_refused_and_not_quoted(url: str) -> None:
    with pytest.raises(ConfigError, match="REPLAY_REDIS_URL is no address") as caught:
        ReplayStore(url, "endpoint", clock_skew_s=60)
    assert PASSWORD not in str(caught.value) and caught.value.__context__ is None


def test_settings() -> None:
    given = {"REPLAY_REDIS_URL": f"redis://:{PASSWORD}@host", "REPLAY_REDIS_UNAVAILABLE": "Accept"}
    settings, faults = config.read_for_models(given)
    assert not faults and settings.may_do_without_redis
    assert PASSWORD not in repr(settings)
    _, faults = config.read_for_models({"REPLAY_REDIS_UNAVAILABLE": "ignore"})
    assert faults == ["REPLAY_REDIS_UNAVAILABLE is neither refuse nor accept"]
    worker_environment.take_secrets(given)
    assert "REPLAY_REDIS_URL" not in given
