"""What every attack has in common: it is shown to succeed before it is shown to fail."""

from collections.abc import Awaitable, Callable

import pytest

from tests.attack.hostile import ANSWER, World
from tests.attack.weakened import Weakening
from tests.claims import Trials

Tried = tuple[int, int]
"""How often something was tried, and how often it succeeded for the attacker."""

Shown = Callable[[Callable[[], Awaitable[Tried]], Weakening], Awaitable[None]]


@pytest.fixture(params=["shared key", "public key"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test without and with public-key mode."""
    monkeypatch.setattr(World, "public_key_mode", request.param == "public key")
    return str(request.param)


@pytest.fixture
def shown(claim: Trials, monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Run an attack on a weakened copy, where it has to succeed, and count what it does to ours."""

    async def show(attack: Callable[[], Awaitable[Tried]], weakening: Weakening) -> None:
        with monkeypatch.context() as patch:
            weakening(patch)
            patch.setattr(World, "weakened", True)
            honest = await World().ask(ANSWER, streamed=True)
            assert honest.text == ANSWER, "the weakened copy does not work at all"
            tried, succeeded = await attack()
            assert succeeded, f"{weakening.__name__} withstood all {tried} trials"
        claim.trials(*await attack())

    return show
