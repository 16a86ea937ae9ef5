"""GGUF checkpoints of the llama family: which key is which field, which tensor is which parameter.

Read architectures: `llama` (Llama, Mistral, SmolLM), `qwen2`, `qwen3`. llama.cpp rotates neighbouring dims of
llama-architecture heads, so its files hold q and k with the rows of a head interleaved: stored row 2 i + s is
dim i + s R/2 of the half-split pairing used here. The reader undoes that; qwen files are half-split already.

A metadata key or tensor that is not understood raises: a model that is nearly right is worse than none.
"""

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvattn import config as config_lib
from kvattn import layers as layers_lib
from kvattn import model as model_lib
from kvattn.attention.heads import heads_model
from kvattn.config import ModelConfig, RopeConfig
from kvattn.data import tokenizer as tokenizer_lib
from kvattn.errors import UserError
from kvattn.formats import gguf_file
from kvattn.formats.gguf_file import File, refuse

_CONVERT = "convert the model to a Hugging Face directory and load that"
_LLAMA3_LENGTH = 8192  # what every Llama 3.x interpolates from; the file has the result, not the length

# tensor name -> (parameter path, transform). Transforms, stored -> parameter: same; inward [out, D] -> [D, *out];
# rotary: inward, heads un-interleaved for llama; outward [D, in] -> [*in, D]; bias [out] -> [*out];
# rotary_bias: bias, un-interleaved for llama.
_MODEL_ROWS = {
    "token_embd.weight": ("embed.table", "same"),
    "output_norm.weight": ("final_norm.scale", "same"),
    "output.weight": ("unembed.table", "inward"),
}
_LAYER_ROWS = {
    "attn_norm.weight": ("attn_norm.scale", "same"),
    "attn_q.weight": ("attn.q", "rotary"),
    "attn_k.weight": ("attn.k", "rotary"),
    "attn_v.weight": ("attn.v", "inward"),
    "attn_output.weight": ("attn.o", "outward"),
    "attn_q.bias": ("attn.q_bias", "rotary_bias"),
    "attn_k.bias": ("attn.k_bias", "rotary_bias"),
    "attn_v.bias": ("attn.v_bias", "bias"),
    "attn_output.bias": ("attn.o_bias", "bias"),
    "attn_q_norm.weight": ("attn.q_norm.scale", "same"),
    "attn_k_norm.weight": ("attn.k_norm.scale", "same"),
    "ffn_norm.weight": ("mlp_norm.scale", "same"),
    "ffn_gate.weight": ("mlp.gate", "inward"),
    "ffn_up.weight": ("mlp.up", "inward"),
    "ffn_down.weight": ("mlp.down", "inward"),
    "ffn_gate.bias": ("mlp.gate_bias", "bias"),
    "ffn_up.bias": ("mlp.up_bias", "bias"),
    "ffn_down.bias": ("mlp.down_bias", "bias"),
}


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """`interleaved`: q and k are stored for neighbour pairing. `qk_norm`: the field of Heads."""

    interleaved: bool
    qk_norm: str = "none"


ARCHITECTURES = {
    "llama": _Architecture(interleaved=True),
    "qwen2": _Architecture(interleaved=False),
    "qwen3": _Architecture(interleaved=False, qk_norm="head"),
}


def read(path: str | os.PathLike, dtype: str = "float32") -> tuple[ModelConfig, dict, Any]:
    """(model config, parameters in `dtype` float32 | bfloat16, Tokenizer or None) of a GGUF file.

    Parameters are converted one tensor at a time: at the peak there is one copy of the model and a few of its
    largest tensor. Raises UserError for a file that is damaged, incomplete, not finite or not understood.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"checkpoint.dtype is {dtype!r}; choose float32 or bfloat16.")
    file = gguf_file.open_file(path)
    cfg = model_config(file)
    tokenizer = None
    if file.fields.get("tokenizer.ggml.model", "no_vocab") not in ("no_vocab", "none"):
        tokenizer = tokenizer_lib.from_gguf(file.fields, source=file.path)
        tokenizer_lib.check_matches(tokenizer, cfg)
    return cfg, _params(file, cfg, jnp.dtype(dtype)), tokenizer


# --- configuration -------------------------------------------------------------------------------------


class _Keys:
    """Typed access to the keys of one architecture; remembers which were read."""

    def __init__(self, file: File, architecture: str):
        self.file, self.prefix = file, architecture + "."
        self.left = {key for key in file.fields if key.startswith(self.prefix)}

    def get(self, name: str, default: Any = None) -> Any:
        self.left.discard(self.prefix + name)
        return self.file.fields.get(self.prefix + name, default)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive count; an array of equal counts (one a layer) is that count."""
        value = self.get(name, default)
        if isinstance(value, np.ndarray) and value.size and value.dtype.kind in "iu" and (value == value[0]).all():
            value = int(value[0])
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            text = "missing" if value is None else "not one positive whole number for all layers"
            raise refuse(self.file.path, f"cannot be used: its key {self.prefix}{name} is {text}", _CONVERT)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            text = "missing" if value is None else "not a finite number"
            raise refuse(self.file.path, f"cannot be used: its key {self.prefix}{name} is {text}", _CONVERT)
        return float(value)

    def neutral(self, name: str, *values: Any) -> None:
        """A key that must be absent or have one of `values`, because nothing here computes with another."""
        value = self.get(name)
        if value is not None and (isinstance(value, (np.ndarray, list)) or value not in values):
            raise refuse(self.file.path, f"sets {self.prefix}{name}, which is not supported", _CONVERT)


