"""Logical axis rules: tables from axis names to mesh axes.

Parameters and activations are named apart (`embed` is a weight's D, `act_embed` an activation's). A name
that a table does not know, or two dims of one array on the same mesh axis, raises: nothing is replicated
by accident. RULES are the training tables; `sharding.layout.torus_layouts` makes the decode tables of Pope et al.
"""

from collections.abc import Mapping

Rules = Mapping[str, str | tuple[str, ...] | None]


class ShardingError(ValueError):
    """A layout that cannot be: one sentence naming the axis, the value and the fix."""


_TRAINING = {
    # parameters
    "layers": None,
    "norm": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "q_heads": "tensor",
    "k_heads": "tensor",
    "v_heads": "tensor",
    "head_dim": None,
    "value_dim": None,
    "latent": None,
    "mlp": "tensor",
    # activations: the residual stream (res_), inside a block (act_), the K and V projections (k_, v_)
    "res_batch": ("data", "fsdp"),
    "res_embed": None,
    "act_batch": ("data", "fsdp"),
    "act_length": None,
    "act_embed": None,
    "act_mlp": "tensor",
    "act_q_heads": "tensor",
    "act_head_dim": None,
    "logit_batch": ("data", "fsdp"),
    "logit_embed": None,
    "act_vocab": "tensor",
    "k_batch": ("data", "fsdp"),
    "v_batch": ("data", "fsdp"),
    "act_k_heads": "tensor",
    "act_v_heads": "tensor",
    # attention, over a cache (attn_) and inside the tokens of one pass (fresh_)
    "attn_batch": ("data", "fsdp"),
    "attn_heads": "tensor",
    "attn_out_heads": "tensor",
    "fresh_batch": ("data", "fsdp"),
    "fresh_heads": "tensor",
    "fresh_k_heads": "tensor",
    "fresh_v_heads": "tensor",
    # caches
    "cache_batch": ("data", "fsdp"),
    "cache_heads": "tensor",
    "cache_length": None,
    "cache_dim": None,
}

_KV_REPLICATED = ("k_heads", "v_heads", "act_k_heads", "act_v_heads", "fresh_k_heads", "fresh_v_heads", "cache_heads")

RULES: dict[str, Rules] = {
    # data parallel x ZeRO-3 over D x Megatron tensor parallel over heads, MLP width and vocabulary
    "fsdp_tp": _TRAINING,
    # the same with K and V heads whole on every tensor shard: for fewer KV heads than the tensor axis has chips
    "fsdp_tp_kv_replicated": {**_TRAINING, **dict.fromkeys(_KV_REPLICATED)},
}


def mesh_axes(rules: Rules, name: str) -> tuple[str, ...]:
    """The mesh axes of a logical axis, major first. Raises ShardingError for a name the table lacks."""
    if name not in rules:
        raise ShardingError(f"logical axis {name!r} is in no row of the rule table; add it or fix the name.")
    target = rules[name]
    return () if target is None else (target,) if isinstance(target, str) else tuple(target)
