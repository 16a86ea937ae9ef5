"""Shapes of the kernel benchmark: decode steps, sweeps of them, and their inputs, drawn on the device.

bars      the shapes that the project's bars speak of
default   one axis at a time: batch x context, group, store, latent, pages, uneven lengths
full      their product
quick     tiny, every kind of store once: for a CPU, where no figure is a result
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvattn.errors import UserError
from pallas_kernels import KV, Leaf, Options, codes

STORES = ("bfloat16", "int8", "int4", "float8_e4m3fn")
MOST_BYTES = 9e9  # of one cache in a sweep: a peer holds a second copy in its own layout
K_HEADS = {1: 32, 4: 8, 8: 4, 16: 2, 32: 1}  # group -> K heads of 32 query heads


@dataclasses.dataclass(frozen=True)
class Shape:
    """One decode step: q[B,1,N,H] over K and V of `context` tokens a row (`ragged`: context/8 to context).

    `store`: dtype of K and V; codes have a float32 scale a token and head. `page` > 0: pages in any order. `view`: V is
    the first `v_dim` columns of K, as in MLA.
    """

    batch: int
    context: int
    k_heads: int = 4
    heads: int = 32
    head_dim: int = 128
    v_dim: int = 128
    store: str = "bfloat16"
    page: int = 0
    view: bool = False
    ragged: bool = False

    @property
    def kind(self) -> str:
        """MHA, GQA-g, MQA, or latent-N."""
        group = self.heads // self.k_heads
        if self.view:
            return f"latent-{self.heads}"
        return "MQA" if self.k_heads == 1 else f"GQA-{group}" if group > 1 else "MHA"

    @property
    def name(self) -> str:
        """The row's name, here and in the JSON."""
        dims = f"{self.head_dim}/{self.v_dim}" if self.head_dim != self.v_dim else str(self.head_dim)
        extra = (f" page {self.page}" if self.page else "") + (" ragged" if self.ragged else "")
        return f"{self.kind} N{self.heads} K{self.k_heads} H{dims} B{self.batch} S{self.context} {self.store}{extra}"

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row [B] int32."""
        if not self.ragged or self.batch == 1:
            return np.full(self.batch, self.context, np.int32)
        return np.linspace(self.context // 8, self.context, self.batch).astype(np.int32)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def token_bytes(self) -> int:
        """Bytes that one token of one row takes, scales included."""
        scale = 32 if self.store in codes.LIMITS else 0
        width = self.head_dim * codes.bits(self.store) + scale
        if not self.view:
            width += self.v_dim * codes.bits(self.store) + scale
        return self.k_heads * width // 8


def latent(heads: int, batch: int, context: int, **more: Any) -> Shape:
    """MLA's cache as DeepSeek-V2 has it: 512 latent and 64 rotated columns (arXiv 2405.04434)."""
    return Shape(batch, context, k_heads=1, heads=heads, head_dim=576, v_dim=512, view=True, **more)


# --- sweeps -----------------------------------------------------------------------------------------------------


def _bars() -> list[Shape]:
    large = [Shape(32, 8192), Shape(64, 16384), Shape(64, 16384, k_heads=1)]
    shapes = [*large, Shape(8, 32768), Shape(8, 131072, k_heads=1), Shape(32, 8192, k_heads=8)]
    shapes += [dataclasses.replace(shape, store=store) for shape in large for store in STORES[1:]]
    shapes += [latent(heads, 64, 8192) for heads in (16, 32, 64)]
    return [*shapes, Shape(1, 131072), Shape(1, 131072, k_heads=8)]


def _default() -> list[Shape]:
    base = Shape(32, 8192)
    shapes = [Shape(b, s) for b in (1, 8, 64) for s in (1024, 8192, 32768, 131072)] + [base]
    shapes += [Shape(8, 8192, k_heads=32), *(Shape(32, 8192, k_heads=K_HEADS[group]) for group in (4, 16, 32))]
    shapes += [dataclasses.replace(base, store=store) for store in STORES[1:]]
    shapes += [Shape(1, 131072, store=store) for store in STORES[1:]]
    shapes += [latent(heads, b, s) for heads in (16, 64) for b, s in ((64, 8192), (1, 131072))]
    shapes += [dataclasses.replace(base, page=64, store=store) for store in STORES]
    shapes += [dataclasses.replace(base, page=128), latent(16, 64, 8192, page=64)]
    return shapes + [
        dataclasses.replace(shape, ragged=True)
        for shape in (base, dataclasses.replace(base, store="int8"), latent(16, 64, 8192))
    ]


