"""Makes tests/golden/hf: tiny random-weight models saved by transformers, and its logits.

    python tests/golden/make_hf_golden.py        # Python 3.11, torch 2.13.0, transformers 5.23.0; 20 seconds

Every case is one folder: what `save_pretrained` writes (config.json, safetensors in the case's dtype) and
`golden.npz` with `tokens` [T] and `logits` [T, W], a float32 eager forward of the weights as stored. Sizes differ
pairwise, windows and original context lengths are shorter than the text, weights are large enough for soft caps,
norms and scales to matter.
"""

import json
import math
import pathlib
import shutil

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent / "hf"
LENGTH = 29  # T
SIZES = {
    "vocab_size": 89,
    "hidden_size": 24,
    "intermediate_size": 31,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
NEOX_SIZES = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"} | {"num_attention_heads": 3}
VISION = {"hidden_size": 6, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 8, "patch_size": 4, "vision_use_head": False}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 300.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 300.0}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}


def plain(theta: float) -> dict:
    return {"rope_type": "default", "rope_theta": theta}


# name: (config class, model class, dtype of the file, changes to SIZES)
CASES = {
    "llama_tied": (
        "Llama",
        "ForCausalLM",
        torch.float32,
        {"tie_word_embeddings": True, "rope_parameters": plain(50.0)},
    ),
    "llama_llama3_biases": (
        "Llama",
        "ForCausalLM",
        torch.float16,
        {"attention_bias": True, "mlp_bias": True, "head_dim": 10, "rope_parameters": LLAMA3},
    ),
    "llama_yarn_gelu": (
        "Llama",
        "ForCausalLM",
        torch.bfloat16,
        {"hidden_act": "gelu", "num_key_value_heads": 1, "head_dim": 16, "rope_parameters": YARN},
    ),
    "llama_yarn_mscale": (
        "Llama",
        "ForCausalLM",
        torch.float16,
        {
            "head_dim": 16,
            "rope_parameters": YARN
            | {"mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 1.2, "beta_slow": 0.5, "truncate": False},
        },
    ),
    "llama_linear_sharded": (
        "Llama",
        "ForCausalLM",
        torch.float16,
        {"num_hidden_layers": 3, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0}},
    ),
    "mistral_window": (
        "Mistral",
        "ForCausalLM",
        torch.bfloat16,
        {"sliding_window": 7, "head_dim": 10, "num_hidden_layers": 3, "rope_parameters": plain(50.0)},
    ),
    "qwen2": ("Qwen2", "ForCausalLM", torch.float16, {"tie_word_embeddings": True, "rope_parameters": plain(50.0)}),
    "qwen2_window": (
        "Qwen2",
        "ForCausalLM",
        torch.float16,
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
            "rope_parameters": plain(50.0),
        },
    ),
    "qwen3": (
        "Qwen3",
        "ForCausalLM",
        torch.bfloat16,
        {
            "head_dim": 10,
            "hidden_size": 26,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "num_hidden_layers": 3,
            "rope_parameters": plain(50.0),
        },
    ),
    "qwen3_biases": (
        "Qwen3",
        "ForCausalLM",
        torch.float16,
        {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": True, "rope_parameters": plain(50.0)},
    ),
    "gemma2": (
        "Gemma2",
        "ForCausalLM",
        torch.bfloat16,
        {
            "head_dim": 10,
            "query_pre_attn_scalar": 13,
            "sliding_window": 7,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
            "num_hidden_layers": 3,
            "rope_parameters": plain(50.0),
        },
    ),
    "gemma3_text": (
        "Gemma3Text",
        "ForCausalLM",
        torch.bfloat16,
        {
            "head_dim": 10,
            "query_pre_attn_scalar": 13,
            "sliding_window": 5,
            "sliding_window_pattern": 3,
            "final_logit_softcapping": 6.0,
            "num_hidden_layers": 4,
            "rope_parameters": GEMMA3_ROPE,
        },
    ),
    "gemma3_vision": (
        "Gemma3",
        "ForConditionalGeneration",
        torch.float16,
        {
            "head_dim": 10,
            "query_pre_attn_scalar": 10,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": GEMMA3_ROPE,
        },
    ),
    "olmo2": ("Olmo2", "ForCausalLM", torch.float16, {"rope_parameters": plain(50.0)}),
    "neox_parallel": (
        "GPTNeoX",
        "ForCausalLM",
        torch.float16,
        {"rope_parameters": plain(50.0) | {"partial_rotary_factor": 0.25}, "use_parallel_residual": True},
    ),
    "neox_serial": (
        "GPTNeoX",
        "ForCausalLM",
        torch.float32,
        {
            "rope_parameters": plain(50.0) | {"partial_rotary_factor": 0.8},
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_new",
            "tie_word_embeddings": True,
        },
    ),
}


def build(name: str) -> torch.nn.Module:
    """The case's model in float32 with weights already rounded to the dtype they are stored in."""
    kind, suffix, dtype, changes = CASES[name]
    sizes = NEOX_SIZES if kind == "GPTNeoX" else SIZES
    if kind == "Gemma3":
        config = transformers.Gemma3Config(
            text_config=sizes | changes,
            vision_config=VISION,
            mm_tokens_per_image=4,
            image_token_index=88,
            boi_token_index=87,
            eoi_token_index=86,
        )
    else:
        config = getattr(transformers, f"{kind}Config")(**(sizes | changes))
    config._attn_implementation = "eager"
    model_name = kind.replace("Text", "") + suffix
    model = getattr(transformers, model_name)(config).eval()
    random = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=random)
            if value.ndim == 1:
                centre = 1.0 if key.endswith("weight") and "emma" not in kind else 0.0
                value.copy_((centre + 0.3 * noise).to(dtype))
            else:
                scale = 0.5 if "embed" in key else 1.5 / math.sqrt(value.shape[-1])
                value.copy_((scale * noise).to(dtype))
    return model


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0].float().numpy()


def make(name: str) -> None:
    model = build(name)
    vocab = model.get_input_embeddings().weight.shape[0]
    tokens = np.random.default_rng(len(name)).integers(0, min(vocab, 86), LENGTH, dtype=np.int64)
    logits = logits_of(model, tokens)
    folder = HERE / name
    limit = "17KB" if name.endswith("sharded") else "5GB"
    model.to(CASES[name][2]).save_pretrained(folder, max_shard_size=limit)
    (folder / "generation_config.json").unlink(missing_ok=True)
    again = type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    difference = np.abs(logits_of(again, tokens) - logits).max()
    assert difference < 1e-5, (name, difference)
    np.savez_compressed(folder / "golden.npz", tokens=tokens.astype(np.int32), logits=logits)
    print(f"{name:24} logits std {logits.std():.3f}, reload differs by {difference:.1e}")


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    for name in CASES:
        make(name)
    made = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    (HERE / "made.json").write_text(json.dumps(made, indent=2) + "\n")
    total = sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file())
    print(f"{total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
