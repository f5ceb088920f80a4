"""The stage that the tests of this folder share: starting one takes most of a minute."""

from collections.abc import Iterator

import pytest

from tests.conformance.stage import Stage, staged
from tests.workers import ROOT

TALKER = ROOT / "models" / "tiny-talker"


@pytest.fixture(scope="package")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A stage with a model that chats."""
    with staged(
        tmp_path_factory.mktemp("chat"),
        MODELS=str(TALKER),
        DTYPE="float32",
        ENABLE_AUTO_TOOL_CHOICE="true",
        TOOL_CALL_PARSER="hermes",
        # A model that talks nonsense keeps to a tool's parameters only where it has to.
        TOOL_STRICT_LEVEL="parameter",
        STRUCTURED_OUTPUTS_CONFIG='{"backend":"xgrammar","disable_any_whitespace":true}',
        MAX_NUM_SEQS="64",
    ) as stage:
        yield stage
