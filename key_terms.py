"""What goes with a key in ENCRYPTION_KEY: from when to when it is good, and what it may ask for.

Owns the options' names, form and faults. Knows no key: what it is given to read holds none, and
because a typing error could put one there, it never quotes what it reads.
"""

import difflib
import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class KeyTerms:
    """The terms of one key; without any it is good for ever and for everything."""

    begins_at: float = -math.inf
    """The first moment at which the key is good, in Unix time."""
    ends_at: float = math.inf
    """The first moment at which it no longer is."""
    revoked: bool = False
    max_in_flight: int | None = None
    max_tokens_per_minute: int | None = None

    def good_at(self, now: float) -> bool:
        """Whether a request under this key may be taken at that moment."""
        return not self.revoked and self.begins_at <= now < self.ends_at

    def over_at(self, now: float) -> bool:
        """Whether the key is not good at that moment and will not be again."""
        return self.revoked or self.ends_at <= now

    def words(self, now: float) -> list[str]:
        """Return what there is to say of these terms, for a log."""
        said = []
        if self.revoked:
            said.append(REVOKED)
        if self.begins_at > -math.inf:
            said.append(f"good from {_utc(self.begins_at)}")
        if self.ends_at < math.inf:
            said.append(f"{'ended' if self.ends_at <= now else 'good until'} {_utc(self.ends_at)}")
        if self.max_in_flight is not None:
            said.append(f"max_in_flight {self.max_in_flight}")
        if self.max_tokens_per_minute is not None:
            said.append(f"max_tokens_per_minute {self.max_tokens_per_minute}")
        return said


NO_TERMS = KeyTerms()


def _utc(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))


def parse_terms(options: Iterable[str]) -> tuple[KeyTerms, list[str]]:
    """Read options such as `not_after=2027-01-01`; faults finish the sentence "the key …"."""
    values: dict[str, float | int | bool] = {}
    faults: list[str] = []
    seen: set[str] = set()
    for number, option in enumerate(options, 1):
        name, equals, text = (part.strip() for part in option.partition("="))
        if name not in _OPTIONS:
            faults.append(f"has an option (number {number}) that does not exist{_hint(name)}")
        elif name in seen:
            faults.append(f"has {name} twice")
        elif bool(equals) == (name == REVOKED):
            faults.append(f"has {name} {'with' if equals else 'without'} a value")
        else:
            attribute, parse = _OPTIONS[name]
            try:
                values[attribute] = parse(text)
            except ValueError as error:
                faults.append(f"has {name}, which {error}")
        seen.add(name)
    if values.get("begins_at", -math.inf) >= values.get("ends_at", math.inf):
        faults.append("has a not_before that is not before its not_after")
    return (NO_TERMS if faults else KeyTerms(**values)), faults  # type: ignore[arg-type]


def _hint(name: str) -> str:
    if not name:
        return ": there is a ; too many"
    if close := difflib.get_close_matches(name.lower().replace("-", "_"), _OPTIONS, 1, 0.6):
        return f": did you mean {close[0]}?"
    known = ", ".join(_OPTIONS)
    return f": there are {known}; a comma, not a semicolon, stands between two keys"


def _limit(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise ValueError("is not a whole number from 1 to 999999999")
    return int(text)


def _revoked(_: str) -> bool:
    return True


def _begin(text: str) -> float:
    return _moment(text)[0]


def _end(text: str) -> float:
    return _moment(text)[1]


def _moment(text: str) -> tuple[float, float]:
    """Return when a day in UTC begins and ends; of a time, which is no day, twice that moment."""
    try:
        # Python would also read 20270101 and 2027-W01.
        if len(text) == len("2027-01-01") and text.count("-") == 2:
            day = datetime.combine(date.fromisoformat(text), datetime.min.time(), UTC)
            return day.timestamp(), (day + timedelta(days=1)).timestamp()
        moment = datetime.fromisoformat(text)
        if "T" in text and moment.tzinfo is not None:
            return moment.timestamp(), moment.timestamp()
    except (ValueError, OverflowError):
        pass
    raise ValueError("is neither a day like 2027-01-31 nor a time like 2027-01-31T18:00Z")


_OPTIONS: dict[str, tuple[str, Callable[[str], float | int | bool]]] = {
    "not_before": ("begins_at", _begin),
    "not_after": ("ends_at", _end),
    "max_in_flight": ("max_in_flight", _limit),
    "max_tokens_per_minute": ("max_tokens_per_minute", _limit),
    REVOKED: ("revoked", _revoked),
}
