"""A pass of the model of a sharding study as a program, and its time: plain dicts in, a program or seconds out.

    program(mesh, model={...}, cache={...}, layout="ws_2d/by_batch:xyz", phase="decode", batch=64, context=2048)

is a target of `sharding.compiler.aot.Compiler`.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvattn import cache as caches_lib
from kvattn import config as config_lib
from kvattn.attention import Heads
from kvattn.config import CacheConfig, ModelConfig
from kvattn.decode import partitioned as sharded
from kvattn.errors import UserError
from sharding.compiler.doctor import Expectations
from sharding.layout import torus_layouts

LANES = 128  # a TPU tile's width: logits compile in minutes where a chip's vocabulary is no multiple of it
TARGET = "experiments.sharding_study.program:program"
_HLO = {"float32": "f32", "bfloat16": "bf16", "int8": "s8"}


def padded(cfg: ModelConfig, chips: int) -> tuple[ModelConfig, tuple[str, ...]]:
    """(the model as `chips` chips hold it, what was padded): the vocabulary to a multiple of 128 x chips, and, with one
    K/V head, the query heads to a multiple of the chips (zero heads; Pope et al., arXiv 2211.05102, table 1). With more
    K/V heads a new query head would need a group, so those are left as they are."""
    vocab = _up(cfg.vocab_size, LANES * chips)
    own = {layer.attention for layer in cfg.layers}
    single = all(isinstance(a, Heads) and a.n_k_heads == a.n_v_heads == 1 for a in own)
    counts = {a.n_heads for a in own} if single else set()
    heads = {_up(n, chips) for n in counts} - counts
    notes = []
    if vocab != cfg.vocab_size:
        notes.append(f"W {cfg.vocab_size} -> {vocab}")
    if heads:
        notes.append(f"N {', '.join(map(str, sorted(counts)))} -> {', '.join(map(str, sorted(heads)))}")
    wider = tuple(
        dataclasses.replace(layer.attention, n_heads=_up(layer.attention.n_heads, chips)) if heads else layer.attention
        for layer in cfg.layers
    )
    return cfg.replace(vocab_size=vocab, attentions=wider), tuple(notes)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def program(
    mesh: jax.sharding.Mesh,
    *,
    model: dict,
    cache: dict,
    layout: str,
    phase: str,
    batch: int,
    context: int,
    tokens: int = 0,
    weights: str = "bfloat16",
    overlap: str = "none",
) -> sharded.Program:
    """`kvattn.decode.partitioned.build` of the padded model, from dicts of ModelConfig and CacheConfig fields.

    Raises UserError and ShardingError as build does.
    """
    cfg = config_lib.from_config_dict(model, ModelConfig)
    store = config_lib.from_config_dict(cache, CacheConfig)
    cfg, _ = padded(cfg, mesh.size)
    return sharded.build(
        cfg,
        store,
        layout,
        mesh,
        phase=phase,
        batch=batch,
        context=context,
        tokens=tokens,
        weights=weights,
        overlap=overlap,
        scan=scanned(cfg, phase),
    )


def scanned(cfg: ModelConfig, phase: str) -> bool:
    """The layers of a prefill repeat: it is compiled as a scan over them, in seconds, not minutes."""
    if phase != "prefill":
        return False
    try:
        return config_lib.period(cfg) > 0
    except UserError:
        return False


def expectations(cfg: ModelConfig, cache: CacheConfig, prediction: Any, batch: int, context: int, overlap: str):
    """The doctor's expectations of a compiled pass of `cfg` (padded): in decode the cache arrays of one chip, which a
    prefill writes as a whole, and, with overlap none, the collectives that the cost model predicts. Gathered weights
    are not checked by axis: the model counts one gather, the program one for each dim."""
    mesh = dict(prediction.mesh)
    table = torus_layouts.rules(prediction.layout, mesh, sharded.dims_of(cfg, batch))
    split = [torus_layouts.parts(table[name], mesh) for name in ("cache_batch", "cache_heads", "cache_length")]
    held = set()
    for leaf in jax.tree.leaves(caches_lib.specs(cfg, cache, batch, context)):
        if len(leaf.shape) == 4:
            sizes = [n // parts for n, parts in zip(leaf.shape, split)]  # rings included: by_seq divides every owner
            held.add(((*sizes, leaf.shape[3]), _HLO[str(leaf.dtype)]))
    held = held if prediction.tokens == batch else set()
    if overlap != "none" or prediction.layout.gathered:
        return Expectations(None, tuple(sorted(held)))
    found: dict[tuple[str, tuple[str, ...]], float] = {}
    for c in prediction.collectives:
        size = c.count * c.elements * prediction.element_bytes[c.dtype] * (2 if c.kind == "all_reduce" else 1)
        for axes, part in _steps(c, table["res_batch"], mesh):
            key = c.kind.replace("_", "-"), tuple(a for a in torus_layouts.AXES if a in axes)
            found[key] = found.get(key, 0.0) + part * size
    return Expectations(found, tuple(sorted(held)))


def _steps(c: Any, rows: tuple[str, ...], mesh: dict[str, int]) -> list[tuple[tuple[str, ...], float]]:
    """(axes, share of D) of the operations that a collective of the cost model is: two where the residual stream is
    split by batch over `rows` and by D over the rest. The same bytes cross the links."""
    first = tuple(a for a in c.axes if a in rows)
    rest = tuple(a for a in c.axes if a not in rows)
    if not (c.edge and first and rest) or c.kind not in ("all_gather", "reduce_scatter"):
        return [(c.axes, 1.0)]
    if c.kind == "all_gather":  # over `first`, then over the rest
        return [(first, 1 / torus_layouts.parts(rest, mesh)), (rest, 1.0)]
    return [(first, 1.0), (rest, 1 / torus_layouts.parts(first, mesh))]


# --- its time ------------------------------------------------------------------------------------------


def like(values: Any, abstract: Any) -> Any:
    """`values` placed and typed as `abstract`."""
    return jax.tree.map(lambda x, a: jax.device_put(jnp.asarray(x, a.dtype), a.sharding), values, abstract)


def measure(made: sharded.Program, repeats: int = 10) -> float:
    """Median seconds of one pass of `made` on the devices of its mesh, from random weights; a decode step fills the
    last slot of its caches, a prefill empty ones."""
    length = made.args[1].shape[1]
    start = made.args[3][0].slots - 1 if length == 1 else 0

    def fill(key: jax.Array, leaf: Any) -> jax.Array:
        if leaf.dtype == jnp.int32:  # the caches' lengths
            return jnp.full(leaf.shape, start, jnp.int32)
        if leaf.dtype == jnp.int8:
            return jax.random.randint(key, leaf.shape, -127, 128, jnp.int8)
        return jax.random.normal(key, leaf.shape, leaf.dtype) * jnp.asarray(0.02, leaf.dtype)

    def tree(abstract: Any, seed: int) -> Any:
        leaves, shape = jax.tree.flatten(abstract)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        made_here = [
            jax.jit(fill, static_argnums=1, out_shardings=a.sharding)(k, _Spec(a.shape, a.dtype))
            for k, a in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(shape, made_here)

    ids = made.args[1]
    at = jnp.broadcast_to(start + jnp.arange(length, dtype=jnp.int32), ids.shape)
    args = (tree(made.args[0], 0), *like((jnp.zeros(ids.shape, jnp.int32), at), made.args[1:3]), tree(made.args[3], 1))
    return timed(made, args, repeats)[0]


@dataclasses.dataclass(frozen=True)
class _Spec:
    """A shape and dtype that can be a static argument."""

    shape: tuple[int, ...]
    dtype: Any


def timed(made: sharded.Program, args: tuple, repeats: int = 5) -> tuple[float, jax.Array]:
    """(median seconds, logits of the first pass); the caches are handed from one pass to the next."""
    step, (params, ids, at, caches) = made.lower().compile(), args
    logits, caches = step(params, ids, at, caches)
    first = jax.block_until_ready(logits)
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        logits, caches = step(params, ids, at, caches)
        jax.block_until_ready((logits, caches))
        spent.append(time.perf_counter() - began)
    return float(np.median(spent)), first
