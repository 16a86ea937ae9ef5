"""The acid test of axis D: a keep-policy and an encoding that nobody has heard of, through public API alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import cache, config, model
from kvattn.cache import Groups, Policy, encode
from kvattn.config import CacheConfig, Encoding
from kvattn.errors import UserError
from pallas_kernels import Leaf
from tests.helpers import oracles, tiny
from tests.helpers.foreign import Foreign, model_of
from tests.helpers.models import lively, tokens_of
from tests.helpers.splits import chunked, every_split, forward, repeated, whole
from tests.helpers.tolerances import F16_CACHE, F32_MODEL, apart, close

LENGTH = 11


@dataclasses.dataclass(frozen=True)
class LargestKeys(Policy, tag="test_largest_keys"):
    """The keys of the largest norm, `share` of the prompt, one more in every later head."""

    share: float = 0.5
    grows: bool = False

    def budget(self, length, site):
        first = max(1, round(self.share * length))
        return tuple(first + head for head in range(site.heads)) if self.grows else first

    def score(self, observed):
        return jnp.square(observed.keys).sum(3)


@dataclasses.dataclass(frozen=True)
class AroundMean(Encoding, tag="test_around_mean"):
    """float16 values less their row's mean, which is the float32 scale."""

    def abstract(self, leaf, rows, slots):
        heads, dim = leaf.shape
        of = jax.ShapeDtypeStruct
        return Leaf(of((rows, heads, slots, dim), jnp.float16), of((rows, heads, slots), jnp.float32))

    def encode(self, x):
        x = x.astype(jnp.float32)
        mean = x.mean(-1)
        return Leaf((x - mean[..., None]).astype(jnp.float16), mean)

    def decode(self, leaf, dtype):
        return (leaf.values.astype(jnp.float32) + leaf.scale[..., None]).astype(dtype)

    def token_bits(self, leaf):
        heads, dim = leaf.shape
        return heads * (16 * dim + 32)


@functools.cache
def _case(name):
    cfg = FAMILIES[name]
    params, row = lively(cfg), tokens_of(cfg, rows=1, length=LENGTH)
    return cfg, params, repeated(row), np.repeat(whole(params, cfg, row), LENGTH, 0)


