"""What a person types to mean an artifact: a name, a digest, or the first digits of a digest as tables show them."""

from __future__ import annotations

import asyncio
from itertools import islice

from smeltkit.blobs.store import Store
from smeltkit.catalog import Catalog
from smeltkit.errors import AmbiguousReference, UnknownArtifact
from smeltkit.ids import digest_digits

_CANDIDATES_SHOWN = 8


class References:
    """Resolves what is typed; a name goes before digits that look like it."""

    def __init__(self, catalog: Catalog, store: Store) -> None:
        self._catalog, self._store = catalog, store

    async def resolve(self, reference: str) -> str:
        """The digest meant. UnknownModel, UnknownArtifact, BadName; AmbiguousReference names those that it may be."""
        digits = digest_digits(reference)
        if not digits:
            return await self._catalog.resolve(reference)
        if entry := await self._catalog.get(reference):
            return entry.digest
        found = await asyncio.to_thread(lambda: list(islice(self._store.list_manifests(digits), _CANDIDATES_SHOWN)))
        if not found:
            raise UnknownArtifact(
                f"nothing is called {reference!r} and no digest begins so; `smelt models` lists models, `smelt results`"
                " reports"
            )
        if len(found) > 1:
            raise AmbiguousReference(f"{reference!r} may be {', '.join(found)}; give more digits")
        return found[0]
