"""What a stage can be: each kind is a command of `smelt` that reads its keys and says what its service is asked for."""

from __future__ import annotations

import asyncio
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

from google.protobuf.message import Message
from smelt.artifact.v1 import artifact_pb2
from smelt.evaluator.v1 import evaluator_pb2
from smelt.trainer.v1 import trainer_pb2

from gateway.cli.commands import evaluate, models, reports, train
from gateway.cli.demands import check_demand, is_met
from gateway.cli.documents import to_document
from gateway.cli.output import parse_bytes
from gateway.cli.training_file import data_paths, merged, read_file, requests_of, stored_rows, text_of, trainings
from gateway.cli.uploads import file_digest
from gateway.cli.verbs import (
    EVALUATE,
    HUB,
    IMPORT,
    QUANTIZE,
    TRAIN,
    Verb,
    hub_spec,
    quantize_spec,
    upload_spec,
)
from gateway.recipes.options import options_of, read_options
from smeltkit.errors import BadConfig, BadRequest
from smeltkit.ids import check_name

if TYPE_CHECKING:
    from gateway.cli.session import Session

BUNDLE: Final = "bundle"
REPORT: Final = "report"
Files = Mapping[str, artifact_pb2.Descriptor]
"""Stored files by the path that the recipe names."""
Inputs = Mapping[str, Sequence[str]]
"""Digests that go into a stage, by key."""


