"""Which replica takes a request: the one with the fewest tokens to do, where a beginning of the prompt that it has
computed before counts as done. So a common beginning draws requests to one replica exactly as far as it saves work.

A replica's load is what this router has in flight there, and what the replica reported beyond that: others' requests.
A model that no idle replica holds is not waited for while another replica serves it: `to_warm` says who should load it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

from smeltkit import limits
from smeltkit.routing.demand import Demand


class Candidate:
    """One replica as a router sees it. Used on one event loop."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.is_serving = False
        """Whether it takes new work."""
        self.requests = 0
        """Requests of this router in flight."""
        self._tokens = 0
        self._others = 0
        self._models: frozenset[str] | None = None
        self._beginnings: OrderedDict[bytes, None] = OrderedDict()

    @property
    def load(self) -> int:
        """Tokens in flight, of this router and of others."""
        return self._tokens + self._others

    def take(self, demand: Demand) -> None:
        """Counts a request that begins; its prompt's beginnings are remembered."""
        self.requests += 1
        self._tokens += demand.tokens
        for beginning in demand.beginnings:
            self._beginnings[beginning] = None
            self._beginnings.move_to_end(beginning)
        while len(self._beginnings) > limits.ROUTE_BEGINNINGS_MAX:
            self._beginnings.popitem(last=False)

    def give_back(self, demand: Demand) -> None:
        """Counts a request that ended."""
        self.requests -= 1
        self._tokens -= demand.tokens

    def hear(self, tokens: int, models: frozenset[str]) -> None:
        """Takes in a report: `tokens` in flight there, of whomever, and the `models` that are ready."""
        self._others, self._models = max(0, tokens - self._tokens), models

    def forget(self) -> None:
        """Drops what is known of a process that is gone: another one may come at its address."""
        self._others, self._models = 0, None
        self._beginnings.clear()

    def has(self, model: str) -> bool:
        """Whether the model is ready there; taken for granted of a replica that does not tell."""
        return not model or self._models is None or model in self._models

    def saved_tokens(self, demand: Demand) -> int:
        """Tokens of the prompt that it need not compute again."""
        count = 0
        for beginning in demand.beginnings:
            if beginning not in self._beginnings:
                break
            count += 1
        return count * limits.ROUTE_BLOCK_TOKENS


R = TypeVar("R", bound=Candidate)


def choose(replicas: Sequence[R], demand: Demand) -> R | None:
    """The replica for a request; None if none takes new work. Routers that see the same loads choose the same one."""
    serving = [replica for replica in replicas if replica.is_serving]
    able = [replica for replica in serving if replica.has(demand.model)] or serving
    return min(
        able, key=lambda replica: (replica.load - replica.saved_tokens(demand), _rank(replica, demand)), default=None
    )


def to_warm(replicas: Sequence[R], demand: Demand) -> R | None:
    """A replica without the model that has so much less to do than all with it that it should load it, if there is."""
    serving = [replica for replica in replicas if replica.is_serving]
    loads = [replica.load for replica in serving if replica.has(demand.model)]
    cold = [replica for replica in serving if not replica.has(demand.model)]
    if not loads or not cold:
        return None
    idlest = min(cold, key=lambda replica: replica.load)
    return idlest if idlest.load + limits.ROUTE_WARM_TOKENS <= min(loads) else None


def _rank(replica: Candidate, demand: Demand) -> bytes:
    """Order of replicas with equal load: by the beginning of the prompt, so that equal beginnings meet."""
    first = demand.beginnings[:1] or (demand.model.encode(),)
    return blake2b(first[0] + replica.address.encode(), digest_size=8).digest()
