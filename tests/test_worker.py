"""The worker on the real SDK, the real engine and the local platform: what jobs are answered."""

import asyncio
import base64
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.fernet import Fernet

from client import AsyncClient, Client
from client_config import ClientSettings
from crypto import new_request
from errors import Rejected, TruncatedAnswer
from frames import Text
from hpke import HpkePrivateKey
from keys import Key, KeyRing, generate_key
from local_runpod import LocalRunpod
from local_runpod_queue import Job, Status
from protocol import Request
from tests.wait import until
from tests.workers import (
    LONG_TEXT,
    MODEL,
    ROOT,
    SERVED,
    Caller,
    RunningWorker,
    saying,
    tokens,
)

pytestmark = pytest.mark.engine

CHAT = "/v1/chat/completions"
HPKE_KEY = HpkePrivateKey.generate()

CLIENTS = (
    ("laptop", ""),
    ("phone", ""),
    ("narrow", ";max_in_flight=1"),
    ("metered", ";max_tokens_per_minute=20"),
    ("lost", ";revoked"),
    ("old", ";not_after=2020-01-01"),
)
"""The clients' keys and what goes with each."""


def key_of(client: str, worker: RunningWorker) -> Key:
    (key,) = (key for key in KeyRing.parse(worker.key) if key.name == client)
    return key


@pytest.fixture(scope="module")
def worker(
    platform: LocalRunpod, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningWorker]:
    """A worker with keys of several clients, a pair that need not be used, and room for 16 jobs."""
    folder = tmp_path_factory.mktemp("worker")
    keys = ",".join(f"{name}={generate_key()}{terms}" for name, terms in CLIENTS)
    with RunningWorker(
        platform,
        folder,
        key=keys,
        MAX_NUM_SEQS="16",
        HPKE_PRIVATE_KEY=HPKE_KEY.text,
        ALLOW_WITHOUT_HPKE="true",
    ) as worker:
        yield worker.ready()


def key_text(worker: RunningWorker) -> str:
    """The first key alone."""
    return worker.key.split(",")[0].partition("=")[2]


