"""Hugging Face directories against what transformers computed (tests/golden/hf), published configs, round trips."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import cache, model, spec
from kvattn.attention import NoAttention
from kvattn.config import EXECUTION, CacheConfig, HeadGroup, MaskConfig, RopeConfig
from kvattn.errors import UserError
from kvattn.formats import architectures
from kvattn.formats import huggingface as hf
from kvattn.formats.flat import FIELDS, flat
from tests.helpers import tiny
from tests.helpers.models import run, tokens_of
from tests.helpers.paths import ROOT
from tests.helpers.tolerances import EXACT, F32_MODEL, HF_TINY, close

GOLDEN = ROOT / "tests" / "golden" / "hf"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
PROMPT = 11
KINDS = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_text", "olmo2", "gpt_neox"}


def golden_config(name):
    return json.loads((GOLDEN / name / "config.json").read_text())


@functools.cache
def golden(name):
    """(ModelConfig, params, tokens [1,T], logits [1,T,W])."""
    cfg, params, _ = hf.read(GOLDEN / name)
    with np.load(GOLDEN / name / "golden.npz") as file:
        return cfg, params, jnp.asarray(file["tokens"])[None], file["logits"][None]


@functools.partial(jax.jit, static_argnums=1)
def _every_way(params, cfg, tokens, *stores):
    """Logits of one forward, and of a prompt then token by token through each of the caches."""
    length = tokens.shape[1]

    def decoded(caches):
        prompt = model.Inputs(tokens[:, :PROMPT], empty=True)
        first, caches = model.forward(params, cfg, prompt, caches=caches)

        def step(caches, t):
            token = jax.lax.dynamic_slice_in_dim(tokens, t, 1, 1)
            position = jnp.full((1, 1), t, jnp.int32)
            out, caches = model.forward(params, cfg, model.Inputs(token, position), caches=caches)
            return caches, out.logits[:, 0]

        _, rest = jax.lax.scan(step, caches, jnp.arange(PROMPT, length, dtype=jnp.int32))
        return jnp.concatenate([first.logits, rest.swapaxes(0, 1)], 1)

    return model.forward(params, cfg, model.Inputs(tokens))[0].logits, *map(decoded, stores)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name):
    cfg, params, tokens, want = golden(name)
    length = tokens.shape[1]
    windows = [layer.mask.window for layer in cfg.every if layer.mask.window]
    kinds = ("full", "by_mask") if windows else ("full",)
    caches = [cache.create(cfg, CacheConfig((kind,)), 1, length) for kind in kinds]
    assert all(window < PROMPT for window in windows)
    assert len(caches) == 1 or cache.nbytes(caches[1]) < cache.nbytes(caches[0])
    for got, way in zip(_every_way(params, cfg, tokens, *caches), ("forward", *kinds)):
        close(got, want, HF_TINY, f"{name}, {way}")


def test_golden_covers_every_architecture():
    assert {golden_config(name)["model_type"] for name in CASES} == KINDS
    assert set(architectures.ARCHITECTURES) == KINDS - {"gemma3"}


# --- config.json -----------------------------------------------------------------------------------------


def _transformers4(raw):
    """A config.json of transformers 5 in the words of 4, written from its release notes, not from our reader."""
    raw = dict(raw)
    if raw["model_type"] == "gemma3":
        return raw | {"text_config": _transformers4(raw["text_config"])}
    raw["torch_dtype"] = raw.pop("dtype", "float32")
    ropes = raw.pop("rope_parameters")
    if raw["model_type"] == "gpt_neox":
        raw |= {"rotary_pct": ropes["partial_rotary_factor"], "rotary_emb_base": ropes["rope_theta"]}
        return raw
    if "full_attention" in ropes:
        raw["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        ropes = ropes["full_attention"]
    raw["rope_theta"] = ropes["rope_theta"]
    scaling = {k: v for k, v in ropes.items() if k != "rope_theta"}
    scaling["type"] = scaling.pop("rope_type")
    raw["rope_scaling"] = None if scaling["type"] == "default" else scaling
    return raw


@pytest.mark.parametrize("name", CASES)
def test_both_spellings_of_config_json_are_one_model(name):
    raw = golden_config(name)
    old = _transformers4(raw)
    assert "rope_parameters" not in json.dumps(old)
    assert architectures.read_config(old)[1] == architectures.read_config(raw)[1]


@pytest.mark.parametrize("name", ["qwen2_window", "gemma2", "gemma3_text"])
def test_layer_types_may_be_left_to_the_older_keys(name):
    raw = golden_config(name)
    old = {k: v for k, v in raw.items() if k not in ("layer_types", "_sliding_window_pattern")}
    old |= {"sliding_window_pattern": 3} if name == "gemma3_text" else {}
    assert architectures.read_config(old)[1] == architectures.read_config(raw)[1]


# config.json as published (shortened to what matters), the published number of parameters, and what must come out.
LLAMA3_SCALING = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}
LLAMA3_SCALING |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}
PUBLISHED = {
    "Llama-3.2-1B": (
        {"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192, "rms_norm_eps": 1e-5}
        | {"max_position_embeddings": 131072, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        | {"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING, "tie_word_embeddings": True},
        1_235_814_400,
        {"ropes": (RopeConfig(500000.0, scaling="llama3", factor=32.0, original_length=8192),), "norm_eps": 1e-5},
    ),
    "Mistral-7B-v0.1": (
        {"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "rms_norm_eps": 1e-5}
        | {"max_position_embeddings": 32768, "hidden_act": "silu", "rope_theta": 10000.0, "sliding_window": 4096},
        7_241_732_096,
        {"masks": (MaskConfig(window=4096),), "head_dim": 128, "tied_embeddings": False},
    ),
    "Qwen2.5-0.5B": (
        {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24}
        | {"max_window_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864}
        | {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "hidden_act": "silu", "rope_theta": 1000000.0}
        | {"sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": True, "use_mrope": False},
        494_032_768,
        {"qkv_bias": True, "o_bias": False, "masks": (MaskConfig(),)},
    ),
    "Qwen3-0.6B": (
        {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28, "head_dim": 128}
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072, "rms_norm_eps": 1e-6}
        | {"max_position_embeddings": 40960, "hidden_act": "silu", "rope_theta": 1000000, "rope_scaling": None}
        | {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 28, "tie_word_embeddings": True},
        596_049_920,
        {"qk_norm": "head", "qkv_bias": False, "ropes": (RopeConfig(1e6),)},
    ),
    "gemma-2-2b": (
        {"model_type": "gemma2", "vocab_size": 256000, "hidden_size": 2304, "num_hidden_layers": 26, "head_dim": 256}
        | {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 9216, "rms_norm_eps": 1e-6}
        | {"max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh", "rope_theta": 10000.0}
        | {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid"},
        2_614_341_888,
        {"masks": (MaskConfig(window=4096), MaskConfig()), "embed_scale": 48.0, "attn_scale": 0.0}
        | {"attn_soft_cap": 50.0, "logit_soft_cap": 30.0, "norm_offset": 1.0, "mlp": "geglu_tanh"},
    ),
    "gemma-3-4b (text)": (
        {"model_type": "gemma3", "vision_config": {"hidden_size": 1152}, "architectures": ["Gemma3"]}
        | {
            "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text"}
            | {"num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
        },
        3_880_263_168,
        {"masks": (MaskConfig(window=1024),) * 5 + (MaskConfig(),), "vocab_size": 262208}
        | {"ropes": (RopeConfig(1e4),) * 5 + (RopeConfig(1e6, scaling="linear", factor=8.0),), "qk_norm": "head"},
    ),
    "gemma-3-1b": (
        {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 1152, "num_hidden_layers": 26}
        | {"head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 1, "intermediate_size": 6912}
        | {"max_position_embeddings": 32768, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
        | {"rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_local_base_freq": 10000, "rope_scaling": None}
        | {"sliding_window": 512, "sliding_window_pattern": 6, "attn_logit_softcapping": None},
        999_885_952,
        {"masks": (MaskConfig(window=512),) * 5 + (MaskConfig(),)}
        | {"ropes": (RopeConfig(1e4),) * 5 + (RopeConfig(1e6),)},
    ),
    "OLMo-2-0425-1B": (
        {"model_type": "olmo2", "vocab_size": 100352, "hidden_size": 2048, "num_hidden_layers": 16}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 8192, "rms_norm_eps": 1e-6}
        | {"max_position_embeddings": 4096, "hidden_act": "silu", "rope_theta": 500000, "rope_scaling": None}
        | {"tie_word_embeddings": False, "attention_bias": False},
        1_484_916_736,
        {"norm_placement": "post", "qk_norm": "full", "n_k_heads": 16},
    ),
    "pythia-70m": (
        {"model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 512, "num_hidden_layers": 6}
        | {"num_attention_heads": 8, "intermediate_size": 2048, "layer_norm_eps": 1e-5, "hidden_act": "gelu"}
        | {"max_position_embeddings": 2048, "rotary_pct": 0.25, "rotary_emb_base": 10000}
        | {"use_parallel_residual": True, "tie_word_embeddings": False},
        70_426_624,
        {"residual": "parallel_neox", "ropes": (RopeConfig(1e4, dim=16),), "norm": "layernorm", "qkv_bias": True},
    ),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_configs_give_the_published_number_of_parameters(name):
    raw, count, fields = PUBLISHED[name]
    _, cfg = architectures.read_config(raw)
    assert spec.count(model.param_specs(cfg)) == count
    for field, want in fields.items():
        assert getattr(flat(cfg), field) == want, field


# --- writing ---------------------------------------------------------------------------------------------


def _same_params(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        close(x, y, EXACT)


@pytest.mark.parametrize("name", CASES)
def test_read_write_read_is_identical(name, tmp_path):
    cfg, params, _, _ = golden(name)
    sharded = name in ("olmo2", "neox_parallel")
    kind = hf.write(tmp_path / "out", cfg, params, shard_bytes=30_000 if sharded else 1 << 30)
    again, back, tokenizer = hf.read(tmp_path / "out")
    assert kind == {"gemma3": "gemma3_text"}.get(golden_config(name)["model_type"], golden_config(name)["model_type"])
    assert again == cfg and tokenizer is None
    _same_params(params, back)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert (len(shards) > 1) == sharded
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bfloat16_parameters_stay_bfloat16(tmp_path):
    cfg, params, _ = hf.read(GOLDEN / "gemma2", "bfloat16")
    hf.write(tmp_path / "out", cfg, params)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    _same_params(params, hf.read(tmp_path / "out", "bfloat16")[1])
    _same_params(golden("gemma2")[1], hf.read(tmp_path / "out")[1])  # the golden file is bfloat16: nothing was lost


square = functools.partial(tiny.config, v_head_dim=10, n_layers=2)


def random_params(cfg):
    """Random values in every leaf, norms and biases included, without compiling a generator per shape."""
    draw = np.random.default_rng(31).standard_normal
    specs = model.param_specs(cfg)
    return spec.map_specs(lambda s: jnp.asarray(draw(s.shape, np.float32) * (s.fan_in or 9) ** -0.5 + 0.1), specs)


EXPORTS = {
    "gqa": (square(), "mistral"),  # d_model is no multiple of n_heads, which llama in transformers wants
    "llama": (square(d_model=30), "llama"),
    "mqa": (square(d_model=30, n_k_heads=1, n_v_heads=1), "llama"),
    "uneven heads": (square(n_k_heads=2, n_v_heads=3), "mistral"),
    "uneven heads with biases": (square(d_model=30, n_k_heads=3, n_v_heads=1, qkv_bias=True, o_bias=True), "llama"),
    "uneven heads, full norms": (square(n_k_heads=2, n_v_heads=3, norm_placement="post", qk_norm="full"), "olmo2"),
    "tied K and V": (square(tied_kv=True, qkv_bias=True), "qwen2"),
    "window everywhere": (square(masks=(tiny.WINDOW,)), "mistral"),
    "window pattern": (square(masks=(tiny.WINDOW, MaskConfig())), "qwen2"),
    "window pattern, head norms": (square(masks=(tiny.WINDOW, MaskConfig()), qk_norm="head"), "qwen3"),
    "only an output bias": (square(d_model=30, o_bias=True), "llama"),
    "gqa pythia": (
        square(
            d_model=60,
            norm="layernorm",
            mlp="gelu",
            mlp_bias=True,
            ropes=(RopeConfig(50.0, 4),),
            residual="parallel_neox",
            n_k_heads=2,
        ),
        "gpt_neox",
    ),
    "scanned": (square(scan_layers=True), "mistral"),
}


@pytest.mark.parametrize("name", sorted(EXPORTS))
def test_export_computes_the_same_function(name, tmp_path):
    cfg, kind = EXPORTS[name]
    params, tokens = random_params(cfg), tokens_of(cfg)
    assert hf.write(tmp_path / "out", cfg, params) == kind
    again, back, _ = hf.read(tmp_path / "out")
    assert flat(again).n_k_heads == flat(again).n_v_heads
    close(run(back, again, tokens), run(params, cfg, tokens), F32_MODEL)


HEADS = square().attention(0)


def with_layer(cfg, **changes):
    """`cfg` with a second layer of another kind."""
    return dataclasses.replace(cfg, layers=(cfg.layer(0), dataclasses.replace(cfg.layer(0), **changes)))


REFUSED = {
    "kv_source": (square(kv_source=(0, 0)), "kv_source makes layer 1 read layer 0"),
    "kv_norm": (square(kv_norm=True), "kv_norm is True"),
    "sinks": (square(masks=(tiny.SINKS,)), "sinks"),
    "no rotation": (square(ropes=(RopeConfig(), None)), "ropes has None"),
    "value width": (tiny.config(), "v_head_dim is 14"),
    "tied and normed": (square(tied_kv=True, qk_norm="head"), "tied_kv"),
    "two windows": (square(masks=(MaskConfig(3), MaskConfig(5))), "masks"),
    "two ropes": (square(ropes=(RopeConfig(50.0), RopeConfig(60.0))), "ropes"),
    "scale": (square(attn_scale=0.125), "attn_scale is 0.125"),
    "palm": (square(d_model=60, residual="parallel_palm", norm="layernorm", mlp="gelu"), "residual is 'parallel_palm'"),
    "soft cap": (square(logit_soft_cap=5.0), "logit_soft_cap is 5.0"),
    "embed scale": (square(embed_scale=3.0), "embed_scale is 3.0"),
    "partial rotary": (square(ropes=(RopeConfig(50.0, 4),)), "ropes"),
    "two families": (
        with_layer(square(), attention=NoAttention()),
        r"plain heads alike in all layers.*\(heads, none\)",
    ),
    "two head counts": (square(attentions=(HEADS, dataclasses.replace(HEADS, n_heads=3))), "alike in all layers"),
    "head groups": (with_layer(square(), groups=(HeadGroup(1), HeadGroup(2, tiny.WINDOW))), "layer 1 .* has 2 groups"),
    "a memory": (with_layer(square(), reads="memory", mask=MaskConfig(kind="full")), "layer 1 .* reads a memory"),
    "a full view": (square(masks=(MaskConfig(kind="full"),)), r"model.masks is \(MaskConfig.*kind='full'"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_transformers_cannot_compute_is_refused_by_name(name, tmp_path):
    cfg, words = REFUSED[name]
    with pytest.raises(UserError, match=words):
        hf.write(tmp_path / "out", cfg, random_params(cfg))
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_config_are_refused(tmp_path):
    params = random_params(square())
    with pytest.raises(UserError, match="parameter layers.0.attn.k has shape"):
        hf.write(tmp_path / "out", square(n_k_heads=6, n_v_heads=6), params)
    with pytest.raises(UserError, match="parameter unembed.table is missing"):
        hf.write(tmp_path / "out", square(tied_embeddings=False), params)


@pytest.mark.parametrize("field", EXECUTION)
def test_how_a_model_is_computed_decides_nothing_of_an_export(field):
    other = {"kernel": "cudnn", "decode_kernel": "mosaic_gpu", "scan_layers": True, "remat": "full"}
    assert hf.choose(square(**{field: other[field]})) == hf.choose(square())


def test_a_model_that_ran_with_kernels_is_exported(tmp_path):
    cfg = square(kernel="splash", decode_kernel="mosaic_tpu", remat="dots")
    params = random_params(cfg)
    assert hf.write(tmp_path / "out", cfg, params) == "mistral"
    again, back, _ = hf.read(tmp_path / "out")
    assert again == square()
    _same_params(back, params)


def test_every_field_of_the_model_matters_to_an_export():
    """No field of the model or its heads is dropped: changing any one changes the choice, the target or refuses."""
    base = square(d_model=60)
    _, plain = hf.choose(base)
    changes = {
        "vocab_size": 67,
        "d_model": 66,
        "n_layers": 5,
        "n_heads": 12,
        "n_k_heads": 6,
        "n_v_heads": 6,
        "head_dim": 12,
        "v_head_dim": 12,
        "d_ff": 41,
        "max_length": 99,
        "kv_source": (0, 0),
        "kv_norm": True,
        "masks": (MaskConfig(4),),
        "ropes": (RopeConfig(7.0),),
        "attn_scale": 0.3,
        "attn_soft_cap": 2.0,
        "qk_norm": "head",
        "qkv_bias": True,
        "o_bias": True,
        "norm": "layernorm",
        "norm_eps": 1e-3,
        "norm_offset": 1.0,
        "norm_placement": "post",
        "residual": "parallel_neox",
        "mlp": "geglu",
        "mlp_bias": True,
        "tied_embeddings": False,
        "embed_scale": 2.0,
        "logit_soft_cap": 3.0,
    }
    assert set(changes) | {*EXECUTION, "tied_kv"} == set(FIELDS)  # tied_kv: as V = K, tested above
    for field, value in changes.items():
        try:
            _, target = hf.choose(base.replace(**{field: value}))
        except UserError:
            continue
        assert target != plain, field
