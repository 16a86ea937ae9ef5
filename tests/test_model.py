"""The decoder against a float64 loop oracle, and the identities between its variants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import config, model, spec, stacking
from kvattn.config import MaskConfig
from kvattn.errors import UserError
from tests.helpers import oracles, tiny
from tests.helpers.models import LENGTH, lively, run, tokens_of
from tests.helpers.tolerances import EXACT, F32_GRAD, F32_MODEL, close

LOOPED = {name: cfg for name, cfg in tiny.CASES.items() if not cfg.scan_layers}


@pytest.mark.parametrize("name", sorted(LOOPED))
def test_forward_equals_the_float64_loop(name):
    cfg = LOOPED[name]
    params, tokens = lively(cfg), tokens_of(cfg)
    got = run(params, cfg, tokens)
    for row in range(2):
        close(got[row], oracles.logits(params, cfg, tokens[row]), F32_MODEL, name)


def test_packed_segments_equal_separate_rows():
    cfg = tiny.CASES["pattern"]
    params, tokens = lively(cfg), tokens_of(cfg, rows=1)
    segments = np.array([[0] * 5 + [1] * 8], np.int32)
    positions = np.array([[*range(5), *range(8)]], np.int32)
    got = run(params, cfg, tokens, segment_ids=jnp.asarray(segments), positions=jnp.asarray(positions))
    close(got[:, :5], run(params, cfg, tokens[:, :5]), F32_MODEL)
    close(got[:, 5:], run(params, cfg, tokens[:, 5:]), F32_MODEL)


@pytest.mark.parametrize("name", ["gqa", "mqa_cla2_pattern", "tied_kv"])
def test_left_padding_changes_nothing(name):
    cfg = tiny.CASES[name]
    params, tokens = lively(cfg), tokens_of(cfg)
    padded = np.concatenate([np.full((2, 3), 7, np.int32), tokens], 1)
    positions = np.concatenate([np.full((2, 3), -1), np.tile(np.arange(LENGTH), (2, 1))], 1).astype(np.int32)
    got = run(params, cfg, padded, positions=jnp.asarray(positions))
    close(got[:, 3:], run(params, cfg, tokens), F32_MODEL)


@pytest.mark.parametrize("name", ["gqa", "first_half", "window_sinks", "gemma2", "neox"])
def test_causality_by_gradients(name):
    """d logits[t] / d embedding[s] is zero exactly where no path of visible keys leads from s to t."""
    cfg = tiny.CASES[name]
    params, tokens = lively(cfg), tokens_of(cfg, rows=1, length=9)

    def at(embedded, t):
        table = params["embed"]["table"]
        bumped = {**params, "embed": {"table": jnp.concatenate([table, embedded])}}
        big = dataclasses.replace(cfg, vocab_size=cfg.vocab_size + 9)
        ids = cfg.vocab_size + jnp.arange(9, dtype=jnp.int32)[None, :]
        return model.forward(bumped, big, model.Inputs(ids))[0].logits[0, t, : cfg.vocab_size].sum()

    embedded = params["embed"]["table"][tokens[0]]
    for t in (0, 4, 8):
        flow = np.abs(np.asarray(jax.grad(at)(embedded, t))).sum(-1)
        assert (flow[t + 1 :] == 0).all()
        assert flow[t] > 0 and flow[0] > 0


def test_mha_with_equal_heads_is_mqa():
    mqa, mha = tiny.CASES["mqa"], tiny.CASES["mha"]
    params, tokens = lively(mqa), tokens_of(mqa)
    wide = {
        **params,
        "layers": tuple(
            {**b, "attn": {**b["attn"], "k": jnp.repeat(b["attn"]["k"], 6, 1), "v": jnp.repeat(b["attn"]["v"], 6, 1)}}
            for b in params["layers"]
        ),
    }
    close(run(wide, mha, tokens), run(params, mqa, tokens), F32_MODEL)


def test_halved_k_heads_duplicated_are_equal():
    """DiffQKV oracle: K heads duplicated up to another K head count give the same output."""
    cfg = tiny.CASES["uneven_kv"]
    params, tokens = lively(cfg), tokens_of(cfg)
    wide = {
        **params,
        "layers": tuple({**b, "attn": {**b["attn"], "k": jnp.repeat(b["attn"]["k"], 3, 1)}} for b in params["layers"]),
    }
    close(run(wide, cfg.replace(n_k_heads=6), tokens), run(params, cfg, tokens), F32_MODEL)


def test_sqa_is_gqa_with_silent_query_heads():
    """SQA oracle: dropping query heads whose W_O rows are zero changes nothing (grouping kept)."""
    cfg = tiny.CASES["gqa"]
    params, tokens = lively(cfg), tokens_of(cfg)
    keep = np.array([0, 2, 4])
    silent = {
        **params,
        "layers": tuple(
            {**b, "attn": {**b["attn"], "o": b["attn"]["o"].at[np.array([1, 3, 5])].set(0.0)}} for b in params["layers"]
        ),
    }
    fewer = {
        **params,
        "layers": tuple(
            {**b, "attn": {**b["attn"], "q": b["attn"]["q"][:, keep], "o": b["attn"]["o"][keep]}}
            for b in params["layers"]
        ),
    }
    close(run(fewer, cfg.replace(n_heads=3), tokens), run(silent, cfg, tokens), F32_MODEL)


def test_identity_sharing_is_the_base_model():
    cfg = tiny.CASES["gqa"]
    params, tokens = lively(cfg), tokens_of(cfg)
    close(run(params, dataclasses.replace(cfg, kv_source=(0, 1, 2, 3)), tokens), run(params, cfg, tokens), EXACT)


def test_wide_window_is_causal():
    cfg = tiny.CASES["gqa"]
    params, tokens = lively(cfg), tokens_of(cfg)
    wide = cfg.replace(masks=(MaskConfig(window=LENGTH),))
    close(run(params, wide, tokens), run(params, cfg, tokens), EXACT)
    narrow = cfg.replace(masks=(MaskConfig(window=LENGTH - 1),))
    changed = np.abs(np.asarray(run(params, narrow, tokens) - run(params, cfg, tokens))).max((0, 2))
    assert changed[: LENGTH - 1].max() == 0 and changed[LENGTH - 1] > 0


@pytest.mark.parametrize("name", ["gqa", "cla2_norm", "gemma2", "rope_pattern"])
def test_scan_equals_loop(name):
    cfg = tiny.CASES[name]
    scanned = dataclasses.replace(cfg, scan_layers=True)
    params, tokens = lively(cfg), tokens_of(cfg)
    stacked = stacking.stack_layers(params, scanned)
    close(run(stacked, scanned, tokens), run(params, cfg, tokens), F32_MODEL)
    back = stacking.unstack_layers(stacked, scanned)
    jax.tree.map(lambda a, b: close(a, b, EXACT), back, params)
    shapes = jax.tree.map(lambda x: x.shape, stacked)
    assert shapes == jax.tree.map(lambda s: s.shape, spec.abstract(model.param_specs(scanned)))


def test_scan_refuses_sharing_across_the_depth():
    with pytest.raises(UserError, match="scan_layers"):
        config.validate(tiny.config(kv_source=(0, 1, 1, 1), scan_layers=True))


@pytest.mark.parametrize("name", ["cla2", "window_sinks"])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(name, remat):
    cfg = tiny.CASES[name]
    params, tokens = lively(cfg), tokens_of(cfg)

    def loss(p, cfg):
        return jnp.square(model.forward(p, cfg, model.Inputs(jnp.asarray(tokens)))[0].logits).mean()

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    want, got = grad(params, cfg), grad(params, dataclasses.replace(cfg, remat=remat))
    jax.tree.map(lambda a, b: close(a, b, F32_GRAD), got, want)


def test_owner_gradient_sums_over_its_readers():
    """CLA oracle: the owner's W_K gradient is the sum over the group of the gradient through each reader alone."""
    cfg = tiny.config(n_layers=2, kv_source=(0, 0))
    params, tokens = lively(cfg), tokens_of(cfg)
    apart = dataclasses.replace(cfg, kv_source=())

    def split(k0, k1):
        """Both layers own K: layer 1's K weights act on layer 0's input, as in sharing."""
        block0, block1 = params["layers"]
        shared = {**params, "layers": ({**block0, "attn": {**block0["attn"], "k": k0}}, block1)}
        other = {**params, "layers": ({**block0, "attn": {**block0["attn"], "k": k1}}, block1)}
        return shared, other

    from kvattn import layers as lay

    def loss(k0, k1):
        shared, other = split(k0, k1)
        x = lay.embed(params, cfg, jnp.asarray(tokens))
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
        this = model.Pass(model.where_of(cfg, positions, None, False))
        _, view_other, _, _ = model._block(other["layers"][0], cfg, 0, x, this, None, None)
        x, _, _, _ = model._block(shared["layers"][0], cfg, 0, x, this, None, None)
        x, _, _, _ = model._block(shared["layers"][1], cfg, 1, x, this, None, view_other)
        return jnp.square(x).mean()

    k = params["layers"][0]["attn"]["k"]
    first, second = jax.grad(loss, (0, 1))(k, k)
    together = jax.grad(lambda k: loss(k, k))(k)
    close(first + second, together, F32_GRAD)
    assert np.abs(np.asarray(first)).max() > 0 and np.abs(np.asarray(second)).max() > 0
    assert "k" not in params["layers"][1]["attn"] and "k" in model.param_specs(apart)["layers"][1]["attn"]


