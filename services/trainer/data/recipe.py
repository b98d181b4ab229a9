"""All that decides which ids and targets the rows of a file become; equal recipes and files give equal samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from services.trainer.data.infill import Infill
from services.trainer.data.samples import Encoder
from services.trainer.settings.columns import ColumnSettings
from services.trainer.settings.training import FimSettings, TrainSettings
from smeltkit.ids import digest_bytes
from smeltkit.manifest import canonical_json
from smeltkit.ml.contract import GenerationContract
from smeltkit.ml.model_files import template_of
from smeltkit.revision import code_revision

_CODE: Final = ("services.trainer.data", "smeltkit.ml")
_LIBRARIES: Final = ("tokenizers", "jinja2")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the rows of one file are read, for the tokenizer and the chat template of a base."""

    contract: GenerationContract
    ids_of: str
    """Digest of the tokenizer that made ids in rows; empty if there are none."""
    sequence_tokens: int
    text_only: bool
    """Whether a conversation is a wrong row."""
    form: str
    """What the file is, see `TrainSettings.data_format`."""
    columns: ColumnSettings
    fim: FimSettings
    seed: int
    """Decides what is rearranged; 0 where nothing is."""

    @classmethod
    def of(cls, contract: GenerationContract, settings: TrainSettings, *, is_heldout: bool = False) -> Recipe:
        """How a training reads its data, or its held-out data, which stays as it is."""
        fim = FimSettings() if is_heldout else settings.fim
        return cls(
            contract=contract,
            ids_of=settings.ids_of,
            sequence_tokens=settings.sequence_tokens,
            text_only=settings.method == "pretrain" and not is_heldout,
            form=settings.data_format,
            columns=settings.columns,
            fim=fim,
            seed=settings.seed if fim.share else 0,
        )

    def encoder(self, base: Path) -> Encoder:
        """The encoder of the base in a folder."""
        return Encoder(base, self.contract, ids_of=self.ids_of)

    def infill(self, encoder: Encoder) -> Infill | None:
        """What rearranges rows, if anything does."""
        return Infill(encoder.tokenizer, self.fim, self.seed) if self.fim.share else None

    def digest(self, base: Path) -> str:
        """Of everything here, of tokenizer and chat template in a base's folder, and of the code that reads rows."""
        return digest_bytes(
            canonical_json(
                {
                    **self.to_dict(),
                    "tokenizer": digest_bytes((base / "tokenizer.json").read_bytes()),
                    "template": digest_bytes((template_of(base) or "").encode()),
                    "code": [code_revision(_CODE), *map(version, _LIBRARIES)],
                }
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        plain = {one.name: getattr(self, one.name) for one in fields(self)}
        parts = {"fim": asdict(self.fim), "columns": asdict(self.columns)}
        return {**plain, "contract": self.contract.to_dict(), **parts}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Recipe:
        """The recipe of `to_dict`."""
        parts = {
            "contract": GenerationContract.from_dict(value["contract"]),
            "fim": FimSettings(**value["fim"]),
            "columns": ColumnSettings(**value["columns"]),
        }
        return cls(**{**value, **parts})
