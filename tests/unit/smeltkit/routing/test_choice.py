"""Who takes a request: the least loaded, with what it has computed before counted in its favour. No transport."""

from __future__ import annotations

from collections import Counter

import pytest
from smelt.inference.v1 import inference_pb2 as pb

from smeltkit import limits
from smeltkit.routing.choice import Candidate, choose, to_warm
from smeltkit.routing.demand import Demand, demand_of

GENERATE = "/smelt.inference.v1.InferenceService/Generate"
BLOCK_BYTES = 4 * limits.ROUTE_BLOCK_TOKENS


def replicas(*loads: int) -> list[Candidate]:
    """Serving candidates with so many tokens of others in flight."""
    made = [Candidate(f"10.0.0.{number}:50051") for number in range(len(loads))]
    for candidate, load in zip(made, loads, strict=True):
        candidate.is_serving = True
        candidate.hear(load, frozenset({"model"}))
    return made


def asking(text: str, max_tokens: int = 64) -> Demand:
    return demand_of(GENERATE, pb.GenerateRequest(model="model", text=text, max_tokens=max_tokens))


def test_fewest_tokens_in_flight_win() -> None:
    busy, idle, busier = replicas(500, 20, 900)
    assert choose([busy, idle, busier], asking("short")) is idle


def test_own_requests_count_until_they_end_and_a_report_counts_them_once() -> None:
    [replica] = replicas(0)
    demand = asking("x" * 400)
    assert demand.tokens == 164
    replica.take(demand)
    replica.hear(164 + 50, frozenset())
    assert (replica.load, replica.requests) == (214, 1)
    replica.give_back(demand)
    assert (replica.load, replica.requests) == (50, 0)


def test_requests_without_load_reports_are_spread_by_own_count() -> None:
    three, taken = replicas(0, 0, 0), Counter[str]()
    for number in range(30):
        chosen = choose(three, demand := asking(f"{number}"))
        assert chosen is not None
        chosen.take(demand)
        taken[chosen.address] += 1
    assert sorted(taken.values()) == [10, 10, 10]


def test_a_common_beginning_prefers_the_replica_that_has_it_as_far_as_it_saves_work() -> None:
    holder, other = replicas(0, 0)
    beginning = "once upon a time " * 100
    holder.take(first := asking(beginning))
    holder.give_back(first)
    again = asking(beginning + "there was")
    saved = holder.saved_tokens(again)
    assert saved == len(beginning) // BLOCK_BYTES * limits.ROUTE_BLOCK_TOKENS and not other.saved_tokens(again)
    for load, chosen in ((0, holder), (saved - 1, holder), (saved + 1, other)):
        holder.hear(load, frozenset({"model"}))
        assert choose([holder, other], again) is chosen


def test_equal_beginnings_meet_on_idle_replicas_whoever_routes() -> None:
    """Two routers without common memory choose alike; different beginnings use all replicas."""
    beginnings = [f"{number:04} system prompt " * 20 for number in range(40)]
    chosen = [[choose(replicas(0, 0, 0), asking(text + tail)) for text in beginnings] for tail in ("a", "b")]
    here, there = ([candidate.address for candidate in made if candidate] for made in chosen)
    assert here == there and len(set(here)) == 3


def test_a_replica_that_does_not_serve_gets_nothing() -> None:
    [gone, loaded] = replicas(0, 5000)
    gone.is_serving = False
    assert choose([gone, loaded], asking("x")) is loaded
    loaded.is_serving = False
    assert choose([gone, loaded], asking("x")) is None


def test_a_replica_that_has_the_model_goes_before_idle_ones_without_and_the_idlest_is_warmed() -> None:
    warm, cold = replicas(0, 0)
    cold.hear(0, frozenset())
    demand = asking("x")
    assert choose([warm, cold], demand) is warm and to_warm([warm, cold], demand) is None
    warm.hear(limits.ROUTE_WARM_TOKENS, frozenset({"model"}))
    assert choose([warm, cold], demand) is warm and to_warm([warm, cold], demand) is cold
    warm.hear(0, frozenset())
    assert choose([warm, cold], demand) in (warm, cold) and to_warm([warm, cold], demand) is None


def test_what_is_known_of_a_process_goes_with_it() -> None:
    [replica] = replicas(70)
    replica.take(demand := asking("a common beginning " * 50))
    replica.give_back(demand)
    replica.forget()
    assert (replica.load, replica.saved_tokens(demand), replica.has("any")) == (0, 0, True)


def test_memory_of_beginnings_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ROUTE_BEGINNINGS_MAX", 4)
    [replica] = replicas(0)
    first, *_, last = made = [asking(f"{number}" * BLOCK_BYTES) for number in range(6)]
    for demand in made:
        replica.take(demand)
    assert not replica.saved_tokens(first) and replica.saved_tokens(last) == limits.ROUTE_BLOCK_TOKENS


@pytest.mark.parametrize("kind", ["text", "chat", "tokens"])
def test_demand_is_read_from_each_kind_of_prompt_and_from_bytes(kind: str) -> None:
    request = pb.GenerateRequest(model="model")
    if kind == "text":
        request.text = "abcd" * 100
    elif kind == "chat":
        request.chat.messages.add(role="user", content="abcd" * 100)
    else:
        request.tokens.ids.extend(range(100))
    demand = demand_of(GENERATE, request)
    assert demand == demand_of(GENERATE, request.SerializeToString())
    assert 100 <= demand.tokens - limits.ROUTE_COMPLETION_TOKENS <= 102
    assert (demand.model, len(demand.beginnings)) == ("model", 3)


def test_a_long_prompt_is_read_to_a_bound_and_another_model_shares_no_beginning() -> None:
    request = pb.GenerateRequest(model="model", text="x" * 1_000_000)
    long = demand_of(GENERATE, request)
    assert len(long.beginnings) == limits.ROUTE_BLOCKS_MAX
    request.model = "another"
    assert not set(long.beginnings) & set(demand_of(GENERATE, request).beginnings)


def test_what_is_no_request_of_inference_asks_for_nothing() -> None:
    assert demand_of(GENERATE, b"\xff\xff\xff") == demand_of("/other.Service/Call", b"x") == Demand()
    listed = demand_of("/smelt.inference.v1.InferenceService/ListModels", pb.ListModelsRequest())
    assert listed == Demand()


def test_a_question_about_a_model_goes_to_who_has_it() -> None:
    method, request = "/smelt.inference.v1.InferenceService/ListModels", pb.ListModelsRequest(model="model")
    warm, cold = replicas(900, 0)
    cold.hear(0, frozenset())
    assert choose([cold, warm], demand_of(method, request)) is warm
