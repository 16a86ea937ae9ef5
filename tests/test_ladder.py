"""Ladder blocks (arXiv 2501.06589): every sub-module's output joins the stream one sub-module late."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import cache, layers, model, stacking
from kvattn.config import CacheConfig, MaskConfig, validate
from kvattn.errors import UserError
from kvattn.formats import huggingface
from tests.helpers import oracles, tiny
from tests.helpers.models import LENGTH, lively, run, tokens_of
from tests.helpers.tolerances import EXACT, F32_DECODE, F32_GRAD, F32_MODEL, close

CASES = {
    "gqa": tiny.config(residual="ladder"),
    "one_layer": tiny.config(residual="ladder", n_layers=1),
    "cla2_biases": tiny.config(
        residual="ladder",
        kv_source=(0, 0, 2, 2),
        kv_norm=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        norm="layernorm",
    ),
    "both_norms": tiny.config(residual="ladder", norm_placement="both", mlp="gelu", tied_embeddings=False),
    "post_norm": tiny.config(residual="ladder", norm_placement="post", n_layers=3),
    "window": tiny.config(residual="ladder", masks=(MaskConfig(window=5, sinks=2),)),
}


def loop_logits(params, cfg, tokens):
    """x_i = x_0 + sum of y_j over j <= i - 2 for sub-modules i = 0 .. 2L-1, attention and MLP in turn; the output is
    x_0 + the sum of all y_j. float64, every x_i summed anew from its equation."""
    p, length = oracles.numpy_tree(params), len(tokens)
    start, outputs, shared = p["embed"]["table"][tokens] * cfg.embed_scale, [], {}
    normed = lambda block, name, x: oracles.norm(block[name], cfg, x) if name in block else x  # noqa: E731
    for i in range(2 * cfg.n_layers):
        layer, block = i // 2, p["layers"][i // 2]
        x = start.copy()
        for j in range(2 * cfg.n_layers):
            if j <= i - 2:
                x = x + outputs[j]
        if i % 2 == 0:
            h, owner = normed(block, "attn_norm", x), cfg.sources[layer]
            h_kv = normed(block, "kv_norm", x) if "kv_norm" in block else h
            q, shared[owner] = oracles._project(block["attn"], cfg, layer, h, h_kv, shared.get(owner), range(length))
            heads, mask = cfg.attention(layer), cfg.mask(layer)
            scale = heads.attn_scale or heads.head_dim**-0.5
            context = oracles.attention(q, *shared[owner], mask, scale, heads.attn_soft_cap, [0] * length)
            y = np.einsum("tnv,nvd->td", context, block["attn"]["o"]) + block["attn"].get("o_bias", 0)
            outputs.append(normed(block, "attn_post_norm", y))
        else:
            y = oracles._mlp(block["mlp"], cfg, normed(block, "mlp_norm", x))
            outputs.append(normed(block, "mlp_post_norm", y))
    x = oracles.norm(p["final_norm"], cfg, start + sum(outputs))
    return x @ (p["embed"]["table"].T if cfg.tied_embeddings else p["unembed"]["table"])


@pytest.mark.parametrize("name", sorted(CASES))
def test_forward_equals_the_float64_loop(name):
    cfg = CASES[name]
    validate(cfg)
    params, tokens = lively(cfg), tokens_of(cfg)
    got = run(params, cfg, tokens)
    for row in range(2):
        close(got[row], loop_logits(params, cfg, tokens[row]), F32_MODEL, name)


def test_the_loop_is_not_the_serial_block():
    """The oracle can fail: with everything else equal, serial and parallel blocks give other logits."""
    cfg = CASES["gqa"]
    params, tokens = lively(cfg), tokens_of(cfg, rows=1)
    want = loop_logits(params, cfg, tokens[0])
    for residual in ("serial", "parallel_neox"):
        other = run(params, dataclasses.replace(cfg, residual=residual), tokens)[0]
        assert np.abs(np.asarray(other) - want).max() > 1e-2


def test_one_layer_mlp_reads_the_embedding():
    """L = 1: the MLP's input is exactly x_0, so that attention reaches the logits only by its own term."""
    cfg = CASES["one_layer"]
    params, tokens = lively(cfg), jnp.asarray(tokens_of(cfg))
    block = params["layers"][0]
    start = layers.embed(params, cfg, tokens)
    mlp = layers.mlp(block["mlp"], cfg, layers.norm(block["mlp_norm"], cfg, start))
    out, _ = model.forward(params, cfg, model.Inputs(tokens), collect=("attention",))
    x = layers.norm(params["final_norm"], cfg, start + out.collected["attention"][0] + mlp)
    close(out.logits, model.unembed(params, cfg, x), F32_MODEL)


