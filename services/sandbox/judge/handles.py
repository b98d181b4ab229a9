"""Stand-ins in the judge for the candidate's functions and objects.

Calls, attributes, items, length, iteration, truth and text are asked of the candidate and come back as plain data.
Equality is the identity of the stand-in, hash is its own, and order and arithmetic raise TypeError: an object that
claims to equal everything, or sorts as it likes, has no say here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

Request = Callable[..., Any]
T = TypeVar("T")
_REMOTE_DUNDERS: Final = frozenset(("__name__", "__qualname__", "__doc__", "__annotations__"))


class Handle:
    """An object of the candidate."""

    __slots__ = ("_Handle__kind", "_Handle__number", "_Handle__request", "__weakref__")

    def __init__(self, request: Request, number: int, kind: str) -> None:
        object.__setattr__(self, "_Handle__request", request)
        object.__setattr__(self, "_Handle__number", number)
        object.__setattr__(self, "_Handle__kind", kind)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in _REMOTE_DUNDERS:
            raise AttributeError(name)
        return _ask(self, "get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "set", name, value)

    def __delattr__(self, name: str) -> None:
        _ask(self, "delete", name)

    def __getitem__(self, key: Any) -> Any:
        return _ask(self, "item", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask(self, "set_item", key, value)

    def __delitem__(self, key: Any) -> None:
        _ask(self, "delete_item", key)

    def __contains__(self, item: Any) -> bool:
        return _ask(self, "contains", item) is True

    def __len__(self) -> int:
        return _exactly(int, _ask(self, "len"))

    def __bool__(self) -> bool:
        return _exactly(bool, _ask(self, "bool"))

    def __str__(self) -> str:
        return _exactly(str, _ask(self, "str"))

    def __repr__(self) -> str:
        return _exactly(str, _ask(self, "repr"))

    def __iter__(self) -> Any:
        return iter(_ask(self, "iter"))

    def __enter__(self) -> Any:
        return _ask(self, "enter")

    def __exit__(self, *error: object) -> None:
        _ask(self, "exit")

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Handle) and _ask(self, "is_instance", value) is True


class CallableHandle(Handle):
    """A function or class of the candidate."""

    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request: Request = object.__getattribute__(self, "_Handle__request")
        return request("call", object.__getattribute__(self, "_Handle__number"), args, kwargs)


class IteratorHandle(Handle):
    """A generator or iterator of the candidate, pulled one item at a time."""

    __slots__ = ()

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return _ask(self, "next")


_KINDS: Final = {"o": Handle, "c": CallableHandle, "i": IteratorHandle}


def make_handle(request: Request, number: int, kind: object, class_name: str) -> Handle:
    """A stand-in of the kind that the candidate declares."""
    return _KINDS.get(kind if isinstance(kind, str) else "o", Handle)(request, number, class_name)


def handle_number(handle: Handle) -> int:
    """The candidate's number of the object behind `handle`."""
    return int(object.__getattribute__(handle, "_Handle__number"))


def _ask(handle: Handle, operation: str, *args: Any) -> Any:
    request: Request = object.__getattribute__(handle, "_Handle__request")
    return request(operation, object.__getattribute__(handle, "_Handle__number"), args)


def _exactly(kind: type[T], value: Any) -> T:
    if type(value) is kind:
        return value
    raise TypeError(f"the candidate answered with {type(value).__name__} instead of {kind.__name__}")
