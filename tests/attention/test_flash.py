"""Kernels of others for training and prefill, against the reference: values and gradients, masks, padding, segments.

splash runs in the Pallas interpreter; cuDNN's call is checked through jax's own XLA implementation of the same
function (cuDNN itself does not lower without its library); tokamax is called where it is installed.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import config, model
from kvattn.attention import core, flash, gate, target
from kvattn.attention.heads import heads_model
from kvattn.attention.operand import Operand
from kvattn.config import MaskConfig
from kvattn.errors import UserError
from kvattn.masks import Tokens, as_keys, from_config
from pallas_kernels import Leaf
from sharding.compiler.aot import Compiler
from tests.helpers import tiny
from tests.helpers.models import lively, tokens_of
from tests.helpers.tolerances import F32_GRAD, F32_OP, F32_SHARDED, KERNEL_F16, close

B, T = 3, 37


@pytest.fixture(scope="module")
def compiler():
    with Compiler(200) as child:
        yield child


LAYOUTS = {
    "whole": np.tile(np.arange(T), (B, 1)),
    "left_padded": np.stack([np.arange(T) - pad for pad in (0, 5, 36)]),
    "right_padded": np.stack([np.where(np.arange(T) < n, np.arange(T), -1) for n in (T, 5, 1)]),
}


def _case(cfg, layout="whole", segments=False, dtype=jnp.float32):
    rng = np.random.default_rng(7)
    at = np.maximum(LAYOUTS[layout], -1).astype(np.int32)
    ids = None
    if segments:
        ids = np.stack([np.searchsorted(cuts, np.arange(T), side="right") for cuts in ([9], [5, 20], [30])])
        at = np.stack([np.arange(T) - np.searchsorted(row, row) for row in ids]).astype(np.int32)
        ids = jnp.asarray(ids, jnp.int32)
    tokens = Tokens(jnp.asarray(at), ids)
    s = cfg.attention(0).softmax(cfg)
    shapes = (B, T, s.heads, s.key_dim), (B, s.k_heads, T, s.key_dim), (B, s.v_heads, T, s.value_dim)
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    mask = from_config(cfg.mask(0))(tokens, as_keys(tokens))
    return q, k, v, tokens, mask, np.asarray(at >= 0)


def _operand(cfg, q, k, v, mask, tokens):
    shape = cfg.attention(0).softmax(cfg)
    return Operand(q, Leaf(k), Leaf(v), shape.scale, shape.cap, mask=mask, tokens=as_keys(tokens), own=True)


def _compare(run, cfg, q, k, v, tokens, mask, live, value=F32_OP, gradient=F32_GRAD):
    """Values and gradients of real tokens."""
    shape = cfg.attention(0).softmax(cfg)
    weight = np.random.default_rng(8).normal(size=q.shape[:3] + v.shape[3:]) * live[..., None, None]
    weight = jnp.asarray(weight, jnp.float32)

    def theirs(q, k, v):
        return run(tokens, _operand(cfg, q, k, v, mask, tokens), cfg.mask(0)).astype(jnp.float32)

    def ours(q, k, v):
        return core.attend_partial(q, k, v, mask, scale=shape.scale, cap=shape.cap).out

    loss = lambda f: jax.jit(jax.value_and_grad(lambda *x: (f(*x) * weight).sum(), (0, 1, 2)))  # noqa: E731
    close(np.asarray(theirs(q, k, v))[live], np.asarray(ours(q, k, v))[live], value, "out")
    for got, want, what in zip(loss(theirs)(q, k, v)[1], loss(ours)(q, k, v)[1], "qkv", strict=True):
        close(got, want, gradient, f"gradient of {what}")


# --- splash ---------------------------------------------------------------------------------------------

SPLASH = {
    "gqa": (tiny.config(), {}),
    "mqa": (tiny.config(n_k_heads=1, n_v_heads=1), {}),
    "window": (tiny.config(masks=(MaskConfig(window=5),)), {}),
    "soft_cap": (tiny.config(attn_soft_cap=2.0), {}),
    "segments": (tiny.config(), {"segments": True}),
    "segments_window_cap": (tiny.config(masks=(MaskConfig(window=5),), attn_soft_cap=2.0), {"segments": True}),
    "left_padded": (tiny.config(masks=(MaskConfig(window=5),)), {"layout": "left_padded"}),
    "right_padded": (tiny.config(), {"layout": "right_padded"}),
}


@pytest.mark.parametrize("name", SPLASH)
def test_splash_equals_the_reference(name):
    cfg, how = SPLASH[name]
    with target.of("tpu", interpret=True):
        _compare(flash.splash, cfg, *_case(cfg, **how))


def test_splash_in_a_model_equals_xla():
    """The config's kernel reaches every layer: logits and parameter gradients."""
    cfg = tiny.config(kernel="splash", n_layers=2)
    xla = tiny.config(n_layers=2)
    params, inputs = lively(xla), model.Inputs(jnp.asarray(tokens_of(xla, rows=2, length=9)))
    loss = lambda cfg: lambda p: (model.forward(p, cfg, inputs)[0].logits ** 2).mean()  # noqa: E731
    want = jax.jit(jax.value_and_grad(loss(xla)))(params)
    with target.of("tpu", interpret=True):
        got = jax.jit(jax.value_and_grad(loss(cfg)))(params)
        assert "pallas_call" in str(jax.make_jaxpr(loss(cfg))(params))
    jax.tree.map(functools.partial(close, tolerance=F32_GRAD), got, want)


