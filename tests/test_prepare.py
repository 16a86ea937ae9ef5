"""The door that every command comes through: one rng rule, weights where they are needed, models that are saved."""

import contextlib
import dataclasses
import importlib.util
import io
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from experiments.study.phases import Phases
from kvattn import config as c
from kvattn import convert, formats, model, prepare
from kvattn.data.tokenizer import ByteTokenizer
from kvattn.decode import generation
from kvattn.errors import UserError
from kvattn.evaluate import perplexity
from kvattn.train import checkpoint, metrics
from kvattn.train import loop as train
from tests.helpers import tiny
from tests.helpers.models import lively, run, tokens_of
from tests.helpers.paths import ROOT
from tests.helpers.tolerances import EXACT, F32_OP, close

MODEL = tiny.config(vocab_size=258, n_layers=2, n_k_heads=6, n_v_heads=6)
RANDOM = c.Conversion.of("gqa", k_heads=2, method="random")
STEPS = (RANDOM, c.Conversion.of("cla", factor=2))


class Counted:
    """How many checkpoints were read and models converted."""

    loads = conversions = 0


@pytest.fixture
def counted(monkeypatch):
    """formats.load of `tiny` gives a tiny model each time anew; everything else is read as ever."""
    counts, read, convert_all = Counted(), formats.load, convert.convert_all

    def load(path, dtype="float32"):
        counts.loads += 1
        return formats.Loaded(MODEL, lively(MODEL), ByteTokenizer(), "tiny") if path == "tiny" else read(path, dtype)

    def converted(*args):
        counts.conversions += 1
        return convert_all(*args)

    monkeypatch.setattr(formats, "load", load)
    monkeypatch.setattr(convert, "convert_all", converted)
    return counts


@pytest.fixture
def experiment(counted, tmp_path):
    rng = np.random.default_rng(5)
    for part in range(5):
        (tmp_path / f"part{part}.txt").write_text("".join(rng.choice(["the ", "cat ", "sat ", "mat. ", "\n"], 500)))
    return c.Experiment(
        name="prepared",
        seed=3,
        workdir=str(tmp_path / "run"),
        checkpoint=c.CheckpointConfig("tiny"),
        convert=STEPS,
        data=c.DataConfig("text_files", (f"{tmp_path}/*.txt",), tokenizer="bytes", batch_size=4, seq_len=24),
        optimizer=c.OptimizerConfig(learning_rate=1e-2, schedule="constant"),
        train=c.TrainConfig(steps=2, checkpoint_every=1, log_every=1),
        eval=c.EvalConfig(context=16, stride=8, max_tokens=40),
        decode=c.DecodeConfig(prompt="To be", max_new_tokens=5),
    )


def distilled(cfg):
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, distill=c.DistillConfig(1.0, 1.0)))


def further(cfg, steps):
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=steps))


def equal(a, b):
    jax.tree.map(lambda x, y: close(x, y, EXACT), a, b)


