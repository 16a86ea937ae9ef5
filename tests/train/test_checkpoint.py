"""Checkpoints: layouts in and out, kill -9, SIGTERM, a full disk, a read-only workdir, damage, another config."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import stacking
from kvattn.config import (
    EXECUTION,
    Conversion,
    Experiment,
    MaskConfig,
    MeshConfig,
    OptimizerConfig,
    RopeConfig,
    TrainConfig,
)
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
SAVED = {"format": checkpoint.FORMAT, "step": 1, **META}

# Meta of format 1 as it lies on disk, by hand: CFG in the field names of before layers were values.
OLD_MODEL = {
    **{"vocab_size": 62, "d_model": 24, "n_layers": 2, "n_heads": 4, "n_k_heads": 2, "n_v_heads": 2, "head_dim": 10},
    **{"v_head_dim": 14, "d_ff": 38, "max_length": 128, "variant": "heads", "tied_kv": False, "kv_source": []},
    **{"kv_norm": False, "masks": [{"window": 0, "sinks": 0}], "attn_scale": 0.0, "attn_soft_cap": 0.0},
    "ropes": [
        {"theta": 100.0, "dim": 0, "scaling": "none", "factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 0.0, "truncate": True, "original_length": 0}
    ],
    **{"qk_norm": "none", "qkv_bias": False, "o_bias": False, "norm": "rmsnorm", "norm_eps": 1e-5, "norm_offset": 0.0},
    **{"norm_placement": "pre", "residual": "serial", "mlp": "swiglu", "mlp_bias": False, "tied_embeddings": True},
    **{"embed_scale": 1.0, "logit_soft_cap": 0.0, "kernel": "xla", "decode_kernel": "xla", "scan_layers": False},
    "remat": "none",
}
OLD_CONVERT = {"kind": "drop_everything", "k_heads": 1, "v_heads": 0, "method": "mean", "factor": 0, "owners": 0}
OLD_CONVERT |= {"window": 0, "sinks": 0, "keep_every": 0}


def old_meta(model=OLD_MODEL, **changes):
    """A meta of format 1: what has not changed since comes from META."""
    cache = {"kinds": ["full"], "dtype": "float32", "no_longer_a_field": 3}
    experiment = META["experiment"] | {"model": model, "cache": cache} | changes
    return {"format": 1, "step": 1, "model": model, "experiment": experiment}


@dataclasses.dataclass(frozen=True)
class DropEverything(Conversion, tag="drop_everything"):
    """A conversion that exists in this file alone."""

    k_heads: int = 0
    method: str = "mean"

    def check(self):
        pass


del Conversion.members["drop_everything"]  # no other test module sees it


@pytest.fixture(autouse=True)
def drop_everything_is_known(monkeypatch):
    monkeypatch.setitem(Conversion.members, "drop_everything", DropEverything)


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
    same(params, stacking.unstack_layers(state.params, scanned))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model": CFG.replace(n_k_heads=1)}, r"config.model.layers\[0\].attention.n_k_heads=2 and this run has 1"),
        ({"model": CFG.replace(scan_layers=True)}, "config.model.scan_layers=False and this run has True"),
        ({"convert": (DropEverything(2),)}, r"config.convert=\[\] and this run has None"),
        ({"optimizer": OptimizerConfig(learning_rate=0.5)}, "config.optimizer.learning_rate=0.0003"),
        ({"seed": 3}, "config.seed=0"),
        ({"train": TrainConfig(accumulation=4)}, "config.train.accumulation=1"),
    ],
)
def test_another_config_is_named(change, field):
    base = Experiment(name="x", model=CFG)
    now = dataclasses.replace(base, **change)
    with pytest.raises(UserError, match=field):
        checkpoint.check_same(SAVED, checkpoint.make_meta(now, now.model), "here")


def test_what_may_change_may_change():
    free = TrainConfig(steps=999, keep=9, log_every=1, checkpoint_every=2, eval_every=3)
    how = {"kernel": "splash", "decode_kernel": "mosaic_tpu", "remat": "full"}
    now = Experiment(name="y", model=CFG.replace(**how), train=free, mesh=MeshConfig(2, 2, 2))
    assert how.keys() == set(EXECUTION) - {"scan_layers"}
    checkpoint.check_same(SAVED, checkpoint.make_meta(now, now.model), "here")


def test_a_layer_more_in_the_pattern_is_no_difference():
    twice = dataclasses.replace(CFG, layers=CFG.layers * 2)
    checkpoint.check_same(SAVED, checkpoint.make_meta(Experiment(model=twice), twice), "here")


@pytest.fixture
def written(tmp_path):
    saver = checkpoint.Checkpoints(str(tmp_path), keep=2)
    saver.save(1, filled(layout_on(1, 1, 1), 1), {}, META)
    saver.close()
    return tmp_path / "checkpoints" / "1"


def rewrite(written, meta):
    """Puts `meta` in the place of what was saved."""
    (written / "meta" / "metadata").write_text(json.dumps(meta))


def saved_meta(written):
    reader = checkpoint.Checkpoints(str(written.parent.parent), keep=2)
    try:
        return reader.meta(1)
    finally:
        reader.close()


def test_format_1_loads_and_resumes(written):
    want = checkpoint.load_model(written)[1]
    rewrite(written, old_meta())
    cfg, params, _ = checkpoint.load_model(written)
    assert cfg == CFG
    same(params, want)
    checkpoint.check_same(saved_meta(written), META, "here")
    rewrite(written, old_meta(seed=3))
    with pytest.raises(UserError, match="config.seed=3 and this run has 0"):
        checkpoint.check_same(saved_meta(written), META, "here")
    other = OLD_MODEL | {"qk_norm": "head"}
    rewrite(written, old_meta(other))
    with pytest.raises(UserError, match=r"layers\[0\].attention.qk_norm='head' and this run has 'none'"):
        checkpoint.check_same(saved_meta(written), META, "here")


def test_patterns_of_format_1_are_layers():
    """Three masks and two rotations over four layers: not the six layers after which both repeat."""
    masks, ropes = [{"window": 3}, {"window": 3}, {"window": 0}], [{"theta": 100.0}, None]
    old = OLD_MODEL | {"n_layers": 4, "masks": masks, "ropes": ropes}
    cfg = tiny.config(**{name: getattr(CFG, name) for name in ("d_model", "d_ff", "vocab_size")}, n_heads=4)
    cfg = cfg.replace(n_k_heads=2, n_v_heads=2, masks=(MaskConfig(3), MaskConfig(3), MaskConfig()))
    cfg = cfg.replace(ropes=(RopeConfig(theta=100.0), None))
    checkpoint.check_same(old_meta(old), checkpoint.make_meta(Experiment(model=cfg), cfg), "here")


def test_conversions_of_format_1():
    now = Experiment(model=CFG, convert=(DropEverything(k_heads=1),))
    meta = checkpoint.make_meta(now, CFG)
    assert meta["experiment"]["convert"] == [{"kind": "drop_everything", "k_heads": 1, "method": "mean"}]
    checkpoint.check_same(old_meta(convert=[OLD_CONVERT]), meta, "here")
    with pytest.raises(UserError, match=r"config.convert\[0\].k_heads=5 and this run has 1"):
        checkpoint.check_same(old_meta(convert=[OLD_CONVERT | {"k_heads": 5}]), meta, "here")
    for change in ({"kind": "no_longer_here"}, {"window": 4}):  # a kind, and a use of a field, that is gone
        with pytest.raises(
            UserError, match="here was written by another version.*or use a new config.workdir"
        ) as error:
            checkpoint.check_same(old_meta(convert=[OLD_CONVERT | change]), meta, "here")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [0, 99, None])
def test_an_unknown_format_is_refused_by_every_reader(written, number):
    meta = SAVED | {"format": number}
    rewrite(written, meta)
    for read in (
        lambda: checkpoint.load_model(written),
        lambda: saved_meta(written),
        lambda: checkpoint.check_same(meta, META, "here"),
    ):
        with pytest.raises(UserError, match=f"has checkpoint format {number}, this version reads 1 and 2"):
            read()


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


def test_a_run_of_format_1_goes_on(corpus, uninterrupted, tmp_path):
    """Forty steps of before, whose meta is rewritten in the old form, and three more in this version."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted, workdir)
    cfg = runs.experiment(corpus, workdir=workdir, **(OPTIONS | {"train__steps": 43}))
    meta = checkpoint.make_meta(cfg, cfg.model)["experiment"]
    (layer,) = meta["model"].pop("layers")
    old = meta["model"] | layer["attention"] | {"masks": [layer["mask"]], "ropes": [layer["rope"]], "variant": "heads"}
    assert old.pop("name") == "heads"
    rewrite(
        workdir / "checkpoints" / "40", {"format": 1, "step": 40, "model": old, "experiment": meta | {"model": old}}
    )
    train.fit(cfg, workdir=str(workdir), verbose=False)
    assert runs.steps(workdir) == [42, 43] and runs.records(workdir)[:40] == runs.records(uninterrupted)
    assert json.loads((workdir / "checkpoints" / "43" / "meta" / "metadata").read_text())["format"] == 2


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
