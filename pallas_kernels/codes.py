"""int8, int4 and fp8 codes of K and V: symmetric, one scale a token and head (or a channel).

    scale = max|x| / limit;  code = round(x / scale), clipped;  x' = code * scale,  |x - x'| <= scale / 2 (int)

so that score = (q . code_k) scale_k and out = sum_j (p_j scale_v[j]) code_v[j] need no dequantised copy.
"""

from typing import Any

import jax
import jax.numpy as jnp

LIMITS = {"int8": 127.0, "int4": 7.0, "float8_e4m3fn": 448.0}


def bits(dtype: Any) -> int:
    """Bits of one element as it is held (int4: 4)."""
    dtype = jnp.dtype(dtype)
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).bits


def scale_of(x: jax.Array, name: str, axis: int = -1) -> jax.Array:
    """max|x| / limit over `axis` (kept out), float32; 1 where all is zero, so that zero stays zero."""
    top = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axis)
    return jnp.where(top > 0, top / LIMITS[name], 1.0)


def encode(x: jax.Array, scale: jax.Array, name: str) -> jax.Array:
    """Codes of x; `scale` broadcasts against x. What is beyond the range is clipped to it."""
    limit = LIMITS[name]
    y = jnp.clip(x.astype(jnp.float32) / scale, -limit, limit)
    return (y if name.startswith("float") else jnp.round(y)).astype(name)


def decode(codes: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """codes * scale in `dtype`; `scale` broadcasts."""
    return (codes.astype(jnp.float32) * scale).astype(dtype)
