"""Decode attention in loops: one query, one head, one key at a time. Every kernel must reproduce it."""

import math

import numpy as np

from pallas_kernels.contract import KV, NEGATIVE, Leaf, Options, Partial


def token(leaf: Leaf, table: np.ndarray | None, b: int, head: int, slot: int) -> np.ndarray:
    """The dequantised vector [dim] float32 of one slot."""
    values = np.asarray(leaf.values)
    row, at = (b, slot) if table is None else (int(table[b, slot // leaf.slots]), slot % leaf.slots)
    vector = (values[row, head, :, at] if leaf.lanes else values[row, head, at]).astype(np.float32)
    if leaf.scale is None:
        return vector
    scale = np.asarray(leaf.scale, np.float32)
    return vector * (scale[b, head, 0] if leaf.channel else scale[row, head, at])


def position_of(slot: int, length: int, ring: int, ring_sinks: int) -> int:
    """The newest position that was written to this slot, -1 if none: by replaying the writes."""
    if not ring:
        return slot if slot < length else -1
    written = [p for p in range(length) if (p if p < ring_sinks else ring_sinks + (p - ring_sinks) % ring) == slot]
    return written[-1] if written else -1


def decode_attention(q, kv: KV, positions, options: Options, sink_logits=None) -> Partial:
    """Partial of q[B,T,N,H] at positions[B,T] over `kv` (see contract.py); NumPy float32 throughout."""
    q, positions, length = np.asarray(q, np.float32), np.asarray(positions), np.asarray(kv.length)
    table = None if kv.table is None else np.asarray(kv.table)
    start = 0 if kv.start is None else int(kv.start)
    batch, tokens, heads, _ = q.shape
    out = np.zeros((batch, tokens, heads, kv.value_dim), np.float32)
    top, total = np.full((batch, tokens, heads), NEGATIVE, np.float32), np.zeros((batch, tokens, heads), np.float32)
    for b, t, n in np.ndindex(batch, tokens, heads):
        at, scores, values = int(positions[b, t]), [], []
        for slot in range(kv.slots):
            key = position_of(slot + start, int(length[b]), kv.ring, kv.ring_sinks)
            near = not options.window or at - key < options.window or key < options.sinks
            if not (0 <= key <= at and near):
                continue
            k = token(kv.k, table, b, n // (heads // kv.k.heads), slot)
            score = float(q[b, t, n] @ k) * options.scale
            scores.append(options.soft_cap * math.tanh(score / options.soft_cap) if options.soft_cap else score)
            v = k[: kv.v_dim] if kv.v is None else token(kv.v, table, b, n // (heads // kv.v.heads), slot)
            values.append(v)
        if sink_logits is not None:
            scores.append(float(sink_logits[n]))
            values.append(np.zeros(kv.value_dim, np.float32))
        if not scores:
            continue
        top[b, t, n] = max(scores)
        weights = [math.exp(s - top[b, t, n]) for s in scores]
        total[b, t, n] = sum(weights)
        out[b, t, n] = sum(w * v for w, v in zip(weights, values, strict=True)) / total[b, t, n]
    return Partial(out, top, total)
