"""The body of the TPU decode kernel: copies of pieces of K and V kept under way, online softmax over what arrived.

Everything static is in `Problem` and `Plan`. A core walks its share of the work list (row, share of heads, share of
keys); the copies run ahead of the computation by `buffers` - 1 blocks, across the ends of rows, so that short rows do
not empty the pipe. Scores are in powers of two (log2 e is folded into the scale).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.codes import bits
from pallas_kernels.contract import NEGATIVE, Problem, key_positions, visible
from pallas_kernels.shapes import LOG2E
from pallas_kernels.tpu.tuning import LANES, Plan

EMPTY = NEGATIVE / 2  # where a max starts: above a hidden score, so that 2^(hidden - max) is 0 and never 1


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that is static: problem, plan, leading pieces that hold attention-sink tokens, sinks before the ring."""

    p: Problem
    plan: Plan
    sink_pieces: int
    ring_sinks: int

    @property
    def items(self) -> int:
        """Length of the work list."""
        return self.p.batch * self.plan.chunks * self.plan.splits

    @property
    def windowed(self) -> bool:
        """Whether a row's pieces start after position 0."""
        return self.p.options.window > 0 and not self.p.ring


@dataclasses.dataclass(frozen=True)
class Stream:
    """One array that is copied piece by piece: its refs and how its tokens lie."""

    hbm: Any
    vmem: Any
    heads: int
    axis: int  # of the tokens, counted from the heads: 1 (rows, scales) or 2 (lanes)
    sem: Any  # [buffers]

    @property
    def apart(self) -> bool:
        """Whether pieces lie apart in a buffer: scales of pages that fill no whole tile of lanes."""
        return len(self.vmem.shape) > len(self.hbm.shape)

    def copy(self, p: Problem, plan: Plan, row: Any, chunk: Any, offset: Any, slot: Any, at: Any):
        """The copy of one piece into place `at` of buffer `slot`. `row` is the row of the batch, or the page."""
        every = slice(None)
        heads = pl.ds(chunk * self.heads, self.heads) if plan.chunks > 1 else every
        rank = len(self.hbm.shape) - 1
        source = [heads] + [every] * (rank - 1)
        if not p.page:
            source[self.axis] = pl.ds(pl.multiple_of(offset, LANES), plan.piece)
        place = [every] * rank
        if self.apart:
            place = [at, *place]
        else:
            place[self.axis] = pl.ds(pl.multiple_of(at * plan.piece, plan.piece), plan.piece)
        return pltpu.make_async_copy(self.hbm.at[(row, *source)], self.vmem.at[(slot, *place)], self.sem.at[slot])

    def load(self, plan: Plan, slot: Any, head: int, part: int):
        """Keys [part sub, (part + 1) sub) of one head: [sub, dim], [dim, sub], or scales [1, sub]."""
        scale = len(self.hbm.shape) == 3
        if self.apart:
            pieces = range(part * plan.sub // plan.piece, (part + 1) * plan.sub // plan.piece)
            return jnp.concatenate([self.vmem[slot, at, head : head + 1] for at in pieces], axis=1)
        index = [slice(head, head + 1) if scale else head] + [slice(None)] * (1 if scale else 2)
        index[self.axis] = pl.ds(part * plan.sub, plan.sub)
        return self.vmem[(slot, *index)]


@dataclasses.dataclass(frozen=True)
class Work:
    """The work list, in SMEM. Item w: row, share of heads and split by `place`; pieces [low, high) of the row; `after`
    the next item of the same core that has any. Per row: `first` piece after the sinks, `length`; `table` flat;
    `origin`[1] position of slot 0."""

    low: Any
    high: Any
    after: Any
    begin: Any
    first: Any
    length: Any
    table: Any
    origin: Any


def place(w: Any, plan: Plan) -> tuple[Any, Any, Any]:
    """(row, chunk, split) of work item w."""
    row, rest = w // (plan.chunks * plan.splits), w % (plan.chunks * plan.splits)
    return row, rest // plan.splits, rest % plan.splits


def body(s: Setup, work: Work, q, at, streams: dict[str, Stream], out, top, total, cursor) -> None:
    """One step of the grid. `cursor` (SMEM): work item and piece that are copied next, buffer they go to, buffer that
    is computed on next."""
    p, plan = s.p, s.plan
    core, step = pl.program_id(0), pl.program_id(1)
    mine = step * plan.cores + core

    @pl.when(step == 0)
    def _():
        item = work.begin[core]
        cursor[0], cursor[1] = item, work.low[item]
        cursor[2], cursor[3] = jnp.int32(0), jnp.int32(0)
        _clear(p, streams)
        for _ in range(plan.buffers - 1):
            _copy_next(s, work, streams, cursor)

    out[...] = jnp.zeros(out.shape, jnp.float32)
    top[...] = jnp.full(top.shape, EMPTY, jnp.float32)
    total[...] = jnp.zeros(total.shape, jnp.float32)
    low, high = work.low[mine], work.high[mine]

    def block(i, _):
        lo = low + i * plan.pieces
        here = jnp.minimum(high - lo, plan.pieces)
        _copy_next(s, work, streams, cursor)
        slot = cursor[3]
        _wait(p, plan, streams, slot, here)
        for part in range(plan.block // plan.sub):

            @pl.when(part * plan.sub < here * plan.piece)
            def _(part=part):
                keep = _mask(s, work, place(mine, plan)[0], lo, here, part, at)
                _attend(p, plan, streams, slot, part, keep, q, out, top, total)

        cursor[3] = _turn(slot, plan)

    jax.lax.fori_loop(0, (high - low + plan.pieces - 1) // plan.pieces, block, None)


def _turn(slot: Any, plan: Plan) -> Any:
    return jnp.where(slot + 1 == plan.buffers, 0, slot + 1)


def _clear(p: Problem, streams: dict[str, Stream]) -> None:
    """Zeros in every buffer that is multiplied by probabilities: a hidden key has probability 0, and 0 x NaN is NaN.
    Later, what no copy overwrites is an older token."""
    for name in ("k" if p.view else "v", "v_scale"):
        if name in streams and jnp.issubdtype(streams[name].vmem.dtype, jnp.floating):
            buffer = streams[name].vmem

            def one(slot, _, buffer=buffer):
                buffer[slot] = jnp.zeros(buffer.shape[1:], buffer.dtype)

            jax.lax.fori_loop(0, buffer.shape[0], one, None)


def _copy_next(s: Setup, work: Work, streams: dict[str, Stream], cursor) -> None:
    """Starts the copies of the next block of this core's work, if there is one, and moves the cursor on."""
    p, plan = s.p, s.plan
    item, lo, slot = cursor[0], cursor[1], cursor[2]

    @pl.when(item < s.items)
    def _():
        row, chunk, _ = place(item, plan)
        high = work.high[item]
        end = jnp.minimum(lo + plan.pieces, high)

        def one(i, _):
            index = i
            if s.windowed:
                index = jnp.where(i < s.sink_pieces, i, work.first[row] + i - s.sink_pieces)
            source = work.table[row * (p.slots // p.page) + index] if p.page else row
            for stream in streams.values():
                stream.copy(p, plan, source, chunk, index * plan.piece, slot, i - lo).start()

        jax.lax.fori_loop(lo, end, one, None)
        following = work.after[item]
        cursor[0] = jnp.where(end < high, item, following)
        cursor[1] = jnp.where(end < high, end, work.low[following])
        cursor[2] = _turn(slot, plan)


def _wait(p: Problem, plan: Plan, streams: dict[str, Stream], slot: Any, here: Any) -> None:
    """Until `here` pieces of every stream are in buffer `slot`; a wait counts bytes, whatever the source."""

    def one(i, _):
        for stream in streams.values():
            stream.copy(p, plan, jnp.int32(0), jnp.int32(0), jnp.int32(0), slot, i).wait()

    jax.lax.fori_loop(0, here, one, None)


def _mask(s: Setup, work: Work, row: Any, lo: Any, here: Any, part: int, at) -> Any:
    """[rows, sub]: which of these keys each query row sees."""
    p, plan = s.p, s.plan
    local = part * plan.sub + jax.lax.broadcasted_iota(jnp.int32, (1, plan.sub), 1)
    slots = lo * plan.piece + local
    if s.windowed:
        jump = (work.first[row] - s.sink_pieces) * plan.piece
        slots = jnp.where(slots < s.sink_pieces * plan.piece, slots, slots + jump)
    keys = key_positions(slots + work.origin[0], work.length[row], p.ring, s.ring_sinks)
    keys = jnp.where(local < here * plan.piece, keys, -1)  # beyond the copied pieces: older tokens
    shape = (plan.rows, plan.sub)
    return visible(jnp.broadcast_to(at[0], shape), jnp.broadcast_to(keys, shape), p.options.window, p.options.sinks)


def _attend(p: Problem, plan: Plan, streams, slot: Any, part: int, keep: Any, q, out, top, total) -> None:
    """Adds `sub` keys to the running softmax of every group of this step: all scores, then all softmaxes, then all
    values, which the compiler packs into a tenth fewer instructions than group by group."""
    tiles: dict[tuple[str, int], Any] = {}

    def tile(name: str, head: int):
        if (name, head) not in tiles:
            x = streams[name].load(plan, slot, head, part)
            tiles[name, head] = x if name.endswith("scale") else x.astype(_compute(q.dtype, x.dtype))
        return tiles[name, head]

    heads = [(j * plan.k_heads // plan.groups, j * plan.v_heads // plan.groups) for j in range(plan.groups)]
    factor = p.options.scale * (1.0 if p.options.soft_cap else LOG2E)
    found = []
    for j, (head_k, _) in enumerate(heads):
        k = tile("k", head_k)
        scores = _dot(q[0, j].astype(k.dtype), k, transposed=not p.k_lanes)
        scores = scores * (tile("k_scale", head_k) * factor if "k_scale" in streams else factor)
        if p.options.soft_cap:
            scores = jnp.tanh(scores / p.options.soft_cap) * (p.options.soft_cap * LOG2E)
        found.append(jnp.where(keep, scores, NEGATIVE))
    shrinks = []
    for j, (head_k, head_v) in enumerate(heads):
        before = top[0, 0, j]  # [rows, LANES], all lanes alike
        now = jnp.maximum(before, jnp.max(found[j], axis=1, keepdims=True))
        shrinks.append(jnp.exp2(before - now)[:, :1])
        weights = jnp.exp2(found[j] - now[:, :1])
        top[0, 0, j] = now
        total[0, 0, j] = total[0, 0, j] * shrinks[j] + jnp.sum(weights, axis=1, keepdims=True)
        scale = "k_scale" if p.view else "v_scale"
        found[j] = weights * tile(scale, head_k if p.view else head_v) if scale in streams else weights
    for j, (head_k, head_v) in enumerate(heads):
        if p.view:
            v = tile("k", head_k)[: p.value_dim] if p.k_lanes else tile("k", head_k)[:, : p.value_dim]
        else:
            v = tile("v", head_v)
        lanes = p.k_lanes if p.view else p.v_lanes
        out[0, 0, j] = out[0, 0, j] * shrinks[j] + _dot(found[j].astype(v.dtype), v, transposed=lanes)


def _compute(query: Any, held: Any) -> Any:
    """dtype of the products: codes are cast to q's, floats to the wider of the two."""
    return query if bits(held) <= bits(query) else held


def _dot(a: Any, b: Any, transposed: bool) -> Any:
    """a b, or a b^T; float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
