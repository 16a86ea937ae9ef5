"""Layers without attention: no parameters, no cache, nothing added to the stream."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import model, stacking
from kvattn.attention import NoAttention
from kvattn.config import CacheConfig, Layer, RopeConfig
from kvattn.errors import UserError
from tests.helpers import oracles, tiny
from tests.helpers.models import lively, tokens_of
from tests.helpers.splits import every_split, repeated, whole
from tests.helpers.tolerances import F32_DECODE, F32_MODEL, close

LENGTH = 9
LAYERS = (Layer(tiny.BASE.attention(0), rope=RopeConfig(theta=100.0)), Layer(NoAttention()))
CFG = tiny.config(layers=LAYERS)


@pytest.mark.parametrize("residual", ["serial", "parallel_palm", "parallel_neox", "ladder"])
@pytest.mark.parametrize("kind", ["full", "kept"])
def test_prefill_then_decode_equals_forward_at_every_split(residual, kind):
    cfg = dataclasses.replace(CFG, residual=residual)
    params, row = lively(cfg), tokens_of(cfg, rows=1, length=LENGTH)
    want = whole(params, cfg, row)
    if residual == "serial":
        close(want[0], oracles.logits(params, cfg, row[0]), F32_MODEL)
    got, caches = every_split(params, cfg, CacheConfig((kind,)), repeated(row))
    close(got, np.repeat(want, LENGTH, 0), F32_DECODE)
    assert [c is None for c in caches] == [False, True] * 2


def test_the_layer_has_no_parameters_and_leaves_nothing():
    specs = model.param_specs(CFG)["layers"]
    assert [sorted(s) for s in specs] == [["attn", "attn_norm", "mlp", "mlp_norm"], ["mlp", "mlp_norm"]] * 2
    assert sorted(model.param_specs(dataclasses.replace(CFG, norm_placement="both"))["layers"][1]) == [
        "mlp",
        "mlp_norm",
        "mlp_post_norm",
    ]
    assert [leaves is None for leaves in model.leaves(CFG)] == [False, True] * 2 and CFG.owners == (0, 2)


def test_what_is_collected_of_it_is_nothing():
    params, tokens = lively(CFG), jnp.asarray(tokens_of(CFG, rows=2, length=5))
    seen = model.forward(params, CFG, model.Inputs(tokens), collect=("queries", "attention"))[0].collected
    assert [q is None for q in seen["queries"]] == [False, True] * 2
    assert [float(abs(a).max()) > 0 for a in seen["attention"]] == [True, False] * 2


def test_scan_equals_loop():
    params, tokens = lively(CFG), tokens_of(CFG, rows=2, length=5)
    scanned = dataclasses.replace(CFG, scan_layers=True)
    close(whole(stacking.stack_layers(params, CFG), scanned, tokens), whole(params, CFG, tokens), F32_MODEL)


@pytest.mark.parametrize("layers", [LAYERS, LAYERS[::-1], LAYERS[1:]])
def test_it_neither_reads_nor_is_read(layers):
    with pytest.raises(UserError, match=r"model.kv_source\[1\] is 0, but"):
        tiny.config(layers=layers, kv_source=(0, 0, 2, 2)).check()
