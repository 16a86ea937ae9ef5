"""Programs that tests compile in a child of `sharding.compiler.aot`: target(mesh, **kwargs) -> Program."""

import dataclasses
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

YZ, XYZ = ("y", "z"), ("x", "y", "z")


@dataclasses.dataclass
class Program:
    """What a target returns."""

    fn: Any
    args: tuple
    donate_argnums: tuple[int, ...] = ()


def abstract(mesh, shape, *spec, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def collectives(mesh, rows: int, columns: int):
    """One of each kind, written by hand; a and the result are whole on every chip."""

    def body(a):
        gathered = lax.all_gather(a, YZ, axis=1, tiled=True)  # [rows, YZ columns]
        scattered = lax.psum_scatter(jnp.sin(gathered), "x", scatter_dimension=1, tiled=True)
        moved = lax.all_to_all(scattered, YZ, split_axis=1, concat_axis=0, tiled=True)
        summed = lax.psum(moved, "z")
        return lax.ppermute(summed, "y", [(i, (i + 1) % mesh.shape["y"]) for i in range(mesh.shape["y"])])

    fn = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return Program(fn, (abstract(mesh, (rows, columns)),))


def gather(mesh, rows: int, columns: int):
    """BE_xyz -> BE with the activations' last dimension sharded: `columns` per chip."""

    def fn(a, w):
        return lax.with_sharding_constraint(a, NamedSharding(mesh, P())) @ w

    n = mesh.size * columns
    return Program(fn, (abstract(mesh, (rows, n), None, XYZ), abstract(mesh, (n, 128 * mesh.size), None, XYZ)))


def mlp(mesh, layers: int, fused: bool = False, scan: bool = True, width: int = 16384):
    """A decode MLP of 64 tokens, F over yz: gate and up as two matrices, or fused in one [D, 2, F]."""
    D, B = 4096, 64

    def whole(v):
        return lax.with_sharding_constraint(v, NamedSharding(mesh, P()))

    def layer(x, weights):
        if fused:
            both = jnp.einsum("bd,dgf->bgf", x, weights[0])
            gate, up = both[:, 0], both[:, 1]
        else:
            gate, up = x @ weights[0], x @ weights[1]
        return x + whole((jax.nn.silu(gate) * up) @ weights[-1]), None

    def fn(x, weights):
        if scan:
            return lax.scan(layer, x, weights)[0]
        for i in range(layers):
            x, _ = layer(x, jax.tree.map(lambda w: w[i], weights))  # noqa: B023
        return x

    down = abstract(mesh, (layers, width, D), None, YZ)
    wide = abstract(mesh, (layers, D, width), None, None, YZ)
    into = (abstract(mesh, (layers, D, 2, width), None, None, None, YZ),) if fused else (wide, wide)
    return Program(fn, (abstract(mesh, (B, D)), (*into, down)))


def cache_step(mesh, donate: bool):
    """One token into a [B, S, H] cache over the batch, then one attention over it."""
    B, S, H = 16 * mesh.size, 2048, 128

    def fn(cache, q, k, at):
        cache = lax.dynamic_update_slice(cache, k[:, None], (0, at, 0))
        weights = jax.nn.softmax(jnp.einsum("bh,bsh->bs", q, cache).astype(jnp.float32), axis=-1)
        return cache, jnp.einsum("bs,bsh->bh", weights.astype(jnp.bfloat16), cache)

    row = abstract(mesh, (B, H), XYZ)
    args = (abstract(mesh, (B, S, H), XYZ), row, row, abstract(mesh, (), dtype="int32"))
    return Program(fn, args, donate_argnums=(0,) if donate else ())


def matmul(mesh, rows: int, inner: int, columns: int):
    """[rows, inner] x [inner, columns] on every chip."""
    return Program(lambda a, b: a @ b, (abstract(mesh, (rows, inner)), abstract(mesh, (inner, columns))))


def environment(mesh, name: str):
    """Fails with what the child's environment holds."""
    raise ValueError(f"{name}={os.environ.get(name)} devices={jax.device_count()} mesh={mesh.size}")


def fatal(mesh, message: str = ""):
    """Dies as libtpu does on a failed check."""
    if message:
        os.write(2, f"F1121 06:11:50.792043   18451 {message}\n".encode())
    os.abort()


def sleep(mesh, seconds: float):
    time.sleep(seconds)


def decode_floor(mesh, *, model, cache, layout, batch, context, weights):
    """`kvattn.decode.partitioned.build_floor` from dicts, padded as `sharding_study.program.program` pads."""
    from experiments.sharding_study import program as program_lib
    from kvattn import config
    from kvattn.decode import partitioned as sharded

    cfg = program_lib.padded(config.from_config_dict(model, config.ModelConfig), mesh.size)[0]
    store = config.from_config_dict(cache, config.CacheConfig)
    return sharded.build_floor(cfg, store, layout, mesh, batch=batch, context=context, weights=weights)


def decode_loop(mesh, *, model: dict, cache: dict, batch: int, capacity: int):
    """`kvattn.decode.generation.advance` on one chip: the whole loop over tokens, its state donated."""
    from kvattn import cache as caches
    from kvattn import config
    from kvattn import model as model_lib
    from kvattn.attention import target
    from kvattn.decode import generation as decode

    cfg = config.from_config_dict(model, config.ModelConfig)
    held = caches.specs(cfg, config.from_config_dict(cache, config.CacheConfig), batch, capacity)
    state, sampler = jax.eval_shape(lambda held: loop_state(held, batch), held)
    params = jax.eval_shape(lambda: model_lib.init(jax.random.key(0), cfg, jnp.bfloat16))
    eos, until = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)

    def fn(params, state, sampler, eos, until):
        with target.of(mesh.devices.flat[0].platform):
            return decode.advance(params, cfg, state, sampler, eos, until)

    args = jax.tree.map(lambda s: abstract(mesh, s.shape, dtype=s.dtype), (params, state, sampler, eos, until))
    return Program(fn, args, donate_argnums=(1,))


