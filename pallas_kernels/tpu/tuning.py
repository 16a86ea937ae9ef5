"""Block sizes of the TPU decode kernels, and the VMEM they take.

Bytes in flight. Little's law: a copy from HBM takes about a microsecond to answer, so that bandwidth B needs B x 1 us
under way: 0.8 MB on v5e, 1.6 MB on v6e, 1.4 MB a core on v5p, 3.7 MB a device on tpu7x. A block of K and V of
BLOCK_BYTES = 2 MiB in BUFFERS = 3 buffers keeps two blocks, 4 MiB, under way while the third is computed on, on every
generation. Three buffers are 6 MiB, which leaves more than half of the 16 MiB that the compiler gives a kernel
unless it is told otherwise (VMEM of a core: v4 16 MiB, v5e and v6e 128 MiB, v5p and tpu7x 64 MiB).

Keys in a block, before rounding, of all heads of one row (what 2 MiB hold), e.g. K and V of `heads` heads:

    bits   dim   heads  keys     bits  dim  heads  keys
      16   128     8     512        8  128     8   1024
      16   256     1    2048        4  128     8   1536
      16    64     8    1024 (lanes; rows are padded to 128 lanes: 512)
      16   576     1    1536 (latent: K alone, held in 640 lanes)

A block arrives in pieces (one page, or about a quarter of a block), so that a row reads its length rounded up to a
piece and not to a block.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels.codes import bits
from pallas_kernels.contract import Problem
from pallas_kernels.shapes import round_up

LANES, SUBLANES = 128, 8
BLOCK_BYTES, BUFFERS = 2 << 20, 3
INT4_BLOCK_BYTES = 3 << 19  # 1.5 MiB, which take 3 MiB of VMEM
MOST_KEYS = 2048
SCORES = 16 << 10  # float32 scores computed at once: 16 of 64 vector registers
GROUPS = 8  # groups a step unrolls
VMEM_BUDGET = 15 << 20  # of the 16 MiB a kernel gets on every generation
VMEM_CAPACITY = {"v4": 16 << 20, "v5e": 128 << 20, "v5p": 64 << 20, "v6e": 128 << 20, "tpu7x": 64 << 20}
SMALLEST_PAGE = 64
SMEM_BYTES = 768 << 10  # of the 1 MiB: page tables and the work list


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one problem is cut.

    A step of the grid serves one row of the batch, one of `chunks` shares of the heads and one of `splits` shares of
    the keys: `groups` groups of `rows` padded query rows, over `k_heads` and `v_heads`. `pieces` pieces of `piece`
    keys are a block, of which `buffers` are held; scores are computed `sub` keys at a time.
    `cores`: shares of the work that may run on two cores.
    """

    chunks: int
    k_heads: int
    v_heads: int
    groups: int
    rows: int
    piece: int
    pieces: int
    buffers: int
    sub: int
    splits: int
    cores: int

    @property
    def block(self) -> int:
        """Keys of one block."""
        return self.piece * self.pieces


def tile_bytes(rows: int, lanes: int, dtype: Any) -> int:
    """Bytes of a [rows, lanes] tile in VMEM: lanes in 128, rows in 8 words of 32 bits. The compiler sets 8 bits aside
    for an int4 there (4 in HBM)."""
    packed = SUBLANES * 32 // bits(dtype)
    return round_up(rows, packed) * round_up(lanes, LANES) * max(bits(dtype), 8) // 8


def token_bytes(p: Problem, k_heads: int, v_heads: int) -> float:
    """Bytes of K and V of one token in these many heads, as they are copied."""

    def of(dim: int, dtype: str, lanes: bool) -> float:
        return (round_up(dim, SUBLANES) if lanes else round_up(dim, LANES)) * bits(dtype) / 8

    v = 0 if p.view else v_heads * of(p.value_dim, p.v_dtype, p.v_lanes)
    return k_heads * of(p.key_dim, p.k_dtype, p.k_lanes) + v


def _chunks(p: Problem) -> int:
    """Shares of the heads: as few as leave GROUPS groups in each; a share is a multiple of 8 heads, as scales lie."""
    for chunks in range(1, math.gcd(p.k_heads, p.v_heads) + 1):
        whole = p.k_heads % (SUBLANES * chunks) == 0 and p.v_heads % (SUBLANES * chunks) == 0
        if whole and p.groups <= GROUPS * chunks:
            return chunks
    return 1


