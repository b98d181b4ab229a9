"""Chat templates render byte for byte as in transformers, and hostile ones end in a typed error, soon."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from template_samples import CHATML, CONVERSATIONS, MISTRAL, TEMPLATES, THINKING
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from smeltkit import limits
from smeltkit.errors import BadRequest, BadTemplate
from smeltkit.ml.chat import ChatTemplate
from smeltkit.ml.model_files import template_in

ORE = Path(__file__).parents[4] / "examples/models/ore-11m"
USER = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_is_byte_equal_to_the_reference(name: str, conversation: str, add_generation_prompt: bool) -> None:
    """R-036."""
    messages = CONVERSATIONS[conversation]
    expected, _ = render_jinja_template(
        [messages],
        chat_template=TEMPLATES[name],
        add_generation_prompt=add_generation_prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    template = ChatTemplate(TEMPLATES[name], bos="<s>", eos="</s>")
    assert template.render(messages, add_generation_prompt=add_generation_prompt) == expected[0]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_shipped_model_renders_as_its_own_tokenizer_would(conversation: str) -> None:
    """R-036."""
    reference = PreTrainedTokenizerFast.from_pretrained(ORE)
    source = template_in(json.loads((ORE / "tokenizer_config.json").read_text()))
    assert source is not None
    messages = CONVERSATIONS[conversation]
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(source, eos="<|im_end|>").render(messages) == expected


def test_variables_reach_the_template() -> None:
    """R-038."""
    assert ChatTemplate(THINKING).render(USER, enable_thinking=False).endswith("<think>\n\n</think>\n\n")


def test_absent_token_is_undefined_and_not_empty() -> None:
    source = "{{ bos_token is defined }} {{ eos_token is defined }}"
    assert ChatTemplate(source, eos="</s>").render(USER) == "False True"


def test_template_that_refuses_messages_makes_a_bad_request_with_its_words() -> None:
    with pytest.raises(BadRequest, match="Roles must alternate"):
        ChatTemplate(MISTRAL).render([{"role": "assistant", "content": "hi"}])


@given(st.lists(st.text(max_size=40), min_size=1, max_size=4))
def test_content_is_never_interpreted(contents: list[str]) -> None:
    messages = [{"role": "user", "content": text} for text in contents]
    rendered = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").render(messages)
    assert rendered == "".join(contents)


def test_text_in_template_syntax_stays_text() -> None:
    messages = [{"role": "user", "content": "{{ 7 * 7 }}{% for x in y %}"}]
    assert "{{ 7 * 7 }}{% for x in y %}" in ChatTemplate(CHATML).render(messages)


REPEAT = "{% for i in range(99999) %}"
GROW = "{% set n = namespace(s=START) %}{% for i in range(60) %}{% set n.s = NEXT %}{% endfor %}"
NESTED = GROW.replace("START", "[1]").replace("NEXT", "[n.s, n.s]")
LONG = "{% set s = 'ab' * 4000000 %}{% set t = 'ab' * 4000000 %}"

ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over a filter": "{% for a in range(99999) | map('string') %}" + REPEAT + "{% endfor %}{% endfor %}",
    "loop without a body": "{% for a in range(99999) if range(99999) | list | length == 0 %}{% endfor %}",
    "macro calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n-1) ~ m(n-1) }}{% endif %}{% endmacro %}{{ m(99) }}",
    "macro calls itself for ever": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "block calls itself": "{% block b %}{{ self.b() }}{% endblock %}",
    "caller calls itself": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    "{% for a in range(99999) %}{% call m() %}{% for b in range(999) %}{% endfor %}{% endcall %}{% endfor %}",
    "text doubles by ~": GROW.replace("START", "'a'").replace("NEXT", "n.s ~ n.s"),
    "text doubles by +": GROW.replace("START", "'a'").replace("NEXT", "n.s + n.s"),
    "list doubles": GROW.replace("START", "[1]").replace("NEXT", "n.s + n.s"),
    "list holds itself twice, printed": NESTED + "{{ n.s }}",
    "list holds itself twice, as JSON": NESTED + "{{ n.s | tojson }}",
    "list holds itself twice, joined": NESTED + "{{ n.s | join('x') }}",
    "text times number": "{{ 'a' * 999999999 }}",
    "number times list": "{{ (999999999 * [1]) | length }}",
    "power of powers": "{{ 9 ** 9 ** 9 }}",
    "product that grows": GROW.replace("START", "9").replace("NEXT", "n.s * n.s"),
    "wide format": "{{ '%999999999d' % 1 }}",
    "wide format method": "{{ '{:>999999999}'.format(1) }}",
    "wide centre": "{{ 'a'.center(999999999) }}",
    "wide justify": "{{ 'a'.ljust(999999999) }}",
    "wide zfill": "{{ 'a'.zfill(999999999) }}",
    "wide tabs": "{{ '\\t'.expandtabs(999999999) }}",
    "wide integer": "{{ (1).to_bytes(999999999) }}",
    "wide markup": "{{ ('a' | safe).center(999999999) }}",
    "wide centre filter": "{{ 'a' | center(999999999) }}",
    "wide indent": "{{ 'a\nb' | indent(999999999) }}",
    "wide JSON": "{{ [1] | tojson(indent=999999999) }}",
    "wide batch": "{{ [1] | batch(999999999, 'x') | list }}",
    "precise round": "{{ 1.5 | round(999999999, 'ceil') }}",
    "replace nothing by much": "{% set s = 'a' * 100000 %}{{ s | replace('', s) }}",
    "replace method": "{% set s = 'a' * 100000 %}{{ s.replace('a', s) }}",
    "join much by much": "{% set s = 'a' * 100000 %}{{ s.join(range(99999) | map('string')) }}",
    "strip a large set": LONG + "{{ s | trim(t) }}",
    "compare for ever": LONG + REPEAT + "{% if s == t %}{% endif %}{% endfor %}",
    "search for ever": LONG + REPEAT + "{% if 'x' in s %}{% endif %}{% endfor %}",
    "cut for ever": LONG + REPEAT + "{% set u = s[1:] %}{% endfor %}",
    "much text in a block": "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "much text in a set": "{% set s %}{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}{% endset %}",
    "words without end": "{{ lipsum(n=99999) }}",
    "wide date": "{{ strftime_now('%999999999d') }}",
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ENDLESS)
def test_template_without_end_is_stopped(name: str) -> None:
    """The bound is a count of steps, not a clock, so it is the same on every machine."""
    with pytest.raises(BadTemplate):
        ChatTemplate(ENDLESS[name]).render(USER)


ESCAPES = [
    "{{ ''.__class__.__mro__ }}", "{{ messages.__class__ }}", "{{ ''['__class__'] }}", "{{ messages.append(1) }}",
    "{{ raise_exception.__globals__ }}", "{{ strftime_now.__code__ }}", "{{ namespace.__init__ }}",
    "{{ ''|attr('__class__') }}", "{{ cycler.__init__ }}", "{% include 'x' %}",
    "{% import 'x' as y %}", "{% extends 'x' %}", "{{ range.__self__ }}", "{{ self.__init__ }}",
    "{{ messages | map(attribute='__class__') | list | first }}", "{{ loop }}", "{{ messages[0].update(a=1) }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
]  # fmt: skip


@pytest.mark.parametrize("source", ESCAPES)
def test_template_sees_nothing_but_its_variables(source: str) -> None:
    """Refused, or undefined and so empty; never a Python object."""
    try:
        rendered = ChatTemplate(source).render(USER)
    except BadTemplate:
        return
    assert rendered == ""


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ 1 +", "{% if x %}", "{{ x | nope }}", "{{ x is nope }}", "{% nope %}"]
)
def test_source_that_is_no_template_does_not_compile(source: str) -> None:
    with pytest.raises(BadTemplate, match="does not compile"):
        ChatTemplate(source)


def test_too_long_source_is_refused() -> None:
    with pytest.raises(BadTemplate, match="larger than"):
        ChatTemplate("x" * (limits.TEMPLATE_MAX_BYTES + 1))


@pytest.mark.parametrize(
    "opening,closing",
    [
        ("{{ " + "(" * 50_000, ")" * 50_000 + " }}"),
        ("{{ " + "not " * 50_000, "x }}"),
        ("{{ x" + ".a" * 50_000, " }}"),
        ("{{ " + "[" * 50_000, "]" * 50_000 + " }}"),
        ("{% if 1 %}" * 9_000, "{% endif %}" * 9_000),
        ("{% for x in y %}" * 25, "{% endfor %}" * 25),
    ],
)
def test_too_deep_source_is_refused(opening: str, closing: str) -> None:
    with pytest.raises(BadTemplate, match="does not compile"):
        ChatTemplate(opening + closing)


@given(st.text(alphabet="{}%#-| abm()'[].~+*=", max_size=60))
def test_random_source_never_escapes_the_error_tree(source: str) -> None:
    with contextlib.suppress(BadTemplate, BadRequest):
        ChatTemplate(source).render(USER)


def test_long_conversation_stays_within_the_bounds() -> None:
    messages = [{"role": role, "content": "x = 1\n" * 500} for role in ("user", "assistant")] * 500
    assert len(ChatTemplate(MISTRAL, eos="</s>").render(messages)) > 3_000_000
