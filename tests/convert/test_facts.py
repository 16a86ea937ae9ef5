"""Facts against float64 loops over tokens, whatever the batches; what they refuse, and that they survive a file."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import convert, model
from kvattn.attention import NoAttention
from kvattn.config import RopeConfig
from kvattn.convert import facts as facts_lib
from kvattn.convert import gather
from kvattn.errors import UserError
from tests.helpers import tiny
from tests.helpers.models import lively, tokens_of
from tests.helpers.tolerances import EXACT, F32_OP, close

# Everything between a layer's input and its keys: biases, a norm over all heads, a norm of K/V's own, shared layers,
# and a rotation that would scale keys too.
YARN = RopeConfig(theta=100.0, scaling="yarn", factor=4.0, original_length=32)
CFG = tiny.config(qkv_bias=True, qk_norm="full", kv_norm=True, kv_source=(0, 0, 2, 2), ropes=(YARN,))
TOKENS = tokens_of(CFG, rows=4, length=7)


@pytest.fixture(scope="module")
def params():
    return lively(CFG)


@pytest.fixture(scope="module")
def whole(params):
    return gather(params, CFG, [TOKENS], facts_lib.NAMES)


def f64(x):
    return np.asarray(x, np.float64)


def projected(x, attn, name, scale=None):
    """x[T,D] -> [T,heads,dim]: one head after the other, with its bias; normalised over all of them with `scale`."""
    weights, bias = f64(attn[name]), f64(attn[f"{name}_bias"])
    out = np.stack([x @ weights[:, head] + bias[head] for head in range(weights.shape[1])], 1)
    if scale is None:
        return out
    rms = np.sqrt((out**2).mean((1, 2), keepdims=True) + CFG.norm_eps)
    return out / rms * f64(scale)


def mean_of_outer_products(x):
    """x[T,heads,dim] -> [heads,dim,dim], token by token."""
    total = np.zeros((x.shape[1], x.shape[2], x.shape[2]))
    for token in x:
        for head, vector in enumerate(token):
            total[head] += np.outer(vector, vector)
    return total / len(x)


def test_facts_are_the_loops(params, whole):
    """From what each layer's attention reads (model.hidden), written out once more: products, norms, no rotation."""
    seen = model.hidden(params, CFG, model.Inputs(jnp.asarray(TOKENS)), collect=("inputs",))[2]["inputs"]
    assert whole.tokens == TOKENS.size
    for layer, x in enumerate(seen):
        block, x = params["layers"][layer], f64(x).reshape(-1, CFG.d_model)
        attn, owner = block["attn"], CFG.sources[layer] == layer
        close(whole.moment(layer, "inputs"), mean_of_outer_products(x[:, None])[0], F32_OP)
        want = projected(x, attn, "q", attn["q_norm"]["scale"])
        close(whole.moment(layer, "queries"), mean_of_outer_products(want), F32_OP)
        assert ("keys" in whole.moments[layer]) == ("values" in whole.moments[layer]) == owner
        if not owner:
            continue
        for_kv = x / f64(block["attn_norm"]["scale"]) * f64(block["kv_norm"]["scale"])
        close(whole.moment(layer, "kv_inputs"), mean_of_outer_products(for_kv[:, None])[0], F32_OP)
        keys = projected(for_kv, attn, "k", attn["k_norm"]["scale"])
        close(whole.moment(layer, "keys"), mean_of_outer_products(keys), F32_OP)
        close(whole.moment(layer, "values"), mean_of_outer_products(projected(for_kv, attn, "v")), F32_OP)
        assert whole.moment(layer, "keys").dtype == np.float64


def test_streaming_gives_the_same(params, whole):
    """A row a batch, with progress; and batches of Inputs."""
    done = []
    rows = gather(params, CFG, (row[None] for row in TOKENS), facts_lib.NAMES, progress=done.append)
    assert (rows.tokens, done) == (28, [7, 14, 21, 28])
    halves = [model.Inputs(jnp.asarray(TOKENS[:2])), model.Inputs(jnp.asarray(TOKENS[2:]))]
    for other in (rows, gather(params, CFG, halves, facts_lib.NAMES)):
        for layer, moments in enumerate(whole.moments):
            assert moments.keys() == other.moments[layer].keys()
            for name, value in moments.items():
                close(other.moment(layer, name), value, F32_OP, f"{layer} {name}")


