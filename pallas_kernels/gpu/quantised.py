"""Decode over int8, int4 and fp8 (e4m3) caches on Hopper, dequantised inside the kernel.

K is read as [B,heads,S,H] and V as [B,heads,V,S] (`v_lanes`): 8-bit operands of a warpgroup matmul cannot be
transposed, so each must have the summed dimension last. Scales per token and head never touch the codes:

    score = (q . code_k) scale_k scale;   out = sum_j (p_j scale_v[j]) code_v[j]

Codes are exact and sums are float32 or int32. What is rounded, besides float32: over int8 and int4 q and p_j scale_v[j]
to 18 bits or more of the largest in their row; over fp8 q, after a power of two per row has brought it to at most one,
and p_j scale_v[j], which are at most one, to f16. The body is in quantised_body.py, the matmuls in
quantised_products.py; a block is one warpgroup of 128 threads, several fit on a multiprocessor.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import codes
from pallas_kernels.contract import KV, Partial, Problem, combine
from pallas_kernels.gpu import _api, aot, quantised_body
from pallas_kernels.gpu.quantised_body import Plan
from pallas_kernels.gpu.quantised_products import digits_of, number_of
from pallas_kernels.shapes import LOG2E, blocks, heads_of, round_up, row_positions, rows_of, stats_of

REDUCTION_BYTES = 2048
DTYPES = tuple(codes.LIMITS)


def supports(p: Problem) -> str | None:
    """None if `run` serves `p`, else why not."""
    if p.k_dtype != p.v_dtype or p.k_dtype not in DTYPES:
        return f"K is {p.k_dtype} and V {p.v_dtype}; both must be one of {', '.join(DTYPES)}"
    if p.dtype not in ("bfloat16", "float16"):
        return f"q is {p.dtype}, which the matmuls of quantised stores do not take; use bfloat16 or float16"
    if p.view:
        return "V is a view of K, but codes of K and of V lie differently; hold V apart, as [B,heads,V,S]"
    if p.k_lanes or not p.v_lanes:
        return "quantised stores must hold K as [B,heads,S,H] (k_lanes=False) and V as [B,heads,V,S] (v_lanes=True)"
    if p.key_dim not in (64, 128, 256) or p.value_dim not in (64, 128, 256):
        return f"head dims are {p.key_dim} and {p.value_dim}; they must be 64, 128 or 256"
    if p.page and p.page % 64:
        return f"pages hold {p.page} tokens; they must hold a multiple of 64"
    if p.k_dtype == "int4" and p.page > 64 and p.page % 128:
        return f"pages hold {p.page} tokens; pages of int4 must hold 64 or a multiple of 128"
    least = 128 if p.k_dtype == "int4" else 64
    if not p.page and p.slots % least:
        return f"{p.slots} slots of {p.k_dtype} are not a multiple of {least}; allocate more"
    return None


def plan_of(p: Problem, kv: KV, interpreted: bool) -> Plan:
    """Tile sizes, stages and splits for `p`."""
    o, chunks = p.options, -(-p.rows // most_rows(p))
    rows = round_up(-(-p.rows // chunks), 8)
    rows = 32 if rows == 24 else rows  # an integer matmul has no 3 x 24 columns
    whole = p.page == 64 or p.page % 128 == 0 if p.page else p.slots % 128 == 0
    wide = rows > (8 if p.k_dtype.startswith("float8") and 256 in (p.key_dim, p.value_dim) else 16)
    keys = 128 if p.k_dtype == "int4" or whole and not wide else 64
    window = o.window if not p.ring else 0
    sink_blocks = -(-min(o.sinks, p.slots) // keys) if window else 0
    plan = Plan(
        p,
        keys,
        rows,
        chunks,
        2,
        1,
        kv.k.scale is not None,
        kv.v.scale is not None,
        sink_blocks,
        kv.ring_sinks,
        interpreted,
    )
    resident, stages = room(plan)
    read = min(p.slots, window + o.sinks + p.tokens) if window else p.slots
    splits = o.splits or split_count(
        -(-read // keys), p.batch * p.groups * chunks, resident, stage_bytes(plan), rows * p.value_dim * 4
    )
    return dataclasses.replace(plan, stages=stages, splits=splits)


def most_rows(p: Problem) -> int:
    """Rows of queries that one block has registers for; more take several blocks, each of which reads the cache."""
    return 16 if p.k_dtype == "int4" or p.k_dtype == "int8" and p.value_dim == 256 else 32


def room(plan: Plan) -> tuple[int, int]:
    """(blocks a multiprocessor, stages of each): as many blocks as registers allow, of two stages at least."""
    for resident in range(3 if plan.rows <= 8 else 2, 0, -1):
        stages = (aot.SHARED // resident - aot.RESERVED - fixed_bytes(plan)) // stage_bytes(plan)
        if stages >= 2:
            break
    return resident, min(4, stages)


def stage_bytes(plan: Plan) -> int:
    """Bytes of one tile of K and V and its scales."""
    p = plan.p
    return plan.keys * (codes.bits(p.k_dtype) * (p.key_dim + p.value_dim) // 8 + 4 * plan.k_scaled + 4 * plan.v_scaled)


def fixed_bytes(plan: Plan) -> int:
    """Shared memory of a block besides its stages: q, the weights, what reductions take, barriers and alignment."""
    right = plan.rows * (plan.q_digits * plan.p.key_dim + plan.p_digits * plan.keys) * plan.operand.itemsize
    return right + REDUCTION_BYTES + 1024


def split_count(tiles: int, lanes: int, resident: int, tile_bytes: int, part_bytes: int) -> int:
    """Splits of `tiles` that take the least time by this count: blocks run in waves of `resident` a multiprocessor,
    each reads its tiles after the time of one and a half to fill the pipeline; partial results are moved thrice."""
    held, best = aot.CORES * resident, None
    for splits in range(1, max(1, tiles // 2) + 1):
        time = -(-lanes * splits // held) * held * (-(-tiles // splits) + 1.5) * tile_bytes
        time += (splits > 1) * 3 * splits * lanes * part_bytes
        if best is None or time < best[0]:
            best = time, splits
    return best[1]


def held_rows(rows: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array, jax.Array]:
    """rows[B,J,R,H] as the kernel multiplies them, [B,J,chunks,digits R/chunks,H], for int4 the even dimensions before
    the odd ones; the factor [B,J,R] left out; what the low nibbles add [B,J,R] (see quantised_products)."""
    x = rows.astype(jnp.float32)
    lead = (*rows.shape[:2], plan.chunks)
    if not plan.integer:
        power = row_power(x)
        x = (x / power[..., None]).astype(plan.operand)
        return x.reshape(*lead, plan.rows, x.shape[-1]), power, jnp.zeros_like(power)
    top = jnp.max(jnp.abs(x), axis=-1)
    x = x * (127.0 / jnp.where(top > 0, top, 1.0))[..., None]
    even = x[..., :: plan.sets]
    if plan.packed:
        x = jnp.concatenate([even, x[..., 1::2] / 16], axis=-1)
    digits = digits_of(x, plan.q_digits)
    bias = number_of([d[..., : even.shape[-1]].sum(-1, dtype=jnp.int32) for d in digits]) * 8.0
    x = jnp.stack([d.reshape(*lead, plan.rows, d.shape[-1]) for d in digits], axis=3)
    return x.reshape(*lead, len(digits) * plan.rows, x.shape[-1]), top / 127.0, bias


def row_power(q: jax.Array) -> jax.Array:
    """[...] float32 powers of two with |q[...,H]| / power <= 1; 1 where q is zero."""
    top = jnp.max(jnp.abs(q.astype(jnp.float32)), axis=-1)
    return jnp.where(top > 0, jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(top, 1e-38)))), 1.0)


def operands(q: jax.Array, kv: KV, positions: jax.Array, plan: Plan) -> dict[str, jax.Array]:
    """What the kernel is given, by the names it uses."""
    p, o = plan.p, plan.p.options
    rows = rows_of(q, p, plan.chunks * plan.rows)
    factor = jnp.full(rows.shape[:3], o.scale / o.soft_cap if o.soft_cap else o.scale * LOG2E, jnp.float32)
    rows, power, bias = held_rows(rows, plan)
    steps = blocks(kv, positions, o, plan.keys)
    start = jnp.int32(0) if kv.start is None else jnp.asarray(kv.start, jnp.int32)
    work = jnp.stack([kv.length, steps.first, steps.count, jnp.broadcast_to(start, kv.length.shape)], axis=1)
    given = dict(
        work=work.astype(jnp.int32),
        positions=row_positions(positions, p, plan.chunks * plan.rows),
        factor=factor * power,
        q=rows,
        k=kv.k.values,
        v=kv.v.values,
    )
    if plan.packed:
        k, v = bytes_of(kv.k.values), bytes_of(kv.v.values)
        given |= dict(bias=bias, k=k.reshape(*k.shape[:2], k.shape[2] // 2, p.key_dim), v=v)
    if plan.k_scaled:
        given["k_scale"] = kv.k.scale
    if plan.v_scaled:
        given["v_scale"] = kv.v.scale
    if p.page:  # whole tiles of pages; pages that hold no token are read, and masked
        table = jnp.clip(kv.table, 0, kv.k.values.shape[0] - 1)
        given["table"] = jnp.pad(table, ((0, 0), (0, -table.shape[1] % plan.pages)))
    return given


def bytes_of(x: jax.Array) -> jax.Array:
    """int4[...,n] -> int8[...,n/2], the first of two in the low bits: the same memory on a GPU."""
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2), jnp.int8)


def run(q: jax.Array, kv: KV, positions: jax.Array, p: Problem, interpret) -> Partial:
    """Partial of q[B,T,N,H] at positions[B,T] over `kv`; see contract.py for shapes."""
    plan = plan_of(p, kv, bool(interpret))
    given = operands(q, kv, positions, plan)
    lanes = p.groups * plan.chunks
    lead = (plan.splits, p.batch, lanes)
    names = (*given, "acc", "top", "total")

    def body(*refs, **scratch):
        quantised_body.body(plan, {**dict(zip(names, refs, strict=True)), **scratch})

    acc, top, total = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((*lead, p.value_dim, plan.rows), jnp.float32),
            jax.ShapeDtypeStruct((*lead, plan.rows), jnp.float32),
            jax.ShapeDtypeStruct((*lead, plan.rows), jnp.float32),
        ],
        scratch_types=quantised_body.scratch(plan),
        grid=(plan.splits, lanes, p.batch),
        grid_names=("split", "group", "batch"),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=REDUCTION_BYTES),
        interpret=_api.interpreter(interpret),
    )(*given.values())
    return join(acc, top, total, plan)


def join(acc: jax.Array, top: jax.Array, total: jax.Array, plan: Plan) -> Partial:
    """acc[splits,B,lanes,V,rows], top and total[splits,B,lanes,rows] -> Partial; only what is joined is transposed."""
    p = plan.p

    def one(column):
        return combine(column[..., None], top, total).out[..., 0]

    out = jax.vmap(one, in_axes=-2, out_axes=-2)(acc).swapaxes(-1, -2)
    joined = combine(jnp.zeros((*top.shape, 1), jnp.float32), top, total)
    whole = (p.batch, p.groups, plan.chunks * plan.rows)
    return Partial(
        heads_of(out.reshape(*whole, p.value_dim), p),
        stats_of(joined.max.reshape(whole), p),
        stats_of(joined.sum.reshape(whole), p),
    )
