"""The training step: one jitted, sharded, donated function from (state, teacher, batch) to (state, metrics).

    layout = make_layout(cfg.model, cfg.optimizer, steps, mesh)
    step = make_step(layout, cfg.train, teacher=...)
    state, metrics = step(state, teacher_params, batch)

`batch` leaves are [A,B,T]: A micro-batches of B rows, B split over the mesh axes data and fsdp. Gradients
of the micro-batches are summed in float32 by a scan; because every loss is divided by the token count of
all of them, A micro-batches equal one batch of A*B rows.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvattn import model, spec
from kvattn.config import ModelConfig, OptimizerConfig, TrainConfig
from kvattn.errors import UserError
from kvattn.train import losses, optimizer
from sharding import RULES, Rules, ShardingError, named, use_rules

# Without it XLA:CPU copies every parameter before it overwrites the donated one: 425 MB for SmolLM2-135M.
_COMPILER_OPTIONS = {"xla_cpu_copy_insertion_use_region_analysis": True}


@flax.struct.dataclass
class TrainState:
    """step: int32 scalar, updates done so far; params: float32 masters; opt_state: optax state."""

    step: jax.Array
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where everything of a run lives: shapes and NamedShardings, and the update rule they belong to."""

    model: ModelConfig
    optimizer: OptimizerConfig
    steps: int
    mesh: Mesh
    rules_name: str
    tx: optax.GradientTransformation
    abstract: TrainState  # ShapeDtypeStructs with shardings
    shardings: TrainState

    @property
    def rules(self) -> Rules:
        return RULES[self.rules_name]

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        """Sharding of batch leaves [A,B,T]."""
        return NamedSharding(self.mesh, PartitionSpec(None, self.rules["act_batch"], None))

    @property
    def batch_shards(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def params_of(self, cfg: ModelConfig) -> Any:
        """Shardings of another model's parameters (a teacher's) on the same mesh, by its own rule table."""
        return _named(cfg, self.mesh, rules_for(cfg, self.mesh))


def rules_for(cfg: ModelConfig, mesh: Mesh) -> str:
    """The rule table for `cfg` on `mesh`: K and V heads are split over `tensor` where it divides their numbers
    and whole on every shard where it does not (multi-query attention on a tensor mesh, arXiv:2211.05102)."""
    parts = mesh.shape["tensor"]
    heads = [leaf.shape[0] for leaves in model.leaves(cfg) for leaf in (leaves or {}).values()]
    split = all(count % parts == 0 for count in heads)
    return "fsdp_tp" if split else "fsdp_tp_kv_replicated"


def _named(cfg: ModelConfig, mesh: Mesh, rules: str) -> Any:
    try:
        return named(model.param_specs(cfg), mesh, RULES[rules])
    except ShardingError as error:
        raise UserError(f"config.mesh does not fit the model: {error}") from error


def make_layout(cfg: ModelConfig, opt: OptimizerConfig, steps: int, mesh: Mesh) -> Layout:
    """The layout of a run of `steps` optimizer steps. Raises UserError for a mesh that does not divide the model."""
    rules = rules_for(cfg, mesh)
    shardings = _named(cfg, mesh, rules)
    tx = optimizer.make(opt, steps)
    abstract = spec.abstract(model.param_specs(cfg), jnp.float32)
    abstract_opt, opt_shardings = optimizer.state_shardings(tx, abstract, shardings, mesh)
    placed = TrainState(NamedSharding(mesh, PartitionSpec()), shardings, opt_shardings)
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), abstract, abstract_opt)
    shapes = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, placed)
    return Layout(cfg, opt, steps, mesh, rules, tx, shapes, placed)


# --- state ---------------------------------------------------------------------------------------------


def init_state(layout: Layout, seed: int) -> TrainState:
    """A fresh state from random parameters, born sharded: the same values on every mesh."""

    def make(rng):
        params = model.init(rng, layout.model, jnp.float32)
        return TrainState(jnp.zeros((), jnp.int32), params, layout.tx.init(params))

    return jax.jit(make, out_shardings=layout.shardings)(jax.random.key(seed))


def state_from(layout: Layout, params: Any, *, consume: bool = False, keep: Any = ()) -> TrainState:
    """A fresh state from given parameters, as float32 masters. They are copied, because the step donates its
    state; `consume` hands their buffers over instead (and the caller must not touch them again), but for the
    arrays that are also in `keep` (a teacher's that the student was made from).

    Raises UserError when the tree or a shape is not that of the model.
    """
    check_params(params, layout.model)
    params = place(params, layout.shardings.params, jnp.float32, copy=not consume, keep=keep)
    opt_state = jax.jit(layout.tx.init, out_shardings=layout.shardings.opt_state)(params)
    return TrainState(jax.device_put(np.int32(0), layout.replicated), params, opt_state)


def check_params(params: Any, cfg: ModelConfig) -> None:
    """Raises UserError for a tree or a shape that is not `cfg`'s."""
    want = spec.abstract(model.param_specs(cfg))
    if jax.tree.structure(params) != jax.tree.structure(want):
        raise UserError("the parameters given are not those of config.model: the trees differ; pass their own model.")
    for (path, have), need in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(want), strict=True):
        if have.shape != need.shape:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise UserError(f"parameter {name} is {have.shape} but config.model makes it {need.shape}.")


