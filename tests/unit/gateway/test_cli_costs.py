"""What jobs cost: told by their results, summed by what they have in common, priced by the settings."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from scripted_gateway import DIGEST, gateway, job
from smelt.artifact.v1 import artifact_pb2
from smelt.job.v1 import job_pb2

from gateway.cli.costs import JobCost, cost_of, together, total
from gateway.cli.prices import PriceConfig
from smeltkit.errors import BadConfig

TOOK = {"time_s": 1800.0, "tokens": 4_000_000}
RUN = {"job": "job-3", "device": "NVIDIA H200", "settings": {"processes": 2}, "cost": TOOK}
PRICES = PriceConfig(currency="EUR", machine_hour=1.0, gpu_hour=3.0, million_tokens=0.5, gib=2.0)


def over(seconds: int, **fields: Any) -> job_pb2.Job:
    """A job that took so long."""
    times = {"create_time": Timestamp(seconds=100), "update_time": Timestamp(seconds=100 + seconds)}
    return job("SUCCEEDED", result_digest=DIGEST, tenant="alice", **times, **fields)


def result(size_bytes: int, **config: Any) -> artifact_pb2.Artifact:
    return artifact_pb2.Artifact(digest=DIGEST, size_bytes=size_bytes, config_json=json.dumps(config))


def test_a_training_costs_its_gpus_for_as_long_as_its_steps_lasted() -> None:
    """Not for the time that it waited."""
    cost = cost_of(over(9999, id="job-3", service="trainer", kind="train"), result(1 << 30), [RUN])
    assert (cost.time_s, cost.gpu_s, cost.tokens, cost.size_bytes) == (1800.0, 3600.0, 4_000_000, 1 << 30)
    assert cost.price(PRICES) == pytest.approx(0.5 + 3.0 + 2.0 + 2.0)


def test_a_training_without_a_record_has_no_measured_gpus() -> None:
    """Never 0 for what nobody measured."""
    cost = cost_of(over(60, service="trainer", kind="train"), None)
    assert (cost.time_s, cost.gpu_s, cost.tokens, cost.size_bytes) == (60.0, None, None, None)


def test_an_evaluation_costs_its_tokens_and_a_cached_job_nothing() -> None:
    report = result(100, completion_tokens=500, times={"total_s": 7.5, "generate_s": 7.0})
    cost = cost_of(over(60, service="evaluator", kind="evaluate"), report)
    assert (cost.time_s, cost.gpu_s, cost.tokens) == (7.5, 0.0, 500)
    assert cost_of(over(60, is_cached=True), report).time_s == 0.0


def test_sums_hold_what_was_measured() -> None:
    """By tenant, the longest first; an amount that nobody measured stays unknown."""
    costs = [
        JobCost(name="a", kind="k 1", tenant="alice", state="succeeded", time_s=1.0, gpu_s=None, tokens=5),
        JobCost(name="b", kind="k 2", tenant="bob", state="failed", time_s=9.0, gpu_s=2.0),
        JobCost(name="c", kind="k 1", tenant="alice", state="succeeded", time_s=3.0, gpu_s=None, size_bytes=7),
    ]
    bob, alice = together(costs, "tenant")
    assert (bob.name, bob.jobs, bob.time_s, bob.kind) == ("bob", 1, 9.0, "")
    assert (alice.jobs, alice.time_s, alice.gpu_s, alice.tokens, alice.size_bytes) == (2, 4.0, None, 5, 7)
    whole = total(costs)
    assert (whole.jobs, whole.time_s, whole.gpu_s) == (3, 13.0, 2.0)
    assert total([]).price(PriceConfig()) is None


def test_a_negative_price_is_refused() -> None:
    with pytest.raises(BadConfig, match="gpu_hour=-1 must be 0 or more"):
        PriceConfig(gpu_hour=-1.0)


async def test_the_command_prices_what_the_gateway_tells() -> None:
    """Running jobs are left out; a result that is gone leaves its bytes unknown."""
    jobs = [
        over(3600, service="importer", kind="quantize"),
        job("RUNNING", id="job-2", update_time=Timestamp(seconds=1)),
    ]
    answers = {
        "JobService.ListJobs": lambda request: job_pb2.ListJobsResponse(jobs=jobs),
        "ArtifactService.GetArtifact": lambda request: artifact_pb2.GetArtifactResponse(artifact=result(1 << 31)),
    }
    names = {"SMELT_PRICE_MACHINE_HOUR": "2", "SMELT_PRICE_GIB": "0.25", "SMELT_PRICE_CURRENCY": "EUR"}
    async with gateway(answers) as running:
        ended = await running.smelt("jobs", "cost", "--json", **names)
        shown = await running.smelt("jobs", "cost", "--by", "kind", **names)
    document = json.loads(ended.out)
    assert [(cost["name"], cost["price"], cost["tokens"]) for cost in document["costs"]] == [("job-1", 2.5, None)]
    assert document["total"]["price"] == 2.5 and document["prices"]["currency"] == "EUR"
    assert "EUR" in shown.out and "importer quantize" in shown.out and "2.50" in shown.out, shown
