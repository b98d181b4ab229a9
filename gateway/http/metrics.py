"""Counts of the edge in the text format of Prometheus: requests, their duration, tokens.

Labels take few values (route templates, never paths), and there is no time series a model or a key.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from typing import Final

BUCKETS_S: Final = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, math.inf)
MEDIA_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The counts of one process. Used on one event loop."""

    def __init__(self) -> None:
        self.in_flight = 0
        """Requests being answered."""
        self._requests: Counter[tuple[str, int]] = Counter()
        self._buckets: Counter[tuple[str, float]] = Counter()
        self._seconds: dict[str, float] = {}
        self._tokens: Counter[str] = Counter()

    def count_request(self, route: str, status: int, duration_s: float) -> None:
        """A request ended with `status`, 499 if the client left first."""
        self._requests[route, status] += 1
        self._buckets[route, BUCKETS_S[bisect_left(BUCKETS_S, duration_s)]] += 1
        self._seconds[route] = self._seconds.get(route, 0.0) + duration_s

    def count_tokens(self, prompt: int, completion: int) -> None:
        """A completion ended, or was cut, after so many tokens."""
        self._tokens["prompt"] += prompt
        self._tokens["completion"] += completion

    def render(self) -> str:
        """All counts as text."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield "# HELP smelt_http_requests_total Requests answered, by route and status (499: the client left)."
        yield "# TYPE smelt_http_requests_total counter"
        for (route, status), count in sorted(self._requests.items()):
            yield f'smelt_http_requests_total{{route="{route}",status="{status}"}} {count}'
        yield "# HELP smelt_http_requests_in_flight Requests being answered."
        yield "# TYPE smelt_http_requests_in_flight gauge"
        yield f"smelt_http_requests_in_flight {self.in_flight}"
        yield "# HELP smelt_http_request_duration_seconds Time from arrival to the last byte."
        yield "# TYPE smelt_http_request_duration_seconds histogram"
        for route in sorted(self._seconds):
            yield from self._histogram(route)
        yield "# HELP smelt_http_tokens_total Tokens read and generated for clients of the edge."
        yield "# TYPE smelt_http_tokens_total counter"
        for kind in ("completion", "prompt"):
            yield f'smelt_http_tokens_total{{kind="{kind}"}} {self._tokens[kind]}'

    def _histogram(self, route: str) -> Iterator[str]:
        total = 0
        for bound in BUCKETS_S:
            total += self._buckets[route, bound]
            shown = "+Inf" if bound == math.inf else f"{bound:g}"
            yield f'smelt_http_request_duration_seconds_bucket{{route="{route}",le="{shown}"}} {total}'
        yield f'smelt_http_request_duration_seconds_sum{{route="{route}"}} {self._seconds[route]:.6f}'
        yield f'smelt_http_request_duration_seconds_count{{route="{route}"}} {total}'
