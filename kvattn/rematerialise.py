"""Rematerialisation that holds on every backend and JAX version.

`jax.checkpoint` keeps its recomputation apart from the forward pass with an optimization barrier, which
XLA:CPU in JAX 0.10 removes before common subexpressions are merged: the recomputation is merged away and its
memory comes back. Here the backward pass recomputes from activations to which 0 * (something of the
cotangent) is added. No compiler may assume that 0 * x is 0 for floats, so the recomputation depends on the
backward pass: it cannot be merged with the forward pass, nor scheduled before its turn.
"""

from collections.abc import Callable
from typing import Any

import jax


def recompute(tie: Callable[[Any], jax.Array]) -> Callable:
    """Decorator of `f(activations, weights, rest)`: nothing is kept for its backward pass but its arguments.

    `activations` and `weights` are pytrees of floating arrays; `rest` (masks, positions, anything) gets no
    gradient. `tie(cotangent)` gives an array that broadcasts, rank for rank, against every activation; it
    should come from dims that no mesh axis splits differently, so that tying costs no communication.
    Reverse mode only. A cotangent that is not finite gives gradients that are not.
    """

    def decorate(f):
        @jax.custom_vjp
        def run(activations, weights, rest):
            return f(activations, weights, rest)

        def forward(activations, weights, rest):
            return f(activations, weights, rest), (activations, weights, rest)

        def backward(kept, cotangent):
            activations, weights, rest = kept
            zero = 0.0 * tie(cotangent)
            activations = jax.tree.map(lambda x: x + zero.astype(x.dtype), activations)
            _, pull = jax.vjp(lambda a, w: f(a, w, rest), activations, weights)
            return *pull(cotangent), None

        run.defvjp(forward, backward)
        return run

    return decorate
