"""Constants folded away (Pope et al., 2211.05102): norm scales into weights, base-2 softmax, swish by tanh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import int8_weights as weights
from kvattn import model
from kvattn.attention.core import attend_partial
from kvattn.errors import UserError
from tests.helpers import tiny
from tests.helpers.models import lively, tokens_of
from tests.helpers.tolerances import F32_MODEL, F32_OP, close

CASES = {
    "serial, tied": tiny.config(),
    "parallel, untied": tiny.config(residual="parallel_palm", tied_embeddings=False),
    "gemma's offset, not gated": tiny.config(norm_offset=1.0, mlp="gelu"),
    "shared K and V with a norm of their own": tiny.config(kv_source=(0, 0, 2, 2), kv_norm=True),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_folded_norms_change_no_logit(name):
    cfg = CASES[name]
    params, tokens = lively(cfg), jnp.asarray(tokens_of(cfg))
    folded = weights.fold_norms(params, cfg)
    scales = [np.asarray(block[n]["scale"]) for block in folded["layers"] for n in block if n.endswith("norm")]
    assert scales and all((scale == 1 - cfg.norm_offset).all() for scale in scales)
    assert any((np.asarray(b["attn_norm"]["scale"]) != 1 - cfg.norm_offset).any() for b in params["layers"])
    forward = jax.jit(lambda p: model.forward(p, cfg, model.Inputs(tokens))[0].logits)
    close(forward(folded), forward(params), F32_MODEL)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"norm": "layernorm"}, "model.norm is 'layernorm'"),
        ({"norm_placement": "both"}, "model.norm_placement is 'both'"),
    ],
)
def test_what_does_not_fold_raises(changes, message):
    cfg = tiny.config(**changes)
    with pytest.raises(UserError, match=message):
        weights.fold_norms(model.init(jax.random.key(0), cfg), cfg)
    plain = tiny.config()
    with pytest.raises(UserError, match="int8"):
        weights.fold_norms(weights.quantize(model.init(jax.random.key(0), plain), plain), plain)


def test_softmax_in_base_two_and_swish_by_tanh(rng):
    """exp2 of scores times log2(e) is the softmax of attention; swish(2u) = u (tanh(u) + 1)."""
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 4, 5), (2, 1, 7, 5), (2, 1, 7, 6)))
    mask = np.ones((2, 1, 3, 7), bool)
    scores = np.einsum("btnh,bksh->btns", q, k) * 0.3 * np.log2(np.e)
    weight = np.exp2(scores - scores.max(-1, keepdims=True))
    want = np.einsum("btns,bksv->btnv", weight / weight.sum(-1, keepdims=True), v)
    close(attend_partial(*map(jnp.asarray, (q, k, v, mask)), scale=0.3).out, want, F32_OP)
    u = rng.standard_normal(100).astype(np.float32)
    close(jax.nn.silu(2 * u), u * (np.tanh(u) + 1), F32_OP)
