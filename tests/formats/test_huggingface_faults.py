"""Damaged, foreign and half-written Hugging Face directories: one sentence, never a crash, bounded memory."""

import errno
import json
import pathlib
import shutil
import tracemalloc

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some

from kvattn.attention.heads import heads_model
from kvattn.config import ModelConfig
from kvattn.errors import UserError
from kvattn.formats import huggingface as hf
from kvattn.formats import safetensors_io as st
from tests.helpers.paths import ROOT

GOLDEN = ROOT / "tests" / "golden" / "hf"
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture
def checkpoint(tmp_path):
    """A function that copies a golden case into a fresh directory."""

    def copy(name):
        return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return copy


def tensors(folder):
    return {name: st.read(entry) for name, entry in st.open_directory(folder).items()}


def rewrite(folder, values):
    """Replaces the weights of `folder` with the arrays `values`."""
    pending = [st.Pending(k, v.shape, v.dtype, lambda v=v: v) for k, v in values.items()]
    for path in folder.glob("model*"):
        path.unlink()
    st.write_file(folder / WEIGHTS, pending)


def change_config(folder, **changes):
    raw = json.loads((folder / CONFIG).read_text())
    target = raw["text_config"] if changes.pop("in_text", False) else raw
    target |= changes
    (folder / CONFIG).write_text(json.dumps(raw))


def refused(folder, words):
    with pytest.raises(UserError, match=words) as caught:
        hf.read(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600, message


# --- weights -----------------------------------------------------------------------------------------------


def test_our_reader_and_writer_agree_with_the_safetensors_package(tmp_path):
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(1)
    values = {"a.b": rng.standard_normal((3, 5)).astype(np.float32), "c": rng.standard_normal(7).astype(np.float16)}
    values["none"] = np.zeros((0, 4), np.float32)
    pending = [st.Pending(k, v.shape, v.dtype, lambda v=v: v) for k, v in values.items()]
    st.write_file(tmp_path / "ours", pending)
    save_file(values, tmp_path / "theirs")
    theirs = load_file(tmp_path / "ours")
    ours = {name: st.read(entry) for name, entry in st.open_file(tmp_path / "theirs").items()}
    for name, value in values.items():
        for got in (theirs[name], ours[name]):
            assert got.dtype == value.dtype and got.shape == value.shape and (got == value).all()


def test_shards(checkpoint):
    folder = checkpoint("llama_linear_sharded")
    shards = sorted(path.name for path in folder.glob("model-*"))
    assert len(shards) == 2
    (folder / shards[1]).rename(folder / "elsewhere")
    refused(folder, f"lacks the shard {shards[1]}")
    shutil.copy(folder / shards[0], folder / shards[1])
    refused(folder, "is in .* and in|which does not hold it")
    (folder / st.INDEX).write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    refused(folder, "a shard is a file beside the index")
    (folder / st.INDEX).unlink()
    refused(folder, "has neither model.safetensors nor")


def test_missing_and_unused_tensors(checkpoint):
    folder = checkpoint("qwen2_window")
    values = tensors(folder)
    bias = values.pop("model.layers.1.self_attn.k_proj.bias")
    rewrite(folder, values)
    refused(folder, r"tensor model.layers.1.self_attn.k_proj.bias is missing")
    values["model.layers.1.self_attn.k_proj.bias"] = bias
    rewrite(folder, values | {"model.layers.3.input_layernorm.weight": np.ones(24, np.float32)})
    refused(folder, r"model.layers.3.input_layernorm.weight \(1 in all\) has no place")
    rewrite(folder, values | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)})
    hf.read(folder)


def test_neox_buffers_are_skipped_and_biases_are_not(checkpoint):
    folder = checkpoint("neox_parallel")
    buffers = {"gpt_neox.layers.0.attention.bias": np.ones((1, 1, 4, 4), np.float32)}
    buffers["gpt_neox.layers.0.attention.masked_bias"] = np.float32(1).reshape(())
    rewrite(folder, tensors(folder) | buffers)
    hf.read(folder)
    values = {name: value for name, value in tensors(folder).items() if "dense.bias" not in name}
    rewrite(folder, values)
    refused(folder, r"attention.dense.bias is missing")


