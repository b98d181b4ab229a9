"""The proof that a stored bundle works: the inference service loads it in a clean process and generates.

That service records the result as an artifact about the bundle, found by `refs/probes/<bundle>/<engine>`: every later
load on that engine must give the same tokens.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from smelt.inference.v1 import inference_pb2, inference_pb2_grpc

from smeltkit import limits
from smeltkit.blobs.store import Store
from smeltkit.errors import ProbeFailed
from smeltkit.ids import check_digest
from smeltkit.routing.channel import open_inference
from smeltkit.rpc.channel import call
from smeltkit.rpc.tls import Identity
from smeltkit.secret import Secret


class Prober(Protocol):
    """Whatever runs probes."""

    async def probe(self, bundle: str) -> inference_pb2.ProbeResponse:
        """What the bundle of this digest generates for the fixed prompts."""


class InferenceProber:
    """Asks the inference service at `address`, as `open_inference` takes it and all else."""

    def __init__(
        self, address: str, *, token: Secret | str = "", identity: Identity | None = None, start_s: float = 0.0
    ) -> None:
        self._address, self._token, self._identity, self._start_s = address, token, identity, start_s

    async def probe(self, bundle: str) -> inference_pb2.ProbeResponse:
        """The service's answer; ServiceUnavailable, ProbeFailed and others as the service says."""
        async with open_inference(
            self._address, token=self._token, identity=self._identity, start_s=self._start_s
        ) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            request = inference_pb2.ProbeRequest(model=bundle)
            response: inference_pb2.ProbeResponse = await call(stub.Probe, request, timeout_s=limits.PROBE_TIMEOUT_S)
            return response


async def prove(prober: Prober, store: Store, bundle: str) -> str:
    """Probes the bundle, judges the result, and returns the digest of the record that the service stored.

    ProbeFailed if no prompt gives any text: such a bundle may have perfect structure and is still dead.
    """
    response = await prober.probe(bundle)
    check_alive(response)
    name = reference(bundle, response.engine_digest)
    record = await asyncio.to_thread(store.get_ref, name)
    if record is None or (await asyncio.to_thread(store.get_manifest, record)).subject != bundle:
        raise ProbeFailed(f"the inference service ran the probe but left no record of it under {name}")
    return record


def check_alive(response: inference_pb2.ProbeResponse) -> None:
    """Raises ProbeFailed unless at least one prompt gave tokens that make text."""
    if not any(result.ids and result.text.strip() for result in response.results):
        raise ProbeFailed(
            f"the bundle generated no text for any of {len(response.results)} prompts; its weights, its tokenizer"
            " or its template do not belong together"
        )


def reference(bundle: str, engine_digest: str) -> str:
    """Name of the reference under which the probe of a bundle on an engine is found."""
    engine = check_digest(engine_digest).removeprefix("sha256:")
    return f"probes/{check_digest(bundle).removeprefix('sha256:')}/{engine}"
