"""Decode over bf16 and f16 caches on Hopper: one warpgroup copies tiles of K and V, one or two others multiply.

    S[64,block] = Q[64,H] K^T;  P = 2^(scale S - top);  O[64,V] = O 2^(old top - top) + P V

The query rows of a group (heads of the group x tokens) are padded to the 64 rows of a warpgroup matmul: at bf16 that
costs 64 FLOP a byte read, well below what the tensor cores have to spare. More than 64 rows are several tiles of rows,
each with its own CTA beside the others, so that the second reading of K and V comes from L2.
Two multiplying warpgroups take turns at the tiles, each with sums of its own, so that the one's softmax runs beside the
other's products; values of 256 columns leave registers for one only.
P stays in registers; in the interpreter, which has no register operands, it goes through shared memory.
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

DIMS = (64, 128, 256)


def supports(p: Problem) -> str | None:
    """None if `run` serves `p`, else why not."""
    if p.view:
        return "V is a view of K"
    if p.key_dim not in DIMS or p.value_dim not in DIMS:
        return f"head dims are {p.key_dim} and {p.value_dim}; they must be 64, 128 or 256"
    return tiles.limits(p)


def plan_of(p: Problem, kv: KV, interpreted: bool) -> Plan:
    """As many tiles in flight as the shared memory of one CTA holds besides q and the staged output, at most eight."""
    turns = 1 if p.value_dim > 128 else 2
    q_buffers = 1 if max(p.key_dim, p.value_dim) > 128 else 2
    fixed = ROWS * (2 * q_buffers * p.key_dim + 4 * turns * p.value_dim) + tiles.BARRIER_BYTES
    stages = (aot.SHARED_BLOCK - fixed) // (2 * BLOCK * (p.key_dim + p.value_dim))
    return tiles.plan(p, kv, turns, max(2, min(8, stages) // turns * turns), q_buffers, interpreted)


def scratch(plan: Plan) -> dict[str, Any]:
    """Shared memory and barriers of one CTA."""
    p, n, q = plan.p, plan.stages, plan.q_buffers
    held = dict(
        q_smem=_api.tiled((q, ROWS, p.key_dim), p.k_dtype),
        k_smem=_api.tiled((n, BLOCK, p.key_dim), p.k_dtype),
        v_smem=_api.tiled((n, BLOCK, p.value_dim), p.k_dtype),
        o_smem=_api.tiled((plan.turns, ROWS, p.value_dim), jnp.float32),
    )
    if plan.interpreted:
        held["p_smem"] = _api.tiled((plan.turns, ROWS, BLOCK), p.k_dtype)
    for name, count, readers in (("q", q, plan.turns), ("k", n, 1), ("v", n, 1)):
        held[f"{name}_ready"] = plgpu.Barrier(num_barriers=count)
        held[f"{name}_free"] = plgpu.Barrier(num_arrivals=readers, num_barriers=count)
    return held


def body(plan: Plan, refs: dict[str, Any]) -> None:
    """One CTA of the grid (`worker`, `tile`); refs by name, those of `operands`, `run` and `scratch`."""
    thread = lax.axis_index("wg")
    pl.when(thread < plan.turns)(lambda: _multiply(plan, refs, thread))
    pl.when(thread == plan.turns)(lambda: _copy(plan, refs))


# --- the warpgroup that copies ------------------------------------------------------------------------------------


def _copy(plan: Plan, refs: dict[str, Any]) -> None:
    p, n = plan.p, plan.stages

    def item(i, done):
        it, buffer = tiles.item_of(plan, refs, i), lax.rem(i, plan.q_buffers)
        pl.when(i >= plan.q_buffers)(lambda: plgpu.barrier_wait(refs["q_free"].at[buffer]))
        plgpu.copy_gmem_to_smem(
            refs["q"].at[it.b, it.group, tiles.rows_here()], refs["q_smem"].at[buffer], refs["q_ready"].at[buffer]
        )
        k_head, v_head = lax.div(it.group, p.groups // p.k_heads), lax.div(it.group, p.groups // p.v_heads)

        def step(j, done):
            stage = lax.rem(done, n)
            row, tokens = tiles.place(plan, refs, it, j)
            for name, head in (("k", k_head), ("v", v_head)):
                free = refs[f"{name}_free"].at[stage]
                pl.when(done >= n)(lambda free=free: plgpu.barrier_wait(free))
                plgpu.copy_gmem_to_smem(
                    refs[name].at[row, head, tokens], refs[f"{name}_smem"].at[stage], refs[f"{name}_ready"].at[stage]
                )
            return done + 1

        return lax.fori_loop(it.low, it.high, step, done)

    items = tiles.items_of(refs)
    done = lax.fori_loop(0, items, item, jnp.int32(0))
    for name, used, size in (("q", items, plan.q_buffers), ("k", done, n), ("v", done, n)):
        tiles.drain(refs[f"{name}_free"], used, size)


# --- the warpgroup that multiplies --------------------------------------------------------------------------------


def _multiply(plan: Plan, refs: dict[str, Any], turn) -> None:
    p, n, turns = plan.p, plan.stages, plan.turns
    tile = lax.axis_index("tile")

    def item(i, done):
        it, buffer = tiles.item_of(plan, refs, i), lax.rem(i, plan.q_buffers)
        at = tiles.positions_of(refs, it)
        first = lax.rem(turn + turns - lax.rem(done, turns), turns)  # steps of all items are taken in turns
        plgpu.barrier_wait(refs["q_ready"].at[buffer])

        def step(j, carry):
            top, total, out = carry
            mine = first + j * turns
            stage = lax.rem(done + mine, n)
            keys = tiles.keys_of(plan, it, tiles.block_of(plan, it, it.low + mine))
            plgpu.barrier_wait(refs["k_ready"].at[stage])
            s = tiles.scores(refs["q_smem"].at[buffer], refs["k_smem"].at[stage])
            plgpu.barrier_arrive(refs["k_free"].at[stage])
            s = jnp.where(tiles.mask(plan, it, keys, at), tiles.scaled(plan, s), -jnp.inf)
            top, total, shrink, weights = tiles.softmax(s, top, total)
            out = out * tiles.spread(shrink, out.shape)
            plgpu.barrier_wait(refs["v_ready"].at[stage])
            out = tiles.accumulate(plan, refs, turn, out, weights.astype(p.k_dtype), refs["v_smem"].at[stage])
            plgpu.barrier_arrive(refs["v_free"].at[stage])
            return top, total, out

        steps = lax.div(jnp.maximum(it.high - it.low - first, 0) + (turns - 1), turns)
        top, total, out = lax.fori_loop(0, steps, step, tiles.start(p.value_dim))
        plgpu.barrier_arrive(refs["q_free"].at[buffer])
        slot = tiles.slot_of(plan, refs, i)
        refs["top"][turn, slot, tile] = top
        refs["total"][turn, slot, tile] = total
        staged = refs["o_smem"].at[turn]
        staged[...] = out
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, plan.out_rows)], refs["acc"].at[turn, slot, tile])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return done + it.high - it.low

    lax.fori_loop(0, tiles.items_of(refs), item, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


# --- around the kernel --------------------------------------------------------------------------------------------


def run(q: jax.Array, kv: KV, positions: jax.Array, p: Problem, interpret) -> Partial:
    """Partial of q[B,T,N,H] at positions[B,T] over `kv`; see contract.py for shapes."""
    plan = plan_of(p, kv, bool(interpret))
    given = tiles.operands(q, kv, positions, plan)
    return tiles.launch(plan, body, given, scratch(plan), plan.turns + 1, "decode_dense", interpret)
