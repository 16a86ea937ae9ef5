"""The acid test of axis A: a family that nobody has heard of (tests/helpers/foreign.py) passes what the built-in ones
pass, through public API alone."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import cache, config, model, stacking
from kvattn.attention import Heads, gate, target
from kvattn.cache import LeafSpec
from kvattn.config import Attention, CacheConfig, Layer, ModelConfig
from kvattn.errors import UserError
from tests.helpers import foreign, oracles, tiny
from tests.helpers.foreign import Foreign, model_of
from tests.helpers.models import lively, tokens_of
from tests.helpers.splits import chunked, every_split, forward, repeated, whole
from tests.helpers.tolerances import CODES_STEP, EXACT, F32_DECODE, F32_GRAD, F32_MODEL, INT8_CACHE, apart, close

LENGTH = 11
HEADS = tiny.BASE.attention(0)
MODELS = {
    "foreign": model_of(Foreign(), n_layers=2),
    "windowed": model_of(Foreign(), masks=(tiny.SINKS,), n_layers=2),
    "two_families": model_of(Foreign(), HEADS, n_layers=2),
    "shared": model_of(Foreign(), n_layers=2, kv_source=(0, 0), kv_norm=True),
}
STORES = {
    "full": CacheConfig(),
    "by_mask": CacheConfig(("by_mask",)),
    "paged": CacheConfig(("paged",), page_size=16),
    "lanes": CacheConfig(layout="lanes"),
    "kept": CacheConfig(("kept",)),
    "kept_pages": CacheConfig(("kept",), kept_pages=True, page_size=16),
    "int8": CacheConfig(dtype="int8"),
    "int8_lanes_by_mask": CacheConfig(("by_mask",), dtype="int8", layout="lanes"),
}


@functools.cache
def _case(name):
    cfg = MODELS[name]
    cfg.check()
    params, row = lively(cfg), tokens_of(cfg, rows=1, length=LENGTH)
    return cfg, params, repeated(row), np.repeat(whole(params, cfg, row), LENGTH, 0)


@pytest.mark.parametrize("name", MODELS)
def test_the_forward_pass_equals_a_float64_loop(name):
    cfg, params, tokens, got = _case(name)
    close(got[0], oracles.logits(params, cfg, tokens[0], families={"test_foreign": foreign.oracle}), F32_MODEL)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("store", STORES)
def test_prefill_then_decode_equals_forward_at_every_split(name, store):
    cfg, params, tokens, want = _case(name)
    got, caches = every_split(params, cfg, STORES[store], tokens)
    if STORES[store].dtype == "int8":
        assert CODES_STEP.rtol < apart(got, want) < INT8_CACHE.rtol
    else:
        close(got, want, F32_DECODE)
    assert set(caches[0].leaves) == {"zeta"} and set(caches[0].state) == {"omega"}
    ring = name == "windowed" and "by_mask" in store
    assert caches[0].slots == (7 if ring else 16 if "page" in store else LENGTH + 3)


@pytest.mark.parametrize(
    "name,store", [("foreign", "full"), ("windowed", "by_mask"), ("two_families", "paged"), ("shared", "kept")]
)
@pytest.mark.parametrize("chunk,pad", [(1, 3), (4, 3), (5, 0)])
def test_chunks_and_left_padding(name, store, chunk, pad):
    cfg, params, tokens, want = _case(name)
    close(chunked(params, cfg, STORES[store], tokens[:2], chunk, pad), want[:2], F32_DECODE)


@pytest.mark.parametrize("name", ["foreign", "two_families", "shared"])
def test_scan_equals_loop(name):
    cfg = dataclasses.replace(MODELS[name], n_layers=4, kv_source=(0, 0, 2, 2) if name == "shared" else ())
    params, tokens = lively(cfg), tokens_of(cfg, rows=2, length=LENGTH)
    scanned = dataclasses.replace(cfg, scan_layers=True)
    scanned.check()
    close(whole(stacking.stack_layers(params, cfg), scanned, tokens), whole(params, cfg, tokens), F32_MODEL)


@pytest.mark.parametrize("name,store", [("foreign", "full"), ("windowed", "by_mask"), ("shared", "paged")])
def test_gradients_through_the_absorbed_form_equal_those_of_the_expanded(name, store):
    cfg, params, tokens, _ = _case(name)
    tokens = jnp.asarray(tokens[:2])
    weigh = jax.random.normal(jax.random.key(2), (2, LENGTH, cfg.vocab_size))
    empty = model.create_caches(cfg, STORES[store], 2, LENGTH)

    def expanded(params):
        return (model.forward(params, cfg, model.Inputs(tokens))[0].logits * weigh).sum()

    def absorbed(params):
        first, caches = model.forward(params, cfg, model.Inputs(tokens[:, :4], empty=True), caches=empty)
        at = jnp.broadcast_to(jnp.arange(4, LENGTH, dtype=jnp.int32)[None, :], (2, LENGTH - 4))
        rest, _ = model.forward(params, cfg, model.Inputs(tokens[:, 4:], at), caches=caches)
        return (jnp.concatenate([first.logits, rest.logits], 1) * weigh).sum()

    want, got = (jax.jit(jax.grad(f))(params) for f in (expanded, absorbed))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True):
        size = float(jnp.abs(a).max())
        assert size > 0, path
        close(b / size, a / size, F32_GRAD, str(path))


def test_gradients_against_finite_differences():
    """Along a random direction of all parameters, by the float64 loop."""
    cfg, params, tokens, _ = _case("shared")
    way = jax.tree.map(lambda x, k: jax.random.normal(jax.random.key(k), x.shape), params, _numbered(params))

    def loss(params):
        return jnp.square(model.forward(params, cfg, model.Inputs(jnp.asarray(tokens[:1])))[0].logits).mean()

    def exact(step):
        moved = jax.tree.map(lambda p, w: np.float64(p) + step * np.float64(w), params, way)
        return np.square(oracles.logits(moved, cfg, tokens[0], families={"test_foreign": foreign.oracle})).mean()

    grads, size = jax.jit(jax.grad(loss))(params), 1e-5
    got = sum(jnp.vdot(g, w) for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(way), strict=True))
    close(got, (exact(size) - exact(-size)) / (2 * size), F32_GRAD)


def _numbered(tree):
    leaves, shape = jax.tree.flatten(tree)
    return jax.tree.unflatten(shape, list(range(len(leaves))))


def test_the_state_passes_padding_untouched():
    cfg, params, tokens, _ = _case("foreign")
    caches = model.create_caches(cfg, CacheConfig(), 2, LENGTH)
    _, caches = forward(params, cfg, model.Inputs(jnp.asarray(tokens[:2, :5]), empty=True), caches=caches)
    nothing = model.Inputs(jnp.asarray(tokens[:2, :3]), jnp.full((2, 3), -1, jnp.int32))
    _, after = forward(params, cfg, nothing, caches=caches)
    close(after[0].state["omega"], caches[0].state["omega"], EXACT)
    assert (np.abs(np.asarray(caches[0].state["omega"])) > 0).all()


@pytest.mark.parametrize(
    "name,store", [("foreign", "full"), ("windowed", "by_mask"), ("two_families", "paged"), ("shared", "kept_pages")]
)
def test_a_pass_that_commits_nothing_and_its_commit(name, store):
    """Rings, pages, kept tokens and the state go on as if only what was accepted had been fed."""
    cfg, params, tokens, _ = _case(name)
    caches = model.create_caches(cfg, STORES[store], 2, LENGTH)
    _, caches = forward(params, cfg, model.Inputs(jnp.asarray(tokens[:2, :4]), empty=True), caches=caches)
    at = jnp.broadcast_to(jnp.arange(4, 8, dtype=jnp.int32)[None, :], (2, 4))
    part = jnp.asarray(tokens[:2, 4:8])
    seen, same = forward(params, cfg, model.Inputs(part, at, commit=False), caches=caches)
    jax.tree.map(lambda a, b: close(a, b, EXACT), same, caches)
    accepted = jnp.array([1, 3], jnp.int32)
    got = jax.jit(model.commit, static_argnums=1)(params, cfg, caches, seen.pending, at, accepted)
    only = model.Inputs(part, jnp.where(at - 4 < accepted[:, None], at, -1))
    fed, want = forward(params, cfg, only, caches=caches)
    close(seen.logits[1, :3], fed.logits[1, :3], F32_DECODE)
    jax.tree.map(lambda a, b: close(a, b, F32_DECODE), got, want)
    with pytest.raises(UserError, match="a state .omega. holds no earlier one"):
        cache.truncate(got, accepted)


def test_bytes_are_what_the_leaves_say():
    cfg = MODELS["two_families"]
    caches = model.create_caches(cfg, CacheConfig(dtype="bfloat16"), 3, 20)
    zeta, omega, heads = 20 * 15 * 2, 3 * 4, 20 * 3 * (10 + 14) * 2
    assert cache.nbytes(caches) == 3 * (zeta + omega + heads)
    assert [spec and set(spec) for spec in model.leaves(cfg)] == [{"zeta", "omega"}, {"k", "v"}]


@pytest.mark.parametrize("name", MODELS)
def test_configs_pass_the_door_both_ways(name):
    cfg = MODELS[name]
    assert config.from_config_dict(config.to_config_dict(cfg), ModelConfig) == cfg
    assert config.from_config_dict(json.loads(json.dumps(config.plain(cfg))), ModelConfig) == cfg
    written = config.to_config_dict(cfg)
    written.latent = 9
    changed = config.from_config_dict(written, ModelConfig)
    assert all(a.latent == 9 for a in (changed.attention(i) for i in range(2)) if isinstance(a, Foreign))


def test_an_unknown_family_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"attention.name is 'test_foreing' \(nearest valid: test_foreign\)"):
        Attention.of("test_foreing")
    with pytest.raises(
        UserError, match="attention.latents has no meaning for name 'test_foreign', which reads n_heads"
    ):
        Attention.of("test_foreign", latents=3)
    bad = dataclasses.replace(MODELS["foreign"], layers=(Layer(Foreign(decay=1.5)),))
    with pytest.raises(UserError, match=r"model.layers\[0\].decay is 1.5"):
        bad.check()
    mixed = dataclasses.replace(MODELS["two_families"], kv_source=(0, 0))
    with pytest.raises(UserError, match="give both one family"):
        mixed.check()


@pytest.mark.parametrize(
    "fields,words",
    [
        (dict(shape=(2, 3), axes=("cache_heads", "cache_dimm")), "leaf.axes has 'cache_dimm'; choose from cache_heads"),
        (dict(shape=(2, 3), role="keys"), "leaf.role is 'keys'; choose one of key, value, both, state"),
        (dict(shape=(2, 3), per="row"), "leaf.per is 'row'; choose one of token, sequence"),
        (dict(shape=(2,)), "name each dim once"),
        (dict(shape=(2, 3), per="sequence"), "role is state where, and only where, per is sequence"),
        (dict(shape=(2, 3), role="state"), "role is state where, and only where, per is sequence"),
        (dict(shape=(2, 3, 4), axes=(None,) * 3), r"per token it is \(heads, dim\)"),
        (dict(shape=(0, 3)), "every dim must be positive"),
    ],
)
def test_a_leaf_of_an_unknown_axis_role_or_per_raises(fields, words):
    with pytest.raises(UserError, match=words):
        LeafSpec(**fields)


def test_a_decode_kernel_reads_the_latent_as_key_and_value():
    """A wide latent along lanes, absorbed queries, in the TPU interpreter, pages too."""
    wide = Foreign(n_heads=4, latent=120, rotary=8)
    cfg = model_of(wide, n_layers=2)
    params, tokens = lively(cfg), tokens_of(cfg, rows=2, length=8)
    for store in (
        CacheConfig(multiple=128),
        CacheConfig(("paged",), page_size=128),
        CacheConfig(("kept",), multiple=128),
    ):

        def decoded(cfg, store=store):
            caches = model.create_caches(cfg, store, 2, 100)
            _, caches = model.forward(params, cfg, model.Inputs(jnp.asarray(tokens[:, :5]), empty=True), caches=caches)
            at = jnp.broadcast_to(jnp.arange(5, 8, dtype=jnp.int32)[None, :], (2, 3))
            return model.forward(params, cfg, model.Inputs(jnp.asarray(tokens[:, 5:]), at), caches=caches)[0].logits

        want = decoded(cfg)
        with target.of("tpu", interpret=True):
            got = decoded(dataclasses.replace(cfg, decode_kernel="mosaic_tpu"))
        close(got, want, F32_DECODE)
    narrow = dataclasses.replace(MODELS["foreign"], decode_kernel="mosaic_tpu")
    with pytest.raises(UserError, match="rows of 15 do not fill a TPU's 128 lanes"):
        gate(narrow, CacheConfig(multiple=128), 100)
    assert isinstance(HEADS, Heads)
