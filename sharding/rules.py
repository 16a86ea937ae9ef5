"""Logical axis rules: tables from axis names to mesh axes.

Parameters and activations are named apart (`embed` is a weight's D, `act_embed` an activation's). A name
that a table does not know, or two dims of one array on the same mesh axis, raises: nothing is replicated
by accident.
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
    "mlp": "tensor",
    # activations
    "act_batch": ("data", "fsdp"),
    "act_length": None,
    "act_embed": None,
    "act_q_heads": "tensor",
    "act_head_dim": None,
    "act_vocab": "tensor",
    # caches
    "cache_batch": ("data", "fsdp"),
    "cache_heads": "tensor",
    "cache_length": None,
    "cache_dim": None,
}

RULES: dict[str, Rules] = {
    # data parallel x ZeRO-3 over D x Megatron tensor parallel over heads, MLP width and vocabulary
    "fsdp_tp": _TRAINING,
    # the same with K and V heads whole on every tensor shard: for fewer KV heads than the tensor axis has chips
    "fsdp_tp_kv_replicated": {**_TRAINING, "k_heads": None, "v_heads": None, "cache_heads": None},
}
