"""Hugging Face architectures as a table: what config.json says, and which tensor is which parameter.

Each `Architecture` is one row. Its plain keys, its rules (`(read, write)` pairs, see config_rules.py) and its
tensor rows serve both directions, so `read_config(write_config(cfg)) == cfg` is how an export is known to
be exact: an architecture expresses a config when the config survives the round trip.

Keys are read in the spelling of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and of
transformers 5 (`rope_parameters`, `dtype`, `layer_types`), and written in the first, which both understand.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from kvattn import config as config_lib
from kvattn.attention.heads import heads_model
from kvattn.config import ModelConfig
from kvattn.errors import UserError
from kvattn.formats import config_rules as rules
from kvattn.formats import rope_rules as ropes
from kvattn.formats.config_rules import Keys, Rule
from kvattn.formats.flat import TYPES, flat


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a layer (or of the model) and the parameters it holds. `{}` in a name is the layer.

    `transform` is a key of tensor_names.TRANSFORMS; `names` lists spellings, the one to write first.
    """

    names: tuple[str, ...]
    paths: tuple[tuple[str, ...], ...]
    transform: str


@dataclasses.dataclass(frozen=True)
class Architecture:
    """`fixed`: fields of `heads_model` every such model has. `keys`: config key -> field, copied.
    `defaults`: what transformers takes for a key that config.json leaves out."""

    model_type: str
    class_name: str
    fixed: dict[str, Any]
    keys: dict[str, str]
    rules: tuple[Rule, ...]
    defaults: dict[str, Any]
    model_rows: tuple[Row, ...]
    layer_rows: tuple[Row, ...]


def _row(name: str, path: str, transform: str) -> Row:
    return Row((name,), (tuple(path.split(".")),), transform)