def test_splash_on_a_sharded_mesh_equals_one_device(devices):
    """Batch over data and fsdp, heads over tensor: each chip runs the kernel on its own part."""
    from sharding import RULES, make_mesh, use_rules

    cfg = tiny.config(n_layers=2, n_heads=4, n_k_heads=2, n_v_heads=2, d_model=32, d_ff=36, vocab_size=60)
    params, inputs = lively(cfg), model.Inputs(jnp.asarray(tokens_of(cfg, rows=4, length=9)))
    want = jax.jit(lambda p: model.forward(p, cfg, inputs)[0].logits)(params)
    mesh = make_mesh(config.MeshConfig(2, 2, 2), devices)
    with target.of("tpu", interpret=True), jax.set_mesh(mesh), use_rules(mesh, RULES["fsdp_tp"]):
        fast = tiny.config(
            n_layers=2, n_heads=4, n_k_heads=2, n_v_heads=2, d_model=32, d_ff=36, vocab_size=60, kernel="splash"
        )
        got = jax.jit(lambda p: model.forward(p, fast, inputs)[0].logits)(params)
    close(got, want, F32_SHARDED, "logits")


@pytest.mark.parametrize(
    "where,mesh", [("v5e:1x1", (1, 1, 1)), ("v6e:1x1", (1, 1, 1)), ("v5p:1x1x1", (1, 1, 1)), ("tpu7x:1x1x1", (2, 1, 1))]
)
def test_splash_and_its_gradient_compile_for_every_tpu(compiler, where, mesh):
    """Training shapes, at the block sizes that flash.py takes; scores are never held."""
    length, shapes = 4096, {"v5e:1x1": (4, 4, 64, 1024), "v6e:1x1": (4, 1, 256, 0)}
    heads, k_heads, dim, window = shapes.get(where, (8, 2, 128, 0))
    shape = dict(n_heads=heads, n_k_heads=k_heads, n_v_heads=k_heads, head_dim=dim, v_head_dim=dim)
    fields = config.plain(heads_model(masks=(MaskConfig(window=window),), **shape))
    report = compiler.compile(
        "tests.helpers.aot_targets:splash_gradient", dict(model=fields, length=length), where, mesh
    )
    assert hasattr(report, "memory"), report.reason
    assert report.memory.temporaries < 2 * heads * length * length  # bytes: half of the scores in float32
    assert report.cycles["kernel"] > 0


# --- cuDNN ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [0, 5])
def test_cudnn_is_asked_for_the_right_thing(monkeypatch, layout, window):
    """The same call through jax's XLA implementation gives the reference's numbers, padding on either side."""
    ask = jax.nn.dot_product_attention

    def in_xla(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        out = ask(*(x.astype(jnp.float32) for x in args), **kwargs, implementation="xla")
        return out.astype(args[0].dtype)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_xla)
    cfg = tiny.config(head_dim=16, v_head_dim=16, kernel="cudnn", masks=(MaskConfig(window=window),))
    with target.of("gpu"):
        _compare(flash.cudnn, cfg, *_case(cfg, layout, dtype=jnp.float16), value=KERNEL_F16, gradient=KERNEL_F16)


# --- tokamax --------------------------------------------------------------------------------------------


def test_tokamax_equals_the_reference_or_says_it_is_missing():
    cfg = tiny.config(masks=(MaskConfig(window=5, sinks=2),), attn_soft_cap=2.0)
    case = _case(cfg, "left_padded")
    if importlib.util.find_spec("tokamax"):
        _compare(flash.tokamax, cfg, *case)
    else:
        with pytest.raises(UserError, match="model.kernel is 'tokamax', which is not installed"):
            _compare(flash.tokamax, cfg, *case)


# --- what cannot be served ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kernel,change,reason",
    [
        ("splash", dict(n_k_heads=2, n_v_heads=6), "K and V of equal heads"),
        ("splash", dict(masks=(MaskConfig(window=5, sinks=1),)), "attention-sink tokens"),
        ("tokamax", dict(n_k_heads=2, n_v_heads=6), "K and V of equal heads"),
        ("cudnn", dict(attn_soft_cap=1.0, v_head_dim=10), "soft cap"),
    ],
)
def test_supports_gives_the_reason(kernel, change, reason):
    with pytest.raises(UserError, match=f"model.kernel is '{kernel}', which cannot serve this model: .*{reason}"):
        gate(tiny.config(kernel=kernel, **change))


@pytest.mark.parametrize("kernel,platform", [("splash", "tpu"), ("cudnn", "gpu")])
def test_off_its_platform_a_kernel_raises(kernel, platform):
    cfg = tiny.config(head_dim=16, v_head_dim=16, kernel=kernel)
    q, k, v, tokens, mask, _ = _case(cfg)
    with pytest.raises(UserError, match=f"model.kernel is '{kernel}', a kernel for {platform}, and this is a cpu"):
        getattr(flash, kernel)(tokens, _operand(cfg, q, k, v, mask, tokens), cfg.mask(0))


def test_cudnn_takes_no_packed_segments():
    cfg = tiny.config(head_dim=16, v_head_dim=16, kernel="cudnn")
    q, k, v, tokens, mask, _ = _case(cfg, segments=True, dtype=jnp.bfloat16)
    with target.of("gpu"), pytest.raises(UserError, match="no packed segments"):
        flash.cudnn(tokens, _operand(cfg, q, k, v, mask, tokens), cfg.mask(0))
