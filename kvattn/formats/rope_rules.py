"""The rotary part of config.json, both directions: one `Rule` per spelling family.

`rope_theta` + `rope_scaling` is transformers 4, `rope_parameters` is transformers 5; gemma3 has one set for its
global and one for its sliding layers; gpt_neox names its keys `rotary_pct` and `rotary_emb_base`.
"""

import math
from typing import Any

from kvattn.config import RopeConfig, shortest
from kvattn.errors import UserError
from kvattn.formats.config_rules import ROPE_FIELDS, Keys, Rule
from kvattn.formats.flat import Flat

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings")
_ROPE_KEYS += ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "truncate")
_ROPE_KEYS += ("mscale", "mscale_all_dim")


def _rope_section(keys: Keys) -> tuple[str, dict[str, Any]]:
    """(key, value) of the rope section: `rope_scaling` of transformers 4 or `rope_parameters` of 5."""
    for key in ("rope_scaling", "rope_parameters"):
        value = keys.raw.get(key)
        if value is not None and not isinstance(value, dict):
            raise keys.refuse(key, "it takes an object.")
        if value:
            return key, value
    return "rope_parameters", {}


def _rope(keys: Keys, section: str, raw: dict[str, Any], theta: float, dim: int = 0) -> RopeConfig:
    """One RopeConfig from a rope section; `theta` where the section has none of its own."""
    inside = Keys(raw, {"rope_theta": theta}, f"{keys.where}{section}.")
    spelling = "rope_type" if inside.has("rope_type") else "type"
    kind = raw.get(spelling) or "default"
    if kind not in _ROPE_TYPES:
        raise inside.refuse(spelling, f"kvattn has {', '.join(_ROPE_TYPES)}.")
    for key, value in raw.items():
        if value is not None and key not in _ROPE_KEYS:
            raise inside.refuse(key, "kvattn does not express it.")
    out: dict[str, Any] = {"theta": inside.number("rope_theta"), "dim": dim}
    if out["theta"] <= 1:
        raise inside.refuse("rope_theta", "it must be more than 1.")
    if kind == "default":
        return RopeConfig(**out)
    out["scaling"] = kind
    if kind in ("llama3", "yarn"):
        outer = "original_max_position_embeddings"
        length = inside if inside.has(outer) and not keys.has(outer) else keys
        out["original_length"] = length.integer(outer if length.has(outer) else "max_position_embeddings")
    if kind == "yarn" and not inside.has("factor"):
        out["factor"] = keys.integer("max_position_embeddings") / out["original_length"]
    else:
        out["factor"] = inside.number("factor")
    if kind == "llama3":
        low, high = inside.number("low_freq_factor"), inside.number("high_freq_factor")
        if low >= high:
            raise inside.refuse("low_freq_factor", f"it must be less than high_freq_factor = {high}.")
        out |= {"low_freq_factor": low, "high_freq_factor": high}
    return RopeConfig(**out, **_yarn(inside, out)) if kind == "yarn" else RopeConfig(**out)


def _yarn(inside: Keys, out: dict[str, Any]) -> dict[str, Any]:
    """The yarn-only fields; an attention factor equal to the paper's is left to kvattn's default."""
    fast = inside.number("beta_fast") if inside.has("beta_fast") else 32.0
    slow = inside.number("beta_slow") if inside.has("beta_slow") else 1.0
    if fast <= slow or out["original_length"] <= 2 * math.pi * slow:
        raise inside.refuse("beta_slow", "it must be below beta_fast and leave a turn within the original length.")
    factor = 0.0
    if inside.has("attention_factor"):
        factor = inside.number("attention_factor")
    elif inside.has("mscale") and inside.has("mscale_all_dim"):
        scales = [inside.number(key) for key in ("mscale", "mscale_all_dim")]
        top, bottom = (0.1 * m * math.log(out["factor"]) + 1.0 if out["factor"] > 1 else 1.0 for m in scales)
        factor = top / bottom
    truncate = inside.flag("truncate") if inside.has("truncate") else True
    return {"beta_fast": fast, "beta_slow": slow, "attention_factor": factor, "truncate": truncate}


def _refuse_partial(keys: Keys, raw: dict[str, Any]) -> None:
    for where in (keys.raw, raw):
        if where.get("partial_rotary_factor") not in (None, 1, 1.0):
            value = str(where["partial_rotary_factor"])[:80]
            raise UserError(f"config.json: partial_rotary_factor is {value!r}; transformers has it for gpt_neox only.")


def _theta(keys: Keys, key: str, default: float) -> float:
    return keys.number(key) if keys.has(key) else default


