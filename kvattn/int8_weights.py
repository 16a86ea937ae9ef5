"""int8 weights: a property of the array, understood by every matmul.

    params = quantize(params, cfg)          # matmul weights and the embedding become Int8, norms and biases stay

An Int8 holds int8 values and one scale per output channel, symmetric: y = (x values) * scale, so that the bytes read
per matmul halve against bfloat16 while activations and the product stay bfloat16 (the AQT-style weights of
Pope et al., arXiv 2211.05102, section 3.6). An embedding table is scaled per row, which serves both the lookup
and, tied, the logits.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from kvattn import model, spec
from kvattn.config import ModelConfig
from kvattn.errors import UserError
from kvattn.spec import ParamSpec

WEIGHTS = ("float32", "bfloat16", "int8")


@flax.struct.dataclass
class Int8:
    """values int8 [*in,*out]; scale [*out] in the dtype of the weight it stands for. w = values * scale."""

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def T(self) -> "Int8":
        """An embedding table [W,D] with scale [W], as the [D,W] weight of the logits."""
        return Int8(self.values.T, self.scale)

    def dequantize(self) -> jax.Array:
        """values * scale, of a weight [*in,*out]."""
        scale = self.scale.reshape((1,) * (self.values.ndim - self.scale.ndim) + self.scale.shape)
        return self.values.astype(scale.dtype) * scale


def _inner(s: ParamSpec) -> int:
    """Leading dims that a matmul contracts; 0 for what is no matmul weight, -1 for an embedding table (its last)."""
    if s.axes == ("vocab", "embed"):
        return -1
    count = 1
    while s.fan_in and math.prod(s.shape[:count]) != s.fan_in:
        count += 1
    return count if s.fan_in else 0


def quantized_specs(cfg: ModelConfig) -> Any:
    """`model.param_specs` with an Int8 of two ParamSpecs for every weight that `quantize` turns into one."""

    def one(s: ParamSpec) -> Any:
        inner = _inner(s)
        if not inner:
            return s
        out = slice(inner, None) if inner > 0 else slice(0, 1)
        return Int8(s, ParamSpec(s.shape[out], s.axes[out], "ones"))

    return spec.map_specs(one, model.param_specs(model.unscanned(cfg)))


def quantize(params: Any, cfg: ModelConfig) -> Any:
    """Rounds every matmul weight and embedding row to 127 steps each way of its channel's largest value; the error is
    at most half a step. Raises UserError for stacked layers."""
    if cfg.scan_layers:
        raise UserError("model.scan_layers is True; quantize the unstacked weights (stacking.unstack_layers).")
    return jax.tree.map(_round, model.param_specs(cfg), params, is_leaf=spec.is_spec)


def _round(s: ParamSpec, w: jax.Array) -> Any:
    inner = _inner(s)
    if not inner:
        return w
    axes = tuple(range(inner)) if inner > 0 else (w.ndim - 1,)
    top = jnp.max(jnp.abs(w.astype(jnp.float32)), axes, keepdims=True)
    scale = jnp.where(top > 0, top / 127, 1.0).astype(w.dtype)
    values = jnp.round(w.astype(jnp.float32) / scale.astype(jnp.float32))
    return Int8(jnp.clip(values, -127, 127).astype(jnp.int8), scale.squeeze(axes))


def abstract(cfg: ModelConfig, weights: str) -> Any:
    """ShapeDtypeStructs of a model whose weights are float32, bfloat16 or int8 (with bfloat16 scales).

    Raises UserError for another name.
    """
    if weights not in WEIGHTS:
        raise UserError(f"weights is {weights!r}; choose one of {', '.join(WEIGHTS)}.")
    if weights != "int8":
        return spec.abstract(model.param_specs(model.unscanned(cfg)), jnp.dtype(weights))

    of = jax.ShapeDtypeStruct

    def one(s: Any) -> Any:
        if isinstance(s, Int8):
            return Int8(of(s.values.shape, jnp.int8), of(s.scale.shape, jnp.bfloat16))
        return of(s.shape, jnp.bfloat16)

    return jax.tree.map(one, quantized_specs(cfg), is_leaf=lambda s: isinstance(s, Int8 | ParamSpec))


def fold_norms(params: Any, cfg: ModelConfig) -> Any:
    """Multiplies each block's RMSNorm scales into the rows of the matrices that read them, and sets them to one: the
    same logits with nothing left to multiply (Pope et al., arXiv 2211.05102, section 3.5). A tied final norm stays.

    Raises UserError: layernorm (its bias is no row scale), norms after the sub-module, stacked layers, int8 weights.
    """
    for name, value, wanted in (
        ("norm", cfg.norm, "rmsnorm"),
        ("norm_placement", cfg.norm_placement, "pre"),
        ("scan_layers", cfg.scan_layers, False),
    ):
        if value != wanted:
            raise UserError(f"model.{name} is {value!r}; norms fold into the weights where it is {wanted!r}.")
    if any(isinstance(leaf, Int8) for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Int8))):
        raise UserError("the weights are int8; fold the norms first, then quantize.")

    def rows(w, norm):
        scale = norm["scale"] + jnp.asarray(cfg.norm_offset, norm["scale"].dtype)
        return w * scale.reshape((-1,) + (1,) * (w.ndim - 1)).astype(w.dtype)

    def one(norm):
        return {"scale": jnp.full_like(norm["scale"], 1 - cfg.norm_offset)}

    def block(b, layer):
        family = cfg.attention(layer)
        specs, readers = (family.param_specs(cfg, owner) for owner in (cfg.sources[layer] == layer, False))
        attn, mlp = dict(b.get("attn", {})), dict(b["mlp"])
        mlp_norm = b.get("mlp_norm", b.get("attn_norm"))
        for name, s in specs.items():  # what reads the stream, an owner's K and V by a norm of their own
            if spec.is_spec(s) and s.fan_in and s.axes[0] == "embed":
                attn[name] = rows(attn[name], b["attn_norm"] if name in readers else b.get("kv_norm", b["attn_norm"]))
        for name in ("up", "gate"):
            if name in mlp:
                mlp[name] = rows(mlp[name], mlp_norm)
        norms = {n: one(b[n]) for n in ("attn_norm", "mlp_norm", "kv_norm") if n in b}
        return {**b, **({"attn": attn} if attn else {}), "mlp": mlp, **norms}

    out = {**params, "layers": tuple(block(b, l) for l, b in enumerate(params["layers"]))}
    if not cfg.tied_embeddings:
        out["unembed"] = {"table": rows(params["unembed"]["table"], params["final_norm"])}
        out["final_norm"] = one(params["final_norm"])
    return out
