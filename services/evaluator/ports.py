"""What the harness needs of the world, as protocols and plain values; the adapters beside it speak gRPC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.evaluator.prompts import Prompt
from smeltkit import limits


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What serves a bundle, as far as it decides the numbers."""

    name: str
    digest: str
    context_tokens: int
    slots: int


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One completion to be made: a sample of a problem. `temperature` 0 is greedy."""

    problem: str
    sample: int
    bundle: str
    prompt: Prompt
    max_tokens: int
    stop: tuple[str, ...]
    temperature: float
    top_p: float
    seed: int
    timeout_s: float = limits.EVALUATION_FIRST_TOKEN_S
    """Seconds it may take."""

    def settings(self) -> dict[str, Any]:
        """The settings under the names by which the effective ones come back."""
        return {
            "model": self.bundle,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": self.seed,
            "dropped_tokens": 0,
        }


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came back: text, why it ended ("stop" or "length"), token counts, and what was really used."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    effective: Mapping[str, Any]
    """Settings in force, under the names of `Generation.settings`."""
    engine: Mapping[str, Any]
    """Engine, its digest, device, storage type and stop ids."""
    load_id: str = ""
    """The load of the model that gave it."""
    replica_id: str = ""
    """The process that gave it."""


@dataclass(frozen=True, kw_only=True)
class JudgeInfo:
    """The judge: digest of its sources and policy, isolation level, runs at once, model of its CPU."""

    digest: str
    level: str
    slots: int
    cpu: str
    profiles: Mapping[str, str] = field(default_factory=dict)
    """Digest of each profile: its interpreter and packages."""

    def profile(self, name: str) -> str:
        """The digest of the profile that a suite names, by default the one without packages; empty if unknown."""
        return self.profiles.get(name or "bare", "")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one candidate in seconds of CPU time and of wall clock."""

    cpu_s: float
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A program and the tests that it must pass."""

    program: str
    form: str
    tests: str
    preamble: str
    setup: str
    entry_point: str
    exports: tuple[str, ...]
    limits: Limits
    seed: str
    is_rerun_near_limit: bool
    profile: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge decided, and what it measured; `facts` are plain values for the record."""

    verdict: str
    detail: str
    cpu_s: float
    facts: Mapping[str, Any] = field(default_factory=dict)


class Inference(Protocol):
    """Serves bundles."""

    async def load(self, bundle: str) -> Engine:
        """The engine that serves `bundle`, ready."""

    async def generate(self, generation: Generation) -> Completion:
        """One completion, to its end; PromptTooLong if the context does not hold prompt and `max_tokens`."""

    async def count_tokens(self, generation: Generation) -> int:
        """Tokens of the prompt, as generation would use it."""


class Judge(Protocol):
    """Judges programs."""

    async def describe(self) -> JudgeInfo:
        """Which judge this is."""

    async def judge(self, candidate: Candidate) -> Verdict:
        """The verdict on one candidate."""


class Attempt(Protocol):
    """The attempt at a job that work is done for; `smeltkit.jobs.attempt.JobContext` is one."""

    fence: int

    async def progress(self, phase: str, done: int, total: int, unit: str = "", message: str = "") -> None:
        """Reports how far the work is."""

    async def check_alive(self) -> None:
        """Raises if this attempt may have no more effects."""