def _read_rope(keys: Keys, fields: dict[str, Any]) -> None:
    section, raw = _rope_section(keys)
    _refuse_partial(keys, raw)
    fields["ropes"] = (_rope(keys, section, raw, _theta(keys, "rope_theta", 10000.0)),)


def _scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """`rope_scaling` of a RopeConfig in transformers 4 spelling."""
    if rope.scaling == "none":
        return None
    names = {"original_length": "original_max_position_embeddings"}
    out: dict[str, Any] = {"rope_type": rope.scaling}
    for field in ROPE_FIELDS[rope.scaling]:
        out[names.get(field, field)] = getattr(rope, field)
    if not out.get("attention_factor", 1):
        del out["attention_factor"]
    return out


def _write_rope(cfg: Flat, out: dict[str, Any]) -> None:
    rope = cfg.rope(0) or RopeConfig()
    out |= {"rope_theta": rope.theta, "rope_scaling": _scaling(rope)}


ROPE = Rule(_read_rope, _write_rope)


def _read_rope_gemma3(keys: Keys, fields: dict[str, Any]) -> None:
    """Global layers: `rope_theta` with `rope_scaling`; sliding layers: `rope_local_base_freq`, never scaled in
    transformers 4; both are sections of `rope_parameters` in transformers 5."""
    thetas = {
        "full_attention": _theta(keys, "rope_theta", 1_000_000.0),
        "sliding_attention": _theta(keys, "rope_local_base_freq", 10_000.0),
    }
    sections: dict[str, Any] = dict(keys.raw.get("rope_parameters") or {}) if _is_object(keys) else {}
    for key, value in sections.items():
        if key not in thetas or not isinstance(value, (dict, type(None))):
            raise UserError(
                f"config.json: rope_parameters.{key[:80]} is {str(value)[:80]!r}; gemma3 takes objects "
                f"named {' and '.join(thetas)}."
            )
    scaling = keys.raw.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, dict):
        raise keys.refuse("rope_scaling", "it takes an object.")
    ropes = {}
    for kind, theta in thetas.items():
        raw = dict(sections.get(kind) or {}) | (dict(scaling or {}) if kind == "full_attention" else {})
        _refuse_partial(keys, raw)
        if raw.get("truncate") is False:
            raise UserError("config.json: rope_parameters truncate is false; transformers ignores that for gemma3.")
        ropes[kind] = _rope(keys, f"rope_parameters.{kind}", raw, theta)
    n = fields["n_layers"]
    masks = [fields["masks"][layer % len(fields["masks"])] for layer in range(n)]
    fields["ropes"] = shortest([ropes["sliding_attention" if mask.window else "full_attention"] for mask in masks])


def _is_object(keys: Keys) -> bool:
    value = keys.raw.get("rope_parameters")
    if value is not None and not isinstance(value, dict):
        raise keys.refuse("rope_parameters", "it takes an object.")
    return True


def _write_rope_gemma3(cfg: Flat, out: dict[str, Any]) -> None:
    kinds = {bool(cfg.mask(layer).window): cfg.rope(layer) for layer in range(cfg.n_layers)}
    local, full = kinds.get(True) or RopeConfig(), kinds.get(False) or RopeConfig(theta=1_000_000.0)
    out |= {"rope_theta": full.theta, "rope_local_base_freq": local.theta, "rope_scaling": _scaling(full)}


ROPE_GEMMA3 = Rule(_read_rope_gemma3, _write_rope_gemma3)


def _read_rope_neox(keys: Keys, fields: dict[str, Any]) -> None:
    section, raw = _rope_section(keys)
    inside = Keys(raw, {}, f"{keys.where}{section}.")
    part = inside.number("partial_rotary_factor") if inside.has("partial_rotary_factor") else keys.number("rotary_pct")
    dim = int(fields["head_dim"] * part) if part <= 1 else 0
    if dim < 2 or dim % 2:
        raise keys.refuse("rotary_pct", f"it makes {dim} of {fields['head_dim']} dims rotary; that must be even.")
    rope = _rope(keys, section, raw, keys.number("rotary_emb_base"), 0 if dim == fields["head_dim"] else dim)
    fields["ropes"] = (rope,)


def _write_rope_neox(cfg: Flat, out: dict[str, Any]) -> None:
    rope = cfg.rope(0) or RopeConfig()
    part = (rope.dim or cfg.head_dim) / cfg.head_dim
    if int(cfg.head_dim * part) != (rope.dim or cfg.head_dim):  # rounding went down: transformers truncates
        part = math.nextafter(part, 2.0)
    out |= {"rotary_pct": part, "rotary_emb_base": rope.theta, "rope_scaling": _scaling(rope)}


ROPE_NEOX = Rule(_read_rope_neox, _write_rope_neox)
