"""The typed config: re-typing, validation, derived fields."""

import dataclasses

import pytest

from kvattn import config as c
from kvattn.errors import UserError
from tests.helpers import tiny

EXPERIMENT = c.Experiment(
    name="x",
    model=tiny.CASES["mqa_cla2_pattern"],
    convert=(c.Conversion.of("gqa", k_heads=1), c.Conversion.of("cla", factor=2)),
    study=c.StudyConfig(rows=(c.VariantConfig("base"), c.VariantConfig("own", model=tiny.CASES["rope_pattern"]))),
)


def test_a_config_survives_the_round_trip_and_is_hashable():
    again = c.from_config_dict(c.to_config_dict(EXPERIMENT))
    assert again == EXPERIMENT
    assert hash(again) == hash(EXPERIMENT)


def test_the_config_dict_is_locked_all_the_way_down():
    loose = c.to_config_dict(EXPERIMENT)
    for holder in (loose, loose.model, loose.train.distill, loose.convert[0], loose.study.rows[1].model.masks[0]):
        with pytest.raises(AttributeError):
            holder.unheard_of = 1


def changed(path, value):
    """EXPERIMENT as nested dictionaries with one field changed."""
    tree = c.plain(EXPERIMENT)
    holder = tree
    *parents, last = path.split(".")
    for parent in parents:
        holder = holder[parent]
    holder[last] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sede", 1, "config.sede is no field of Experiment (nearest valid: seed)"),
        ("train.distil", 1, "config.train.distil is no field of TrainConfig (nearest valid: distill)"),
        ("seed", "one", "config.seed is 'one' (str); it takes int."),
        ("seed", True, "config.seed is True (bool); it takes int."),
        ("model.tied_kv", 1, "config.model.tied_kv is 1 (int); it takes bool."),
        ("cache.kinds", "full", "config.cache.kinds is 'full'; it takes a tuple."),
        ("cache.kinds", ("full", 3), "config.cache.kinds[1] is 3"),
        ("train", 3, "config.train is 3; it takes the fields of TrainConfig."),
        ("convert", ({"kind": "gqa", "heads": 1},), "config.convert[0].heads is no field of Gqa"),
    ],
)
def test_wrong_keys_and_types_are_named(path, value, message):
    with pytest.raises(UserError) as error:
        c.from_config_dict(changed(path, value))
    assert message in str(error.value)


def test_an_int_serves_where_a_float_is_meant():
    cfg = c.from_config_dict(changed("optimizer.learning_rate", 1))
    assert cfg.optimizer.learning_rate == 1.0
    assert isinstance(cfg.optimizer.learning_rate, float)


ILLEGAL = {
    # field to change: (value, what the sentence must name)
    "model.d_model": (0, "model.d_model"),
    "model.n_k_heads": (4, "model.n_k_heads"),
    "model.variant": ("head", "model.variant"),
    "model.kernel": ("cuda", "model.kernel"),
    "model.norm": ("rms", "model.norm"),
    "model.mlp": ("relu", "model.mlp"),
    "model.residual": ("parallel", "model.residual"),
    "model.remat": ("all", "model.remat"),
    "model.tied_kv": (True, "model.tied_kv"),
    "model.kv_source": ((0, 1), "model.kv_source"),
    "model.masks": ((), "model.masks"),
    "model.ropes": ((), "model.ropes"),
    "cache.kinds": (("pages",), "cache.kinds"),
    "cache.dtype": ("float16", "cache.dtype"),
    "cache.capacity": (-1, "cache.capacity"),
    "mesh.data": (0, "mesh.data"),
    "data.source": ("books", "data.source"),
    "data.batch_size": (0, "data.batch_size"),
    "data.eval_fraction": (1.0, "data.eval_fraction"),
    "optimizer.name": ("sgd", "optimizer.name"),
    "optimizer.learning_rate": (0.0, "optimizer.learning_rate"),
    "train.accumulation": (3, "train.accumulation"),
    "train.compute_dtype": ("float16", "train.compute_dtype"),
    "train.distill.temperature": (0.0, "train.distill.temperature"),
    "decode.top_p": (0.0, "decode.top_p"),
    "decode.max_new_tokens": (0, "decode.max_new_tokens"),
    "eval.stride": (1000, "eval.stride"),
    "eval.needle_depths": ((1.5,), "eval.needle_depths"),
    "checkpoint.dtype": ("int8", "checkpoint.dtype"),
}


