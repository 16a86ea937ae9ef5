"""A pass of a few tokens over a cache, by the decode kernel that `model.decode_kernel` names (pallas_kernels/).

The kernel reads codes, pages and rings as they lie; what it cannot serve raises UserError with the reason and the
kernels that can. `reason_against` says the same of a config, before anything is allocated.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kvattn import cache as caches
from kvattn.attention import target
from kvattn.attention.operand import Operand, SoftmaxShape
from kvattn.cache import Kept
from kvattn.config import CacheConfig, MaskConfig, ModelConfig
from kvattn.errors import UserError
from pallas_kernels import BACKENDS, KernelError, Options, Partial, decode_attention, problem, why_not
from pallas_kernels.tpu.tuning import LANES
from sharding import partitioned

STEP_TOKENS = 16  # T up to which a pass over a cache is a step; a longer chunk of a prefill is computed by xla
MADE = "keys and values are made from what is stored (tied K = V); use xla"
DECODERS = ("xla", *BACKENDS)


def step(name: str, op: Operand, positions: jax.Array, mask: MaskConfig) -> Partial:
    """Attention of op.q[B,T,N,H] at positions[B,T] over the cache of `op` by the kernel `name`, as a Partial.

    Raises UserError off the kernel's platform, for a store it cannot read (keys that are yet to be made), and
    where the compiler partitions the program over several chips: it cannot look into a kernel.
    """
    if op.kv is None:
        raise UserError(f"model.decode_kernel is {name!r}: {MADE}.")
    target.need("model.decode_kernel", name, BACKENDS[name].platform)
    if partitioned():
        raise UserError(
            f"model.decode_kernel is {name!r} in a program that the compiler partitions; write its "
            "collectives out (sharding_study.overlap none, one_way or two_way), or use xla."
        )
    kept = op.address if isinstance(op.address, Kept) else None
    q, at = (op.q, positions) if kept is None else kept.apart(op.q, positions)
    options = Options(op.scale, mask.window, mask.sinks, op.cap)
    try:
        out = decode_attention(q, op.kv, at, options, backend=name, interpret=target.interpret())
    except KernelError as error:
        raise UserError(f"model.decode_kernel is {name!r}: {error}") from error
    return out if kept is None else Partial(*(kept.together(x) for x in out))


def reason_against(cfg: ModelConfig, store: CacheConfig, capacity: int = 0) -> str | None:
    """None if the decode kernel of `cfg` can read every layer's cache of `capacity` tokens (0: an odd number of them),
    in one-token steps of queries in the cache's dtype (bfloat16 for codes); else why not."""
    if cfg.decode_kernel == "xla":
        return None
    if cfg.decode_kernel not in DECODERS:
        return f"choose one of {', '.join(DECODERS)}"
    dtype = jnp.dtype(store.dtype)
    dtype = jnp.bfloat16 if dtype.itemsize == 1 or jnp.issubdtype(dtype, jnp.integer) else dtype
    held = caches.specs(dataclasses.replace(cfg, decode_kernel="xla"), store, 1, capacity or store.capacity or 4097)
    forms = [held]
    if store.keep is not None:
        forms.append(caches.settled_specs(cfg, store, held, room=1))
    for form in forms:
        for layer in range(cfg.n_layers):
            family, shape = cfg.attention(layer), cfg.attention(layer).softmax(cfg)
            if not family.leaves(cfg) or shape is None:
                continue
            for part, heads in caches.parts(form[cfg.sources[layer]]):
                reason = _reason(cfg, layer, part, shape, _mask(cfg, layer, heads), dtype)
                if reason:
                    return reason
    return None


def _mask(cfg: ModelConfig, layer: int, heads: slice) -> MaskConfig:
    start = 0
    if heads == slice(None):
        return cfg.mask(layer)
    for group in cfg.layer(layer).groups:
        if start == heads.start:
            return group.mask
        start += group.heads
    return cfg.mask(layer)


def _reason(cfg, layer: int, cache: caches.Cache, shape: SoftmaxShape, mask: MaskConfig, dtype) -> str | None:
    kv = jax.eval_shape(lambda c: cfg.attention(layer).kernel_kv(cfg, c), cache)
    if kv is None:
        return MADE
    if mask.kind != "causal":
        return f"decode kernels see causally, and layer {layer} has mask {mask.kind!r}; use xla"
    kept = isinstance(cache.address, Kept)
    if kept and mask.window:
        return "kept tokens have positions of their own, which a window in a kernel does not see; use xla"
    for leaf in (kv.k, kv.v or kv.k):
        if BACKENDS[cfg.decode_kernel].platform == "tpu" and not leaf.lanes and leaf.dim % LANES:
            return (
                f"rows of {leaf.dim} do not fill a TPU's {LANES} lanes, so that the cache would be copied; "
                "use cache.layout lanes"
            )
    leaves = cfg.attention(layer).leaves(cfg).values()
    stored = next(leaf.shape[0] for leaf in leaves if leaf.role in ("key", "both"))  # 1 where K are made of a latent
    group = shape.heads // stored
    rows, heads = (kv.length.shape[0], group) if kept else (1, group * kv.k.heads)
    q = jax.ShapeDtypeStruct((rows, 1, heads, kv.k.dim), dtype)
    try:
        return why_not(cfg.decode_kernel, problem(q, kv, Options(shape.scale, mask.window, mask.sinks, shape.cap)))
    except KernelError as error:
        return str(error)
