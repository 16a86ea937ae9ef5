"""Prefill and decode on 8 fake chips against the unsharded model: every layout, way of splitting K and V, and overlap.

The oracle is the plain forward pass over each row's own tokens, without cache and without padding, so that one
comparison covers the layout's collectives, the cache split over chips, and padding on either side.
"""

import jax
import numpy as np
import pytest

from kvattn import stacking
from kvattn.decode import partitioned as sharded
from kvattn.errors import UserError
from sharding.layout import torus_layouts
from tests.helpers.sharded_cases import MODELS, SLOTS, TOKENS, case, filled, mesh_of, store
from tests.helpers.tolerances import F32_SHARDED, close


def program(name, phase, layout, overlap, batch, shape=(2, 2, 2), scan=False):
    """(call, its abstract arguments): a compiled program that places its own arguments."""
    p = sharded.build(
        MODELS[name],
        store(name),
        layout,
        mesh_of(shape),
        phase=phase,
        batch=batch,
        context=SLOTS,
        tokens=TOKENS if phase == "prefill" else 0,
        weights="float32",
        overlap=overlap,
        scan=scan,
    )
    compiled = jax.jit(p.fn).lower(*p.args).compile()

    def call(*args):
        return compiled(*jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), args, p.args))

    return call, p.args


def same_caches(got, want):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(one, other, F32_SHARDED, "cache")


def check_decode(name, layout, overlap="none", batch=8, shape=(2, 2, 2)):
    params, _, steps, want = case(name, batch)
    caches, end = filled(name, batch)
    call, _ = program(name, "decode", layout, overlap, batch, shape)
    for i, (tokens, positions) in enumerate(steps):
        logits, caches = call(params, tokens, positions, caches)
        close(logits, want[1 + i], F32_SHARDED, f"step {i} of {name} in {layout}")
    same_caches(caches, end)


# --- the matrix: every layout x every way of splitting K and V, and every model in several of them -----------

DECODE = [
    ("palm", "ws_1d/replicated", "none"),
    ("palm", "ws_2d/by_batch:xyz", "two_way"),
    ("palm", "wg_x/by_batch:yz", "one_way"),
    ("palm", "wg_xyz/by_batch:xyz", "compiler"),
    ("mqa", "ws_2d/by_seq:xyz", "one_way"),
    ("mqa", "ws_1d/by_batch:yz+by_seq:x", "two_way"),
    ("mqa", "wg_xy/by_batch:z+by_seq:xy", "none"),
    ("mqa", "ws_2d/by_seq:x", "compiler"),
    ("gqa", "ws_2d/by_head:z+by_batch:xy", "one_way"),
    ("gqa", "ws_1d/by_head:yz", "none"),
    ("gqa", "wg_xyz/by_head:z+by_batch:xy", "two_way"),
    ("gqa", "wg_x/replicated", "compiler"),
    ("gqa", "ws_2d/by_head:z+by_seq:xy", "none"),
    ("gqa", "wg_xy/by_head:yz+by_seq:x", "one_way"),
    ("mha", "ws_2d/by_head:xyz", "two_way"),
    ("mha", "ws_1d/by_head:xyz", "one_way"),
    ("mha", "wg_xy/by_head:xyz", "compiler"),
    ("mha", "wg_x/by_batch:xyz", "none"),
    ("uneven", "ws_2d/by_head:z+by_batch:y", "none"),
    ("uneven", "wg_xyz/by_batch:z", "one_way"),
    ("many_v", "ws_2d/by_batch:yz", "two_way"),
    ("many_v", "ws_1d/by_seq:yz", "none"),
    ("cla2", "ws_2d/by_batch:xyz", "none"),
    ("cla2", "wg_x/by_head:z+by_seq:y", "two_way"),
    ("ring", "ws_2d/by_seq:xyz", "none"),
    ("ring", "wg_xy/by_batch:xy", "two_way"),
    ("ring", "ws_1d/by_head:z+by_batch:xy", "compiler"),
    ("qk_head", "ws_2d/by_head:yz+by_batch:x", "one_way"),
    ("qk_head", "wg_xy/by_batch:yz", "none"),
    ("qk_full", "ws_2d/by_batch:xyz", "two_way"),
    ("qk_full", "wg_x/by_head:z", "none"),
    ("gemma", "ws_2d/by_head:z+by_batch:xy", "none"),
    ("gemma", "wg_xyz/by_batch:xyz", "one_way"),
    ("tied_kv", "ws_2d/by_batch:xyz", "one_way"),
    ("tied_kv", "ws_1d/by_seq:z", "none"),
    ("ladder", "ws_2d/by_batch:xyz", "one_way"),
    ("ladder", "wg_xy/by_batch:xyz", "none"),
]


@pytest.mark.parametrize("name, layout, overlap", DECODE)
def test_decode(name, layout, overlap):
    check_decode(name, layout, overlap)


# --- prefill in one layout, decode in another ----------------------------------------------------------------


