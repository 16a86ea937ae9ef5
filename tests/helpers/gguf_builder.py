"""Small GGUF files for tests, written with the `gguf` library from parameters in kvattn's own layout.

`export` is llama.cpp's conversion in the forward direction (its `permute` included), so the reader is checked
against the writer that real files come from, not against itself.
"""

import os
from typing import Any

import gguf
import numpy as np

from kvattn.attention.heads import heads_model
from kvattn.config import ModelConfig, RopeConfig
from kvattn.formats.flat import flat

# D, N, K, H, V, F, L, W; D and F are multiples of no quantisation block on purpose
SMALL = heads_model(
    vocab_size=71,
    d_model=28,
    n_layers=3,
    n_heads=6,
    n_k_heads=3,
    n_v_heads=3,
    head_dim=10,
    v_head_dim=14,
    d_ff=37,
    max_length=128,
    ropes=(RopeConfig(theta=100.0),),
    tied_embeddings=False,
    norm_eps=0.5,
)


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf: rows of half-split heads to rows of interleaved heads."""
    split = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def export(params: Any, cfg: ModelConfig, interleaved: bool = True) -> dict[str, np.ndarray]:
    """Parameters as GGUF tensors in NumPy order ([out, in] matrices)."""
    cfg = flat(cfg)
    turn = permute if interleaved else lambda weights, heads: weights
    array = lambda x: np.asarray(x, np.float32)  # noqa: E731
    rows = lambda x: array(x).reshape(cfg.d_model, -1).T  # noqa: E731
    out = {
        "token_embd.weight": array(params["embed"]["table"]),
        "output_norm.weight": array(params["final_norm"]["scale"]),
    }
    if not cfg.tied_embeddings:
        out["output.weight"] = rows(params["unembed"]["table"])
    for layer, p in enumerate(params["layers"]):
        attn, mlp, pre = p["attn"], p["mlp"], f"blk.{layer}."
        out |= {
            pre + "attn_norm.weight": array(p["attn_norm"]["scale"]),
            pre + "attn_q.weight": turn(rows(attn["q"]), cfg.n_heads),
            pre + "attn_k.weight": turn(rows(attn["k"]), cfg.n_k_heads),
            pre + "attn_v.weight": rows(attn["v"]),
            pre + "attn_output.weight": array(attn["o"]).reshape(-1, cfg.d_model).T,
            pre + "ffn_norm.weight": array(p["mlp_norm"]["scale"]),
            pre + "ffn_gate.weight": rows(mlp["gate"]),
            pre + "ffn_up.weight": rows(mlp["up"]),
            pre + "ffn_down.weight": array(mlp["down"]).T,
        }
        if cfg.qkv_bias:
            out[pre + "attn_q.bias"] = turn(array(attn["q_bias"]).reshape(-1), cfg.n_heads)
            out[pre + "attn_k.bias"] = turn(array(attn["k_bias"]).reshape(-1), cfg.n_k_heads)
            out[pre + "attn_v.bias"] = array(attn["v_bias"]).reshape(-1)
        if cfg.o_bias:
            out[pre + "attn_output.bias"] = array(attn["o_bias"])
        if cfg.qk_norm == "head":
            out[pre + "attn_q_norm.weight"] = array(attn["q_norm"]["scale"])
            out[pre + "attn_k_norm.weight"] = array(attn["k_norm"]["scale"])
        for name in ("gate", "up", "down") if cfg.mlp_bias else ():
            out[f"{pre}ffn_{name}.bias"] = array(mlp[f"{name}_bias"])
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


def keys(cfg: ModelConfig, architecture: str = "llama") -> dict[str, Any]:
    """The metadata that describes `cfg`, key -> value."""
    pre, cfg = architecture + ".", flat(cfg)
    return {
        pre + "block_count": cfg.n_layers,
        pre + "context_length": cfg.max_length,
        pre + "embedding_length": cfg.d_model,
        pre + "feed_forward_length": cfg.d_ff,
        pre + "attention.head_count": cfg.n_heads,
        pre + "attention.head_count_kv": cfg.n_k_heads,
        pre + "attention.key_length": cfg.head_dim,
        pre + "attention.value_length": cfg.v_head_dim,
        pre + "attention.layer_norm_rms_epsilon": cfg.norm_eps,
        pre + "rope.dimension_count": cfg.ropes[0].dim or cfg.head_dim,
        pre + "rope.freq_base": cfg.ropes[0].theta,
        pre + "vocab_size": cfg.vocab_size,
    }


def byte_level_keys(tokens: list[str], merges: list[str], pre: str, special: tuple[str, ...] = ()) -> dict[str, Any]:
    """tokenizer.ggml.* of a byte-level BPE; `special` tokens are control tokens."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
    }


def write(path: str | os.PathLike, metadata: dict[str, Any], tensors: dict[str, Any], architecture="llama") -> str:
    """Writes a GGUF file. A tensor is a float32 array, or (gguf quantisation type, float32 array)."""
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            kind, array = value
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def sentencepiece_keys(tokens: list[str], scores: list[float], types: list[int]) -> dict[str, Any]:
    """tokenizer.ggml.* of a SentencePiece BPE with <unk>, <s>, </s> as ids 0, 1, 2."""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
