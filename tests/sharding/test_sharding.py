"""Rule tables: golden specs, every mistake raises, and sharded programs equal unsharded ones on 8 devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import sharding
from kvattn import cache, model
from kvattn.config import CacheConfig, MeshConfig
from sharding import RULES, ShardingError
from sharding.layout.apply import partition_spec
from tests.helpers import tiny
from tests.helpers.models import lively, tokens_of
from tests.helpers.tolerances import F32_SHARDED, close

# Sizes that 8 = 2 x 2 x 2 divides: W 64, D 24, N 4, K = M 2, F 40.
CFG = tiny.config(
    vocab_size=64,
    d_model=24,
    n_heads=4,
    n_k_heads=2,
    n_v_heads=2,
    d_ff=40,
    tied_embeddings=False,
    kv_source=(0, 0, 2, 2),
)

GOLDEN = """\
embed.table vocab,embed -> tensor,fsdp
final_norm.scale norm -> None
layers.0.attn.k embed,k_heads,head_dim -> fsdp,tensor,None
layers.0.attn.o q_heads,value_dim,embed -> tensor,None,fsdp
layers.0.attn.q embed,q_heads,head_dim -> fsdp,tensor,None
layers.0.attn.v embed,v_heads,value_dim -> fsdp,tensor,None
layers.0.attn_norm.scale norm -> None
layers.0.mlp.down mlp,embed -> tensor,fsdp
layers.0.mlp.gate embed,mlp -> fsdp,tensor
layers.0.mlp.up embed,mlp -> fsdp,tensor
layers.0.mlp_norm.scale norm -> None
layers.1.attn.o q_heads,value_dim,embed -> tensor,None,fsdp
layers.1.attn.q embed,q_heads,head_dim -> fsdp,tensor,None
unembed.table embed,vocab -> fsdp,tensor"""


def _mesh(data=2, fsdp=2, tensor=2):
    return sharding.make_mesh(MeshConfig(data, fsdp, tensor))


def test_golden_layout():
    """The whole table as text: a changed rule shows up as a changed line."""
    specs = model.param_specs(CFG)
    placed = sharding.named(specs, _mesh(), RULES["fsdp_tp"])
    leaves = jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda s: hasattr(s, "axes"))[0]
    lines = []
    for (path, spec), place in zip(leaves, jax.tree.leaves(placed), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        lines.append(f"{name} {','.join(spec.axes)} -> {','.join(map(str, place.spec))}")
    kept = [line for line in lines if ".1." not in line or "attn.q" in line or "attn.o" in line]
    assert "\n".join(line for line in kept if ".2." not in line and ".3." not in line) == GOLDEN


def test_mesh_axes_and_too_many_devices():
    assert dict(_mesh(1, 4, 2).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert dict(_mesh(1, 1, 3).shape)["tensor"] == 3
    with pytest.raises(ShardingError, match="16 devices but only 8"):
        _mesh(4, 2, 2)


@pytest.mark.parametrize(
    "axes,rules,shape,message",
    [
        (("embed", "mpl"), RULES["fsdp_tp"], (4, 4), "'mpl' is in no row"),
        (("q_heads", "mlp"), RULES["fsdp_tp"], (4, 4), "two dims on mesh axis 'tensor'"),
        (("embed", "k_heads"), RULES["fsdp_tp"], (4, 3), "k_heads is 3, not divisible by 2"),
        (("embed",), {"embed": "expert"}, (4,), "'expert', which the mesh lacks"),
    ],
)
def test_every_mistake_raises(axes, rules, shape, message):
    with pytest.raises(ShardingError, match=message):
        partition_spec(axes, rules, shape, _mesh())


def test_constrain_is_identity_outside_and_strict_inside():
    x = jnp.ones((4, 6, 8))
    assert sharding.constrain(x, "nonsense", "act_length", "act_embed") is x
    with sharding.use_rules(_mesh(), RULES["fsdp_tp"]):
        with pytest.raises(ShardingError, match="nonsense"):
            sharding.constrain(x, "nonsense", "act_length", "act_embed")
        y = jax.jit(lambda x: sharding.constrain(x, "act_batch", "act_length", "act_embed"))(x)
    assert y.sharding.spec[0] == ("data", "fsdp")


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)])
@pytest.mark.parametrize("table", sorted(RULES))
def test_sharded_forward_equals_unsharded(shape, table):
    params, tokens = lively(CFG), jnp.asarray(tokens_of(CFG, rows=8))
    want = model.forward(params, CFG, model.Inputs(tokens))[0].logits
    mesh, rules = _mesh(*shape), RULES[table]
    placed = jax.device_put(params, sharding.named(model.param_specs(CFG), mesh, rules))
    with sharding.use_rules(mesh, rules):
        forward = jax.jit(lambda p, t: model.forward(p, CFG, model.Inputs(t))[0].logits)
        compiled = forward.lower(placed, tokens).compile()
    close(compiled(placed, tokens), want, F32_SHARDED)
    text = compiled.as_text()
    assert ("all-gather" in text) == (shape[1] > 1)  # ZeRO-3 gathers weights over fsdp, nothing else gathers
    assert ("all-reduce" in text or "reduce-scatter" in text) == (shape[2] > 1 or shape[1] > 1)


def test_sharded_decode_equals_unsharded():
    """Prefill and one step with the cache born sharded over batch and heads."""
    params, tokens = lively(CFG), jnp.asarray(tokens_of(CFG, rows=8))
    want = model.forward(params, CFG, model.Inputs(tokens))[0].logits
    mesh, rules = _mesh(), RULES["fsdp_tp"]
    placed = jax.device_put(params, sharding.named(model.param_specs(CFG), mesh, rules))
    axes = ("cache_batch", "cache_heads", "cache_length", "cache_dim")

    def place(leaf):
        spec = partition_spec(axes, rules, leaf.shape, mesh) if leaf.ndim == 4 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    caches = jax.tree.map(place, cache.create(CFG, CacheConfig(), 8, 16))
    forward = jax.jit(model.forward, static_argnums=1)
    with sharding.use_rules(mesh, rules):
        out, caches = forward(placed, CFG, model.Inputs(tokens[:, :-1], empty=True), caches=caches)
        last = model.Inputs(tokens[:, -1:], jnp.full((8, 1), tokens.shape[1] - 1, jnp.int32))
        step, caches = forward(placed, CFG, last, caches=caches)
    close(np.concatenate([out.logits, step.logits], 1), want, F32_SHARDED)


def test_replicated_kv_table_serves_fewer_heads_than_shards():
    mqa = CFG.replace(n_k_heads=1, n_v_heads=1)
    with pytest.raises(ShardingError, match="k_heads is 1"):
        sharding.named(model.param_specs(mqa), _mesh(), RULES["fsdp_tp"])
    placed = sharding.named(model.param_specs(mqa), _mesh(), RULES["fsdp_tp_kv_replicated"])
    assert placed["layers"][0]["attn"]["k"].spec == PartitionSpec("fsdp", None, None)
