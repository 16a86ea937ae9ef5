"""config.json keys that need more than a copy: heads, activations, biases, windows, rotary embedding.

A `Rule` is the two directions of one such group of keys, side by side: `read(keys, fields)` puts fields of
`heads_model` in `fields`, `write(cfg, out)` puts config.json keys in `out`. Reading raises UserError naming key and
value for anything kvattn does not express; writing never judges, because the round trip does
(see architectures.py).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from kvattn.config import EXECUTION, MaskConfig, ModelConfig, RopeConfig, shortest
from kvattn.errors import UserError
from kvattn.formats.flat import Flat

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 4096
_MISSING = object()
_GATED = {"swiglu": ("silu", "swish"), "geglu": ("gelu",), "geglu_tanh": ("gelu_pytorch_tanh", "gelu_new")}
_PLAIN = {"gelu": ("gelu",), "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new")}
# Parts of key names that change the computation in transformers or mark a foreign file; any true value is refused.
_FOREIGN = ("quantization_config", "auto_map", "expert", "moe_", "mrope", "interleaved", "use_bidirectional_attention")


@dataclasses.dataclass(frozen=True)
class Rule:
    read: Callable[["Keys", dict[str, Any]], None]
    write: Callable[[Flat, dict[str, Any]], None]


class Keys:
    """Typed access to config.json; a key that is absent has transformers' default, if it has one."""

    def __init__(self, raw: dict[str, Any], defaults: dict[str, Any], where: str = "config.json: "):
        self.raw, self.defaults, self.where = raw, defaults, where

    def has(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def get(self, key: str) -> Any:
        value = self.raw.get(key, self.defaults.get(key, _MISSING))
        if value is _MISSING:
            raise UserError(f"{self.where}{key} is missing; this architecture needs it.")
        return value

    def refuse(self, key: str, why: str) -> UserError:
        return UserError(f"{self.where}{key} is {str(self.raw.get(key, self.defaults.get(key)))[:80]!r}; {why}")

    def integer(self, key: str, high: int = MAX_SIZE) -> int:
        value = self.get(key)
        if type(value) is not int or not 0 < value <= high:
            raise self.refuse(key, f"it takes an integer from 1 to {high}.")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise self.refuse(key, "it takes a positive number.")
        return float(value)

    def cap(self, key: str) -> float:
        """A positive number, or 0 for null (off)."""
        return 0.0 if self.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise self.refuse(key, "it takes true or false.")
        return value

    def typed(self, key: str, kind: type) -> Any:
        high = MAX_LAYERS if key == "num_hidden_layers" else MAX_SIZE
        return {int: lambda: self.integer(key, high), float: lambda: self.number(key), bool: lambda: self.flag(key)}[
            kind
        ]()


def refuse_foreign(raw: dict[str, Any]) -> None:
    """Raises UserError for keys of other families (experts, quantised weights, code on the hub, ...)."""
    for key, value in raw.items():
        if value and any(part in key for part in _FOREIGN):
            raise UserError(f"config.json: {key[:80]} is {str(value)[:80]!r}; kvattn does not express it.")


def canonical(cfg: ModelConfig) -> ModelConfig:
    """`cfg`, of plain heads, with every field that has two spellings in one of them, and execution fields at their
    defaults."""
    layers = []
    for layer in cfg.every:
        heads = layer.attention
        if math.isclose(heads.scale, heads.head_dim**-0.5, rel_tol=1e-12):
            heads = dataclasses.replace(heads, attn_scale=0.0)
        rope = _canonical_rope(layer.rope, heads.head_dim)
        layers.append(dataclasses.replace(layer, attention=heads, rope=rope))
    default = ModelConfig()
    return dataclasses.replace(
        cfg,
        layers=shortest(layers),
        kv_source=() if cfg.sources == tuple(range(cfg.n_layers)) else cfg.sources,
        **{name: getattr(default, name) for name in EXECUTION},
    )


ROPE_FIELDS = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_length"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "truncate", "original_length"),
}


def _canonical_rope(rope: RopeConfig | None, head_dim: int) -> RopeConfig | None:
    if rope is None:
        return None
    used = {name: getattr(rope, name) for name in ("theta", "scaling", *ROPE_FIELDS[rope.scaling])}
    return RopeConfig(dim=0 if rope.dim == head_dim else rope.dim, **used)


# --- heads ---------------------------------------------------------------------------------------------