def _full() -> list[Shape]:
    cells = list(itertools.product((1, 4, 16, 64), (1024, 4096, 16384, 65536, 131072)))
    shapes = [Shape(b, s, k_heads=k, store=store) for b, s in cells for k in K_HEADS.values() for store in STORES]
    shapes += [latent(heads, b, s, page=page) for b, s in cells for heads in (16, 32, 64, 128) for page in (0, 64)]
    shapes += [Shape(b, s, store=store, page=page) for b, s in cells for store in STORES for page in (64, 128)]
    return shapes + [Shape(b, s, store=store, ragged=True) for b, s in cells if b > 1 for store in STORES]


def _quick() -> list[Shape]:
    base = Shape(2, 128, k_heads=2, heads=8, head_dim=64, v_dim=64)
    shapes = [dataclasses.replace(base, store=store) for store in STORES]
    shapes += [dataclasses.replace(base, page=64), dataclasses.replace(base, page=64, store="int4", ragged=True)]
    return [*shapes, dataclasses.replace(base, ragged=True), latent(4, 2, 128), latent(4, 2, 128, page=64)]


SWEEPS = {"bars": _bars, "default": _default, "full": _full, "quick": _quick}


def sweep(name: str) -> list[Shape]:
    """The shapes of a sweep, none twice, none above MOST_BYTES. Raises UserError for an unknown name."""
    if name not in SWEEPS:
        raise UserError(f"--sweep is {name!r}; choose one of {', '.join(SWEEPS)}.")
    small = [shape for shape in SWEEPS[name]() if shape.batch * shape.context * shape.token_bytes <= MOST_BYTES]
    return list(dict.fromkeys(small))


# --- inputs -----------------------------------------------------------------------------------------------------


def inputs(shape: Shape, dtype: str = "bfloat16", seed: int = 0) -> tuple[jax.Array, KV, jax.Array, Options]:
    """(q[B,1,N,H] in `dtype`, KV, positions[B,1] int32, Options), random. V of codes lies along lanes."""
    code = shape.store in codes.LIMITS
    rows, slots, table = shape.batch, shape.context, None
    if shape.page:
        each = -(-shape.context // shape.page)
        order = 1 + np.random.default_rng(seed).permutation(shape.batch * each)
        rows, slots, table = 1 + shape.batch * each, shape.page, order.reshape(shape.batch, each).astype(np.int32)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 3)

    def leaf(key, dim, lanes):
        lie = (dim, slots) if lanes else (slots, dim)
        return Leaf(*draw(key, (rows, shape.k_heads, *lie), (rows, shape.k_heads, slots), shape.store), lanes)

    k = leaf(keys[0], shape.head_dim, False)
    v = None if shape.view else leaf(keys[1], shape.v_dim, code)
    q = jax.random.normal(keys[2], (shape.batch, 1, shape.heads, shape.head_dim), jnp.float32).astype(dtype)
    length = jnp.asarray(shape.lengths)
    kv = KV(k, v, length, None if table is None else jnp.asarray(table), None, shape.v_dim if shape.view else 0)
    return q, kv, length[:, None] - 1, Options(shape.scale)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def draw(key: jax.Array, lie: tuple, scale_lie: tuple | None, store: str) -> tuple[jax.Array, jax.Array | None]:
    """Random (values [*lie], scales [*scale_lie], None where `store` is no code): scaled they are of the order of 1."""
    first, second = jax.random.split(key)
    if store not in codes.LIMITS:
        return jax.random.normal(first, lie, jnp.dtype(store)), None
    limit = codes.LIMITS[store]
    if store.startswith("float"):
        x = jax.random.uniform(first, lie, jnp.bfloat16, -limit, limit).astype(store)
    else:
        x = jax.random.randint(first, lie, -int(limit), int(limit) + 1, jnp.int8).astype(store)
    return x, jax.random.uniform(second, scale_lie, jnp.float32, 1.0, 3.0) / limit


def cache_bytes(kv: KV) -> int:
    """Bytes of K, V and scales that a step reads: those of the tokens that rows hold, counted from the arrays."""
    per_token = 0.0
    for leaf in (kv.k, kv.v):
        if leaf is None:
            continue
        tokens = leaf.values.shape[0] * leaf.slots
        for x in (leaf.values, leaf.scale):
            per_token += 0 if x is None else math.prod(x.shape) * codes.bits(x.dtype) / 8 / tokens
    return round(per_token * int(np.asarray(kv.length).sum()))