class TestSealed:
    def test_streamed(self, caller: Caller, worker: RunningWorker) -> None:
        answered = caller.ask("generate", saying(LONG_TEXT))
        assert answered.text == LONG_TEXT
        assert answered.complete
        assert answered.head.kind == "generate"
        assert answered.details["finish_reason"] == "stop"
        usage = answered.end.usage
        assert usage is not None
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        timings = answered.end.timings
        assert 0 <= timings["queue_ms"] <= timings["first_token_ms"] <= timings["total_ms"]

    def test_public_key_mode(self, caller: Caller, worker: RunningWorker) -> None:
        settings = ClientSettings(
            caller.platform.endpoint_id,
            caller.platform.api_key,
            worker.key,
            caller.platform.base_url,
            hpke_public_key=HPKE_KEY.public.text,
        )
        with Client(settings) as client, client.chat("Hi", stream=True, max_tokens=20) as stream:
            assert "".join(delta.text for delta in stream) == stream.answer().text
        line = worker.job_line(stream.job_id)
        assert (line["key"], line["outcome"]) == (caller.key.id, "done")
        assert f"public key {HPKE_KEY.public.id}" in worker.log
        assert "ALLOW_WITHOUT_HPKE: requests without public-key mode" in worker.log
        assert HPKE_KEY.text not in worker.log

    def test_not_streamed(self, caller: Caller) -> None:
        answered = caller.ask("generate", {**saying(LONG_TEXT), "stream": False})
        assert answered.text == LONG_TEXT
        assert sum(isinstance(event, Text) for event in answered.events) == 1

    def test_a_key_of_several_answers_under_itself(
        self, caller: Caller, worker: RunningWorker
    ) -> None:
        second = KeyRing.parse(worker.key)[1]
        answered = caller.ask("generate", saying("hello"), key=second)
        assert answered.text == "hello"

    def test_what_the_worker_says_of_itself(self, caller: Caller) -> None:
        answered = caller.ask("worker", None)
        told = answered.json()
        assert told["models"] == [SERVED]
        assert told["max_model_len"] == 2048
        assert told["max_num_seqs"] == 16
        assert CHAT in told["routes"]
        assert abs(told["time"] - time.time()) < 30
        assert answered.end.usage is None

    def test_an_openai_route(self, caller: Caller) -> None:
        body = {"model": SERVED, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
        answered = caller.ask(CHAT, body)
        assert (answered.head.status, answered.head.kind) == (200, "body")
        assert answered.json()["usage"]["completion_tokens"] == 5
        assert answered.end.usage is not None
        assert answered.end.usage["completion_tokens"] == 5

    def test_an_openai_route_streamed(self, caller: Caller) -> None:
        body = {
            "model": SERVED,
            "messages": [{"role": "user", "content": "Hi"}],
            "structured_outputs": {"choice": [LONG_TEXT]},
            "stream": True,
        }
        answered = caller.ask(CHAT, body)
        assert answered.head.kind == "sse"
        deltas = [event["choices"][0]["delta"] for event in answered.sse()]
        assert "".join(delta.get("content") or "" for delta in deltas) == LONG_TEXT

    @pytest.mark.parametrize("stream", [True, False])
    def test_the_routes_own_errors_keep_their_status(self, caller: Caller, stream: bool) -> None:
        body = {"model": "nope", "messages": [{"role": "user", "content": "Hi"}], "stream": stream}
        answered = caller.ask(CHAT, body)
        assert answered.head.status == 404
        assert answered.json()["error"]["code"] == 404
        assert answered.end.error is None

    def test_models(self, caller: Caller) -> None:
        answered = caller.ask("/v1/models", None)
        assert answered.json()["data"][0]["id"] == SERVED

    def test_the_real_client(self, platform: LocalRunpod, worker: RunningWorker) -> None:
        settings = ClientSettings(
            platform.endpoint_id, platform.api_key, key_text(worker), platform.base_url
        )
        with Client(settings) as client:
            answer = client.chat("Speak.", structured_outputs={"choice": ["hello"]})
            assert answer.text == "hello"


class TestSimple:
    """Ten lines of stock Fernet."""

    def ask(self, caller: Caller, key: str, content: bytes) -> list[dict[str, Any]]:
        fernet = Fernet(key)
        job = caller.submit({"encrypted_input": fernet.encrypt(content).decode()})
        return [json.loads(fernet.decrypt(chunk)) for chunk in caller.outputs(job)]

    def test_a_json_request(self, caller: Caller, worker: RunningWorker) -> None:
        answer = self.ask(caller, key_text(worker), json.dumps(saying(LONG_TEXT)).encode())
        assert "".join(item["text"] for item in answer) == LONG_TEXT
        assert [item["seq"] for item in answer] == list(range(len(answer)))
        assert answer[-1]["done"] is True
        assert answer[-1]["finish_reason"] == "stop"
        assert answer[-1]["usage"]["total_tokens"] > 0

    def test_bare_text(self, caller: Caller, worker: RunningWorker) -> None:
        fernet = Fernet(key_text(worker))
        job = caller.submit({"encrypted_input": fernet.encrypt("Grüße!".encode()).decode()})
        first = next(items for items, _ in caller.parts(job) if items)
        assert json.loads(fernet.decrypt(first[0]))["seq"] == 0
        caller.cancel(job)  # nonsense may fill the whole context

    def test_an_error_is_sealed(self, caller: Caller, worker: RunningWorker) -> None:
        (item,) = self.ask(caller, key_text(worker), b'{"messages": []}')
        assert item["done"] is True
        assert "`messages` is empty" in item["error"]["message"]

    def test_it_is_answered_once(self, caller: Caller, worker: RunningWorker) -> None:
        fernet = Fernet(key_text(worker))
        token = fernet.encrypt(json.dumps(saying("once")).encode()).decode()
        first, second = (
            caller.outputs(caller.submit({"encrypted_input": token})) for _ in range(2)
        )
        assert json.loads(fernet.decrypt(first[-1]))["done"]
        assert json.loads(fernet.decrypt(second[-1]))["error"]["code"] == "replayed"


class TestOpenaiRoute:
    """The sealed form in one streamed response, by the real client."""

    @pytest.fixture
    def settings(self, platform: LocalRunpod, worker: RunningWorker) -> ClientSettings:
        return ClientSettings(
            platform.endpoint_id,
            platform.api_key,
            key_text(worker),
            platform.base_url,
            transport="openai",
        )

    def newest(self, platform: LocalRunpod) -> Job:
        return list(platform.jobs.values())[-1]

    def test_streamed_and_not(self, settings: ClientSettings, platform: LocalRunpod) -> None:
        before = len(platform.exchanged)
        choice = {"choice": [LONG_TEXT]}
        with Client(settings) as client:
            with client.chat("Speak.", stream=True, structured_outputs=choice) as stream:
                deltas = [delta.text for delta in stream]
            assert "".join(deltas) == LONG_TEXT
            assert len(deltas) > 3
            whole = client.chat("Speak.", structured_outputs=choice)
        assert whole.text == LONG_TEXT and whole.usage
        job = self.newest(platform)
        until(lambda: job.status.final, 10, "over")
        assert job.status is Status.COMPLETED
        carried = b"".join(each.body for each in platform.exchanged[before:])
        assert carried.count(b"data: 1.") > 6
        for word in (b"Speak.", b"is followed by", b"generate", b"messages"):
            assert word not in carried

    def test_vllms_own_route(self, settings: ClientSettings) -> None:
        body = {
            "model": SERVED,
            "messages": [{"role": "user", "content": "Hi"}],
            "structured_outputs": {"choice": ["grün 🌲"]},
        }
        with Client(settings) as client:
            whole = client.request(CHAT, body, stream=False).json()
            assert whole["choices"][0]["message"]["content"] == "grün 🌲"
            with client.request(CHAT, body, stream=True) as stream:
                *events, done = list(stream)
            assert done == b"data: [DONE]"
            deltas = [json.loads(event[6:])["choices"][0]["delta"] for event in events]
            assert "".join(delta.get("content") or "" for delta in deltas) == "grün 🌲"
            for streamed in (True, False):
                refused: Any = client.request(
                    CHAT, {**body, "model": "nope"}, stream=streamed, check=False
                )
                response = refused.response() if streamed else refused
                assert response.status == 404 and b"nope" in response.body

    def test_what_cannot_be_opened(
        self, settings: ClientSettings, platform: LocalRunpod, caller: Caller
    ) -> None:
        stranger = replace(settings, encryption_key=generate_key())
        with Client(stranger) as client, pytest.raises(Rejected, match="ENCRYPTION_KEY"):
            client.chat("x")
        job = self.newest(platform)
        until(lambda: job.status.final, 10, "over")
        assert (job.status, job.error) == (Status.FAILED, Rejected.TEXT)
        for given in ({"sealed": "x"}, {"sealed": "x", "stream": True, "model": SERVED}):
            answer = caller.http.post("/openai/v1/chat/completions", json=given)
            assert Rejected.TEXT in answer.text

    def test_a_client_that_goes_away_or_is_cut_off_frees_the_engine(
        self, settings: ClientSettings, platform: LocalRunpod, worker: RunningWorker, caller: Caller
    ) -> None:
        endless = {"max_tokens": 1900, "ignore_eos": True, "temperature": 0}
        with Client(settings) as client:
            with client.chat("Speak.", stream=True, **endless) as stream:
                assert next(stream)
            left = self.newest(platform).id
            with (
                caller.fault("openai", cut=2),
                pytest.raises(TruncatedAnswer, match="CLIENT_TRANSPORT=run"),
            ):
                client.chat("Speak.", stream=True, **endless).answer()
            cut = self.newest(platform).id
        for job_id in (left, cut):
            line = worker.job_line(job_id)
            assert line["outcome"] == "cancelled"
            assert int(line["completion_tokens"]) < 1900

    def test_32_at_once(self, settings: ClientSettings) -> None:
        async def main() -> list[str]:
            async with AsyncClient(settings) as client:

                async def ask(number: int) -> str:
                    choice = {"choice": [f"number {number}, " + LONG_TEXT[:80]]}
                    return (await client.chat("Speak.", structured_outputs=choice)).text

                return await asyncio.gather(*(ask(number) for number in range(32)))

        assert asyncio.run(main()) == [f"number {n}, " + LONG_TEXT[:80] for n in range(32)]


PLAINTEXT = [
    {"prompt": "Hello"},
    {"messages": [{"role": "user", "content": "Hello"}]},
    {"openai_route": "/v1/models"},
    {"openai_route": CHAT, "openai_input": {"messages": []}},
    {"route": "/v1/models", "method": "GET"},
    {},
    {"surprise": True},
]


class TestRejected:
    """One answer, whatever the cause."""

    def rejected(self, caller: Caller, job_input: dict[str, Any]) -> None:
        job = caller.submit(job_input)
        assert caller.outputs(job) == []
        status = caller.status(job)
        assert status["status"] == "FAILED"
        assert status["error"] == Rejected.TEXT
        assert "output" not in status

    @pytest.mark.parametrize("job_input", PLAINTEXT)
    def test_plaintext(self, caller: Caller, job_input: dict[str, Any]) -> None:
        self.rejected(caller, job_input)

    def test_a_route_of_the_platform_in_plaintext(self, caller: Caller) -> None:
        answer = caller.http.get("/openai/v1/models")
        assert answer.status_code == 500
        assert Rejected.TEXT in answer.text

    def test_what_cannot_be_opened(self, caller: Caller, worker: RunningWorker) -> None:
        good = new_request("generate", b'{"prompt":"x"}', audience="local", ttl_s=60)
        from crypto import seal_request

        sealed = seal_request(good, caller.key)
        version, kid, ciphertext = sealed.split(".")
        stranger = KeyRing.parse(generate_key()).first
        flipped = "B" if ciphertext[100] == "A" else "A"
        raw = bytearray(base64.urlsafe_b64decode(ciphertext))
        raw[8] = 1
        for bad in (
            "",
            "nonsense",
            "1.$$$$.%%%%",
            f"2.{kid}.{ciphertext}",
            f"1.{'0' * 16}.{ciphertext}",
            f"1.{kid}.{ciphertext[:-4]}",
            f"1.{kid}.{ciphertext[:100]}{flipped}{ciphertext[101:]}",
            f"1.{kid}.{base64.urlsafe_b64encode(raw).decode()}",
            f"1.{kid}.\n{ciphertext}",
            f"{version}.{kid}.{ciphertext}\ud800",
            seal_request(good, stranger),
            "é" * 2000,
        ):
            self.rejected(caller, {"sealed": bad})
        self.rejected(caller, {"sealed": sealed, "extra": 1})
        self.rejected(caller, {"sealed": None})
        self.rejected(caller, {"sealed": {"a": 1}})
        self.rejected(caller, {"sealed": "A" * 9_000_000})
        self.rejected(caller, {"encrypted_input": "nonsense"})
        self.rejected(caller, {"encrypted_input": Fernet(generate_key()).encrypt(b"x").decode()})
        old = Fernet(key_text(worker)).encrypt_at_time(b"x", int(time.time()) - 90_000)
        self.rejected(caller, {"encrypted_input": old.decode()})


def with_times(issued_at: float, expires_at: float, **changes: Any) -> Request:
    request = new_request("generate", json.dumps(saying("x")).encode(), audience="local", ttl_s=60)
    return msgspec.structs.replace(
        request, issued_at=int(issued_at), expires_at=int(expires_at), **changes
    )


BAD_BODIES: list[tuple[dict[str, Any], str]] = [
    ({}, "either `messages` or `prompt`"),
    ({"messages": []}, "`messages` is empty"),
    ({"prompt": ""}, "`prompt` is empty"),
    ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "either"),
    ({"prompt": "x", "temperature": 1}, "temperature"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": ["a"]}, "prompt"),
    ({"messages": "x"}, "messages"),
    ({"messages": ["x"]}, "messages"),
    ({"prompt": "x", "stream": "yes"}, "stream"),
    ({"prompt": "x", "model": "nope"}, "`nope` does not exist"),
    ({"prompt": "x", "sampling_params": {"warmth": 1}}, "'warmth'"),
    ({"prompt": "x", "sampling_params": {"temperature": -1}}, "temperature"),
    ({"prompt": "x", "sampling_params": {"temperature": "hot"}}, "temperature"),
    ({"prompt": "x", "sampling_params": {"max_tokens": 0}}, "max_tokens"),
    ({"prompt": "x", "sampling_params": {"max_tokens": 10**30}}, "max_tokens"),
    ({"prompt": "x", "sampling_params": {"seed": 10**400}}, "seed"),
    ({"prompt": "word " * 3000}, "2048"),
    ({"prompt": [1] * 3000}, "2048"),
    ({"prompt": [10**9]}, "vocab"),
]


class TestRefused:
    """Errors after the sender is known: sealed, clear, and harmless to others."""

    @pytest.fixture
    def a_job_meanwhile(self, caller: Caller) -> Iterator[None]:
        """Run another job meanwhile, which is answered to the letter."""
        meanwhile = caller.send("generate", saying(LONG_TEXT))
        caller.first_chunk(meanwhile)
        yield
        assert caller.read(meanwhile).text == LONG_TEXT

    @pytest.mark.usefixtures("a_job_meanwhile")
    def test_times(self, caller: Caller) -> None:
        now = time.time()
        for issued_s, expires_s, code in (
            (-200, -100, "expired"),
            (0, 0, "expired"),
            (100, 200, "not_yet_valid"),
            (0, 2 * 86_400, "ttl_too_long"),
        ):
            request = with_times(now + issued_s, now + expires_s)
            assert caller.ask("", None, request=request).fault["code"] == code

    def test_a_clock_that_is_off_by_less_than_the_skew(self, caller: Caller) -> None:
        now = time.time()
        assert caller.ask("", None, request=with_times(now + 50, now + 90)).text == "x"
        assert caller.ask("", None, request=with_times(now - 90, now - 50)).text == "x"

    def test_another_endpoint(self, caller: Caller) -> None:
        now = time.time()
        request = with_times(now, now + 60, audience="other")
        fault = caller.ask("", None, request=request).fault
        assert (fault["code"], fault["status"]) == ("wrong_audience", 403)

    def test_replayed(self, caller: Caller) -> None:
        sent = caller.send("generate", saying("once"))
        assert caller.read(sent).text == "once"
        again = caller.ask("", None, request=sent.request)
        assert again.fault["code"] == "replayed"
        assert again.text == ""

    def test_running(self, caller: Caller) -> None:
        with caller.fault("job-stream", delay_s=0.5):  # or it could be over by then
            sent = caller.send("generate", saying(LONG_TEXT))
            caller.first_chunk(sent)
            assert caller.ask("", None, request=sent.request).fault["code"] == "already_running"
        assert caller.read(sent).text == LONG_TEXT

    @pytest.mark.usefixtures("a_job_meanwhile")
    def test_bodies(self, caller: Caller) -> None:
        sent = [(caller.send("generate", body), says) for body, says in BAD_BODIES]
        for job, says in sent:
            fault = caller.read(job).fault
            assert says in fault["message"]
            assert fault["status"] in (400, 404)

    @pytest.mark.usefixtures("a_job_meanwhile")
    def test_json_that_is_none(self, caller: Caller) -> None:
        """The client refuses to send these; another one might not."""
        for text in (
            b'{"prompt":"x","sampling_params":{"temperature":NaN}}',
            b'{"prompt":"x","sampling_params":{"temperature":1e999}}',
            b'{"prompt":"\\ud800"}',
            b'{"prompt":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
            b'{"prompt":"x"',
        ):
            inside = new_request("generate", b'{"a":1}', audience="local", ttl_s=60).encode()
            content = inside.replace(b'{"a":1}', text)
            job = caller.submit({"sealed": sealed_bytes(caller, content)})
            assert caller.outputs(job) == []
            assert caller.status(job)["error"] == Rejected.TEXT

    @pytest.mark.parametrize("route", ["/v1/nothing", "generate/", "../x", "/invocations", ""])
    def test_routes(self, caller: Caller, worker: RunningWorker, route: str) -> None:
        sent = caller.send(route, {"prompt": "x"})
        fault = caller.read(sent).fault
        assert fault["status"] == 404
        assert "/v1/models" in fault["message"]
        assert worker.job_line(sent.job_id)["route"] == "unknown"

    def test_methods(self, caller: Caller) -> None:
        assert caller.ask("/v1/models", {"a": 1}).fault["status"] == 405
        assert caller.ask("worker", {"a": 1}).fault["status"] == 405


def sealed_bytes(caller: Caller, content: bytes) -> str:
    """Seal whatever bytes as a request's JSON."""
    from protocol import pad_request

    ciphertext = caller.key.request_fernet.encrypt_at_time(pad_request(content), 0)
    return f"1.{caller.key.id}.{ciphertext.decode()}"


class TestClients:
    """Several clients of one worker: what each may ask, and what one learns of another."""

    def test_requests_in_flight(self, caller: Caller, worker: RunningWorker) -> None:
        key = key_of("narrow", worker)
        first = caller.send("generate", tokens(1900), key=key)
        caller.first_chunk(first)
        for route, body in (("generate", tokens(1)), (CHAT, {"model": SERVED, "messages": []})):
            sent = caller.send(route, body, key=key)
            fault = caller.read(sent).fault
            assert (fault["status"], fault["code"]) == (429, "rate_limit_exceeded")
            assert fault["type"] == "requests"
            assert "its limit is 1 (max_in_flight)" in fault["message"]
            assert fault["retry_after_s"] == 1
            line = worker.job_line(sent.job_id)
            assert (line["client"], line["outcome"]) == ("narrow", "error:rate_limit_exceeded")
        assert caller.ask("worker", None, key=key).json()["models"] == [SERVED]
        assert caller.ask("generate", tokens(1)).end.error is None  # another client
        caller.cancel(first.job_id)
        worker.job_line(first.job_id)
        assert caller.ask("generate", tokens(1), key=key).end.error is None

    def test_tokens_per_minute_of_requests_that_run_and_that_ended(
        self, caller: Caller, worker: RunningWorker
    ) -> None:
        key = key_of("metered", worker)
        running = caller.send("generate", tokens(1900), key=key)
        job = caller.platform.jobs[running.job_id]
        until(lambda: job.chunks_received > 20, 60, "more tokens than the limit")
        for _ in range(2):
            fault = caller.ask("generate", tokens(1), key=key).fault
            assert (fault["status"], fault["type"]) == (429, "tokens")
            (used,) = re.findall(r"has used (\d+) tokens .* limit is 20 ", fault["message"])
            assert int(used) >= 20
            assert 0 < fault["retry_after_s"] <= 61
            caller.cancel(running.job_id)
            line = worker.job_line(running.job_id)
        assert int(line["prompt_tokens"]) > 0 and int(line["completion_tokens"]) >= 20
        assert int(used) == int(line["prompt_tokens"]) + int(line["completion_tokens"])

    @pytest.mark.parametrize("client", ["lost", "old"])
    def test_a_key_that_is_not_good_is_rejected_like_a_strangers(
        self, caller: Caller, worker: RunningWorker, client: str
    ) -> None:
        stranger = KeyRing.parse(generate_key()).first
        seen = []
        for key in (stranger, key_of(client, worker)):
            sent = caller.send("generate", saying("x"), key=key)
            assert caller.outputs(sent.job_id) == []
            status = caller.status(sent.job_id)
            line = worker.job_line(sent.job_id)
            del status["id"], status["delayTime"], status["executionTime"], line["total_ms"]
            seen.append((status, line))
        assert seen[0] == seen[1]
        assert seen[0][0]["error"] == Rejected.TEXT

    def test_the_prefix_cache_is_each_clients_own(
        self, caller: Caller, worker: RunningWorker
    ) -> None:
        """The same client hits and another one misses; so does one who brings a salt."""
        laptop, phone = key_of("laptop", worker), key_of("phone", worker)
        messages = [{"role": "user", "content": "A prompt of the laptop's. " * 30}]
        bodies: dict[str, dict[str, Any]] = {
            "generate": {"messages": messages, "sampling_params": {"max_tokens": 1}},
            CHAT: {"model": SERVED, "messages": messages, "max_tokens": 1},
        }

        def cached(route: str, key: Key, **more: Any) -> int:
            answered = caller.ask(route, {**bodies[route], **more}, key=key)
            usage = answered.end.usage
            assert usage is not None and answered.end.error is None, answered.end
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        assert cached("generate", laptop) == 0
        assert cached("generate", laptop) > 100
        assert cached("generate", phone) == 0
        assert cached("generate", phone) > 100
        # Both bring one and the same salt, which counts for nothing: each is at home already.
        assert cached(CHAT, laptop, cache_salt="shared") > 100
        messages[0]["content"] = "Another prompt of the laptop's. " * 30
        assert cached(CHAT, laptop, cache_salt="shared") == 0
        assert cached(CHAT, laptop) > 100
        assert cached(CHAT, phone, cache_salt="shared") == 0

    def test_the_log_tells_each_key(self, worker: RunningWorker) -> None:
        for key in KeyRing.parse(worker.key):
            (line,) = re.findall(rf"key {key.id} \(.*", worker.log)
            assert f"({key.name})" in line
        assert "(lost), revoked\n" in worker.log
        assert "(old), ended 2020-01-02 00:00 UTC\n" in worker.log
        assert "(narrow), max_in_flight 1\n" in worker.log


class TestDelivery:
    def test_all_chunks_look_alike(self, caller: Caller) -> None:
        """Short and long answers, details, events and errors."""
        logprobs = saying("a", logprobs=0)
        body = {
            "model": SERVED,
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 20,
            "stream": True,
        }
        answers = {
            "text": caller.ask("generate", saying(LONG_TEXT)),
            "short": caller.ask("generate", tokens(3)),
            "details": caller.ask("generate", logprobs),
            "events": caller.ask(CHAT, body),
            "not found": caller.ask(CHAT, {**body, "model": "nope"}),
            "refused": caller.ask("generate", {"prompt": ""}),
            "no route": caller.ask("/v1/nothing", {}),
        }
        sizes = {name: {len(chunk) for chunk in a.chunks} for name, a in answers.items()}
        assert sizes == {name: {1489} for name in answers}
        # What says more at once goes by steps, which tell little.
        steps = {len(chunk) for chunk in caller.ask("worker", None).chunks}
        steps |= {len(chunk) for chunk in caller.ask(CHAT, {**body, "stream": False}).chunks}
        assert steps <= {1489, 2853}

    def test_while_a_chunk_is_posted_deltas_gather(self, caller: Caller) -> None:
        """With a slow POST a stream takes the engine's own time and two POSTs."""
        post_s = 0.2  # so slow that a busy machine's engine has several tokens ready meanwhile
        body = saying(LONG_TEXT)
        caller.ask("generate", body)  # compiles the grammar

        def timed() -> tuple[float, float, int]:
            began = time.monotonic()
            answered = caller.ask("generate", body)
            assert answered.text == LONG_TEXT
            assert answered.end.usage is not None
            whole_s = time.monotonic() - began
            return whole_s, answered.end.timings["total_ms"] / 1000, len(answered.chunks)

        # The machine's own pace differs from run to run: compare within one run.
        with caller.fault("job-stream", delay_s=post_s):
            whole_s, engine_s, chunks = timed()
        assert whole_s - engine_s < 2 * post_s + 1
        assert chunks <= engine_s / post_s + 3
        tokens_count = 384
        assert chunks < tokens_count / 2

    def test_sixteen_at_once(self, caller: Caller) -> None:
        texts = [f"{number}: {LONG_TEXT[:200]}" for number in range(16)]
        jobs = [caller.send("generate", saying(text)) for text in texts]
        until(
            lambda: (
                all(caller.platform.jobs[job.job_id].chunks_received for job in jobs)
                or any(caller.platform.jobs[job.job_id].status.final for job in jobs)
            ),
            60,
        )
        assert [caller.read(job).text for job in jobs] == texts

    def test_the_log_line(self, caller: Caller, worker: RunningWorker) -> None:
        sent = caller.send("generate", tokens(7))
        answered = caller.read(sent)
        line = worker.job_line(sent.job_id)
        assert list(line) == [
            "key",
            "client",
            "route",
            "prompt_tokens",
            "completion_tokens",
            "queue_ms",
            "first_token_ms",
            "total_ms",
            "outcome",
        ]
        assert answered.end.usage is not None
        assert (line["key"], line["client"]) == (caller.key.id, "laptop")
        assert line["route"] == "generate"
        assert int(line["prompt_tokens"]) == answered.end.usage["prompt_tokens"]
        assert int(line["completion_tokens"]) == 7 == answered.end.usage["completion_tokens"]
        assert float(line["queue_ms"]) <= float(line["first_token_ms"])
        assert math.isfinite(float(line["total_ms"]))
        assert line["outcome"] == "done"

    def test_the_log_line_of_what_went_wrong(self, caller: Caller, worker: RunningWorker) -> None:
        rejected = caller.submit({"sealed": "nonsense"})
        assert worker.job_line(rejected)["outcome"] == "rejected"
        sent = caller.send("generate", {"prompt": ""})
        assert worker.job_line(sent.job_id)["outcome"] == "error:400"

    def test_a_chunk_posted_again_is_doubled_and_the_client_copes(
        self, platform: LocalRunpod, caller: Caller, worker: RunningWorker
    ) -> None:
        """A 500 after the chunk arrived: the SDK posts it again."""
        with caller.fault("job-stream", status=500, nth=2, when="after"):
            answered = caller.ask("generate", saying(LONG_TEXT[:60]))
        numbers = [chunk.seq for chunk in answered.opened]
        assert numbers.count(1) == 2
        assert answered.text == LONG_TEXT[:60]
        with caller.fault("job-stream", status=500, nth=2, when="after"):
            assert self.client_text(platform, worker) == LONG_TEXT[:60]

    def test_a_chunk_that_was_dropped_is_missed_and_repaired(
        self, platform: LocalRunpod, caller: Caller, worker: RunningWorker
    ) -> None:
        """A post that is refused: the SDK drops the chunk and completes the job."""
        with caller.fault("job-stream", status=404, nth=2):
            answered = caller.ask("generate", saying(LONG_TEXT[:60]))
        assert answered.status == "COMPLETED"
        assert 1 not in [chunk.seq for chunk in answered.opened]
        assert not answered.complete
        with caller.fault("job-stream", status=404, nth=2):
            assert self.client_text(platform, worker) == LONG_TEXT[:60]

    def test_a_chunk_whose_connection_broke_is_posted_again(self, caller: Caller) -> None:
        with caller.fault("job-stream", reset=True, nth=2):
            answered = caller.ask("generate", saying(LONG_TEXT[:60]))
        assert answered.complete
        assert answered.text == LONG_TEXT[:60]

    def client_text(self, platform: LocalRunpod, worker: RunningWorker) -> str:
        settings = ClientSettings(
            platform.endpoint_id, platform.api_key, key_text(worker), platform.base_url
        )
        with Client(settings) as client:
            choice = {"choice": [LONG_TEXT[:60]]}
            with client.chat("Speak.", stream=True, structured_outputs=choice) as stream:
                return "".join(delta.text for delta in stream)

    def test_a_job_delivered_twice_is_answered_once(
        self, caller: Caller, worker: RunningWorker
    ) -> None:
        with caller.fault("job-take", duplicate=1, nth=1):
            sent = caller.send("generate", saying(LONG_TEXT))
            answered = caller.read(sent)
        assert answered.text == LONG_TEXT
        assert answered.complete


# --- a worker with other settings -----------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[RunningWorker, Caller]]:
    """A worker that serves plaintext, two jobs at a time, one of them in the engine."""
    with (
        LocalRunpod(hold_s=5, stream_hold_s=5) as own,
        RunningWorker(
            own,
            tmp_path_factory.mktemp("narrow"),
            MAX_NUM_SEQS="1",
            MAX_CONCURRENCY="2",
            ALLOW_PLAINTEXT="true",
        ) as worker,
        Caller(own, worker.key) as caller,
    ):
        yield worker.ready(), caller


class TestPlaintextAllowed:
    """The official worker's forms and answers."""

    def test_a_prompt(self, narrow: tuple[RunningWorker, Caller]) -> None:
        _, caller = narrow
        (batch,) = caller.outputs(caller.submit({"prompt": "Hello", "max_tokens": 5}))
        assert batch["usage"] == {"input": 1, "output": 5}
        assert isinstance(batch["choices"][0]["tokens"][0], str)

    def test_messages_streamed(self, narrow: tuple[RunningWorker, Caller]) -> None:
        _, caller = narrow
        given = {**saying("plain to see"), "stream": True}
        batches = caller.outputs(caller.submit(given))
        text = "".join(choice["tokens"][0] for b in batches for choice in b["choices"])
        assert text == "plain to see"
        assert batches[-1]["usage"]["output"] > 0

    def test_a_route(self, narrow: tuple[RunningWorker, Caller]) -> None:
        _, caller = narrow
        (models,) = caller.outputs(caller.submit({"route": "/v1/models", "method": "GET"}))
        assert models["data"][0]["id"] == SERVED

    def test_an_unknown_form(self, narrow: tuple[RunningWorker, Caller]) -> None:
        _, caller = narrow
        job = caller.submit({"surprise": 1})
        assert caller.outputs(job) == []
        error = json.loads(caller.status(job)["error"])["error"]
        assert "has neither `sealed` nor `encrypted_input`" in error["message"]

    def test_the_platforms_openai_route(self, narrow: tuple[RunningWorker, Caller]) -> None:
        _, caller = narrow
        assert caller.http.get("/openai/v1/models").json()["data"][0]["id"] == SERVED
        body: dict[str, Any] = {
            "model": SERVED,
            "messages": [{"role": "user", "content": "Hi"}],
            "structured_outputs": {"choice": ["grün 🌲"]},
        }
        whole = caller.http.post("/openai/v1/chat/completions", json=body).json()
        assert whole["choices"][0]["message"]["content"] == "grün 🌲"
        streamed = caller.http.post("/openai/v1/chat/completions", json={**body, "stream": True})
        *events, done = [line[6:] for line in streamed.text.splitlines() if line]
        assert done == "[DONE]"
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
        assert "".join(delta.get("content") or "" for delta in deltas) == "grün 🌲"
        refused = caller.http.post("/openai/v1/chat/completions", json={**body, "model": "nope"})
        assert "nope" in refused.text

    def test_sealed_still_works(self, narrow: tuple[RunningWorker, Caller]) -> None:
        _, caller = narrow
        assert caller.ask("generate", saying("sealed")).text == "sealed"

    def test_max_concurrency(self, narrow: tuple[RunningWorker, Caller]) -> None:
        _, caller = narrow
        jobs = [caller.send("generate", tokens(100)) for _ in range(4)]
        caller.first_chunk(jobs[0])
        states = [caller.platform.jobs[job.job_id].status for job in jobs]
        assert states.count(Status.IN_PROGRESS) <= 2
        for job in jobs:
            assert caller.read(job).end.usage is not None


class TestCancel:
    """Seen from outside: the only place in the engine is free again at once."""

    def freed(self, narrow: tuple[RunningWorker, Caller], delay_s: float) -> None:
        worker, caller = narrow
        long = caller.send("generate", tokens(1900))
        caller.first_chunk(long)
        caller.platform.faults.add("job-stream", job_id=long.job_id, delay_s=delay_s)
        if delay_s:
            # The next chunk is on its way, and the SDK waits for its answer.
            fault = caller.platform.faults.active[-1]
            until(lambda: fault.seen, 10, "a POST that is held")
        caller.cancel(long.job_id)
        line = worker.job_line(long.job_id)
        caller.platform.faults.clear()
        assert line["outcome"] == "cancelled"
        assert 0 < int(line["completion_tokens"]) < 1900
        began = time.monotonic()
        after = caller.ask("generate", tokens(1))
        assert after.end.usage is not None
        assert time.monotonic() - began < 2.0
        # It was not answered to its end, so the same request may run again.
        again = caller.send("", None, request=long.request)
        caller.first_chunk(again)
        caller.cancel(again.job_id)
        assert worker.job_line(again.job_id)["outcome"] == "cancelled"

    def test_between_chunks(self, narrow: tuple[RunningWorker, Caller]) -> None:
        self.freed(narrow, 0)

    def test_in_the_middle_of_a_post(self, narrow: tuple[RunningWorker, Caller]) -> None:
        self.freed(narrow, 30)

    def test_an_openai_route_that_is_not_streamed(
        self, narrow: tuple[RunningWorker, Caller]
    ) -> None:
        worker, caller = narrow
        body = {
            "model": SERVED,
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 1900,
            "ignore_eos": True,
        }
        long = caller.send(CHAT, body)
        until(lambda: caller.platform.jobs[long.job_id].status == "IN_PROGRESS", 10)
        other = caller.send("generate", tokens(1))  # waits for the only place
        until(lambda: caller.platform.jobs[other.job_id].status == "IN_PROGRESS", 10)
        caller.cancel(long.job_id)
        assert worker.job_line(long.job_id)["outcome"] == "cancelled"
        assert caller.read(other, 10).end.usage is not None


def test_sigterm_lets_running_jobs_finish_and_leaves_no_process(
    narrow: tuple[RunningWorker, Caller],
) -> None:
    """Last of this worker's tests: it ends it."""
    worker, caller = narrow
    jobs = [caller.send("generate", saying(LONG_TEXT)) for _ in range(2)]
    caller.first_chunk(jobs[0])
    assert len(worker.processes()) >= 3
    shared = worker.shared_memory()
    assert shared
    code = worker.stop(90)
    assert [caller.read(job).text for job in jobs] == [LONG_TEXT] * 2
    assert code == 0
    until(lambda: not worker.processes(), 5, "all its processes are gone")
    assert not any(Path(path).exists() for path in shared)


def test_death_of_an_idle_engine_ends_the_worker(
    platform: LocalRunpod, worker: RunningWorker, caller: Caller
) -> None:
    """Last of this worker's tests."""
    worker.kill_child()
    killed = time.monotonic()
    assert worker.process.wait(15) == 1
    assert time.monotonic() - killed < 10
    late = caller.send("generate", saying("x"))
    assert platform.jobs[late.job_id].status is Status.IN_QUEUE
    until(lambda: not worker.processes(), 10, "all its processes are gone")


# --- a start that cannot work ---------------------------------------------------------------

SECRET = "c2VjcmV0LXRoYXQtbXVzdC1ub3QtYmUtc2hvd24tYQ=="


@pytest.fixture(scope="module")
def failed_starts(
    platform: LocalRunpod, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, str]]:
    """Every start that cannot work, side by side: exit code and output."""
    good = {"MODELS": str(MODEL), "ENCRYPTION_KEY": generate_key(), "HF_TOKEN": "hf_" + SECRET}
    starts: dict[str, dict[str, str]] = {
        "nothing set": {"MODELS": "", "ENCRYPTION_KEY": ""},
        "everything wrong": {
            "ENCRYPTION_KEY": SECRET[:-1] + "!",
            "MODELS": "",
            "MAX_CONCURRENCY": "lots",
            "MAX_MODEL_LEN": "long",
            "MAX_MODEL_LENGTH": "5",
            "ENABLE_LOG_REQUESTS": "true",
        },
        "no such folder": {"MODELS": "/no/such/model"},
        "more context than the model has": {"MAX_MODEL_LEN": "999999"},
    }
    running = {}
    for name, settings in starts.items():
        env = {**os.environ, **platform.worker_env("failing"), **good, **settings}
        running[name] = subprocess.Popen(
            [sys.executable, str(ROOT / "rp_handler.py")],
            env=env,
            cwd=tmp_path_factory.mktemp("cwd"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    told = {}
    for name, process in running.items():
        output, _ = process.communicate(timeout=240)
        told[name] = process.returncode, output
    return told


Failed = dict[str, tuple[int, str]]


def test_every_start_that_cannot_work_ends_with_1_and_shows_no_secret(
    failed_starts: Failed,
) -> None:
    for code, output in failed_starts.values():
        assert code == 1, output
        assert output.count("the worker cannot start") == 1
        assert "Traceback" not in output
        assert SECRET[:20] not in output


def test_a_start_names_every_fault_at_once(failed_starts: Failed) -> None:
    def faults(name: str) -> list[str]:
        _, _, told = failed_starts[name][1].partition("the worker cannot start:\n")
        return [line for line in told.splitlines() if line.startswith("- ")]

    assert [fault.split()[1] for fault in faults("nothing set")] == ["MODELS", "ENCRYPTION_KEY"]
    wrong = "\n".join(faults("everything wrong"))
    for part in (
        "MODELS is not set",
        "MAX_CONCURRENCY is not a whole number",
        "MAX_MODEL_LENGTH is not a setting: did you mean MAX_MODEL_LEN?",
        "MAX_MODEL_LEN ",
        "ENABLE_LOG_REQUESTS is not available",
        "the encryption key ",
    ):
        assert part in wrong
    assert "/no/such/model" in failed_starts["no such folder"][1]
    assert "max_model_len" in failed_starts["more context than the model has"][1].lower()
