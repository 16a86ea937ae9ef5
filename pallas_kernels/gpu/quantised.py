"""Decode over int8, int4 and fp8 (e4m3) caches on Hopper, dequantised inside the kernel (quantised_body.py).

K is read as [B,heads,S,H] and V as [B,heads,V,S] (`v_lanes`): 8-bit and narrower operands of a warpgroup matmul cannot
be transposed, so each must have the summed dimension last. Scales per token and head never touch the codes:

    score = (q . code_k) scale_k scale;   out = sum_j (p_j scale_v[j]) code_v[j]

What is rounded: q to its own dtype (fp8 stores: to f16 after a power of two per row has brought it to at most one),
and p_j scale_v[j] to bf16 (fp8 stores: to f16, at most one). Codes are exact; sums are float32.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import codes
from pallas_kernels.contract import KV, Partial, Problem, combine
from pallas_kernels.gpu import quantised_body
from pallas_kernels.gpu.quantised_body import Plan
from pallas_kernels.shapes import LOG2E, blocks, heads_of, round_up, row_positions, rows_of, stats_of

SMEM_LIMIT = 232448  # bytes a block can have on Hopper
SMEM_CORE = 233472  # bytes of a multiprocessor; each block costs 1024 besides its own
MULTIPROCESSORS = 132
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
    if p.slots % 64:
        return f"{p.slots} slots are not a multiple of 64; allocate more"
    return None


def plan_of(p: Problem, kv: KV, interpreted: bool) -> Plan:
    """Tile sizes, stages and splits for `p`."""
    k_scaled, v_scaled = kv.k.scale is not None, kv.v.scale is not None
    chunks = -(-p.rows // 32)
    rows = round_up(-(-p.rows // chunks), 8)
    fits = p.slots % 128 == 0 and (not p.page or p.page % 128 == 0 or p.page == 64)
    keys = 128 if fits and rows <= 16 else 64
    width = codes.bits(p.k_dtype) * (p.key_dim + p.value_dim) // 8 + 4 * k_scaled + 4 * v_scaled
    fixed = rows * 2 * (p.key_dim + keys) + REDUCTION_BYTES + 1024
    resident = 3 if rows <= 8 else 2
    stages = max(2, min(4, (SMEM_CORE // resident - fixed - 1024) // (keys * width)))
    window = p.options.window if not p.ring else 0
    read = min(p.slots, window + p.options.sinks + p.tokens) if window else p.slots
    lanes = p.batch * p.groups * chunks
    splits = p.options.splits or split_count(-(-read // keys), lanes, resident, keys * width, rows * p.value_dim * 4)
    sink_blocks = -(-min(p.options.sinks, p.slots) // keys) if window else 0
    return Plan(p, keys, rows, chunks, stages, splits, k_scaled, v_scaled, sink_blocks, kv.ring_sinks, interpreted)


def split_count(tiles: int, lanes: int, resident: int, tile_bytes: int, part_bytes: int) -> int:
    """Splits of `tiles` that take the least time by this count: blocks run in waves of `resident` a multiprocessor,
    each reads its tiles after the time of one and a half to fill the pipeline; partial results are moved three times."""
    held, best = MULTIPROCESSORS * resident, None
    for splits in range(1, max(1, tiles // 2) + 1):
        time = -(-lanes * splits // held) * held * (-(-tiles // splits) + 1.5) * tile_bytes
        time += (splits > 1) * 3 * splits * lanes * part_bytes
        if best is None or time < best[0]:
            best = time, splits
    return best[1]


def row_power(q: jax.Array) -> jax.Array:
    """[...] float32 powers of two with |q[...,H]| / power <= 1; 1 where q is zero."""
    top = jnp.max(jnp.abs(q.astype(jnp.float32)), axis=-1)
    return jnp.where(top > 0, jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(top, 1e-38)))), 1.0)


def operands(q: jax.Array, kv: KV, positions: jax.Array, plan: Plan) -> dict[str, jax.Array]:
    """What the kernel is given, by the names it uses."""
    p, o = plan.p, plan.p.options
    rows = rows_of(q, p, plan.rows)
    factor = jnp.full(rows.shape[:3], o.scale / o.soft_cap if o.soft_cap else o.scale * LOG2E, jnp.float32)
    if plan.half:
        power = row_power(rows)
        rows, factor = (rows.astype(jnp.float32) / power[..., None]), factor * power
    steps = blocks(kv, positions, o, plan.keys)
    start = jnp.int32(0) if kv.start is None else jnp.asarray(kv.start, jnp.int32)
    work = jnp.stack([kv.length, steps.first, steps.count, jnp.broadcast_to(start, kv.length.shape)], axis=1)
    given = dict(
        work=work.astype(jnp.int32), positions=row_positions(positions, p, plan.rows), factor=factor,
        q=rows.astype(plan.q_dtype), k=kv.k.values, v=kv.v.values,
    )
    if plan.k_scaled:
        given["k_scale"] = kv.k.scale
    if plan.v_scaled:
        given["v_scale"] = kv.v.scale
    if p.page:
        given["table"] = kv.table
    return given


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
        interpret=interpret_params(interpret),
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
    return Partial(heads_of(out.reshape(*whole, p.value_dim), p),
                   stats_of(joined.max.reshape(whole), p), stats_of(joined.sum.reshape(whole), p))


def interpret_params(interpret):
    """What `plgpu.kernel` takes: False, or the interpreter's parameters (True: its defaults)."""
    return plgpu.InterpretGPUParams() if interpret is True else interpret
