"""What the gateway counts: Prometheus metrics and the recent requests, never content.

Owns names and labels of the metrics. Labels come from closed sets, so that nobody
can fill the memory, or write into it, by asking for invented paths.
"""

import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
RECENT = 50

GONE = 499
"""The status of a request whose client did not wait for the end of its answer."""

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True, slots=True)
class Recent:
    """A request that is over; `first_ms` is the time to the first byte of the answer's body."""

    time: float
    """When it came, in Unix seconds."""
    route: str
    status: int
    first_ms: float
    total_ms: float
    tokens: int | None
    """Generated tokens, where the worker told."""


class Metrics:
    """The counters of one gateway."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._recent: deque[Recent] = deque(maxlen=RECENT)

        def told(kind: type[Any], name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(f"gateway_{name}", text, labels, registry=self._registry, **options)

        self._requests: Counter = told(
            Counter, "requests", "Requests that are over.", "route", "status"
        )
        self._running: Gauge = told(Gauge, "requests_running", "Requests being served.")
        self._gone: Counter = told(Counter, "clients_gone", "Clients that left before the end.")
        self._first: Histogram = told(
            Histogram,
            "first_byte_seconds",
            "Until the first byte of an answer.",
            "route",
            buckets=_SECONDS,
        )
        self._total: Histogram = told(
            Histogram,
            "request_seconds",
            "Until the end of an answer.",
            "route",
            buckets=_SECONDS,
        )
        self._received: Counter = told(
            Counter, "received_bytes", "Bytes of bodies from local clients."
        )
        self._sent: Counter = told(Counter, "sent_bytes", "Bytes of bodies to local clients.")
        self._tokens: Counter = told(Counter, "tokens", "Tokens that workers counted.", "kind")

    def begin(self, route: str, received_bytes: int) -> "Measured":
        """Return the measuring of a request that has come."""
        self._running.inc()
        self._received.inc(received_bytes)
        return Measured(self, route)

    def recent(self) -> list[dict[str, Any]]:
        """Return the last requests, the newest first."""
        return [asdict(one) for one in reversed(self._recent)]

    def text(self) -> bytes:
        """Return everything in Prometheus's text form."""
        return generate_latest(self._registry)

    def _end(self, one: Recent, sent_bytes: int, usage: dict[str, Any], gone: bool) -> None:
        self._running.dec()
        self._requests.labels(one.route, str(one.status)).inc()
        self._sent.inc(sent_bytes)
        self._total.labels(one.route).observe(one.total_ms / 1000)
        self._first.labels(one.route).observe(one.first_ms / 1000)
        for kind in ("prompt", "completion"):
            if isinstance(count := usage.get(f"{kind}_tokens"), int):
                self._tokens.labels(kind).inc(count)
        if gone:
            self._gone.inc()
        self._recent.append(one)


class Measured:
    """One request while it is served."""

    def __init__(self, metrics: Metrics, route: str) -> None:
        self._metrics = metrics
        self._route = route
        self._came = time.time()
        self._started_s = time.perf_counter()
        self._first_ms: float | None = None
        self._sent_bytes = 0
        self.status = GONE
        """The answer's; GONE while there is none."""
        self.usage: dict[str, Any] = {}

    def sent(self, size_bytes: int) -> None:
        """Count a part of the answer's body."""
        if self._first_ms is None:
            self._first_ms = self._elapsed_ms()
        self._sent_bytes += size_bytes

    def end(self, *, gone: bool) -> None:
        """Count the request; `gone` if its client did not wait for the end."""
        total_ms = self._elapsed_ms()
        first_ms = total_ms if self._first_ms is None else self._first_ms
        tokens = self.usage.get("completion_tokens")
        status = GONE if gone else self.status
        one = Recent(self._came, self._route, status, first_ms, total_ms, tokens)
        self._metrics._end(one, self._sent_bytes, self.usage, gone)

    def _elapsed_ms(self) -> float:
        return round(1000 * (time.perf_counter() - self._started_s), 1)
