"""Workloads from the axes of parameters and leaves: a latent cache, a family that nobody has heard of, what is refused;
and that chips, slices and launcher know the same machines."""

from typing import NamedTuple

import pytest

from experiments.launching import command as launch
from sharding import ShardingError, cost
from sharding.cost import slices
from sharding.cost.hardware import CHIPS
from sharding.layout.torus_layouts import parse
from tests.helpers.tolerances import CLOSED_FORM, close


def decode(work, layout, mesh, batch, context=2048, tokens=1) -> cost.Prediction:
    phase = "decode" if tokens == 1 else "prefill"
    return cost.predict(work, parse(layout), mesh, "v4", phase=phase, batch=batch, tokens=tokens, context=context)


def ring(k: int) -> float:
    return (k - 1) / k


class Spec(NamedTuple):
    """A parameter as the cost model sees it."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    fan_in: int = 1


class CacheLeaf(NamedTuple):
    """A leaf of a cache as the cost model sees it."""

    shape: tuple[int, ...]
    axes: tuple[str, ...] = ("cache_heads", "cache_dim")
    per: str = "token"
    role: str = "both"
    dtype: str | None = None


def latent(n=32, c=512, r=64) -> cost.Workload:
    """An absorbed latent cache (DeepSeek-V2's C, R), made by hand: no variant of the package stores one yet."""
    d, f = 4096, 8192
    specs = {
        "q": Spec((d, n, 192), ("embed", "q_heads", "head_dim")),
        "down": Spec((d, 1, c + r), ("embed", "k_heads", "head_dim")),
        "o": Spec((n, 128, d), ("q_heads", "value_dim", "embed")),
        "mlp": [Spec((d, f), ("embed", "mlp")), Spec((d, f), ("embed", "mlp")), Spec((f, d), ("mlp", "embed"))],
    }
    leaves = {"latent": CacheLeaf((1, c)), "k_rope": CacheLeaf((1, r), role="key")}
    layer = cost.layer_of(specs, leaves, n_heads=n, score_dim=c + r, value_dim=c, count=7)
    return cost.Workload(d_model=d, vocab=64000, layers=(layer,))


def test_latent_cache():
    p = decode(latent(), "ws_2d/by_batch:xyz", (2, 2, 2), batch=16, context=4096)
    assert p.cache_memory == 7 * 16 / 8 * 4096 * 576 * 2
    attention = 2 * 16 * 32 * (576 + 512) * 4096 * 7 / 8
    dense = 2 * 16 * (latent().n_params - 64000 * 4096) / 8 + 2 * 16 * 64000 * 4096 / 8
    close(p.flops, attention + dense, CLOSED_FORM)
    assert p.interconnect_bytes["resharding"] == 7 * 2 * 16 * 32 * (576 + 512) / 8 * ring(8)
    with pytest.raises(ShardingError, match="n_k_heads is 1, not divisible by the 2"):
        decode(latent(), "ws_2d/by_head:z+by_batch:xy", (2, 2, 2), batch=16)


# --- a family that nobody has heard of -------------------------------------------------------------------

D, N, H, C, E, F, W = 64, 8, 6, 20, 12, 80, 128


def unheard_of(**changes):
    """Weights and leaves named by nobody: heads from a latent of rank C that a token leaves (zeta), and a state that
    a sequence has (omega)."""
    specs = {
        "alpha": Spec((D, C), ("embed", "latent")),
        "beta": Spec((C, N, H), ("latent", "q_heads", "head_dim")),
        "gamma": {
            "in": Spec((D, N, H), ("embed", "q_heads", "head_dim")),
            "norm": Spec((N, H), ("q_heads", "norm"), 0),
        },
        "delta": Spec((N, H, D), ("q_heads", "value_dim", "embed")),
        "mlp": [Spec((D, F), ("embed", "mlp")), Spec((F, D), ("mlp", "embed"))],
    }
    leaves = {
        "zeta": CacheLeaf((C,), ("cache_dim",)),
        "omega": CacheLeaf((N, E, H), ("cache_heads", "cache_dim", "cache_dim"), "sequence", "state", "float32"),
    }
    numbers = {"n_heads": N, "score_dim": C, "value_dim": C, "token_flops": 4 * N * E * H}
    return cost.layer_of(specs | changes.get("specs", {}), leaves | changes.get("leaves", {}), **numbers)


def test_a_family_nobody_has_heard_of_is_costed():
    B, S, n = 16, 32, 8
    work = cost.Workload(d_model=D, vocab=W, layers=(unheard_of(), cost.layer_of({}, {}, count=2)), kv_bits=8)
    matrices = D * C + C * N * H + 2 * D * N * H + 2 * D * F
    assert work.n_params == W * D + matrices + N * H
    one = decode(work, "ws_1d/replicated", (1, 1, 1), batch=B, context=S)
    assert one.flops == 2 * B * (W * D + matrices + N * 2 * C * S + 2 * N * E * H)
    assert one.hbm_bytes["weights"] == one.weight_memory == 2 * work.n_params
    state = B * 4 * N * E * H  # float32, whatever the cache's type; read and written once a pass, however long
    assert one.cache_memory == one.hbm_bytes["kv_read"] == B * S * C + state
    assert one.hbm_bytes["kv_written"] == B * C + state
    assert (
        decode(work, "ws_1d/replicated", (1, 1, 1), batch=B, context=S, tokens=S).hbm_bytes["kv_written"]
        == B * S * C + state
    )

    p = decode(work, "ws_2d/by_batch:xyz", (2, 2, 2), batch=B, context=S)
    assert p.cache_memory == one.cache_memory / n
    # latent weights lie over x only, those between latent and heads over y and z, the rest over all chips
    held = D * C / 2 + C * N * H / 4 + (2 * D * N * H + 2 * D * F) / n + N * H + W * D / n
    assert p.weight_memory == 2 * held
    attention = B * N * 2 * 2 * C * S / n + B * 4 * N * E * H / n
    dense = 2 * B * (D * C / 2 + C * N * H / 4 + (2 * D * N * H + 2 * D * F + W * D) / n)
    close(p.flops, attention + dense, CLOSED_FORM)
    pair = 2 * B * D / 2 * ring(4)
    heads, down = 2 * B * N * H / 4 * ring(2), 2 * B * C * ring(2)  # queries and outputs; the latent summed everywhere
    assert p.interconnect_bytes["attention"] == 2 * (pair + heads + down)
    assert p.interconnect_bytes["kv"] == 0  # every chip has the latent, and keeps its rows
    assert decode(work, "ws_2d/by_head:z+by_batch:xy", (1, 1, 1), batch=B, context=S).cache_memory == one.cache_memory


def test_a_layer_without_attention_or_cache():
    """Two norms and an MLP: one pair for the residual stream, nothing kept."""
    mlp = {"up": Spec((D, F), ("embed", "mlp")), "down": Spec((F, D), ("mlp", "embed"))}
    work = cost.Workload(d_model=D, vocab=W, layers=(cost.layer_of(mlp, {}),))
    p = decode(work, "ws_2d/by_seq:xyz", (2, 2, 2), batch=16, context=30)
    assert (p.cache_memory, p.hbm_bytes["kv_read"], p.hbm_bytes["kv_written"]) == (0, 0, 0)
    assert sum(c.count for c in p.collectives if c.edge) == 2
    assert p.interconnect_bytes["attention"] == p.interconnect_bytes["merge"] == p.interconnect_bytes["kv"] == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"specs": {"eta": Spec((D, 3), ("embed", "colour"))}}, "weight eta has axis 'colour', which the cost model"),
        ({"specs": {"eta": [Spec((3,), ("taste",), 0)]}}, "weight eta/0 has axis 'taste'"),
        (
            {"specs": {"eta": Spec((3, D, 2), ("mlp", "embed", "q_heads"))}},
            "weight eta has axes mlp, embed, q_heads; put",
        ),
        ({"leaves": {"eta": CacheLeaf((3,), ("cache_smell",))}}, "leaf eta has axis 'cache_smell'"),
        ({"leaves": {"eta": CacheLeaf((1, 3), role="query")}}, "leaf eta has role 'query'; choose one of key, value"),
        ({"leaves": {"eta": CacheLeaf((1, 3), per="page")}}, "leaf eta has per 'page'; choose one of token, sequence"),
        ({"leaves": {"eta": CacheLeaf((1, 3), dtype="int3")}}, "leaf eta has dtype 'int3'; choose one of float32"),
    ],
)
def test_what_the_cost_model_cannot_place_is_named(changes, message):
    with pytest.raises(ShardingError, match=message) as caught:
        unheard_of(**changes)
    assert str(caught.value).endswith(".")


