"""Errors at the HTTP border keep status, reason and the time to wait of the error tree."""

from __future__ import annotations

import json

import pytest

from gateway.http.errors import to_response
from smeltkit.errors import SmeltError, TooManyRequests, all_errors


@pytest.mark.parametrize("reason", sorted(all_errors()))
def test_every_error_has_its_status_and_its_reason_as_code(reason: str) -> None:
    error: SmeltError = all_errors()[reason]("message", details={"field": "model"})
    response = to_response(error)
    body = json.loads(bytes(response.body))
    assert response.status_code == error.http_status
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["code"], body["error"]["param"]) == (reason, "model")
    assert ("retry-after" in response.headers) == error.retryable


@pytest.mark.parametrize(("wait_s", "header"), [(None, "1"), (0.2, "1"), (6.2, "7"), (30.0, "30")])
def test_time_to_wait_is_in_whole_seconds(wait_s: float | None, header: str) -> None:
    assert to_response(TooManyRequests("full", retry_after_s=wait_s)).headers["retry-after"] == header