def test_silent_late_outputs_make_ladder_and_serial_agree():
    """Of two layers only attention_0 and MLP_1 speak: MLP_1 sees attention_0 in both, two sub-modules later."""
    cfg = tiny.config(residual="ladder", n_layers=2)
    params, tokens = lively(cfg), tokens_of(cfg)
    first, second = params["layers"]
    mute = lambda block, part, w: {**block, part: {**block[part], w: jnp.zeros_like(block[part][w])}}  # noqa: E731
    quiet = {**params, "layers": (mute(first, "mlp", "down"), mute(second, "attn", "o"))}
    close(run(quiet, cfg, tokens), run(quiet, dataclasses.replace(cfg, residual="serial"), tokens), F32_MODEL)


@pytest.mark.parametrize("name", ["gqa", "cla2_biases", "window"])
@pytest.mark.parametrize("at", [1, 7])
def test_prefill_and_decode_equal_the_full_forward(name, at):
    cfg = CASES[name]
    params, tokens = lively(cfg), jnp.asarray(tokens_of(cfg))
    want = run(params, cfg, tokens)
    caches = cache.create(cfg, CacheConfig(kinds=("by_mask",)), 2, LENGTH + 2)
    forward = jax.jit(model.forward, static_argnums=1)
    out, caches = forward(params, cfg, model.Inputs(tokens[:, :at], empty=True), caches=caches)
    parts = [out.logits]
    for t in range(at, LENGTH):
        inputs = model.Inputs(tokens[:, t : t + 1], jnp.full((2, 1), t, jnp.int32))
        out, caches = forward(params, cfg, inputs, caches=caches)
        parts.append(out.logits)
    close(jnp.concatenate(parts, 1), want, F32_DECODE, name)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_scan_equals_loop(remat):
    cfg = tiny.config(residual="ladder", remat=remat)
    params, tokens = lively(cfg), jnp.asarray(tokens_of(cfg))
    scanned = dataclasses.replace(cfg, scan_layers=True)
    stacked = stacking.stack_layers(params, scanned)
    close(run(stacked, scanned, tokens), run(params, cfg, tokens), F32_MODEL)

    def loss(params, cfg):
        return jnp.square(model.forward(params, cfg, model.Inputs(tokens))[0].logits).mean()

    one, other = jax.grad(loss)(params, cfg), jax.grad(loss)(stacked, scanned)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(stacking.unstack_layers(other, scanned)), strict=True):
        close(b, a, F32_GRAD)


def test_the_residual_decides_no_parameter():
    """A ladder loads a serial model's weights: the same leaves and shapes."""
    one, other = (model.param_specs(tiny.config(residual=r)) for r in ("ladder", "serial"))
    assert one == other
    close(
        model.init(jax.random.key(1), CASES["gqa"])["layers"][1]["mlp"]["up"],
        model.init(jax.random.key(1), tiny.BASE)["layers"][1]["mlp"]["up"],
        EXACT,
    )


def test_export_to_hugging_face_is_refused_with_the_reason(tmp_path):
    cfg = tiny.config(residual="ladder", v_head_dim=10)
    params = model.init(jax.random.key(0), cfg)
    with pytest.raises(UserError, match="model.residual is 'ladder', which no Hugging Face architecture"):
        huggingface.write(tmp_path / "out", cfg, params)
    assert not list(tmp_path.iterdir())