def _read_heads(keys: Keys, fields: dict[str, Any], d_multiple: bool) -> None:
    n, d = fields["n_heads"], fields["d_model"]
    k = (
        n
        if keys.raw.get("num_key_value_heads", keys.defaults.get("num_key_value_heads")) is None
        else keys.integer("num_key_value_heads")
    )
    if n % k:
        raise keys.refuse("num_key_value_heads", f"it must divide num_attention_heads = {n}.")
    if "head_dim" in keys.raw and keys.raw["head_dim"] is not None or keys.defaults.get("head_dim"):
        h = keys.integer("head_dim")
    elif d % n:
        raise keys.refuse("num_attention_heads", f"it must divide hidden_size = {d} where head_dim is not given.")
    else:
        h = d // n
    if d_multiple and d % n:
        raise keys.refuse("num_attention_heads", f"transformers wants it to divide hidden_size = {d} here.")
    if h % 2:
        raise keys.refuse("head_dim", f"the head dimension is {h}; rotary embedding needs an even one.")
    fields |= {"n_k_heads": k, "n_v_heads": k, "head_dim": h, "v_head_dim": h}


def _write_heads(cfg: Flat, out: dict[str, Any]) -> None:
    out |= {"num_key_value_heads": cfg.n_k_heads, "head_dim": cfg.head_dim}


HEADS = Rule(lambda keys, fields: _read_heads(keys, fields, False), _write_heads)
HEADS_D_MULTIPLE = Rule(lambda keys, fields: _read_heads(keys, fields, True), _write_heads)


