"""Recomputation: the same values and gradients, and less memory in the compiled program."""

import jax
import jax.numpy as jnp
import numpy as np

from kvattn.rematerialise import recompute
from tests.helpers.tolerances import F32_GRAD, F32_OP, close


def _chain(wrap):
    """Sixteen layers that each make a [64, 512] intermediate from [64, 16]; the sum of squares of the end."""

    def layer(x, w, rest):
        return x + jnp.where(rest, jnp.tanh(x @ w), 0.0) @ w.T

    def loss(x, weights, seen):
        for w in weights:
            x = wrap(layer)(x, w, seen)
        return jnp.square(x).sum()

    return loss


def _arguments(rng):
    weights = [jnp.asarray(rng.standard_normal((16, 512)) / 90, jnp.float32) for _ in range(16)]
    x, seen = rng.standard_normal((64, 16)), rng.random((64, 512)) < 0.5
    return jnp.asarray(x, jnp.float32), weights, jnp.asarray(seen)


def test_values_and_gradients_are_those_of_the_function(rng):
    args = _arguments(rng)
    plain, saved = (jax.value_and_grad(_chain(wrap), (0, 1)) for wrap in (lambda f: f, recompute(lambda ct: ct)))
    (want, want_grads), (got, got_grads) = jax.jit(plain)(*args), jax.jit(saved)(*args)
    close(got, want, F32_OP)
    jax.tree.map(lambda a, b: close(a, b, F32_GRAD), got_grads, want_grads)


def test_the_compiled_program_keeps_no_intermediates(rng):
    """16 x [64, 512] float32 are 2 MiB; with recomputation at most a few of them live at a time."""
    args = _arguments(rng)
    sizes = []
    for wrap in (lambda f: f, recompute(lambda cotangent: cotangent)):
        compiled = jax.jit(jax.grad(_chain(wrap), (0, 1))).lower(*args).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert sizes[0] > 16 * 64 * 512 * 4 and sizes[1] < sizes[0] / 2, sizes


def test_rest_gets_no_gradient_and_integers_pass():
    @recompute(lambda cotangent: cotangent)
    def f(x, w, rest):
        return x * w["scale"][None] + rest["n"].astype(jnp.float32)[None] * rest["f"]

    x, w, rest = jnp.arange(3.0), {"scale": jnp.asarray(2.0)}, {"n": jnp.asarray(1), "f": jnp.ones(3)}
    grads = jax.grad(lambda *a: f(*a).sum(), (0, 1, 2), allow_int=True)(x, w, rest)
    np.testing.assert_array_equal(grads[0], [2.0, 2.0, 2.0])
    assert grads[1]["scale"] == 3.0
    np.testing.assert_array_equal(grads[2]["f"], [0.0, 0.0, 0.0])