def choose(p: Problem) -> Plan:
    """The plan for a problem that `supports` has accepted."""
    chunks = _chunks(p)
    k_heads, v_heads = p.k_heads // chunks, p.v_heads // chunks
    rows = round_up(p.rows, SUBLANES)
    most = INT4_BLOCK_BYTES if "int4" in (p.k_dtype, p.v_dtype) else BLOCK_BYTES
    keys = min(most / token_bytes(p, k_heads, v_heads), MOST_KEYS)
    if p.options.window and not p.ring:
        keys = min(keys, round_up(p.options.window + p.tokens - 1, LANES))
    keys = max(int(keys) // LANES * LANES, LANES)
    if p.page:
        piece = p.page
    else:
        piece = max(n for n in range(LANES, p.slots + 1, LANES) if p.slots % n == 0 and n <= max(keys // 4, LANES))
    pieces = max(1, min(keys, round_up(p.slots, LANES)) // piece)
    if piece % LANES:
        pieces = round_up(pieces, LANES // math.gcd(piece, LANES))
    block, most = piece * pieces, max(SCORES // rows, LANES)
    sub = max(n for n in range(LANES, block + 1, LANES) if block % n == 0 and n <= most)
    splits = p.options.splits
    if not splits:  # two cores of a chip share a single row
        splits = 2 if p.batch * chunks % 2 and p.slots >= 4 * piece * pieces else 1
    cores = 1 if p.batch * chunks * splits % 2 else 2
    return Plan(chunks, k_heads, v_heads, p.groups // chunks, rows, piece, pieces, BUFFERS, sub, splits, cores)


def buffer_shapes(p: Problem, plan: Plan) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes in VMEM of the buffers of K, V, K's scales and V's scales."""

    def shape(heads: int, dim: int, lanes: bool) -> tuple[int, ...]:
        if dim:
            return plan.buffers, heads, *((dim, plan.block) if lanes else (plan.block, dim))
        if plan.piece % LANES:
            return plan.buffers, plan.pieces, heads, plan.piece
        return plan.buffers, heads, plan.block

    return (
        shape(plan.k_heads, p.key_dim, p.k_lanes),
        shape(plan.v_heads, p.value_dim, p.v_lanes),
        shape(plan.k_heads, 0, False),
        shape(plan.v_heads, 0, False),
    )


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape[:-2]) * tile_bytes(shape[-2], shape[-1], dtype)


def vmem_bytes(p: Problem, plan: Plan | None = None) -> int:
    """VMEM of the kernel: buffers of K, V and scales, double-buffered blocks of q, positions and results, and values
    that do not fit registers: a few scores of [rows, sub], K and V of a head, three times where codes are cast.

    An upper bound of what the compilers for v4, v5e, v5p, v6e and tpu7x report; the tests hold them to it."""
    plan = plan or choose(p)
    k, v, k_scale, v_scale = buffer_shapes(p, plan)
    coded = min(bits(p.k_dtype), bits(p.v_dtype)) <= 8
    held = _bytes(k, p.k_dtype) + (0 if p.view else _bytes(v, p.v_dtype))
    if coded:
        held += _bytes(k_scale, jnp.float32) + (0 if p.view else _bytes(v_scale, jnp.float32))
    q = _bytes((plan.groups, plan.rows, p.key_dim), p.dtype) + tile_bytes(plan.rows, 1, jnp.int32)
    out = _bytes((plan.groups, plan.rows, p.value_dim), jnp.float32)
    stats = 2 * _bytes((plan.groups, plan.rows, LANES), jnp.float32)
    wide = jnp.float32 if "float32" in (p.dtype, p.k_dtype, p.v_dtype) or p.dtype == "float16" else jnp.bfloat16

    def tile(dim: int, lanes: bool) -> int:
        return tile_bytes(dim, plan.sub, wide) if lanes else tile_bytes(plan.sub, dim, wide)

    tiles = tile(p.key_dim, p.k_lanes) + (0 if p.view else tile(p.value_dim, p.v_lanes))
    scores = tile_bytes(plan.rows, plan.sub, jnp.float32)
    return held + 2 * (q + out + stats) + 4 * scores + (3 if coded else 1) * tiles


def cache_bytes(p: Problem) -> int:
    """Bytes of K, V and scales that one call reads when every row is full: the cost that XLA is told."""
    k = p.k_heads * p.key_dim * bits(p.k_dtype) + (32 * p.k_heads if bits(p.k_dtype) <= 8 else 0)
    v = 0 if p.view else p.v_heads * p.value_dim * bits(p.v_dtype) + (32 * p.v_heads if bits(p.v_dtype) <= 8 else 0)
    return p.batch * p.slots * (k + v) // 8
