"""Decode over 16-bit caches whose V is the first columns of K on Hopper: latent attention (576 and 512), tied heads.

A tile of K is copied once and is both operands:

    S[64,block] = Q[64,H] K^T;  P = 2^(scale S - top);  O[64,V] = O 2^(old top - top) + P K[:, :V]

One warpgroup copies; two multiply. O of 512 columns fits no warpgroup's registers, so each of the two owns half of the
columns, and both compute S. 64 rows and two tiles of 576 columns fill shared memory: O goes out through the memory
of q, piece by piece, and q of the next row is copied when it has gone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.contract import KV, Partial, Problem
from pallas_kernels.gpu import _api, aot, tiles
from pallas_kernels.gpu.tiles import BLOCK, ROWS, Plan

HALVES = 2  # warpgroups that multiply
COPYING, MULTIPLYING = 56, 224  # registers a thread of each: 3 x 128 threads begin with 168
KEY_DIM, VALUE_DIM = 576, 512  # the largest


def supports(p: Problem) -> str | None:
    """None if `run` serves `p`, else why not."""
    if p.key_dim % 64 or p.key_dim > KEY_DIM:
        return f"K has head dim {p.key_dim}; with V a view of it that must be a multiple of 64 up to {KEY_DIM}"
    if p.value_dim % 128 or p.value_dim > VALUE_DIM:
        return f"V is the first {p.value_dim} columns of K; they must be a multiple of 128 up to {VALUE_DIM}"
    return tiles.limits(p)


def plan_of(p: Problem, kv: KV, interpreted: bool) -> Plan:
    """As many tiles in flight as the shared memory of one CTA holds besides q, at most eight."""
    stages = (aot.SHARED_BLOCK - 2 * ROWS * p.key_dim - tiles.BARRIER_BYTES) // (2 * BLOCK * p.key_dim)
    return tiles.plan(p, kv, 1, max(2, min(8, stages)), 1, interpreted)


def piece(p: Problem) -> int:
    """Columns of O that each warpgroup stages at a time: those of both fit in the memory of q."""
    width = next(w for w in (128, 64, 32) if HALVES * 4 * w <= 2 * p.key_dim)
    return width if p.value_dim // HALVES % width == 0 else 64 if width > 64 else 32


def scratch(plan: Plan) -> dict[str, Any]:
    """Shared memory and barriers of one CTA."""
    p, n = plan.p, plan.stages
    q, o = _api.tiled((1, ROWS, p.key_dim), p.k_dtype), _api.tiled((HALVES, ROWS, piece(p)), jnp.float32)
    held = dict(qo_smem=plgpu.RefUnion(q, o), k_smem=_api.tiled((n, BLOCK, p.key_dim), p.k_dtype))
    if plan.interpreted:
        held["p_smem"] = _api.tiled((HALVES, ROWS, BLOCK), p.k_dtype)
    for name, count in (("q", 1), ("k", n)):
        held[f"{name}_ready"] = plgpu.Barrier(num_barriers=count)
        held[f"{name}_free"] = plgpu.Barrier(num_arrivals=HALVES, num_barriers=count)
    held["q_read"] = plgpu.Barrier(num_arrivals=HALVES)
    return held


def body(plan: Plan, refs: dict[str, Any]) -> None:
    """One CTA of the grid (`worker`, `tile`); refs by name, those of `tiles.operands`, `tiles.launch` and `scratch`."""
    thread = lax.axis_index("wg")
    refs = dict(refs)
    refs["q_smem"], refs["o_smem"] = refs.pop("qo_smem")
    pl.when(thread < HALVES)(lambda: _multiply(plan, refs, thread))
    pl.when(thread == HALVES)(lambda: _copy(plan, refs))


def _copy(plan: Plan, refs: dict[str, Any]) -> None:
    """The warpgroup that copies."""
    p, n = plan.p, plan.stages
    plgpu.set_max_registers(COPYING, action="decrease")

    def item(i, done):
        it = tiles.item_of(plan, refs, i)
        head = lax.div(it.group, p.groups // p.k_heads)
        pl.when(i >= 1)(lambda: plgpu.barrier_wait(refs["q_free"]))
        plgpu.copy_gmem_to_smem(refs["q"].at[it.b, it.group, tiles.rows_here()], refs["q_smem"].at[0], refs["q_ready"])

        def step(j, done):
            stage = lax.rem(done, n)
            row, tokens = tiles.place(plan, refs, it, j)
            pl.when(done >= n)(lambda: plgpu.barrier_wait(refs["k_free"].at[stage]))
            here, ready = refs["k_smem"].at[stage], refs["k_ready"].at[stage]
            plgpu.copy_gmem_to_smem(refs["k"].at[row, head, tokens], here, ready)
            return done + 1

        return lax.fori_loop(it.low, it.high, step, done)

    items = tiles.items_of(refs)
    done = lax.fori_loop(0, items, item, jnp.int32(0))
    tiles.drain(refs["k_free"], done, n)
    pl.when(items > 0)(lambda: plgpu.barrier_wait(refs["q_free"]))


def _multiply(plan: Plan, refs: dict[str, Any], half) -> None:
    """The warpgroup that owns columns [half V/2, (half + 1) V/2) of O.

    q has one buffer, whose index 0 is computed from the step: of a place that does not change the compiler would keep
    the descriptors of all 36 products in registers, and spill others.
    """
    p, n, width = plan.p, plan.stages, plan.p.value_dim // HALVES
    tile = lax.axis_index("tile")
    columns = pl.ds(pl.multiple_of(half * width, width), width)
    plgpu.set_max_registers(MULTIPLYING, action="increase")

    def item(i, done):
        it = tiles.item_of(plan, refs, i)
        at = tiles.positions_of(refs, it)
        plgpu.barrier_wait(refs["q_ready"])

        def step(j, carry):
            top, total, out = carry
            stage = lax.rem(done + j - it.low, n)
            keys = tiles.keys_of(plan, it, tiles.block_of(plan, it, j))
            plgpu.barrier_wait(refs["k_ready"].at[stage])
            q = refs["q_smem"].at[lax.shift_right_logical(j, jnp.int32(30))]  # 0; see below
            s = tiles.scores(q, refs["k_smem"].at[stage])
            s = jnp.where(tiles.mask(plan, it, keys, at), tiles.scaled(plan, s), -jnp.inf)
            top, total, shrink, weights = tiles.softmax(s, top, total)
            out = out * tiles.spread(shrink, out.shape)
            values = refs["k_smem"].at[stage, :, columns]
            out = tiles.accumulate(plan, refs, half, out, weights.astype(p.k_dtype), values)
            plgpu.barrier_arrive(refs["k_free"].at[stage])
            return top, total, out

        top, total, out = lax.fori_loop(it.low, it.high, step, tiles.start(width))
        slot = tiles.slot_of(plan, refs, i)

        @pl.when(half == 0)
        def _():
            refs["top"][0, slot, tile] = top
            refs["total"][0, slot, tile] = total

        plgpu.barrier_arrive(refs["q_read"])
        plgpu.barrier_wait(refs["q_read"])  # both are through with q, whose memory takes O
        staged, each = refs["o_smem"].at[half], piece(p)
        for part in range(width // each):
            staged[...] = out[:, part * each : (part + 1) * each]
            plgpu.commit_smem()
            here = pl.ds(pl.multiple_of(half * width + part * each, each), each)
            plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, plan.out_rows)], refs["acc"].at[0, slot, tile, :, here])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(refs["q_free"])
        return done + it.high - it.low

    lax.fori_loop(0, tiles.items_of(refs), item, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def run(q: jax.Array, kv: KV, positions: jax.Array, p: Problem, interpret) -> Partial:
    """Partial of q[B,T,N,H] at positions[B,T] over `kv`; see contract.py for shapes."""
    plan = plan_of(p, kv, bool(interpret))
    given = tiles.operands(q, kv, positions, plan)
    return tiles.launch(plan, body, given, scratch(plan), HALVES + 1, "decode_latent", interpret)
