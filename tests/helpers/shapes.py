"""Shapes and dtypes checked at run time, in every test: the docstrings' letters, enforced where the axes meet.

`install()` wraps the functions below once a session. A call whose arrays do not bind the letters consistently
(B twice with two sizes, K that is not the config's) raises AssertionError, under jit, grad and vmap too.
"""

import dataclasses
import functools

import jax
from jaxtyping import Array, Bool, Float, Float32, Int32, jaxtyped

from kvattn import attention, model
from kvattn.attention import dispatch, view
from kvattn.cache import base
from pallas_kernels import Leaf
from sharding.layout import apply


def _is(value, kind, what: str) -> None:
    if apply._manual() is not None:
        return  # inside shard_map: one chip's part of each dim
    if not isinstance(value, kind):
        raise AssertionError(f"{what} is {value.dtype}{list(value.shape)}, which is not {kind}")


def _forward(call):
    @functools.wraps(call)
    def forward(params, cfg, inputs, **rest):
        outputs, caches = call(params, cfg, inputs, **rest)
        with jaxtyped("context"):
            _is(inputs.tokens, Int32[Array, "B T"], "tokens")
            for name in ("positions", "segment_ids"):
                if getattr(inputs, name) is not None:
                    _is(getattr(inputs, name), Int32[Array, "B T"], name)
            length = "1" if inputs.last_only else "T"
            words = params["unembed"]["table"].shape[1] if "unembed" in params else params["embed"]["table"].shape[0]
            _is(outputs.logits, Float32[Array, f"B {length} {words}"], "logits")
            for x in outputs.collected.get("attention", ()):
                _is(x, Float[Array, f"B T {cfg.d_model}"], "collected attention")
        assert (caches is None) == (rest.get("caches") is None)
        return outputs, caches

    return forward


def _projection(p: attention.Projection) -> attention.Projection:
    @functools.wraps(p.queries)
    def queries(params, cfg, x, table):
        q = p.queries(params, cfg, x, table)
        with jaxtyped("context"):
            _is(x, Float[Array, f"B T {cfg.d_model}"], "x")
            _is(q, Float[Array, f"B T {cfg.n_heads} {cfg.head_dim}"], "queries")
        return q

    @functools.wraps(p.entries)
    def entries(params, cfg, x, table):
        new, declared = p.entries(params, cfg, x, table), p.kv_spec(cfg)
        assert set(new) == set(declared), f"entries {set(new)} are not the declared {set(declared)}"
        with jaxtyped("context"):
            _is(x, Float[Array, f"B T {cfg.d_model}"], "x")
            for name, (heads, dim) in declared.items():
                _is(new[name], Float[Array, f"B {heads} T {dim}"], name)
        return new

    @functools.wraps(p.expand)
    def expand(cfg, layer, stored, positions, dtype):
        k, v = p.expand(cfg, layer, stored, positions, dtype)
        with jaxtyped("context"):
            _is(positions, Int32[Array, "B S"], "positions")
            _is_held(k, "B", cfg.n_k_heads, "S", cfg.head_dim, "k")
            _is_held(v, "B", cfg.n_v_heads, "S", cfg.v_head_dim, "v")
        return k, v

    @functools.wraps(p.output)
    def output(params, cfg, context):
        out = p.output(params, cfg, context)
        with jaxtyped("context"):
            _is(context, Float[Array, f"B T {cfg.n_heads} {cfg.v_head_dim}"], "context")
            _is(out, Float[Array, f"B T {cfg.d_model}"], "output")
        return out

    return dataclasses.replace(p, queries=queries, entries=entries, expand=expand, output=output)


def _is_held(x, rows, heads, slots, dim, what):
    """An array [rows, heads, slots, dim], or a Leaf of them with its scales."""
    if not isinstance(x, Leaf):
        return _is(x, Float[Array, f"{rows} {heads} {slots} {dim}"], what)
    along = f"{dim} {slots}" if x.lanes else f"{slots} {dim}"
    _is(x.values, Float[Array, f"{rows} {heads} {along}"], what)
    if x.scale is not None:
        per = f"1 {dim}" if x.channel else slots
        _is(x.scale, Float32[Array, f"{rows} {heads} {per}"], f"{what}'s scales")


def _attend(call):
    @functools.wraps(call)
    def attend_partial(q, k, v, mask, **rest):
        part = call(q, k, v, mask, **rest)
        with jaxtyped("context"):
            for value, kind, what in (
                (q, Float[Array, "B T N H"], "q"),
                (mask, Bool[Array, "B T S"], "mask"),
                (part.out, Float32[Array, "B T N V"], "out"),
                (part.max, Float32[Array, "B T N"], "max"),
                (part.sum, Float32[Array, "B T N"], "sum"),
            ):
                _is(value, kind, what)
            _is_held(k, "B", "K", "S", "H", "k")
            _is_held(v, "B", "M", "S", "V", "v")
        return part

    return attend_partial


def _append(call):
    @functools.wraps(call)
    def append(cache, entries, positions):
        after = call(cache, entries, positions)
        with jaxtyped("context"):
            _is(positions, Int32[Array, "B T"], "positions")
            _is(after.length, Int32[Array, "B"], "length")
        before, now = (jax.tree.flatten(c.entries) for c in (cache, after))
        assert before[1] == now[1], "append changed the form of a leaf"
        for held, new in zip(before[0], now[0], strict=True):
            assert (held.shape, held.dtype) == (new.shape, new.dtype), "append changed a leaf"
        return after

    return append


def install() -> None:
    """Wraps the model, every projection, the reference attention and the cache's append."""
    model.forward = _forward(model.forward)
    for name, projection in attention.VARIANTS.items():
        attention.VARIANTS[name] = _projection(projection)
    dispatch.attend_partial = _attend(dispatch.attend_partial)
    base.append = view.append = _append(base.append)
