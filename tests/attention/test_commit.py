"""Speculation's way back: a pass that commits nothing leaves every bit of a cache, and a commit of its accepted tokens
equals having fed these alone. Families with a state: test_foreign_family.py; truncate: tests/cache/test_kept.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import cache, model
from kvattn.cache.keep import KeepLast
from kvattn.config import CacheConfig
from kvattn.errors import UserError
from tests.helpers import tiny
from tests.helpers.models import lively, tokens_of
from tests.helpers.splits import forward, whole
from tests.helpers.tolerances import EXACT, F32_DECODE, close

LENGTH, DRAFT = 31, 4
CASES = {
    "full": ("mqa_cla2", CacheConfig()),
    "int8": ("gqa", CacheConfig(dtype="int8", layout="lanes")),
    "ring": ("window", CacheConfig(("ring",))),
    "ring_sinks": ("window_sinks", CacheConfig(("ring",))),
    "paged": ("gqa", CacheConfig(("paged",), page_size=16)),
    "kept": ("gqa", CacheConfig(("kept",))),
    "kept_pages": ("mqa", CacheConfig(("kept",), kept_pages=True, page_size=16)),
    "settled": ("gqa", CacheConfig(keep=KeepLast(99))),
}


@pytest.mark.parametrize("name", CASES)
def test_rounds_of_drafts_equal_the_forward_pass(name):
    """Drafts of 4 tokens with a wrong tail; 1 to 4 of each row are accepted, again and again, several turns of a ring
    of 5: the logits of accepted tokens are those of one forward pass, caches are those of feeding only these."""
    case, store = CASES[name]
    cfg = tiny.CASES[case].replace(n_layers=2, kv_source=(0, 0) if "cla2" in case else ())
    params, text = lively(cfg), tokens_of(cfg, rows=2, length=LENGTH)
    want = whole(params, cfg, text)
    caches = model.create_caches(cfg, store, 2, LENGTH)
    _, caches = forward(params, cfg, model.Inputs(jnp.asarray(text[:, :3]), empty=True), caches=caches)
    caches = cache.settle(cfg, store, caches, room=LENGTH)
    commit = jax.jit(model.commit, static_argnums=1)
    at, rng = np.array([3, 3]), np.random.default_rng(2)
    while at.max() + DRAFT <= LENGTH:
        accepted = rng.integers(1, DRAFT + 1, 2)
        where = jnp.asarray(at[:, None] + np.arange(DRAFT)[None], jnp.int32)
        right = np.take_along_axis(text, np.asarray(where), 1)
        keep = np.arange(DRAFT)[None] < accepted[:, None]
        draft = jnp.asarray(np.where(keep, right, (right + 7) % cfg.vocab_size))
        seen, same = forward(params, cfg, model.Inputs(draft, where, commit=False), caches=caches)
        jax.tree.map(lambda a, b: close(a, b, EXACT), same, caches)
        got = commit(params, cfg, caches, seen.pending, where, jnp.asarray(accepted, jnp.int32))
        _, fed = forward(params, cfg, model.Inputs(draft, jnp.where(keep, where, -1)), caches=caches)
        if store.dtype == "float32":
            jax.tree.map(lambda a, b: close(a, b, F32_DECODE), got, fed)
            for row in range(2):
                now = slice(at[row], at[row] + accepted[row])
                close(seen.logits[row, : accepted[row]], want[row, now], F32_DECODE, f"{at} row {row}")
        else:
            jax.tree.map(lambda a, b: close(a, b, EXACT), got[0].leaves["v"].values, fed[0].leaves["v"].values)
        caches, at = got, at + accepted
        assert np.asarray(caches[0].length).tolist() == at.tolist()
    assert at.min() > 3 * 5  # a ring of 5 has turned


def test_nothing_accepted_is_nothing_written():
    cfg, store = tiny.CASES["window"].replace(n_layers=2), CacheConfig(("ring",))
    params, text = lively(cfg), tokens_of(cfg, rows=2, length=12)
    caches = model.create_caches(cfg, store, 2, LENGTH)
    _, caches = forward(params, cfg, model.Inputs(jnp.asarray(text[:, :8]), empty=True), caches=caches)
    at = jnp.broadcast_to(jnp.arange(8, 12, dtype=jnp.int32)[None, :], (2, 4))
    seen, _ = forward(params, cfg, model.Inputs(jnp.asarray(text[:, 8:]), at, commit=False), caches=caches)
    got = model.commit(params, cfg, caches, seen.pending, at, jnp.zeros(2, jnp.int32))
    jax.tree.map(lambda a, b: close(a, b, EXACT), got, caches)
    with pytest.raises(UserError, match="a ring has overwritten what a roll-back would need"):
        cache.truncate(got, jnp.array([3, 3], jnp.int32))
