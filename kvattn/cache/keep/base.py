"""What a keep-policy provides: scores of the tokens that an owner holds, and how many of them each head keeps.

    class KeepLast(Policy, tag="last"): ...     a frozen dataclass in a file of its own, and a line in __init__.py

A policy reads what it is shown and nothing else; choosing, gathering and addressing are done once, in select.py. It
runs under jit: budgets are integers that follow from sizes, scores are arrays.
"""

from typing import Any, NamedTuple

import flax.struct
import jax

from kvattn.config import Keep


class Site(NamedTuple):
    """Where a budget is asked for: K heads of the owner, which is number `owner` of `owners` from the bottom."""

    heads: int
    owner: int = 0
    owners: int = 1


@flax.struct.dataclass
class Queries:
    """Queries of a prompt, as `collect=("queries",)` gives them: layers[l] is q[B,Tq,N,H] (None for a layer without),
    at positions[B,Tq] (-1 = padding)."""

    layers: tuple[Any, ...]
    positions: jax.Array


@flax.struct.dataclass
class Observed:
    """What one owner holds after a prefill. keys, values: float32 [B,K,S,dim] as stored (dequantised; rotated if the
    cache holds them so), the leaves of that role side by side; positions[B, 1 | K, S], -1 where there is no token;
    length[B]: tokens seen. queries: q[B,Tq,N,H] of every reader of the owner, the latest `wants_queries` of each row,
    at query_positions[B,Tq] (-1 = none); None for a policy that wants none."""

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    length: jax.Array
    queries: tuple[jax.Array, ...] | None = None
    query_positions: jax.Array | None = None


class Policy(Keep):
    """Base of all policies."""

    @property
    def wants_queries(self) -> int:
        """How many of the prompt's last queries `score` reads; 0 = none."""
        return 0

    def check(self) -> None:
        """Raises UserError for an illegal field."""

    def budget(self, length: int, site: Site) -> int | tuple[int, ...]:
        """Tokens that each head keeps of a prompt of at most `length` tokens, or a budget per head."""
        raise NotImplementedError

    def score(self, observed: Observed) -> jax.Array:
        """float32 [B,K,S]: a head keeps its highest; of equal ones the earlier slot. inf is kept before any number,
        -inf is dropped even where the budget has room; what slots without a token get does not matter."""
        raise NotImplementedError
