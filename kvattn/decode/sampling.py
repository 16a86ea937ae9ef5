"""Choosing the next token: greedy, temperature, top-k, top-p (nucleus), min-p, one seed per sample.

A sample's draw depends on its own seed, its own logits and how many tokens it has drawn, never on its batch
neighbours: the noise of row b after step[b] tokens comes from `fold_in(key(seed[b]), step[b])`.

The filters need no sort. "Keep the k best" and "keep the smallest set holding probability p" are both "keep
every token at least as probable as a threshold", and the threshold is found exactly by bisection on the bit
pattern of the probability: non-negative floats order like their bits, so 31 counting passes over W values
decide it. On a CPU that is several times cheaper than sorting W = 49152 values, and it splits over a sharded
vocabulary. Tokens tied with the last one kept are kept.

Order and meaning follow transformers' warpers: temperature, then top-k, then top-p on what is left
(Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", eq. 2-3), then min-p
(Nguyen et al. 2024, "Turning Up the Heat": keep p >= min_p * max p).
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kvattn.config import DecodeConfig
from kvattn.errors import UserError

MASKED = -1e30  # a logit that is never drawn; finite, so that no inf - inf can appear


@flax.struct.dataclass
class Sampler:
    """How each row of a batch draws. All arrays are [B]; `greedy` and `filtered` are static facts about all
    rows (every temperature 0; any filter on) that spare work without changing a result."""

    seed: jax.Array  # uint32
    temperature: jax.Array  # f32, 0 = greedy
    top_k: jax.Array  # i32, 0 = off
    top_p: jax.Array  # f32, 1 = off
    min_p: jax.Array  # f32, 0 = off
    greedy: bool = flax.struct.field(pytree_node=False, default=True)
    filtered: bool = flax.struct.field(pytree_node=False, default=False)


def create(cfg: DecodeConfig, batch: int, seeds: Sequence[int] | None = None) -> Sampler:
    """The sampler of `batch` rows: row b draws with `seeds[b]`, by default `cfg.seed + b`.

    Raises UserError for a temperature below 0, top_k below 0, top_p outside (0, 1], min_p outside [0, 1).
    """
    check(cfg)
    if seeds is None:
        seeds = [cfg.seed + row for row in range(batch)]
    if len(seeds) != batch:
        raise UserError(f"seeds has {len(seeds)} entries for {batch} prompts; give one per prompt.")

    def rows(value, dtype):
        return jnp.full((batch,), value, dtype)

    return Sampler(
        seed=jnp.asarray(np.asarray([seed % 2**32 for seed in seeds], np.uint32)),
        temperature=rows(cfg.temperature, jnp.float32),
        top_k=rows(cfg.top_k, jnp.int32),
        top_p=rows(cfg.top_p, jnp.float32),
        min_p=rows(cfg.min_p, jnp.float32),
        greedy=cfg.temperature == 0.0,
        filtered=cfg.top_k > 0 or cfg.top_p < 1.0 or cfg.min_p > 0.0,
    )


def check(cfg: DecodeConfig) -> None:
    """Raises UserError for a sampling field outside its range."""
    if not cfg.temperature >= 0.0:
        raise UserError(f"decode.temperature is {cfg.temperature}; it must be at least 0 (0 = greedy).")
    if cfg.top_k < 0:
        raise UserError(f"decode.top_k is {cfg.top_k}; it must be at least 0 (0 = off).")
    if not 0.0 < cfg.top_p <= 1.0:
        raise UserError(f"decode.top_p is {cfg.top_p}; it must be in (0, 1] (1 = off).")
    if not 0.0 <= cfg.min_p < 1.0:
        raise UserError(f"decode.min_p is {cfg.min_p}; it must be in [0, 1) (0 = off).")


def sample(logits: jax.Array, sampler: Sampler, step: jax.Array) -> jax.Array:
    """The next token of every row: logits[B,W] f32, step [B] or scalar i32 (tokens it has drawn so far) -> [B] i32."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampler.greedy:
        return best
    scores = filter_logits(logits, sampler) if sampler.filtered else _tempered(logits, sampler)

    def noise(seed, step):
        key = jax.random.fold_in(jax.random.key(seed), step)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    step = jnp.broadcast_to(step, sampler.seed.shape)
    drawn = jnp.argmax(scores + jax.vmap(noise)(sampler.seed, step), axis=-1).astype(jnp.int32)
    return jnp.where(sampler.temperature > 0.0, drawn, best)


def filter_logits(logits: jax.Array, sampler: Sampler) -> jax.Array:
    """Tempered logits with every token outside top-k, top-p or min-p at MASKED: [B,W] -> [B,W] f32."""
    scores = _tempered(logits, sampler)
    width = logits.shape[-1]
    weight = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))  # best token = 1
    k = jnp.where(sampler.top_k > 0, jnp.minimum(sampler.top_k, width), width)
    ones = jnp.ones_like(weight)
    keep = weight >= _threshold(weight, ones, k.astype(jnp.float32))
    left = jnp.where(keep, weight, 0.0)
    total = jnp.sum(left, axis=-1)
    nucleus = weight >= _threshold(weight, left, sampler.top_p * total)
    keep &= nucleus | (sampler.top_p >= 1.0)[:, None]
    keep &= weight >= sampler.min_p[:, None]
    return jnp.where(keep, scores, MASKED)


def _tempered(logits: jax.Array, sampler: Sampler) -> jax.Array:
    temperature = jnp.where(sampler.temperature > 0.0, sampler.temperature, 1.0)
    return logits.astype(jnp.float32) / temperature[:, None]


def _threshold(weight: jax.Array, mass: jax.Array, target: jax.Array) -> jax.Array:
    """The largest t with sum(mass where weight >= t) >= target, per row: [B,W], [B,W], [B] -> [B,1].

    `weight` lies in [0, 1], so its bits as an integer are ordered like itself. 0 when nothing reaches target.
    """
    bits = jax.lax.bitcast_convert_type(weight, jnp.int32)

    def halve(_, bounds):
        low, high = bounds  # low holds, high fails
        middle = low + (high - low) // 2
        held = jnp.sum(jnp.where(bits >= middle[:, None], mass, 0.0), axis=-1) >= target
        return jnp.where(held, middle, low), jnp.where(held, high, middle)

    one = int(np.float32(1.0).view(np.int32))
    low = jnp.zeros(weight.shape[:1], jnp.int32)
    high = jnp.full(weight.shape[:1], one + 1, jnp.int32)
    low, _ = jax.lax.fori_loop(0, 30, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)[:, None]
