"""Answers the judge's requests: `[number, operation, handle, arguments, keyword pairs]` in, one reply out. The
operation `each` stands for many calls, with a reply each.

A reply echoes the number: `ok` with the value and the changed contents of containers that came as arguments, `raise`
with the nearest builtin class, `stop` at the end of an iterator, `cannot` or `large` for a value that cannot cross.
"""

from __future__ import annotations

import builtins
import collections
import functools
import marshal
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

from services.sandbox.wire.decode import Decoder
from services.sandbox.wire.encode import CannotCross, Encoder, is_plain
from services.sandbox.wire.frames import Channel, FrameTooLarge

REPLY_MAX_BYTES: Final = 4 * 1024 * 1024
TEXT_MAX_CHARS: Final = 500
_MUTABLE: Final = (list, dict, set, bytearray, collections.deque)
_END: Final = object()
_MARSHAL_WITHOUT_REFERENCES: Final = 2

OPERATIONS: Final[dict[str, Callable[..., Any]]] = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "delete": delattr,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "item": lambda value, key: value[key],
    "set_item": lambda value, key, item: value.__setitem__(key, item),
    "delete_item": lambda value, key: value.__delitem__(key),
    "contains": lambda value, item: item in value,
    "iter": iter,
    "next": lambda iterator: next(iterator, _END),
    "is_instance": lambda kind, value: isinstance(value, kind),
    "enter": lambda manager: manager.__enter__(),
    "exit": lambda manager: manager.__exit__(None, None, None),
}


class Guest:
    """The candidate's objects by handle, and the replies about them."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._objects: list[object] = []
        self._handles: dict[int, int] = {}
        self._callbacks: dict[int, object] = {}
        self._callback_numbers: dict[int, int] = {}
        self._number = 0

    def serve(self, request: list[Any]) -> None:
        """Carries out one request and replies."""
        number, operation, handle, arguments, keywords = request
        if operation == "each":
            return self._answer_each(number, self._objects[handle], arguments)
        decoder = Decoder(self._resolve)
        args = [decoder.decode(item) for item in arguments]
        kwargs = {name: decoder.decode(item) for name, item in keywords}
        target = self._objects[handle]
        self.answer(number, lambda: OPERATIONS[operation](target, *args, **kwargs), decoder.kept)

    def _answer_each(self, number: int, function: Any, packed: list[str]) -> None:
        """Calls `function` with each marshalled `(arguments, keywords)` in turn; numbers count up from `number`."""
        for item in packed:
            args, kwargs = marshal.loads(bytes.fromhex(item))
            self.answer(number, functools.partial(function, *args, **kwargs))
            number += 1

    def answer(self, number: int, work: Callable[[], object], received: dict[int, object] | None = None) -> None:
        """Replies to `number` with what `work` gives; `received` are the argument containers by index."""
        self._number, outer = number, self._number
        before = self._snapshot(received) if received else None
        try:
            value = work()
        except BaseException as error:
            reply = self._raised(number, error)
        else:
            reply = [number, "stop"] if value is _END else self._returned(number, value, received or {}, before)
        self._flush()
        self._number = outer
        try:
            self._channel.send(reply, max_bytes=REPLY_MAX_BYTES)
        except FrameTooLarge as error:
            self._channel.send([number, "large", str(error)])

    def _returned(self, number: int, value: object, received: dict[int, object], before: object) -> list[Any]:
        if not received and is_plain(value):
            return [number, "ok", value, []]
        try:
            encoder = Encoder(self._opaque, received.items())
            encoded = encoder.encode(value)
            changes = []
            if received and self._snapshot(received) != before:
                changes = [encoder.content(item) for item in received.values() if isinstance(item, _MUTABLE)]
            return [number, "ok", encoded, changes]
        except CannotCross as error:
            return [number, "cannot", str(error)]
        except RecursionError:
            return [number, "cannot", "value is nested too deeply"]
        except BaseException as error:
            return self._raised(number, error)

    def _raised(self, number: int, error: BaseException) -> list[Any]:
        kind = next(
            (base for base in type.mro(type(error)) if getattr(builtins, base.__name__, None) is base), Exception
        )
        arguments = [item for item in error.args if type(item) in (int, str, float, bool, type(None))]
        encoder = Encoder(self._opaque)
        plain = [encoder.encode(item[:TEXT_MAX_CHARS] if type(item) is str else item) for item in arguments[:8]]
        return [number, "raise", kind.__name__, plain, describe_exception(error)]

    def _snapshot(self, received: dict[int, object]) -> object:
        """Something that differs once a received container has changed."""
        try:
            return marshal.dumps(list(received.values()), _MARSHAL_WITHOUT_REFERENCES)
        except ValueError:
            encoder = Encoder(self._opaque)
            return [encoder.encode(item) for item in received.values()]

    def _opaque(self, value: object) -> list[Any]:
        if id(value) in self._callback_numbers:
            return ["cb", self._callback_numbers[id(value)]]
        name = getattr(value, "__name__", None)
        if type(name) is str and getattr(builtins, name, self) is value:
            return ["bi", name]
        if id(value) not in self._handles:
            self._handles[id(value)] = len(self._objects)
            self._objects.append(value)
        kind = "i" if hasattr(type(value), "__next__") else "c" if callable(value) else "o"
        return ["h", self._handles[id(value)], kind, type(value).__name__[:64]]

    def _resolve(self, data: list[Any]) -> object:
        tag, body = data[0], data[1]
        if tag == "h":
            return self._objects[body]
        if tag == "bi":
            return getattr(builtins, body)
        if body not in self._callbacks:
            self._callbacks[body] = self._make_callback(body) if tag == "cb" else self._make_iterator(body)
            self._callback_numbers[id(self._callbacks[body])] = body
        return self._callbacks[body]

    def _make_callback(self, identity: int) -> Callable[..., Any]:
        def callback(*args: Any, **kwargs: Any) -> Any:
            return self._call_back(identity, args, kwargs)

        return callback

    def _make_iterator(self, identity: int) -> Iterator[Any]:
        while item := self._call_back(identity, (), {}):
            yield item[0]

    def _call_back(self, identity: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Asks the judge to call one of its own functions, serving what it asks meanwhile."""
        encoder, number = Encoder(self._opaque), self._number
        encoded = [encoder.encode(item) for item in args]
        named = [[name, encoder.encode(item)] for name, item in kwargs.items()]
        self._channel.send([number, "back", identity, encoded, named], max_bytes=REPLY_MAX_BYTES)
        while True:
            message = self._channel.receive()
            if message[1] == "answer":
                return Decoder(self._resolve).decode(message[2])
            if message[1] == "raise":
                raise getattr(builtins, message[2])(*message[3])
            self.serve(message)

    def _flush(self) -> None:
        try:
            sys.stdout.flush()
        except BaseException:
            return


def describe_exception(error: BaseException) -> str:
    """Class and message in one bounded line; an exception in the message's own making is left out."""
    try:
        return f"{type(error).__name__}: {error}"[:TEXT_MAX_CHARS]
    except BaseException:
        return type(error).__name__[:TEXT_MAX_CHARS]
