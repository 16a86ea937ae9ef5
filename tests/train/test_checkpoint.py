"""Checkpoints: layouts in and out, kill -9, SIGTERM, a full disk, a read-only workdir, damage, another config."""

import dataclasses
import os
import pathlib
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import model
from kvattn.config import Experiment, MeshConfig, OptimizerConfig, TrainConfig
from kvattn.data.tokenizer import ByteTokenizer
from kvattn.errors import UserError
from kvattn.train import checkpoint
from kvattn.train import loop as train
from kvattn.train import step as train_step
from sharding import make_mesh
from tests.helpers import runs, tiny
from tests.helpers.tolerances import EXACT, close

CFG = tiny.config(n_layers=2, d_model=24, d_ff=38, n_heads=4, n_k_heads=2, n_v_heads=2, vocab_size=62)
META = checkpoint.make_meta(Experiment(name="x", model=CFG), CFG)


def layout_on(*mesh, cfg=CFG, name="adamw"):
    return train_step.make_layout(cfg, OptimizerConfig(name=name), 9, make_mesh(MeshConfig(*mesh)))


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda g, w: close(g, w, EXACT), jax.device_get(got), jax.device_get(want))


def filled(layout, seed):
    """A state with no two equal values in it."""
    state = train_step.init_state(layout, seed)
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(seed)
    noisy = [
        jax.device_put(rng.permuted(np.arange(x.size) + seed).reshape(x.shape).astype(x.dtype), x.sharding)
        for x in leaves
    ]
    return dataclasses.replace(jax.tree.unflatten(tree, noisy), step=state.step)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_restored_onto_another_mesh_bit_for_bit(name, tmp_path):
    state = filled(layout_on(1, 4, 2, name=name), 3)
    want = jax.device_get(state)
    saver = checkpoint.Checkpoints(str(tmp_path), keep=1)
    saver.save(7, state, {"position": 12}, META)
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)  # overwrite while it is being written
    saver.close()
    target = layout_on(2, 2, 2, name=name)
    reader = checkpoint.Checkpoints(str(tmp_path), keep=1)
    got, data_state = reader.restore(reader.latest(), target.abstract)
    assert data_state == {"position": 12} and int(got.step) == 7 and reader.meta(7)["model"] == META["model"]
    same((got.params, got.opt_state), (want.params, want.opt_state))
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(f"{x.sharding} != {s}"), got, target.shardings)
    reader.close()


def test_the_newest_are_kept_and_read_back_as_a_model(tmp_path):
    layout, tokenizer = layout_on(1, 1, 1), ByteTokenizer()
    saver = checkpoint.Checkpoints(str(tmp_path), keep=2)
    checkpoint.save_tokenizer(tmp_path, tokenizer)
    states = {step: filled(layout, step) for step in (2, 4, 6)}
    for step, state in states.items():
        saver.save(step, state, {}, META)
    saver.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "6"]
    for path, step in ((tmp_path, 6), (tmp_path / "checkpoints", 6), (tmp_path / "checkpoints" / "4", 4)):
        cfg, params, read = checkpoint.load_model(path)
        assert cfg == CFG and read.fingerprint == tokenizer.fingerprint
        same(params, states[step].params)
        assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(params))
    half = checkpoint.load_model(tmp_path, "bfloat16")[1]
    same(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), states[6].params))


def test_scanned_layers_come_back_unrolled(tmp_path):
    scanned = dataclasses.replace(CFG, scan_layers=True)
    layout = layout_on(1, 1, 1, cfg=scanned)
    saver = checkpoint.Checkpoints(str(tmp_path), keep=1)
    state = train_step.init_state(layout, 0)
    saver.save(1, state, {}, checkpoint.make_meta(Experiment(), scanned))
    saver.close()
    cfg, params, tokenizer = checkpoint.load_model(tmp_path)
    assert cfg == CFG and tokenizer is None
    same(params, model.unstack_layers(state.params, scanned))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": dataclasses.replace(CFG, n_k_heads=1)}, "config.model.n_k_heads=2 and this run has 1"),
        ({"optimizer": OptimizerConfig(learning_rate=0.5)}, "config.optimizer.learning_rate=0.0003"),
        ({"seed": 3}, "config.seed=0"),
        ({"train": TrainConfig(accumulation=4)}, "config.train.accumulation=1"),
    ],
)
def test_another_config_is_named(change, field):
    base = Experiment(name="x", model=CFG)
    now = dataclasses.replace(base, **change)
    with pytest.raises(UserError, match=field):
        checkpoint.check_same({"format": 1, **META}, checkpoint.make_meta(now, now.model), "here")


def test_what_may_change_may_change():
    free = TrainConfig(steps=999, keep=9, log_every=1, checkpoint_every=2, eval_every=3)
    now = Experiment(name="y", model=dataclasses.replace(CFG, remat="full"), train=free, mesh=MeshConfig(2, 2, 2))
    checkpoint.check_same({"format": 1, **META}, checkpoint.make_meta(now, now.model), "here")
    with pytest.raises(UserError, match="format 0"):
        checkpoint.check_same({"format": 0, **META}, META, "here")


@pytest.fixture
def written(tmp_path):
    saver = checkpoint.Checkpoints(str(tmp_path), keep=2)
    saver.save(1, filled(layout_on(1, 1, 1), 1), {}, META)
    saver.close()
    return tmp_path / "checkpoints" / "1"