def test_gemma3_text_tensors_have_two_spellings(checkpoint):
    folder = checkpoint("gemma3_vision")
    before, values = hf.read(folder)[1], tensors(folder)
    old = "language_model.model."
    assert any(name.startswith(old) for name in values) and any("vision_tower" in name for name in values)
    renamed = {name.replace(old, "model.language_model."): value for name, value in values.items()}
    rewrite(folder, {"model." + k if k.startswith(("vision", "multi")) else k: v for k, v in renamed.items()})
    after = hf.read(folder)[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), before, after))
    rewrite(folder, renamed | {"audio_tower.weight": np.ones(3, np.float32)})
    refused(folder, "audio_tower.weight .1 in all. has no place")


def test_a_tied_output_matrix_must_be_the_embedding(checkpoint):
    folder = checkpoint("llama_tied")
    values = tensors(folder)
    rewrite(folder, values | {"lm_head.weight": values["model.embed_tokens.weight"]})
    hf.read(folder)
    rewrite(folder, values | {"lm_head.weight": values["model.embed_tokens.weight"] * 2})
    refused(folder, "tie_word_embeddings is true but lm_head.weight differs")
    rewrite(folder, values)
    change_config(folder, tie_word_embeddings=False)
    refused(folder, "lm_head.weight is missing")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_numbers(checkpoint, bad):
    folder = checkpoint("olmo2")
    values = tensors(folder)
    values["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    rewrite(folder, values)
    refused(folder, r"tensor model.layers.1.mlp.up_proj.weight holds NaN or infinite")


def test_shapes_and_dtypes(checkpoint):
    folder = checkpoint("olmo2")
    values = tensors(folder)
    rewrite(folder, values | {"model.norm.weight": np.ones(23, np.float32)})
    refused(folder, r"model.norm.weight has shape \(23,\); config.json makes it \(24,\)")
    rewrite(folder, values)
    raw = (folder / WEIGHTS).read_bytes().replace(b'"F16"', b'"I16"')
    (folder / WEIGHTS).write_bytes(raw)
    refused(folder, "is I16; kvattn reads F32, F16, BF16")


def header_file(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


HEADERS = {
    "not json": (b"{", b""),
    "deep": (b"[" * 100_000, b""),
    "a list": (b"[]", b""),
    "no description": ({"a": 3}, b""),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"0000"),
    "huge shape": ({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"0000"),
    "negative shape": ({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, b"0000"),
    "many dims": ({"a": {"dtype": "F32", "shape": [1] * 1000, "data_offsets": [0, 4]}}, b"0000"),
    "beyond the end": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"0000"),
    "backwards": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"0000"),
    "booleans": ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"0000"),
    "overlap": ({k: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for k in "ab"}, b"00001111"),
    "left over": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"00000"),
}


@pytest.mark.parametrize("name", sorted(HEADERS))
def test_malformed_headers(name, tmp_path):
    with pytest.raises(UserError, match="fetch it again|damaged|cut short|has dtype"):
        st.open_file(header_file(tmp_path / "x", *HEADERS[name]))


def test_a_header_length_is_not_believed(tmp_path):
    path = tmp_path / "x"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="cut short"):
        st.open_file(path)
    with open(path, "wb") as file:  # sparse: 64 MiB on paper, nothing on disk
        file.write((60 << 20).to_bytes(8, "little"))
        file.truncate(64 << 20)
    with pytest.raises(UserError, match="claims a header"):
        st.open_file(path)


def test_a_file_that_shrinks_while_it_is_read(checkpoint):
    folder = checkpoint("olmo2")
    entries = st.open_directory(folder)
    last = max(entries.values(), key=lambda entry: entry.offset)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-3])
    with pytest.raises(UserError, match="ended inside tensor"):
        st.read(last)


# --- config.json -------------------------------------------------------------------------------------------

