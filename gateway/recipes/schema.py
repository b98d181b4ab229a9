"""A recipe as it is written: stages by name, each with one verb, and what of other stages goes into it.

recipe: refine                # what it is called
stages:
  start:
    import: {source: ../examples/models/ore-11m, name: ore-11m}
  refined:
    train: {file: ../examples/refine/ore-11m.yaml, base: {stage: start}}
  score:
    eval: {ref: {stage: refined}, suite: basic, data: ../examples/data/basic.jsonl}
    after: [start]            # stages to wait for that give nothing to this one
files: {...}                  # what `smelt recipe pin` adds: files by name that are in the store already

Paths are relative to the recipe's folder. `Recipe.of` refuses every key that nothing reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Final

import yaml
from smelt.artifact.v1 import artifact_pb2

from gateway.cli.training_file import read_file
from gateway.recipes.kinds import KINDS, Edge, Kind, Stage
from smeltkit import limits
from smeltkit.errors import BadConfig, SmeltError
from smeltkit.hints import meant
from smeltkit.ids import check_digest
from smeltkit.strict_yaml import no_text

_KEYS: Final = ("recipe", "stages", "files")
_FILE_KEYS: Final = ("digest", "size_bytes")
_NAME: Final = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
"""A name that Kubernetes takes as well."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked recipe."""

    name: str
    file: Path
    """Where it was read; paths in it are relative to its folder."""
    stages: Mapping[str, Stage]
    """By name; each after those that it needs."""
    files: Mapping[str, artifact_pb2.Descriptor] = field(default_factory=dict)
    """Files of the stages that are in the store, by the path that the recipe names."""

    @classmethod
    def read(cls, file: Path) -> Recipe:
        """The recipe in `file`; UnknownSource, BadConfig."""
        return cls.of(read_file(file, "recipe", "recipe and stages"), file)

    @classmethod
    def of(cls, value: Mapping[str, Any], file: Path) -> Recipe:
        """The recipe that a document says; BadConfig, BadName."""
        _check_keys(value, _KEYS, file.name)
        name = _name(value.get("recipe"), "recipe")
        written = value.get("stages")
        if not isinstance(written, Mapping) or not 1 <= len(written) <= limits.RECIPE_STAGES_MAX:
            raise BadConfig(f"{file.name}: stages must be 1 to {limits.RECIPE_STAGES_MAX} stages by name")
        found = {_name(key, "a stage"): _stage(str(key), item, file) for key, item in written.items()}
        for stage in found.values():
            _check_references(stage, found)
        _check_names(found)
        files = _files(value.get("files", {}))
        stages = {name: found[name] for name in _ordered(found)}
        recipe = cls(name=name, file=file, stages=stages, files=files)
        read = {path for stage in stages.values() for path in stage.kind.known_files(stage, files)}
        for path in files:
            if path not in read:
                raise BadConfig(f"files: no stage reads {path}; {meant(path, sorted(read)) if read else 'remove it'}")
        return recipe

    def with_files(self, files: Mapping[str, artifact_pb2.Descriptor]) -> Recipe:
        """The recipe with more of its files in the store."""
        return replace(self, files={**self.files, **files})

    def text(self) -> str:
        """The recipe as YAML that needs no file beside it, as far as its files are in the store."""
        stages = {stage.name: stage.written() for stage in self.stages.values()}
        files = {path: {key: getattr(entry, key) for key in _FILE_KEYS} for path, entry in sorted(self.files.items())}
        document = {"recipe": self.name, "stages": stages, **({"files": files} if files else {})}
        return yaml.safe_dump(document, sort_keys=False, width=120)


def _stage(name: str, value: Any, file: Path) -> Stage:
    where = f"stages.{name}"
    verbs = [key for key in value if key != "after"] if isinstance(value, Mapping) else []
    for verb in verbs:
        if verb not in KINDS:
            raise BadConfig(f"{where}.{verb} is no key of a stage; {meant(verb, [*KINDS, 'after'], f'{where}.')}")
    if len(verbs) != 1 or not isinstance(value[verbs[0]], Mapping):
        raise BadConfig(f"{where} must hold one verb with its keys, of {', '.join(KINDS)}, and may hold after")
    after = value.get("after", [])
    if not isinstance(after, list) or not all(isinstance(one, str) for one in after) or len(set(after)) < len(after):
        raise BadConfig(f"{where}.after={after!r} must be a list of stages, each once")
    kind = KINDS[verbs[0]]
    place = f"{where}.{kind.verb}"
    try:
        given, edges = _taken(kind, kind.expanded(value[kind.verb], file), place)
        return kind.stage(name, given, edges, tuple(after), file, place)
    except SmeltError as error:
        if error.message.startswith(place):
            raise
        raise type(error)(f"{place}: {error.message}") from error


