"""A pass of a few tokens over a cache, by the decode kernel that `model.decode_kernel` names (pallas_kernels/).

The kernel reads codes, pages and rings as they lie; what it cannot serve raises UserError with the reason and the
kernels that can. `reason_against` says the same of a config, before anything is allocated.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kvattn.attention import target
from kvattn.config import CacheConfig, ModelConfig
from kvattn.errors import UserError
from pallas_kernels import BACKENDS, KV, KernelError, Options, Partial, decode_attention, problem, why_not
from pallas_kernels.tpu.tuning import LANES
from sharding import partitioned

STEP_TOKENS = 16  # T up to which a pass over a cache is a step; a longer chunk of a prefill is computed by xla
MADE = "keys and values are made from what is stored (tied K = V); use xla"
DECODERS = ("xla", *BACKENDS)


def options(cfg: ModelConfig, layer: int) -> Options:
    """What the config says of a layer, for a kernel."""
    mask = cfg.mask(layer)
    return Options(cfg.scale, mask.window, mask.sinks, cfg.attn_soft_cap)


def step(cfg: ModelConfig, layer: int, q: jax.Array, positions: jax.Array, kv: KV | None) -> Partial:
    """Attention of q[B,T,N,H] at positions[B,T] over `kv`, as a Partial.

    Raises UserError off the kernel's platform, for a store it cannot read (None: keys that are yet to be made), and
    where the compiler partitions the program over several chips: it cannot look into a kernel.
    """
    name = cfg.decode_kernel
    if kv is None:
        raise UserError(f"model.decode_kernel is {name!r}: {MADE}.")
    target.need("model.decode_kernel", name, BACKENDS[name].platform)
    if partitioned():
        raise UserError(
            f"model.decode_kernel is {name!r} in a program that the compiler partitions; write its "
            "collectives out (sharding_study.overlap none, one_way or two_way), or use xla."
        )
    try:
        return decode_attention(q, kv, positions, options(cfg, layer), backend=name, interpret=target.interpret())
    except KernelError as error:
        raise UserError(f"model.decode_kernel is {name!r}: {error}") from error


def reason_against(cfg: ModelConfig, cache: CacheConfig, capacity: int = 0) -> str | None:
    """None if the decode kernel of `cfg` can read every layer's cache of `capacity` tokens (0: an odd number of them),
    in one-token steps of queries in the cache's dtype (bfloat16 for codes); else why not."""
    from kvattn import cache as caches
    from kvattn.attention import VARIANTS

    if cfg.decode_kernel == "xla":
        return None
    dtype = jnp.dtype(cache.dtype)
    dtype = jnp.bfloat16 if dtype.itemsize == 1 or jnp.issubdtype(dtype, jnp.integer) else dtype
    held = caches.specs(dataclasses.replace(cfg, decode_kernel="xla"), cache, 1, capacity or cache.capacity or 4097)
    for layer in range(cfg.n_layers):
        kv = VARIANTS[cfg.variant].kernel_kv(cfg, held[cfg.sources[layer]])
        if kv is None:
            return MADE
        for leaf in (kv.k, kv.v or kv.k):
            if BACKENDS[cfg.decode_kernel].platform == "tpu" and not leaf.lanes and leaf.dim % LANES:
                return (
                    f"rows of {leaf.dim} do not fill a TPU's {LANES} lanes, so that the cache would be copied; "
                    "use cache.layout lanes"
                )
        q = jax.ShapeDtypeStruct((1, 1, cfg.n_heads, cfg.head_dim), dtype)
        try:
            reason = why_not(cfg.decode_kernel, problem(q, kv, options(cfg, layer)))
        except KernelError as error:
            reason = str(error)
        if reason:
            return reason
    return None
