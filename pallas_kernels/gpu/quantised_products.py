"""The two matmuls of quantised decode, by the kind of codes; none of them makes a wide copy of a tile in memory.

    int8   codes are an int8 operand as they lie in shared memory. q and the weights come in three digits of base 254,
           side by side as columns, x = (d0 + (d1 + d2 / 254) / 254) max|x| / 127: steps of 1.2e-7 of the largest. The
           interpreter runs what the GPU runs
    int4   the same, of bytes: y = 16 high + low with signed nibbles splits in registers into y & -16 = 16 high and
           (y & 15) ^ 8 = low + 8, side by side an int8 operand in registers. What meets `high` is divided by 16, eight
           times the sum of what meets `low` is taken off; weights have four digits. Dimensions 2j and 2j + 1 of K
           share a byte, and tokens 2t and 2t + 1 of V: a tile's tokens come in two sets, the even and the odd ones
    fp8    codes go through registers to f16 (e4m3 has no way to bf16), q and the weights are f16

Sets: S^T is a list of [plan.height, rows], one for each; row r of set i is token r * len(sets) + i of the tile.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

BASE = 254.0
SHIFT = 1.5 * 2.0**23  # the lowest bits of an integer plus this, float32, are the integer's


def parts(dim: int, most: int) -> list[tuple[int, int]]:
    """(start, width) of pieces of `dim` of at most `most`."""
    width = min(dim, most)
    return [(start, width) for start in range(0, dim, width)]


def digits_of(x: jax.Array, count: int) -> list[jax.Array]:
    """x in [-127,127] float32 -> digits, int8, most significant first."""
    found = []
    for _ in range(count):
        digit = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
        bits = lax.bitcast_convert_type(digit + SHIFT, jnp.int32)  # a conversion, without what it does beyond int32
        found.append(bits.astype(jnp.int8))
        x = (x - digit) * BASE
    return found


def number_of(digits: list[jax.Array]) -> jax.Array:
    """The inverse of `digits_of`, float32."""
    total = digits[-1].astype(jnp.float32)
    for digit in digits[-2::-1]:
        total = digit.astype(jnp.float32) + total * (1 / BASE)
    return total


def scores(plan, refs: dict, slot, bias) -> list[jax.Array]:
    """K q^T [height,rows] float32 of each set, of the tile of K in stage `slot`, in the units of the codes and q;
    `bias`[rows]: eight times the sum of the even dimensions of q, for int4."""
    dim, q = plan.p.key_dim, refs["q_smem"]
    if plan.packed:
        low, high = nibbles(plgpu.load(refs["k_smem"].at[slot], layout=plgpu.Layout.WGMMA_8BIT))
        found = []
        for i in range(2):  # a row holds the bytes of two tokens
            left = jnp.concatenate([x[:, i * dim // 2 : (i + 1) * dim // 2] for x in (low, high)], axis=1)
            s = product(plan, plan.height, plan.q_digits, [(left, q.T)], refs.get("k_wide"))
            found.append(s - down(bias, plan.height))
        return found
    pairs = [
        (refs["k_smem"].at[slot, :, pl.ds(at, width)], q.at[:, pl.ds(at, width)].T) for at, width in parts(dim, 128)
    ]
    return [product(plan, plan.height, plan.q_digits, pairs, refs.get("k_wide"))]


def put(plan, ref, weights: list[jax.Array]) -> None:
    """Writes the weights of each set to shared memory [digits rows, keys], as `values` reads them; |weights| <= 1."""
    if not plan.integer:
        ref.T[...] = plgpu.layout_cast(weights[0].astype(jnp.float16), plgpu.Layout.WGMMA_TRANSPOSED)
        return
    found = []
    for i, w in enumerate(weights):
        w = plgpu.layout_cast(w, plgpu.Layout.WGMMA_TRANSPOSED) * (127.0 / 16 if i else 127.0)
        found.append(jnp.concatenate(digits_of(w, plan.p_digits), axis=1))
    ref.T[...] = jnp.concatenate(found, axis=0) if plan.packed else found[0]  # one store: each takes two barriers


def values(plan, refs: dict, slot) -> list[jax.Array]:
    """V^T P^T float32 of the tile of V in stage `slot`, in pieces along V: [width,rows] in units of 1/127."""
    found, each, weights = [], plan.keys // plan.pages, refs["p_smem"]
    for start, width in plan.value_parts:
        codes = [refs["v_smem"].at[slot, page, pl.ds(start, width)] for page in range(plan.pages)]
        if plan.packed:
            halves = zip(*[nibbles(plgpu.load(x, layout=plgpu.Layout.WGMMA_8BIT)) for x in codes], strict=True)
            pairs = [(jnp.concatenate([x for half in halves for x in half], axis=1), weights.T)]
        else:
            pairs = [(x, weights.at[:, pl.ds(page * each, each)].T) for page, x in enumerate(codes)]
        found.append(product(plan, width, plan.p_digits, pairs, refs.get("v_wide")))
    return found


def nibbles(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 of two int4 each -> (low nibble + 8, 16 times the high nibble)."""
    return (x & jnp.int8(15)) ^ jnp.int8(8), x & jnp.int8(-16)


def product(plan, height: int, digits: int, pairs: list, wide) -> jax.Array:
    """Sum of left right over `pairs` [height,L] x [L,digits rows] -> [height,rows] float32, the digits put together."""

    def run(acc):
        for left, right in pairs:
            if plan.p.k_dtype == "int8":
                plgpu.wgmma(acc, left, right)
                continue
            if not plan.packed:
                left = widened(left, plan.interpreted)
            if plan.interpreted:  # it has no operands in registers
                wide[...] = left
                plgpu.commit_smem()
                left = wide
            plgpu.wgmma(acc, left, right)
            if not plan.integer:
                plgpu.wgmma_wait(0)  # f16 operands take four times the registers of the codes: one pair at a time
        return acc[...]

    if not plan.integer:
        return pl.run_scoped(run, plgpu.ACC((height, plan.rows), jnp.float32))
    x = pl.run_scoped(run, plgpu.ACC((height, digits * plan.rows), jnp.int32))
    return number_of([x[:, d * plan.rows : (d + 1) * plan.rows] for d in range(digits)])


def row_vector(plan, ref, i: int) -> jax.Array:
    """Of the values of a tile's tokens in shared memory [keys], those of set i: [height], one a row of S^T."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    if plan.sets == 1:
        return plgpu.load(ref, layout=layout, optimized=False)
    if plan.interpreted:
        return ref[...].reshape(plan.height, plan.sets)[:, i]

    # a load with a stride, which has no other name
    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((plan.height,), jnp.float32, layout=layout)
    )
    def every_other(ctx, memory):
        pairs = mgpu.memref_reshape(memory, (plan.height, plan.sets))
        pairs = mgpu.memref_slice(pairs, (slice(None), i))
        return mgpu.FragmentedArray.load_untiled(pairs, layout=mgpu.WGMMA_ROW_LAYOUT, optimized=False)

    return every_other(ref)


def widened(ref, interpreted: bool) -> jax.Array:
    """Codes in shared memory -> f16 in the layout of a left operand."""
    if interpreted:
        return ref[...].astype(jnp.float16)
    codes = plgpu.load(ref, layout=plgpu.Layout.WGMMA_UPCAST_2X)
    return plgpu.layout_cast(codes, plgpu.Layout.WGMMA).astype(jnp.float16)


def down(x: jax.Array, height: int) -> jax.Array:
    """x[rows] -> [height,rows]."""
    return lax.broadcast_in_dim(x, (height, x.shape[0]), (1,))