@dataclass(frozen=True, kw_only=True)
class Edge:
    """What goes into a stage under a key: the outcome of another, or what a name or digest means."""

    key: str
    stage: str = ""
    reference: str = ""

    def written(self) -> Any:
        """As it stands in a recipe."""
        return {"stage": self.stage} if self.stage else self.reference


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage, checked as far as that needs no platform."""

    name: str
    kind: Kind
    given: Mapping[str, Any]
    """Keys as written, without those that are edges."""
    values: Mapping[str, Any]
    """What they come to."""
    edges: tuple[Edge, ...]
    after: tuple[str, ...]
    gives: str
    """Name that its result gets, with tag; empty for none."""
    file: Path
    """The recipe."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Stages that must be over before it."""
        return tuple(dict.fromkeys([*(edge.stage for edge in self.edges if edge.stage), *self.after]))

    def written(self) -> dict[str, Any]:
        """As it stands in a recipe."""
        edges: dict[str, Any] = {}
        for edge in self.edges:
            is_list = edge.key in self.kind.lists
            edges[edge.key] = [*edges.get(edge.key, []), edge.written()] if is_list else edge.written()
        return {self.kind.verb: {**edges, **self.given}, **({"after": list(self.after)} if self.after else {})}


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a stage found that makes nothing: whether its demand is met, and on what that rests."""

    is_met: bool
    found: dict[str, Any]
    text: str
    """In one line."""


class Kind(ABC):
    """A verb as a stage."""

    verb: ClassVar[str]
    command: ClassVar[Callable[..., None]]
    takes: ClassVar[Mapping[str, str]]
    """Keys that take what other stages made, with what that must be."""
    lists: ClassVar[frozenset[str]] = frozenset()
    """Those of them that take several."""
    makes: ClassVar[str] = ""
    is_local: ClassVar[bool] = False
    """Whether it leaves something on the machine where it runs."""

    def stage(
        self,
        name: str,
        given: Mapping[str, Any],
        edges: tuple[Edge, ...],
        after: tuple[str, ...],
        file: Path,
        where: str,
    ) -> Stage:
        """The stage with these keys; BadConfig, BadName."""
        known = {key: option for key, option in options_of(type(self).command).items() if key not in self.takes}
        values = read_options(known, given, where)
        gives = self.check(values, edges, where)
        return Stage(name=name, kind=self, given=given, values=values, edges=edges, after=after, gives=gives, file=file)

    def expanded(self, given: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
        """The keys of a stage with those that stand in a file which it names."""
        return given

    def check(self, values: Mapping[str, Any], edges: Sequence[Edge], where: str) -> str:
        """The name that the result gets, empty for none; raises what can be refused without a platform."""
        return ""

    def known_files(self, stage: Stage, files: Files) -> list[str]:
        """The paths among those of `files` that the stage reads."""
        return []

    def missing(self, stage: Stage, files: Files) -> list[str]:
        """The paths that the stage reads and that are not among `files`."""
        return []

    async def store(self, session: Session, stage: Stage) -> dict[str, artifact_pb2.Descriptor]:
        """Stores what lies on this machine and goes into the stage."""
        return {}


class JobKind(Kind):
    """A stage that is a job and makes an artifact."""

    job: ClassVar[Verb]

    @abstractmethod
    def spec(self, stage: Stage, inputs: Inputs, files: Files) -> Message:
        """What its service is asked for."""


class DecisionKind(Kind):
    """A stage that decides by what others made, and makes nothing."""

    @abstractmethod
    async def decide(self, session: Session, stage: Stage, inputs: Inputs) -> Decision:
        """What it finds."""


class _Import(JobKind):
    verb, command, job, makes, takes = "import", models.import_, IMPORT, BUNDLE, {}

    def check(self, values: Mapping[str, Any], edges: Sequence[Edge], where: str) -> str:
        source = values["source"]
        if not source.startswith(HUB) and Path(source).name in ("", ".."):
            raise BadConfig(f"{where}.source={source!r} must end in the name of a folder or file")
        return check_name(values["name"])

    def known_files(self, stage: Stage, files: Files) -> list[str]:
        source = Path(stage.values["source"]).as_posix()
        return [path for path in files if path == source or Path(path).parent.as_posix() == source]

    async def store(self, session: Session, stage: Stage) -> dict[str, artifact_pb2.Descriptor]:
        from gateway.cli.uploads import stored_model

        source = Path(stage.values["source"])
        stored = await stored_model(session, stage.file.parent / source)
        folder = source if (stage.file.parent / source).is_dir() else source.parent
        return {(folder / entry.path).as_posix(): entry for entry in stored}

    def missing(self, stage: Stage, files: Files) -> list[str]:
        source = stage.values["source"]
        return [] if source.startswith(HUB) or self.known_files(stage, files) else [source]

    def spec(self, stage: Stage, inputs: Inputs, files: Files) -> Message:
        source, name = stage.values["source"], stage.values["name"]
        if source.startswith(HUB):
            return hub_spec(source, name)
        return upload_spec([files[path] for path in self.known_files(stage, files)], Path(source).name, name)


class _Train(JobKind):
    verb, job, makes, takes = "train", TRAIN, BUNDLE, {"base": BUNDLE}

    def expanded(self, given: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
        if "file" not in given:
            return given
        name = given["file"]
        if not isinstance(name, str) or not name:
            raise BadConfig(f"file={name!r} must be the path of a training file")
        value = _moved(read_file(file.parent / name), Path(name).parent)
        return merged(value, {key: item for key, item in given.items() if key != "file"})

    def stage(
        self,
        name: str,
        given: Mapping[str, Any],
        edges: tuple[Edge, ...],
        after: tuple[str, ...],
        file: Path,
        where: str,
    ) -> Stage:
        for key in ("adapters", "until_step"):
            if key in given:
                raise BadConfig(f"{where}.{key}: a stage makes one whole model; use `smelt train apply` for {key}")
        values = dict(given)
        vram = values.pop("vram", "")
        if not isinstance(vram, str):
            raise BadConfig(f"{where}.vram={vram!r} must be a size such as 40GiB")
        stage = Stage(
            name=name, kind=self, given=given, values={"vram": vram, "training": values}, edges=edges, after=after,
            gives=check_name(text_of(values, "name", file)) if "name" in values else "", file=file,
        )  # fmt: skip
        self._data(stage)
        return stage

    def known_files(self, stage: Stage, files: Files) -> list[str]:
        return [name for name in self._data(stage) if name in files]

    def missing(self, stage: Stage, files: Files) -> list[str]:
        return [name for name in self._data(stage) if name not in files]

    async def store(self, session: Session, stage: Stage) -> dict[str, artifact_pb2.Descriptor]:
        named = self._data(stage)
        stored = await stored_rows(session, stage.file, list(named.values()))
        return {name: stored[path] for name, path in named.items()}

    def spec(self, stage: Stage, inputs: Inputs, files: Files) -> Message:
        stored = {stage.file.parent / path: entry for path, entry in files.items()}
        (spec,) = requests_of(stage.file, self._trainings(stage, inputs["base"][0]), stored)
        memory_bytes = parse_bytes(stage.values["vram"], "vram") if stage.values["vram"] else 0
        spec.gpu.CopyFrom(trainer_pb2.GpuTerms(waits=True, memory_bytes=memory_bytes))
        return spec

    def _data(self, stage: Stage) -> dict[str, Path]:
        """The data files by the names that the recipe gives them."""
        folder, paths = stage.file.parent, data_paths(stage.file, self._trainings(stage, ""))
        return {(path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix(): path for path in paths}

    def _trainings(self, stage: Stage, base: str) -> list[dict[str, Any]]:
        return trainings({**stage.values["training"], "base": base}, stage.file)


class _Quantize(JobKind):
    verb, command, job, makes, takes = "quantize", models.quantize, QUANTIZE, BUNDLE, {"ref": BUNDLE}

    def check(self, values: Mapping[str, Any], edges: Sequence[Edge], where: str) -> str:
        if edges[0].stage and not values["name"]:
            raise BadConfig(f"{where}.name is missing: the name of the smaller model")
        return str(quantize_spec(edges[0].reference, values["scheme"], values["name"]).name)

    def spec(self, stage: Stage, inputs: Inputs, files: Files) -> Message:
        return quantize_spec(inputs["ref"][0], stage.values["scheme"], stage.gives)


class _Eval(JobKind):
    verb, command, job, makes, takes = "eval", evaluate.eval_, EVALUATE, REPORT, {"ref": BUNDLE}

    def known_files(self, stage: Stage, files: Files) -> list[str]:
        return [path for path in self._data(stage) if path in files]

    def missing(self, stage: Stage, files: Files) -> list[str]:
        return [path for path in self._data(stage) if path not in files]

    async def store(self, session: Session, stage: Stage) -> dict[str, artifact_pb2.Descriptor]:
        from gateway.cli.suite_data import stored_data

        suite, folder = stage.values["suite"], stage.file.parent
        return {path: await stored_data(session, suite, str(folder / path)) for path in self._data(stage)}

    def spec(self, stage: Stage, inputs: Inputs, files: Files) -> Message:
        values = {key: value for key, value in stage.values.items() if key != "data"}
        digest = "".join(files[path].digest for path in self._data(stage))
        return evaluator_pb2.EvaluationSpec(bundle=inputs["ref"][0], data_digest=digest, **values)

    def _data(self, stage: Stage) -> list[str]:
        """The suite's data, if the recipe says where."""
        return [Path(stage.values["data"]).as_posix()] if stage.values["data"] else []