@pytest.mark.parametrize("damage", ["truncate", "delete", "meta"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_is_one_sentence(written, damage):
    files = [p for p in (written / "params").rglob("*") if p.is_file() and p.stat().st_size > 1000]
    assert files
    if damage == "meta":
        (written / "meta" / "metadata").write_text('{"model": ')
    for path in files if damage != "meta" else ():
        path.write_bytes(path.read_bytes()[:-700]) if damage == "truncate" else path.unlink()
    with pytest.raises(UserError, match="cannot be read") as error:
        checkpoint.load_model(written)
    assert "\n" not in str(error.value)


def test_a_directory_without_checkpoints(tmp_path):
    with pytest.raises(UserError, match="no kvattn checkpoint"):
        checkpoint.load_model(tmp_path)


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    places = [tmp_path / "file" / "run", pathlib.Path("/proc/kvattn")] + ([locked] if os.geteuid() else [])
    for place in places:
        with pytest.raises(UserError, match="config.workdir: cannot write"):
            checkpoint.Checkpoints(str(place), keep=1)


def test_a_disk_with_too_little_room_keeps_the_checkpoint(tmp_path, monkeypatch):
    state = filled(layout_on(1, 1, 1), 1)
    saver = checkpoint.Checkpoints(str(tmp_path), keep=1)
    saver.save(1, state, {}, META)
    saver.wait()
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(UserError, match=r"0.1 MB free and the next checkpoint needs .* \(step 1 is intact\)"):
        saver.save(2, state, {}, META)
    saver.close()
    same(checkpoint.load_model(tmp_path)[1], state.params)


# --- the command, killed -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return runs.write_corpus(tmp_path_factory.mktemp("corpus"))


OPTIONS = {"train__steps": 40, "train__checkpoint_every": 7}


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """The workdir of forty steps in one process."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    code, _, err = runs.finish(runs.launch(runs.arguments(corpus, workdir=workdir, **OPTIONS)))
    assert code == 0, err
    assert [r["step"] for r in runs.records(workdir)] == list(range(1, 41)) and runs.steps(workdir) == [35, 40]
    return workdir


def test_kill_9_then_the_same_command_gives_the_same_curve(corpus, uninterrupted, tmp_path):
    """Killed at random moments, also while a checkpoint is being written; every float32 loss is equal."""
    rng, workdir = np.random.default_rng(time.time_ns() % 2**32), tmp_path / "run"
    line = runs.arguments(corpus, workdir=workdir, **OPTIONS)
    for low, high in ((15, 21), (29, 36)):  # a save waits for the one before it, so step 7 is there
        process = runs.launch(line)
        runs.until_step(process, int(rng.integers(low, high)))
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        assert runs.finish(process)[0] == -signal.SIGKILL
        assert runs.steps(workdir), "a checkpoint must be there to resume from"
    code, out, err = runs.finish(runs.launch(line))
    assert code == 0, err
    assert "steps 0 to" not in out, "the last run must have resumed"
    assert runs.records(workdir) == runs.records(uninterrupted)
    assert [p.name for p in (workdir / "checkpoints").iterdir() if not p.name.isdigit()] == []
    same(checkpoint.load_model(workdir)[1], checkpoint.load_model(uninterrupted)[1])


def test_sigterm_saves_and_the_same_command_resumes(corpus, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    line = runs.arguments(corpus, workdir=workdir, **OPTIONS)
    process = runs.launch(line)
    runs.until_step(process, 9)
    process.send_signal(signal.SIGTERM)
    code, out, err = runs.finish(process)
    assert code == 0, err
    last = runs.records(workdir)[-1]["step"]
    assert runs.steps(workdir)[-1] == last < 40
    assert f"stopped by a signal after step {last}/40" in out and "the same command resumes" in out
    assert runs.finish(runs.launch(line))[0] == 0
    assert runs.records(workdir) == runs.records(uninterrupted)


def test_a_disk_that_fills_up_is_one_sentence_and_keeps_the_checkpoint(corpus, uninterrupted, tmp_path):
    """Files may not grow past 40 blocks (20 kB), less than the embedding alone (25 kB), however the storage
    library cuts its files: the save at step 42 fails inside it."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    line = runs.arguments(corpus, workdir=workdir, **(OPTIONS | {"train__steps": 60}))
    code, _, err = runs.finish(runs.launch(line, wrapper=("sh", "-c", 'ulimit -f 40 && exec "$@"', "sh")))
    assert code == 2, err
    errors = [text for text in err.strip().splitlines() if not text.startswith(("WARNING", "I0", "W0"))]
    assert len(errors) == 1 and errors[0].startswith("error: ") and "(step 40 is intact)" in errors[0], err
    assert runs.steps(workdir) == [35, 40]
    same(checkpoint.load_model(workdir)[1], checkpoint.load_model(uninterrupted)[1])
    cfg = runs.experiment(corpus, workdir=workdir, **(OPTIONS | {"train__steps": 43}))
    train.fit(cfg, workdir=str(workdir), verbose=False)
    assert runs.steps(workdir) == [42, 43] and runs.records(workdir)[:40] == runs.records(uninterrupted)
