"""int8 weights: what rounding may lose, that every matmul understands them, and that they run in any layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from kvattn import cache, layers, model
from kvattn import int8_weights as weights
from kvattn.config import CacheConfig
from kvattn.decode import partitioned as sharded
from kvattn.errors import UserError
from kvattn.int8_weights import Int8
from sharding.layout.apply import matmul, multiply, take_rows
from tests.helpers import tiny
from tests.helpers.models import lively, run, tokens_of
from tests.helpers.tolerances import EXACT, F32_MODEL, F32_OP, F32_SHARDED, close

# Of each matmul weight, the dims that the matmul sums over: its channels are the others.
INNER = {
    "q": (0,),
    "k": (0,),
    "v": (0,),
    "o": (0, 1),
    "gate": (0,),
    "up": (0,),
    "down": (0,),
    "embed": (1,),
    "unembed": (0,),
}
MODELS = ("gqa", "neox", "palm", "llama", "tied_kv", "cla2_norm", "biases")


def is_int8(leaf):
    return isinstance(leaf, Int8)


def by_name(params):
    """{path: leaf}, an Int8 being one leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_int8)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def inner(path):
    """Summed dims of the weight at `path`, by its last names; None for a norm or a bias."""
    *_, parent, name = path.split(".")
    return INNER.get(parent if name == "table" else name)


def step(w, dims):
    """What one int8 step is worth in every channel of w, as an array that broadcasts with w."""
    return np.abs(np.asarray(w, np.float32)).max(dims, keepdims=True) / 127


def dequantized(params):
    """Plain arrays; an embedding table is scaled per row."""
    flipped = {**params, "embed": {"table": params["embed"]["table"].T}}
    whole = jax.tree.map(lambda w: w.dequantize() if is_int8(w) else w, flipped, is_leaf=is_int8)
    return {**whole, "embed": {"table": whole["embed"]["table"].T}}


# --- rounding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_matmul_weight_is_off_by_at_most_half_a_step(name):
    """Each in its own channel's steps; norms and biases are the very arrays they were."""
    cfg = tiny.CASES[name]
    params = lively(cfg)
    before, after = by_name(params), by_name(weights.quantize(params, cfg))
    exact = by_name(dequantized(weights.quantize(params, cfg)))
    assert before.keys() == after.keys()
    for path, w in before.items():
        dims = inner(path)
        if dims is None:
            assert after[path] is w, path
            continue
        one = step(w, dims)
        close(after[path].scale, one.squeeze(dims), F32_OP, path)
        assert after[path].values.dtype == jnp.int8
        error = np.abs(np.asarray(exact[path]) - np.asarray(w)) / one
        assert error.max() <= 0.5 + F32_OP.atol, f"{path} is off by {error.max()} steps"
        assert error.max() > 0.4, f"{path} has thousands of entries, some near the middle of a step"
        assert (np.abs(np.asarray(after[path].values)).max(dims) == 127).all(), path


def test_bfloat16_weights_keep_bfloat16_scales():
    """Half a step of the scale as it is stored, which has 8 bits."""
    cfg = tiny.CASES["gqa"]
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), lively(cfg))
    for path, got in by_name(weights.quantize(params, cfg)).items():
        if is_int8(got):
            assert got.scale.dtype == jnp.bfloat16
            dims = inner(path)
            scale = np.expand_dims(np.asarray(got.scale, np.float32), dims)
            off = np.asarray(got.values, np.float32) * scale - np.asarray(by_name(params)[path], np.float32)
            assert (np.abs(off) <= 0.5 * scale).all(), path


def test_what_int8_can_say_comes_back_exactly(rng):
    """Whole multiples, up to 127, of a power of two per channel; a channel of zeros stays zero."""
    cfg = tiny.CASES["llama"]

    def representable(path, w):
        dims = inner(path)
        if dims is None:
            return w
        values = rng.integers(-127, 128, w.shape)
        values[tuple(0 if d in dims else slice(None) for d in range(w.ndim))] = 127  # the first of each channel
        channels = [1 if d in dims else n for d, n in enumerate(w.shape)]
        scale = 2.0 ** rng.integers(-9, 4, channels)
        scale.ravel()[3] = 0
        return jnp.asarray(values * scale, jnp.float32)

    params = jax.tree_util.tree_map_with_path(
        lambda p, w: representable(jax.tree_util.keystr(p, simple=True, separator="."), w), lively(cfg)
    )
    small = weights.quantize(params, cfg)
    assert all((w.scale > 0).all() for w in jax.tree.leaves(small, is_leaf=is_int8) if is_int8(w))
    back = dequantized(small)
    for (path, want), got in zip(by_name(params).items(), jax.tree.leaves(back), strict=True):
        close(got, want, EXACT, path)


def test_stacked_layers_and_unknown_kinds_are_refused():
    cfg = tiny.CASES["scan"]
    with pytest.raises(UserError, match="scan_layers is True; quantize the unstacked weights"):
        weights.quantize(model.init(jax.random.key(0), cfg), cfg)
    with pytest.raises(UserError, match="weights is 'int4'; choose one of float32, bfloat16, int8"):
        weights.abstract(cfg, "int4")


