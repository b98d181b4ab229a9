"""From a reply to the program that is judged: ways tried in the suite's fixed order, and the one that worked recorded.

The reply itself is stored unchanged beside the program, so any better rule can be applied to old runs. Everything here
is decided by syntax; nothing is executed, and no test is looked at.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from services.evaluator import code
from services.evaluator.problems import Problem
from smeltkit import limits

THINKING = ("<think>", "</think>")
RAW, NONE, UNCLOSED_THINKING, TOO_LONG = "raw", "none", "unclosed-thinking", "too-long"

_TURN = re.compile(r"<\|(?:im_end|im_start|endoftext|eot_id|end)\|>|</s>")
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^\s`~]*)[^\n]*$", re.MULTILINE)
_PYTHON = ("python", "python3", "py", "")
_CODE_LINE = re.compile(r"(?:def|class|async def|import|from|@)\b|@")
_STARTS_MAX = 20
_CUTS_MAX = 20


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """The program to judge, the join that gave it, and whether text after it was cut off."""

    program: str
    join: str
    """A join of the suite; `raw` if none worked; `none`, `unclosed-thinking` or `too-long` if there is no code."""
    is_trimmed: bool


def extract(problem: Problem, joins: tuple[str, ...], reply: str, thinking: tuple[str, str] = THINKING) -> Extraction:
    """The program in `reply`: the first join whose text parses and defines what is asked for.

    All joins are tried on the reply as it is, then all of them with what does not parse cut off its end. If none
    works, the first text of the first join is judged as it is, so that the verdict shows what is wrong with it.
    """
    answer = _after_thinking(_TURN.split(reply, maxsplit=1)[0], thinking)
    if answer is None or len(answer) > limits.EVALUATION_PROGRAM_MAX_CHARS:
        return Extraction(program="", join=UNCLOSED_THINKING if answer is None else TOO_LONG, is_trimmed=False)
    for is_trimming in (False, True):
        for join in joins:
            for text in _JOINS[join](problem, answer):
                program = _longest_program(text) if is_trimming else text
                if _answers(problem, tree := code.parse(program)):
                    clean = _without_prose(program, tree)
                    return Extraction(program=clean, join=join, is_trimmed=is_trimming or clean != program)
    first = next((text for text in _JOINS[joins[0]](problem, answer)), "")
    return Extraction(program=first, join=RAW if first.strip() else NONE, is_trimmed=False)


def _answers(problem: Problem, tree: ast.Module | None) -> bool:
    if tree is None:
        return False
    if problem.entry_point:
        return code.has_body(tree, problem.entry_point)
    return bool(code.defined(tree)) and set(problem.exports) <= code.bound(tree)


def _after_thinking(reply: str, thinking: tuple[str, str]) -> str | None:
    """The reply after its thinking; None if the thinking never ends."""
    opening, closing = thinking
    before, _, after = reply.rpartition(closing)
    if opening in after:
        return None
    return after if before else reply


# --- joins: each yields the texts it would try, best first ----------------------------------------------------------


def _append(problem: Problem, reply: str) -> Iterator[str]:
    """The reply continues the prompt to the letter."""
    yield problem.prompt + reply


def _newline(problem: Problem, reply: str) -> Iterator[str]:
    """The reply continues the prompt on a new line that neither of them has."""
    yield f"{problem.prompt}\n{reply}"


def _indent(problem: Problem, reply: str) -> Iterator[str]:
    """The reply is a body that lost its indentation, wholly or on its first line."""
    end = "" if problem.prompt.endswith("\n") else "\n"
    body = textwrap.dedent(reply).strip("\n")
    yield f"{problem.prompt}{end}{textwrap.indent(body, '    ')}\n"
    yield f"{problem.prompt}{end}    {reply.lstrip()}"


def _whole(problem: Problem, reply: str) -> Iterator[str]:
    """The reply holds a whole program; what the prompt defines beside the function stays available to it."""
    if code.parse(problem.prompt) is None:
        return
    around = code.without(problem.prompt, problem.entry_point)
    for text in _reply(problem, reply):
        yield f"{around}\n{text}"


def _reply(problem: Problem, reply: str) -> Iterator[str]:
    """Fenced blocks one by one, then all of them together, then the reply from its first line of code on."""
    blocks = list(_blocks(reply))
    yield from blocks
    if len(blocks) > 1:
        yield "\n\n".join(blocks)
    if not blocks:
        lines = code.lines(reply)
        starts = [index for index, line in enumerate(lines) if _CODE_LINE.match(line)]
        for start in starts[:_STARTS_MAX]:
            yield "".join(lines[start:])


_JOINS: Mapping[str, Callable[[Problem, str], Iterator[str]]] = {
    "append": _append,
    "newline": _newline,
    "indent": _indent,
    "whole": _whole,
    "reply": _reply,
}


def _blocks(reply: str) -> Iterator[str]:
    """The contents of fenced blocks that are Python by their label; an unclosed last one counts."""
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(reply):
        if opening is None:
            opening = fence
        elif fence[1].startswith(opening[1]) and not fence[2]:
            if opening[2].lower() in _PYTHON:
                yield textwrap.dedent(reply[opening.end() + 1 : fence.start()])
            opening = None
    if opening is not None and opening[2].lower() in _PYTHON:
        yield textwrap.dedent(reply[opening.end() + 1 :])


# --- what is cut off ------------------------------------------------------------------------------------------------


def _longest_program(text: str) -> str:
    """`text` up to the line at which the parser gives up, again and again until the rest parses; maybe empty."""
    lines = code.lines(text)
    for _ in range(_CUTS_MAX):
        outcome = code.try_parse("".join(lines))
        if isinstance(outcome, ast.Module):
            return "".join(lines)
        lines = lines[: min(outcome, len(lines)) - 1]
    return ""


def _without_prose(program: str, tree: ast.Module | None) -> str:
    """`program` without the words after it that happen to parse: a lone name, `Note: text`, a comparison."""
    body = tree.body if tree is not None else []
    count = len(body)
    while count and _is_prose(body[count - 1]):
        count -= 1
    if count == len(body):
        return program
    lines = code.lines(program)
    return "".join(lines[: body[count - 1].end_lineno]) if count else ""


def _is_prose(node: ast.stmt) -> bool:
    if isinstance(node, ast.AnnAssign):
        return node.value is None
    return isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call | ast.Await | ast.Constant)
