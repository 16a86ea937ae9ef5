"""kvattn against live transformers: golden models, exports, and SmolLM2-135M from the same GGUF file."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from kvattn import formats, model
from kvattn.config import CacheConfig, DataConfig, DecodeConfig
from kvattn.data import batches as data
from kvattn.decode import generation as decode
from kvattn.formats import huggingface as hf
from tests.formats import test_huggingface as ours
from tests.helpers.tolerances import EXACT, HF_SMOLLM2, HF_TINY, close

TOKENS, NEW = 512, 64


def theirs(folder, **options):
    options = {"dtype": torch.float32, "attn_implementation": "eager"} | options
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits_of(network, tokens):
    with torch.no_grad():
        return network(input_ids=torch.from_numpy(np.asarray(tokens, np.int64)), use_cache=False).logits.numpy()


@pytest.mark.parametrize("name", [name for name in ours.CASES if name != "gemma3_vision"])
def test_golden_files_are_what_transformers_computes_now(name):
    _, _, tokens, want = ours.golden(name)
    close(logits_of(theirs(ours.GOLDEN / name), tokens), want, HF_TINY)


@pytest.mark.parametrize("name", ours.CASES)
def test_rewritten_checkpoints_load_with_the_same_logits(name, tmp_path):
    cfg, params, tokens, want = ours.golden(name)
    hf.write(tmp_path / "out", cfg, params, shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    close(logits_of(theirs(tmp_path / "out"), tokens), want, HF_TINY)


@pytest.mark.parametrize("name", sorted(ours.EXPORTS))
def test_exports_load_with_the_same_logits(name, tmp_path):
    cfg, kind = ours.EXPORTS[name]
    params, tokens = ours.random_params(cfg), ours.tokens_of(cfg, length=19)
    hf.write(tmp_path / "out", cfg, params)
    network = theirs(tmp_path / "out")
    assert network.config.model_type == kind
    close(logits_of(network, tokens), ours.run(params, cfg, tokens), HF_TINY)


def test_a_bfloat16_export_loads_as_bfloat16(tmp_path):
    cfg, params, _ = hf.read(ours.GOLDEN / "gemma2", "bfloat16")
    hf.write(tmp_path / "out", cfg, params)
    assert theirs(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    _, _, tokens, want = ours.golden("gemma2")  # the golden file is bfloat16, so nothing was lost
    close(logits_of(theirs(tmp_path / "out"), tokens), want, HF_TINY)


# --- SmolLM2-135M ------------------------------------------------------------------------------------------


@functools.cache
def smollm2():
    """Our reading of the GGUF file, and 512 tokens of held-out Shakespeare."""
    loaded = formats.load("smollm2")
    ids = loaded.tokenizer.encode(data.eval_text(DataConfig())[:8000])[:TOKENS]
    assert len(ids) == TOKENS
    return loaded, np.asarray([ids], np.int32)


@functools.cache
def smollm2_theirs():
    folder, file = os.path.split(formats.smollm2_path())
    return theirs(folder, gguf_file=file)


def our_logits(loaded, ids):
    forward = jax.jit(model.forward, static_argnums=1)
    return np.asarray(forward(loaded.params, loaded.model, model.Inputs(jnp.asarray(ids)))[0].logits)


def test_smollm2_logits():
    loaded, ids = smollm2()
    difference = np.abs(our_logits(loaded, ids) - logits_of(smollm2_theirs(), ids)).max()
    print(f"SmolLM2-135M, {TOKENS} tokens: logits differ by at most {difference:.2e}")
    assert difference < HF_SMOLLM2.atol


def test_smollm2_greedy_text():
    loaded, ids = smollm2()
    prompt = ids[0, :37].tolist()
    with torch.no_grad():
        want = smollm2_theirs().generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, use_cache=True
        )
    got = decode.generate(
        loaded.params, loaded.model, [prompt], DecodeConfig(max_new_tokens=NEW), CacheConfig(), eos_ids=()
    )
    assert got.tokens[0] == want[0, len(prompt) :].tolist()
    assert len(got.tokens[0]) == NEW


def test_smollm2_export_with_its_tokenizer(tmp_path):
    loaded, ids = smollm2()
    assert hf.write(tmp_path / "out", loaded.model, loaded.params, loaded.tokenizer) == "llama"
    again = formats.load(tmp_path / "out")
    assert again.model == loaded.model and again.tokenizer.fingerprint == loaded.tokenizer.fingerprint
    jax.tree.map(lambda a, b: close(a, b, EXACT), again.params, loaded.params)
    text = "First Citizen:\n  Before we proceed any further, hear me speak \u2014 caf\u00e9 \U0001f3ad 1234."
    network, tokenizer = theirs(tmp_path / "out"), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text)["input_ids"] == loaded.tokenizer.encode(text)
    close(logits_of(network, ids[:, :64]), logits_of(smollm2_theirs(), ids[:, :64]), EXACT)