def model_config(file: File) -> ModelConfig:
    """The ModelConfig of an open file. Raises UserError naming the first key or tensor that does not fit."""
    name = file.fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        shown = repr(name)[:40]
        valid = ", ".join(ARCHITECTURES)
        raise refuse(file.path, f"has general.architecture {shown}; {valid} are read", _CONVERT)
    architecture, keys = ARCHITECTURES[name], _Keys(file, name)
    d_model, n_layers = keys.size("embedding_length"), keys.size("block_count")
    if n_layers > len(file.tensors):
        raise refuse(file.path, f"has {len(file.tensors)} tensors, too few for {name}.block_count = {n_layers}")
    n_heads = keys.size("attention.head_count")
    n_kv = keys.size("attention.head_count_kv", n_heads)
    head_dim = keys.size("attention.key_length", d_model // n_heads)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise refuse(file.path, "has no embedding matrix token_embd.weight")
    if keys.size("vocab_size", embedding.shape[0]) != embedding.shape[0]:
        raise refuse(file.path, f"is corrupt: {name}.vocab_size differs from the {embedding.shape[0]} embedding rows")
    first = {row for row in _LAYER_ROWS if f"blk.0.{row}" in file.tensors}
    cfg = heads_model(
        vocab_size=embedding.shape[0],
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_k_heads=n_kv,
        n_v_heads=n_kv,
        head_dim=head_dim,
        v_head_dim=keys.size("attention.value_length", head_dim),
        d_ff=keys.size("feed_forward_length"),
        max_length=keys.size("context_length", ModelConfig.max_length),
        ropes=(_rope(file, keys, architecture, head_dim),),
        attn_scale=keys.number("attention.scale", 0.0),
        qk_norm=architecture.qk_norm,
        qkv_bias="attn_q.bias" in first,
        o_bias="attn_output.bias" in first,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        mlp_bias="ffn_up.bias" in first,
        tied_embeddings="output.weight" not in file.tensors,
    )
    _check_rest(keys)
    config_lib.validate(cfg)
    return cfg


def _check_rest(keys: _Keys) -> None:
    """Keys that may only say what is the case anyway, then no key may be left."""
    keys.neutral("tensor_data_layout", "Meta AI original pth")
    keys.neutral("use_parallel_residual", False)
    keys.neutral("attention.causal", True)
    keys.neutral("attention.sliding_window", 0)
    for name in ("expert_count", "expert_used_count", "attention.clamp_kqv", "attention.max_alibi_bias"):
        keys.neutral(name, 0)
    for name in ("logit_scale", "residual_scale", "embedding_scale"):
        keys.neutral(name, 0, 1)
    if keys.left:
        raise refuse(keys.file.path, f"sets {min(keys.left)}, which is not understood", _CONVERT)


def _rope(file: File, keys: _Keys, architecture: _Architecture, head_dim: int) -> RopeConfig:
    """Rotary embedding from the rope.* keys and the tensor rope_freqs.weight (Llama 3's divisors)."""
    dim = keys.size("rope.dimension_count", head_dim)
    if dim > head_dim or dim % 2 or (architecture.interleaved and dim != head_dim):
        raise refuse(file.path, f"rotates {dim} dims of {head_dim} ({keys.prefix}rope.dimension_count)", _CONVERT)
    rope = RopeConfig(theta=keys.number("rope.freq_base", 10000.0), dim=0 if dim == head_dim else dim)
    old = keys.number("rope.scale_linear", 0.0)
    kind, factor = keys.get("rope.scaling.type", "linear"), keys.number("rope.scaling.factor", old) or 1.0
    length = keys.size("rope.scaling.original_context_length", keys.size("context_length", _LLAMA3_LENGTH))
    keys.get("rope.scaling.finetuned")  # says how the model was made, not what it computes
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    keys.neutral("rope.scaling.yarn_ext_factor", 1)
    keys.neutral("rope.scaling.yarn_attn_factor", 1)
    fast, slow = keys.number("rope.scaling.yarn_beta_fast", 32.0), keys.number("rope.scaling.yarn_beta_slow", 1.0)
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn") or (kind != "yarn" and attention != 1):
        raise refuse(file.path, f"sets {keys.prefix}rope.scaling.type to {str(kind)[:40]!r}, not supported", _CONVERT)
    if kind == "yarn" and factor > 1:
        grown = attention * (0.1 * math.log(factor) + 1.0)
        rope = dataclasses.replace(
            rope,
            scaling="yarn",
            factor=factor,
            original_length=length,
            beta_fast=fast,
            beta_slow=slow,
            attention_factor=grown,
        )
    elif kind == "linear" and factor != 1:
        rope = dataclasses.replace(rope, scaling="linear", factor=factor)
    if rope.theta <= 0 or factor < 1 or min(fast, slow) <= 0:
        raise refuse(file.path, f"is corrupt: its {keys.prefix}rope keys hold a number out of range")
    if "rope_freqs.weight" in file.tensors:
        rope = _llama3(file, rope, keys.get("rope.scaling.original_context_length"), head_dim)
    return rope


def _llama3(file: File, rope: RopeConfig, length: int | None, head_dim: int) -> RopeConfig:
    """The llama3 scaling whose divisors are the tensor rope_freqs.weight [R/2]; only its factor is free."""
    half = (rope.dim or head_dim) // 2
    if file.tensors["rope_freqs.weight"].shape != (half,):
        raise refuse(file.path, f"is corrupt: tensor rope_freqs.weight is not of shape ({half},)")
    divisors = file.tensor("rope_freqs.weight").astype(np.float64)
    if (divisors == 1).all():
        return rope
    plain, _ = layers_lib.rope_frequencies(rope, head_dim)
    if rope.scaling == "none" and divisors.min() >= 1:
        scaled = dataclasses.replace(
            rope, scaling="llama3", factor=float(divisors.max()), original_length=length or _LLAMA3_LENGTH
        )
        if np.allclose(plain / layers_lib.rope_frequencies(scaled, head_dim)[0], divisors, rtol=1e-4, atol=0):
            return scaled
    raise refuse(file.path, "has rope_freqs.weight that Llama 3's scaling (1, 4, 8192) does not give", _CONVERT)


# --- weights -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where a tensor goes: the parameter's path and shape, and the transform from what is stored."""

    path: tuple[Any, ...]
    shape: tuple[int, ...]
    transform: str

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape in the file."""
        if self.transform in ("inward", "rotary"):
            return (math.prod(self.shape[1:]), self.shape[0])
        if self.transform == "outward":
            return (self.shape[-1], math.prod(self.shape[:-1]))
        return self.shape if self.transform == "same" else (math.prod(self.shape),)


def _slots(cfg: ModelConfig) -> Iterator[tuple[str, _Slot]]:
    """(tensor name, slot) for every parameter of the model."""
    specs = model_lib.param_specs(cfg)
    for name, (path, transform) in _MODEL_ROWS.items():
        keys = tuple(path.split("."))
        if keys[0] in specs:
            yield name, _Slot(keys, specs[keys[0]][keys[1]].shape, transform)
    for layer, layer_specs in enumerate(specs["layers"]):
        for name, (path, transform) in _LAYER_ROWS.items():
            spec, keys = layer_specs, tuple(path.split("."))
            for key in keys:
                spec = spec.get(key) if spec is not None else None
            if spec is not None:
                yield f"blk.{layer}.{name}", _Slot(("layers", layer, *keys), spec.shape, transform)


def _params(file: File, cfg: ModelConfig, dtype: Any) -> dict[str, Any]:
    """Every parameter, after every shape has been checked."""
    slots = dict(_slots(cfg))
    missing = [name for name in slots if name not in file.tensors]
    if missing:
        raise refuse(file.path, f"lacks {_several(missing)}")
    extra = [name for name in file.tensors if name not in slots and name != "rope_freqs.weight"]
    if extra:
        raise refuse(file.path, f"has tensors that this model does not: {_several(extra)}", _CONVERT)
    for name, slot in slots.items():
        shape = file.tensors[name].shape
        if shape != slot.stored:
            raise refuse(file.path, f"has tensor {name} of shape {shape} where its keys say {slot.stored}")
    interleaved = ARCHITECTURES[file.fields["general.architecture"]].interleaved
    params: dict[str, Any] = {"layers": tuple({} for _ in range(cfg.n_layers))}
    for name, slot in slots.items():
        node: Any = params
        for key in slot.path[:-1]:
            node = node[key] if isinstance(node, tuple) else node.setdefault(key, {})
        node[slot.path[-1]] = _to_device(_arrange(file.tensor(name), slot, interleaved), dtype)
    return params


def _several(names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _arrange(stored: np.ndarray, slot: _Slot, interleaved: bool) -> np.ndarray:
    """A stored tensor (float32, slot.stored) as the parameter (slot.shape)."""
    if slot.transform == "rotary" and interleaved:
        d, heads, dim = slot.shape
        return stored.reshape(heads, dim // 2, 2, d).transpose(3, 0, 2, 1).reshape(slot.shape)
    if slot.transform == "rotary_bias" and interleaved:
        heads, dim = slot.shape
        return stored.reshape(heads, dim // 2, 2).swapaxes(1, 2).reshape(slot.shape)
    if slot.transform in ("inward", "rotary", "outward"):
        return np.ascontiguousarray(stored.T).reshape(slot.shape)
    return stored.reshape(slot.shape)


def _to_device(array: np.ndarray, dtype: Any) -> jax.Array:
    return jax.device_put(array.astype(dtype, copy=False))
