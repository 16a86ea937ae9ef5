"""The candidates of the kernel benchmark that run in this process, and the float32 result they are checked against."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.kernel_shapes import Shape, inputs
from kvattn.attention import core
from kvattn.cache.address import gathered
from pallas_kernels import BACKENDS, KV, Leaf, Options, decode_attention, problem, why_not
from pallas_kernels.contract import key_positions, visible

Call = Callable[[jax.Array, Any, jax.Array], jax.Array]


def mask_of(kv: KV, positions: jax.Array, options: Options) -> jax.Array:
    """bool [B,1,T,S] of contiguous slots or of pages in the table's order."""
    slot = jnp.arange(kv.slots, dtype=jnp.int32)[None, :]
    key = key_positions(slot, kv.length[:, None], kv.ring, kv.ring_sinks)
    return visible(positions[:, None, :, None], key[:, None, None, :], options.window, options.sinks)


def xla(q: jax.Array, kv: KV, positions: jax.Array, options: Options) -> jax.Array:
    """The reference attention over the cache as it is held: codes with their scales folded, pages gathered."""
    k, v = _rows(kv, q.dtype)
    return core.attend_partial(q, k, v, mask_of(kv, positions, options), scale=options.scale, cap=options.soft_cap).out


def _rows(kv: KV, dtype: Any) -> tuple[Leaf, Leaf]:
    """(K, V) of all slots in rows, values in `dtype`."""

    def leaf(x):
        x = x if kv.table is None else gathered(x, kv.table)
        return dataclasses.replace(x, values=x.values.astype(dtype))

    k = leaf(kv.k)
    if kv.v is not None:
        return k, leaf(kv.v)
    return k, dataclasses.replace(k, values=k.values[..., : kv.v_dim])


def truth(q: jax.Array, kv: KV, positions: jax.Array, options: Options) -> jax.Array:
    """The float32 result [B,T,N,V], a row of the batch at a time, so that no float32 copy of a cache is held."""

    @jax.jit
    def one(b, q, kv, positions):
        def cut(x):
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, b, 1, 0)

        rows = dataclasses.replace(kv, length=cut(kv.length), table=cut(kv.table))
        if kv.table is None:
            rows = dataclasses.replace(rows, k=jax.tree.map(cut, kv.k), v=jax.tree.map(cut, kv.v))
        return xla(cut(q).astype(jnp.float32), rows, cut(positions), options)

    with jax.default_matmul_precision("highest"):
        return jnp.concatenate([one(jnp.int32(b), q, kv, positions) for b in range(q.shape[0])])


# --- candidates -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Candidate:
    """`call(q, kv, positions)`, over `kv` as prepare(kv) holds it."""

    call: Call
    prepare: Callable[[KV], Any] = lambda kv: kv


def candidates(shape: Shape, q: jax.Array, kv: KV, options: Options) -> dict[str, Candidate | str]:
    """Candidates of this process by name; a sentence in place of one that cannot serve the shape here."""
    here = jax.default_backend()
    out: dict[str, Candidate | str] = {}
    for name, backend in BACKENDS.items():
        reason = f"a kernel for {backend.platform}, and this is a {here}"
        if backend.platform == here:
            reason = why_not(name, problem(q, kv, options))
        out[name] = reason or Candidate(functools.partial(_ours, options, name))
    out["xla"] = Candidate(lambda q, kv, positions: xla(q, kv, positions, options))
    if here == "cpu":
        return out
    plain = None
    if shape.store != "bfloat16" or shape.page or shape.view:
        plain = "reads bf16 K and V of equal shapes in contiguous slots only"
    out["cudnn"] = ("cuDNN is for gpu" if here != "gpu" else plain) or Candidate(
        functools.partial(_cudnn, options), _by_token
    )
    grouped = "the same as cudnn without groups" if shape.heads == shape.k_heads else None
    out["cudnn_grouped"] = ("cuDNN is for gpu" if here != "gpu" else plain or grouped) or Candidate(
        functools.partial(_cudnn_grouped, options), _by_token
    )
    missing = None if importlib.util.find_spec("tokamax") else "not installed"
    out["tokamax"] = missing or plain or Candidate(functools.partial(_tokamax, options), _by_token)
    return out


def _ours(options: Options, name: str, q, kv, positions):
    return decode_attention(q, kv, positions, options, backend=name).out


def _by_token(kv: KV) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(K, V [B,S,K,H], length): the layout that cuDNN reads."""
    return *(jax.jit(lambda x: x.swapaxes(1, 2).copy())(x.values) for x in (kv.k, kv.v)), kv.length


def _cudnn(options: Options, q, kv, positions):
    k, v, length = kv
    return jax.nn.dot_product_attention(
        q, k, v, scale=options.scale, key_value_seq_lengths=length, implementation="cudnn"
    )


def _cudnn_grouped(options: Options, q, kv, positions):
    """The heads of a group as queries of one head: no key is read twice, at one token and full visibility."""
    k, _, _ = kv
    batch, _, heads, dim = q.shape
    rows = q.reshape(batch, k.shape[2], heads // k.shape[2], dim).swapaxes(1, 2)
    return _cudnn(options, rows, kv, positions).swapaxes(1, 2).reshape(q.shape)


def _tokamax(options: Options, q, kv, positions):
    import tokamax

    k, v, length = kv
    return tokamax.dot_product_attention(q, k, v, scale=options.scale, key_value_seq_lengths=length)


def query_dtype(shape: Shape) -> str:
    """dtype of q: bfloat16, or float16 where the platform's kernel serves only that."""
    ours = [name for name, backend in BACKENDS.items() if backend.platform == jax.default_backend()]
    for dtype in ("bfloat16", "float16") if ours else ():
        q, kv, _ = jax.eval_shape(lambda dtype=dtype: inputs(shape, dtype)[:3])
        if why_not(ours[0], problem(q, kv, Options(shape.scale))) is None:
            return dtype
    return "bfloat16"
