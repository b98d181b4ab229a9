"""Chat templates: a conversation becomes the exact text that the model was trained on.

The text is byte-equal to `apply_chat_template` of transformers, since one newline more costs a model its manners. The
template comes from whoever published the model, so it renders in `template_sandbox`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import jinja2

from smeltkit import limits
from smeltkit.errors import BadRequest, BadTemplate
from smeltkit.ml import template_sandbox

_ENVIRONMENT: Final = template_sandbox.ChatEnvironment()


class ChatTemplate:
    """A compiled template. Immutable, so threads may share it."""

    def __init__(self, source: str, bos: str = "", eos: str = "") -> None:
        """Compiles `source`; `bos` and `eos` are the texts of `bos_token` and `eos_token`, empty if the model has none.

        BadTemplate when the source is too large or is no template.
        """
        if len(source.encode(errors="replace")) > limits.TEMPLATE_MAX_BYTES:
            raise BadTemplate(f"the chat template is larger than {limits.TEMPLATE_MAX_BYTES} bytes")
        self.source: Final = source
        tokens = {"bos_token": bos, "eos_token": eos}
        self._tokens: Final = {name: text for name, text in tokens.items() if text}
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
            raise BadTemplate(f"the chat template does not compile: {type(error).__name__}: {error}") from error

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt of `messages` (each with `role` and `content`), ready for the answer if `add_generation_prompt`.

        BadRequest when the template itself refuses the messages, e.g. roles that do not alternate; BadTemplate when it
        breaks, or does more work than a template may. `variables` are seen by the template, e.g. `enable_thinking`.
        """
        values = {
            "tools": None,
            "documents": None,
            **self._tokens,
            **variables,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template_sandbox.render(self._template, values)
        except template_sandbox.Refused as error:
            raise BadRequest(f"the chat template refuses these messages: {error}") from error
        except Exception as error:
            raise BadTemplate(f"the chat template does not render: {type(error).__name__}: {error}"[:2000]) from error
