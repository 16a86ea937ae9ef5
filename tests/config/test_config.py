"""The typed config: re-typing, validation, derived fields."""

import dataclasses
import json

import pytest

from kvattn import config as c
from kvattn.attention import Heads, NoAttention, gate
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
    for holder in (
        loose,
        loose.model,
        loose.train.distill,
        loose.convert[0],
        loose.study.rows[1].model.layers[0].attention,
    ):
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
    "model.variant": ("heads", "model.variant"),
    "model.layers": (
        ({"attention": {"name": "head"}},),
        "model.layers[0].attention.name is 'head' (nearest valid: heads)",
    ),
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
        ({"masks": (c.MaskConfig(sinks=2),)}, "layers[0].mask.sinks"),
        ({"ropes": (c.RopeConfig(dim=7),)}, "layers[0].rope.dim"),
        ({"ropes": (c.RopeConfig(dim=12),)}, "layers[0].rope.dim"),
        ({"ropes": (c.RopeConfig(scaling="yarn", factor=2.0),)}, "layers[0].rope.original_length"),
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
        gate(cfg.model, cfg.cache)


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


def test_layers_are_values_that_mix_freely():
    """Families, head counts, masks and rotations of their own in every layer; the pattern repeats."""
    wide, narrow = Heads(n_heads=6, n_k_heads=3, n_v_heads=3, head_dim=10), Heads(n_heads=2, n_k_heads=1, n_v_heads=1)
    layers = (c.Layer(wide, tiny.WINDOW), c.Layer(narrow, rope=None), c.Layer(NoAttention()))
    cfg = c.ModelConfig(n_layers=5, layers=layers)
    c.validate(cfg)
    assert [cfg.attention(l).tag for l in range(5)] == ["heads", "heads", "none", "heads", "heads"]
    assert cfg.owners == (0, 1, 3, 4)
    assert cfg.replace(head_dim=4).attention(1) == Heads(n_heads=2, n_k_heads=1, n_v_heads=1, head_dim=4)
    assert cfg.replace(head_dim=4).attention(2) == NoAttention()
    assert cfg.replace(masks=(tiny.SINKS,)).mask(4) == tiny.SINKS
    for again in (c.to_config_dict(cfg), c.plain(cfg), json.loads(json.dumps(c.plain(cfg)))):
        assert c.from_config_dict(again, c.ModelConfig) == cfg
    with pytest.raises(TypeError, match="n_keys is no field"):
        cfg.replace(n_keys=1)


def test_one_field_of_a_family_changes_in_all_layers_that_have_it():
    loose = c.to_config_dict(dataclasses.replace(EXPERIMENT, convert=()))
    loose.model.n_heads = 4
    assert {layer.attention.n_heads for layer in c.from_config_dict(loose).model.every} == {4}


def test_the_form_before_layers_were_values_is_read():
    """Flat heads with patterns of masks and ropes, as checkpoints of format 1 have them."""
    cfg = tiny.CASES["mqa_cla2_pattern"]
    new = c.plain(cfg)
    old = {name: value for name, value in new.items() if name != "layers"} | c.plain(cfg.attention(0))
    del old["name"]
    old |= {"variant": "heads", "masks": [c.plain(layer.mask) for layer in cfg.every], "ropes": [c.plain(cfg.rope(0))]}
    assert c.from_config_dict(json.loads(json.dumps(old)), c.ModelConfig).every == cfg.every


def test_a_config_from_scratch_names_its_layers():
    assert c.from_config_dict(c.to_config_dict(c.Experiment())).model.layers == ()
    with pytest.raises(UserError, match="model.layers has 3 entries"):
        c.validate(c.ModelConfig(n_layers=2, layers=(c.Layer(Heads()), c.Layer(NoAttention()), c.Layer(Heads()))))
