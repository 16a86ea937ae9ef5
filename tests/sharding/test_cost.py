"""The analytical cost model against closed forms written out here, the sheet's tables, and the ledger on one chip."""

import dataclasses
import itertools
import math
import types

import pytest

from configs.sizes import size
from kvattn import account, plan
from kvattn.config import CacheConfig, MaskConfig
from kvattn.decode import partitioned as sharded
from sharding import ShardingError, cost
from sharding.cost.hardware import CHIPS
from sharding.layout import torus_layouts
from sharding.layout.torus_layouts import FFN_LAYOUTS, Layout, parse
from tests.helpers import tiny
from tests.helpers.tolerances import CLOSED_FORM, close

BF16 = CacheConfig(dtype="bfloat16")
MESHES = [(2, 4, 8), (4, 4, 4), (8, 2, 2), (1, 2, 16), (16, 1, 4)]


def palm(name="palm-540b", n_heads=64, weights="bfloat16", **changes) -> cost.Workload:
    return plan.workload(size(name, n_heads=n_heads, **changes), BF16, weights=weights)


def decode(work, layout, mesh=(4, 4, 4), chip="v4", batch=64, context=2048, **more) -> cost.Prediction:
    return cost.predict(work, parse(layout), mesh, chip, phase="decode", batch=batch, tokens=1, context=context, **more)


def prefill(work, layout, mesh=(4, 4, 4), chip="v4", batch=64, context=2048, **more) -> cost.Prediction:
    return cost.predict(
        work, parse(layout), mesh, chip, phase="prefill", batch=batch, tokens=context, context=context, **more
    )


# --- the mlp's volumes: section 3 ----------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("mesh", MESHES)
def test_volumes_are_the_closed_forms(mesh, gated):
    """Sheet sections 3.1 to 3.3 and 11; the gated MLP scatters 2F, gathers F, and has three weights."""
    (X, Y, Z), T, E, F = mesh, 3 * 64, 1024, 5 * 1024
    n, weights = X * Y * Z, 3 * E * F if gated else 2 * E * F
    hidden = (3 if gated else 2) * T * F / (Y * Z) if X > 1 else 0  # collectives over one chip are none
    want = {
        "ws_1d": (2 * T * E, 0),
        "ws_2d": (2 * T * E / X + hidden, 0),
        "wg_x": (2 * T * E / X, weights * X / n if X > 1 else 0),
        "wg_xy": (2 * T * E / (X * Y) if Z > 1 else 0, weights * X * Y / n),
        "wg_xyz": (0, weights),
    }
    for ffn in FFN_LAYOUTS:
        got = cost.volume_elements(ffn, T, E, F, mesh, gated=gated)
        assert (got.activations, got.weights) == want[ffn], ffn


def test_two_dimensional_with_a_trivial_axis_is_one_dimensional():
    """Oracle 3: at X = 1 the written form 2 BL (E + F/n) is no better than 1D; without the trivial axis it is 1D."""
    T, E, F = 640, 2048, 6144
    for mesh in ((1, 4, 4), (1, 2, 8), (1, 16, 1)):
        one, two = (cost.volume_elements(ffn, T, E, F, mesh, ring=True) for ffn in ("ws_1d", "ws_2d"))
        assert one == two
        assert one.activations == 2 * T * E * 15 / 16
        assert 2 * T * (E + F / 16) >= cost.volume_elements("ws_1d", T, E, F, mesh).total


