"""The kernel that quantised.py launches: one warpgroup, one (sequence, head group, split), codes to bf16 in registers.

The products are taken transposed, so that the many tokens fill the 64 rows of a warpgroup matmul and the few query
rows its columns (8, 16 or 32 instead of 64 padded ones):

    S^T[keys,rows] = K[keys,H] q^T[H,rows] * scale_k[keys] * factor[rows]
    O^T[V,rows]   += V^T[V,keys] (2^(S^T - top) * scale_v[keys])

Both left operands go from shared memory through registers, where the codes become bf16 or f16: exact for int8, int4
and (f16) e4m3. No warps only copy: the next tiles are asked for right after the barrier that publishes P, by which
time every warp holds its part of the tile before in registers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.codes import bits
from pallas_kernels.contract import NEGATIVE, Problem, key_positions, visible
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
    def half(self) -> bool:
        """f16 operands: e4m3 has no way to bf16 in hardware."""
        return self.p.k_dtype.startswith("float8")

    @property
    def q_dtype(self):
        return jnp.float16 if self.half else jnp.dtype(self.p.dtype)

    @property
    def p_dtype(self):
        return jnp.float16 if self.half else jnp.bfloat16

    @property
    def pages(self) -> int:
        """Copies a tile takes: one, or one a page where pages are smaller than tiles."""
        return max(1, self.keys // self.p.page) if self.p.page else 1

    @property
    def bounded(self) -> bool:
        """Weights times scales of V are kept below one: f16 overflows and underflows where bf16 does not."""
        return self.half and self.v_scaled


def parts(dim: int) -> tuple[int, ...]:
    """`dim` cut into what one matmul holds in registers."""
    return (128,) * (dim // 128) if dim % 128 == 0 else (64,) * (dim // 64)


def tiled(shape: tuple[int, ...], dtype):
    """Shared memory laid out for TMA and matmuls, in tiles of at most 128 columns so that parts of 128 can be cut."""
    width = bits(dtype)
    swizzle = plgpu.find_swizzle(min(shape[-1], 128) * width)
    transforms = (plgpu.TilingTransform((8, swizzle * 8 // width)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def scratch(plan: Plan) -> dict:
    """Shared memory and barriers of one block."""
    p, n, held = plan.p, plan.stages, {}
    held["q_smem"] = tiled((plan.rows, p.key_dim), plan.q_dtype)
    held["k_smem"] = tiled((n, plan.keys, p.key_dim), p.k_dtype)
    held["v_smem"] = tiled((n, plan.pages, p.value_dim, plan.keys // plan.pages), p.v_dtype)  # a page is contiguous
    held["p_smem"] = tiled((plan.rows, plan.keys), plan.p_dtype)
    if plan.k_scaled:
        held["k_scale_smem"] = plgpu.SMEM((n, plan.keys), jnp.float32)
    if plan.v_scaled:
        held["v_scale_smem"] = plgpu.SMEM((n, plan.keys), jnp.float32)
    if plan.interpreted:
        held["k_wide"] = tiled((plan.keys, parts(p.key_dim)[0]), plan.q_dtype)
        held["v_wide"] = tiled((parts(p.value_dim)[0], plan.keys // plan.pages), plan.p_dtype)
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

    plgpu.copy_gmem_to_smem(refs["q"].at[b, group, rows], refs["q_smem"], refs["q_ready"])
    for stage in range(plan.stages):
        ask(low + stage, "k")
        ask(low + stage, "v")
    column = plgpu.Layout.WGMMA.reduce(0)
    at = plgpu.load(refs["positions"].at[b, rows], layout=column, optimized=False)
    factor = plgpu.load(refs["factor"].at[b, group, rows], layout=column, optimized=False)
    plgpu.barrier_wait(refs["q_ready"])

    def step(i, carry):
        top, best, total, out = carry
        slot = lax.rem(i - low, plan.stages)
        s = scores(plan, refs, slot, factor)
        s = jnp.where(mask(plan, work, b, steps.index(i, first), at), s, -jnp.inf)
        plgpu.barrier_wait(refs["v_ready"].at[slot])
        weight = row_vector(refs["v_scale_smem"].at[slot]) if plan.v_scaled else None
        held = s  # what `top` bounds: the score, or with f16 the weight of the code, which must not overflow
        if plan.bounded:
            held = s + across(plan, jnp.log2(jnp.maximum(weight, LEAST_SCALE)))
            best = jnp.maximum(best, s)
        new = jnp.maximum(top, jnp.max(held, axis=0))
        shrink = jnp.exp2(top - new)
        s = jnp.exp2(s - down(new, plan.keys))
        total = total * down(shrink, plan.keys) + s
        if plan.v_scaled:
            s = s * across(plan, weight)
        refs["p_smem"].T[...] = plgpu.layout_cast(s.astype(plan.p_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()  # from here all warps hold this tile of K, and the tile of V before it, in registers
        ask(i + plan.stages, "k")
        pl.when(i > low)(lambda: ask(i - 1 + plan.stages, "v"))
        new_out = [o * down(shrink, o.shape[0]) + more for o, more in zip(out, values(plan, refs, slot), strict=True)]
        return new, best, total, new_out

    start = (
        jnp.full((plan.rows,), NEGATIVE, jnp.float32),
        jnp.full((plan.keys, plan.rows), NEGATIVE, jnp.float32) if plan.bounded else None,
        jnp.zeros((plan.keys, plan.rows), jnp.float32),
        [jnp.zeros((width, plan.rows), jnp.float32) for width in parts(plan.p.value_dim)],
    )
    top, best, total, out = lax.fori_loop(low, high, step, start)
    total = jnp.sum(total, axis=0)
    if plan.bounded:  # from the bound to the largest score; nothing seen: both NEGATIVE
        best = jnp.max(best, axis=0)
        shift = jnp.where(total > 0, top - best, 0.0)
        top, total, grow = best, total * jnp.exp2(shift), jnp.exp2(shift)
        out = [o * down(grow, o.shape[0]) for o in out]
    done = 0
    for o in out:
        refs["acc"][split, b, lane, pl.ds(done, o.shape[0])] = o
        done += o.shape[0]
    refs["top"][split, b, lane] = top
    refs["total"][split, b, lane] = total


def fetch(plan: Plan, refs: dict, which: str, b, group, block, slot) -> None:
    """Asks for block `block` of K (`which` "k") or V of this group, codes and scales, into stage `slot`."""
    p, ready = plan.p, refs[f"{which}_ready"].at[slot]
    head = lax.div(group, p.groups // (p.k_heads if which == "k" else p.v_heads))
    width = plan.keys // plan.pages
    for part in range(plan.pages):
        row, token = b, block * plan.keys
        if p.page:
            token = token + part * width
            row, token = refs["table"][b, lax.div(token, p.page)], lax.rem(token, p.page)
        tokens, here = pl.ds(pl.multiple_of(token, width), width), pl.ds(part * width, width)
        if which == "k":
            plgpu.copy_gmem_to_smem(refs["k"].at[row, head, tokens], refs["k_smem"].at[slot, here], ready)
        else:
            plgpu.copy_gmem_to_smem(refs["v"].at[row, head, :, tokens], refs["v_smem"].at[slot, part], ready)
        if f"{which}_scale" in refs:
            plgpu.copy_gmem_to_smem(
                refs[f"{which}_scale"].at[row, head, tokens], refs[f"{which}_scale_smem"].at[slot, here], ready)


def scores(plan: Plan, refs: dict, slot, factor) -> jax.Array:
    """S^T[keys,rows] float32 in powers of two, soft-capped, of the tile of K in stage `slot`."""
    plgpu.barrier_wait(refs["k_ready"].at[slot])

    def product(acc):
        done = 0
        for width in parts(plan.p.key_dim):
            columns = pl.ds(done, width)
            multiply(plan, acc, refs["k_smem"].at[slot, :, columns], refs["q_smem"].at[:, columns].T, refs.get("k_wide"))
            done += width
        return acc[...]

    s = pl.run_scoped(product, plgpu.ACC((plan.keys, plan.rows), jnp.float32))
    s = s * down(factor, plan.keys)
    if plan.k_scaled:
        s = s * across(plan, row_vector(refs["k_scale_smem"].at[slot]))
    cap = plan.p.options.soft_cap
    return jnp.tanh(s) * (cap * LOG2E) if cap else s


def values(plan: Plan, refs: dict, slot) -> list[jax.Array]:
    """V^T P^T[V,rows] float32 of the tile of V in stage `slot`, in parts along V."""
    done, found, each = 0, [], plan.keys // plan.pages
    for width in parts(plan.p.value_dim):

        def product(acc, rows=pl.ds(done, width)):
            for page in range(plan.pages):
                weights = refs["p_smem"].at[:, pl.ds(page * each, each)].T
                multiply(plan, acc, refs["v_smem"].at[slot, page, rows], weights, refs.get("v_wide"))
            return acc[...]

        found.append(pl.run_scoped(product, plgpu.ACC((width, plan.rows), jnp.float32)))
        done += width
    return found


def multiply(plan: Plan, acc, codes, right, wide) -> None:
    """acc += codes[M,L] right[L,rows], the codes widened on their way through registers."""
    if plan.interpreted:
        wide[...] = codes[...].astype(right.dtype)
        plgpu.commit_smem()
        plgpu.wgmma(acc, wide, right)
    else:
        layout = plgpu.Layout.WGMMA_UPCAST_4X if bits(codes.dtype) == 4 else plgpu.Layout.WGMMA_UPCAST_2X
        loaded = plgpu.layout_cast(plgpu.load(codes, layout=layout), plgpu.Layout.WGMMA)
        plgpu.wgmma(acc, loaded.astype(right.dtype), right)
    plgpu.wgmma_wait(0)


def mask(plan: Plan, work, b, block, at) -> jax.Array:
    """bool [keys,rows]: is the key of each slot of `block` visible to the query at `at`[rows]?"""
    p, shape = plan.p, (plan.keys, plan.rows)
    slot = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + (block * plan.keys + work[b, START])
    key = key_positions(slot, work[b, LENGTH], p.ring, plan.ring_sinks)
    return visible(down(at, plan.keys), key, p.options.window, p.options.sinks)


def row_vector(ref) -> jax.Array:
    """[keys] from shared memory, one value a row of S^T."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def across(plan: Plan, x: jax.Array) -> jax.Array:
    """x[keys] -> [keys,rows]."""
    return lax.broadcast_in_dim(x, (plan.keys, plan.rows), (0,))


def down(x: jax.Array, height: int) -> jax.Array:
    """x[rows] -> [height,rows]."""
    return lax.broadcast_in_dim(x, (height, x.shape[0]), (1,))