def loop_state(caches, batch: int):
    """(decode.State, sampler) of a batch in the middle of greedy decoding."""
    from kvattn.config import DecodeConfig
    from kvattn.decode import generation as decode
    from kvattn.decode import sampling

    row = jnp.zeros((batch,), jnp.int32)
    state = decode.State(
        token=row,
        position=row,
        step=jnp.ones((batch,), jnp.int32),
        done=jnp.zeros((batch,), bool),
        out=jnp.zeros((batch, 16), jnp.int32),
        caches=caches,
    )
    return state, sampling.create(DecodeConfig(), batch)


def splash_gradient(mesh, *, model: dict, length: int):
    """Value and gradients of `kvattn.attention.flash.splash`, one sequence a chip."""
    from kvattn import config
    from kvattn.attention import flash, target
    from kvattn.attention.operand import Operand
    from kvattn.masks import Tokens
    from pallas_kernels import Leaf

    cfg = config.from_config_dict(model, config.ModelConfig)
    shape = cfg.attention(0).softmax(cfg)
    n, k, h, v = shape.heads, shape.k_heads, shape.key_dim, shape.value_dim
    shapes = [(mesh.size, length, n, h), (mesh.size, k, length, h), (mesh.size, k, length, v)]

    def one(q, k, v):
        tokens = Tokens(jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], q.shape[:2]))
        with target.of("tpu"):
            out = flash.splash(tokens, Operand(q, Leaf(k), Leaf(v), shape.scale, shape.cap), cfg.mask(0))
        return out.astype(jnp.float32).sum()

    def body(*arrays):
        return jax.grad(one, (0, 1, 2))(*arrays)

    rows = P(mesh.axis_names)
    fn = jax.shard_map(body, mesh=mesh, in_specs=(rows,) * 3, out_specs=(rows,) * 3, check_vma=False)
    return Program(fn, tuple(abstract(mesh, s, mesh.axis_names) for s in shapes))
