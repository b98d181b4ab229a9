"""Names of spans, attributes and metrics: the only place where they are written as text.

RPC and messaging names follow the semantic conventions of OpenTelemetry, generation names those for generative AI (as
strings: they are still in development); ours begin with `smelt.`. `contracts/interface/telemetry.yaml` mirrors this
file for people who build dashboards; a test holds the two together. No attribute of a metric is ever an id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_LATENCY_S: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_TOKENS: Final = tuple(float(4**power) for power in range(13))

COUNTER: Final = "counter"
GAUGE: Final = "gauge"
HISTOGRAM: Final = "histogram"
LATEST: Final = "latest"
"""A level that each process tells as it last saw it: of several the largest counts, not the sum."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric: its name, what kind of instrument it is, its unit (UCUM), its meaning and its bucket boundaries."""

    name: str
    instrument: str
    unit: str
    meaning: str
    boundaries: tuple[float, ...] = ()


# Attributes of calls, as in the semantic conventions of RPC.
RPC_SYSTEM: Final = "rpc.system.name"
RPC_METHOD: Final = "rpc.method"
RPC_STATUS: Final = "rpc.response.status_code"
ERROR_TYPE: Final = "error.type"
SERVER_ADDRESS: Final = "server.address"

# Attributes of messages.
MESSAGING_SYSTEM: Final = "messaging.system"
MESSAGING_DESTINATION: Final = "messaging.destination.name"
MESSAGING_OPERATION: Final = "messaging.operation.name"

# Attributes of requests at the HTTP edge.
HTTP_METHOD: Final = "http.request.method"
HTTP_ROUTE: Final = "http.route"
HTTP_STATUS: Final = "http.response.status_code"

# Attributes of generation.
GEN_AI_OPERATION: Final = "gen_ai.operation.name"
GEN_AI_MODEL: Final = "gen_ai.request.model"
GEN_AI_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
GEN_AI_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
GEN_AI_TOKEN_TYPE: Final = "gen_ai.token.type"

# Our own attributes. Ids are for spans only.
SERVICE: Final = "smelt.service"
JOB_ID: Final = "smelt.job.id"
JOB_KIND: Final = "smelt.job.kind"
JOB_ATTEMPT: Final = "smelt.job.attempt"
JOB_STATE: Final = "smelt.job.state"
SUITE: Final = "smelt.suite"
ENGINE: Final = "smelt.engine"
SCHEME: Final = "smelt.scheme"
VERDICT: Final = "smelt.sandbox.verdict"
SANDBOX_LEVEL: Final = "smelt.sandbox.level"
STEP: Final = "smelt.step"
COMMAND: Final = "smelt.command"

RPC_SERVER_DURATION: Final = Metric(
    name="rpc.server.call.duration",
    instrument=HISTOGRAM,
    unit="s",
    meaning="Time from the arrival of a call to its status",
    boundaries=_LATENCY_S,
)
RPC_CLIENT_DURATION: Final = Metric(
    name="rpc.client.call.duration",
    instrument=HISTOGRAM,
    unit="s",
    meaning="Time from the start of an outgoing call to its status",
    boundaries=_LATENCY_S,
)
GEN_AI_SERVER_DURATION: Final = Metric(
    name="gen_ai.server.request.duration",
    instrument=HISTOGRAM,
    unit="s",
    meaning="Time from the arrival of a generation request to its last token",
    boundaries=_LATENCY_S,
)
GEN_AI_FIRST_TOKEN: Final = Metric(
    name="gen_ai.server.time_to_first_token",
    instrument=HISTOGRAM,
    unit="s",
    meaning="Time from the arrival of a generation request to its first token",
    boundaries=_LATENCY_S,
)
GEN_AI_TIME_PER_TOKEN: Final = Metric(
    name="gen_ai.server.time_per_output_token",
    instrument=HISTOGRAM,
    unit="s",
    meaning="Time per generated token after the first",
    boundaries=_LATENCY_S,
)
GEN_AI_TOKENS: Final = Metric(
    name="gen_ai.client.token.usage",
    instrument=HISTOGRAM,
    unit="{token}",
    meaning="Tokens of a request, by kind: input or output",
    boundaries=_TOKENS,
)
QUEUE_DEPTH: Final = Metric(
    name="smelt.inference.queue.depth",
    instrument=GAUGE,
    unit="{request}",
    meaning="Generation and scoring requests that wait",
)
RUNNING: Final = Metric(
    name="smelt.inference.requests.running",
    instrument=GAUGE,
    unit="{request}",
    meaning="Generation requests that have their first token and not their last",
)
TOKENS_IN_FLIGHT: Final = Metric(
    name="smelt.inference.tokens.in_flight",
    instrument=GAUGE,
    unit="{token}",
    meaning="Tokens of the prompts of requests that wait or run, and of the completions they may ask for",
)
ROUTE_WAITING: Final = Metric(
    name="smelt.routing.requests.waiting",
    instrument=GAUGE,
    unit="{request}",
    meaning="Requests for a model that wait because no replica of inference runs",
)
BATCH_ROWS: Final = Metric(
    name="smelt.inference.batch.rows",
    instrument=HISTOGRAM,
    unit="{row}",
    meaning="Rows of one decode",
    boundaries=_TOKENS,
)
JOB_AGE: Final = Metric(
    name="smelt.job.age",
    instrument=HISTOGRAM,
    unit="s",
    meaning="Time from the acceptance of a job to its final state",
    boundaries=(*_LATENCY_S, 7200.0, 28800.0, 86400.0),
)
JOB_WAIT: Final = Metric(
    name="smelt.job.wait",
    instrument=LATEST,
    unit="s",
    meaning="Time for which the oldest job in the queue of a service has been seen there",
)
JOBS_DEAD: Final = Metric(
    name="smelt.job.dead",
    instrument=COUNTER,
    unit="{job}",
    meaning="Jobs that failed because their attempts, or the patience with a service without workers, were used up",
)
DEPENDENCY_FAILURES: Final = Metric(
    name="smelt.dependency.failures",
    instrument=COUNTER,
    unit="{call}",
    meaning="Calls that NATS or the object store refused or did not answer, by reason",
)
LEASES_LOST: Final = Metric(
    name="smelt.job.leases.lost",
    instrument=COUNTER,
    unit="{lease}",
    meaning="Leases that expired while work was going on",
)
VERDICTS: Final = Metric(
    name="smelt.sandbox.verdicts", instrument=COUNTER, unit="{verdict}", meaning="Verdicts of the judge, by verdict"
)
FALLBACKS: Final = Metric(
    name="smelt.fallbacks", instrument=COUNTER, unit="{event}", meaning="Times that something slower or weaker was used"
)


def attributes() -> list[str]:
    """Every attribute name, sorted."""
    return sorted(
        value for key, value in globals().items() if key.isupper() and isinstance(value, str) and "." in value
    )


def metrics() -> dict[str, Metric]:
    """Every metric by name."""
    return {value.name: value for value in globals().values() if isinstance(value, Metric)}
