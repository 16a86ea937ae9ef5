"""Optimisers as optax chains: global-norm clipping, AdamW or Adafactor, a schedule, decay on matrices.

Weight decay is decoupled (Loshchilov & Hutter 2019, arXiv:1711.05101) and touches matrices only: norm
scales and biases are told apart by their name, because biases here keep their head dims (`q_bias[N, H]`
is rank 2 and still a bias).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvattn.config import OptimizerConfig
from kvattn.errors import UserError

# Adafactor factors a parameter's second moment over its two largest dims when both reach this. optax's
# 128 suits [D, N*H] matrices; here heads keep their own dim, so H (64, 128) is the second largest.
ADAFACTOR_MIN_DIM = 32
# Update clipping and second-moment decay exponent of Shazeer & Stern 2018 (arXiv:1804.04235), sections 6, 7.
ADAFACTOR_CLIP = 1.0
ADAFACTOR_DECAY = 0.8


def schedule(cfg: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """Learning rate as a function of the optimizer step (0-based) for a run of `steps` steps.

    Linear warm-up over `warmup_steps` (step 0 already moves: rate * 1/warmup), then `cosine` or `linear`
    down to `final_fraction * learning_rate` at step `steps`, or `constant`.

    Raises UserError: unknown schedule, warm-up longer than the run.
    """
    if steps > 0 and cfg.warmup_steps > steps:
        raise UserError(
            f"config.optimizer.warmup_steps is {cfg.warmup_steps}, more than config.train.steps={steps}; "
            "shorten the warm-up."
        )
    peak, final = cfg.learning_rate, cfg.learning_rate * cfg.final_fraction
    decay_steps = max(steps - cfg.warmup_steps, 1)
    if cfg.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, decay_steps, alpha=cfg.final_fraction)
    elif cfg.schedule == "linear":
        after = optax.linear_schedule(peak, final, decay_steps)
    elif cfg.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        raise UserError(f"config.optimizer.schedule is {cfg.schedule!r}; it takes cosine, linear or constant.")
    if not cfg.warmup_steps:
        return _relaxed(after)
    first = peak / cfg.warmup_steps
    warmup = optax.linear_schedule(first, peak, max(cfg.warmup_steps - 1, 1))
    return _relaxed(optax.join_schedules([warmup, after], [cfg.warmup_steps]))


def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """True for the parameters that weight decay touches: not a scale, not a bias, rank >= 2."""
    name = str(getattr(path[-1], "key", path[-1]))
    return leaf.ndim >= 2 and name != "scale" and not name.endswith("bias")


def decay_mask(params: Any) -> Any:
    """Tree of bool like `params`: which leaves are decayed."""
    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The whole update rule for a run of `steps` steps: clip, precondition, decay, scale by the schedule.

    AdamW: Loshchilov & Hutter 2019, algorithm 2. Adafactor: Shazeer & Stern 2018, algorithm 5 without
    momentum, with update clipping and relative step size (the learning rate multiplies each parameter's RMS).

    Raises UserError: unknown optimizer or schedule.
    """
    rate = schedule(cfg, steps)
    chain = [optax.clip_by_global_norm(cfg.clip_norm)] if cfg.clip_norm > 0 else []
    if cfg.name == "adamw":
        chain.append(optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps))
    elif cfg.name == "adafactor":
        chain.append(optax.scale_by_factored_rms(decay_rate=ADAFACTOR_DECAY, min_dim_size_to_factor=ADAFACTOR_MIN_DIM))
        chain.append(optax.clip_by_block_rms(ADAFACTOR_CLIP))
        chain.append(optax.scale_by_param_block_rms())
    else:
        raise UserError(f"config.optimizer.name is {cfg.name!r}; it takes adamw or adafactor.")
    if cfg.weight_decay:
        chain.append(optax.add_decayed_weights(cfg.weight_decay, mask=decay_mask))
    chain.append(optax.scale_by_learning_rate(rate))
    chained = optax.chain(*chain)
    return optax.GradientTransformation(chained.init, _relaxed(chained.update))


def _relaxed(f: Callable) -> Callable:
    """`f` traced under NumPy's promotion rules: optax mixes ints, floats and ranks, kvattn's own code does not."""

    @functools.wraps(f)
    def wrapped(*args):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return f(*args)

    return wrapped


def state_shardings(
    tx: optax.GradientTransformation, abstract_params: Any, shardings: Any, mesh: Mesh
) -> tuple[Any, Any]:
    """(abstract optimizer state, its shardings) for parameters of the given shapes and NamedShardings.

    A moment shaped like its parameter is laid out like it; a factored moment (Adafactor's row or column
    means) keeps the mesh axes of the dims it still has; counters are replicated.
    """
    abstract_state = jax.eval_shape(tx.init, abstract_params)
    replicated = NamedSharding(mesh, PartitionSpec())

    def like_param(leaf, param, sharding):
        if leaf.shape == param.shape:
            return sharding
        return NamedSharding(mesh, _factored_spec(leaf.shape, param.shape, sharding.spec))

    placed = optax.tree.map_params(
        tx, like_param, abstract_state, abstract_params, shardings, transform_non_params=lambda _: replicated
    )
    return abstract_state, placed


def _factored_spec(shape, param_shape, spec) -> PartitionSpec:
    """Mesh axes of a moment that lost one dim of its parameter; replicated when the dim is ambiguous."""
    entries = tuple(spec) + (None,) * (len(param_shape) - len(spec))
    kept = {
        entries[:i] + entries[i + 1 :]
        for i in range(len(param_shape))
        if param_shape[:i] + param_shape[i + 1 :] == shape
    }
    return PartitionSpec(*kept.pop()) if len(kept) == 1 else PartitionSpec()