FAMILIES = {
    "gqa": tiny.config(n_layers=2),
    "uneven_cla2_window": tiny.CASES["uneven_cla2_window"].replace(n_layers=2, kv_source=(0, 0)),
    "tied_kv": tiny.CASES["tied_kv"].replace(n_layers=2),
    "foreign": model_of(Foreign(), n_layers=2),
}
STORES = {
    "full": CacheConfig(encoding=AroundMean()),
    "by_mask": CacheConfig(("by_mask",), encoding=AroundMean()),
    "paged": CacheConfig(("paged",), page_size=16, encoding=AroundMean()),
    "kept": CacheConfig(("kept",), encoding=AroundMean()),
    "kept_pages": CacheConfig(("kept",), kept_pages=True, page_size=16, encoding=AroundMean()),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("store", STORES)
def test_a_foreign_encoding_passes_the_shared_property(name, store):
    cfg, params, tokens, want = _case(name)
    if store.startswith("kept") and name.startswith("uneven"):
        with pytest.raises(UserError, match="unequal heads"):
            model.create_caches(cfg, STORES[store], 2, LENGTH)
        return
    got, caches = every_split(params, cfg, STORES[store], tokens)
    close(got, want, F16_CACHE)
    assert 0 < apart(got, want)
    (leaf, *_) = caches[0].leaves.values()
    assert (leaf.dtype, leaf.scale.dtype) == (jnp.float16, jnp.float32)


@pytest.mark.parametrize("store", ["by_mask", "kept_pages"])
def test_a_foreign_encoding_in_chunks_and_behind_padding(store):
    cfg, params, tokens, want = _case("gqa")
    close(chunked(params, cfg, STORES[store], tokens[:2], 4, 3), want[:2], F16_CACHE)


@pytest.mark.parametrize("name", ["gqa", "foreign"])
def test_bytes_are_the_declared_bits(name):
    cfg, store = FAMILIES[name], STORES["full"]
    caches = model.create_caches(cfg, store, 3, 20)
    leaves = [leaf for layer in model.leaves(cfg) for leaf in layer.values()]
    token = sum(encode.token_bits(store, leaf) for leaf in leaves if leaf.per == "token")
    once = sum(encode.sequence_bits(store, leaf) for leaf in leaves)
    assert token == {"gqa": 2 * 3 * (16 * 24 + 64), "foreign": 2 * (16 * 15 + 32)}[name]
    assert 8 * cache.nbytes(caches) == 3 * (20 * token + once)


@pytest.mark.parametrize("kernel", ["mosaic_tpu", "mosaic_gpu"])
def test_kernels_refuse_a_foreign_encoding(kernel):
    wide = dict(n_heads=4, n_k_heads=2, n_v_heads=2, head_dim=128, v_head_dim=128)
    cfg = tiny.config(**wide, decode_kernel=kernel)
    with pytest.raises(
        UserError, match=r"K is held in an encoding of its own \(AroundMean\(\)\), which no kernel reads"
    ):
        model.create_caches(cfg, CacheConfig(multiple=128, encoding=AroundMean()), 2, 100)


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("encoded", [False, True])
def test_a_foreign_policy_leaves_what_it_says(grows, encoded):
    """The norms and the ranking in NumPy; decoding against a float64 loop that sees only the kept tokens."""
    cfg, params, tokens, _ = _case("gqa")
    policy, prompt = LargestKeys(grows=grows), np.array([7, 4])
    store = CacheConfig(keep=policy, encoding=AroundMean() if encoded else None)
    at = np.where(np.arange(7)[None] < prompt[:, None], np.arange(7)[None], -1).astype(np.int32)
    caches = model.create_caches(cfg, store, 2, LENGTH)
    inputs = model.Inputs(jnp.asarray(tokens[:2, :7]), jnp.asarray(at), empty=True)
    _, caches = forward(params, cfg, inputs, caches=caches)
    settled = cache.settle(cfg, store, caches, room=4, length=7)
    kept = {}
    for layer in range(cfg.n_layers):
        keys = np.asarray(encode.decode(caches[layer].leaves["k"], jnp.float32), np.float64)
        held = np.concatenate(
            [
                np.pad(p.address.held, [(0, 0), (0, 0), (0, 11 - p.slots)], constant_values=-1)
                for p, _ in cache.parts(settled[layer])
            ],
            1,
        )
        for row in range(2):
            for head in range(3):
                norms = (keys[row, head, : prompt[row]] ** 2).sum(-1)
                budget = 4 + head * grows
                kept[layer, row, head] = sorted(np.argsort(-norms)[:budget].tolist())
                assert [p for p in held[row, head] if p >= 0] == kept[layer, row, head]
    assert isinstance(settled[0], Groups) == grows
    assert len({tuple(x) for x in kept.values()}) > 3  # layers and heads choose apart
    got, state = [], settled
    for t in range(4):
        step = model.Inputs(
            jnp.asarray(np.stack([tokens[b, prompt[b] + t] for b in range(2)])[:, None]),
            jnp.asarray(prompt[:, None] + t, jnp.int32),
        )
        out, state = forward(params, cfg, step, caches=state)
        got.append(out.logits)
    got = np.concatenate(got, 1)
    for row in range(2):
        n = prompt[row]

        def seen_by(layer, head, t, s, row=row, n=n):
            return s <= t and (t < n or s >= n or s in kept[layer, row, head])

        want = oracles.logits(params, cfg, tokens[row, : n + 4], seen_by=seen_by)[n:]
        close(got[row], want, F16_CACHE if encoded else F32_MODEL, f"row {row}")


def test_a_foreign_policy_of_a_foreign_family():
    """A latent is one head; its state is settled untouched."""
    cfg, params, tokens, _ = _case("foreign")
    store = CacheConfig(keep=LargestKeys())
    caches = model.create_caches(cfg, store, 2, LENGTH)
    _, caches = forward(params, cfg, model.Inputs(jnp.asarray(tokens[:2, :6]), empty=True), caches=caches)
    settled = cache.settle(cfg, store, caches, room=5, length=6)
    assert settled[0].slots == 3 + 5 and np.asarray(settled[0].address.count).tolist() == [[3], [3]]
    assert (settled[0].state["omega"] == caches[0].state["omega"]).all()
    at = jnp.full((2, 1), 6, jnp.int32)
    out, after = forward(params, cfg, model.Inputs(jnp.asarray(tokens[:2, 6:7]), at), caches=settled)
    assert np.isfinite(np.asarray(out.logits)).all() and np.asarray(after[0].length).tolist() == [7, 7]


def test_foreign_stores_pass_the_door():
    for store in (CacheConfig(keep=LargestKeys(0.25)), CacheConfig(encoding=AroundMean())):
        assert config.from_config_dict(config.to_config_dict(store), CacheConfig) == store
        assert config.from_config_dict(config.plain(store), CacheConfig) == store
    with pytest.raises(UserError, match="cache.encoding is 'test_around_mean' with cache.dtype 'int8'"):
        CacheConfig(dtype="int8", encoding=AroundMean()).check()
