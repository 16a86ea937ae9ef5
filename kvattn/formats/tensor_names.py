"""How a stored tensor lies in memory against kvattn's parameters: pairs of inverse NumPy functions.

Checkpoints store a linear map as [out, in] with heads flattened into one dimension; kvattn keeps [in, out] with
heads apart. `unpack(tensor, shapes)` gives views of the parameters in the tensor, `pack(params)` the tensor.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    shape: Callable[[tuple[Shape, ...]], Shape]
    unpack: Callable[[np.ndarray, tuple[Shape, ...]], tuple[np.ndarray, ...]]
    pack: Callable[[tuple[np.ndarray, ...]], np.ndarray]


def _pack_heads(parts: tuple[np.ndarray, ...]) -> np.ndarray:
    """q, k, v [D,N,H] -> [N*3*H, D]: every head's q, k and v rows together, as GPT-NeoX keeps them."""
    stacked = np.stack(parts, axis=2)
    return stacked.reshape(stacked.shape[0], -1).T


TRANSFORMS = {
    # [W,D] <-> [W,D]
    "same": Transform(lambda s: s[0], lambda t, s: (t,), lambda p: p[0]),
    # [heads*dim] <-> [heads,dim]; [n] <-> [n]
    "flat": Transform(lambda s: (math.prod(s[0]),), lambda t, s: (t.reshape(s[0]),), lambda p: p[0].reshape(-1)),
    # [heads*dim, D] <-> [D,heads,dim]: projections into heads, and plain [out, in] <-> [in, out]
    "inward": Transform(
        lambda s: (math.prod(s[0][1:]), s[0][0]),
        lambda t, s: (t.T.reshape(s[0]),),
        lambda p: p[0].reshape(p[0].shape[0], -1).T,
    ),
    # [D, heads*dim] <-> [heads,dim,D]: the output projection
    "outward": Transform(
        lambda s: (s[0][-1], math.prod(s[0][:-1])),
        lambda t, s: (t.T.reshape(s[0]),),
        lambda p: p[0].reshape(-1, p[0].shape[-1]).T,
    ),
    # [N*3*H, D] <-> q, k, v [D,N,H]
    "interleaved": Transform(
        lambda s: (3 * math.prod(s[0][1:]), s[0][0]),
        lambda t, s: tuple(t.reshape(s[0][1], 3, s[0][2], -1)[:, i].transpose(2, 0, 1) for i in range(3)),
        _pack_heads,
    ),
    # [N*3*H] <-> q, k, v [N,H]
    "interleaved_bias": Transform(
        lambda s: (3 * math.prod(s[0]),),
        lambda t, s: tuple(t.reshape(s[0][0], 3, s[0][1])[:, i] for i in range(3)),
        lambda p: np.stack(p, axis=1).reshape(-1),
    ),
}
