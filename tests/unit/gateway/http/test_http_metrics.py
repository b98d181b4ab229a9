"""The text of the metrics is what Prometheus reads."""

from __future__ import annotations

import re

from gateway.http.metrics import Metrics

_SAMPLE = re.compile(r'[a-z_]+(\{[a-z]+="[^"\n]*"(,[a-z]+="[^"\n]*")*\})? [0-9.e+-]+')


def test_buckets_add_up_and_end_at_infinity() -> None:
    counts = Metrics()
    for seconds in (0.001, 0.2, 7, 1e6):
        counts.count_request("/v1/models", 200, seconds)
    lines = [line for line in counts.render().splitlines() if "_bucket" in line]
    values = [int(line.rpartition(" ")[2]) for line in lines]
    assert values == sorted(values)
    assert values[0] == 1 and values[-1] == 4 and 'le="+Inf"' in lines[-1]


def test_every_line_is_a_sample_or_a_comment() -> None:
    counts = Metrics()
    counts.count_request("/v1/models", 200, 0.1)
    counts.count_tokens(3, 4)
    text = counts.render()
    assert text.endswith("\n")
    for line in text.splitlines():
        assert line.startswith("# ") or _SAMPLE.fullmatch(line), line