SIZES = {"vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "n_layers"}
SIZES |= {"num_attention_heads": "n_heads", "intermediate_size": "d_ff", "max_position_embeddings": "max_length"}
KEYS = SIZES | {"tie_word_embeddings": "tied_embeddings", "rms_norm_eps": "norm_eps"}

MODEL_ROWS = (
    _row("model.embed_tokens.weight", "embed.table", "same"),
    _row("model.norm.weight", "final_norm.scale", "flat"),
    _row("lm_head.weight", "unembed.table", "inward"),
)
PROJECTION_ROWS = (
    _row("model.layers.{}.self_attn.q_proj.weight", "attn.q", "inward"),
    _row("model.layers.{}.self_attn.k_proj.weight", "attn.k", "inward"),
    _row("model.layers.{}.self_attn.v_proj.weight", "attn.v", "inward"),
    _row("model.layers.{}.self_attn.o_proj.weight", "attn.o", "outward"),
    _row("model.layers.{}.self_attn.q_proj.bias", "attn.q_bias", "flat"),
    _row("model.layers.{}.self_attn.k_proj.bias", "attn.k_bias", "flat"),
    _row("model.layers.{}.self_attn.v_proj.bias", "attn.v_bias", "flat"),
    _row("model.layers.{}.self_attn.o_proj.bias", "attn.o_bias", "flat"),
    _row("model.layers.{}.self_attn.q_norm.weight", "attn.q_norm.scale", "flat"),
    _row("model.layers.{}.self_attn.k_norm.weight", "attn.k_norm.scale", "flat"),
    _row("model.layers.{}.mlp.gate_proj.weight", "mlp.gate", "inward"),
    _row("model.layers.{}.mlp.up_proj.weight", "mlp.up", "inward"),
    _row("model.layers.{}.mlp.down_proj.weight", "mlp.down", "inward"),
    _row("model.layers.{}.mlp.gate_proj.bias", "mlp.gate_bias", "flat"),
    _row("model.layers.{}.mlp.up_proj.bias", "mlp.up_bias", "flat"),
    _row("model.layers.{}.mlp.down_proj.bias", "mlp.down_bias", "flat"),
)


def _norm_rows(**names: str) -> tuple[Row, ...]:
    return tuple(_row(f"model.layers.{{}}.{theirs}.weight", f"{ours}.scale", "flat") for ours, theirs in names.items())


PRE_ROWS = _norm_rows(attn_norm="input_layernorm", mlp_norm="post_attention_layernorm") + PROJECTION_ROWS
POST_ROWS = (
    _norm_rows(attn_post_norm="post_attention_layernorm", mlp_post_norm="post_feedforward_layernorm") + PROJECTION_ROWS
)
SANDWICH_ROWS = _norm_rows(attn_norm="input_layernorm", mlp_norm="pre_feedforward_layernorm") + POST_ROWS

NEOX_MODEL_ROWS = (
    _row("gpt_neox.embed_in.weight", "embed.table", "same"),
    _row("gpt_neox.final_layer_norm.weight", "final_norm.scale", "flat"),
    _row("gpt_neox.final_layer_norm.bias", "final_norm.bias", "flat"),
    Row(("embed_out.weight", "lm_head.weight"), (("unembed", "table"),), "inward"),
)
_NEOX = "gpt_neox.layers.{}."
NEOX_ROWS = (
    _row(_NEOX + "input_layernorm.weight", "attn_norm.scale", "flat"),
    _row(_NEOX + "input_layernorm.bias", "attn_norm.bias", "flat"),
    _row(_NEOX + "post_attention_layernorm.weight", "mlp_norm.scale", "flat"),
    _row(_NEOX + "post_attention_layernorm.bias", "mlp_norm.bias", "flat"),
    Row((_NEOX + "attention.query_key_value.weight",), (("attn", "q"), ("attn", "k"), ("attn", "v")), "interleaved"),
    Row(
        (_NEOX + "attention.query_key_value.bias",),
        (("attn", "q_bias"), ("attn", "k_bias"), ("attn", "v_bias")),
        "interleaved_bias",
    ),
    _row(_NEOX + "attention.dense.weight", "attn.o", "outward"),
    _row(_NEOX + "attention.dense.bias", "attn.o_bias", "flat"),
    _row(_NEOX + "mlp.dense_h_to_4h.weight", "mlp.up", "inward"),
    _row(_NEOX + "mlp.dense_h_to_4h.bias", "mlp.up_bias", "flat"),
    _row(_NEOX + "mlp.dense_4h_to_h.weight", "mlp.down", "inward"),
    _row(_NEOX + "mlp.dense_4h_to_h.bias", "mlp.down_bias", "flat"),
)

# Tensors that older checkpoints store and no computation reads: rotary tables and causal masks.
BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")
# Parts of a gemma3 checkpoint that text never reaches.
VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")

_GEMMA_FIXED = {"norm_placement": "both", "norm_offset": 1.0}
_COMMON = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "attention_bias": False, "hidden_act": "silu"}
_QWEN = _COMMON | {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
_GEMMA = _COMMON | {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256}
_GEMMA |= {"query_pre_attn_scalar": 256, "sliding_window": 4096, "num_key_value_heads": 4}
_GEMMA3_SIZES = {"vocab_size": 262208, "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8}
_GEMMA3_SIZES |= {"intermediate_size": 9216, "max_position_embeddings": 131072}

ARCHITECTURES: dict[str, Architecture] = {
    a.model_type: a
    for a in (
        Architecture(
            "llama",
            "LlamaForCausalLM",
            {},
            KEYS | {"mlp_bias": "mlp_bias"},
            (rules.HEADS_D_MULTIPLE, rules.ACTIVATION, rules.BIASES, rules.NO_WINDOW, ropes.ROPE),
            _COMMON | {"mlp_bias": False},
            MODEL_ROWS,
            PRE_ROWS,
        ),
        Architecture(
            "mistral",
            "MistralForCausalLM",
            {},
            KEYS,
            (rules.HEADS, rules.ACTIVATION, rules.WINDOW_EVERYWHERE, ropes.ROPE),
            _COMMON | {"sliding_window": 4096, "num_key_value_heads": 8},
            MODEL_ROWS,
            PRE_ROWS,
        ),
        Architecture(
            "qwen2",
            "Qwen2ForCausalLM",
            {"qkv_bias": True},
            KEYS,
            (rules.HEADS, rules.ACTIVATION, rules.WINDOW_QWEN, ropes.ROPE),
            _QWEN | {"num_key_value_heads": 32},
            MODEL_ROWS,
            PRE_ROWS,
        ),
        Architecture(
            "qwen3",
            "Qwen3ForCausalLM",
            {"qk_norm": "head"},
            KEYS,
            (rules.HEADS, rules.ACTIVATION, rules.BIASES, rules.WINDOW_QWEN, ropes.ROPE),
            _QWEN | {"num_key_value_heads": 32, "head_dim": 128},
            MODEL_ROWS,
            PRE_ROWS,
        ),
        Architecture(
            "gemma2",
            "Gemma2ForCausalLM",
            _GEMMA_FIXED,
            KEYS,
            (rules.HEADS_D_MULTIPLE, rules.GEMMA_ACTIVATION, rules.BIASES, rules.GEMMA_SCALES, rules.GEMMA2_CAPS)
            + (rules.WINDOW_GEMMA2, ropes.ROPE),
            _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            MODEL_ROWS,
            SANDWICH_ROWS,
        ),
        Architecture(
            "gemma3_text",
            "Gemma3ForCausalLM",
            _GEMMA_FIXED | {"qk_norm": "head"},
            KEYS,
            (rules.HEADS_D_MULTIPLE, rules.GEMMA_ACTIVATION, rules.BIASES, rules.GEMMA_SCALES, rules.GEMMA3_CAPS)
            + (rules.WINDOW_GEMMA3, ropes.ROPE_GEMMA3),
            _GEMMA | _GEMMA3_SIZES | {"final_logit_softcapping": None, "sliding_window_pattern": 6},
            MODEL_ROWS,
            SANDWICH_ROWS,
        ),
        Architecture(
            "olmo2",
            "Olmo2ForCausalLM",
            {"norm_placement": "post", "qk_norm": "full"},
            KEYS,
            (rules.HEADS, rules.ACTIVATION, rules.BIASES, rules.NO_WINDOW, ropes.ROPE),
            _COMMON | {"rms_norm_eps": 1e-5},
            MODEL_ROWS,
            POST_ROWS,
        ),
        Architecture(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            {"norm": "layernorm", "mlp_bias": True},
            SIZES | {"tie_word_embeddings": "tied_embeddings", "layer_norm_eps": "norm_eps"},
            (rules.HEADS_NEOX, rules.PLAIN_ACTIVATION, rules.BIASES, rules.RESIDUAL_NEOX)
            + (rules.NO_WINDOW, ropes.ROPE_NEOX),
            {"tie_word_embeddings": False, "layer_norm_eps": 1e-5, "attention_bias": True, "hidden_act": "gelu"}
            | {"use_parallel_residual": True, "rotary_pct": 0.25, "rotary_emb_base": 10000.0},
            NEOX_MODEL_ROWS,
            NEOX_ROWS,
        ),
    )
}


def find(raw: dict[str, Any]) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of a config.json and the keys of its text part (gemma3 keeps them in `text_config`).

    Raises UserError for an unknown or missing `model_type`.
    """
    kind = raw.get("model_type")
    if kind == "gemma3":
        text = raw.get("text_config")
        if not isinstance(text, dict):
            raise UserError("config.json: text_config is missing from a gemma3 checkpoint; fetch config.json again.")
        inherited = {k: raw[k] for k in ("tie_word_embeddings", "quantization_config", "auto_map") if k in raw}
        return ARCHITECTURES["gemma3_text"], inherited | text
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = ", ".join(sorted([*ARCHITECTURES, "gemma3"]))
        raise UserError(f"config.json: model_type is {str(kind)[:80]!r}; kvattn reads {known}.")
    return ARCHITECTURES[kind], raw


def read_config(raw: dict[str, Any]) -> tuple[Architecture, ModelConfig]:
    """The architecture and the validated ModelConfig of a config.json.

    Raises UserError naming the config key and its value when it is malformed or changes the computation in
    a way kvattn does not express.
    """
    arch, raw = find(raw)
    rules.refuse_foreign(raw)
    keys = Keys(raw, arch.defaults)
    fields: dict[str, Any] = dict(arch.fixed)
    for key, field in arch.keys.items():
        fields[field] = keys.typed(key, TYPES[field])
    for rule in arch.rules:
        rule.read(keys, fields)
    cfg = rules.canonical(heads_model(**fields))
    try:
        config_lib.validate(cfg)
    except UserError as error:
        raise UserError(f"config.json ({arch.model_type}) describes no legal model: {error}") from error
    return arch, cfg


def write_config(arch: Architecture, cfg: ModelConfig) -> dict[str, Any]:
    """The config.json of `cfg` as `arch` would say it; faithful only if `read_config` gives `cfg` back. Raises
    UserError for a model that has no flat form."""
    view = flat(cfg)
    out: dict[str, Any] = {"architectures": [arch.class_name], "model_type": arch.model_type}
    for key, field in arch.keys.items():
        out[key] = getattr(view, field)
    for rule in arch.rules:
        rule.write(view, out)
    return out


def tensor_rows(arch: Architecture, n_layers: int) -> Iterator[tuple[tuple[str, ...], tuple[tuple, ...], str]]:
    """(tensor names, parameter paths, transform) for every tensor the architecture could have, layer by layer."""
    for row in arch.model_rows:
        yield row.names, row.paths, row.transform
    for layer in range(n_layers):
        for row in arch.layer_rows:
            names = tuple(name.format(layer) for name in row.names)
            yield names, tuple(("layers", layer, *path) for path in row.paths), row.transform
