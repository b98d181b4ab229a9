"""The families of errors: what a caller can do about a failure. `smeltkit.errors` holds the leaves.

SmeltError
|-- InvalidInput        the request or a file is wrong           INVALID_ARGUMENT    400  exit 2
|-- NotFound            nothing has this name or digest          NOT_FOUND           404  exit 3
|-- Conflict            someone else changed or holds it         ALREADY_EXISTS      409  exit 4
|-- Refused             right request, wrong state of the world  FAILED_PRECONDITION 422  exit 1
|-- Denied              not allowed                              PERMISSION_DENIED   403  exit 6
|-- Unauthenticated     no or wrong credentials                  UNAUTHENTICATED     401  exit 6
|-- Exhausted           a bound is reached, try later            RESOURCE_EXHAUSTED  429  exit 5
|-- Unavailable         a component is not there, try later      UNAVAILABLE         503  exit 5
|-- DeadlineExceeded    the time given was not enough            DEADLINE_EXCEEDED   504  exit 7
|-- DataLoss            stored bytes are not what was stored     DATA_LOSS           500  exit 1
|-- Unimplemented       not built in this release                UNIMPLEMENTED       501  exit 1
`-- Internal            our mistake                              INTERNAL            500  exit 1
"""

from __future__ import annotations

import re
from typing import ClassVar


class SmeltError(Exception):
    """Base of the tree. `str(error)` is the message for people; `reason` is the stable name for machines."""

    grpc_status: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, details: dict[str, str] | None = None, retry_after_s: float | None = None):
        super().__init__(message)
        self.message = message
        self.details: dict[str, str] = dict(details or {})
        self.retry_after_s = retry_after_s

    @classmethod
    def reason(cls) -> str:
        """The stable name of this error, derived from its class: `UnknownModel` is `UNKNOWN_MODEL`."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).upper()


class InvalidInput(SmeltError):
    """The request, a setting or a file is wrong; sending it again cannot help."""

    grpc_status, http_status, exit_code = "INVALID_ARGUMENT", 400, 2


class NotFound(SmeltError):
    """Nothing has this name, id or digest."""

    grpc_status, http_status, exit_code = "NOT_FOUND", 404, 3


class Conflict(SmeltError):
    """Somebody else changed or holds what was to be changed."""

    grpc_status, http_status, exit_code = "ALREADY_EXISTS", 409, 4


class Refused(SmeltError):
    """The request is well formed, but the state of the world forbids it."""

    grpc_status, http_status, exit_code = "FAILED_PRECONDITION", 422, 1


class Denied(SmeltError):
    """The caller may not do this."""

    grpc_status, http_status, exit_code = "PERMISSION_DENIED", 403, 6


class Unauthenticated(SmeltError):
    """No credentials, or wrong ones."""

    grpc_status, http_status, exit_code = "UNAUTHENTICATED", 401, 6


class Exhausted(SmeltError):
    """A bound is reached; the same request may pass later."""

    grpc_status, http_status, exit_code, retryable = "RESOURCE_EXHAUSTED", 429, 5, True


class Unavailable(SmeltError):
    """A component does not answer; the same request may pass later."""

    grpc_status, http_status, exit_code, retryable = "UNAVAILABLE", 503, 5, True


class DeadlineExceeded(SmeltError):
    """The time the caller gave was not enough."""

    grpc_status, http_status, exit_code = "DEADLINE_EXCEEDED", 504, 7


class DataLoss(SmeltError):
    """Stored bytes are missing or are not the bytes that were stored."""

    grpc_status, http_status, exit_code = "DATA_LOSS", 500, 1


class Unimplemented(SmeltError):
    """This release does not do that yet."""

    grpc_status, http_status, exit_code = "UNIMPLEMENTED", 501, 1


class Internal(SmeltError):
    """Our mistake: the message carries a correlation id and nothing from inside."""


def all_errors() -> dict[str, type[SmeltError]]:
    """Reason to class for every class of the tree, families included."""
    found: dict[str, type[SmeltError]] = {}
    queue: list[type[SmeltError]] = [SmeltError]
    while queue:
        cls = queue.pop()
        found[cls.reason()] = cls
        queue.extend(cls.__subclasses__())
    return found