@pytest.mark.parametrize("path", sorted(ILLEGAL))
def test_illegal_values_are_one_sentence_that_names_the_field(path):
    value, field = ILLEGAL[path]
    with pytest.raises(UserError) as error:
        c.from_config_dict(changed(path, value))
    message = str(error.value)
    assert field in message
    assert "\n" not in message
    assert len(message) < 260


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kv_source": (0, 2, 2, 2)}, "kv_source[1]"),
        ({"kv_source": (0, 0, 1, 1)}, "kv_source[2]"),
        ({"kv_source": (0, 0, 2, 2), "ropes": (c.RopeConfig(), None)}, "ropes differ"),
        ({"masks": (c.MaskConfig(sinks=2),)}, "masks[0].sinks"),
        ({"ropes": (c.RopeConfig(dim=7),)}, "ropes[0].dim"),
        ({"ropes": (c.RopeConfig(dim=12),)}, "ropes[0].dim"),
        ({"ropes": (c.RopeConfig(scaling="yarn", factor=2.0),)}, "ropes[0].original_length"),
        ({"residual": "parallel_palm", "norm_placement": "post"}, "norm_placement"),
        ({"norm": "layernorm", "norm_offset": 1.0}, "norm_offset"),
    ],
)
def test_illegal_combinations_of_a_model(changes, field):
    with pytest.raises(UserError) as error:
        c.validate(tiny.config(**changes))
    assert field in str(error.value)


@pytest.mark.parametrize(
    ("step", "field"),
    [
        (c.Conversion.of("gqa"), "convert.k_heads is 0"),
        (c.Conversion.of("cla", factor=2, method="random"), "convert.method is 'random'"),
        (c.Conversion.of("window", window=3, sinks=-1), "convert.sinks is -1"),
    ],
)
def test_bad_conversions_show_before_anything_is_loaded(step, field):
    """In the config itself and in every row of a study."""
    row = c.StudyConfig(rows=(c.VariantConfig("x", (step,)),))
    for changes in ({"convert": (step,)}, {"study": row}):
        with pytest.raises(UserError) as error:
            c.validate(dataclasses.replace(EXPERIMENT, **changes))
        assert field in str(error.value)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"kind": "gqua", "k_heads": 1}, "convert[0].kind is 'gqua' (nearest valid: gqa)"),
        ({"kind": "gqa", "k_heads": 1, "factor": 2}, "convert[0].factor is no field of Gqa"),
        ({"k_heads": 1}, "convert[0].kind is missing; choose one of cla, first_half, gqa"),
    ],
)
def test_unknown_conversions_and_fields_are_named(step, message):
    with pytest.raises(UserError) as error:
        c.from_config_dict(changed("convert", (step,)))
    assert message in str(error.value)
    if "kind" in step:
        with pytest.raises(UserError):
            c.Conversion.of(step.pop("kind"), **step)


def test_a_ring_needs_a_window_in_every_reader():
    cfg = dataclasses.replace(EXPERIMENT, model=tiny.CASES["cla2"], convert=(), cache=c.CacheConfig(kinds=("ring",)))
    with pytest.raises(UserError, match="layer 0.*no window"):
        c.validate(cfg)


@pytest.mark.parametrize("name", sorted(tiny.CASES))
def test_tiny_models_are_legal(name):
    c.validate(tiny.CASES[name])


def test_sources_owners_and_readers():
    cfg = tiny.CASES["cla3"]
    assert cfg.owners == (0, 3)
    assert cfg.readers(0) == (0, 1, 2)
    assert cfg.readers(3) == (3, 4)
    assert tiny.BASE.sources == (0, 1, 2, 3)
    assert tiny.CASES["pattern"].mask(2) == c.MaskConfig()
    assert tiny.CASES["pattern"].mask(3) == tiny.SINKS


def test_shortcuts_set_steps_and_choose_rows():
    cfg = c.from_config_dict(c.to_config_dict(dataclasses.replace(EXPERIMENT, steps=3, variants=("own",))))
    assert cfg.train.steps == 3
    assert [row.name for row in cfg.study.rows] == ["own"]
    assert c.from_config_dict(c.to_config_dict(EXPERIMENT)).train.steps == c.TrainConfig().steps


def test_row_names_are_unique_and_scratch_rows_do_not_convert():
    twice = c.StudyConfig(rows=(c.VariantConfig("a"), c.VariantConfig("a")))
    with pytest.raises(UserError, match="'a' twice"):
        c.validate(dataclasses.replace(EXPERIMENT, study=twice))
    both = c.VariantConfig("a", (c.Conversion.of("cla", factor=2),), model=tiny.BASE)
    with pytest.raises(UserError, match="both model and convert"):
        c.validate(dataclasses.replace(EXPERIMENT, study=c.StudyConfig(rows=(both,))))
