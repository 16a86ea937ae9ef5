"""transformers' side of the benchmarks (torch, all cores); see experiments/bench/comparison.py."""

import json
import os
import pathlib
import time

import torch
import transformers

from experiments.common import child, machine

torch.set_num_threads(len(os.sched_getaffinity(0)))
HELD = {}


def versions():
    return {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}


def load(checkpoint):
    """The float32 model of a Hugging Face directory, SDPA attention."""
    HELD["model"] = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="sdpa"
    )
    return {"versions": versions()}


@torch.inference_mode()
def generate(batch, prompt_tokens, new, directory):
    """Greedy continuation with the model's own dynamic cache, in the tightest loop transformers allows."""
    ids = json.loads((pathlib.Path(directory) / "ids.json").read_text())
    model = HELD["model"].eval()
    token = torch.tensor(ids[: batch * prompt_tokens]).reshape(batch, prompt_tokens)
    began, past, out = time.perf_counter(), None, []
    for step in range(new):
        result = model(token, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, token = result.past_key_values, result.logits[:, -1:].argmax(-1)
        out.append(token)
        if step == 0:
            first = time.perf_counter()
    seconds = time.perf_counter() - first
    return {
        "tokens_per_second": batch * (new - 1) / seconds,
        "prefill_tokens_per_second": batch * prompt_tokens / (first - began),
        "tokens": torch.cat(out, 1).tolist(),
    }


def train_setup(directory, batch, length, learning_rate):
    """Model, AdamW and one batch of consecutive ids."""
    load(directory)
    model = HELD["model"].train()
    HELD["optimizer"] = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.01)
    ids = json.loads((pathlib.Path(directory) / "ids.json").read_text())
    HELD["rows"] = torch.tensor(ids[: batch * (length + 1)]).reshape(batch, length + 1)
    return {"versions": versions()}


def train_step_once():
    """One update on the same batch: seconds, loss before it, peak memory so far."""
    began, model, rows = time.perf_counter(), HELD["model"], HELD["rows"]
    logits = model(rows[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    HELD["optimizer"].step()
    HELD["optimizer"].zero_grad(set_to_none=True)
    return {
        "seconds": time.perf_counter() - began,
        "loss": float(loss.detach()),
        "peak_memory_bytes": machine.peak_memory_bytes(),
    }


if __name__ == "__main__":
    child.serve({f.__name__: f for f in (load, generate, train_setup, train_step_once)})