def check_replicas(tree):
    """Chips that hold the same part of an array hold the same numbers: none is told apart by the PartitionSpec."""
    for leaf in jax.tree.leaves(tree):
        first = {}
        for shard in leaf.addressable_shards:
            close(shard.data, first.setdefault(str(shard.index), shard.data), F32_SHARDED, "a replica")


def check_handover(name, prefill, decode, overlaps, batch=8, shape=(2, 2, 2), scan=False):
    """The prompt in one layout and each later token in the other, over the cache that the first has left."""
    cfg = MODELS[name]
    params, prompt, steps, want = case(name, batch)
    first, before = program(name, "prefill", prefill, overlaps[0], batch, shape, scan)
    then, after = program(name, "decode", decode, overlaps[1], batch, shape)
    empty = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), before[3])
    logits, caches = first(stacking.stack_layers(params, cfg) if scan else params, *prompt, empty)
    close(logits, want[0], F32_SHARDED, f"prefill of {name} in {prefill}")
    check_replicas((logits, caches))
    if scan:
        caches = stacking.unstack_caches(caches, cfg)
    elif torus_layouts.parse(prefill).kv == torus_layouts.parse(decode).kv:
        for got, wanted in zip(jax.tree.leaves(caches), jax.tree.leaves(after[3]), strict=True):
            assert got.sharding.is_equivalent_to(wanted.sharding, got.ndim)
    same_caches(caches, filled(name, batch)[0])
    for i, (tokens, positions) in enumerate(steps):
        logits, caches = then(params, tokens, positions, caches)
        close(logits, want[1 + i], F32_SHARDED, f"step {i} of {name} in {decode} after {prefill}")
    check_replicas((logits, caches))
    if not scan and "ws_1d" not in prefill + decode:  # one copy of the weights serves both
        for one, other in zip(jax.tree.leaves(before[0]), jax.tree.leaves(after[0]), strict=True):
            assert one.sharding == other.sharding


HANDOVER = [
    ("palm", "wg_xyz/by_batch:xyz", "ws_2d/by_batch:xyz", ("one_way", "one_way")),
    ("mqa", "ws_2d/replicated", "wg_x/replicated", ("one_way", "none")),
    ("gqa", "wg_x/by_head:z+by_batch:xy", "ws_2d/by_head:z+by_batch:xy", ("none", "two_way")),
    ("mha", "wg_xy/by_head:xyz", "ws_2d/by_batch:xyz", ("compiler", "none")),
    ("cla2", "wg_xyz/by_batch:z+by_seq:y", "ws_2d/by_batch:z+by_seq:y", ("one_way", "compiler")),
    ("ring", "wg_xy/by_batch:xyz", "ws_2d/by_batch:xyz", ("none", "none")),
    ("qk_head", "ws_1d/by_head:yz+by_seq:x", "ws_1d/by_batch:xyz", ("two_way", "none")),
]


@pytest.mark.parametrize("name, prefill, decode, overlaps", HANDOVER)
def test_prefill_in_one_layout_and_decode_in_another(name, prefill, decode, overlaps):
    check_handover(name, prefill, decode, overlaps)


@pytest.mark.parametrize("prefill, overlap", [("ws_2d/by_seq:xyz", "one_way"), ("ws_1d/by_seq:xyz", "none")])
def test_prefill_and_decode_of_one_sequence(prefill, overlap):
    """A batch of one: the context is split over all chips, and softmax merged across them."""
    check_handover("mqa", prefill, "ws_2d/by_seq:xyz", (overlap, "none"), batch=1)


@pytest.mark.parametrize(
    "name, prefill, decode, overlap",
    [
        ("gqa", "wg_xyz/by_batch:xyz", "ws_2d/by_batch:xyz", "two_way"),
        ("cla4", "ws_2d/by_head:z+by_batch:xy", "wg_xy/by_head:z+by_batch:xy", "none"),
    ],
)
def test_prefill_as_a_scan_over_layers(name, prefill, decode, overlap):
    """Stacked weights and caches; unstacked, the caches are what decode reads."""
    check_handover(name, prefill, decode, (overlap, "none"), scan=True)


@pytest.mark.parametrize(
    "shape, name, prefill, decode",
    [
        ((1, 4, 2), "gqa", "wg_xy/by_head:z+by_batch:y", "ws_2d/by_head:z+by_batch:y"),
        ((4, 2, 1), "palm", "wg_x/by_batch:xyz", "ws_2d/by_batch:xyz"),
        ((4, 2, 1), "mqa", "ws_2d/by_seq:x", "ws_1d/by_seq:x"),
    ],
)
def test_meshes_of_other_shapes(shape, name, prefill, decode):
    check_handover(name, prefill, decode, ("one_way", "two_way"), shape=shape)


def test_only_prefills_are_scans():
    with pytest.raises(UserError, match="scan is True for phase 'decode'"):
        program("gqa", "decode", "ws_2d/replicated", "none", 8, scan=True)
