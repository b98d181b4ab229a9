"""The verbs that make jobs, as calls: a command and a stage of a recipe plan and start them by the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import Message
from smelt.artifact.v1 import artifact_pb2
from smelt.evaluator.v1 import evaluator_pb2
from smelt.importer.v1 import importer_pb2
from smelt.job.v1 import job_pb2
from smelt.trainer.v1 import trainer_pb2

from smeltkit.errors import BadName
from smeltkit.ids import check_name, new_id

if TYPE_CHECKING:
    from gateway.cli.session import Session

HUB: Final = "hf://"


@dataclass(frozen=True, kw_only=True)
class Verb:
    """Work that its service plans and starts alike: from one specification."""

    service: str
    """Service that does it, e.g. importer."""
    kind: str
    """Kind of its jobs."""
    noun: str
    """What is planned and started, as the calls are named: PlanImport, StartImport."""
    messages: ModuleType
    """Where the requests are."""

    async def plan(self, session: Session, spec: Message) -> job_pb2.Plan:
        """What the work would do."""
        plan: job_pb2.Plan = (await self._call(session, f"Plan{self.noun}", spec=spec)).plan
        return plan

    async def start(self, session: Session, spec: Message) -> job_pb2.Job:
        """A job that does it; one that has succeeded if the result is stored."""
        job: job_pb2.Job = (await self._call(session, f"Start{self.noun}", spec=spec, request_id=new_id("req"))).job
        return job

    async def _call(self, session: Session, name: str, **fields: Any) -> Any:
        request = getattr(self.messages, f"{name}Request")(**fields)
        return await session.call(getattr(getattr(session, self.service), name), request)


IMPORT: Final = Verb(service="importer", kind="import", noun="Import", messages=importer_pb2)
QUANTIZE: Final = Verb(service="importer", kind="quantize", noun="Quantize", messages=importer_pb2)
EVALUATE: Final = Verb(service="evaluator", kind="evaluate", noun="Evaluation", messages=evaluator_pb2)
TRAIN: Final = Verb(service="trainer", kind="train", noun="Train", messages=trainer_pb2)


def hub_spec(source: str, name: str) -> importer_pb2.ImportSpec:
    """An import of hf://ORG/NAME or hf://ORG/NAME@REVISION; BadName."""
    repository, _, revision = source.removeprefix(HUB).partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise BadName(f"{source!r} is no hub address; write hf://ORG/NAME or hf://ORG/NAME@REVISION")
    hub = importer_pb2.HubSource(repository=repository, revision=revision)
    return importer_pb2.ImportSpec(name=check_name(name), hub=hub)


def upload_spec(files: Sequence[artifact_pb2.Descriptor], origin: str, name: str) -> importer_pb2.ImportSpec:
    """An import of stored files, which came from a folder or a file called `origin`; BadName."""
    upload = importer_pb2.UploadSource(files=files, origin=origin)
    return importer_pb2.ImportSpec(name=check_name(name), upload=upload)


def quantize_spec(bundle: str, scheme: str, name: str) -> importer_pb2.QuantizeSpec:
    """A quantization; without a name the result is called as the bundle, with the scheme as tag. BadName."""
    if not name and bundle.startswith("sha256:"):
        raise BadName("a digest gives no name for the result; add --name NAME")
    target = name or f"{bundle.partition(':')[0]}:{scheme.lower()}"
    return importer_pb2.QuantizeSpec(bundle=bundle, scheme=scheme.upper(), name=check_name(target))
