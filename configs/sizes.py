"""Model sizes, a row each, with where the numbers come from. Weights are read elsewhere; these are shapes.

SIZES["llama3-8b"]        a ModelConfig
size("palm-540b", n_layers=8)   with some fields changed (the 8-layer latency runs of Pope et al.)
"""

from kvattn.attention.heads import heads_model
from kvattn.config import ModelConfig, RopeConfig
from kvattn.errors import UserError


def _model(W, D, L, N, K, H, F, length, theta=10000.0, **fields) -> ModelConfig:
    """Letters as in the design; K value heads too, V = H."""
    return heads_model(
        vocab_size=W,
        d_model=D,
        n_layers=L,
        n_heads=N,
        n_k_heads=K,
        n_v_heads=K,
        head_dim=H,
        v_head_dim=H,
        d_ff=F,
        max_length=length,
        **{"ropes": (RopeConfig(theta=theta),), **fields},
    )


def _llama3_rope(factor: float) -> tuple[RopeConfig, ...]:
    return (RopeConfig(theta=500000.0, scaling="llama3", factor=factor, original_length=8192),)


# Pope et al. 2211.05102, table 1: gated MLP, no biases, rotary, tied embeddings, one norm per parallel block.
_PALM = {"residual": "parallel_palm", "norm": "layernorm"}
# Biderman et al. 2304.01373: a quarter of the head rotates, two norms per parallel block, biases everywhere.
_PYTHIA = {
    "residual": "parallel_neox",
    "norm": "layernorm",
    "mlp": "gelu",
    "mlp_bias": True,
    "qkv_bias": True,
    "o_bias": True,
    "tied_embeddings": False,
}
# Brandon et al. 2405.12981, section 3: Llama-like, GPT-NeoX vocabulary, owners norm K/V's input apart.
_CLA = {"tied_embeddings": False, "kv_norm": True}

SIZES: dict[str, ModelConfig] = {
    # name                     W       D     L    N   K   H     F   length
    "tiny": _model(           258,    64,    4,   4,  2,  16,   176,   256),
    "small": _model(          258,   192,    6,   6,  6,  32,   512,   512),
    "smollm2-135m": _model( 49152,   576,   30,   9,  3,  64,  1536,  8192, 100000.0),
    "smollm2-360m": _model( 49152,   960,   32,  15,  5,  64,  2560,  8192, 100000.0),
    "smollm2-1.7b": _model( 49152,  2048,   24,  32, 32,  64,  8192,  8192, 130000.0),
    "llama2-7b": _model(    32000,  4096,   32,  32, 32, 128, 11008,  4096, tied_embeddings=False),
    "llama3-8b": _model(   128256,  4096,   32,  32,  8, 128, 14336,  8192, 500000.0, tied_embeddings=False),
    "llama3-70b": _model(  128256,  8192,   80,  64,  8, 128, 28672,  8192, 500000.0, tied_embeddings=False),
    "llama3.1-8b": _model( 128256,  4096,   32,  32,  8, 128, 14336, 131072,
                           ropes=_llama3_rope(8.0), tied_embeddings=False),
    "llama3.2-1b": _model( 128256,  2048,   16,  32,  8,  64,  8192, 131072, ropes=_llama3_rope(32.0)),
    "pythia-160m": _model(  50304,   768,   12,  12, 12,  64,  3072,  2048,
                           ropes=(RopeConfig(dim=16),), **_PYTHIA),
    "pythia-1b": _model(    50304,  2048,   16,   8,  8, 256,  8192,  2048,
                           ropes=(RopeConfig(dim=64),), **_PYTHIA),
    "cla-1b-mqa": _model(   50432,  2048,   20,  16,  1, 128,  5472,  2048, tied_embeddings=False),
    "cla-1b-mqa-cla2": _model(50432, 2048,  20,  16,  1, 128,  5472,  2048,
                           kv_source=tuple(l - l % 2 for l in range(20)), **_CLA),
    "palm-8b": _model(     256128,  4096,   32,  16,  1, 256, 16384,  2048, **_PALM),
    "palm-62b": _model(    256128,  8192,   64,  32,  1, 256, 32768,  2048, **_PALM),
    "palm-540b": _model(   256128, 18432,  118,  48,  1, 256, 73728,  2048, **_PALM),
}  # fmt: skip


def size(name: str, **changes) -> ModelConfig:
    """A row of SIZES with `changes` (ModelConfig.replace). Raises UserError for an unknown name."""
    if name not in SIZES:
        raise UserError(f"size is {name!r}; choose one of {', '.join(SIZES)}.")
    return SIZES[name].replace(**changes)


def named(name: str) -> tuple[str, ModelConfig]:
    """(name, row) of a name that may have underscores for other signs: smollm2_1_7b. Raises UserError as `size`."""
    plain = {row.replace("-", "_").replace(".", "_"): row for row in SIZES}
    row = plain.get(name.replace("-", "_").replace(".", "_"), name)
    return row, size(row)
