"""One tiny training run, as a config and as the command line that gives the same config."""

import os
import pathlib
import subprocess
import sys

import numpy as np

from experiments.common import cli
from kvattn.config import Experiment
from kvattn.train import metrics
from tests.helpers.paths import ROOT

_MODEL = {"n_layers": 2, "d_model": 24, "n_heads": 4, "n_k_heads": 2, "n_v_heads": 2, "head_dim": 6, "v_head_dim": 6}
_BASE = {f"model.{name}": value for name, value in (_MODEL | {"d_ff": 40, "vocab_size": 264}).items()} | {
    "data.source": "text_files",
    "data.batch_size": 4,
    "data.seq_len": 16,
    "train.log_every": 1,
    "train.eval_every": 0,
    "optimizer.warmup_steps": 3,
}


def write_corpus(folder: pathlib.Path) -> str:
    """Six files of words drawn at random; returns their glob."""
    rng = np.random.default_rng(5)
    for i in range(6):
        words = rng.choice(["the ", "cat ", "sat ", "on ", "a ", "mat. ", "\n"], 900)
        (folder / f"part{i}.txt").write_text("".join(words))
    return f"{folder}/*.txt"


def arguments(corpus: str, **options) -> list[str]:
    """Flags of a run; `options` are config fields with `__` for the dot."""
    fields = _BASE | {"data.paths": corpus} | {name.replace("__", "."): value for name, value in options.items()}
    return ["--config=configs/train_tiny.py", *(f"--config.{name}={value}" for name, value in fields.items())]


def experiment(corpus: str, **options) -> Experiment:
    """The config that `arguments` describes."""
    return cli.parse(["train", *arguments(corpus, **options)])[0]


def launch(line: list[str], *, wrapper: tuple[str, ...] = (), devices: int = 1, **env: str) -> subprocess.Popen:
    """`python -m experiments.train` with the given flags on fake CPU devices, in a process of its own."""
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"} | env
    variables["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [*wrapper, sys.executable, "-m", "experiments.train", *line],
        cwd=ROOT,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def until_step(process: subprocess.Popen, step: int) -> None:
    """Reads output until the line of `step`."""
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(process.stderr.read())


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit code, rest of stdout, stderr)."""
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def records(workdir: pathlib.Path) -> list[dict]:
    """Records of a run, a step each, without fields that depend on the clock."""
    keep = ("step", "loss", "ce", "grad_norm", "learning_rate", "tokens")
    return [{name: r[name] for name in keep} for r in metrics.read_jsonl(workdir / metrics.JSONL)]


def steps(workdir: pathlib.Path) -> list[int]:
    """Complete checkpoints."""
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
