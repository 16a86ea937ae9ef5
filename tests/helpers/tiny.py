"""Tiny models: pairwise different sizes, so that two mixed-up dimensions cannot cancel.

`config(**changes)` is the base model with some fields changed; `CASES` names one model per value of every
axis, and the combinations in which two axes meet in the same lines of code.
"""

from kvattn.attention.heads import heads_model
from kvattn.config import MaskConfig, ModelConfig, RopeConfig

# D, N, K, M, H, V, F, L, W; N is a multiple of K and M (GQA 6 -> 3 keys, 2 values in the uneven case).
BASE = heads_model(
    vocab_size=61,
    d_model=28,
    n_layers=4,
    n_heads=6,
    n_k_heads=3,
    n_v_heads=3,
    head_dim=10,
    v_head_dim=14,
    d_ff=37,
    max_length=128,
    ropes=(RopeConfig(theta=100.0),),
)

WINDOW = MaskConfig(window=5)
SINKS = MaskConfig(window=5, sinks=2)


def config(**changes) -> ModelConfig:
    """The base model (GQA 6/3, 4 layers) with `changes` (ModelConfig.replace): fields of the model, fields of Heads in
    all layers, patterns `masks` and `ropes`. Raises TypeError for an unknown field."""
    return BASE.replace(**changes)


CASES: dict[str, ModelConfig] = {
    # axis A: heads
    "gqa": BASE,
    "mha": config(n_k_heads=6, n_v_heads=6),
    "mqa": config(n_k_heads=1, n_v_heads=1),
    "uneven_kv": config(n_k_heads=2, n_v_heads=6),
    "tied_kv": config(tied_kv=True, v_head_dim=10),
    # axis B: sharing
    "cla2": config(kv_source=(0, 0, 2, 2)),
    "cla2_norm": config(kv_source=(0, 0, 2, 2), kv_norm=True),
    "cla3": config(n_layers=5, kv_source=(0, 0, 0, 3, 3)),
    "mlkv1": config(kv_source=(0, 0, 0, 0)),
    "first_half": config(kv_source=(0, 1, 1, 1)),
    # axis C: visibility
    "window": config(masks=(WINDOW,)),
    "window_sinks": config(masks=(SINKS,)),
    "pattern": config(masks=(SINKS, SINKS, MaskConfig())),
    # A x B x C together
    "mqa_cla2": config(n_k_heads=1, n_v_heads=1, kv_source=(0, 0, 2, 2)),
    "mqa_cla2_pattern": config(
        n_k_heads=1, n_v_heads=1, kv_source=(0, 0, 2, 2), masks=(SINKS, SINKS, MaskConfig(), MaskConfig())
    ),
    "uneven_cla2_window": config(n_k_heads=2, n_v_heads=6, kv_source=(0, 0, 2, 2), masks=(WINDOW,)),
    # attention details
    "partial_rotary": config(ropes=(RopeConfig(theta=100.0, dim=4),)),
    "rope_linear": config(ropes=(RopeConfig(theta=100.0, scaling="linear", factor=3.0),)),
    "rope_llama3": config(ropes=(RopeConfig(theta=100.0, scaling="llama3", factor=8.0, original_length=32),)),
    "rope_yarn": config(ropes=(RopeConfig(theta=100.0, scaling="yarn", factor=4.0, original_length=32),)),
    "rope_pattern": config(ropes=(RopeConfig(theta=100.0), None)),
    "qk_norm_head": config(qk_norm="head"),
    "qk_norm_full": config(qk_norm="full"),
    "soft_caps": config(attn_soft_cap=5.0, logit_soft_cap=7.0),
    "biases": config(qkv_bias=True, o_bias=True, mlp_bias=True),
    # blocks
    "llama": config(mlp="swiglu", tied_embeddings=False),
    "palm": config(n_k_heads=1, n_v_heads=1, residual="parallel_palm", norm="layernorm"),
    "neox": config(
        n_k_heads=6,
        n_v_heads=6,
        residual="parallel_neox",
        norm="layernorm",
        mlp="gelu",
        mlp_bias=True,
        qkv_bias=True,
        o_bias=True,
        tied_embeddings=False,
        ropes=(RopeConfig(theta=100.0, dim=4),),
    ),
    "gemma2": config(
        norm_placement="both",
        norm_offset=1.0,
        mlp="geglu_tanh",
        embed_scale=28**0.5,
        attn_soft_cap=50.0,
        logit_soft_cap=30.0,
        masks=(WINDOW, MaskConfig()),
    ),
    "olmo2": config(norm_placement="post", qk_norm="full", tied_embeddings=False),
    # execution
    "scan": config(scan_layers=True),
    "remat": config(remat="full"),
}
