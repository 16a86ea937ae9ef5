"""Two processes x 4 devices with jax.distributed (gloo on CPU): the losses of one device alone.

The command is the real one, so the path covered is flags -> processes -> data shares -> step -> checkpoint.
"""

import dataclasses
import signal
import socket

import pytest

from kvattn.config import MeshConfig
from kvattn.train import checkpoint, metrics
from kvattn.train import loop as train
from tests.helpers import runs
from tests.helpers.tolerances import LOSS_SHARDED, close

OPTIONS = {
    "data__batch_size": 16,
    "train__accumulation": 2,
    "train__checkpoint_every": 3,
    "train__eval_every": 5,
    "optimizer__schedule": "constant",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return runs.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The workdir of five steps on one device in one process."""
    workdir = tmp_path_factory.mktemp("alone")
    train.fit(runs.experiment(corpus, train__steps=5, **OPTIONS), workdir=str(workdir), verbose=False)
    return workdir


def pair(corpus, workdir, mesh, steps):
    """The two processes of one run on 2 x 4 devices."""
    axes = dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), mesh, strict=True))
    line = runs.arguments(corpus, workdir=workdir, train__steps=steps, **axes, **OPTIONS)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    env = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    return [runs.launch(line, devices=4, JAX_PROCESS_ID=str(index), **env) for index in range(2)]


def finish(processes):
    """Standard outputs, after asserting that both ended well."""
    ended = [runs.finish(p) for p in processes]
    for code, out, err in ended:
        assert code == 0, out + err
    return [out for _, out, _ in ended]


def curve(workdir):
    return [[r[k] for k in ("step", "loss", "grad_norm", "tokens")] for r in runs.records(workdir)]


def test_two_processes_train_as_one(alone, corpus, tmp_path):
    """Mesh (8,1,1): each process reads half of the rows of every micro-batch, gradients cross processes."""
    first, second = finish(pair(corpus, tmp_path / "run", (8, 1, 1), 5))
    assert "step 5/5" in first and "step" not in second, "the first process alone speaks"
    assert curve(alone)[0][1] - curve(alone)[-1][1] > 0.1
    close(curve(tmp_path / "run"), curve(alone), LOSS_SHARDED)
    evals = [metrics.read_jsonl(d / metrics.JSONL)[-1]["eval_loss"] for d in (tmp_path / "run", alone)]
    close(evals[0], evals[1], LOSS_SHARDED)
    ours, theirs = (checkpoint.load_model(d)[1] for d in (tmp_path / "run", alone))
    close(ours["embed"]["table"], theirs["embed"]["table"], LOSS_SHARDED)


def test_a_signal_to_one_process_stops_both_and_one_process_goes_on(alone, corpus, tmp_path):
    """Mesh (1,2,4): parameters, gradients and optimizer state are split across the processes."""
    workdir = tmp_path / "run"
    running = pair(corpus, workdir, (1, 2, 4), 4000)
    runs.until_step(running[0], 5)
    running[1].send_signal(signal.SIGTERM)
    out = finish(running)[0]
    last = runs.records(workdir)[-1]["step"]
    assert 5 <= last < 4000 and f"stopped by a signal after step {last}/4000" in out
    assert runs.steps(workdir)[-1] == last
    close(curve(workdir)[:5], curve(alone), LOSS_SHARDED)
    cfg = runs.experiment(corpus, train__steps=last + 2, **OPTIONS)
    train.fit(dataclasses.replace(cfg, mesh=MeshConfig(1, 2, 4)), workdir=str(workdir), verbose=False)
    assert [r["step"] for r in runs.records(workdir)] == list(range(1, last + 3))
