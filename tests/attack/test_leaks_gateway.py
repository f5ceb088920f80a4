"""Nothing of what goes through the gateway is in what it writes, counts, shows or sends on."""

from pathlib import Path

import pytest

from tests.attack import doors
from tests.attack.canaries import Words, search
from tests.claims import Trials
from tests.echo import Echo
from tests.gateways import RunningGateway

PAGES = ("/metrics", "/health", "/ready", "/api/status", "/", "/v1/models")


@pytest.mark.claim(
    "leaks.gateway",
    "Nothing of what goes through the gateway is in what it logs, counts, shows or sends on.",
)
def test_nothing_is_found_of_what_went_through_the_gateway(tmp_path: Path, claim: Trials) -> None:
    word = Words()
    folder = tmp_path / "gateway"
    with Echo(tmp_path) as echo, RunningGateway(echo.environ, folder, LOG_LEVEL="DEBUG") as gateway:
        http = gateway.http
        asked = [*doors.answered(word, "gate"), *doors.refused(word, "gate")]
        answers = [http.post(route, json=body) for route, body in asked if route == doors.CHAT]
        wrong = word("gate wrong")
        answers += [
            http.post(doors.CHAT, content=f'{{"{wrong}'),
            http.post(f"/v1/{wrong}", json={wrong: wrong}),
            http.get("/v1/models/" + word.name("gate model")),
            http.post("/v1/audio/speech", json={"input": word("gate speech")}),
        ]
        # The echo is the model's answer.
        assert answers[1].json()["echo"] == word("gate prompt")
        assert sum(answer.status_code >= 400 for answer in answers) >= 3
        sources = {f"page {path}": http.get(path).content for path in PAGES}
        assert b"gateway_requests" in sources["page /metrics"]
        for path in folder.rglob("*"):
            sources[f"name of {path}"] = str(path).encode()
            if path.is_file():
                sources[f"file {path}"] = path.read_bytes()
        process = Path(f"/proc/{gateway.process.pid}")
        sources |= {name: (process / name).read_bytes() for name in ("cmdline", "environ")}
        sources["carried"] = echo.carried
    words = word.of("gate")
    hits = search(words, sources)
    claim.trials(len(words), len({hit.word for hit in hits}))
    claim.detail(f"{len(words)} canaries" if not hits else str({hit.source for hit in hits}))
    # The search finds a canary where the gateway's reader has it.
    assert search(words, {"answer": answers[1].content})
