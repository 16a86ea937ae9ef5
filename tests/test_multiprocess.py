"""Two processes x 4 devices with jax.distributed (gloo on CPU): the losses of one process x 8 devices.

The command is the real one, so the path covered is flags -> processes -> data shares -> step -> checkpoint.
"""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from kvattn import checkpoint, metrics
from tests.tolerances import LOSS_SHARDED, close

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(5)
    for i in range(6):
        (folder / f"part{i}.txt").write_text("".join(rng.choice(["the ", "cat ", "sat ", "on ", "a ", "mat. "], 900)))
    return f"{folder}/*.txt"


def start(corpus, workdir, mesh, processes, steps=STEPS):
    """The processes of one run, 8 devices in all."""
    sizes = {"n_layers": 2, "d_model": 24, "n_heads": 4, "n_k_heads": 2, "n_v_heads": 2, "head_dim": 6}
    sizes |= {"v_head_dim": 6, "d_ff": 40, "vocab_size": 264}
    options = {f"model.{k}": v for k, v in sizes.items()}
    options |= {"data.source": "text_files", "data.paths": corpus, "data.batch_size": 16, "data.seq_len": 16}
    options |= {"train.steps": steps, "train.log_every": 1, "train.checkpoint_every": 3, "train.eval_every": 5}
    options |= {"train.accumulation": 2, "workdir": workdir, "optimizer.warmup_steps": 0}
    options |= dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    line = [sys.executable, "-m", "experiments.train", "--config=configs/train_tiny.py"]
    line += [f"--config.{k}={v}" for k, v in options.items()]
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    out = []
    for index in range(processes):
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 // processes}"
        if processes > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
            env |= {"JAX_PROCESS_ID": str(index), "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
        out.append(
            subprocess.Popen(line, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    return out


def finish(processes):
    """Standard outputs, after asserting that every process ended well."""
    outputs = [p.communicate(timeout=400) for p in processes]
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, out + err
    return [out for out, _ in outputs]


def records(workdir):
    return metrics.read_jsonl(workdir / metrics.JSONL)


def curve(workdir):
    return [[r[k] for k in ("step", "loss", "grad_norm", "tokens")] for r in records(workdir)]


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 2, 4)])
def test_two_processes_train_as_one(mesh, corpus, tmp_path):
    """(8,1,1): each process reads half of the rows, gradients cross processes; (1,2,4): ZeRO crosses them."""
    both = finish(start(corpus, tmp_path / "two", mesh, 2))
    assert "step 5/5" in both[0] and "step" not in both[1], "the first process alone prints"
    finish(start(corpus, tmp_path / "one", mesh, 1))
    close(curve(tmp_path / "two"), curve(tmp_path / "one"), LOSS_SHARDED)
    assert len(records(tmp_path / "two")) == STEPS
    close(records(tmp_path / "two")[-1]["eval_loss"], records(tmp_path / "one")[-1]["eval_loss"], LOSS_SHARDED)
    ours, theirs = (checkpoint.load_model(tmp_path / name)[1] for name in ("two", "one"))
    close(ours["embed"]["table"], theirs["embed"]["table"], LOSS_SHARDED)


def test_a_signal_to_one_process_stops_both_and_one_process_goes_on(corpus, tmp_path):
    running = start(corpus, tmp_path / "run", (4, 2, 1), 2, steps=4000)
    for line in running[0].stdout:
        if line.startswith("step 4/"):
            break
    running[1].send_signal(signal.SIGTERM)
    out = finish(running)[0]
    last = records(tmp_path / "run")[-1]["step"]
    assert f"stopped by a signal after step {last}/4000" in out
    assert checkpoint.find_step(tmp_path / "run").name == str(last)
    finish(start(corpus, tmp_path / "run", (4, 2, 1), 1, steps=last + 2))
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(1, last + 3))
