"""The kernel that quantised.py launches: one warpgroup, one (sequence, head group, split).

The products are taken transposed, so that the many tokens fill the 64 rows of a warpgroup matmul and the few query
rows its columns (8, 16 or 32 instead of 64 padded ones):

    S^T[keys,rows] = K[keys,H] q^T[H,rows] * scale_k[keys] * factor[rows]
    O^T[V,rows]   += V^T[V,keys] (2^(S^T - top) * scale_v[keys])

with the products of quantised_products.py. No warps only copy: the next tiles are asked for right after the barrier
that publishes P, when every warp is done with the tile of K and with the tile of V before.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.codes import bits
from pallas_kernels.contract import NEGATIVE, Problem, key_positions, visible
from pallas_kernels.gpu.quantised_products import down, parts, put, row_vector, scores, values
from pallas_kernels.shapes import LOG2E, Blocks, split_range

LENGTH, FIRST, COUNT, START = range(4)  # columns of the operand `work`[B,4] int32
LEAST_SCALE = 1e-30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one launch: `keys` a tile, `rows` columns of the products, `stages` tiles in flight, `chunks` of rows.
    `interpreted`: dequantised tiles pass through shared memory, as the interpreter has no register operands."""

    p: Problem
    keys: int
    rows: int
    chunks: int
    stages: int
    splits: int
    k_scaled: bool
    v_scaled: bool
    sink_blocks: int
    ring_sinks: int
    interpreted: bool

    @property
    def packed(self) -> bool:
        """int4: two codes a byte."""
        return self.p.k_dtype == "int4"

    @property
    def integer(self) -> bool:
        """int8 matmuls, with q and the weights in digits; else f16."""
        return self.packed or self.p.k_dtype == "int8"

    @property
    def sets(self) -> int:
        """Sets that the tokens of a tile come in: even and odd ones where two share a byte."""
        return 2 if self.packed else 1

    @property
    def height(self) -> int:
        """Tokens of a set."""
        return self.keys // self.sets

    @property
    def operand(self):
        """dtype of both matmuls' right operands."""
        return jnp.dtype("int8" if self.integer else "float16")

    @property
    def q_digits(self) -> int:
        return 3 if self.integer else 1

    @property
    def p_digits(self) -> int:
        """One more for int4, where the weights of odd tokens are divided by 16."""
        return 4 if self.packed else self.q_digits

    @property
    def value_parts(self) -> list[tuple[int, int]]:
        """(start, width) of what one accumulator holds of V."""
        return parts(self.p.value_dim, 128 if self.rows <= 16 else 64)

    @property
    def pages(self) -> int:
        """Copies a tile takes: one, or one a page where pages are smaller than tiles."""
        return max(1, self.keys // self.p.page) if self.p.page else 1


def tiled(shape: tuple[int, ...], dtype, columns: int = 128):
    """Shared memory laid out for TMA and matmuls, in tiles of at most `columns`, so that as many can be cut off."""
    width = bits(dtype)
    swizzle = plgpu.find_swizzle(min(shape[-1], columns) * width)
    transforms = (plgpu.TilingTransform((8, swizzle * 8 // width)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def scratch(plan: Plan) -> dict:
    """Shared memory and barriers of one block."""
    p, n, held = plan.p, plan.stages, {}
    codes, each = jnp.int8 if plan.packed else p.k_dtype, plan.height // plan.pages
    held["q_smem"] = tiled((plan.q_digits * plan.rows, p.key_dim), plan.operand)
    held["k_smem"] = tiled((n, plan.height, p.key_dim), codes)
    held["v_smem"] = tiled((n, plan.pages, p.value_dim, each), codes)  # pages apart: copies fill what is contiguous
    held["p_smem"] = tiled(
        (plan.p_digits * plan.rows, plan.keys), plan.operand, min(plan.height, plan.keys // plan.pages)
    )
    if plan.k_scaled:
        held["k_scale_smem"] = plgpu.SMEM((n, plan.keys), jnp.float32)
    if plan.v_scaled:
        held["v_scale_smem"] = plgpu.SMEM((n, plan.keys), jnp.float32)
    if plan.interpreted and p.k_dtype != "int8":
        held["k_wide"] = tiled((plan.height, p.key_dim if plan.packed else min(p.key_dim, 128)), plan.operand)
        held["v_wide"] = tiled((plan.value_parts[0][1], plan.keys if plan.packed else each), plan.operand)
    held["q_ready"] = plgpu.Barrier()
    held["k_ready"] = plgpu.Barrier(num_arrivals=plan.pages * (1 + plan.k_scaled), num_barriers=n)
    held["v_ready"] = plgpu.Barrier(num_arrivals=plan.pages * (1 + plan.v_scaled), num_barriers=n)
    return held


def body(plan: Plan, refs: dict) -> None:
    """One grid step (`split`, `group`, `batch`); refs by name, those of `quantised.run` and of `scratch`."""
    b, lane, split = lax.axis_index("batch"), lax.axis_index("group"), lax.axis_index("split")
    group, chunk = lane // plan.chunks, lax.rem(lane, plan.chunks)
    work = refs["work"]
    low, high = split_range(work[b, COUNT], plan.splits, split)
    first, rows = work[b, FIRST], pl.ds(pl.multiple_of(chunk * plan.rows, plan.rows), plan.rows)
    steps = Blocks(first, work[b, COUNT], plan.keys, plan.sink_blocks)

    def ask(step, which):
        @pl.when(step < high)
        def _():
            fetch(plan, refs, which, b, group, steps.index(step, first), lax.rem(step - low, plan.stages))

    plgpu.copy_gmem_to_smem(refs["q"].at[b, group, chunk], refs["q_smem"], refs["q_ready"])
    for stage in range(plan.stages):
        ask(low + stage, "k")
        ask(low + stage, "v")
    column = plgpu.Layout.WGMMA.reduce(0)
    at = plgpu.load(refs["positions"].at[b, rows], layout=column, optimized=False)
    factor = plgpu.load(refs["factor"].at[b, group, rows], layout=column, optimized=False)
    bias = plgpu.load(refs["bias"].at[b, group, rows], layout=column, optimized=False) if plan.packed else None
    plgpu.barrier_wait(refs["q_ready"])

    def step(i, carry):
        top, best, total, even, out = carry
        slot = lax.rem(i - low, plan.stages)
        plgpu.barrier_wait(refs["k_ready"].at[slot])
        s = scores(plan, refs, slot, bias)
        s = [finished(plan, refs, slot, set_, x, factor) for set_, x in enumerate(s)]
        s = [jnp.where(mask(plan, work, b, steps.index(i, first), at, set_), x, -jnp.inf) for set_, x in enumerate(s)]
        plgpu.barrier_wait(refs["v_ready"].at[slot])
        held, scale = s, None  # held: what `top` bounds
        if plan.v_scaled:
            scale = [row_vector(plan, refs["v_scale_smem"].at[slot], set_) for set_ in range(plan.sets)]
            held = [x + across(plan, jnp.log2(jnp.maximum(y, LEAST_SCALE))) for x, y in zip(s, scale, strict=True)]
            best = functools.reduce(jnp.maximum, s, best)
        new = jnp.maximum(top, jnp.max(functools.reduce(jnp.maximum, held), axis=0))
        shrink = jnp.exp2(top - new)
        s = [jnp.exp2(x - down(new, plan.height)) for x in s]
        total = functools.reduce(jnp.add, s, total * down(shrink, plan.height))
        if plan.v_scaled:
            s = [x * across(plan, y) for x, y in zip(s, scale, strict=True)]
        if plan.packed:
            even = even * down(shrink, plan.height) + s[0]
        put(plan, refs["p_smem"], s)
        plgpu.commit_smem()  # from here no warp reads this tile of K, or the tile of V before it
        ask(i + plan.stages, "k")
        pl.when(i > low)(lambda: ask(i - 1 + plan.stages, "v"))
        more = values(plan, refs, slot)
        return new, best, total, even, [o * down(shrink, o.shape[0]) + x for o, x in zip(out, more, strict=True)]

    zero = jnp.zeros((plan.height, plan.rows), jnp.float32)
    start = (
        jnp.full((plan.rows,), NEGATIVE, jnp.float32),
        zero + NEGATIVE if plan.v_scaled else None,
        zero,
        zero if plan.packed else None,
        [jnp.zeros((width, plan.rows), jnp.float32) for _, width in plan.value_parts],
    )
    write(plan, refs, (split, b, lane), *lax.fori_loop(low, high, step, start))


def write(plan: Plan, refs: dict, where: tuple, top, best, total, even, out) -> None:
    """Partial results: the largest score, the sum of 2^(score - largest) and of that times V."""
    total = jnp.sum(total, axis=0)
    if plan.integer:
        out = [o * (1 / 127) for o in out]
    if plan.packed:  # the low nibbles were eight too large
        even = jnp.sum(even, axis=0) * 8.0
        out = [o - down(even, o.shape[0]) for o in out]
    if plan.v_scaled:  # from the bound to the largest score; nothing seen: both NEGATIVE
        best = jnp.max(best, axis=0)
        grow = jnp.exp2(jnp.where(total > 0, top - best, 0.0))
        top, total = best, total * grow
        out = [o * down(grow, o.shape[0]) for o in out]
    for (start, width), o in zip(plan.value_parts, out, strict=True):
        refs["acc"][(*where, pl.ds(start, width))] = o
    refs["top"][where] = top
    refs["total"][where] = total


def fetch(plan: Plan, refs: dict, which: str, b, group, block, slot) -> None:
    """Asks for block `block` of K (`which` "k") or V of this group, codes and scales, into stage `slot`."""
    p, ready = plan.p, refs[f"{which}_ready"].at[slot]
    head = lax.div(group, p.groups // (p.k_heads if which == "k" else p.v_heads))
    width = plan.keys // plan.pages  # tokens a copy
    for part in range(plan.pages):
        row, token = b, block * plan.keys
        if p.page:
            token = token + part * width
            row, token = refs["table"][b, lax.div(token, p.page)], lax.rem(token, p.page)
        tokens, here = pl.ds(pl.multiple_of(token, width), width), pl.ds(part * width, width)
        held = width // plan.sets
        codes = pl.ds(pl.multiple_of(lax.div(token, plan.sets), held), held)
        if which == "k":
            into = refs["k_smem"].at[slot, pl.ds(part * held, held)]
            plgpu.copy_gmem_to_smem(refs["k"].at[row, head, codes], into, ready)
        else:
            plgpu.copy_gmem_to_smem(refs["v"].at[row, head, :, codes], refs["v_smem"].at[slot, part], ready)
        if f"{which}_scale" in refs:
            plgpu.copy_gmem_to_smem(
                refs[f"{which}_scale"].at[row, head, tokens], refs[f"{which}_scale_smem"].at[slot, here], ready
            )


def finished(plan: Plan, refs: dict, slot, set_: int, s, factor) -> jax.Array:
    """Scores in powers of two, soft-capped, of the products s[height,rows] of one set."""
    s = s * down(factor, plan.height)
    if plan.k_scaled:
        s = s * across(plan, row_vector(plan, refs["k_scale_smem"].at[slot], set_))
    cap = plan.p.options.soft_cap
    return jnp.tanh(s) * (cap * LOG2E) if cap else s


def mask(plan: Plan, work, b, block, at, set_: int) -> jax.Array:
    """bool [height,rows]: is the key of each slot of this set of `block` visible to the query at `at`[rows]?"""
    p, shape = plan.p, (plan.height, plan.rows)
    slot = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
    slot = slot * plan.sets + (block * plan.keys + work[b, START] + set_)
    key = key_positions(slot, work[b, LENGTH], p.ring, plan.ring_sinks)
    return visible(down(at, plan.height), key, p.options.window, p.options.sinks)


def across(plan: Plan, x: jax.Array) -> jax.Array:
    """x[height] -> [height,rows]."""
    return lax.broadcast_in_dim(x, (plan.height, plan.rows), (0,))
