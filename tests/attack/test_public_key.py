"""Public-key mode: what stays closed when keys leak later, and that it cannot be talked out of.

The attacks are the checks of tests/test_hpke.py, each with the copies it succeeds against.
"""

from collections.abc import Sequence

import pytest

from tests import promises, test_hpke
from tests.claims import Trials

LEAKS = (
    "requests_survive_a_leak_of_the_shared_key",
    "requests_survive_a_leak_of_the_private_key",
    "answers_survive_a_leak_of_both",
    "one_time_keys_are_used_once",
)
DOWNGRADES = (
    "no_downgrade_of_requests",
    "no_downgrade_of_the_simple_form",
    "no_downgrade_of_answers",
    "a_client_never_sends_without",
)
REJECTIONS = ("envelope_bits", "one_rejection", "same_work")


def attack(
    names: Sequence[str], claim: Trials, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for weakened, (check, *_) in test_hpke.WEAKENED.items():
        if check in names:
            with monkeypatch.context() as patch:
                test_hpke.test_a_weakened_copy_breaks_the_promise(weakened, patch)
    for _ in range(rounds):
        for name in names:
            promises.run(test_hpke.CHECKS[name], monkeypatch)
            claim.trial(True)


@pytest.mark.claim(
    "public_key.leaks",
    "In public-key mode, what was recorded stays closed when keys leak later: requests when the "
    "shared key or the worker's private key does, answers even when both do.",
)
def test_leaks(claim: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    attack(LEAKS, claim, claim.count(short=2, full=250), monkeypatch)


@pytest.mark.claim(
    "public_key.downgrade",
    "A worker with a private key takes nothing without an envelope, in either form; a client with "
    "a public key sends nothing without one, and takes no answer that its one-time key does not "
    "open.",
)
def test_downgrades(claim: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    attack(DOWNGRADES, claim, claim.count(short=2, full=250), monkeypatch)


@pytest.mark.claim(
    "public_key.rejection",
    "Whatever is wrong with an envelope or in it, the rejection is one, after the same number of "
    "decapsulations and of bytes authenticated.",
)
def test_rejections(claim: Trials, monkeypatch: pytest.MonkeyPatch) -> None:
    attack(REJECTIONS, claim, claim.count(short=1, full=50), monkeypatch)
