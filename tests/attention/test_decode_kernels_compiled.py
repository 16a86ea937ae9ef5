"""The whole loop over tokens with decode kernels, as the compilers for TPU and H200 make it: every cache byte updated
in place, no copy of a cache, a kernel in every layer."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from kvattn import cache, config, model
from kvattn.attention import target
from kvattn.attention.heads import heads_model
from kvattn.config import CacheConfig
from kvattn.decode import generation as decode
from pallas_kernels import gpu
from sharding.compiler.aot import Compiler
from sharding.compiler.hlo_costs import analyse
from tests.helpers.aot_targets import loop_state

BATCH, CAPACITY = 8, 4096
MODEL = heads_model(
    vocab_size=1024,
    d_model=512,
    n_layers=2,
    n_heads=16,
    n_k_heads=2,
    n_v_heads=2,
    head_dim=128,
    v_head_dim=128,
    d_ff=1024,
)
BF16 = dict(dtype="bfloat16", multiple=128)
TPU = {
    "bf16": BF16,
    "lanes": {**BF16, "layout": "lanes"},
    "int8": {**BF16, "dtype": "int8"},
    "int8_lanes": {**BF16, "dtype": "int8", "layout": "lanes"},
    "paged": dict(kinds=("paged",), page_size=128, dtype="bfloat16"),
    "paged_int8": dict(kinds=("paged",), page_size=128, dtype="int8"),
}
GPU = {
    "bf16": BF16,
    "int8": {**BF16, "dtype": "int8", "layout": "v_lanes"},
    "int4": {**BF16, "dtype": "int4", "layout": "v_lanes"},
    "paged": dict(kinds=("paged",), page_size=64, dtype="bfloat16"),
    "paged_int8": dict(kinds=("paged",), page_size=64, dtype="int8", layout="v_lanes"),
}
GENERATIONS = ("v5e:1x1", "v6e:1x1", "v5p:1x1x1")


def held(kernel, store):
    """(model, abstract caches, bytes of K and V, of the smallest leaf's values)."""
    cfg = MODEL.replace(decode_kernel=kernel)
    caches = cache.specs(cfg, config.from_config_dict(store, CacheConfig), BATCH, CAPACITY)
    leaves = [leaf for leaf in jax.tree.leaves([c.leaves for c in caches]) if leaf.ndim == 4]
    return cfg, caches, cache.nbytes(caches), min(leaf.size for leaf in leaves)


@pytest.fixture(scope="module")
def compiler():
    with Compiler(200) as child:
        yield child


@pytest.mark.parametrize(
    "name,where",
    [*((name, GENERATIONS[n % 3]) for n, name in enumerate(TPU)), ("bf16", "v6e:1x1"), ("int8_lanes", "v5e:1x1")],
)
def test_a_tpu_loop_copies_no_cache(compiler, tmp_path, name, where):
    _, _, nbytes, leaf = held("mosaic_tpu", TPU[name])
    job = dict(
        model=config.plain(MODEL.replace(decode_kernel="mosaic_tpu")), cache=TPU[name], batch=BATCH, capacity=CAPACITY
    )
    path = tmp_path / "loop.hlo"
    report = compiler.compile("tests.helpers.aot_targets:decode_loop", job, where, (1, 1, 1), hlo_path=str(path))
    assert hasattr(report, "memory"), report
    done = analyse(path.read_text(), {"x": 1, "y": 1, "z": 1}).operations
    assert sum(o.kind == "kernel" for o in done) == MODEL.n_layers
    written = [o for o in done if o.op != "while" and any(math.prod(a.dims) >= leaf for a in o.arrays)]
    assert written and all(o.in_place for o in written), [(o.op, o.name) for o in written if not o.in_place]
    assert report.memory.aliased >= nbytes
    assert report.memory.temporaries < nbytes / 2  # K and V of one of the two layers
    assert report.cycles["kernel"] > 0.99 * nbytes / _bandwidth(where) * report.calibration.clock


def _bandwidth(where):
    from sharding.cost.slices import parse_slice

    return parse_slice(where).row.hbm_bandwidth


@pytest.mark.skipif(not gpu.AVAILABLE, reason="Mosaic GPU kernels need JAX 0.11 or later")
@pytest.mark.parametrize("name", GPU)
def test_an_h200_loop_copies_no_cache(name):
    from pallas_kernels.gpu import aot

    cfg, caches, nbytes, leaf = held("mosaic_gpu", GPU[name])
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), cfg, jnp.bfloat16))
    state, sampler = jax.eval_shape(lambda caches: loop_state(caches, BATCH), caches)

    def fn(params, state, sampler, eos, until):
        with target.of("gpu"):
            return decode.advance(params, cfg, state, sampler, eos, until)

    eos, until = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    report = aot.compile_report(fn, params, state, sampler, eos, until, donate_argnums=(1,))
    assert len(report.kernels) >= MODEL.n_layers and report.spill_bytes == 0
    moved = [m for m in report.moved(leaf) if not re.match(r"fusion input_scatter_fusion", m)]  # rows, in place
    assert not moved
    assert report.alias_bytes >= nbytes
    assert report.temp_bytes < nbytes / 2