def test_init_is_stable_under_other_parameters():
    """A parameter's key comes from its path: biases and norms added elsewhere change no other parameter."""
    a = model.init(jax.random.key(0), tiny.CASES["gqa"])
    b = model.init(jax.random.key(0), tiny.config(qkv_bias=True, qk_norm="head"))
    close(a["layers"][2]["attn"]["k"], b["layers"][2]["attn"]["k"], EXACT)
    assert np.abs(np.asarray(a["layers"][2]["attn"]["k"] - a["layers"][1]["attn"]["k"])).max() > 0


def test_bad_calls_raise():
    cfg = tiny.CASES["gqa"]
    params = model.init(jax.random.key(0), cfg)
    tokens = jnp.zeros((1, 3), jnp.int32)
    from kvattn import cache
    from kvattn.config import CacheConfig

    caches = cache.create(cfg, CacheConfig(), 1, 5)
    with pytest.raises(UserError, match="segment_ids"):
        model.forward(params, cfg, model.Inputs(tokens, segment_ids=tokens), caches=caches)
    with pytest.raises(UserError, match="collect"):
        model.forward(params, cfg, model.Inputs(tokens), collect=("atention",))
    scanned = tiny.CASES["scan"]
    with pytest.raises(UserError, match="scan_layers"):
        cache.create(scanned, CacheConfig(), 1, 5)


def test_collected_attention_is_what_enters_the_residual():
    cfg = tiny.CASES["gemma2"]
    params, tokens = lively(cfg), tokens_of(cfg)
    out, _ = model.forward(params, cfg, model.Inputs(jnp.asarray(tokens)), collect=("attention",))
    assert len(out.collected["attention"]) == cfg.n_layers
    silent = {
        **params,
        "layers": tuple(
            {**b, "attn_post_norm": {"scale": jnp.full_like(b["attn_post_norm"]["scale"], -1.0)}}
            for b in params["layers"]
        ),
    }
    out, _ = model.forward(silent, cfg, model.Inputs(jnp.asarray(tokens)), collect=("attention",))
    assert all(np.abs(np.asarray(a)).max() == 0 for a in out.collected["attention"])
