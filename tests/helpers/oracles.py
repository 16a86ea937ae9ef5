"""Float64 NumPy oracles: explicit loops over positions and heads, written from the equations, not from the code."""

import functools
import math

import numpy as np
from scipy.special import erf

from kvattn.config import ModelConfig


def numpy_tree(tree):
    """Parameters as float64 NumPy arrays, same structure."""
    if isinstance(tree, dict):
        return {k: numpy_tree(v) for k, v in tree.items()}
    if isinstance(tree, tuple):
        return tuple(numpy_tree(v) for v in tree)
    return np.asarray(tree, np.float64)


def norm(p, cfg: ModelConfig, x):
    """One feature vector at a time: x[..., D]."""
    out = np.empty_like(x)
    for index in np.ndindex(x.shape[:-1]):
        row = x[index]
        if cfg.norm == "layernorm":
            row = row - sum(row) / len(row)
        row = row / math.sqrt(sum(r * r for r in row) / len(row) + cfg.norm_eps)
        out[index] = row * (cfg.norm_offset + p["scale"])
        if cfg.norm == "layernorm":
            out[index] = out[index] + p["bias"]
    return out


def frequencies(rope, head_dim):
    """Angular frequency of each rotated pair and the cos/sin factor, pair by pair."""
    dim = rope.dim or head_dim
    freqs, factor = [], 1.0
    for i in range(dim // 2):
        f = 1.0 / rope.theta ** (2 * i / dim)
        turns = rope.original_length * f / (2 * math.pi)  # rotations over the original context
        if rope.scaling == "linear":
            f = f / rope.factor
        elif rope.scaling == "llama3":
            if turns < rope.low_freq_factor:
                f = f / rope.factor
            elif turns < rope.high_freq_factor:
                s = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
                f = (1 - s) * f / rope.factor + s * f
        elif rope.scaling == "yarn":

            def boundary(rotations):
                return dim * math.log(rope.original_length / (2 * math.pi * rotations)) / (2 * math.log(rope.theta))

            low, high = max(math.floor(boundary(rope.beta_fast)), 0), min(math.ceil(boundary(rope.beta_slow)), dim - 1)
            gamma = min(max((i - low) / max(high - low, 0.001), 0.0), 1.0)
            f = gamma * f / rope.factor + (1 - gamma) * f
            factor = rope.attention_factor or 0.1 * math.log(rope.factor) + 1
        freqs.append(f)
    return freqs, factor


def rotate(vector, rope, position):
    """Rotates one head vector: pair (i, i + R/2) turns by position * frequency i."""
    if rope is None:
        return vector
    out = vector.copy()
    freqs, factor = frequencies(rope, len(vector))
    half = len(freqs)
    for i, f in enumerate(freqs):
        c, s = math.cos(position * f) * factor, math.sin(position * f) * factor
        a, b = vector[i], vector[i + half]
        out[i], out[i + half] = a * c - b * s, b * c + a * s
    return out


def visible(mask, q, k) -> bool:
    """May a query at position q see a key at position k?"""
    return mask.kind == "full" or k <= q and (not mask.window or q - k < mask.window or k < mask.sinks)


def attention(q, k, v, mask, scale, cap, segments, seen_by=None):
    """q[T,N,H], k[S,K,H], v[S,M,V] -> [T,N,V], one score at a time. seen_by(key head, t, s): in place of the mask and
    the segments."""
    length, n, _ = q.shape
    out = np.zeros((length, n, v.shape[-1]))
    for t in range(length):
        for head in range(n):
            kh, vh = head // (n // k.shape[1]), head // (n // v.shape[1])
            if seen_by is None:
                seen = [s for s in range(length) if visible(mask, t, s) and segments[s] == segments[t]]
            else:
                seen = [s for s in range(len(k)) if seen_by(kh, t, s)]
            scores = [float(q[t, head] @ k[s, kh]) * scale for s in seen]
            if cap:
                scores = [cap * math.tanh(s / cap) for s in scores]
            weights = [math.exp(s - max(scores)) for s in scores]
            for s, w in zip(seen, weights, strict=True):
                out[t, head] += w / sum(weights) * v[s, vh]
    return out


def _heads_norm(scale, cfg, x):
    """q/k norm of x[T,heads,H]: over H (scale [H]) or over heads x H (scale [heads,H])."""
    if scale.ndim == 1:
        return norm({"scale": scale}, _rms(cfg), x)
    flat = norm({"scale": scale.reshape(-1)}, _rms(cfg), x.reshape(x.shape[0], -1))
    return flat.reshape(x.shape)


class _rms:
    """The fields `norm` reads, for an RMS norm inside any model."""

    norm = "rmsnorm"

    def __init__(self, cfg):
        self.norm_eps, self.norm_offset = cfg.norm_eps, cfg.norm_offset


def _activation(name, x):
    if name == "swiglu":
        return x / (1 + np.exp(-x))
    if name.endswith("tanh"):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def _mlp(p, cfg, x):
    up = x @ p["up"] + p.get("up_bias", 0)
    if "gate" in p:
        hidden = _activation(cfg.mlp, x @ p["gate"] + p.get("gate_bias", 0)) * up
    else:
        hidden = _activation(cfg.mlp, up)
    return hidden @ p["down"] + p.get("down_bias", 0)


def _project(p, cfg, layer, h, h_kv, kv, positions, k_positions=None):
    """(q, (k, v)) of one layer; (k, v) come from the owner when the layer owns none."""
    k_positions = positions if k_positions is None else k_positions
    rope, heads = cfg.rope(layer), cfg.attention(layer)

    def turn(x, at=positions):
        return np.stack([[rotate(vec, rope, p_) for vec in row] for row, p_ in zip(x, at, strict=True)])

    q = np.einsum("td,dnh->tnh", h, p["q"]) + p.get("q_bias", 0)
    if heads.qk_norm != "none":
        q = _heads_norm(p["q_norm"]["scale"], cfg, q)
    if cfg.sources[layer] != layer:
        return turn(q), kv
    k = np.einsum("td,dkh->tkh", h_kv, p["k"]) + p.get("k_bias", 0)
    if heads.qk_norm != "none":
        k = _heads_norm(p["k_norm"]["scale"], cfg, k)
    v = k if heads.tied_kv else np.einsum("td,dmv->tmv", h_kv, p["v"]) + p.get("v_bias", 0)
    return turn(q), (turn(k, k_positions), v)


def logits(
    params, cfg: ModelConfig, tokens, segments=None, positions=None, *, seen_by=None, memory=None, families=None
):
    """Logits [T,W] of one row of tokens [T]. seen_by(layer, key head, t, s): what is seen, in place of masks and
    segments; memory[S,D]: what an encoder left, all of it real; families: tag -> the attention of a family that is not
    plain heads, f(p, cfg, layer, h, h_kv, what the owner left, positions) -> (output, what the owner left)."""
    p = numpy_tree(params)
    length = len(tokens)
    segments = np.zeros(length, int) if segments is None else segments
    positions = np.arange(length) if positions is None else positions
    x = p["embed"]["table"][tokens] * cfg.embed_scale
    shared = {}
    for layer, block in enumerate(p["layers"]):
        owner, heads = cfg.sources[layer], cfg.attention(layer)
        h = norm(block["attn_norm"], cfg, x) if "attn_norm" in block else x
        h_kv, at, seen = norm(block["kv_norm"], cfg, x) if "kv_norm" in block else h, positions, None
        if cfg.layer(layer).reads == "memory":
            h_kv, at, seen = memory, range(len(memory)), lambda kh, t, s: True
        elif seen_by is not None:
            seen = functools.partial(seen_by, layer)
        attended = 0.0
        if families and heads.tag in families:
            attended, shared[owner] = families[heads.tag](
                block["attn"], cfg, layer, h, h_kv, shared.get(owner), positions
            )
        elif "attn" in block:
            q, shared[owner] = _project(block["attn"], cfg, layer, h, h_kv, shared.get(owner), positions, at)
            scale = heads.attn_scale or 1 / math.sqrt(heads.head_dim)
            context = attention(q, *shared[owner], cfg.mask(layer), scale, heads.attn_soft_cap, segments, seen)
            attended = np.einsum("tnv,nvd->td", context, block["attn"]["o"]) + block["attn"].get("o_bias", 0)
        if "attn_post_norm" in block:
            attended = norm(block["attn_post_norm"], cfg, attended)
        if cfg.residual == "serial":
            x = x + attended
            h = norm(block["mlp_norm"], cfg, x) if "mlp_norm" in block else x
        elif cfg.residual == "parallel_neox":
            h = norm(block["mlp_norm"], cfg, x)
        out = _mlp(block["mlp"], cfg, h)
        if "mlp_post_norm" in block:
            out = norm(block["mlp_post_norm"], cfg, out)
        x = x + out if cfg.residual == "serial" else x + attended + out
    x = norm(p["final_norm"], cfg, x)
    table = p["embed"]["table"].T if cfg.tied_embeddings else p["unembed"]["table"]
    scores = x @ table
    return cfg.logit_soft_cap * np.tanh(scores / cfg.logit_soft_cap) if cfg.logit_soft_cap else scores
