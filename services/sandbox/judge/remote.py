"""The judge's end of the channel: one request, one reply, everything checked.

What the candidate can do from its side is answer a call with a plain value, raise an ordinary exception, or call back a
function that it was given. Anything else ends the verdict at once through `end`, which never returns, so that no
`except` or loop in a test can swallow it.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn, Protocol

from services.sandbox.judge.handles import Handle, handle_number, make_handle
from services.sandbox.wire.decode import JSON_SCALARS, Decoder, MalformedValue, replace_content
from services.sandbox.wire.encode import CannotCross, Encoder
from services.sandbox.wire.frames import Channel, ChannelClosed, FrameTooLarge, MalformedFrame

CALLS_MAX: Final = 1 << 20
TEXT_MAX_CHARS: Final = 500
_GROUP_BYTES: Final = 1 << 14
"""Arguments that are sent ahead in one frame: far below a socket's buffer, and so that replies need not wait."""
_MARK: Final = "__raised_by_candidate__"


class End(Protocol):
    """Sends the verdict and ends the process."""

    def __call__(self, verdict: str, detail: str) -> NoReturn: ...


class Remote:
    """Requests to one candidate."""

    def __init__(self, channel: Channel, end: End) -> None:
        self._channel = channel
        self._end = end
        self._handles: dict[int, Handle] = {}
        self._callbacks: list[Callable[..., Any]] = []
        self._callback_numbers: dict[int, int] = {}
        self._number = 0
        self._is_ahead = False
        self.calls = 0

    def load(self, names: list[str]) -> dict[str, Any]:
        """What the candidate binds to `names`, once it has loaded itself; every other outcome ends the verdict."""
        reply = self._receive(0)
        if reply[1] == "syntax":
            self._end("syntax", _text(reply[2:]))
        if reply[1] == "empty":
            self._end("no-code", "the program is empty")
        loaded = self._outcome("load", reply, Encoder(self._opaque))
        if type(loaded) is not list or len(loaded) != 2 or type(loaded[0]) is not list or type(loaded[1]) is not list:
            self._end("forbidden", "malformed answer to loading")
        missing, values = loaded
        if missing:
            self._end("no-code", f"not defined: {', '.join(map(repr, missing))}")
        if len(values) != len(names):
            self._end("forbidden", "malformed answer to loading")
        return dict(zip(names, values, strict=True))

    def request(self, operation: str, handle: int, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = {}) -> Any:  # noqa: B006
        """Carries out `operation` on the candidate's object; its value, or its exception raised here."""
        if self._is_ahead:
            raise RuntimeError("the candidate is busy with calls that were sent ahead")
        self._count()
        number, encoder = self._next_number(), Encoder(self._opaque)
        encoded = [encoder.encode(item) for item in args]
        named = [[name, encoder.encode(item)] for name, item in kwargs.items()]
        self._send([number, operation, handle, encoded, named])
        return self._answer(number, operation, encoder)

    def call_each(self, handle: int, packed: Sequence[bytes]) -> Iterator[Any]:
        """The values of calls of the candidate's object, one after the other, or an exception of one raised here.

        `packed` are arguments and keywords of each, marshalled: plain data of the tests; no call sees what another
        changed. They are sent ahead, many in one frame; until the last answer nothing else can be asked.
        """
        plain = Encoder(self._opaque)
        for group in _groups(packed):
            first = self._next_number(len(group))
            self._send([first, "each", handle, [item.hex() for item in group], []])
            self._is_ahead = True
            for number in range(first, first + len(group)):
                self._count()
                yield self._answer(number, "call", plain)
            self._is_ahead = False

    def ask_inside(self, *request: Any) -> list[Any]:
        """The raw reply to a request about tests that run in the candidate's own process."""
        number = self._next_number()
        self._send([number, *request])
        return self._receive(number)

    def _next_number(self, count: int = 1) -> int:
        """The first of `count` numbers for requests."""
        self._number += count
        return self._number - count + 1

    def _count(self) -> None:
        self.calls += 1
        if self.calls > CALLS_MAX:
            self._end("output-limit", f"more than {CALLS_MAX} calls crossed")

    def _answer(self, number: int, operation: str, encoder: Encoder) -> Any:
        """What comes of request `number`, whose arguments `encoder` wrote; meanwhile the candidate may call back."""
        while True:
            reply = self._receive(number)
            if reply[1] != "back":
                return self._outcome(operation, reply, encoder)
            self._serve_callback(number, reply)

    def _outcome(self, operation: str, reply: list[Any], encoder: Encoder) -> Any:
        kind = reply[1]
        if kind == "ok" and len(reply) == 4 and type(reply[3]) is list:
            return self._value(reply[2], reply[3], encoder)
        if kind == "raise" and len(reply) == 5 and type(reply[3]) is list:
            self._raise(reply)
        if kind == "stop" and operation == "next":
            raise StopIteration
        if kind == "cannot":
            self._end("wrong", f"a value could not cross: {_text(reply[2:])}")
        if kind == "large":
            self._end("output-limit", _text(reply[2:]))
        self._end("forbidden", "malformed reply")

    def _value(self, value: Any, changes: list[Any], encoder: Encoder) -> Any:
        if type(value) in JSON_SCALARS and not changes:
            return value
        decoder = Decoder(self._resolve, encoder.kept)
        try:
            found = decoder.decode(value)
            for change in changes:
                replace_content(decoder, change)
        except MalformedValue as error:
            self._end("forbidden", f"malformed value: {error}")
        except CannotCross as error:
            self._end("wrong", f"a value could not cross: {error}")
        return found

    def _raise(self, reply: list[Any]) -> NoReturn:
        name, detail = reply[2], _text(reply[4:])
        kind = getattr(builtins, name, None) if type(name) is str else None
        if not isinstance(kind, type) or not issubclass(kind, BaseException):
            self._end("forbidden", "malformed exception")
        if kind is MemoryError:
            self._end("memory", detail)
        if not issubclass(kind, Exception) or issubclass(kind, StopIteration):
            self._end("exception", detail)
        arguments = self._value(["l", 0, *reply[3]], [], Encoder(self._opaque))
        try:
            error = kind.__new__(kind)
            error.args = tuple(arguments)
        except TypeError:
            error = Exception(detail)
        setattr(error, _MARK, detail)
        raise error

    def _serve_callback(self, number: int, request: list[Any]) -> None:
        """Calls one of the test's own functions for the candidate, which serves requests meanwhile."""
        self._count()
        self._is_ahead, was_ahead = False, self._is_ahead
        shapes = [type(part) for part in request]
        if shapes[2:] != [int, list, list] or not 0 <= request[2] < len(self._callbacks):
            self._end("forbidden", "malformed callback")
        args = self._value(["l", 0, *request[3]], [], Encoder(self._opaque))
        pairs = request[4]
        if not all(type(pair) is list and len(pair) == 2 and type(pair[0]) is str for pair in pairs):
            self._end("forbidden", "malformed callback")
        kwargs = {name: self._value(item, [], Encoder(self._opaque)) for name, item in pairs}
        try:
            answer = [number, "answer", Encoder(self._opaque).encode(self._callbacks[request[2]](*args, **kwargs))]
        except Exception as error:
            kind = next(base for base in type(error).__mro__ if getattr(builtins, base.__name__, None) is base)
            answer = [number, "raise", kind.__name__, [str(error)[:TEXT_MAX_CHARS]]]
        self._is_ahead = was_ahead
        self._send(answer)

    def _opaque(self, value: object) -> list[Any]:
        if isinstance(value, Handle):
            return ["h", handle_number(value)]
        name = getattr(value, "__name__", None)
        if type(name) is str and getattr(builtins, name, None) is value:
            return ["bi", name]
        if isinstance(value, Iterator):
            return ["ci", self._callback(value, lambda: next(((item,) for item in value), ()))]
        if callable(value):
            return ["cb", self._callback(value, value)]
        raise TypeError(f"an object of the test's own class {type(value).__name__} cannot cross to the candidate")

    def _callback(self, value: object, function: Callable[..., Any]) -> int:
        if id(value) not in self._callback_numbers:
            self._callback_numbers[id(value)] = len(self._callbacks)
            self._callbacks.append(function)
        return self._callback_numbers[id(value)]

    def _resolve(self, data: list[Any]) -> object:
        tag, body = data[0], data[1] if len(data) > 1 else None
        if tag == "bi" and type(body) is str and hasattr(builtins, body):
            return getattr(builtins, body)
        if tag == "cb" and type(body) is int and 0 <= body < len(self._callbacks):
            return self._callbacks[body]
        if tag == "h" and len(data) == 4 and type(body) is int and type(data[3]) is str:
            if body not in self._handles:
                self._handles[body] = make_handle(self.request, body, data[2], data[3])
            return self._handles[body]
        raise MalformedValue("unknown tag")

    def _send(self, frame: list[Any]) -> None:
        try:
            self._channel.send(frame)
        except ChannelClosed:
            self._end("lost", "the candidate ended")

    def _receive(self, number: int) -> list[Any]:
        try:
            reply = self._channel.receive()
        except ChannelClosed:
            self._end("lost", "the candidate ended")
        except (FrameTooLarge, MemoryError) as error:
            self._end("output-limit", str(error))
        except MalformedFrame as error:
            self._end("forbidden", str(error))
        if type(reply) is not list or len(reply) < 2 or type(reply[0]) is not int or reply[0] != number:
            self._end("forbidden", "unasked or late frame")
        return reply


def _groups(packed: Sequence[bytes]) -> Iterator[list[bytes]]:
    """Stretches of `packed` of about _GROUP_BYTES, with one item at least."""
    group, size = list[bytes](), 0
    for item in packed:
        if group and size + len(item) > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(item)
        size += len(item)
    if group:
        yield group


def candidate_detail(error: BaseException) -> str | None:
    """The candidate's own description of `error`, or None if the test raised it."""
    detail = getattr(error, _MARK, None)
    return detail if type(detail) is str else None


def _text(parts: list[Any]) -> str:
    return parts[0][:TEXT_MAX_CHARS] if parts and type(parts[0]) is str else ""
