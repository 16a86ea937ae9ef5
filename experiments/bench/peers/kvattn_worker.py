"""kvattn's side of the benchmarks; see experiments/bench/comparison.py."""

import dataclasses
import json
import pathlib
import time

import jax
import numpy as np

from experiments.common import child, machine
from kvattn import account, formats
from kvattn.config import CacheConfig, DataConfig, DecodeConfig, MeshConfig, OptimizerConfig, TrainConfig
from kvattn.data import batches as data
from kvattn.decode import generation as decode
from kvattn.formats import huggingface
from kvattn.train import step as train_step
from sharding import make_mesh
from sharding.cost.hardware import measure_cpu, of_device

HELD = {}


def versions():
    return machine.versions("jax", "jaxlib", "optax")


def load(checkpoint):
    """Seconds from nothing to device arrays, and the process's peak memory."""
    began = time.perf_counter()
    HELD["loaded"] = formats.load(checkpoint)
    jax.block_until_ready(HELD["loaded"].params)
    seconds = time.perf_counter() - began
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(HELD["loaded"].params))
    return {
        "seconds": seconds,
        "weight_bytes": size,
        "peak_memory_bytes": machine.peak_memory_bytes(),
        "versions": versions(),
    }


def export(checkpoint, directory, text, tokens):
    """Writes the checkpoint as a Hugging Face directory for the peer, and the ids both sides work on."""
    load(checkpoint)
    loaded = HELD["loaded"]
    huggingface.write(directory, loaded.model, loaded.params, loaded.tokenizer)
    ids = loaded.tokenizer.encode(
        pathlib.Path(text).read_text(encoding="utf-8") if text else data.eval_text(DataConfig())
    )
    (pathlib.Path(directory) / "ids.json").write_text(json.dumps(ids[:tokens]))
    return {"tokens": min(len(ids), tokens), "versions": versions()}


def roofline(batch, context):
    """Tokens per second if decoding read every weight and cached entry once at the memory's measured speed."""
    chip = of_device(jax.devices()[0]) or measure_cpu()
    cfg = HELD["loaded"].model
    roof = account.roofline_decode(cfg, CacheConfig(), batch, context, chip, weight_bytes_per_param=4)
    return {"tokens_per_second": batch / roof.seconds, "bandwidth_bytes_per_second": chip.hbm_bandwidth}


def generate(batch, prompt_tokens, new, directory):
    """Greedy continuation of `batch` prompts: prefill and decode seconds, and the tokens."""
    ids = json.loads((pathlib.Path(directory) / "ids.json").read_text())
    prompts = [ids[row * prompt_tokens : (row + 1) * prompt_tokens] for row in range(batch)]
    loaded, cfg = HELD["loaded"], DecodeConfig(max_new_tokens=new)
    out = decode.generate(loaded.params, loaded.model, prompts, cfg, CacheConfig())
    return {
        "tokens_per_second": out.tokens_per_second,
        "prefill_tokens_per_second": batch * prompt_tokens / out.prefill_seconds,
        "tokens": out.tokens,
    }


def train_setup(directory, batch, length, learning_rate):
    """State, compiled step and one batch of consecutive ids; the checkpoint's own copy is given up."""
    cfg = OptimizerConfig(learning_rate=learning_rate, schedule="constant", weight_decay=0.01, beta2=0.999)
    loaded = HELD.pop("loaded", None) or formats.load(directory)
    layout = train_step.make_layout(loaded.model, cfg, 1000, make_mesh(MeshConfig()))
    HELD["state"] = train_step.state_from(layout, loaded.params, consume=True)
    HELD["step"] = train_step.make_step(layout, dataclasses.replace(TrainConfig(), steps=1000))
    ids = np.asarray(json.loads((pathlib.Path(directory) / "ids.json").read_text()), np.int32)
    rows = ids[: batch * (length + 1)].reshape(batch, length + 1)
    whole = np.ones((batch, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    one = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "segment_ids": whole, "positions": positions}
    HELD["batch"] = train_step.global_batch(layout, [one | {"loss_mask": whole.astype(np.float32)}], (0, 1))
    return {"versions": versions()}


def train_step_once():
    """One update on the same batch: seconds, loss before it, peak memory so far."""
    began = time.perf_counter()
    HELD["state"], metrics = HELD["step"](HELD["state"], None, HELD["batch"])
    loss = float(metrics["loss"])
    jax.block_until_ready(HELD["state"])
    return {"seconds": time.perf_counter() - began, "loss": loss, "peak_memory_bytes": machine.peak_memory_bytes()}


if __name__ == "__main__":
    child.serve({f.__name__: f for f in (load, export, roofline, generate, train_setup, train_step_once)})