def test_layers_whose_heads_differ_have_no_common_table():
    layers = tuple(cost.layer_of({}, {"a": CacheLeaf((heads, 4), role="key")}) for heads in (2, 4))
    with pytest.raises(ShardingError, match="leaves of role key or both have 2, 4 heads"):
        decode(cost.Workload(d_model=D, vocab=W, layers=layers), "ws_2d/replicated", (1, 1, 1), batch=8)


def test_chips_and_slices_agree():
    """The chip table's torus and size are those that slices are compiled and launched with."""
    assert set(slices.TPUS) == set(launch.TPUS) and {*slices.TPUS, *slices.GPUS} == set(CHIPS)
    for name, largest in slices.TPUS.items():
        assert CHIPS[name].max_chips <= largest
        for axes in (2, 3):
            if axes == CHIPS[name].torus_axes:
                assert slices.parse_slice(f"{name}:{'x'.join('4' * axes)}").chips == 4**axes
            else:
                with pytest.raises(ShardingError, match=f"of {CHIPS[name].torus_axes} chip counts"):
                    slices.parse_slice(f"{name}:{'x'.join('4' * axes)}")
    for name in slices.GPUS:
        assert (CHIPS[name].torus_axes, CHIPS[name].max_chips) == (0, 8)  # HGX boards, cloud 8-GPU machines