KEYS = {
    "unknown type": ("olmo2", {"model_type": "mamba"}, "model_type is 'mamba'; kvattn reads gemma2, gemma3"),
    "no type": ("olmo2", {"model_type": None}, "model_type is 'None'"),
    "experts": ("qwen3", {"num_experts": 8}, "num_experts is '8'"),
    "quantised": ("olmo2", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config is"),
    "hub code": ("olmo2", {"auto_map": {"AutoModel": "x.y"}}, "auto_map is"),
    "interleaved": ("llama_tied", {"rope_interleaved": True}, "rope_interleaved is 'True'"),
    "activation": ("olmo2", {"hidden_act": "relu"}, "hidden_act is 'relu'; kvattn has silu"),
    "activation type": ("olmo2", {"hidden_act": [1]}, "hidden_act is"),
    "gemma activation": ("gemma2", {"hidden_activation": None}, "hidden_activation is 'None'"),
    "rope type": ("olmo2", {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type is 'longrope'"),
    "old rope type": ("olmo2", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling.type is 'dynamic'"),
    "rope key": ("olmo2", {"rope_parameters": {"mrope_section": [1]}}, "rope_parameters.mrope_section is"),
    "rope factor": ("olmo2", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    "rope theta": ("olmo2", {"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta is '0'"),
    "rope section": ("olmo2", {"rope_parameters": [1]}, "rope_parameters is"),
    "llama3 order": (
        "llama_tied",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
        "low_freq_factor is '4'; it must be less",
    ),
    "partial": ("olmo2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is '0.5'"),
    "odd rotary": ("neox_parallel", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "dims rotary"),
    "gemma3 rope": ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_type is"),
    "gemma3 cap": ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is '50.0'"),
    "gemma3 text": ("gemma3_vision", {"text_config": 5}, "text_config is missing"),
    "gemma3 nested": ("gemma3_vision", {"in_text": True, "head_dim": 9}, "head_dim is '9'"),
    "bidirectional": ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is 'True'"),
    "heads": ("olmo2", {"num_key_value_heads": 3}, "num_key_value_heads is '3'; it must divide"),
    "width": ("olmo2", {"hidden_size": 25}, "num_attention_heads is '4'; it must divide hidden_size = 25"),
    "float size": ("olmo2", {"hidden_size": 24.0}, "hidden_size is '24.0'; it takes an integer"),
    "no size": ("olmo2", {"vocab_size": None}, "vocab_size is 'None'"),
    "huge depth": ("olmo2", {"num_hidden_layers": 10**9}, "num_hidden_layers is '1000000000'"),
    "eps": ("olmo2", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it takes a positive number"),
    "flag": ("olmo2", {"attention_bias": "no"}, "attention_bias is 'no'; it takes true or false"),
    "layer types": ("qwen3", {"layer_types": ["full_attention"]}, "it takes a list of 3 names"),
    "chunked": ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "kvattn has full_attention"),
    "no window": ("qwen3", {"use_sliding_window": False}, "use_sliding_window is 'False'"),
    "window on llama": ("llama_tied", {"sliding_window": 8}, "sliding_window is '8'"),
    "mistral layers": ("mistral_window", {"layer_types": ["full_attention"] * 3}, "layer_types is"),
    "bias": ("qwen3_biases", {"attention_bias": False}, r"self_attn.k_proj.bias \(8 in all\) has no place"),
}


@pytest.mark.parametrize("name", sorted(KEYS))
def test_config_keys_are_refused_by_name_and_value(name, checkpoint):
    case, changes, words = KEYS[name]
    folder = checkpoint(case)
    change_config(folder, **changes)
    refused(folder, words)


def test_directories_that_are_no_checkpoint(tmp_path, checkpoint):
    refused(tmp_path, "has no config.json")
    refused(tmp_path / "nowhere", "has no config.json")
    with pytest.raises(UserError, match="dtype is 'float8'"):
        hf.read(tmp_path, "float8")
    folder = checkpoint("olmo2")
    for text in ("[]", "{", "\xff", "[" * 100_000):
        (folder / CONFIG).write_text(text)
        refused(folder, "config.json")
    with open(folder / CONFIG, "wb") as file:
        file.truncate(hf.MAX_CONFIG_BYTES + 1)
    refused(folder, "is larger than")


# --- properties --------------------------------------------------------------------------------------------

BOUND = 8 << 20  # bytes; the golden file is 30 kB and its parameters 60 kB
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def survives(folder):
    """Reading ends in a checkpoint or in UserError, within BOUND bytes."""
    tracemalloc.start()
    try:
        cfg, params, _ = hf.read(folder)
        assert isinstance(cfg, ModelConfig)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    except UserError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < BOUND


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return pathlib.Path(shutil.copytree(GOLDEN / "olmo2", tmp_path_factory.mktemp("mutated") / "olmo2"))


@QUICK
@given(some.data())
def test_mutated_and_truncated_weights(scratch, data):
    raw = bytearray((GOLDEN / "olmo2" / WEIGHTS).read_bytes())
    header = int.from_bytes(raw[:8], "little")
    where = some.integers(0, 8 + header) if data.draw(some.booleans()) else some.integers(0, len(raw) - 1)
    for at in data.draw(some.lists(where, max_size=4)):
        raw[at] = data.draw(some.integers(0, 255))
    cut = data.draw(some.one_of(some.none(), some.integers(0, len(raw))))
    (scratch / WEIGHTS).write_bytes(raw[:cut])
    (scratch / CONFIG).write_bytes((GOLDEN / "olmo2" / CONFIG).read_bytes())
    survives(scratch)


VALUES = some.one_of(
    some.none(),
    some.booleans(),
    some.integers(-(2**40), 2**40),
    some.integers(0, 50),
    some.floats(),
    some.text(max_size=5),
    some.lists(some.integers(0, 9), max_size=3),
    some.dictionaries(some.sampled_from(["rope_type", "factor", "rope_theta", "x"]), some.integers(-2, 9), max_size=3),
)


@pytest.mark.parametrize("name", ["olmo2", "gemma3_text", "neox_parallel", "qwen2_window"])
@settings(QUICK, max_examples=40)
@given(data=some.data())
def test_mutated_config(tmp_path_factory, name, data):
    folder = tmp_path_factory.getbasetemp() / f"mutated_{name}"
    if not folder.exists():
        shutil.copytree(GOLDEN / name, folder)
    raw = json.loads((GOLDEN / name / CONFIG).read_text())
    extra = ["rope_scaling", "rope_theta", "head_dim", "sliding_window", "layer_types", "rotary_pct", "num_experts"]
    for key in data.draw(some.lists(some.sampled_from(sorted(raw) + extra), min_size=1, max_size=3)):
        raw[key] = data.draw(VALUES)
    (folder / CONFIG).write_text(json.dumps(raw))
    survives(folder)


@QUICK
@given(some.binary(max_size=200))
@example(b"\x02\0\0\0\0\0\0\0{}")
def test_arbitrary_bytes_as_weights(scratch, raw):
    (scratch / WEIGHTS).write_bytes(raw)
    (scratch / CONFIG).write_bytes((GOLDEN / "olmo2" / CONFIG).read_bytes())
    survives(scratch)


# --- memory and atomicity ----------------------------------------------------------------------------------


def wide_model(tmp_path):
    """A directory of 16 equal layers, 12 MB in float16, and its path."""
    cfg = heads_model(
        vocab_size=97,
        d_model=96,
        n_layers=16,
        n_heads=4,
        n_k_heads=4,
        n_v_heads=4,
        head_dim=24,
        v_head_dim=24,
        d_ff=1152,
    )
    from kvattn import model, spec

    draw = np.random.default_rng(7).standard_normal
    params = spec.map_specs(lambda s: jax.numpy.asarray(draw(s.shape, np.float32)), model.param_specs(cfg))
    hf.write(tmp_path / "wide", cfg, params)
    return tmp_path / "wide", sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def test_reading_holds_one_tensor_beside_the_parameters(tmp_path):
    folder, total = wide_model(tmp_path)
    largest = max(entry.nbytes for entry in st.open_directory(folder).values())
    assert total > 30 * largest
    tracemalloc.start()
    _, params, _ = hf.read(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < total + 4 * largest + (2 << 20)
    assert len(jax.tree.leaves(params)) > 100


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    folder, total = wide_model(tmp_path)
    cfg, params, _ = hf.read(folder)
    tracemalloc.start()
    hf.write(tmp_path / "again", cfg, params)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < total / 5


def test_nothing_half_written_when_the_disk_is_full(tmp_path, monkeypatch):
    cfg, params, _ = hf.read(GOLDEN / "olmo2")
    hf.write(tmp_path / "good", cfg, params)
    before = (tmp_path / "good" / WEIGHTS).read_bytes()
    calls = []

    def full(layout, parts):
        calls.append(layout)
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(layout, parts)

    real = hf._make
    monkeypatch.setattr(hf, "_make", full)
    with pytest.raises(UserError, match="could not be written .No space left on device"):
        hf.write(tmp_path / "new", cfg, params)
    monkeypatch.undo()
    with pytest.raises(UserError, match="exists and is not empty"):
        hf.write(tmp_path / "good", cfg, params)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
    assert (tmp_path / "good" / WEIGHTS).read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="could not be written|exists"):
        hf.write(tmp_path / "file" / "below", cfg, params)


def test_a_tokenizer_travels_and_must_fit(tmp_path):
    from kvattn.data import tokenizer as tokenizer_lib

    cfg, params, _ = hf.read(GOLDEN / "olmo2")
    with pytest.raises(UserError, match="do not match"):
        hf.write(tmp_path / "small", cfg, params, tokenizer_lib.ByteTokenizer())
    assert not list(tmp_path.iterdir())
