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
    candidate: JailSpec
    judge: JailSpec
    uid_base: int
    """First of four host uids of this slot."""
    hierarchy: Hierarchy | None
    """Where its control group is made; None without."""
    group_name: str
    judge_digest: str
    profile_digest: str

    def to_wire(self) -> dict[str, Any]:
        """The spec as JSON."""
        hierarchy = self.hierarchy and {
            "version": self.hierarchy.version,
            "folders": {name: str(folder) for name, folder in self.hierarchy.folders.items()},
        }
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        jails = {"candidate": self.candidate.to_json(), "judge": self.judge.to_json()}
        return {**fields, **jails, "hierarchy": hierarchy}

    @classmethod
    def from_wire(cls, fields: Mapping[str, Any]) -> SlotSpec:
        """The inverse of `to_wire`."""
        raw = fields["hierarchy"]
        hierarchy = raw and Hierarchy(raw["version"], {name: Path(path) for name, path in raw["folders"].items()})
        jails = {name: JailSpec.from_json(fields[name]) for name in ("candidate", "judge")}
        return cls(**{**fields, **jails, "hierarchy": hierarchy, "missing_layers": tuple(fields["missing_layers"])})