class _Compare(DecisionKind):
    verb, command, takes = "compare", reports.compare, {"baseline": REPORT, "candidate": REPORT}

    def check(self, values: Mapping[str, Any], edges: Sequence[Edge], where: str) -> str:
        check_demand(values["must"])
        return ""

    async def decide(self, session: Session, stage: Stage, inputs: Inputs) -> Decision:
        request = evaluator_pb2.CompareRequest(baseline=inputs["baseline"][0], candidate=inputs["candidate"][0])
        reply = await session.call(session.evaluator.Compare, request)
        text = (
            f"{reply.verdict}, {reply.difference:+.1%} [{reply.low:+.1%}, {reply.high:+.1%}], p = {reply.p_value:.2g}"
        )
        return Decision(is_met=is_met(stage.values["must"], reply), found=to_document(reply), text=text)


class _Gate(DecisionKind):
    verb, command, takes = "gate", reports.gate, {"ref": BUNDLE, "report": REPORT}
    lists = frozenset({"report"})

    async def decide(self, session: Session, stage: Stage, inputs: Inputs) -> Decision:
        request = evaluator_pb2.CheckGateRequest(
            bundle_digest=inputs["ref"][0], reports=inputs["report"], clauses=stage.values["clause"]
        )
        reply = await session.call(session.evaluator.CheckGate, request)
        text = "; ".join(f"{one.clause}: {one.measured}" for one in reply.clauses)
        return Decision(is_met=reply.is_met, found=to_document(reply), text=text)


class _Archive(DecisionKind):
    verb, command, takes, is_local = "archive", train.archive, {"ref": BUNDLE}, True

    async def decide(self, session: Session, stage: Stage, inputs: Inputs) -> Decision:
        from gateway.cli.archives import write_archive
        from gateway.cli.commands.runs import find_run

        target = stage.file.parent / stage.values["file"]
        if not target.parent.is_dir():
            raise BadRequest(f"{target.parent} is no folder; make it first")
        bundle, run = await session.artifact(inputs["ref"][0]), await find_run(session, inputs["ref"][0])
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            fresh = Path(folder) / target.name
            found = await write_archive(session, bundle, run, fresh)
            if target.exists() and (await asyncio.to_thread(file_digest, target))[0] != found["digest"]:
                raise BadRequest(f"{target} exists already and is another archive; name another file, or remove it")
            fresh.replace(target)
        return Decision(is_met=True, found={**found, "path": stage.values["file"]}, text=found["digest"])


KINDS: Final[Mapping[str, Kind]] = {
    kind.verb: kind for kind in (_Import(), _Train(), _Quantize(), _Eval(), _Compare(), _Gate(), _Archive())
}


def _moved(value: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A training file's keys with its data named as from another folder, of which `folder` is the way to its own."""

    def moved(name: Any) -> Any:
        return (folder / name).as_posix() if isinstance(name, str) else name

    found = dict(value)
    for key in ("data", "heldout"):
        item = found.get(key)
        if isinstance(item, Mapping):
            found[key] = {moved(name): passes for name, passes in item.items()}
        elif item is not None:
            found[key] = [moved(name) for name in item] if isinstance(item, list) else moved(item)
    if isinstance(found.get("stages"), list):
        found["stages"] = [_moved(one, folder) if isinstance(one, Mapping) else one for one in found["stages"]]
    return found
