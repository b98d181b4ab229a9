"""What several replicas of inference say of their models, as one answer."""

from __future__ import annotations

from collections.abc import Sequence

from smelt.inference.v1 import inference_pb2 as pb

_READINESS = (pb.MODEL_STATE_FAILED, pb.MODEL_STATE_DRAINING, pb.MODEL_STATE_LOADING, pb.MODEL_STATE_READY)
"""States from the one that serves a caller least."""


def merged(lists: Sequence[pb.ListModelsResponse]) -> pb.ListModelsResponse:
    """Each model once, by digest: as the replica tells it that is readiest to serve it.

    Memory, slots and requests are sums over the replicas in that same state.
    """
    found: dict[str, pb.Model] = {}
    for model in (model for one in lists for model in one.models):
        known = found.setdefault(model.digest, pb.Model(digest=model.digest))
        if _rank(model) > _rank(known):
            known.CopyFrom(model)
        elif model.state == known.state:
            known.memory_bytes += model.memory_bytes
            known.slots += model.slots
            known.running += model.running
            known.waiting += model.waiting
    return pb.ListModelsResponse(models=[found[digest] for digest in sorted(found)])


def _rank(model: pb.Model) -> int:
    """-1 for a state that this release does not know."""
    return _READINESS.index(model.state) if model.state in _READINESS else -1
