"""A small cut of a model, really run on 8 fake CPU devices, in a process of its own.

`python -m experiments.sharding_study.cut` is a child (experiments/common/child.py): its request `measure` takes the
arguments of `program.program` and a `mesh`, builds the cut, runs it, and answers milliseconds and how far its logits
are from those of the unsharded model.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import child
from experiments.sharding_study import program as program_lib
from kvattn import cache as caches_lib
from kvattn import config as config_lib
from kvattn import int8_weights as weights_lib
from kvattn import model as model_lib
from kvattn import stacking
from kvattn.attention.heads import plain_heads
from kvattn.config import CacheConfig, MaskConfig, ModelConfig
from kvattn.decode import partitioned as sharded
from sharding.layout import torus_layouts

FAKE_DEVICES = 8
CUT_CONTEXT = 64


def cut(arguments: dict) -> tuple[dict, tuple[int, int, int]]:
    """(arguments of a small model, mesh of at most 8) that keep all that a layout depends on: the ratio of query to K/V
    heads, cross-layer sharing, masks, block and mesh axes. `arguments`: those of `program.program`, and `mesh`."""
    cfg = config_lib.from_config_dict(arguments["model"], ModelConfig)
    own = plain_heads(cfg, "the measured cut of a study")
    counts = own.n_k_heads, own.n_v_heads
    k, v = (n if n <= FAKE_DEVICES else math.gcd(n, FAKE_DEVICES) for n in counts)
    heads = math.lcm(FAKE_DEVICES, k, v)
    k, v = (heads if n == own.n_heads > 1 else m for n, m in zip(counts, (k, v), strict=True))
    heads *= 2 if heads == max(k, v) and own.n_heads > max(counts) else 1
    shared = next((i + 1 for i, owner in enumerate(cfg.sources) if owner != i), 2)
    n_layers = min(cfg.n_layers, max(2, min(shared, 6)))
    small = cfg.replace(
        vocab_size=program_lib.LANES * FAKE_DEVICES,
        d_model=128,
        d_ff=256,
        n_layers=n_layers,
        n_heads=heads,
        n_k_heads=k,
        n_v_heads=v,
        head_dim=16,
        v_head_dim=16,
        attn_scale=0.0,
        kv_source=cfg.kv_source[:n_layers],
        ropes=tuple(x.rope and dataclasses.replace(x.rope, dim=min(x.rope.dim, 8)) for x in cfg.layers),
        masks=tuple(_narrow(layer.mask) for layer in cfg.layers),
        scan_layers=False,
    )
    mesh = list(arguments["mesh"])
    while math.prod(mesh) > FAKE_DEVICES:
        widest = max(range(3), key=lambda i: mesh[i])
        mesh[widest] = mesh[widest] // 2 if mesh[widest] % 2 == 0 else 1
    batch = arguments["batch"] if arguments["batch"] <= 16 else math.gcd(arguments["batch"], 16)
    weights = "float32" if arguments["weights"] == "bfloat16" else arguments["weights"]
    smaller = {
        "model": config_lib.plain(small),
        "cache": {**arguments["cache"], "dtype": "float32", "capacity": 0},
        "layout": arguments["layout"],
        "phase": arguments["phase"],
        "batch": batch,
        "context": CUT_CONTEXT,
        "tokens": 0,
        "weights": weights,
        "overlap": arguments["overlap"],
    }
    return json.loads(json.dumps(smaller)), tuple(mesh)


def _narrow(mask: MaskConfig) -> MaskConfig:
    return dataclasses.replace(mask, window=min(mask.window, 24), sinks=min(mask.sinks, 8))


def measure_cut(arguments: dict) -> dict:
    """Builds and runs the cut of `arguments`: {milliseconds, worst: largest difference of a logit from the unsharded
    model's, relative to the largest logit, mesh, batch, context, layers}. In float32; with int8 weights activations are
    bfloat16, whose rounding is then most of `worst`."""
    small, shape = cut(arguments)
    cfg = config_lib.from_config_dict(small["model"], ModelConfig)
    store = config_lib.from_config_dict(small["cache"], CacheConfig)
    types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh(shape, torus_layouts.AXES, axis_types=types, devices=jax.devices()[: math.prod(shape)])
    made = program_lib.program(mesh, **small)
    params = model_lib.init(jax.random.key(0), cfg)
    params = weights_lib.quantize(params, cfg) if small["weights"] == "int8" else params
    params = jax.tree.map(lambda x, a: x.astype(a.dtype), params, weights_lib.abstract(cfg, small["weights"]))
    batch, context = small["batch"], small["context"]
    ids = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, context)), jnp.int32)
    at = jnp.broadcast_to(jnp.arange(context, dtype=jnp.int32), ids.shape)
    caches = caches_lib.create(cfg, store, batch, context)
    here = jax.default_backend()
    plain = jax.jit(lambda *a: sharded._pass(cfg, True, here, *a))
    if small["phase"] == "decode":
        first = [x[:, : context - 1] for x in (ids, at)]
        _, caches = plain(params, *first, caches)
        plain, ids, at = jax.jit(lambda *a: sharded._pass(cfg, False, here, *a)), ids[:, -1:], at[:, -1:]
    want = np.asarray(plain(params, ids, at, caches)[0])
    if program_lib.scanned(cfg, small["phase"]):
        params, caches = stacking.stack_layers(params, cfg), stacking.stack_caches(caches, cfg)
    args = program_lib.like((params, ids, at, caches), made.args)
    seconds, got = program_lib.timed(made, args)
    worst = float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())
    return {
        "milliseconds": 1e3 * seconds,
        "worst": worst,
        "mesh": list(shape),
        "batch": batch,
        "context": context,
        "layers": cfg.n_layers,
        "d_model": cfg.d_model,
    }


def measure(arguments: dict) -> dict:
    """measure_cut, or {"failure": one sentence}: a row that does not run is an answer, and the study goes on."""
    try:
        return measure_cut(arguments)
    except Exception as error:
        return {"failure": " ".join(f"{type(error).__name__}: {error}".split())[:400]}


if __name__ == "__main__":
    child.serve({"measure": measure})