@pytest.mark.parametrize("n, E, F", [(64, 4096, 16384), (16, 1024, 4096), (256, 2048, 8192), (32, 2048, 4096)])
@pytest.mark.parametrize("gated", [False, True])
def test_optimal_split(n, E, F, gated):
    """Brute force over factorisations: the best X is the formula's, or one of the powers of two beside it."""
    best = min(
        (d for d in (1 << i for i in range(1, 9)) if d < n),
        key=lambda X: cost.volume_elements("ws_2d", 7, E, F, (X, n // X, 1), gated=gated).total,
    )
    formula = cost.optimal_x(n, E, F, gated=gated)
    assert best in (2 ** math.floor(math.log2(formula)), 2 ** math.ceil(math.log2(formula)))
    if not gated and math.isclose(formula, best):
        volume = cost.volume_elements("ws_2d", 7, E, F, (best, n // best, 1)).total
        close(volume, 4 * 7 * math.sqrt(E * F / n), CLOSED_FORM)
        assert math.isclose(8 * 7 * E / math.sqrt(n), volume) == (F == 4 * E)


def test_crossovers():
    """Oracle 14: E = 16384, F = 65536, X = Y = Z = 4; halved by int8 weights; moved by the third, gated matrix."""
    assert cost.crossovers(16384, 65536, (4, 4, 4)) == {
        ("ws_2d", "wg_x"): 16384,
        ("wg_x", "wg_xy"): 65536,
        ("wg_xy", "wg_xyz"): 786432,
    }
    assert cost.crossovers(16384, 65536, (4, 4, 4), weight_bytes=1)["wg_x", "wg_xy"] == 32768
    assert cost.crossovers(16384, 65536, (4, 4, 4), gated=True)["wg_xy", "wg_xyz"] == 786432 * 3 / 2
    volumes = [cost.volume_elements(ffn, 1, 16384, 65536, (4, 4, 4)) for ffn in FFN_LAYOUTS[1:]]
    assert [v.activations for v in volumes] == [16384, 8192, 2048, 0]
    assert [v.weights for v in volumes] == [0, 134217728, 536870912, 2147483648]
    below = [cost.volume_elements(ffn, 16384 - 1, 16384, 65536, (4, 4, 4)).total for ffn in ("ws_2d", "wg_x")]
    assert below[0] < below[1]


# --- a whole pass: bytes on the links ------------------------------------------------------------------


def ring(k: int) -> float:
    return (k - 1) / k


@pytest.mark.parametrize("residual", ["parallel", "serial"])
def test_decode_step_bytes_by_hand(residual):
    """PaLM 540B, 2D, batch-sharded MQA: every purpose written out for X, Y, Z = 2, 4, 8 and two bytes an element."""
    X, Y, Z, B, E, F, N, H, L, W = 2, 4, 8, 192, 18432, 73728, 64, 256, 118, 256128
    n = X * Y * Z
    work = dataclasses.replace(palm(), residual=residual)
    got = decode(work, "ws_2d/by_batch:xyz", (X, Y, Z), batch=B).interconnect_bytes
    pair = 2 * B * E / X * ring(Y * Z)
    mesh = types.SimpleNamespace(shape={"x": X, "y": Y, "z": Z})
    table = sharded.rules_for(size("palm-540b", n_heads=N), parse("ws_2d/by_batch:xyz"), mesh, B)
    rows = math.prod(mesh.shape[a] for a in table["res_batch"])  # pieces of the batch between blocks
    want = {
        "ffn": 2 * L * (pair + 3 * B * F / (Y * Z) * ring(X)),
        "attention": 2 * L * (2 * B * N * H / (Y * Z) * ring(X) + (pair if residual == "serial" else 0)),
        "resharding": 2 * L * 2 * B * N * H / n * ring(n),
        "kv": 2 * L * 2 * B * H / (Y * Z) * ring(X),  # batch sliced over y, z before the sum over x
        "weights": 0,
        "merge": 0,
        "norm": 4 * 2 * (L + 1) * 2 * B / rows * ring(n // rows),  # LayerNorm: two means, one norm a block
        # rows summed over y, z and scattered to the residual; last rows gathered; logits' sums scattered, float32
        "logits": 2 * 2 * B * E / X * ring(Y * Z) + 4 * B * W / (Y * Z) * ring(X),
    }
    assert got.keys() == want.keys() == set(cost.PURPOSES)
    for purpose in want:
        close(got[purpose], want[purpose], CLOSED_FORM, purpose)


def test_sequence_sharded_decode_merges_partial_softmax():
    """by_seq: queries gathered over all chips, outputs scattered in float32, maxima and sums reduced."""
    B, N, H, L, n = 3, 64, 256, 118, 64
    p = decode(palm(), "ws_2d/by_seq:xyz", batch=B, context=4096)
    gather, scatter, statistics = 2 * B * N * H, 4 * B * N * H, 2 * 2 * 4 * B * N
    close(p.interconnect_bytes["merge"], L * (gather + scatter + statistics) * ring(n), CLOSED_FORM)
    assert p.interconnect_bytes["resharding"] == 0
    assert p.cache_memory == 2 * 2 * B * 4096 * H * L / n


def test_what_is_written_and_held_by_hand():
    """PaLM 540B, 4 x 4 x 4: one decoded token goes to one chip of kv_seq; a prompt is spread over all of them. The peak
    of a parallel block: residual in and out, its gathered copy, the MLP's and the queries' partial sums."""
    work, B, T, L, H, E, F, N, n = palm(), 3, 2048, 118, 256, 18432, 73728, 64, 64
    token = 2 * 2 * H * L * B
    assert decode(work, "ws_2d/by_seq:xyz", batch=B).hbm_bytes["kv_written"] == token
    p = prefill(work, "ws_2d/by_seq:xyz", batch=B)
    assert p.hbm_bytes["kv_written"] == token * T / n
    for more, fullest in ((20, 20), (100, 32)):  # a chunk on a cached prefix fills blocks of 32 slots
        chunk = cost.predict(
            work, parse("ws_2d/by_seq:xyz"), (4, 4, 4), "v4", phase="prefill", batch=B, tokens=more, context=T
        )
        assert chunk.hbm_bytes["kv_written"] == token * fullest
    assert p.hbm_bytes["kv_read"] == token * T  # inside the prompt every chip reads all of it
    rows = B * T
    assert p.activation_memory == 2 * rows * (2 * E / n + E / 4 + 2 * F / 16 + 2 * N * H / 16)
    serial = prefill(dataclasses.replace(work, residual="serial"), "ws_2d/by_seq:xyz", batch=B)
    assert serial.activation_memory == 2 * rows * (2 * E / n + E / 4 + 2 * F / 16)
    gathered = prefill(work, "wg_xyz/by_batch:xyz", batch=64)
    rows = 64 * T
    shards = 2 * 2 * E * F / n  # two matrices in flight, of two bytes an element
    assert gathered.activation_memory == 2 * rows * (2 * E + E + 2 * F + 2 * N * H) / n + shards


def test_weight_gathered_prefill_gathers_every_weight():
    """WG-XYZ moves all matrices but the embedding, K and V (over x only), and no activations inside a layer."""
    p = prefill(palm(), "wg_xyz/by_batch:xyz", batch=128)
    L, E, F, N, H = 118, 18432, 73728, 64, 256
    want = 2 * L * ((3 * E * F + 2 * E * N * H) * ring(64) + 2 * E * H * ring(4))
    close(p.interconnect_bytes["weights"], want, CLOSED_FORM)
    assert p.interconnect_bytes["ffn"] == p.interconnect_bytes["attention"] == p.interconnect_bytes["resharding"] == 0
    gathered = 2 * 2 * L * (3 * E * F + 2 * E * N * H + 2 * E * H)  # written and read, two bytes each
    close(p.hbm_bytes["gathered"], gathered, CLOSED_FORM)


def test_one_chip_moves_nothing():
    """Oracle 4."""
    for ffn in FFN_LAYOUTS:
        for part in ("replicated", "by_batch:xyz", "by_seq:xyz"):
            p = decode(palm(), f"{ffn}/{part}", (1, 1, 1), batch=1)
            assert p.collectives == () and p.interconnect_seconds == 0
        assert cost.volume_elements(ffn, 99, 64, 128, (1, 1, 1), ring=True).total == 0


def test_parallel_block_has_half_the_pairs():
    """Oracle 12, and the ladder's: the same bytes as serial, hidden behind the next module's work."""
    pairs, steps, bytes_ = {}, {}, {}
    for residual in ("parallel", "serial", "ladder"):
        p = decode(dataclasses.replace(palm(), residual=residual), "ws_2d/by_batch:xyz")
        pairs[residual] = [(c.kind, c.axes, c.count) for c in p.collectives if c.edge]
        bytes_[residual] = sum(p.interconnect_bytes.values())
        steps[residual] = {overlap: p.step_seconds(overlap) for overlap in cost.OVERLAPS}
    assert {(kind, "".join(sorted(axes)), count) for kind, axes, count in pairs["parallel"]} == {
        ("all_gather", "yz", 118),
        ("reduce_scatter", "yz", 118),
    }
    assert sum(c for *_, c in pairs["serial"]) == 2 * sum(c for *_, c in pairs["parallel"])
    assert bytes_["ladder"] == bytes_["serial"] > bytes_["parallel"]
    for overlap in ("memory", "none"):
        assert steps["ladder"][overlap] < steps["parallel"][overlap] < steps["serial"][overlap]


def test_batch_sharded_mqa_has_two_all_to_alls_a_layer():
    """Oracle 13: bytes of the cache /n; two all-to-alls per layer, none in the head-sharded baseline."""
    count, cache = {}, {}
    for part in ("replicated", "by_batch:xyz"):
        p = decode(palm(), f"ws_2d/{part}")
        count[part] = sum(c.count for c in p.collectives if c.kind == "all_to_all")
        cache[part] = (p.cache_memory, p.hbm_bytes["kv_read"])
    assert count == {"replicated": 0, "by_batch:xyz": 2 * 118}
    assert cache["replicated"] == tuple(64 * b for b in cache["by_batch:xyz"])


# --- memory, and the sheet's tables --------------------------------------------------------------------


def test_max_context_table():
    """Oracle 5: 30 % of the memory of 64 chips."""
    mha = palm(n_k_heads=64, n_v_heads=64, head_dim=128, v_head_dim=128)
    rows = [
        (mha, "ws_2d/by_head:xyz", 1333, 333),
        (palm(), "ws_2d/replicated", 666, 167),
        (palm(), "ws_2d/by_batch:xyz", 42654, 10663),
    ]
    for work, layout, *want in rows:
        got = [cost.max_context(work, parse(layout), (4, 4, 4), "v4", batch=b, share=0.3) for b in (128, 512)]
        for batch, context, rounded in zip((128, 512), got, want, strict=True):
            exact = 0.3 * 32 * 2**30 / cost.cache_bytes(work, parse(layout), (4, 4, 4), batch, 1)
            assert (round(exact), math.floor(exact)) == (rounded, context)
            held = [cost.cache_bytes(work, parse(layout), (4, 4, 4), batch, context + more) for more in (0, 1)]
            assert held[0] <= 0.3 * 32 * 2**30 < held[1]


def test_max_context_by_sequence_and_of_rings():
    got = cost.max_context(palm(), parse("ws_2d/by_seq:xyz"), (4, 4, 4), "v4", batch=2, share=0.3)
    assert got == 42653 * 64  # 42653.9 before rounding
    rings = plan.workload(tiny.CASES["window"], CacheConfig(kinds=("ring",)))
    assert cost.max_context(rings, parse("ws_1d/replicated"), (1, 1, 1), "v4", batch=9, share=0.5) is None


def test_model_flops_utilisation():
    """Oracle 6: the eight measured configurations, within one point of the printed percentage."""
    rows = [
        (540e9, 64, 1 * 2048, 0.29, 43),
        (540e9, 64, 64 * 64, 1.82, 14),
        (540e9, 64, 512 * 2048, 85.2, 76),
        (540e9, 64, 512 * 64, 6.0, 33),
        (62e9, 16, 1 * 2048, 0.16, 36),
        (62e9, 16, 32 * 64, 0.73, 8),
        (62e9, 32, 512 * 2048, 20.2, 73),
        (62e9, 8, 512 * 64, 5.1, 37),
    ]
    for params, chips, tokens, seconds, percent in rows:
        assert abs(100 * cost.mfu(params, tokens, seconds, chips, 275e12) - percent) < 1


def test_weight_load_bounds():
    """Section 8: 7.0 ms (int8) and 14.1 ms (bf16) for one read of PaLM 540B's weights on 64 chips."""
    for weights, want in (("int8", 7.0), ("bfloat16", 14.1)):
        work = plan.workload(size("palm-540b"), BF16, weights=weights)
        p = decode(work, "wg_xyz/by_batch:xyz", batch=64)  # its K, V are the only weights not split 64 ways
        replicas = 118 * 2 * 18432 * 256 * (1 / 4 - 1 / 64) * work.weight_bytes / 1200e9
        assert round(1e3 * (p.hbm_bytes["weights"] / 1200e9 - replicas), 1) == want


def test_padded_heads_cost_eighteen_billion_parameters():
    assert round((palm().n_params - palm(n_heads=48).n_params) / 1e9, 1) == 17.8


# --- one chip: the ledger ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.CASES)
def test_one_chip_is_the_roofline(name):
    """Weights, K and V read, FLOPs and cache of kvattn.account, for every value of every axis."""
    cfg = dataclasses.replace(tiny.CASES[name], scan_layers=False)
    work, layout = plan.workload(cfg, BF16), "ws_1d/replicated"
    p = decode(work, layout, (1, 1, 1), batch=3, context=23)
    want = account.roofline_decode(cfg, BF16, 3, 23, "v4")
    assert p.hbm_bytes["weights"] == want.weight_bytes
    assert p.hbm_bytes["kv_read"] == want.kv_bytes
    assert p.hbm_bytes["kv_written"] == 3 * account.kv_bytes_per_token(cfg, BF16)
    close(p.flops, want.flops, CLOSED_FORM)
    assert p.cache_memory == account.cache_bytes(cfg, BF16, 3, 23)
    assert p.weight_memory == 2 * account.param_count(cfg) == 2 * work.n_params
    whole = prefill(work, layout, (1, 1, 1), batch=3, context=23)
    close(whole.flops, 3 * 23 * account.flops_per_token(cfg, 23, "prefill"), CLOSED_FORM)


@pytest.mark.parametrize("ffn", FFN_LAYOUTS)
def test_batch_sharded_cache_is_the_ledger_over_n(ffn):
    cfg = size("palm-8b", masks=(MaskConfig(window=512, sinks=4), MaskConfig()))
    cache = CacheConfig(kinds=("by_mask",), dtype="bfloat16")
    p = decode(plan.workload(cfg, cache), f"{ffn}/by_batch:xyz", (2, 4, 2), batch=48, context=1024)
    assert p.cache_memory == account.cache_bytes(cfg, cache, 48, 1024) / 16


# --- variants ------------------------------------------------------------------------------------------


def test_sharing_saves_capacity_and_writes_but_not_reads():
    shared = size("palm-8b", kv_source=tuple(l - l % 2 for l in range(32)))
    a, b = (decode(plan.workload(c, BF16), "ws_2d/by_batch:xyz", (2, 4, 2)) for c in (size("palm-8b"), shared))
    assert b.hbm_bytes["kv_read"] == a.hbm_bytes["kv_read"]
    assert b.cache_memory * 2 == a.cache_memory
    assert b.hbm_bytes["kv_written"] * 2 == a.hbm_bytes["kv_written"]
    assert b.interconnect_bytes["kv"] * 2 == a.interconnect_bytes["kv"]


def test_window_over_a_sequence_sharded_cache_waits_for_one_chip():
    """A window of 96 of 1024 slots in blocks of 64: the fullest chip reads a whole block, not 96/16 keys."""
    cfg = size("palm-8b", masks=(MaskConfig(window=96),))
    p = decode(plan.workload(cfg, BF16), "ws_2d/by_seq:xyz", (2, 4, 2), batch=3, context=1024)
    assert p.hbm_bytes["kv_read"] == 32 * 3 * 64 * 2 * 2 * 256
    narrow = plan.workload(size("palm-8b", masks=(MaskConfig(window=40),)), BF16)
    got = decode(narrow, "ws_2d/by_seq:xyz", (2, 4, 2), batch=3, context=1024).hbm_bytes["kv_read"]
    assert got == 32 * 3 * 40 * 2 * 2 * 256


@pytest.mark.parametrize(
    "kv, per_head",
    [("float32", (40, 56)), ("bfloat16", (20, 28)), ("fp8", (12, 16)), ("int8", (12, 16)), ("int4", (7, 9))],
)
def test_cache_types(kv, per_head):
    """Two K heads of 10 and six V heads of 14; quantised heads carry a two-byte scale each."""
    work = plan.workload(tiny.CASES["uneven_kv"], BF16, kv=kv)
    p = decode(work, "ws_1d/replicated", (1, 1, 1), batch=3, context=29)
    assert p.cache_memory == 4 * 3 * 29 * (2 * per_head[0] + 6 * per_head[1])


def test_replicas_of_many_heads_do_the_same_work():
    """GQA-8 with its heads whole on each chip reads and computes everything there; split over z and y, an eighth."""
    work = plan.workload(size("llama3-70b"), BF16)
    whole, split = (decode(work, f"ws_2d/{kv}", (4, 2, 4), "v5p", batch=5) for kv in ("replicated", "by_head:yz"))
    assert whole.hbm_bytes["kv_read"] == 8 * split.hbm_bytes["kv_read"]
    assert whole.flops > split.flops
    assert whole.cache_memory == 8 * split.cache_memory == account.cache_bytes(size("llama3-70b"), BF16, 5, 2048)


# --- properties ----------------------------------------------------------------------------------------

KV_PARTS = ("replicated", "by_batch:xyz", "by_batch:z", "by_seq:xyz", "by_batch:xy+by_seq:z", "by_head:z+by_batch:xy")


def predictions(chip, batch=64, context=2048, phase=decode, links="all"):
    work = plan.workload(size("palm-62b", n_k_heads=4, n_v_heads=4), BF16)
    for ffn, kv in itertools.product(FFN_LAYOUTS, KV_PARTS):
        for mesh in ((4, 2, 4), (8, 1, 4)):
            yield phase(work, f"{ffn}/{kv}", mesh, chip, batch=batch, context=context, links=links)


@pytest.mark.parametrize("phase", [decode, prefill])
@pytest.mark.parametrize("field", ["peak_flops", "hbm_bandwidth", "interconnect_bandwidth"])
def test_a_better_chip_is_never_slower(field, phase):
    better = dataclasses.replace(CHIPS["v4"], **{field: 2 * getattr(CHIPS["v4"], field)})
    gained = 0
    for a, b in zip(predictions("v4", phase=phase), predictions(better, phase=phase), strict=True):
        for overlap in cost.OVERLAPS:
            assert b.step_seconds(overlap) <= a.step_seconds(overlap)
        gained += b.step_seconds("none") < a.step_seconds("none")
    assert gained > 50


def test_more_work_is_never_faster_and_overlap_never_slower():
    base = list(predictions("v4"))
    for more in (predictions("v4", batch=128), predictions("v4", context=4096)):
        for a, b in zip(base, more, strict=True):
            assert b.step_seconds("none") > a.step_seconds("none")
            assert b.memory_bytes > a.memory_bytes
            assert b.interconnect_seconds >= a.interconnect_seconds
    for p in base:
        full, memory, none = (p.step_seconds(overlap) for overlap in cost.OVERLAPS)
        assert max(p.compute_seconds, p.hbm_seconds, p.interconnect_seconds) == full <= memory <= none
        assert none == pytest.approx(p.compute_seconds + p.hbm_seconds + p.interconnect_seconds)
        assert p.chip_seconds_per_token("none") * p.tokens == pytest.approx(32 * none)
        assert 0 < p.mfu("full") <= 1


def test_links_of_its_own_axes_only():
    """With links="axes" a collective over one axis of a 3D torus has a third of the links, over three all of them."""
    work = palm()
    one, two = (decode(work, "ws_2d/by_batch:xyz", links=links) for links in ("all", "axes"))
    seconds = 0.0
    for c in two.collectives:
        seconds += c.wire * two.element_bytes[c.dtype] / 270e9 * 3 / len(c.axes)
    close(two.interconnect_seconds, seconds, CLOSED_FORM)
    assert one.interconnect_seconds < two.interconnect_seconds < 3 * one.interconnect_seconds
    switch = [
        decode(plan.workload(size("llama3-8b"), BF16), "ws_2d/by_batch:xyz", (2, 2, 2), "H200", links=links)
        for links in ("all", "axes")
    ]
    assert switch[0].interconnect_seconds == switch[1].interconnect_seconds


# --- refusals ------------------------------------------------------------------------------------------


def bad(**changes):
    fields = {"mesh": (4, 4, 4), "chip": "v4", "phase": "decode", "batch": 64, "tokens": 1, "context": 2048}
    fields |= {"layout": "ws_2d/by_batch:xyz", "work": palm(), "links": "all"} | changes
    work, layout, mesh, chip = (fields.pop(name) for name in ("work", "layout", "mesh", "chip"))
    return lambda: cost.predict(work, parse(layout), mesh, chip, **fields)


@pytest.mark.parametrize(
    "call, message",
    [
        (bad(chip="v9"), "chip is 'v9'; choose one of v4"),
        (bad(phase="train"), "phase is 'train'; choose one of prefill, decode"),
        (bad(links="some"), "links is 'some'"),
        (bad(batch=0), "batch is 0; it must be at least 1"),
        (bad(tokens=9, context=8), "tokens is 9, more than the context of 8"),
        (bad(mesh=(4, 4)), r"mesh shape is \(4, 4\); it takes three"),
        (bad(mesh={"x": 2, "data": 4}), "it takes the axes x, y and z"),
        (bad(mesh=(4, 0, 4)), "sizes of at least 1"),
        (bad(chip="H200"), "chips is 64, but the links of H200 join 8; take no more"),
        (bad(batch=32), "batch is 32, not divisible by the 64 chips"),
        (bad(work=palm(n_heads=48)), "n_heads is 48, not divisible by the 64 chips"),
        (bad(layout="ws_2d/by_head:xyz"), "n_k_heads is 1, not divisible by the 64 chips"),
        (bad(layout="ws_2d/by_seq:xyz", context=2000), "slots is 2000, not divisible by the 64 chips"),
        (bad(chip=dataclasses.replace(CHIPS["v4"], interconnect_bandwidth=0)), "no interconnect"),
        (lambda: decode(palm(), "ws_2d/by_batch:xyz").step_seconds("half"), "overlap is 'half'"),
        (
            lambda: cost.max_context(palm(), parse("ws_2d/replicated"), (4, 4, 4), "v4", batch=1, share=1.5),
            "share is 1.5",
        ),
        (lambda: cost.volume_elements("ws_3d", 1, 64, 64, (1, 1, 1)), "layout is 'ws_3d'"),
        (lambda: cost.check_memory(decode(palm(), "ws_2d/replicated", batch=512)), r"134.\d GiB a chip .* v4's 32.0"),
    ],
)
def test_refusals_are_one_sentence(call, message):
    with pytest.raises(ShardingError, match=message) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text


def test_what_fits_is_not_refused():
    cost.check_memory(decode(palm(), "ws_2d/by_batch:xyz", batch=512))
    assert isinstance(decode(palm(), "ws_2d/by_batch:xyz").layout, Layout)
    assert torus_layouts.parse("ws_2d/by_batch:xyz") == decode(palm(), "ws_2d/by_batch:xyz").layout
