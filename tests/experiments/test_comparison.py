"""The benchmarks against peers with kvattn's worker alone, on a tiny checkpoint: real processes, no figure a result."""

import json

import jax
import numpy as np
import pytest

from experiments.bench import comparison
from kvattn import model
from kvattn.data.tokenizer import ByteTokenizer
from kvattn.formats import huggingface
from tests.helpers import tiny
from tests.helpers.tolerances import CLOSED_FORM, close

CFG = tiny.config(n_layers=1, v_head_dim=10, vocab_size=258)


@pytest.fixture
def given(tmp_path, monkeypatch):
    """(checkpoint, text), where neither torch nor transformers is."""
    huggingface.write(tmp_path / "model", CFG, model.init(jax.random.key(3), CFG), ByteTokenizer())
    (tmp_path / "text.txt").write_text("Some words to go on from, and some more of them. " * 4)
    monkeypatch.setattr(comparison.importlib.util, "find_spec", lambda name: None)
    return str(tmp_path / "model"), str(tmp_path / "text.txt")


def test_decoding_and_a_training_step_are_measured_and_written(given, tmp_path, monkeypatch, capsys):
    setting, results = comparison.decoding(*given, batches=[1, 2], prompt_tokens=6, new_tokens=4, rounds=3)
    assert setting["checkpoint"] == given[0] and set(setting["peers"]) == {"kvattn_worker"}
    for name in ("batch 1", "batch 2"):
        ours = results[name]["kvattn_worker"]
        assert len(ours["tokens_per_second_all"]) == 3
        close(ours["tokens_per_second"], np.median(ours["tokens_per_second_all"]), CLOSED_FORM)
        of_roofline = ours["tokens_per_second"] / results[name]["roofline"]["tokens_per_second"]
        close(results[name]["kvattn_of_roofline"], of_roofline, CLOSED_FORM)
    setting, results = comparison.training(*given, batch=2, length=8, learning_rate=1e-2, rounds=2)
    ours = results["kvattn_worker"]
    assert len(ours["losses"]) == 3 and ours["losses"][2] < ours["losses"][0]
    close(ours["tokens_per_second"], 16 / ours["seconds"], CLOSED_FORM)
    assert "kvattn is measured alone" in capsys.readouterr().out
    monkeypatch.setattr(comparison, "RESULTS", tmp_path / "results")
    record = json.loads(comparison.save("bench_train", setting, results).read_text())
    assert record["benchmark"] == "bench_train" and record["setting"]["length"] == 8 and record["versions"]["jax"]
    assert record["results"]["kvattn_worker"]["losses"] == ours["losses"]
