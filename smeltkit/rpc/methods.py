"""As much of a channel as stubs use, for whoever makes calls in a way of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class MethodChannel(ABC):
    """A channel whose four kinds of methods are all made by `_method`."""

    @abstractmethod
    def _method(self, kind: str, method: str, codec: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What is called for `method`; `kind` is the name of the channel's own function, the rest its arguments."""

    def unary_unary(self, method: str, *codec: Any, **options: Any) -> Any:
        """A method with one request and one reply."""
        return self._method("unary_unary", method, codec, options)

    def unary_stream(self, method: str, *codec: Any, **options: Any) -> Any:
        """A method with one request and many replies."""
        return self._method("unary_stream", method, codec, options)

    def stream_unary(self, method: str, *codec: Any, **options: Any) -> Any:
        """A method with many requests and one reply."""
        return self._method("stream_unary", method, codec, options)

    def stream_stream(self, method: str, *codec: Any, **options: Any) -> Any:
        """A method with many requests and many replies."""
        return self._method("stream_stream", method, codec, options)