@pytest.mark.parametrize("name", ("scan", *MODELS))
def test_abstract_weights_are_those_of_quantize(name):
    """Shapes and dtypes of a bfloat16 checkpoint quantized, its layers in a loop."""
    cfg = tiny.config() if name == "scan" else tiny.CASES[name]
    params = jax.eval_shape(lambda: weights.quantize(model.init(jax.random.key(0), cfg, jnp.bfloat16), cfg))
    got = weights.abstract(tiny.CASES[name], "int8")
    assert jax.tree.structure(got) == jax.tree.structure(params)
    for path, want in by_name(params).items():
        for one, other in zip(jax.tree.leaves(by_name(got)[path]), jax.tree.leaves(want), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype), path


# --- matmuls and lookups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, shape", [(1, (12, 20)), (1, (12, 4, 6)), (2, (4, 3, 20))])
def test_scaling_the_product_is_multiplying_by_the_scaled_weight(rng, count, shape):
    """One or two dims in, one or two out, as a flat matmul and as a general one."""
    w = Int8(
        jnp.asarray(rng.integers(-127, 128, shape), jnp.int8),
        jnp.asarray(rng.uniform(0.001, 0.03, shape[count:]), jnp.float32),
    )
    x = jnp.asarray(rng.normal(size=(2, 5, *shape[:count])), jnp.float32)
    want = np.tensordot(np.asarray(x, np.float64), np.asarray(w.values) * np.asarray(w.scale, np.float64), count)
    for flat in (False, True):
        close(multiply(x, w, count, flat), want, F32_OP, f"flat {flat}")
    names = (None,) * (2 + count)
    close(matmul(x, w, (None,) * len(shape), names, (None,) * want.ndim), want, F32_OP, "matmul")
    close(w.dequantize(), np.asarray(w.values) * np.asarray(w.scale), F32_OP, "dequantize")


def test_activations_stay_bfloat16(rng):
    w = Int8(jnp.ones((12, 20), jnp.int8), jnp.full(20, 0.5, jnp.bfloat16))
    x = jnp.ones((1, 2, 12), jnp.bfloat16)
    assert multiply(x, w).dtype == jnp.bfloat16 and multiply(x, w, out_dtype=jnp.float32).dtype == jnp.float32
    close(multiply(x, w), np.full((1, 2, 20), 6.0, np.float32), EXACT, "bfloat16")


def test_embedding_rows_and_tied_logits_share_one_scaled_table():
    """Row w's scale multiplies the looked-up row, and the logit of word w."""
    cfg = tiny.config()
    params = weights.quantize(lively(cfg), cfg)
    assert params["embed"]["table"].scale.shape == (cfg.vocab_size,)
    table = np.asarray(dequantized(params)["embed"]["table"])
    tokens = jnp.asarray(tokens_of(cfg))
    rows = take_rows(params["embed"]["table"], tokens, (None, None, None))
    close(rows, table[np.asarray(tokens)], F32_OP, "rows")
    close(layers.unembed(params, cfg, rows), table[np.asarray(tokens)] @ table.T, F32_MODEL, "tied logits")


@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_model_is_the_model_of_its_dequantized_weights(name):
    """With the scales applied to products instead of weights; and it is not the unquantized model."""
    cfg = tiny.CASES[name]
    params = lively(cfg)
    small, tokens = weights.quantize(params, cfg), tokens_of(cfg)
    got, want = run(small, cfg, tokens), run(dequantized(small), cfg, tokens)
    close(got, want, F32_MODEL, name)
    assert np.abs(np.asarray(got) - np.asarray(run(params, cfg, tokens))).max() > F32_MODEL.atol


# --- sharded -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight_rows():
    """(config, int8 weights, tokens[8,6], logits of the last token unsharded)."""
    cfg = tiny.config(vocab_size=64, d_model=48, n_heads=8, n_k_heads=4, n_v_heads=4, d_ff=40, n_layers=2)
    params = weights.quantize(lively(cfg), cfg)
    tokens = tokens_of(cfg, rows=8, length=6)
    return cfg, params, tokens, run(params, cfg, tokens)[:, -1]


@pytest.mark.parametrize(
    "layout, overlap",
    [("ws_2d/by_head:z+by_batch:xy", "none"), ("wg_xyz/by_batch:xyz", "two_way"), ("ws_1d/by_batch:x", "compiler")],
)
def test_sharded_int8_is_unsharded_int8(eight_rows, layout, overlap):
    """A prefill of 6 tokens on 8 fake chips; gathered weights travel as int8."""
    cfg, params, tokens, want = eight_rows
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(AxisType.Auto,) * 3)
    p = sharded.build(
        cfg,
        CacheConfig(),
        layout,
        mesh,
        phase="prefill",
        batch=8,
        context=16,
        tokens=6,
        weights="int8",
        overlap=overlap,
    )
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), (8, 6))
    args = (params, tokens, positions, cache.create(cfg, CacheConfig(), 8, 16))
    placed = jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), args, p.args)
    close(jax.jit(p.fn)(*placed)[0], want, F32_SHARDED, f"{layout} {overlap}")
    if layout.startswith("wg"):
        assert ":i8[" in "".join(
            line.split("=")[0] for line in str(jax.make_jaxpr(p.fn)(*placed)).splitlines() if "ppermute" in line
        )
