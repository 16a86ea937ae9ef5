"""Codes in the sharded programs: the unsharded store's logits and codes, however heads, batch or slots are split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import cache, model
from kvattn.config import CacheConfig
from kvattn.decode import partitioned as sharded
from kvattn.errors import UserError
from tests.helpers.sharded_cases import MODELS, SLOTS, STEPS, TOKENS, case, mesh_of
from tests.helpers.tolerances import CODES_STEP, apart

STORES = {
    "int8": CacheConfig(dtype="int8"),
    "lanes": CacheConfig(dtype="float8_e4m3fn", layout="lanes"),
    "v_lanes": CacheConfig(dtype="int8", layout="v_lanes"),
}


@functools.cache
def unsharded(name, store, batch):
    """Logits [1 + STEPS, B, W] at each row's last token and after each step, and the caches at the end."""
    params, (tokens, positions), steps, _ = case(name, batch)
    caches = cache.create(MODELS[name], STORES[store], batch, SLOTS)
    forward, out = jax.jit(model.forward, static_argnums=1), []
    for i, (ids, at) in enumerate([(tokens, positions), *steps]):
        inputs = model.Inputs(jnp.asarray(ids), jnp.asarray(at), empty=i == 0)
        got, caches = forward(params, MODELS[name], inputs, caches=caches)
        out.append(np.asarray(got.logits)[np.arange(batch), at.argmax(1)])
    return np.stack(out), jax.device_get(caches)


def program(name, store, phase, layout, batch):
    p = sharded.build(
        MODELS[name],
        STORES[store],
        layout,
        mesh_of(),
        phase=phase,
        batch=batch,
        context=SLOTS,
        tokens=TOKENS if phase == "prefill" else 0,
        weights="float32",
    )
    compiled = jax.jit(p.fn).lower(*p.args).compile()
    return lambda *args: compiled(*jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), args, p.args))


@pytest.mark.parametrize(
    ("name", "store", "layout"),
    [
        ("mqa", "int8", "ws_2d/by_seq:xyz"),
        ("mha", "v_lanes", "ws_2d/by_head:xyz"),
        ("mqa", "lanes", "wg_xy/by_batch:z+by_seq:xy"),
    ],
)
def test_codes_are_the_same_on_eight_chips(name, store, layout):
    """Prefill and decode in one layout."""
    params, prompt, steps, exact = case(name, 8)
    want, end = unsharded(name, store, 8)
    fill, step = (program(name, store, phase, layout, 8) for phase in ("prefill", "decode"))
    logits, caches = fill(params, *prompt, cache.create(MODELS[name], STORES[store], 8, SLOTS))
    for i in range(STEPS + 1):
        assert apart(logits, want[i]) < CODES_STEP.rtol < apart(logits, exact[i])
        if i < STEPS:
            logits, caches = step(params, *steps[i], caches)
    for got, held in zip(caches, end, strict=True):
        if held is None:
            continue
        assert np.asarray(got.length).tolist() == held.length.tolist()
        for leaf in held.leaves:
            one, other = (np.asarray(c.leaves[leaf].values).astype(np.float32) for c in (got, held))
            assert (one != other).mean() < CODES_STEP.rtol


@pytest.mark.parametrize(
    ("store", "field"),
    [
        (CacheConfig(("paged",), page_size=16), "cache.kinds"),
        (CacheConfig(dtype="int8", key_scale="channel"), "cache.key_scale"),
    ],
)
def test_what_has_no_sharded_form_says_so(store, field):
    with pytest.raises(UserError, match=f"{field}.*not split over chips"):
        sharded.build(MODELS["gqa"], store, "ws_2d/by_batch:xyz", mesh_of(), phase="decode", batch=8, context=SLOTS)
