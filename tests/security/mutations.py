"""Random mutations of the corpus's forgeries against a task that none of them can know; prints a line for each that
scores, or after which the slot does not judge.

`python mutations.py jail|rootless|confined COUNT SEED`: the same seed gives the same programs.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Final

from corpus_run import Canary, become_ordinary_user, load_cases, open_slot

from services.sandbox.job import Job
from services.sandbox.policy import Level, Limits
from services.sandbox.supervisor.slot import SELF_TEST
from services.sandbox.verdict import Verdict

FILES: Final = ("forging", "values", "inside")
LIMITS: Final = Limits(cpu_s=0.3, wall_s=1.5, memory_bytes=128 << 20, output_bytes=16 << 10)
STEPS_MAX: Final = 4
TEXT_SHARE: Final = 0.1
"""Of mutations that cut the text instead of the syntax tree; most of them no longer compile."""
_NUMBERS: Final = (-1, 0, 1, 2, 5, 7, 1 << 31, 1 << 64)


def main() -> None:
    """Writes what was found as JSON lines, and last how many programs ran by verdict."""
    level, count, seed = Level.named(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if os.geteuid() == 0 and level < Level.JAIL:
        become_ordinary_user()
    verdicts: dict[str, int] = {}
    for program, verdict, is_healthy in run_mutations(level, count, seed):
        verdicts[verdict] = verdicts.get(verdict, 0) + 1
        if verdict in (Verdict.PASSED, Verdict.INFRA) or not is_healthy:
            sys.stdout.write(json.dumps({"program": program, "verdict": verdict, "healthy": is_healthy}) + "\n")
    sys.stdout.write(json.dumps({"verdicts": verdicts}) + "\n")


def run_mutations(level: Level, count: int, seed: int) -> Iterator[tuple[str, str, bool]]:
    """Program, verdict, and whether the slot still judges, for each mutation."""
    chance = random.Random(seed)
    cases = [case for case in load_cases(Canary("/nowhere", 1, "none")) if case.file in FILES]
    with open_slot(level) as (slot, cancel):
        for number in range(count):
            base, donor = chance.choice(cases), chance.choice(cases)
            program = mutated(base.code, donor.code, chance)
            record = slot.run(_job(program, is_inside=base.mode == "inside", chance=chance), cancel)
            slot.prepare_next()
            is_healthy = number % 20 > 0 or slot.run(SELF_TEST, cancel).verdict is Verdict.PASSED
            yield program, str(record.verdict), is_healthy


def mutated(code: str, donor: str, chance: random.Random) -> str:
    """`code` after one to four random steps; statements may come from `donor`."""
    if chance.random() < TEXT_SHARE:
        start = chance.randrange(len(code) or 1)
        return code[:start] + code[start + chance.randrange(1, 9) :]
    try:
        tree, other = ast.parse(code), ast.parse(donor)
    except (SyntaxError, ValueError):
        return code
    for _ in range(chance.randint(1, STEPS_MAX) if tree.body else 0):
        chance.choice(_STEPS)(tree, other, chance)
    with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError):
        return ast.unparse(ast.fix_missing_locations(tree))
    return code


def _job(program: str, *, is_inside: bool, chance: random.Random) -> Job:
    """A task whose answers are in no program: any pass is a forgery."""
    factor, offset = chance.randrange(1 << 20, 1 << 24), chance.randrange(1 << 20, 1 << 24)
    one, two, three = ((n, n * factor + offset) for n in chance.sample(range(3, 1000), 3))
    asserts = f"assert solve({one[0]}) == {one[1]}\nassert abs(solve({two[0]}) - {two[1]}) < 0.5\n"
    asserts += f"assert [solve(n) for n in ({three[0]}, {one[0]})] == [{three[1]}, {one[1]}]\n"
    unittests = "import unittest\nclass T(unittest.TestCase):\n"
    unittests += f"    def test_one(self): self.assertEqual(solve({one[0]}), {one[1]})\n"
    unittests += f"    def test_two(self): self.assertEqual({two[1]}, solve({two[0]}))\n"
    return Job(
        code=program.encode("utf-8", "surrogatepass"),
        form="unittest" if is_inside else "asserts",
        mode="inside" if is_inside else "split",
        tests=unittests if is_inside else asserts,
        exports=("solve",),
        limits=LIMITS,
        seed="mutation",
    )


def _bodies(tree: ast.AST) -> list[list[ast.stmt]]:
    found = (getattr(node, "body", None) for node in ast.walk(tree))
    return [body for body in found if isinstance(body, list) and body]


def _delete_statement(tree: ast.Module, donor: ast.Module, chance: random.Random) -> None:
    body = chance.choice(_bodies(tree))
    body[chance.randrange(len(body))] = ast.Pass()


def _insert_from_donor(tree: ast.Module, donor: ast.Module, chance: random.Random) -> None:
    statements = [statement for body in _bodies(donor) for statement in body]
    body = chance.choice(_bodies(tree))
    body.insert(chance.randrange(len(body) + 1), copy.deepcopy(chance.choice(statements or [ast.Pass()])))


def _swap_statements(tree: ast.Module, donor: ast.Module, chance: random.Random) -> None:
    body = chance.choice(_bodies(tree))
    one, other = chance.randrange(len(body)), chance.randrange(len(body))
    body[one], body[other] = body[other], body[one]


def _change_constant(tree: ast.Module, donor: ast.Module, chance: random.Random) -> None:
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    if constants:
        chance.choice(constants).value = chance.choice((*_NUMBERS, True, None, "passed", b"\0", 0.5))


def _change_name(tree: ast.Module, donor: ast.Module, chance: random.Random) -> None:
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    others = [node.id for node in [*ast.walk(donor), *ast.walk(tree)] if isinstance(node, ast.Name)]
    if names and others:
        chance.choice(names).id = chance.choice(others)


def _change_attribute(tree: ast.Module, donor: ast.Module, chance: random.Random) -> None:
    places = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    others = [node.attr for node in [*ast.walk(donor), *ast.walk(tree)] if isinstance(node, ast.Attribute)]
    if places and others:
        chance.choice(places).attr = chance.choice(others)


def _return_something(tree: ast.Module, donor: ast.Module, chance: random.Random) -> None:
    returns = [node for node in ast.walk(tree) if isinstance(node, ast.Return)]
    loaded = (ast.Call, ast.Lambda, ast.Constant, ast.Dict, ast.List, ast.Tuple, ast.BinOp)
    values = [node for node in ast.walk(donor) if isinstance(node, loaded)]
    if returns and values:
        chance.choice(returns).value = copy.deepcopy(chance.choice(values))


_STEPS: Final[tuple[Callable[[ast.Module, ast.Module, random.Random], None], ...]] = (
    _delete_statement,
    _insert_from_donor,
    _insert_from_donor,
    _swap_statements,
    _change_constant,
    _change_name,
    _change_attribute,
    _return_something,
)


if __name__ == "__main__":
    main()