def test_padding_is_left_out(params):
    """Rows of 7, 3 and 5 tokens, padded on the left, against the rows alone."""
    lengths = (7, 3, 5)
    positions = np.stack([np.arange(7) - (7 - n) for n in lengths]).astype(np.int32)
    batch = model.Inputs(jnp.asarray(TOKENS[:3]), jnp.asarray(np.maximum(positions, -1)))
    padded = gather(params, CFG, [batch], facts_lib.NAMES)
    alone = gather(params, CFG, [TOKENS[i : i + 1, 7 - n :] for i, n in enumerate(lengths)], facts_lib.NAMES)
    assert padded.tokens == alone.tokens == 15
    for layer, moments in enumerate(alone.moments):
        for name, value in moments.items():
            close(padded.moment(layer, name), value, F32_OP, f"{layer} {name}")


def test_tied_values_are_keys_and_a_layer_without_attention_has_nothing():
    tied = tiny.CASES["tied_kv"]
    got = gather(lively(tied), tied, [TOKENS], ("keys", "values"))
    close(got.moment(1, "keys"), got.moment(1, "values"), EXACT)
    cut = tiny.BASE.replace(attentions=(tiny.BASE.attention(0), NoAttention()))
    got = gather(lively(cut), cut, [TOKENS], ("inputs", "keys"))
    assert [sorted(moments) for moments in got.moments] == [["inputs", "keys"], [], ["inputs", "keys"], []]
    with pytest.raises(UserError, match="layer 1 has no fact 'keys'"):
        got.moment(1, "keys")


def test_facts_survive_a_file_and_name_what_they_depend_on(params, whole, tmp_path):
    noted = gather(params, CFG, [TOKENS], ("keys",), sources={"checkpoint": "here", "seed": "3"})
    noted.save(tmp_path / "facts.npz")
    again = facts_lib.load(tmp_path / "facts.npz")
    assert (again.tokens, again.sources) == (noted.tokens, noted.sources)
    assert again.sources["checkpoint"] == "here"
    assert [p.name for p in tmp_path.iterdir()] == ["facts.npz"]
    for layer, moments in enumerate(noted.moments):
        assert moments.keys() == again.moments[layer].keys()
        for name, value in moments.items():
            close(again.moment(layer, name), value, EXACT)
    other = dict(params, embed={"table": params["embed"]["table"].at[3, 2].add(1e-3)})
    assert gather(other, CFG, [TOKENS], ("keys",)).sources["params"] != whole.sources["params"]
    assert gather(params, CFG, [TOKENS[:, ::-1]], ("keys",)).sources["tokens"] != whole.sources["tokens"]
    assert noted.sources["params"] == whole.sources["params"]
    (tmp_path / "facts.npz").write_bytes((tmp_path / "facts.npz").read_bytes()[:-40])
    with pytest.raises(UserError, match="holds no facts"):
        facts_lib.load(tmp_path / "facts.npz")


def test_facts_that_do_not_fit_are_refused(params, whole):
    facts_lib.check_fit(whole, dataclasses.replace(CFG, remat="full"), ("keys",))  # how it is computed is no matter
    with pytest.raises(UserError, match="of another model"):
        facts_lib.check_fit(whole, tiny.BASE, ("keys",))
    with pytest.raises(UserError, match="no 'keys'"):
        facts_lib.check_fit(gather(params, CFG, [TOKENS], ("values",)), CFG, ("keys",))
    with pytest.raises(UserError, match="no 'kyes'; choose from inputs"):
        gather(params, CFG, [TOKENS], ("kyes",))
    nothing = model.Inputs(jnp.zeros((1, 3), jnp.int32), jnp.full((1, 3), -1, jnp.int32))
    for batches in ([], [nothing]):
        with pytest.raises(UserError, match="hold no token"):
            convert.gather(params, CFG, batches, ("keys",))
