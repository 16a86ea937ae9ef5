"""Every file in configs/ builds, validates, keeps the house rules, and its models have parameters."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sizes, variants
from experiments.common import cli
from kvattn import convert, model, spec
from kvattn.attention import gate
from kvattn.errors import UserError
from tests.helpers.paths import ROOT

FOLDER = ROOT / "configs"
NAMES = cli.config_names()
# Every argument a file knows beside its default.
ARGUMENTS = {
    "study_smollm2": ["wide", "base+mqa"],
    "uptrain_gqa": ["mean", "first", "random"],
    "uptrain_cla": ["2", "3"],
    "uptrain_mlkv_pythia": ["6x1", "4x3", "1x1"],
    "train_mqar": ["mha", "mqa", "cla2"],
    "decode_smollm2": list(variants.ROWS),
    "evaluate": list(variants.ROWS),
    "evaluate_smollm2": list(variants.ROWS),
}
SPECS = [n for n in NAMES] + [f"{n}:{a}" for n, args in ARGUMENTS.items() for a in args]
TABLES = {"__init__", "base", "sizes", "variants"}
# Scalar parameters as published: model cards, and Pope et al. table 1 (in billions there).
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "pythia-160m": 162_322_944,
    "pythia-1b": 1_011_781_632,
}
PALM = {"palm-8b": 8.63, "palm-62b": 62.5, "palm-540b": 540.4}


def load(name):
    file, _, arg = name.partition(":")
    return cli.parse(["x", f"--config=configs/{file}.py" + (f":{arg}" if arg else "")])[0]


def test_every_file_is_an_experiment_or_a_table():
    files = {p.stem for p in FOLDER.glob("*.py")}
    assert files == set(NAMES) | TABLES
    assert set(ARGUMENTS) <= set(NAMES)


@pytest.mark.parametrize("name", SPECS)
def test_config_builds_and_its_models_have_parameters(name):
    cfg = load(name)
    assert cfg.name
    assert cfg.workdir == f"workdirs/{cfg.name}"
    models = [row.model for row in (*cfg.study.rows, *cfg.sharding_study.rows) if row.model is not None]
    assert cfg.model.layers or cfg.checkpoint.path or models
    for one in models + ([cfg.model] if cfg.model.layers else []):
        leaves = jax.tree.leaves(spec.abstract(model.param_specs(one)))
        assert leaves
        assert sum(leaf.size for leaf in leaves) == spec.count(model.param_specs(one))


@pytest.mark.parametrize("name", NAMES)
def test_header_states_command_paper_hardware_minutes_and_expectation(name):
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 40
    header = text.split('"""')[1]
    for field in ("Command:", "Paper", "Hardware:", "Minutes:", "Expect:"):
        assert re.search(rf"^{field}", header, re.MULTILINE), f"{name} has no {field}"
    assert "experiments." in header


def test_default_study_has_the_rows_of_the_readme():
    names = [row.name for row in load("study_smollm2").study.rows]
    assert names == ["base", "mqa", "cla2", "cla3", "mlkv", "mqa_cla2", "window_sinks"]


@pytest.fixture(scope="module")
def small_smollm2():
    """SmolLM2's 30 layers and 9/3 heads at a width that costs nothing."""
    cfg = sizes.size("smollm2-135m", vocab_size=7, d_model=9, head_dim=2, v_head_dim=2, d_ff=5)
    draw = np.random.default_rng(0).normal
    return cfg, spec.map_specs(lambda s: jnp.asarray(draw(size=s.shape), jnp.float32), model.param_specs(cfg))


@pytest.mark.parametrize("name", sorted(variants.ROWS))
def test_rows_convert_smollm2(name, small_smollm2):
    cfg, params = small_smollm2
    row = variants.ROWS[name]
    done = convert.convert_all(params, cfg, row.convert, convert.Context(rng=jax.random.key(1)))
    got = jax.tree.map(lambda a: a.shape, done.params)
    assert got == spec.map_specs(lambda s: s.shape, model.param_specs(done.model))
    smaller = spec.count(model.param_specs(done.model)) < spec.count(model.param_specs(cfg))
    assert smaller == any(step.tag != "window" for step in row.convert)
    gate(done.model, row.cache)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_sizes_have_their_published_parameter_count(name):
    assert spec.count(model.param_specs(sizes.SIZES[name])) == PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(PALM))
def test_palm_sizes(name):
    billions = spec.count(model.param_specs(sizes.SIZES[name])) / 1e9
    assert abs(billions - PALM[name]) < 0.006 * PALM[name]


def test_scratch_rows_have_equal_parameters():
    counts = [spec.count(model.param_specs(row.model)) for row in load("study_scratch").study.rows]
    assert max(counts) < 1.002 * min(counts)


def test_unknown_names_are_user_errors():
    with pytest.raises(UserError, match="choose one of tiny"):
        sizes.size("llama9")
    with pytest.raises(UserError, match="choose one of base"):
        variants.rows("mqqa")
