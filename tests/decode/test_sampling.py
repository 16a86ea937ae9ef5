"""Sampling against a sort-based NumPy oracle, a case checkable by hand, and the independence of rows."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn.config import DecodeConfig
from kvattn.decode import sampling
from kvattn.errors import UserError

sample = jax.jit(sampling.sample)
filter_logits = jax.jit(sampling.filter_logits)


def oracle_kept(logits, temperature, top_k, top_p, min_p):
    """The set of kept token ids, by sorting in float64: one row, transformers' order of filters."""
    scores = logits.astype(np.float64) / temperature
    order = np.argsort(-scores, kind="stable")
    if top_k:
        order = order[:top_k]
    prob = np.exp(scores[order] - scores.max())
    prob = prob / prob.sum()
    if top_p < 1.0:
        before = np.cumsum(prob) - prob  # probability of everything better
        order, prob = order[before < top_p], prob[before < top_p]
    return set(order[prob >= min_p * prob.max()].tolist())


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 7, 1.0, 0.0),
        (0.7, 0, 0.9, 0.0),
        (1.3, 0, 1.0, 0.05),
        (0.9, 23, 0.6, 0.01),
        (2.0, 1, 0.3, 0.9),
        (1.0, 999, 0.999, 0.0),
    ],
)
def test_filters_match_sorting(rng, temperature, top_k, top_p, min_p):
    logits = rng.normal(size=(5, 211)).astype(np.float32) * np.linspace(0.5, 6.0, 5, dtype=np.float32)[:, None]
    cfg = DecodeConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = np.asarray(filter_logits(jnp.asarray(logits), sampling.create(cfg, 5)))
    for row in range(5):
        kept = set(np.flatnonzero(got[row] > sampling.MASKED).tolist())
        assert kept == oracle_kept(logits[row], temperature, top_k, top_p, min_p)
        ids = sorted(kept)
        np.testing.assert_allclose(got[row, ids], logits[row, ids] / np.float32(temperature), rtol=1e-6)


def test_filters_by_hand():
    """Probabilities 0.5, 0.3, 0.15, 0.05 in shuffled places: what each filter leaves can be read off."""
    logits = jnp.log(jnp.asarray([[0.15, 0.5, 0.05, 0.3]], jnp.float32))

    def kept(**fields):
        sampler = sampling.create(DecodeConfig(temperature=1.0, **fields), 1)
        return np.flatnonzero(np.asarray(filter_logits(logits, sampler))[0] > sampling.MASKED).tolist()

    assert kept(top_k=3) == [0, 1, 3]
    assert kept(top_p=0.7) == [1, 3]
    assert kept(top_p=0.45) == [1]
    assert kept(top_p=0.9) == [0, 1, 3]
    assert kept(min_p=0.2) == [0, 1, 3]
    assert kept(min_p=0.7) == [1]
    # after top_k=2 the rest is 0.625, 0.375: nucleus 0.6 needs the first alone, 0.65 both
    assert kept(top_k=2, top_p=0.6) == [1]
    assert kept(top_k=2, top_p=0.65) == [1, 3]


def test_ties_are_kept_together():
    logits = jnp.asarray([[1.0, 3.0, 2.0, 2.0, 2.0]], jnp.float32)
    sampler = sampling.create(DecodeConfig(temperature=1.0, top_k=2), 1)
    kept = np.asarray(filter_logits(logits, sampler))[0] > sampling.MASKED
    assert kept.tolist() == [False, True, True, True, True]


def test_draws_follow_the_probabilities():
    """4001 seeds drawn once: frequencies within 4.5 standard errors of the tempered, filtered softmax."""
    probs = np.asarray([0.1, 0.4, 0.02, 0.3, 0.18])
    count, temperature = 4001, 1.7
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probs, jnp.float32))[None, :], (count, 5))
    cfg = DecodeConfig(temperature=temperature, top_k=4, seed=3)
    tokens = np.asarray(sample(logits, sampling.create(cfg, count), jnp.int32(2)))
    want = probs ** (1 / temperature)
    want[2] = 0.0
    want /= want.sum()
    seen = np.bincount(tokens, minlength=5) / count
    assert seen[2] == 0
    assert np.all(np.abs(seen - want) <= 4.5 * np.sqrt(want * (1 - want) / count))


def test_rows_do_not_see_each_other(rng):
    """A sample's tokens are those of its seed alone: in any row, in any batch, and they change with the step."""
    logits = rng.normal(size=(3, 97)).astype(np.float32)
    cfg = DecodeConfig(temperature=1.0, top_p=0.95)
    seeds = [11, 2**32 + 5, 7]

    def draw(rows, step):
        sampler = sampling.create(cfg, len(rows), [seeds[row] for row in rows])
        return np.asarray(sample(jnp.asarray(logits[list(rows)]), sampler, jnp.int32(step))).tolist()

    together = [draw((0, 1, 2), step) for step in range(19)]
    for row in range(3):
        assert [draw((row,), step)[0] for step in range(19)] == [tokens[row] for tokens in together]
    assert [draw((2, 0), step) for step in range(19)] == [[tokens[2], tokens[0]] for tokens in together]
    assert len(collections.Counter(tokens[0] for tokens in together)) > 5
    steps = (18, 0, 7)
    sampler = sampling.create(cfg, 3, seeds)
    apart = np.asarray(sample(jnp.asarray(logits), sampler, jnp.asarray(steps, jnp.int32))).tolist()
    assert apart == [together[step][row] for row, step in enumerate(steps)]
    assert all(apart != tokens for tokens in together)


def test_greedy_and_mixed_temperatures(rng):
    logits = jnp.asarray(rng.normal(size=(2, 53)).astype(np.float32))
    best = np.argmax(np.asarray(logits), axis=-1).tolist()
    greedy = sampling.create(DecodeConfig(seed=9), 2)
    assert greedy.greedy and np.asarray(sample(logits, greedy, jnp.int32(0))).tolist() == best
    mixed = sampling.create(DecodeConfig(temperature=5.0), 2).replace(temperature=jnp.asarray([0.0, 5.0]))
    drawn = [np.asarray(sample(logits, mixed, jnp.int32(step))).tolist() for step in range(13)]
    assert {row[0] for row in drawn} == {best[0]} and len({row[1] for row in drawn}) > 3


def test_one_compilation_for_all_parameters(rng):
    traces = []

    @jax.jit
    def run(logits, sampler):
        traces.append(1)
        return sampling.sample(logits, sampler, jnp.int32(0))

    logits = jnp.asarray(rng.normal(size=(2, 31)).astype(np.float32))
    for temperature, top_k in ((0.5, 3), (1.5, 9), (0.9, 30)):
        run(logits, sampling.create(DecodeConfig(temperature=temperature, top_k=top_k, seed=top_k), 2))
    assert len(traces) == 1


@pytest.mark.parametrize(
    "fields", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 1.0}]
)
def test_out_of_range_fields_are_named(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        sampling.create(DecodeConfig(**fields), 1)


def test_seed_count_must_match():
    with pytest.raises(UserError, match="seeds has 2 entries for 3"):
        sampling.create(DecodeConfig(), 3, [1, 2])
