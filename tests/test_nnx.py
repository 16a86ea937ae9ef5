"""The Flax door: module == function, value and gradient, for every tiny model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from kvattn import cache, model
from kvattn import nnx as door
from kvattn.config import CacheConfig
from kvattn.errors import UserError
from tests.helpers import tiny
from tests.helpers.tolerances import EXACT, F32_DECODE, F32_GRAD, F32_MODEL, close


def tokens_of(cfg, length=7, rows=2, seed=1):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, cfg.vocab_size)


def nll(logits, tokens):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def losses_of(cfg, tokens):
    """(loss of a module, loss of a tree), each with the logits beside it."""

    def module_loss(m):
        logits = m(tokens)
        return nll(logits, tokens), logits

    def function_loss(p):
        logits = model.forward(p, cfg, model.Inputs(tokens))[0].logits
        return nll(logits, tokens), logits

    return module_loss, function_loss


def plain(state):
    """A state of nnx as the tree of kvattn: the list of layers is a tuple again."""
    tree = nnx.to_pure_dict(state)
    return {**tree, "layers": tuple(tree["layers"][l] for l in sorted(tree["layers"]))}


def test_decoder_is_the_function(tiny_case):
    """For every tiny model the module and the function are one program, loss, logits and every gradient: the
    same jaxpr, hence the same numbers."""
    _, cfg = tiny_case
    module_loss, function_loss = losses_of(cfg, tokens_of(cfg))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), cfg))

    def through_nnx(p):
        value, grads = nnx.value_and_grad(module_loss, has_aux=True)(door.Decoder.from_params(cfg, p))
        return value, plain(grads)

    got, got_shape = jax.make_jaxpr(through_nnx, return_shape=True)(params)
    want, want_shape = jax.make_jaxpr(jax.value_and_grad(function_loss, has_aux=True), return_shape=True)(params)
    assert jax.tree.structure(got_shape) == jax.tree.structure(want_shape)
    assert str(got) == str(want)
    assert "dot_general" in str(got)


@pytest.mark.parametrize("name", ["cla2_norm", "neox"])
def test_decoder_is_the_function_in_numbers(name):
    """What the jaxprs say, run: nnx.jit(nnx.value_and_grad) of the module against jax.jit of the function."""
    cfg = tiny.CASES[name]
    decoder = door.Decoder(cfg, rngs=nnx.Rngs(0))
    module_loss, function_loss = losses_of(cfg, tokens_of(cfg))
    (loss, logits), grads = nnx.jit(nnx.value_and_grad(module_loss, has_aux=True))(decoder)
    params = decoder.to_params()
    (want_loss, want), want_grads = jax.jit(jax.value_and_grad(function_loss, has_aux=True))(params)
    close(logits, want, F32_MODEL)
    close(loss, want_loss, F32_MODEL)
    jax.tree.map(lambda a, b: close(a, b, F32_GRAD), plain(grads), want_grads)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(plain(grads)) if g.ndim > 1)


def test_state_mirrors_the_tree(tiny_case):
    _, cfg = tiny_case
    decoder = nnx.eval_shape(lambda: door.Decoder(cfg, rngs=nnx.Rngs(0)))
    state = plain(nnx.state(decoder, nnx.Param))
    want = jax.tree.map(lambda s: s.shape, model.param_specs(cfg), is_leaf=lambda s: hasattr(s, "axes"))
    assert jax.tree.map(lambda x: x.shape, state) == want
    assert not jax.tree.leaves(nnx.state(decoder, nnx.Not(nnx.Param)))


def test_adopted_parameters_are_the_same_arrays():
    cfg = tiny.CASES["cla2_norm"]
    params = model.init(jax.random.key(4), cfg)
    back = door.Decoder.from_params(cfg, params).to_params()
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params)))


@pytest.mark.parametrize("name", ["uneven_kv", "tied_kv", "mqa_cla2_pattern"])
def test_decoder_decodes_in_place(name):
    """prefill + decode_step == the full forward; under nnx.jit with donation the caches are aliased."""
    cfg = tiny.CASES[name]
    decoder = door.Decoder(cfg, rngs=nnx.Rngs(2))
    tokens, split = tokens_of(cfg, 9), 5
    full = nnx.jit(lambda m, tokens: m(tokens))(decoder, tokens)
    caches = decoder.init_cache(2, 9, CacheConfig(kinds=("by_mask",)))
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32)[None], (2, 9))
    prefill = nnx.jit(lambda m, t, p, caches: m.prefill(t, p, caches))
    logits, caches = prefill(decoder, tokens[:, :split], positions[:, :split], caches)
    close(logits, full[:, split - 1], F32_DECODE)

    step = nnx.jit(lambda m, t, p, caches: m.decode_step(t, p, caches), donate_argnames="caches")
    for t in range(split, 9):
        old = caches
        logits, caches = step(decoder, tokens[:, t], positions[:, t], caches)
        close(logits, full[:, t], F32_DECODE, f"position {t}")
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))


def test_decoder_trains_with_nnx_optimizer():
    cfg = tiny.CASES["mqa_cla2"]
    decoder = door.Decoder(cfg, rngs=nnx.Rngs(3))
    optimizer = nnx.Optimizer(decoder, optax.adam(1e-2), wrt=nnx.Param)
    tokens = tokens_of(cfg, 13)

    @nnx.jit
    def step(decoder, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: nll(m(tokens), tokens))(decoder)
        optimizer.update(decoder, grads)
        return loss

    with jax.numpy_dtype_promotion("standard"):  # optax's bias correction raises a float to an int power
        losses = [float(step(decoder, optimizer)) for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]


# --- one layer -----------------------------------------------------------------------------------------


def test_layers_of_attention_modules_are_the_model():
    """A decoder's blocks rebuilt by hand around Attention modules, K and V handed from owner to reader: what a
    Flax user writes is the model, with packed segments, then with caches."""
    cfg = tiny.config(kv_source=(0, 0, 2, 2), kv_norm=True, masks=(tiny.SINKS, tiny.WINDOW))
    params = model.init(jax.random.key(5), cfg)
    for l in cfg.owners:  # away from 1, where all norms are the same norm
        params["layers"][l]["kv_norm"]["scale"] = jnp.linspace(0.2, 2.0, 28)
    attention = [door.Attention.from_params(cfg, l, params["layers"][l]["attn"]) for l in range(4)]
    tokens = tokens_of(cfg, 9)

    def forward(positions, tokens, segment_ids=None, caches=None):
        x = model.layers.embed(params, cfg, tokens)
        views, caches = {}, list(caches or [None] * 4)
        for l, block in enumerate(params["layers"]):
            norm = model.layers.norm
            owner = cfg.sources[l]
            h_kv = norm(block["kv_norm"], cfg, x) if "kv_norm" in block else None
            y, views[owner], cache_l = attention[l].attend(
                norm(block["attn_norm"], cfg, x),
                x_kv=h_kv,
                positions=positions,
                segment_ids=segment_ids,
                kv=views.get(owner),
                cache=caches[l],
            )
            if owner == l:
                caches[l] = cache_l
            x = x + y
            x = x + model.layers.mlp(block["mlp"], cfg, norm(block["mlp_norm"], cfg, x))
        return model.unembed(params, cfg, norm(params["final_norm"], cfg, x)), caches

    segments = jnp.asarray([[1] * 4 + [2] * 5, [1] * 9], jnp.int32)
    positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3, 4], list(range(9))], jnp.int32)
    want = model.forward(params, cfg, model.Inputs(tokens, positions, segments))[0].logits
    forward = jax.jit(forward)
    close(forward(positions, tokens, segments)[0], want, F32_MODEL)

    store = CacheConfig(kinds=("ring",))
    caches = [attention[l].init_cache(2, 9, store) if cfg.sources[l] == l else None for l in range(4)]
    positions = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32)[None], (2, 9))
    want = model.forward(params, cfg, model.Inputs(tokens))[0].logits
    for t in range(9):
        logits, caches = forward(positions[:, t : t + 1], tokens[:, t : t + 1], caches=caches)
        close(logits[:, 0], want[:, t], F32_DECODE, f"position {t}")
    assert cache.nbytes(caches) == cache.nbytes(cache.create(cfg, store, 2, 9))


def test_attention_inside_a_flax_model():
    """One module in somebody else's block: causal, its gradients reach every projection."""
    cfg = tiny.CASES["uneven_kv"]

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm, self.attention = nnx.RMSNorm(cfg.d_model, rngs=rngs), door.Attention(cfg, rngs=rngs)

        def __call__(self, x):
            return x + self.attention(self.norm(x))

    block = Block(nnx.Rngs(7))
    x = jax.random.normal(jax.random.key(8), (2, 7, 28))
    grads = nnx.jit(nnx.grad(lambda m: jnp.square(m(x)).sum()))(block)
    assert sorted(nnx.to_pure_dict(grads)["attention"]) == ["k", "o", "q", "v"]
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(nnx.to_pure_dict(grads)))
    run = nnx.jit(lambda m, x: m(x))
    before, after = run(block, x), run(block, x.at[:, 4].add(1.0))
    close(after[:, :4], before[:, :4], EXACT)
    assert np.all(np.abs(after[:, 4:] - before[:, 4:]).max(-1) > 1e-4)


