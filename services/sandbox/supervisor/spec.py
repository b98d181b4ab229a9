"""What the service tells a supervisor about its slot."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.sandbox.jail.spec import JailSpec
from services.sandbox.kernel.cgroups import Hierarchy


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotSpec:
    """How a slot is built, and what every record of it says."""

    index: int
    core: int
    """The one core of everything in the slot."""
    level: str
    missing_layers: tuple[str, ...]
    candidates: Mapping[str, JailSpec]
    """Profile to its jail; the first one is started with the slot."""
    judge: JailSpec
    uid_base: int
    """First host uid of this slot: two for the judge, then two a profile."""
    code: int
    """Descriptor of the memory file with the interpreter's code; -1 without one."""
    hierarchy: Hierarchy | None
    """Where its control group is made; None without."""
    group_name: str
    judge_digest: str
    profile_digests: Mapping[str, str]

    def to_wire(self) -> dict[str, Any]:
        """The spec as JSON."""
        hierarchy = self.hierarchy and {
            "version": self.hierarchy.version,
            "folders": {name: str(folder) for name, folder in self.hierarchy.folders.items()},
        }
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        candidates = {name: spec.to_json() for name, spec in self.candidates.items()}
        return {**fields, "candidates": candidates, "judge": self.judge.to_json(), "hierarchy": hierarchy}

    @classmethod
    def from_wire(cls, fields: Mapping[str, Any]) -> SlotSpec:
        """The inverse of `to_wire`."""
        raw = fields["hierarchy"]
        checked = {
            "hierarchy": raw and Hierarchy(raw["version"], {name: Path(path) for name, path in raw["folders"].items()}),
            "candidates": {name: JailSpec.from_json(text) for name, text in fields["candidates"].items()},
            "judge": JailSpec.from_json(fields["judge"]),
            "missing_layers": tuple(fields["missing_layers"]),
        }
        return cls(**{**fields, **checked})