def _read_heads_neox(keys: Keys, fields: dict[str, Any]) -> None:
    n, d = fields["n_heads"], fields["d_model"]
    if d % n or (keys.has("head_dim") and keys.raw["head_dim"] != d // n):
        raise keys.refuse("num_attention_heads", f"gpt_neox heads are hidden_size / num_attention_heads, {d} / {n}.")
    h = d // n
    fields |= {"n_k_heads": n, "n_v_heads": n, "head_dim": h, "v_head_dim": h}


HEADS_NEOX = Rule(_read_heads_neox, lambda cfg, out: None)


# --- block ---------------------------------------------------------------------------------------------


def _activation(key: str, table: dict[str, tuple[str, ...]]) -> Rule:
    def read(keys: Keys, fields: dict[str, Any]) -> None:
        value = keys.get(key)
        for mlp, names in table.items():
            if value in names:
                fields["mlp"] = mlp
                return
        known = ", ".join(name for names in table.values() for name in names)
        raise keys.refuse(key, f"kvattn has {known} here.")

    return Rule(read, lambda cfg, out: out.update({key: table.get(cfg.mlp, ("silu",))[0]}))


ACTIVATION = _activation("hidden_act", _GATED)
GEMMA_ACTIVATION = _activation("hidden_activation", _GATED)
PLAIN_ACTIVATION = _activation("hidden_act", _PLAIN)


def _read_biases(keys: Keys, fields: dict[str, Any]) -> None:
    fields["qkv_bias"] = fields["o_bias"] = keys.flag("attention_bias")


BIASES = Rule(_read_biases, lambda cfg, out: out.update(attention_bias=cfg.qkv_bias))


def _read_residual(keys: Keys, fields: dict[str, Any]) -> None:
    fields["residual"] = "parallel_neox" if keys.flag("use_parallel_residual") else "serial"


RESIDUAL_NEOX = Rule(_read_residual, lambda cfg, out: out.update(use_parallel_residual=cfg.residual == "parallel_neox"))


def _read_gemma_scales(keys: Keys, fields: dict[str, Any]) -> None:
    fields["attn_scale"] = keys.number("query_pre_attn_scalar") ** -0.5
    fields["embed_scale"] = fields["d_model"] ** 0.5


def _write_gemma_scales(cfg: Flat, out: dict[str, Any]) -> None:
    scalar = cfg.scale**-2
    whole = round(scalar) if scalar < MAX_SIZE else 0
    out["query_pre_attn_scalar"] = whole if math.isclose(whole, scalar, rel_tol=1e-9) else scalar


GEMMA_SCALES = Rule(_read_gemma_scales, _write_gemma_scales)


def _read_gemma2_caps(keys: Keys, fields: dict[str, Any]) -> None:
    fields["attn_soft_cap"] = keys.cap("attn_logit_softcapping")
    fields["logit_soft_cap"] = keys.cap("final_logit_softcapping")


def _read_gemma3_caps(keys: Keys, fields: dict[str, Any]) -> None:
    if keys.has("attn_logit_softcapping"):
        raise keys.refuse("attn_logit_softcapping", "gemma3 in transformers ignores it; set it to null.")
    fields["logit_soft_cap"] = keys.cap("final_logit_softcapping")


GEMMA2_CAPS = Rule(
    _read_gemma2_caps,
    lambda cfg, out: out.update(
        attn_logit_softcapping=cfg.attn_soft_cap or None, final_logit_softcapping=cfg.logit_soft_cap or None
    ),
)
GEMMA3_CAPS = Rule(_read_gemma3_caps, lambda cfg, out: out.update(final_logit_softcapping=cfg.logit_soft_cap or None))


# --- visibility ----------------------------------------------------------------------------------------


def _read_no_window(keys: Keys, fields: dict[str, Any]) -> None:
    if keys.raw.get("sliding_window"):
        raise keys.refuse("sliding_window", "transformers has no window in this architecture; set it to null.")


NO_WINDOW = Rule(_read_no_window, lambda cfg, out: None)


def _read_window_everywhere(keys: Keys, fields: dict[str, Any]) -> None:
    only = "full_attention" if keys.get("sliding_window") is None else "sliding_attention"
    if keys.has("layer_types") and set(_layer_types(keys, fields["n_layers"])) != {only}:
        raise keys.refuse("layer_types", f"sliding_window makes every layer of this architecture {only}.")
    fields["masks"] = (MaskConfig(window=0 if keys.get("sliding_window") is None else keys.integer("sliding_window")),)


WINDOW_EVERYWHERE = Rule(
    _read_window_everywhere, lambda cfg, out: out.update(sliding_window=cfg.mask(0).window or None)
)


def _layer_types(keys: Keys, n_layers: int) -> list[str]:
    value = keys.raw["layer_types"]
    if not isinstance(value, list) or len(value) != n_layers:
        raise keys.refuse("layer_types", f"it takes a list of {n_layers} names.")
    for name in value:
        if name not in ("full_attention", "sliding_attention"):
            raise keys.refuse("layer_types", "kvattn has full_attention and sliding_attention.")
    return value


def _layered(default: Callable[[Keys, int, int], bool]) -> Callable[[Keys, dict[str, Any]], None]:
    """Reads `layer_types`, or, where it is absent, asks `default(keys, layer, n_layers)`: does it slide?"""

    def read(keys: Keys, fields: dict[str, Any]) -> None:
        n = fields["n_layers"]
        if keys.has("layer_types"):
            slides = [kind == "sliding_attention" for kind in _layer_types(keys, n)]
        else:
            slides = [default(keys, layer, n) for layer in range(n)]
        window = keys.integer("sliding_window") if any(slides) else 0
        fields["masks"] = shortest([MaskConfig(window=window if slide else 0) for slide in slides])

    return read


def _write_layered(cfg: Flat, out: dict[str, Any]) -> None:
    windows = [cfg.mask(layer).window for layer in range(cfg.n_layers)]
    out["layer_types"] = ["sliding_attention" if window else "full_attention" for window in windows]
    out["sliding_window"] = max(windows) or None


def _qwen_slides(keys: Keys, layer: int, n_layers: int) -> bool:
    if not keys.flag("use_sliding_window") or keys.get("sliding_window") is None:
        return False
    first = keys.get("max_window_layers")
    if type(first) is not int or first < 0:
        raise keys.refuse("max_window_layers", "it takes an integer that is not negative.")
    return layer >= first


def _read_window_qwen(keys: Keys, fields: dict[str, Any]) -> None:
    if keys.has("layer_types") and "sliding_attention" in _layer_types(keys, fields["n_layers"]):
        if not keys.flag("use_sliding_window"):
            raise keys.refuse("use_sliding_window", "layer_types has sliding_attention, which needs it true.")
    _layered(_qwen_slides)(keys, fields)


def _write_window_qwen(cfg: Flat, out: dict[str, Any]) -> None:
    _write_layered(cfg, out)
    out["use_sliding_window"] = out["sliding_window"] is not None
    kinds = out["layer_types"]
    out["max_window_layers"] = kinds.index("sliding_attention") if out["use_sliding_window"] else cfg.n_layers


def _gemma3_slides(keys: Keys, layer: int, n_layers: int) -> bool:
    key = "_sliding_window_pattern" if "_sliding_window_pattern" in keys.raw else "sliding_window_pattern"
    return (layer + 1) % keys.integer(key) != 0


WINDOW_QWEN = Rule(_read_window_qwen, _write_window_qwen)
WINDOW_GEMMA2 = Rule(_layered(lambda keys, layer, n: layer % 2 == 0), _write_layered)
WINDOW_GEMMA3 = Rule(_layered(_gemma3_slides), _write_layered)
