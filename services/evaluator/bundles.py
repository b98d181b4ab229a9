"""What an evaluation needs to know of a bundle, read from its manifest alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from services.evaluator.extract import THINKING
from services.evaluator.suites import Suite
from smeltkit.errors import BadManifest, BadTemplate
from smeltkit.manifest import BUNDLE_TYPE, Manifest

_TEMPLATE = "chat_template.jinja"
_PARTS = {"tokenizer": "tokenizer.json", "template": _TEMPLATE, "contract": "contract.json", "config": "config.json"}


@dataclass(frozen=True, kw_only=True)
class BundleFacts:
    """A bundle's digests, its context length and the markers around its thinking."""

    digest: str
    scheme: str
    parts: dict[str, str]
    """Digests of the files that decide what a prompt becomes; without those the bundle lacks."""
    context_tokens: int
    thinking: tuple[str, str]
    """Markers around reasoning; the usual ones where the bundle declares none."""
    has_thinking: bool
    """Whether the bundle declares that it reasons."""

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> BundleFacts:
        """The facts of a stored bundle; BadManifest if it is none."""
        manifest.expect(BUNDLE_TYPE, remedy="give a model's name or its digest")
        layers = {name: manifest.layer(path) for name, path in _PARTS.items()}
        try:
            contract: dict[str, Any] = manifest.config["contract"]
            opening, closing = contract["thinking"] or THINKING
            return cls(
                digest=manifest.digest,
                scheme=manifest.config["scheme"],
                parts={name: layer.digest for name, layer in layers.items() if layer is not None},
                context_tokens=contract["context_tokens"],
                thinking=(opening, closing),
                has_thinking=contract["thinking"] is not None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadManifest(f"bundle {manifest.digest} has a malformed description: {error!r}") from error

    def check_can_take(self, suite: Suite) -> None:
        """Raises BadTemplate if the suite asks by chat and the bundle has no template."""
        if suite.extraction == "chat" and "template" not in self.parts:
            raise BadTemplate(f"suite {suite.name} asks by chat, but the bundle has no chat template; use a chat model")