def place(params: Any, shardings: Any, dtype: Any, *, copy: bool, keep: Any = ()) -> Any:
    """`params` in `dtype` on `shardings`. Every process gives the whole array. `copy`: share no buffer;
    otherwise share none with the arrays in `keep`, nor one buffer between two leaves."""
    seen = {id(x) for x in jax.tree.leaves(keep)}

    def one(x, sharding):
        if jax.process_count() > 1:
            host = np.asarray(x.astype(dtype))
            return jax.make_array_from_callback(host.shape, sharding, lambda index: np.array(host[index]))
        borrowed = copy or id(x) in seen or not isinstance(x, jax.Array)
        seen.add(id(x))
        x = jnp.array(x, dtype, copy=True) if borrowed else x.astype(dtype)
        return jax.device_put(x, sharding)

    return jax.tree.map(one, params, shardings)


# --- step ----------------------------------------------------------------------------------------------


def make_step(layout: Layout, train: TrainConfig, *, teacher: ModelConfig | None = None):
    """The compiled-on-first-call step: (state, teacher_params or None, batch[A,B,T]) -> (state, metrics).

    Metrics are float32 scalars of this step, before its update: loss, ce, and z, kl, attention_mse when on;
    grad_norm before clipping; learning_rate; tokens, the count of unmasked ones. The state is donated.
    """

    def step(state: TrainState, teacher_params, batch):
        count = jnp.maximum(jnp.sum(batch["loss_mask"]), 1.0)
        taught = losses.Teacher(teacher, teacher_params) if teacher is not None else None

        def micro(rows):
            return jax.value_and_grad(losses.loss_and_metrics, has_aux=True)(
                state.params, layout.model, train, rows, count, teacher=taught, shards=layout.batch_shards
            )

        (loss, parts), grads = _accumulate(micro, batch)
        updates, opt_state = layout.tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = optimizer.schedule(layout.optimizer, layout.steps)(state.step)
        metrics = {"loss": loss, **parts, "grad_norm": optax.tree.norm(grads), "tokens": count}
        metrics["learning_rate"] = jnp.asarray(rate, jnp.float32)
        return TrainState(state.step + 1, params, opt_state), metrics

    teacher_shardings = layout.params_of(teacher) if teacher is not None else None
    jitted = jax.jit(
        step,
        in_shardings=(layout.shardings, teacher_shardings, layout.batch),
        out_shardings=(layout.shardings, layout.replicated),
        donate_argnums=0,
        compiler_options=_COMPILER_OPTIONS if layout.mesh.devices.flat[0].platform == "cpu" else None,
    )
    return _Ruled(jitted, layout)


def make_eval_step(layout: Layout, train: TrainConfig):
    """(params, batch[1,B,T]) -> (sum of next-token losses, number of unmasked tokens), float32 scalars."""
    plain = dataclasses.replace(TrainConfig(), compute_dtype=train.compute_dtype)

    def evaluate(params, batch):
        rows = jax.tree.map(lambda x: x[0], batch)
        one = jnp.ones((), jnp.float32)
        _, parts = losses.loss_and_metrics(params, layout.model, plain, rows, one, shards=layout.batch_shards)
        return parts["ce"], jnp.sum(batch["loss_mask"])

    jitted = jax.jit(evaluate, in_shardings=(layout.shardings.params, layout.batch), out_shardings=layout.replicated)
    return _Ruled(jitted, layout)


class _Ruled:
    """A jitted function that is traced with the layout's rule table active, so that `constrain` works."""

    def __init__(self, jitted, layout: Layout):
        self.jitted, self.layout = jitted, layout

    def __call__(self, *args):
        with use_rules(self.layout.mesh, self.layout.rules):
            return self.jitted(*args)

    def lower(self, *args):
        with use_rules(self.layout.mesh, self.layout.rules):
            return self.jitted.lower(*args)


def _accumulate(micro, batch):
    """Sum of `micro` over the leading axis of the batch, in float32."""
    accumulation = jax.tree.leaves(batch)[0].shape[0]
    if accumulation == 1:
        return micro(jax.tree.map(lambda x: x[0], batch))
    shapes = jax.eval_shape(micro, jax.tree.map(lambda x: x[0], batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(lambda sums, rows: (jax.tree.map(jnp.add, sums, micro(rows)), None), zeros, batch)
    return total


# --- batches -------------------------------------------------------------------------------------------


def data_share(layout: Layout, batch_size: int) -> tuple[int, int]:
    """(index, count): this process reads the index-th of count contiguous parts of each micro-batch.

    With the batch split over the processes that is (process, processes); processes that hold the same rows
    (a tensor axis across processes) read the same part. `batch_size` is B, the rows of a micro-batch.
    """
    index = layout.batch.addressable_devices_indices_map((1, batch_size, 1))
    rows = [slice_.indices(batch_size)[:2] for _, slice_, _ in index.values()]
    start, stop = min(r[0] for r in rows), max(r[1] for r in rows)
    width = stop - start
    if batch_size % width or start % width or sum(b - a for a, b in set(rows)) != width:
        raise UserError(
            "config.mesh scatters this process's batch rows; order data and fsdp so that a process holds neighbours."
        )
    return start // width, batch_size // width


def global_batch(layout: Layout, micro_batches: list[dict[str, np.ndarray]], share: tuple[int, int]) -> dict:
    """This process's A micro-batches (leaves [b,T]) as global arrays [A,B,T], b = B / number of shares."""
    out = {}
    for name in micro_batches[0]:
        local = np.stack([rows[name] for rows in micro_batches])
        shape = (local.shape[0], local.shape[1] * share[1], local.shape[2])
        out[name] = jax.make_array_from_process_local_data(layout.batch, local, shape)
    return out
