"""Decode attention on TPU: what the kernel serves, its work list, and the call.

One kernel for all stores. Its operands are the cache's own leaves as they lie in HBM (no reshape, no transpose), so
that a compiled step holds no copy of a cache, given that XLA lays the leaf out the same way. It does so for rows of a
multiple of 128 values and for tokens along lanes. Rows of 64 or 576 values it would by itself lay along lanes: such
rows are copied in every call unless their layout is left to the compiler (Layout.AUTO), and are then padded to 128
lanes; hold these leaves along lanes. Likewise the scales of pages of 64 tokens are copied; take pages of 128 for codes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.contract import KV, KernelError, Partial, Problem, combine
from pallas_kernels.shapes import Blocks, blocks, heads_of, row_positions, rows_of, split_range, stats_of
from pallas_kernels.tpu import tuning
from pallas_kernels.tpu.kernel import Setup, Stream, Work, body, place
from pallas_kernels.tpu.tuning import LANES, Plan

QUERIES = ("bfloat16", "float16", "float32")  # float16 is computed on in float32
STORES = ("bfloat16", "float32", "int8", "int4", "float8_e4m3fn")  # the compiler knows no float16 in VMEM


def supports(p: Problem) -> str | None:
    """None if the kernel serves `p`, else why not."""
    if p.dtype not in QUERIES:
        return f"q is {p.dtype} and it takes {', '.join(QUERIES)}"
    for name, dtype in (("K", p.k_dtype), ("V", p.v_dtype)):
        if dtype not in STORES:
            return f"{name} is held in {dtype} and it reads {', '.join(STORES)}"
    if p.page and (p.page < tuning.SMALLEST_PAGE or p.page % tuning.SMALLEST_PAGE):
        return f"a page of {p.page} tokens is one copy, which must be a multiple of {tuning.SMALLEST_PAGE} tokens"
    if p.page % LANES and (p.k_lanes or p.v_lanes):
        return f"pages of {p.page} tokens along lanes leave tiles of {LANES} lanes part empty; take rows or {LANES}"
    if not p.page and p.slots % LANES:
        return f"{p.slots} slots are no multiple of {LANES}"
    plan = tuning.choose(p)
    smem = 4 * (p.batch * (p.slots // p.page if p.page else 1) + 3 * (p.batch * plan.chunks * plan.splits + 1))
    if smem > tuning.SMEM_BYTES:
        return f"page table and work list take {smem} bytes of scalar memory and {tuning.SMEM_BYTES} are free"
    vmem = tuning.vmem_bytes(p, plan)
    if vmem > tuning.VMEM_BUDGET:
        return f"its buffers take {vmem} bytes of VMEM and {tuning.VMEM_BUDGET} are free; take fewer tokens"
    return None


def run(q: jax.Array, kv: KV, positions: jax.Array, p: Problem, interpret: Any, plan: Plan | None = None) -> Partial:
    """Partial of q[B,T,N,H] at positions[B,T] over `kv`; see contract.py. `plan`: another cut than `tuning.choose`."""
    plan = plan or tuning.choose(p)
    for leaf in (kv.k, kv.v):
        if leaf is not None and leaf.scale is not None and plan.chunks > 1 and leaf.heads // plan.chunks % 8:
            raise KernelError(f"{leaf.heads} heads with scales do not divide into {plan.chunks} shares of 8.")
    read = blocks(kv, positions, p.options, plan.piece)
    setup = Setup(p, plan, read.sink_blocks, kv.ring_sinks)
    arrays = {
        "k": kv.k.values,
        "v": None if kv.v is None else kv.v.values,
        "k_scale": kv.k.scale,
        "v_scale": None if kv.v is None else kv.v.scale,
    }
    arrays = {name: x for name, x in arrays.items() if x is not None}
    if p.dtype == "float16":
        q = q.astype(jnp.float32)
    if not interpret:  # else XLA, free to choose, moves what fits into VMEM before the call
        arrays = {name: pltpu.with_memory_space_constraint(x, pltpu.HBM) for name, x in arrays.items()}
    rows = rows_of(q, p, tuning.SUBLANES)
    at = row_positions(positions, p, tuning.SUBLANES)[:, :, None]
    acc, top, total = _call(setup, arrays, interpret)(*_work(setup, kv, read), rows, at, *arrays.values())
    return combine(heads_of(acc, p), stats_of(top[..., 0], p), stats_of(total[..., 0], p))


def _work(s: Setup, kv: KV, read: Blocks) -> tuple[jax.Array, ...]:
    """The fields of `Work`, int32. Items without pieces are skipped by `after`, so that a step's first block is under
    way before the step begins."""
    p, plan = s.p, s.plan
    split = jnp.arange(plan.splits, dtype=jnp.int32)
    low, high = split_range(read.count[:, None, None], plan.splits, split[None, None, :])
    shape = (p.batch, plan.chunks, plan.splits)
    low, high = jnp.broadcast_to(low, shape).reshape(-1), jnp.broadcast_to(high, shape).reshape(-1)
    numbers = jnp.where(high > low, jnp.arange(s.items, dtype=jnp.int32), s.items).reshape(-1, plan.cores)
    later = jax.lax.cummin(numbers, axis=0, reverse=True)  # [steps, cores]: first item with pieces from here on
    after = jnp.concatenate([later[1:], jnp.full((1, plan.cores), s.items, jnp.int32)]).reshape(-1)
    pad = [(0, 1)]  # item `items` is the end
    table = jnp.zeros(1, jnp.int32)
    if kv.table is not None:  # an unused entry may hold anything
        table = jnp.clip(kv.table.astype(jnp.int32), 0, kv.k.values.shape[0] - 1).reshape(-1)
    origin = jnp.zeros(1, jnp.int32) if kv.start is None else jnp.asarray(kv.start, jnp.int32).reshape(1)
    return (
        jnp.pad(low, pad),
        jnp.pad(high, pad),
        jnp.pad(after, pad, constant_values=s.items),
        later[0],
        read.first,
        kv.length.astype(jnp.int32),
        table,
        origin,
    )


def _call(s: Setup, arrays: dict[str, jax.Array], interpret: Any):
    """The pallas_call: (work, q[B,J,R,H], positions[B,R,1], leaves) -> acc[splits,B,J,R,V], max and sum [..,R,128]."""
    p, plan = s.p, s.plan
    names = list(arrays)

    def item(core, step):
        return place(step * plan.cores + core, plan)

    def q_index(core, step, *_):
        row, chunk, _ = item(core, step)
        return row, chunk, 0, 0

    def out_index(core, step, *_):
        row, chunk, split = item(core, step)
        return split, row, chunk, 0, 0

    def kernel(*refs):
        work, (q, at), rest = Work(*refs[:8]), refs[8:10], refs[10:]
        count = len(names)
        hbm, (out, top, total), vmem = rest[:count], rest[count : count + 3], rest[count + 3 : 2 * count + 3]
        cursor, sems = rest[2 * count + 3], rest[2 * count + 4]
        streams = {
            name: Stream(
                hbm[i],
                vmem[i],
                plan.k_heads if name[0] == "k" else plan.v_heads,
                2 if (p.k_lanes if name == "k" else p.v_lanes) and name in ("k", "v") else 1,
                sems.at[i],
            )
            for i, name in enumerate(names)
        }
        body(s, work, q, at, streams, out, top, total, cursor)

    shapes = dict(zip(("k", "v", "k_scale", "v_scale"), tuning.buffer_shapes(p, plan), strict=True))
    step_rows = (plan.groups, plan.rows)
    all_rows = (plan.splits, p.batch, p.groups, plan.rows)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=8,
        grid=(plan.cores, s.items // plan.cores),
        in_specs=[
            pl.BlockSpec((1, *step_rows, p.key_dim), q_index),
            pl.BlockSpec((1, plan.rows, 1), lambda core, step, *_: (item(core, step)[0], 0, 0)),
            *[pl.BlockSpec(memory_space=pltpu.HBM) for _ in names],
        ],
        out_specs=[pl.BlockSpec((1, 1, *step_rows, width), out_index) for width in (p.value_dim, LANES, LANES)],
        scratch_shapes=[
            *[pltpu.VMEM(shapes[name], arrays[name].dtype) for name in names],
            pltpu.SMEM((4,), jnp.int32),
            pltpu.SemaphoreType.DMA((len(names), plan.buffers)),
        ],
    )
    scores = p.batch * p.heads * p.tokens * p.slots
    return pl.pallas_call(
        kernel,
        grid_spec=spec,
        out_shape=[jax.ShapeDtypeStruct((*all_rows, width), jnp.float32) for width in (p.value_dim, LANES, LANES)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * scores * (p.key_dim + p.value_dim), transcendentals=scores, bytes_accessed=tuning.cache_bytes(p)
        ),
        interpret=interpret,
        name="decode_attention",
    )
