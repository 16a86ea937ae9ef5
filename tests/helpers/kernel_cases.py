"""What every decode kernel is asked, whatever its platform: one table of cases, sizes pairwise different where the
contract lets them be, ragged lengths, a padding query, and garbage (finite) in the slots that hold no token."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels import KV, Leaf, Options, codes


@dataclasses.dataclass(frozen=True)
class Case:
    """`lengths`: tokens seen by each row, the T queries being the newest; `store`: dtype of K and V ('' = dtype)."""

    lengths: tuple[int, ...] = (256, 77, 1)
    tokens: int = 1
    heads: int = 8
    k_heads: int = 2
    v_heads: int = 2
    key_dim: int = 128
    value_dim: int = 128
    slots: int = 256
    dtype: str = "bfloat16"
    store: str = ""
    k_lanes: bool = False
    v_lanes: bool = False
    page: int = 0
    view: bool = False
    ring: int = 0
    ring_sinks: int = 0
    start: int = 0
    window: int = 0
    sinks: int = 0
    soft_cap: float = 0.0
    splits: int = 0
    channel: bool = False
    padded_row: bool = False


CASES: dict[str, Case] = {
    "gqa": Case(),
    "mha": Case(heads=3, k_heads=3, v_heads=3),
    "mqa": Case(heads=5, k_heads=1, v_heads=1),
    "big_group": Case(heads=32, k_heads=1, v_heads=1, lengths=(256, 131)),
    "uneven_heads": Case(heads=8, k_heads=2, v_heads=4),
    "width_64": Case(key_dim=64, value_dim=64),
    "width_256": Case(key_dim=256, value_dim=256, lengths=(200, 3)),
    "wide_values": Case(key_dim=64, value_dim=128),
    "f16": Case(dtype="float16"),
    "tokens_4": Case(tokens=4, lengths=(256, 77, 4)),
    "splits_3": Case(splits=3),
    "window": Case(window=70),
    "window_sinks": Case(window=70, sinks=5, lengths=(256, 230, 40)),
    "ring": Case(ring=100, ring_sinks=3, window=100, sinks=3, slots=128, lengths=(251, 77, 1)),
    "soft_cap": Case(soft_cap=2.0),
    "second_half": Case(start=256, lengths=(500, 257, 3)),
    "padding_row": Case(padded_row=True),
    "int8": Case(store="int8", v_lanes=True),
    "int8_channel": Case(store="int8", v_lanes=True, channel=True),
    "int8_tokens_window": Case(store="int8", v_lanes=True, tokens=3, window=90, sinks=2, lengths=(256, 130, 3)),
    "int8_width_64": Case(store="int8", v_lanes=True, key_dim=64, value_dim=64),
    "int8_mqa_16": Case(store="int8", v_lanes=True, heads=16, k_heads=1, v_heads=1, lengths=(256, 131)),
    "int4": Case(store="int4", v_lanes=True),
    "fp8": Case(store="float8_e4m3fn", v_lanes=True, dtype="float16"),
    "lanes": Case(k_lanes=True, v_lanes=True, key_dim=64, value_dim=64),
    "int8_lanes": Case(store="int8", k_lanes=True, v_lanes=True, key_dim=64, value_dim=64),
    "latent": Case(heads=16, k_heads=1, v_heads=1, key_dim=576, value_dim=512, view=True, lengths=(256, 131)),
    "latent_tokens": Case(
        heads=16, k_heads=1, v_heads=1, key_dim=576, value_dim=512, view=True, tokens=2, lengths=(200, 5)
    ),
    "paged": Case(page=64),
    "paged_window": Case(page=64, window=70, sinks=5, lengths=(256, 230, 40)),
    "paged_int8": Case(page=64, store="int8", v_lanes=True),
    "paged_int4": Case(page=64, store="int4", v_lanes=True),
    "paged_fp8": Case(page=64, store="float8_e4m3fn", v_lanes=True, dtype="float16"),
    "paged_latent": Case(
        page=64, heads=16, k_heads=1, v_heads=1, key_dim=576, value_dim=512, view=True, lengths=(256, 131)
    ),
    "paged_128": Case(page=128),
    "paged_16": Case(page=16),
}


def build(case: Case, seed: int = 0):
    """(q, kv, positions, Options) of a case."""
    rng = np.random.default_rng(seed)
    batch, held = len(case.lengths), case.store or case.dtype

    def leaf(heads: int, dim: int, lanes: bool, channel: bool) -> Leaf:
        x = rng.normal(size=(batch, heads, case.slots, dim)).astype(np.float32) * rng.uniform(0.5, 2, (heads, 1, dim))
        x = jnp.asarray(x, jnp.float32)
        scale = None
        if case.store:
            along = 2 if channel else 3
            scale = codes.scale_of(x, held, along)
            x = codes.encode(x, jnp.expand_dims(scale, along), held)
            scale = scale[:, :, None] if channel else scale
        else:
            x = x.astype(held)
        return Leaf(x.swapaxes(2, 3) if lanes else x, scale, lanes, channel)

    k = leaf(case.k_heads, case.key_dim, case.k_lanes, case.channel)
    v = None if case.view else leaf(case.v_heads, case.value_dim, case.v_lanes, False)
    table = None
    if case.page:
        k, v, table = _paged(case, k, v, rng)
    lengths = np.array(case.lengths, np.int32)
    positions = lengths[:, None] - case.tokens + np.arange(case.tokens, dtype=np.int32)[None]
    positions = np.where(positions < 0, -1, positions)
    if case.padded_row:
        positions[1] = -1
    q = rng.normal(size=(batch, case.tokens, case.heads, case.key_dim))
    start = jnp.int32(case.start) if case.start else None
    kv = KV(k, v, jnp.asarray(lengths), table, start, case.value_dim if case.view else 0, case.ring, case.ring_sinks)
    options = Options(case.key_dim**-0.5, case.window, case.sinks, case.soft_cap, case.splits)
    return jnp.asarray(q, case.dtype), kv, jnp.asarray(positions, jnp.int32), options


def _paged(case: Case, k: Leaf, v: Leaf | None, rng):
    """The same keys in pages of a pool with some to spare, in any order."""
    batch, each = len(case.lengths), case.slots // case.page
    order = rng.permutation(batch * each + 3)[: batch * each]
    table = order.reshape(batch, each).astype(np.int32)

    def pool(leaf: Leaf | None) -> Leaf | None:
        if leaf is None:
            return None

        def cut(x, axis):
            x = np.asarray(x)
            pages = np.stack(np.split(x, each, axis), 1).reshape(
                batch * each, *x.shape[1:axis], case.page, *x.shape[axis + 1 :]
            )
            out = np.full((batch * each + 3, *pages.shape[1:]), 1, x.dtype)
            out[order] = pages
            return jnp.asarray(out)

        return Leaf(
            cut(leaf.values, 3 if leaf.lanes else 2), None if leaf.scale is None else cut(leaf.scale, 2), leaf.lanes
        )

    return pool(k), pool(v), jnp.asarray(table)
