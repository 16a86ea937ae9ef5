"""experiments.logits and experiments.evaluate as a stranger calls them, on a small Hugging Face directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import files
from kvattn import model
from kvattn.config import CacheConfig
from kvattn.data.tokenizer import ByteTokenizer
from kvattn.errors import UserError
from kvattn.evaluate import perplexity as evaluate
from kvattn.evaluate import scoring
from kvattn.formats import huggingface
from tests.helpers import tiny
from tests.helpers.paths import ROOT
from tests.helpers.tolerances import F32_DECODE, close

CFG = tiny.config(n_layers=2, v_head_dim=10, vocab_size=258, tied_embeddings=False)
TEXT = "Some words to read, ä, and some more of them; " * 5


@pytest.fixture(scope="module")
def params():
    return model.init(jax.random.key(11), CFG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params):
    path = tmp_path_factory.mktemp("commands")
    huggingface.write(path / "model", CFG, params, ByteTokenizer())
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    np.save(path / "ids.npy", np.random.default_rng(1).integers(0, 258, (2, 9)))
    return path


def command(folder, name, *args):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    line = [sys.executable, "-m", f"experiments.{name}", *args]
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, env=env)


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_logits_command(mode, folder, params):
    """[B,T] in prefill; the same first row alone as [T], int32, one token at a time."""
    tokens = np.load(folder / "ids.npy")
    np.save(folder / "row.npy", tokens[0].astype(np.int32))
    name = "ids.npy" if mode == "prefill" else "row.npy"
    done = command(folder, "logits", "--checkpoint=model", f"--tokens={name}", f"--mode={mode}", f"--out={mode}.npy")
    assert (done.returncode, done.stderr) == (0, "")
    got = np.load(folder / f"{mode}.npy")
    want = np.asarray(model.forward(params, CFG, model.Inputs(jnp.asarray(tokens, jnp.int32)))[0].logits)
    assert got.dtype == np.float32
    close(got, want if mode == "prefill" else want[0], F32_DECODE)
    assert not list(folder.glob("*.tmp"))


def test_evaluate_command(folder, params):
    done = command(folder, "evaluate", "--checkpoint=model", "--text=text.txt", "--context=32", "--stride=12", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    ids = np.frombuffer(TEXT.encode(), np.uint8)
    want = evaluate.perplexity(params, CFG, ids, context=32, stride=12, cache_cfg=CacheConfig())
    assert result["tokens"] == want.tokens == len(ids) - 1
    close(result["nll_mean"], want.nll_mean, F32_DECODE)
    assert result["kv_bytes_per_token"] == 2 * 2 * 3 * 10 * 4
    assert (result["context"], result["stride"]) == (32, 12)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("logits", ("--tokens=nothing.npy",), "nothing.npy cannot be read"),
        ("logits", ("--tokens=ids.npy", "--mode=both"), "--mode=both"),
        ("evaluate", ("--text=text.txt", "--context=32", "--stride=33"), "stride"),
        ("evaluate", ("--text=text.txt", "--checkpoint="), "checkpoint.path is empty; name the checkpoint to"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(name, args, message, folder):
    done = command(folder, name, "--checkpoint=model", *args)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "logits.npy").exists()


def _ids(tmp_path, content):
    path = tmp_path / "ids.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    return str(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a whole .npy file"),
        (b"12 13 14", "not a whole .npy file"),
        (np.ones(3), "float64; give integer"),
        (np.array([True]), "bool; give integer"),
        (np.array(["a"], object), "not a whole .npy file"),
        (np.ones((1, 2, 3), int), "shape"),
        (np.ones((0,), int), "shape"),
    ],
)
def test_bad_token_files(content, message, tmp_path):
    with pytest.raises(UserError, match=message):
        files.read_tokens(_ids(tmp_path, content))


def test_truncated_token_file(tmp_path):
    path = Path(_ids(tmp_path, np.arange(50)))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="not a whole"):
        files.read_tokens(str(path))


def test_output_is_never_half_written(tmp_path, monkeypatch):
    out = tmp_path / "out.npy"
    np.save(out, np.arange(3))

    def full(f, array):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.np, "save", full)
    with pytest.raises(UserError, match="No space left"):
        files.write_array(str(out), np.ones(4))
    assert np.load(out).tolist() == [0, 1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["out.npy"]


@pytest.mark.parametrize("out", ["", ".", "missing/folder/x.npy"])
def test_output_that_cannot_be_written(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--out"):
        files.write_array(out, np.ones(2))


def test_unknown_mode(params):
    with pytest.raises(UserError, match="^mode is .both.; set it to prefill or decode"):
        scoring.logits(params, CFG, np.ones((1, 3), np.int32), mode="both", cache_cfg=CacheConfig())
