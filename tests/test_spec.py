"""SPEC.md: the sections that code cites exist, and its numbers are the code's."""

import re
from pathlib import Path

import pytest

import crypto
import fernets
import keys
import protocol
from crypto import AnswerSealer, new_request, seal_request
from errors import Rejected, RequestError
from frames import MAX_TEMPLATES
from keys import Key, generate_key

ROOT = Path(protocol.__file__).parent
SPEC = (ROOT / "SPEC.md").read_text(encoding="utf-8")
SECTIONS = set(re.findall(r"^#{2,3} (\d+(?:\.\d+)?)", SPEC, re.MULTILINE))
SOURCES = sorted(path for folder in (".", "tools", "tests") for path in ROOT.glob(f"{folder}/*.py"))

# "SPEC section 3", "SPEC.md sections 2 to 5, 7 and 9", also across a line break.
CITATION = re.compile(r"SPEC(?:\.md)?,?\s+sections?\s+(\d[\d.]*\d|\d)((?:,| and| to|\s|\d|\.\d)*)")


def cited(text: str) -> set[str]:
    return {
        number
        for match in CITATION.finditer(text)
        for number in re.findall(r"\d+(?:\.\d+)?", match[1] + match[2])
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_cited_sections_exist(path: Path) -> None:
    assert cited(path.read_text(encoding="utf-8")) <= SECTIONS


def test_the_search_finds_citations() -> None:
    found = cited("SPEC section 3; SPEC.md sections 2 to 5, 7 and 8.1).")
    assert found == {"2", "3", "5", "7", "8.1"}
    assert not cited("SPEC " + "section 99") <= SECTIONS
    for module in (crypto, fernets, keys, protocol):
        assert cited(Path(str(module.__file__)).read_text(encoding="utf-8"))


def test_sections_are_numbered_without_gaps_and_cited_within() -> None:
    top = [int(number) for number in re.findall(r"^## (\d+)\.", SPEC, re.MULTILINE)]
    assert top == list(range(1, len(top) + 1))
    assert set(re.findall(r"\bsections? (\d+(?:\.\d+)?)", SPEC)) <= SECTIONS


def test_numbers_in_the_text_are_the_codes() -> None:
    key = Key.parse(generate_key())
    request = new_request("worker", None, audience="a", ttl_s=1, method="GET")
    [chunk] = AnswerSealer(request, key).seal(b"")
    for number in (
        protocol.MAX_REQUEST_BYTES,
        protocol.MAX_CHUNK_BYTES,
        len(chunk),
        len(seal_request(request, key)),
        protocol.CELL_BYTES - crypto._CHUNK_HEADER.size,
        crypto.MAX_PAYLOAD_BYTES,
        crypto._CHUNK_PREFIX_CHARS + crypto._MAX_CIPHERTEXT_CHARS,
    ):
        assert f"{number:,}" in SPEC
    assert f"at most {protocol.MAX_DEPTH} deep" in SPEC
    assert f"more than {MAX_TEMPLATES} templates" in SPEC
    assert f"Default skew: {protocol.CLOCK_SKEW_S} s." in SPEC
    assert f"Default longest life: {protocol.MAX_TTL_S // 3600} h." in SPEC
    assert f"begins with `{fernets.TIME_ZERO}`" in SPEC
    assert f"`{Rejected.TEXT}`" in SPEC


def test_the_largest_request_is_what_the_text_says() -> None:
    key = Key.parse(generate_key())
    found = re.search(r"a JSON of at most\s+([\d,]+) bytes", SPEC)
    assert found
    largest = int(found[1].replace(",", ""))
    body = b'{"prompt":"%s"}' % (b"x" * 1000)
    request = new_request("generate", body, audience="a", ttl_s=1)
    room = largest - len(request.encode())
    for more, fits in ((room, True), (room + 1, False)):
        body = b'{"prompt":"%s"}' % (b"x" * (1000 + more))
        request = new_request("generate", body, audience="a", ttl_s=1)
        if fits:
            assert len(seal_request(request, key)) <= protocol.MAX_REQUEST_BYTES
        else:
            with pytest.raises(RequestError, match="too large"):
                seal_request(request, key)


def test_tables_list_the_members_that_code_has() -> None:
    for name in protocol.Request.__struct_fields__:
        assert f"`{name}`" in SPEC
    section = SPEC.partition("### 8.1")[2].partition("### 8.2")[0]
    for name in protocol.GenerateBody.__struct_fields__:
        assert f"`{name}`" in section
