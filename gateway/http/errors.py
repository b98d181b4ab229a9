"""Errors at the HTTP border: OpenAI's body, the status of the error tree, and how long to wait."""

from __future__ import annotations

import math

from starlette.responses import Response

from gateway.http.replies import ErrorBody, ErrorDetail
from smeltkit.errors import SmeltError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def to_body(error: SmeltError) -> ErrorBody:
    """The body that tells of `error`."""
    kind = _TYPES.get(error.http_status, "invalid_request_error" if error.http_status < 500 else "server_error")
    detail = ErrorDetail(message=error.message, type=kind, param=error.details.get("field"), code=error.reason())
    return ErrorBody(error=detail)


def to_response(error: SmeltError) -> Response:
    """The whole answer; an error that may pass later says when to try again, at least a second from now."""
    headers = {}
    if error.retryable or error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 1)))
    if error.http_status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(to_body(error).to_json(), error.http_status, headers, media_type="application/json")
