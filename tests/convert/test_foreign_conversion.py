"""The acid test of conversions: a method that the library never heard of, through public API alone, everywhere that the
built-in ones go: the config's door, plan, apply, prepare, a folder, and decoding from it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import config as c
from kvattn import convert, formats, model, prepare
from kvattn.config.check import need
from kvattn.convert import Context, Converted, Method
from kvattn.convert import facts as facts_lib
from kvattn.data.tokenizer import ByteTokenizer
from kvattn.decode import generation as decode
from kvattn.errors import UserError
from tests.helpers import tiny
from tests.helpers.models import lively
from tests.helpers.tolerances import EXACT, F32_OP, close

MODEL = tiny.config(vocab_size=258, n_layers=3)


@dataclasses.dataclass(frozen=True)
class Projected(Method, tag="tests_projected"):
    """Keys and values read the `rank` strongest directions of each layer's input alone (eigenvectors of its second
    moment), but in layers of `skip`; all layers get a window of 50."""

    wants = ("inputs",)
    rank: int = 0
    skip: tuple[int, ...] = ()
    calibration_tokens: int = 96

    def check(self):
        need(self.rank >= 1, f"convert.rank is {self.rank}; give the number of directions to keep.")

    def plan(self, cfg, facts=None):
        need(self.rank <= cfg.d_model, f"convert.rank is {self.rank}, above the model's width of {cfg.d_model}.")
        return cfg.replace(masks=(c.MaskConfig(window=50),))

    def apply(self, params, cfg, context):
        layers = list(params["layers"])
        for layer in set(cfg.owners) - set(self.skip):
            top = np.linalg.eigh(context.facts.moment(layer, "inputs"))[1][:, -self.rank :]
            project = jnp.asarray(top @ top.T, jnp.float32)
            attn = dict(layers[layer]["attn"])
            attn |= {name: jnp.einsum("de,ekh->dkh", project, attn[name]) for name in ("k", "v")}
            layers[layer] = {**layers[layer], "attn": attn}
        new = self.plan(cfg, context.facts)
        return Converted(new, {**params, "layers": tuple(layers)}, False, f"{self.rank} directions")


STEP = c.Conversion.of("tests_projected", rank=5, skip=(1,))


@pytest.fixture(scope="module", autouse=True)
def leave_the_registry_as_it_was():
    yield
    c.Conversion.members.pop("tests_projected")


@pytest.fixture
def experiment(monkeypatch, tmp_path):
    loaded = formats.Loaded(MODEL, lively(MODEL), ByteTokenizer(), "tiny")
    read = formats.load
    monkeypatch.setattr(formats, "load", lambda path, dtype="float32": loaded if path == "tiny" else read(path, dtype))
    words = np.random.default_rng(5).choice(["the ", "cat ", "sat ", "mat. ", "\n"], 900)
    for part in range(4):
        (tmp_path / f"{part}.txt").write_text("".join(words[part * 225 :]))
    data = c.DataConfig("text_files", (f"{tmp_path}/*.txt",), tokenizer="bytes", batch_size=2, seq_len=16, seed=4)
    return c.Experiment(seed=7, checkpoint=c.CheckpointConfig("tiny"), convert=(STEP,), data=data)


def test_it_goes_through_the_door(experiment):
    again = c.from_config_dict(c.to_config_dict(experiment))
    assert again == experiment
    assert (again.convert[0].rank, again.convert[0].skip) == (5, (1,))
    assert json.loads(json.dumps(c.plain(again.convert)))[0]["kind"] == "tests_projected"
    with pytest.raises(UserError, match=r"convert\[0\].rang is no field of Projected \(nearest valid: rank\)"):
        c.from_config_dict({"convert": ({"kind": "tests_projected", "rang": 3},)})
    with pytest.raises(UserError, match="convert.rank is 0"):
        c.from_config_dict({"convert": ({"kind": "tests_projected"},)})
    with pytest.raises(UserError, match="above the model's width"):
        convert.plan(MODEL, (dataclasses.replace(STEP, rank=99),))


def test_it_is_told_facts_of_the_model_it_converts(experiment):
    """Alone, from facts or from batches; behind another step, from what that step left."""
    params = lively(MODEL)
    batch = model.Inputs(jnp.asarray(np.random.default_rng(1).integers(0, 258, (2, 13)), jnp.int32))
    facts = convert.gather(params, MODEL, [batch], ("inputs",))
    given = convert.convert(params, MODEL, STEP, Context(facts=facts))
    made = convert.convert(params, MODEL, STEP, Context(batches=(batch,)))
    jax.tree.map(lambda a, b: close(a, b, EXACT), given.params, made.params)
    assert given.model == convert.plan(MODEL, (STEP,))
    k = np.asarray(made.params["layers"][0]["attn"]["k"], np.float64)
    assert np.linalg.matrix_rank(k.reshape(28, -1), tol=1e-4) == 5
    assert made.params["layers"][1]["attn"]["k"] is params["layers"][1]["attn"]["k"]
    first = c.Conversion.of("gqa", k_heads=1)
    both = convert.convert_all(params, MODEL, (first, STEP), Context(batches=(batch,)))
    pooled = convert.convert(params, MODEL, first)
    want = convert.gather(pooled.params, pooled.model, [batch], ("inputs",))
    assert both.facts[0] is None
    assert both.facts[1].sources == want.sources
    close(both.facts[1].moment(2, "inputs"), want.moment(2, "inputs"), F32_OP)
    with pytest.raises(UserError, match="'tests_projected' wants inputs of calibration text and there is none"):
        convert.convert(params, MODEL, STEP)
    with pytest.raises(UserError, match="of another model"):
        convert.convert(pooled.params, pooled.model, STEP, Context(facts=facts))


def test_it_is_prepared_saved_opened_and_decoded(experiment, tmp_path):
    made = prepare.prepare(experiment)
    assert (made.note, made.exact, made.source) == ("5 directions", False, "tiny")
    assert made.facts[0].tokens == 96
    assert made.facts[0].sources["seed"] == "7"
    other = prepare.prepare(dataclasses.replace(experiment, seed=8))
    assert other.facts[0].sources["tokens"] != made.facts[0].sources["tokens"], "text follows the seed"
    prepare.save(made, tmp_path / "saved")
    again = formats.load(str(tmp_path / "saved"))
    assert again.model == made.model
    jax.tree.map(lambda a, b: close(a, b, EXACT), again.params, made.params)
    assert again.tokenizer.fingerprint == made.tokenizer.fingerprint
    facts = facts_lib.load(tmp_path / "saved" / "facts" / "0.npz")
    close(facts.moment(2, "inputs"), made.facts[0].moment(2, "inputs"), EXACT)
    prompts, fields = [again.tokenizer.encode("To be")], c.DecodeConfig(max_new_tokens=8)
    texts = [decode.generate(m.params, m.model, prompts, fields, c.CacheConfig()).tokens for m in (made, again)]
    assert texts[0] == texts[1]
    plainly = decode.generate(lively(MODEL), MODEL, prompts, fields, c.CacheConfig()).tokens
    assert texts[0] != plainly, "the conversion must change something for this to mean anything"
