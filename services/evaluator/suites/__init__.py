"""Suites as data: one YAML file each, read strictly. What a score depends on stands in the file or in its digest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from services.evaluator.fields import Fields
from smeltkit import limits
from smeltkit.errors import BadDigest, BadSuite, UnknownSuite
from smeltkit.ids import check_digest, digest_bytes
from smeltkit.manifest import canonical_json
from smeltkit.strict_yaml import load_yaml

FORMATS = ("humaneval", "mbpp", "bigcodebench")
BUILDERS = ("completion", "tests-shown")
EXTRACTIONS = {"completion": ("append", "newline", "indent", "whole"), "chat": ("reply",)}
FORMS = ("check", "asserts", "unittest")
PROFILES = ("bare", "science")
SETUPS = ("after-solution",)
REPOSITORY = "repository:"


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file: its digest decides, wherever the bytes come from."""

    file: str
    digest: str
    url: str
    licence: str


@dataclass(frozen=True, kw_only=True)
class Data(DataFile):
    """The file of rows that a suite is made of."""

    rows: int
    format: str


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Everything that a score of this suite depends on besides the model. `digest` names all of it."""

    name: str
    version: int
    description: str
    data: Data
    split: str
    first: int
    """Number of the first problem of the split; problems are numbered by their data."""
    last: int
    problems: int
    builder: str
    prompt_version: int
    extraction: str
    joins: tuple[str, ...]
    stop: tuple[str, ...]
    max_tokens: int
    """Tokens of an answer at most, unless a request says otherwise."""
    thinking_tokens: int
    """Tokens of reasoning at most, on top of the answer, for bundles that declare that they reason."""
    form: str
    setup: str
    profile: str
    """The sandbox's interpreter that programs are judged on; empty where the file names none."""
    references_passed: int
    """Reference solutions that must pass before a score is given."""
    digest: str


def suites() -> Mapping[str, Suite]:
    """The suites of this release by name, in order of name; BadSuite if one of them is malformed."""
    return _load_folder(Path(__file__).parent)


def find_suite(name: str) -> Suite:
    """The suite `name`; UnknownSuite lists what there is."""
    known = suites()
    if name not in known:
        raise UnknownSuite(f"no suite {name!r}; known: {', '.join(known)}")
    return known[name]


def load_suite(path: Path) -> Suite:
    """The suite of one YAML file; BadSuite names the file, the field and what is wrong."""
    value = read_yaml(path)
    suite = _read_suite(Fields(path.name, value), value)
    if suite.name != path.stem:
        raise BadSuite(f"{path.name}: field 'name' is {suite.name!r}, must be the file's name {path.stem!r}")
    return suite


def read_yaml(path: Path) -> Any:
    """The values of a YAML file; BadSuite if it is none, or if a key occurs twice."""
    try:
        return load_yaml(path.read_bytes())
    except yaml.YAMLError as error:
        raise BadSuite(f"{path.name}: no valid YAML: {' '.join(str(error).split())[:200]}") from error


def read_data_file(fields: Fields) -> DataFile:
    """The fields that every data file has; BadSuite names the one that is wrong."""
    data = DataFile(
        file=fields.text("file"),
        digest=fields.text("digest"),
        url=fields.text("url"),
        licence=fields.text("licence"),
    )
    try:
        check_digest(data.digest)
    except BadDigest as error:
        raise BadSuite(f"{fields.place}: field 'digest': {error}") from error
    if "/" in data.file or "\\" in data.file or data.file.startswith("."):
        fields.fail("file", f"is {data.file!r}, must be a plain file name")
    if not data.url.startswith(("https://", REPOSITORY)):
        fields.fail("url", f"is {data.url!r}, must begin with https:// or {REPOSITORY}")
    return data


@cache
def _load_folder(folder: Path) -> Mapping[str, Suite]:
    return {suite.name: suite for suite in (load_suite(path) for path in sorted(folder.glob("*.yaml")))}


def _read_suite(top: Fields, value: Any) -> Suite:
    data = _read_data(top.section("data"))
    split, prompt = top.section("split"), top.section("prompt")
    extraction, generation, judge = top.section("extraction"), top.section("generation"), top.section("judge")
    kind = extraction.choice("kind", tuple(EXTRACTIONS))
    problems = split.integer("problems", 1, data.rows)
    suite = Suite(
        name=top.text("name"),
        version=top.integer("version", 1, limits.SUITE_ROWS_MAX),
        description=top.text("description"),
        data=data,
        split=split.text("name"),
        first=split.integer("first", 0, limits.SUITE_ROWS_MAX),
        last=split.integer("last", 0, limits.SUITE_ROWS_MAX),
        problems=problems,
        builder=prompt.choice("builder", BUILDERS),
        prompt_version=prompt.integer("version", 1, limits.SUITE_ROWS_MAX),
        extraction=kind,
        joins=extraction.texts("joins"),
        stop=generation.texts("stop", can_be_empty=True),
        max_tokens=generation.integer("max_tokens", 1, limits.EVALUATION_TOKENS_MAX),
        thinking_tokens=generation.integer("thinking_tokens", 0, limits.EVALUATION_TOKENS_MAX),
        form=judge.choice("form", FORMS),
        setup=judge.choice("setup", SETUPS),
        profile=judge.choice("profile", PROFILES) if judge.peek("profile") else "",
        references_passed=top.integer("references_passed", 1, problems),
        digest=digest_bytes(canonical_json(value)),
    )
    for section in (split, prompt, extraction, generation, judge, top):
        section.close()
    _check_lists(suite, extraction, generation)
    if suite.last - suite.first + 1 != suite.problems:
        split.fail("problems", f"is {suite.problems}, but {suite.first} to {suite.last} are another number of problems")
    return suite


def _check_lists(suite: Suite, extraction: Fields, generation: Fields) -> None:
    unknown = [join for join in suite.joins if join not in EXTRACTIONS[suite.extraction]]
    if unknown:
        extraction.fail("joins", f"holds {unknown[0]!r}, must be of {', '.join(EXTRACTIONS[suite.extraction])}")
    if len(suite.stop) > limits.STOP_STRINGS_MAX:
        generation.fail("stop", f"has {len(suite.stop)} entries, at most {limits.STOP_STRINGS_MAX} are allowed")


def _read_data(fields: Fields) -> Data:
    data = Data(
        **asdict(read_data_file(fields)),
        rows=fields.integer("rows", 1, limits.SUITE_ROWS_MAX),
        format=fields.choice("format", FORMATS),
    )
    fields.close()
    return data
