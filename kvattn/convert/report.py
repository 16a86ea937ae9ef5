"""What a conversion cost and saved: KL and loss on given text, parameters, cache bytes."""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from kvattn import account, model
from kvattn.config import CacheConfig, ModelConfig
from kvattn.errors import UserError

CHUNK = 128  # positions whose two [1, CHUNK, W] float32 logits exist at one time


class Model(Protocol):
    """Anything with a config and parameters: formats.Loaded, convert.Converted."""

    model: ModelConfig
    params: Any


@dataclasses.dataclass(frozen=True)
class Report:
    """kl: mean over tokens of KL(before || after) of the next-token distributions, nats; loss_*: mean
    next-token negative log-likelihood, nats; bytes_per_token_*: KV bytes that one token writes; exact: what
    the conversion itself states (None when `after` is no conversion)."""

    kl: float
    loss_before: float
    loss_after: float
    params_before: int
    params_after: int
    bytes_per_token_before: int
    bytes_per_token_after: int
    exact: bool | None
    tokens: int


def reference(before: Model, tokens: jax.Array) -> tuple[jax.Array, ...]:
    """Final hidden states [1,T,D] of each row of tokens[B,T] int32: pass it to several `measure` calls to run
    the unconverted model once."""
    return tuple(_hidden(before.params, before.model, row[None]) for row in jnp.asarray(tokens))


def measure(
    before: Model,
    after: Model,
    tokens: jax.Array,
    *,
    cache: CacheConfig | None = None,
    before_hidden: tuple[jax.Array, ...] | None = None,
) -> Report:
    """Compares two models of one vocabulary on tokens[B,T] int32 (T >= 2, no padding).

    Rows run one at a time and logits in chunks of 128 positions, so that one pair of [1,128,W] is the most
    that exists. `cache` says in which dtype bytes are counted (None: the default CacheConfig, float32);
    `before_hidden` is `reference(before, tokens)` if it is at hand.

    Raises UserError: different vocabularies, tokens that are not [B,T >= 2] or lie outside the vocabulary.
    """
    tokens = jnp.asarray(tokens)
    _check_tokens(before, after, tokens)
    cache = cache or CacheConfig()
    hidden = before_hidden or reference(before, tokens)
    ends = _ends(before.params), _ends(after.params)
    sums = jnp.zeros((3,), jnp.float32)
    for row, h in zip(tokens, hidden, strict=True):
        other = _hidden(after.params, after.model, row[None])
        sums = sums + _compare(ends[0], ends[1], before.model, after.model, h, other, row)
    kl, loss_before, loss_after = (float(x) for x in sums)
    rows, length = tokens.shape
    return Report(
        kl=kl / (rows * length),
        loss_before=loss_before / (rows * (length - 1)),
        loss_after=loss_after / (rows * (length - 1)),
        params_before=account.param_count(before.model),
        params_after=account.param_count(after.model),
        bytes_per_token_before=account.kv_bytes_per_token(before.model, cache),
        bytes_per_token_after=account.kv_bytes_per_token(after.model, cache),
        exact=getattr(after, "exact", None),
        tokens=rows * length,
    )


def _check_tokens(before: Model, after: Model, tokens: jax.Array) -> None:
    vocab = before.model.vocab_size
    if after.model.vocab_size != vocab:
        raise UserError(
            f"the models have {vocab} and {after.model.vocab_size} tokens; compare models of one vocabulary."
        )
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise UserError(f"tokens has shape {tokens.shape}; it must be [B,T] with at least one row of two tokens.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
        raise UserError(f"tokens has ids {low}..{high}; the vocabulary is 0..{vocab - 1}, use its own tokenizer.")


def _ends(params: Any) -> dict[str, Any]:
    """The parameters that `model.unembed` reads, so that no other model's layers enter the comparison's jit."""
    return {name: params[name] for name in ("embed", "unembed") if name in params}


@functools.partial(jax.jit, static_argnames=("cfg",))
def _hidden(params: Any, cfg: ModelConfig, tokens: jax.Array) -> jax.Array:
    return model.hidden(params, cfg, model.Inputs(tokens))[0]


@functools.partial(jax.jit, static_argnames=("cfg_b", "cfg_a"))
def _compare(ends_b, ends_a, cfg_b, cfg_a, hidden_b, hidden_a, row) -> jax.Array:
    """[3] float32: sums over one row of KL(before || after), NLL before, NLL after. The last position has a
    KL but no next token."""
    length = row.shape[0]
    chunks = -(-length // CHUNK)
    pad = chunks * CHUNK - length
    targets = jnp.pad(row[1:], (0, pad + 1), constant_values=-1).reshape(chunks, CHUNK)

    def split(h):  # padded with zeros, whose logits are zero in both models: KL 0
        return jnp.pad(h[0], ((0, pad), (0, 0))).reshape(chunks, 1, CHUNK, h.shape[-1])

    def one(part):
        h_b, h_a, target = part
        log_b = jax.nn.log_softmax(model.unembed(ends_b, cfg_b, h_b)[0])
        log_a = jax.nn.log_softmax(model.unembed(ends_a, cfg_a, h_a)[0])
        kl = (jnp.exp(log_b) * (log_b - log_a)).sum()
        at = jnp.maximum(target, 0)[:, None]
        nll = [-jnp.where(target >= 0, jnp.take_along_axis(log, at, -1)[:, 0], 0.0).sum() for log in (log_b, log_a)]
        return jnp.stack([kl, *nll])

    return jax.lax.map(one, (split(hidden_b), split(hidden_a), targets)).sum(0)