def main_of(name, monkeypatch):
    """The main of a command, loaded apart: its flags have their defaults, `json` is set."""
    with monkeypatch.context() as patch:
        for kind in ("DEFINE_bool", "DEFINE_string"):
            patch.setattr(flags, kind, lambda flag, value, _: types.SimpleNamespace(value=value or flag == "json"))
        spec = importlib.util.spec_from_file_location(f"tests_main_{name}", ROOT / "experiments" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.main


# --- one rng rule --------------------------------------------------------------------------------------


def test_every_command_decodes_evaluates_and_trains_the_same_random_heads(experiment, monkeypatch, capsys):
    """The rule, written out; then what each main hands to the library."""
    loaded = formats.load("tiny")
    rng = jax.random.fold_in(jax.random.key(3), 1)
    want = convert.convert_all(loaded.params, MODEL, STEPS, convert.Context(rng)).params
    equal(prepare.prepare(experiment).params, want)
    other = prepare.prepare(dataclasses.replace(experiment, seed=4)).params
    assert np.abs(other["layers"][0]["attn"]["k"] - want["layers"][0]["attn"]["k"]).max() > 0.01
    given = {}

    def generated(params, *args, **rest):
        given["decode"] = params
        return generate(params, *args, **rest)

    def scored(params, *args, **rest):
        given["evaluate"] = params
        return nll(params, *args, **rest)

    def fitted(cfg, **rest):
        given["train"] = jax.tree.map(jnp.copy, rest["params"])
        return fit(cfg, **rest)

    generate, nll, fit = generation.generate, perplexity.token_nll, train.fit
    monkeypatch.setattr(generation, "generate", generated)
    monkeypatch.setattr(perplexity, "token_nll", scored)
    monkeypatch.setattr(train, "fit", fitted)
    for name in ("decode", "evaluate", "train"):
        main_of(name, monkeypatch)(experiment)
    assert sorted(given) == ["decode", "evaluate", "train"]
    for name, params in given.items():
        equal(params, want)
        assert params["layers"][0]["attn"]["k"].shape == (28, 2, 10), name
    lab = Phases.__new__(Phases)
    lab.cfg, lab.base, lab.show = experiment, loaded, types.SimpleNamespace(now=lambda text: None)
    equal(lab._convert(c.VariantConfig("row", STEPS)).params, want)
    capsys.readouterr()


def test_random_weights_are_those_that_training_draws(experiment):
    scratch = dataclasses.replace(experiment, checkpoint=c.CheckpointConfig(), convert=(), model=MODEL)
    made = prepare.prepare(scratch)
    equal(made.params, model.init(jax.random.key(3), MODEL))
    assert (made.note, made.source, made.exact) == ("from scratch", "random weights of seed 3", True)
    assert prepare.for_training(scratch).params is None
    drawn = train.fit(further(scratch, 0), verbose=False).params  # in one program: rounded otherwise
    jax.tree.map(lambda a, b: close(a, b, F32_OP), drawn, made.params)
    with pytest.raises(UserError, match="convert has steps but config.checkpoint.path is empty"):
        prepare.prepare(dataclasses.replace(scratch, convert=STEPS))
    with pytest.raises(UserError, match="no layers and config.checkpoint.path is empty"):
        prepare.prepare(dataclasses.replace(scratch, model=c.ModelConfig()))


# --- what is loaded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("distil", [False, True])
def test_a_run_that_goes_on_loads_no_weights_but_a_teacher(experiment, counted, distil, tmp_path):
    """One load and one conversion at the start; afterwards none, but for the teacher; and the run is the same."""
    cfg = distilled(experiment) if distil else experiment
    quiet = {"verbose": False}
    train.fit_prepared(cfg, prepare.for_training(cfg), **quiet)
    assert (counted.loads, counted.conversions) == (1, 1)
    resumed = train.fit_prepared(further(cfg, 4), prepare.for_training(further(cfg, 4)), **quiet)
    assert (counted.loads, counted.conversions) == (2 if distil else 1, 1)
    assert resumed.step == 4
    straight = dataclasses.replace(further(cfg, 4), workdir=str(tmp_path / "straight"))
    whole = train.fit_prepared(straight, prepare.for_training(straight), **quiet)
    assert counted.conversions == 2
    assert resumed.losses == whole.losses
    equal(resumed.params, whole.params)
    assert resumed.model == whole.model
    if distil:
        assert all("kl" in record for record in metrics.read_jsonl(f"{cfg.workdir}/{metrics.JSONL}"))
    changed = dataclasses.replace(cfg, convert=(RANDOM,))
    with pytest.raises(UserError, match="convert"):
        train.fit_prepared(changed, prepare.for_training(changed), **quiet)


def test_a_kernel_that_cannot_serve_is_refused_before_anything_is_converted(experiment, counted):
    cfg = dataclasses.replace(experiment, model=c.ModelConfig(kernel="cudnn"))
    with pytest.raises(UserError, match="model.kernel is 'cudnn'"):
        prepare.prepare(cfg)
    assert counted.conversions == 0
    made = prepare.prepare(dataclasses.replace(experiment, model=c.ModelConfig(remat="full", scan_layers=True)))
    assert (made.model.remat, made.model.scan_layers) == ("full", False)


def test_a_teacher_is_the_unconverted_checkpoint(experiment):
    assert prepare.prepare(experiment).teacher is None
    teacher = prepare.prepare(distilled(experiment)).teacher
    assert teacher.model == MODEL
    equal(teacher.params, lively(MODEL))


def test_fit_draws_no_weights_for_a_checkpoint(experiment):
    made = prepare.prepare(experiment)
    with pytest.raises(UserError, match="no parameters were given and the workdir has no checkpoint"):
        train.fit(experiment, model=made.model, workdir=experiment.workdir, verbose=False)


# --- saved models --------------------------------------------------------------------------------------


def test_a_converted_model_is_saved_and_opened_like_any_checkpoint(experiment, tmp_path):
    made = prepare.prepare(experiment)
    folder = tmp_path / "saved"
    prepare.save(made, folder)
    opened = prepare.prepare(dataclasses.replace(experiment, convert=(), checkpoint=c.CheckpointConfig(str(folder))))
    assert opened.model == made.model
    equal(opened.params, made.params)
    tokens = tokens_of(made.model)
    close(run(opened.params, opened.model, tokens), run(made.params, made.model, tokens), EXACT)
    assert opened.tokenizer.encode("To be") == made.tokenizer.encode("To be")
    half = formats.load(str(folder), "bfloat16").params["embed"]["table"]
    assert half.dtype == jnp.bfloat16
    with pytest.raises(UserError, match="holds checkpoint 0 already"):
        prepare.save(made, folder)
    with pytest.raises(UserError, match="no weights to save"):
        prepare.save(dataclasses.replace(made, params=None), tmp_path / "other")


def test_a_saved_model_is_no_run(experiment, tmp_path):
    """It is trained from as a checkpoint, in a workdir of the new run's."""
    folder = tmp_path / "saved"
    prepare.save(prepare.prepare(experiment), folder)
    inside = dataclasses.replace(experiment, workdir=str(folder))
    with pytest.raises(UserError, match="holds a model, no run to go on with"):
        train.fit_prepared(inside, prepare.for_training(inside), verbose=False)
    beside = dataclasses.replace(experiment, convert=(), checkpoint=c.CheckpointConfig(str(folder)))
    with contextlib.redirect_stdout(io.StringIO()):
        done = train.fit_prepared(beside, prepare.for_training(beside))
    assert done.step == 2
    assert checkpoint.newest(beside.workdir).name == "2"
