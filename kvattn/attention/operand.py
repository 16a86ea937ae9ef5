"""What kernels are given: one segment ready for them, and the sizes of a layer's softmax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from kvattn.cache.address import Address
from kvattn.masks import Tokens
from pallas_kernels import KV, Leaf


class Operand(NamedTuple):
    """q[B,T,N,H] over k[B,K,S,H] and v[B,M,S,V] (Leafs: codes, lanes), scores times `scale`, soft-capped by `cap`.

    `finish` maps the weighted sum [B,T,N,V'] of this segment into the space of the others, linearly (the up-projection
    of a latent); partial results merge behind it. `kv` and `address`: a cache as decode kernels read it, None where
    keys or values are made from what is stored; k and v are then not computed unless they are used (under jit). `mask`
    bool[B, 1 | K,T,S], the key `tokens`, and whether the segment is the pass's `own` tokens come from the view.
    """

    q: jax.Array
    k: Leaf
    v: Leaf
    scale: float
    cap: float = 0.0
    finish: Callable[[jax.Array], jax.Array] | None = None
    kv: KV | None = None
    address: Address | None = None
    mask: Any = None
    tokens: Tokens | None = None
    own: bool = False


class SoftmaxShape(NamedTuple):
    """Sizes of a layer's softmax over its own tokens: N query, K key and M value heads, widths H and V, the scale of
    scores, their soft cap (0 = none)."""

    heads: int
    k_heads: int
    v_heads: int
    key_dim: int
    value_dim: int
    scale: float
    cap: float = 0.0
