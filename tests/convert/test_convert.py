"""Conversions against NumPy loops and the sheets' identities; exactness is checked by running both models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import account, convert, model
from kvattn.attention import Heads, NoAttention
from kvattn.config import Attention, CacheConfig, Conversion, HeadGroup, MaskConfig, ModelConfig
from kvattn.convert import report
from kvattn.convert.cla import cla_sources
from kvattn.convert.first_half import first_half_sources
from kvattn.convert.mlkv import mlkv_sources
from kvattn.errors import UserError
from tests.helpers import tiny
from tests.helpers.tolerances import EXACT, F32_MODEL, F32_OP, close

RICH = dict(n_k_heads=6, n_v_heads=6, qkv_bias=True, qk_norm="full", tied_embeddings=False)  # every K/V leaf
RNG = jax.random.key(11)


def random_params(cfg: ModelConfig, seed: int = 0, dtype=jnp.float32):
    """Initialised parameters with biases and norm scales away from their start values, all asymmetric."""
    params = model.init(jax.random.key(seed), cfg, dtype)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 100), len(leaves))
    noisy = [x + (0.3 * jax.random.normal(k, x.shape, jnp.float32)).astype(dtype) for x, k in zip(leaves, keys)]
    return jax.tree.unflatten(tree, noisy)


def run(params, cfg, length: int = 9, seed: int = 5):
    tokens = jax.random.randint(jax.random.key(seed), (2, length), 0, cfg.vocab_size)
    return _logits(params, cfg, tokens)


@functools.partial(jax.jit, static_argnames="cfg")
def _logits(params, cfg, tokens):
    return model.forward(params, cfg, model.Inputs(tokens))[0].logits


def assert_fits_its_config(result: convert.Converted):
    """The tree a conversion returns is the tree its config declares: same leaves, same shapes."""
    want = jax.tree.map(lambda s: s.shape, model.param_specs(result.model), is_leaf=lambda s: hasattr(s, "axes"))
    assert jax.tree.map(lambda x: x.shape, result.params) == want


def heads_of(cfg):
    """(K, M), the same in all layers."""
    (pair,) = {(layer.attention.n_k_heads, layer.attention.n_v_heads) for layer in cfg.every}
    return pair


def convert_one(params, cfg, step, rng=None):
    """`convert.convert`, checked against the plan that needs no weights."""
    result = convert.convert(params, cfg, step, convert.Context(rng=rng))
    assert result.model == convert.plan(cfg, (step,))
    return result


# --- GQA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k_heads", "v_heads"), [(3, 3), (2, 2), (1, 1), (2, 3), (6, 1)])
def test_gqa_mean_and_first_are_the_loops(k_heads, v_heads):
    cfg = tiny.config(**RICH)
    params = random_params(cfg)
    for method in ("mean", "first"):
        step = Conversion.of("gqa", k_heads=k_heads, v_heads=v_heads, method=method)
        result = convert_one(params, cfg, step)
        assert heads_of(result.model) == (k_heads, v_heads)
        assert_fits_its_config(result)
        assert not result.exact
        for old, new in zip(params["layers"], result.params["layers"]):
            for leaf, heads, axis in (
                ("k", k_heads, 1),
                ("v", v_heads, 1),
                ("k_bias", k_heads, 0),
                ("v_bias", v_heads, 0),
            ):
                weights = np.moveaxis(np.asarray(old["attn"][leaf], np.float64), axis, 0)
                size = 6 // heads
                for g in range(heads):
                    group = [weights[g * size + j] for j in range(size)]
                    want = sum(group) / size if method == "mean" else group[0]
                    close(np.moveaxis(np.asarray(new["attn"][leaf]), axis, 0)[g], want, F32_OP, f"{leaf}[{g}]")
            scale = np.asarray(old["attn"]["k_norm"]["scale"], np.float64).reshape(k_heads, 6 // k_heads, 10)
            want = scale.mean(1) if method == "mean" else scale[:, 0]
            close(new["attn"]["k_norm"]["scale"], want, F32_OP)
            for leaf in ("q", "o", "q_bias"):
                assert new["attn"][leaf] is old["attn"][leaf]
        assert result.params["embed"] is params["embed"]


def test_gqa_grouping_is_the_one_the_model_reads():
    """Query head n keeps the group its old head went to: repeating heads and pooling them back is exact."""
    small = tiny.config(qkv_bias=True, qk_norm="full", n_k_heads=3, n_v_heads=2)
    params = random_params(small)

    def repeat(layer):
        attn = dict(layer["attn"])
        for leaf, axis, times in (("k", 1, 2), ("v", 1, 3), ("k_bias", 0, 2), ("v_bias", 0, 3)):
            attn[leaf] = jnp.repeat(attn[leaf], times, axis=axis)
        attn["k_norm"] = {"scale": jnp.repeat(attn["k_norm"]["scale"], 2, axis=0)}
        return {**layer, "attn": attn}

    big = small.replace(n_k_heads=6, n_v_heads=6)
    repeated = {**params, "layers": tuple(repeat(layer) for layer in params["layers"])}
    close(run(repeated, big), run(params, small), F32_MODEL, "expansion by repetition")
    for method in ("mean", "first"):
        step = Conversion.of("gqa", k_heads=3, v_heads=2, method=method)
        back = convert_one(repeated, big, step)
        assert back.exact
        close(run(back.params, back.model), run(params, small), F32_MODEL, method)
    redrawn = convert_one(repeated, big, Conversion.of("gqa", k_heads=3, v_heads=2, method="random"), rng=RNG)
    assert not redrawn.exact
    assert float(jnp.abs(run(redrawn.params, redrawn.model) - run(params, small)).max()) > 0.1
    touched = jax.tree.map(lambda x: x, repeated)
    touched["layers"][2]["attn"]["v_bias"] = touched["layers"][2]["attn"]["v_bias"].at[4, 3].add(1e-3)
    assert not convert_one(touched, big, Conversion.of("gqa", k_heads=3, v_heads=2)).exact


def test_gqa_mean_is_linear_and_composes():
    cfg = tiny.config(**RICH)
    one, two = random_params(cfg, 1), random_params(cfg, 2)
    mixed = jax.tree.map(lambda a, b: 0.7 * a - 1.3 * b, one, two)

    def mean(params, cfg, heads):
        return convert_one(params, cfg, Conversion.of("gqa", k_heads=heads))

    want = jax.tree.map(lambda a, b: 0.7 * a - 1.3 * b, mean(one, cfg, 2).params, mean(two, cfg, 2).params)
    jax.tree.map(lambda got, want: close(got, want, F32_OP), mean(mixed, cfg, 2).params, want)
    half = mean(one, cfg, 3)
    twice, once = mean(half.params, half.model, 1), mean(one, cfg, 1)
    assert twice.model == once.model
    jax.tree.map(lambda got, want: close(got, want, F32_OP), twice.params, once.params)


def test_gqa_keeps_the_dtype_and_averages_in_float32():
    cfg = tiny.config(n_k_heads=6, n_v_heads=6)
    params = random_params(cfg, dtype=jnp.bfloat16)
    result = convert_one(params, cfg, Conversion.of("gqa", k_heads=1))
    k = result.params["layers"][0]["attn"]["k"]
    assert k.dtype == jnp.bfloat16
    want = np.asarray(params["layers"][0]["attn"]["k"].astype(jnp.float32)).mean(1, keepdims=True)
    assert np.array_equal(
        np.asarray(k.astype(jnp.float32)), np.asarray(jnp.asarray(want).astype(jnp.bfloat16).astype(jnp.float32))
    )


def test_gqa_random_redraws_only_what_shrinks():
    cfg = tiny.config(**RICH)
    params = random_params(cfg)
    step = Conversion.of("gqa", k_heads=2, v_heads=6, method="random")
    first, again = (convert_one(params, cfg, step, rng=RNG) for _ in range(2))
    other = convert_one(params, cfg, step, rng=jax.random.key(12))
    assert_fits_its_config(first)
    fresh = model.init(RNG, first.model)
    for l in range(cfg.n_layers):
        attn = first.params["layers"][l]["attn"]
        assert attn["v"] is params["layers"][l]["attn"]["v"]
        close(attn["k"], again.params["layers"][l]["attn"]["k"], EXACT)
        close(attn["k"], fresh["layers"][l]["attn"]["k"], EXACT, "drawn as model.init draws it")
        assert float(jnp.abs(attn["k"] - other.params["layers"][l]["attn"]["k"]).max()) > 0.01
    everything = Conversion.of("gqa", k_heads=6, v_heads=6, method="random")
    assert convert_one(params, cfg, everything, rng=RNG).exact


def test_gqa_on_shared_layers_and_tied_values():
    for name in ("cla2_norm", "tied_kv"):
        cfg = tiny.CASES[name]
        result = convert_one(random_params(cfg), cfg, Conversion.of("gqa", k_heads=1))
        assert_fits_its_config(result)
        assert heads_of(result.model) == (1, 1)
        run(result.params, result.model)


# --- sharing across layers -----------------------------------------------------------------------------


def test_owner_rules():
    """The sheets' own examples, then the general counts."""
    assert sorted(set(cla_sources(10, 3))) == [0, 1, 4, 7]
    assert sorted(set(cla_sources(20, 3))) == [0, 2, 5, 8, 11, 14, 17]
    assert cla_sources(6, 2) == (0, 0, 2, 2, 4, 4)
    assert cla_sources(5, 3) == (0, 0, 2, 2, 2)
    assert sorted(set(mlkv_sources(12, 4))) == [0, 3, 6, 9]
    assert first_half_sources(6) == (0, 1, 2, 2, 2, 2)
    assert first_half_sources(5) == (0, 1, 2, 2, 2)
    assert first_half_sources(1) == (0,)
    for n in range(1, 33):
        for f in range(1, n + 1):
            sources = cla_sources(n, f)
            assert len(set(sources)) == -(-n // f)
            if n % f == 0:
                assert sources == tuple(f * (l // f) for l in range(n))
            want = {0} | {int((i + 1) * n / f) for i in range(f - 1)}
            assert set(mlkv_sources(n, f)) == want
            assert all(sources[o] == o and o <= l for l, o in enumerate(sources))


GROUPED = {
    "cla": (Conversion.of("cla", factor=3), (0, 0, 2, 2, 2)),
    "mlkv": (Conversion.of("mlkv", owners=2), (0, 0, 2, 2, 2)),
    "first_half": (Conversion.of("first_half"), (0, 1, 2, 2, 2)),
}


@pytest.mark.parametrize("kind", GROUPED)
def test_owners_weights_by_each_method(kind):
    """Three layers in the last group: mean 1/3 each, running 1/4 1/4 1/2, first 1 0 0."""
    cfg = tiny.config(n_layers=5, kv_norm=True, norm="layernorm", **RICH)
    params = random_params(cfg)
    step, sources = GROUPED[kind]
    shares = {"mean": (1 / 3, 1 / 3, 1 / 3), "running": (1 / 4, 1 / 4, 1 / 2), "first": (1.0, 0.0, 0.0)}
    for method, weights in shares.items():
        result = convert_one(params, cfg, dataclasses.replace(step, method=method))
        assert result.model.sources == sources
        assert not result.exact
        assert_fits_its_config(result)
        old, new = params["layers"], result.params["layers"]

        def kv_path(layer):
            return {**{n: layer["attn"][n] for n in ("k", "v", "k_bias", "v_bias", "k_norm")}, "norm": layer["kv_norm"]}

        members = [jax.tree.leaves(kv_path(old[l])) for l in (2, 3, 4)]
        for got, *leaves in zip(jax.tree.leaves(kv_path(new[2])), *members):
            want = sum(w * np.asarray(x, np.float64) for w, x in zip(weights, leaves))
            close(got, want, F32_OP, method)
        for l in range(5):
            assert new[l]["attn"]["q"] is old[l]["attn"]["q"]
            assert new[l]["mlp"] is old[l]["mlp"]
            assert ("k" in new[l]["attn"]) == (sources[l] == l)
        run(result.params, result.model)


def test_groups_of_one_change_nothing():
    for step in (Conversion.of("cla", factor=1), Conversion.of("mlkv", owners=4)):
        cfg = tiny.config(kv_norm=True)
        params = random_params(cfg)
        result = convert_one(params, cfg, step)
        assert result.exact
        close(run(result.params, result.model), run(params, cfg), EXACT)


def test_mlkv_is_cla_on_mqa():
    """m = L/2, g = 1 is MQA + CLA2, in either order of the two steps' names."""
    cfg = tiny.config(n_k_heads=6, n_v_heads=6, qkv_bias=True)
    params = random_params(cfg)
    one = convert_one(params, cfg, Conversion.of("mlkv", owners=2, k_heads=1))
    steps = (Conversion.of("gqa", k_heads=1), Conversion.of("cla", factor=2))
    two = convert.convert_all(params, cfg, steps)
    assert one.model == two.model
    assert "1 and 1" in one.note
    assert "; " in two.note
    jax.tree.map(lambda a, b: close(a, b, EXACT), one.params, two.params)
    other = convert.convert_all(params, cfg, steps[::-1])
    jax.tree.map(lambda a, b: close(a, b, F32_OP), one.params, other.params)
    first = convert_one(params, cfg, Conversion.of("mlkv", owners=2, k_heads=1, method="first"))
    close(first.params["layers"][2]["attn"]["k"], params["layers"][2]["attn"]["k"][:, :1], EXACT)


def test_exactness_is_what_running_both_models_shows():
    """Identical K/V projections and identical inputs (the first layer of each pair writes nothing) share
    exactly; a difference anywhere on that path ends it, and the claim follows."""
    cfg = tiny.config(qkv_bias=True, o_bias=True, mlp_bias=True)
    params = random_params(cfg)

    def silent(layer):
        attn = {**layer["attn"], "o": 0 * layer["attn"]["o"], "o_bias": 0 * layer["attn"]["o_bias"]}
        mlp = {**layer["mlp"], "down": 0 * layer["mlp"]["down"], "down_bias": 0 * layer["mlp"]["down_bias"]}
        return {**layer, "attn": attn, "mlp": mlp}

    def twin(layer, owner):
        kv = {n: owner["attn"][n] for n in ("k", "v", "k_bias", "v_bias")}
        return {**layer, "attn_norm": owner["attn_norm"], "attn": {**layer["attn"], **kv}}

    a, b, c, d = params["layers"]
    exact = {**params, "layers": (silent(a), twin(b, a), silent(c), twin(d, c))}
    for method in ("mean", "running", "first"):
        result = convert_one(exact, cfg, Conversion.of("cla", factor=2, method=method))
        assert result.exact, method
        close(run(result.params, result.model), run(exact, cfg), F32_MODEL, method)

    def nudged(layer, *path):
        if not path:
            return layer.at[(0,) * layer.ndim].add(0.5)
        return {**layer, path[0]: nudged(layer[path[0]], *path[1:])}

    for index, path in (
        (0, ("attn", "o")),
        (0, ("attn", "o_bias")),
        (0, ("mlp", "down")),
        (0, ("mlp", "down_bias")),
        (1, ("attn", "k")),
        (3, ("attn", "v_bias")),
        (3, ("attn_norm", "scale")),
    ):
        layers = tuple(nudged(layer, *path) if i == index else layer for i, layer in enumerate(exact["layers"]))
        broken = {**exact, "layers": layers}
        result = convert_one(broken, cfg, Conversion.of("cla", factor=2))
        assert not result.exact, path
        assert float(jnp.abs(run(result.params, result.model) - run(broken, cfg)).max()) > 1e-4, path


def test_converted_tiny_models_run(tiny_case):
    """Every tiny model that owns all its K/V converts to CLA2, and the result is the tree its config declares."""
    _, cfg = tiny_case
    params = model.init(RNG, cfg)
    step = Conversion.of("cla", factor=2)
    if cfg.kv_source or cfg.scan_layers or len({layer.rope for layer in cfg.layers}) > 1:
        with pytest.raises(UserError):
            convert.convert(params, cfg, step)
        return
    result = convert.convert(params, cfg, step)
    assert_fits_its_config(result)
    assert account.kv_bytes_per_token(result.model, CacheConfig()) * 2 == account.kv_bytes_per_token(cfg, CacheConfig())


# --- layers that differ ---


def mixed(*attentions, **changes):
    """The tiny model with these families, one after the other."""
    return tiny.config(**changes).replace(attentions=attentions)


WIDE = tiny.BASE.replace(n_k_heads=6, n_v_heads=6).attention(0)
NARROW = tiny.BASE.attention(0)  # 3 key and 3 value heads
FOREIGN = "tests_foreign"


@dataclasses.dataclass(frozen=True)
class Foreign(Heads, tag=FOREIGN):
    """Heads of another name: whoever knows heads alone cannot convert it."""


@dataclasses.dataclass(frozen=True)
class Flat(Heads, tag=f"{FOREIGN}_flat"):
    """A family that says it has no softmax, as linear attention does."""

    def softmax(self, cfg):
        return None


@pytest.fixture(scope="module", autouse=True)
def leave_the_registry_as_it_was():
    yield
    for tag in (FOREIGN, f"{FOREIGN}_flat"):
        Attention.members.pop(tag)


def test_each_layer_is_pooled_from_its_own_heads():
    """6 heads in some layers and 3 in others, all to 3 or to 1; a layer without attention stays."""
    cfg = mixed(WIDE, NARROW, NoAttention(), WIDE)
    params = random_params(cfg)
    three = convert_one(params, cfg, Conversion.of("gqa", k_heads=3))
    assert "3/6 key and 3/6 value heads -> 3 and 3" in three.note
    assert three.params["layers"][1]["attn"]["k"] is params["layers"][1]["attn"]["k"]
    for result in (three, convert_one(params, cfg, Conversion.of("gqa", k_heads=1, method="random"), rng=RNG)):
        assert_fits_its_config(result)
        assert result.model.attention(2) == NoAttention()
        run(result.params, result.model)
    k = np.asarray(params["layers"][3]["attn"]["k"], np.float64)
    close(three.params["layers"][3]["attn"]["k"], k.reshape(28, 3, 2, 10).mean(2), F32_OP)
    fresh = convert_one(params, cfg, Conversion.of("gqa", k_heads=3, method="random"), rng=RNG).params["layers"]
    for leaf in ("k", "v"):
        assert fresh[1]["attn"][leaf] is params["layers"][1]["attn"][leaf], "nothing is drawn where no head is removed"
    close(fresh[3]["attn"]["k"], model.init(RNG, three.model)["layers"][3]["attn"]["k"], EXACT)


def test_a_window_narrows_each_head_group_and_leaves_a_layer_without_attention():
    groups = (HeadGroup(1), HeadGroup(2, MaskConfig(window=3)))
    layer = dataclasses.replace(tiny.BASE.layer(0), groups=groups)
    none = dataclasses.replace(tiny.BASE.layer(0), attention=NoAttention())
    cfg = dataclasses.replace(tiny.BASE, layers=(layer, none))
    result = convert_one(random_params(cfg), cfg, Conversion.of("window", window=5))
    assert [g.mask.window for g in result.model.layer(0).groups] == [5, 3]
    assert result.model.layer(1) == none
    assert "on 2 of 4 layers" in result.note


def test_layers_of_a_foreign_family_share_like_any_other():
    """An owner's K/V parameters are asked of the family; nothing is proved exact of one that is not known."""
    cfg = mixed(Foreign(**dataclasses.asdict(NARROW)), kv_norm=True)
    plain = tiny.config(kv_norm=True)
    params = random_params(cfg)
    step = Conversion.of("cla", factor=2, method="running")
    result = convert_one(params, cfg, step)
    assert_fits_its_config(result)
    jax.tree.map(lambda a, b: close(a, b, EXACT), result.params, convert_one(params, plain, step).params)
    one = convert_one(params, cfg, Conversion.of("cla", factor=1))
    assert one.exact
    silent = jax.tree.map(jnp.zeros_like, params)
    assert convert_one(silent, plain, step).exact
    assert not convert_one(silent, cfg, step).exact


@pytest.mark.parametrize(
    ("step", "attentions", "words"),
    [
        (Conversion.of("gqa", k_heads=1), (NARROW, Foreign()), ("layer 1", FOREIGN, "plain heads")),
        (Conversion.of("mlkv", owners=2, k_heads=1), (NARROW, Foreign()), ("layer 1", FOREIGN)),
        (Conversion.of("gqa", k_heads=6), (WIDE, NARROW), ("layer 1", "'heads'", "3 heads", "1, 3")),
        (Conversion.of("cla", factor=2), (NARROW, WIDE), ("layer 1 ('heads') read layer 0 ('heads')",)),
        (Conversion.of("cla", factor=2), (NARROW, NoAttention()), ("layer 1 ('none')", "leaves nothing")),
        (Conversion.of("first_half"), (NARROW, NoAttention()), ("layer 2 ('heads') read layer 1 ('none')",)),
    ],
)
def test_a_family_that_cannot_be_converted_is_named_with_its_layer(step, attentions, words):
    with pytest.raises(UserError) as caught:
        convert.plan(mixed(*attentions), (step,))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_window_is_refused_where_there_is_no_causal_softmax():
    cfg = tiny.config(masks=(MaskConfig(), MaskConfig(kind="full")))
    with pytest.raises(UserError, match="layer 1 is 'full'"):
        convert.plan(cfg, (Conversion.of("window", window=5),))
    assert convert.plan(cfg, (Conversion.of("window", window=5, keep_every=2),)).mask(1).kind == "full"
    with pytest.raises(UserError, match=rf"layer 1 \('{FOREIGN}_flat'\) has none"):
        convert.plan(mixed(NARROW, Flat(**dataclasses.asdict(NARROW))), (Conversion.of("window", window=5),))


# --- windows -------------------------------------------------------------------------------------------


def test_window_keeps_every_nth_layer():
    cfg = tiny.config(n_layers=7)
    params = random_params(cfg)
    result = convert.convert(params, cfg, Conversion.of("window", window=4, sinks=2, keep_every=3))
    narrow, full = MaskConfig(window=4, sinks=2), MaskConfig()
    assert [result.model.mask(l) for l in range(7)] == [narrow, narrow, full, narrow, narrow, full, narrow]
    assert [layer.mask for layer in result.model.layers] == [narrow, narrow, full]
    assert result.params is params
    assert not result.exact
    assert "5 of 7 layers" in result.note
    assert "up to 6 tokens" in result.note


def test_window_is_exact_up_to_window_plus_sinks_tokens():
    cfg = tiny.config()
    params = random_params(cfg)
    result = convert.convert(params, cfg, Conversion.of("window", window=4, sinks=2))
    assert [layer.mask for layer in result.model.layers] == [MaskConfig(window=4, sinks=2)]
    close(run(params, result.model, length=6), run(params, cfg, length=6), EXACT)
    seen, hidden = run(params, cfg, length=7), run(params, result.model, length=7)
    close(hidden[:, :6], seen[:, :6], F32_MODEL)
    assert float(jnp.abs(hidden[:, 6] - seen[:, 6]).max()) > 1e-3


def test_window_narrows_what_is_windowed():
    wide, narrow, none = MaskConfig(window=9, sinks=1), MaskConfig(window=3), MaskConfig()
    cfg = tiny.config(n_layers=3, masks=(wide, narrow, none))
    params = model.init(RNG, cfg)
    result = convert.convert(params, cfg, Conversion.of("window", window=5, sinks=1))
    assert [result.model.mask(l) for l in range(3)] == [
        MaskConfig(window=5, sinks=1),
        narrow,
        MaskConfig(window=5, sinks=1),
    ]
    again = convert.convert(params, result.model, Conversion.of("window", window=5, sinks=1))
    assert again.exact
    assert again.model == result.model


# --- steps and bad input -------------------------------------------------------------------------------


def test_no_steps():
    params = model.init(RNG, tiny.BASE)
    result = convert.convert_all(params, tiny.BASE, ())
    assert (result.model, result.exact, result.note) == (tiny.BASE, True, "unconverted")
    assert result.params is params


def test_the_registry_has_a_method_a_file():
    """Every conversion registers itself, from a file of its name."""
    for kind in ("gqa", "cla", "mlkv", "first_half", "window"):
        assert Conversion.members[kind].__module__ == f"kvattn.convert.{kind}"


BAD = {
    "kind": ("gqq", dict(), {}, ("conversion.kind", "gqq", "cla")),
    "method": ("gqa", dict(k_heads=1, method="running"), {}, ("method", "running", "random")),
    "ignored": ("cla", dict(factor=2, window=7), {}, ("window", "cla", "factor")),
    "ignored_method": ("window", dict(window=7, method="first"), {}, ("method", "window", "sinks")),
    "no_heads": ("gqa", dict(), {}, ("k_heads", "0")),
    "indivisible": ("gqa", dict(k_heads=2), {}, ("k_heads", "2", "1, 3")),
    "indivisible_v": ("gqa", dict(k_heads=3, v_heads=2), {}, ("v_heads", "2")),
    "no_rng": ("gqa", dict(k_heads=1, method="random"), {}, ("random", "rng")),
    "tied": ("gqa", dict(k_heads=1, v_heads=3), dict(tied_kv=True, v_head_dim=10), ("v_heads", "tied_kv")),
    "factor": ("cla", dict(factor=5), {}, ("factor", "5", "4")),
    "owners": ("mlkv", dict(owners=0), {}, ("owners", "0")),
    "mlkv_v": ("mlkv", dict(owners=2, v_heads=1), {}, ("v_heads", "k_heads")),
    "shared": ("cla", dict(factor=2), dict(kv_source=(0, 0, 2, 2)), ("kv_source", "shares")),
    "ropes": ("cla", dict(factor=2), dict(ropes=(tiny.BASE.rope(0), None)), ("rope",)),
    "scan": ("cla", dict(factor=2), dict(scan_layers=True), ("scan_layers",)),
    "window": ("window", dict(), {}, ("window", "0")),
    "overlap": ("window", dict(window=3, sinks=5), dict(masks=(tiny.SINKS,)), ("convert.window is 3", "layer 0")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_steps_are_one_sentence(name):
    kind, fields, changes, words = BAD[name]
    cfg = tiny.config(**changes)
    with pytest.raises(UserError) as caught:
        convert.convert(model.init(RNG, cfg), cfg, Conversion.of(kind, **fields))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    if name not in ("no_rng", "scan"):  # only weights need those
        with pytest.raises(UserError) as planned:
            convert.plan(cfg, (Conversion.of(kind, **fields),))
        assert str(planned.value) == message


# --- report --------------------------------------------------------------------------------------------


def log_softmax64(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_report_is_the_float64_definition():
    """KL and losses from whole logits in float64; 131 positions, so that a padded second chunk is in play."""
    cfg = tiny.config(n_k_heads=6, n_v_heads=6, tied_embeddings=False)
    params = random_params(cfg)
    before = convert.convert_all(params, cfg, ())
    steps = (Conversion.of("gqa", k_heads=1), Conversion.of("cla", factor=2))
    after = convert.convert_all(params, cfg, steps)
    tokens = jax.random.randint(jax.random.key(8), (2, 131), 0, cfg.vocab_size)
    got = report.measure(before, after, tokens, cache=CacheConfig(dtype="bfloat16"))
    log_b, log_a = (
        log_softmax64(model.forward(m.params, m.model, model.Inputs(tokens))[0].logits) for m in (before, after)
    )
    close(got.kl, (np.exp(log_b) * (log_b - log_a)).sum(-1).mean(), F32_MODEL)
    assert got.kl > 0.05
    rows, cols = np.indices((2, 130))
    next_tokens = np.asarray(tokens)[:, 1:]
    close(got.loss_before, -log_b[rows, cols, next_tokens].mean(), F32_MODEL)
    close(got.loss_after, -log_a[rows, cols, next_tokens].mean(), F32_MODEL)
    assert got.exact is False
    assert got.tokens == 262
    assert got.bytes_per_token_before == 4 * 6 * (10 + 14) * 2
    assert got.bytes_per_token_after == 2 * 1 * (10 + 14) * 2
    assert got.params_before == account.param_count(cfg)
    assert got.params_before - got.params_after == 28 * (10 + 14) * (4 * 6 - 2)
    once = report.reference(before, tokens)
    assert report.measure(before, after, tokens, cache=CacheConfig(dtype="bfloat16"), before_hidden=once) == got


def test_report_of_a_model_with_itself_is_zero():
    cfg = tiny.CASES["soft_caps"]
    same = convert.convert_all(model.init(RNG, cfg), cfg, ())
    got = report.measure(same, same, jnp.arange(10, dtype=jnp.int32)[None])
    assert got.kl == 0
    assert got.loss_before == got.loss_after
    assert got.exact


def test_report_holds_one_pair_of_logit_chunks():
    """1024 positions x 4001 words would be 33 MB for the two models; the compiled comparison takes a chunk."""
    cfg = tiny.config(vocab_size=4001)
    ends = {"embed": {"table": jax.ShapeDtypeStruct((4001, 28), jnp.float32)}}
    hidden = jax.ShapeDtypeStruct((1, 1024, 28), jnp.float32)
    row = jax.ShapeDtypeStruct((1024,), jnp.int32)
    compiled = report._compare.lower(ends, ends, cfg, cfg, hidden, hidden, row).compile()
    pair = 2 * report.CHUNK * 4001 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * pair < 2 * 1024 * 4001 * 4


@pytest.mark.parametrize(
    ("tokens", "other", "words"),
    [
        (jnp.zeros((1, 1), jnp.int32), {}, ("(1, 1)",)),
        (jnp.zeros((5,), jnp.int32), {}, ("(5,)",)),
        (jnp.full((1, 5), 61, jnp.int32), {}, ("61", "0..60")),
        (jnp.zeros((1, 5), jnp.int32), dict(vocab_size=67), ("61", "67")),
    ],
)
def test_report_refuses(tokens, other, words):
    before = convert.convert_all(model.init(RNG, tiny.BASE), tiny.BASE, ())
    cfg = tiny.config(**other)
    after = convert.convert_all(model.init(RNG, cfg), cfg, ())
    with pytest.raises(UserError) as caught:
        report.measure(before, after, tokens)
    assert all(word in str(caught.value) for word in words)