def _taken(kind: Kind, given: Mapping[str, Any], where: str) -> tuple[dict[str, Any], tuple[Edge, ...]]:
    """The keys of a stage without those that take what others made, and these as edges."""
    rest, edges = {}, []
    for key, value in given.items():
        if key not in kind.takes:
            rest[key] = value
            continue
        is_list = key in kind.lists
        if is_list and (not isinstance(value, list) or not value):
            raise BadConfig(f"{where}.{key}={value!r} must be a list of one or more, such as [{{stage: NAME}}]")
        edges += [_edge(key, item, f"{where}.{key}") for item in (value if is_list else [value])]
    for key in kind.takes:
        if key not in given:
            raise BadConfig(
                f"{where}.{key} is missing: a {kind.takes[key]}, as {{stage: NAME}} or by its name or digest"
            )
    return rest, tuple(edges)


def _edge(key: str, value: Any, where: str) -> Edge:
    if isinstance(value, str) and value:
        return Edge(key=key, reference=value)
    if isinstance(value, Mapping) and list(value) == ["stage"] and isinstance(value["stage"], str):
        return Edge(key=key, stage=value["stage"])
    if not isinstance(value, Mapping | list):
        raise BadConfig(f"{where} {no_text(value)}, or {{stage: NAME}}")
    raise BadConfig(f"{where}={value!r} must be {{stage: NAME}}, or a name or digest as text")


def _check_references(stage: Stage, found: Mapping[str, Stage]) -> None:
    where = f"stages.{stage.name}"
    for key, name in (*((f"{edge.key}: stage", edge.stage) for edge in stage.edges if edge.stage),
                      *(("after", name) for name in stage.after)):  # fmt: skip
        if name == stage.name:
            raise BadConfig(f"{where}: {key} names the stage itself; name another")
        if name not in found:
            raise BadConfig(f"{where}: {key} names {name}, which is no stage; {meant(name, list(found))}")
    for edge in stage.edges:
        wanted = stage.kind.takes[edge.key]
        if edge.stage and (made := found[edge.stage].kind.makes) != wanted:
            fitting = [name for name, other in found.items() if other.kind.makes == wanted and name != stage.name]
            remedy = f"a {wanted} comes of {', '.join(fitting)}" if fitting else f"no stage makes a {wanted}"
            makes = f"makes a {made}" if made else "makes nothing"
            raise BadConfig(f"{where}: {edge.key} takes a {wanted}, but {edge.stage} {makes}; {remedy}")


def _check_names(found: Mapping[str, Stage]) -> None:
    """Every name is given by one stage, and what a stage makes is referred to by the stage."""
    makers: dict[str, str] = {}
    for stage in found.values():
        if not stage.gives:
            continue
        if stage.gives in makers:
            raise BadConfig(
                f"stages {makers[stage.gives]} and {stage.name} both give the name {stage.gives}; change one"
            )
        makers[stage.gives] = stage.name
    for stage in found.values():
        for edge in stage.edges:
            named = edge.reference if ":" in edge.reference else f"{edge.reference}:latest"
            if edge.reference and named in makers:
                raise BadConfig(
                    f"stages.{stage.name}: {edge.key} is {edge.reference}, the name that stage {makers[named]} gives;"
                    f" write {{stage: {makers[named]}}}"
                )


def _ordered(found: Mapping[str, Stage]) -> list[str]:
    """Names of stages, each after those that it needs, otherwise as they are written; BadConfig names a cycle."""
    sorter = TopologicalSorter({name: stage.needs for name, stage in found.items()})
    try:
        return list(sorter.static_order())
    except CycleError as error:
        raise BadConfig(f"stages wait for each other: {' <- '.join(error.args[1])}; take one of these out") from error


def _files(value: Any) -> dict[str, artifact_pb2.Descriptor]:
    if not isinstance(value, Mapping):
        raise BadConfig(f"files={value!r} must be files by path, as `smelt recipe pin` writes them")
    found = {}
    for path, entry in value.items():
        where = f"files.{path}"
        if not isinstance(entry, Mapping):
            raise BadConfig(f"{where}={entry!r} must hold {' and '.join(_FILE_KEYS)}")
        _check_keys(entry, _FILE_KEYS, where)
        digest, size_bytes = str(entry.get("digest")), entry.get("size_bytes")
        if not isinstance(size_bytes, int) or isinstance(size_bytes, bool) or size_bytes < 0:
            raise BadConfig(f"{where}.size_bytes={size_bytes!r} must be a whole number of bytes")
        try:
            check_digest(digest)
        except SmeltError as error:
            raise BadConfig(f"{where}.digest: {error.message}") from error
        media_type = "application/octet-stream"
        found[str(path)] = artifact_pb2.Descriptor(
            media_type=media_type, digest=digest, size_bytes=size_bytes, path=Path(str(path)).name
        )
    return found


def _check_keys(value: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in value:
        if key not in known:
            raise BadConfig(f"{where}: nothing reads {key}; {meant(key, known)}")


def _name(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadConfig(f"the name of {what} {no_text(value)}")
    if not _NAME.fullmatch(value):
        raise BadConfig(
            f"{value!r} cannot be the name of {what}; use 1 to 40 small letters, digits and hyphens, a letter first"
        )
    return value
