"""The reference attention: merging partial results, masks as values, nothing visible, and the kernel door."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import config, masks
from kvattn.attention import gate
from kvattn.attention.core import attend_partial, merge
from kvattn.config import MaskConfig
from kvattn.errors import UserError
from tests.helpers import oracles, tiny
from tests.helpers.tolerances import EXACT, F32_OP, close


def _qkv(rng, slots=11, length=7, n=6, k=3, m=2, h=5, v=4):
    arrays = [(2, length, n, h), (2, k, slots, h), (2, m, slots, v)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in arrays]


@pytest.mark.parametrize("cap", [0.0, 1.5])
@pytest.mark.parametrize("mask", [MaskConfig(), MaskConfig(3), MaskConfig(3, 2)])
def test_attention_equals_the_loop(rng, mask, cap):
    q, k, v = _qkv(rng, slots=7)
    tokens = masks.Tokens(jnp.tile(jnp.arange(7, dtype=jnp.int32), (2, 1)))
    seen = masks.from_config(mask)(tokens, masks.as_keys(tokens))
    got = attend_partial(q, k, v, seen, scale=0.3, cap=cap).out
    for b in range(2):
        rows = [np.asarray(x[b], np.float64) for x in (q, k.swapaxes(1, 2), v.swapaxes(1, 2))]
        close(got[b], oracles.attention(*rows, mask, 0.3, cap, np.zeros(7)), F32_OP)


def test_hand_checked_two_tokens():
    """One head, scores 0 and ln 3: weights 1/4 and 3/4."""
    q = jnp.asarray([[[[1.0]]]])
    k = jnp.asarray([[[[0.0], [np.log(3.0)]]]])
    v = jnp.asarray([[[[8.0], [4.0]]]])
    out = attend_partial(q, k, v, jnp.ones((1, 1, 1, 2), bool), scale=1.0)
    close(out.out, np.full((1, 1, 1, 1), 0.25 * 8 + 0.75 * 4), F32_OP)


def test_merging_chunks_is_attending_to_all(rng):
    q, k, v = _qkv(rng)
    seen = jnp.asarray(rng.random((2, 1, 7, 11)) < 0.6)
    whole = attend_partial(q, k, v, seen, scale=0.7)
    cuts = [slice(0, 2), slice(2, 9), slice(9, 11)]
    parts = [attend_partial(q, k[:, :, c], v[:, :, c], seen[..., c], scale=0.7) for c in cuts]
    for got, want in zip(merge(parts), whole, strict=True):
        close(got, want, F32_OP)
    for got, want in zip(merge([parts[2], merge(parts[:2])]), whole, strict=True):
        close(got, want, F32_OP)


def test_nothing_visible_gives_zero_and_no_nan(rng):
    q, k, v = _qkv(rng)
    out = attend_partial(q, k, v, jnp.zeros((2, 1, 7, 11), bool), scale=1.0)
    close(out.out, np.zeros_like(out.out), EXACT)
    close(out.sum, np.zeros_like(out.sum), EXACT)
    grad = jax.grad(lambda q: attend_partial(q, k, v, jnp.zeros((2, 1, 7, 11), bool), scale=1.0).out.sum())(q)
    close(grad, np.zeros_like(grad), EXACT)


def test_hidden_slots_do_not_matter(rng):
    """Garbage in slots the mask hides changes nothing, bit for bit."""
    q, k, v = _qkv(rng)
    seen = jnp.asarray(rng.random((2, 1, 7, 11)) < 0.6).at[..., 4].set(False)
    want = attend_partial(q, k, v, seen, scale=0.7).out
    got = attend_partial(q, k.at[:, :, 4].set(1e4), v.at[:, :, 4].set(-1e4), seen, scale=0.7).out
    close(got, want, EXACT)


def test_masks_combine_as_values():
    a, b = masks.Causal() & masks.Window(3), masks.Causal() & masks.Window(3)
    assert a == b and hash(a) == hash(b) and a != masks.Causal() & masks.Window(4)
    at = masks.Tokens(jnp.asarray([[0, 1, 2, 3, 4, 5]], jnp.int32))
    seen = (masks.Causal() & (masks.Window(2) | masks.Sinks(1)))(at, masks.as_keys(at))
    want = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 0, 1, 1],
    ]
    assert seen[0, 0].astype(int).tolist() == want


def test_padding_is_never_visible():
    q = masks.Tokens(jnp.asarray([[-1, 3]], jnp.int32))
    k = masks.Tokens(jnp.asarray([[-1, 2]], jnp.int32))
    assert masks.from_config(MaskConfig())(q, masks.as_keys(k))[0, 0].tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize(
    "change,reason",
    [
        (dict(n_v_heads=6), "equal heads"),
        (dict(v_head_dim=10, head_dim=10, attn_soft_cap=3.0), "soft cap"),
        (dict(v_head_dim=10, masks=(MaskConfig(4, 1),)), "sinks"),
        (dict(v_head_dim=10), "divisible by 8"),
    ],
)
def test_cudnn_says_what_it_cannot_serve(change, reason):
    with pytest.raises(UserError, match=reason):
        gate(tiny.config(kernel="cudnn", **change))


def test_cudnn_off_a_gpu_raises():
    from kvattn import model

    cfg = tiny.config(kernel="cudnn", head_dim=8, v_head_dim=8)
    gate(cfg)
    params = model.init(jax.random.key(0), cfg)
    with pytest.raises(UserError, match="a kernel for gpu, and this is a cpu"):
        model.forward(params, cfg, model.Inputs(jnp.zeros((1, 3), jnp.int32)))


def test_unknown_kernels_and_families_raise():
    for field in ("kernel", "decode_kernel"):
        with pytest.raises(UserError, match=f"model.{field} is 'flash9'"):
            gate(dataclasses.replace(tiny.BASE, **{field: "flash9"}))
    with pytest.raises(UserError, match="attention.name is 'head'.*nearest valid: heads"):
        config.Attention.of("head")


def test_heads_that_see_different_keys(rng):
    """A mask a K head is the mask of its own query heads."""
    q, k, v = _qkv(rng, m=3)
    seen = jnp.asarray(rng.random((2, 3, 7, 11)) < 0.6)
    got = attend_partial(q, k, v, seen, scale=0.7)
    for head in range(3):
        mine = (x[:, head : head + 1] for x in (k, v, seen))
        k1, v1, s1 = mine
        want = attend_partial(q[:, :, 2 * head : 2 * head + 2], k1, v1, s1, scale=0.7)
        close(got.out[:, :, 2 * head : 2 * head + 2], want.out, F32_OP)
