"""The facts that services publish: the only place that says which message a fact carries.

`contracts/interface/events.yaml` tells consumers the same; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from google.protobuf.message import Message
from smelt.event.v1 import event_pb2

from smeltkit.errors import BadRequest

FACTS: Final[Mapping[str, type[Message]]] = MappingProxyType(
    {
        "evaluator.evaluation.finished": event_pb2.EvaluationFinished,
        "evaluator.gate.failed": event_pb2.GateFailed,
        "importer.bundle.stored": event_pb2.BundleStored,
        "inference.fallback.used": event_pb2.FallbackUsed,
        "inference.model.loaded": event_pb2.ModelLoaded,
        "inference.model.unloaded": event_pb2.ModelUnloaded,
        "trainer.alert.fired": event_pb2.TrainingAlert,
        "trainer.bundle.stored": event_pb2.BundleStored,
        "trainer.stage.entered": event_pb2.TrainingStage,
        "trainer.step.measured": event_pb2.TrainingStep,
        "trainer.training.finished": event_pb2.TrainingFinished,
    }
)
"""Fact to message; a fact is <service>.<noun>.<verb in the past>."""


def check_fact(fact: str, message: Message) -> str:
    """`fact` itself if it is declared and carries messages of this type, else BadRequest."""
    declared = FACTS.get(fact)
    if declared is None:
        raise BadRequest(f"fact {fact!r} is not declared; known: {', '.join(sorted(FACTS))}")
    if not isinstance(message, declared):
        said, expected = message.DESCRIPTOR.full_name, declared.DESCRIPTOR.full_name
        raise BadRequest(f"fact {fact} carries a {expected}, not a {said}")
    return fact