BAD = {
    "neither": (lambda p: door.Decoder(tiny.BASE), ("neither", "rngs")),
    "both": (lambda p: door.Attention(tiny.BASE, rngs=nnx.Rngs(0), params=p["layers"][0]["attn"]), ("both",)),
    "another config": (lambda p: door.Decoder.from_params(tiny.CASES["mqa"], p), ("['k']", "(28, 3, 10)")),
    "a missing leaf": (lambda p: door.Decoder.from_params(tiny.CASES["llama"], p), ("unembed", "missing")),
    "layer": (lambda p: door.Attention(tiny.BASE, 4, rngs=nnx.Rngs(0)), ("layer", "4", "0..3")),
    "illegal": (lambda p: door.Decoder(tiny.config(n_k_heads=4), rngs=nnx.Rngs(0)), ("n_k_heads", "4")),
    "no kv": (lambda p: reader()(jnp.zeros((1, 3, 28))), ("layer 1", "layer 0", "kv")),
    "kv to an owner": (lambda p: owner()(jnp.zeros((1, 3, 28)), kv=()), ("layer 0", "kv")),
    "cache of a reader": (lambda p: reader().init_cache(1, 5), ("layer 1", "layer 0")),
    "cache to a reader": (
        lambda p: reader().attend(jnp.zeros((1, 3, 28)), kv=(), cache=owner().init_cache(1, 5)),
        ("layer 1", "cache"),
    ),
    "segments": (
        lambda p: owner().attend(
            jnp.zeros((1, 3, 28)), segment_ids=jnp.ones((1, 3), jnp.int32), cache=owner().init_cache(1, 5)
        ),
        ("segment_ids", "cache"),
    ),
}


def owner():
    return door.Attention(tiny.CASES["cla2"], 0, rngs=nnx.Rngs(0))


def reader():
    return door.Attention(tiny.CASES["cla2"], 1, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", BAD)
def test_bad_use_is_one_sentence(name):
    call, words = BAD[name]
    with pytest.raises(UserError) as caught:
        call(model.init(jax.random.key(0), tiny.BASE))
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
