"""Teacher forcing through the real cache: the one engine under perplexity, needle and recall.

Sequences are fed in chunks into caches that `cache.create` allocated, exactly as a prefill does, and the
predictions of the masked-in positions are compared with given targets. What the store does to K and V
(rounding, a ring that overwrites, layers that share) is therefore part of every figure.

    tokens [n,C] --batch rows, chunk columns--> _extend (caches donated) --> hidden [b,c,D]
                 --pieces with anything to score--> _compare --> nll, correct [b,p]

Two programs per shape, whatever the number of sequences. Logits exist for one piece at a time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvattn import cache, model
from kvattn.config import CacheConfig, ModelConfig
from kvattn.errors import UserError

CHUNK = 256  # tokens of a sequence appended at a time
BATCH = 4  # sequences scored at a time
LOGITS = 2**24  # logits held at a time (64 MiB of float32)

Progress = Callable[[int, int], None]


class Sequences(NamedTuple):
    """tokens, positions (-1 = padding), targets int32 [n,C]; scored bool [n,C]: the logits after tokens[i, j]
    are compared with targets[i, j] where scored[i, j]."""

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    scored: np.ndarray


class Scores(NamedTuple):
    """nll float32 [n,C] in nats, correct bool [n,C] (the target is the most likely token); 0 where not scored."""

    nll: np.ndarray
    correct: np.ndarray


def score(
    params: Any,
    cfg: ModelConfig,
    sequences: Sequences,
    cache_cfg: CacheConfig,
    *,
    batch: int = BATCH,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Scores:
    """Scores of each sequence, in its own fresh cache. `progress(done, n)` is called after every batch.

    Raises UserError: token ids outside the vocabulary, a cache that cannot hold a sequence, or NaN logits.
    """
    if cache_cfg.keep is not None:
        raise UserError(
            f"cache.keep is {cache_cfg.keep.tag!r}, which drops tokens of a prompt before it is continued; here "
            "text is "
            "scored as it is read and nothing would be dropped, leave cache.keep out."
        )
    check_ids(cfg, sequences.tokens, "tokens")
    check_ids(cfg, sequences.targets, "targets")
    count, width = sequences.tokens.shape
    chunk, batch = min(chunk, width), min(batch, count)
    capacity = plan_capacity(cfg, cache_cfg, int(sequences.positions.max()) + 1)
    padded = _pad(sequences, -count % batch, -width % chunk)
    out = Scores(np.zeros(padded.tokens.shape, np.float32), np.zeros(padded.tokens.shape, bool))
    for row in range(0, count, batch):
        part = Sequences(*(x[row : row + batch] for x in padded))
        caches = model.create_caches(cfg, cache_cfg, batch, capacity)
        _score_batch(params, cfg, part, caches, chunk, Scores(*(x[row : row + batch] for x in out)))
        if progress:
            progress(min(row + batch, count), count)
    if np.isnan(out.nll).any():
        raise UserError("the model's logits are not numbers (NaN); its weights are damaged or diverged.")
    return Scores(*(x[:count, :width] for x in out))


def _pad(sequences: Sequences, rows: int, columns: int) -> Sequences:
    """Adds rows that repeat the last one and columns of padding, none of them scored."""
    grow = functools.partial(np.pad, pad_width=((0, 0), (0, columns)))
    tokens, targets = grow(sequences.tokens), grow(sequences.targets)
    positions = grow(sequences.positions, constant_values=-1)
    scored = np.pad(sequences.scored, ((0, rows), (0, columns)))
    again = ((0, rows), (0, 0))
    return Sequences(*(np.pad(x, again, mode="edge") for x in (tokens, positions, targets)), scored)


def _score_batch(params, cfg, part: Sequences, caches, chunk: int, out: Scores) -> None:
    """Fills `out`, views of the result's rows."""
    batch, width = part.tokens.shape
    piece = _piece(cfg, batch, chunk)
    last = int(np.flatnonzero(part.scored.any(0)).max(initial=-1))
    pending = []
    for start in range(0, min(width, last + 1), chunk):
        columns = slice(start, start + chunk)
        hidden, caches = _extend(params, cfg, part.tokens[:, columns], part.positions[:, columns], caches)
        for offset in range(0, chunk, piece):
            where = slice(start + offset, min(start + offset + piece, start + chunk))
            if part.scored[:, where].any():
                h = hidden[:, offset : offset + piece]
                pending.append((where, _compare(params, cfg, h, part.targets[:, where])))
    for where, (nll, correct) in pending:
        scored = part.scored[:, where]
        out.nll[:, where] = np.where(scored, nll, 0.0)
        out.correct[:, where] = np.where(scored, correct, False)


def _piece(cfg: ModelConfig, batch: int, chunk: int) -> int:
    """Columns unembedded at a time: as many as LOGITS allows, the chunk divided evenly."""
    parts = -(-batch * chunk * cfg.vocab_size // LOGITS)
    return -(-chunk // min(parts, chunk))


@functools.partial(jax.jit, static_argnames=("cfg", "empty"), donate_argnames="caches")
def _extend(params, cfg, tokens, positions, caches, empty=False):
    """Appends a chunk [b,c] to the caches -> (hidden [b,c,D], caches)."""
    inputs = model.Inputs(tokens=tokens, positions=positions, empty=empty)
    hidden, caches, _ = model.hidden(params, cfg, inputs, caches=caches)
    return hidden, caches


@functools.partial(jax.jit, static_argnames="cfg")
def _compare(params, cfg, hidden, targets):
    """hidden [b,p,D], targets [b,p] -> (nll [b,p] float32, whether the target has the largest logit)."""
    logits = model.unembed(params, cfg, hidden)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - target, jnp.argmax(logits, axis=-1) == targets


_unembed = jax.jit(model.unembed, static_argnames="cfg")


def logits(
    params: Any, cfg: ModelConfig, tokens: np.ndarray, *, mode: str, cache_cfg: CacheConfig, chunk: int = 512
) -> np.ndarray:
    """Logits [B,T,W] float32 after every token of tokens [B,T], read through the cache.

    mode 'prefill' appends `chunk` tokens at a time (the first chunk into an empty cache, as decoding does),
    'decode' one token at a time. Raises UserError: unknown mode, ids outside the vocabulary, too small a cache.
    """
    check_mode(mode)
    check_ids(cfg, tokens, "tokens")
    batch, width = tokens.shape
    chunk = 1 if mode == "decode" else min(chunk, width)
    caches = model.create_caches(cfg, cache_cfg, batch, plan_capacity(cfg, cache_cfg, width))
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    out = np.empty((batch, width, cfg.vocab_size), np.float32)
    tokens = np.asarray(tokens, np.int32)
    for start in range(0, width, chunk):
        columns = slice(start, start + chunk)
        empty = mode == "prefill" and start == 0
        hidden, caches = _extend(params, cfg, tokens[:, columns], positions[:, columns], caches, empty=empty)
        out[:, columns] = _unembed(params, cfg, hidden)
    return out


def check_mode(mode: str) -> None:
    """Raises UserError unless mode is prefill or decode."""
    if mode not in ("prefill", "decode"):
        raise UserError(f"mode is {mode!r}; set it to prefill or decode.")


def plan_capacity(cfg: ModelConfig, cache_cfg: CacheConfig, need: int) -> int:
    """Tokens per sequence to allocate for sequences of `need` tokens.

    Raises UserError: a fixed `cache.capacity` is smaller and some layer keeps every token.
    """
    capacity = cache_cfg.capacity or need
    if capacity < need and any(cache.layout(cfg, cache_cfg, owner, capacity)[1] == 0 for owner in cfg.owners):
        raise UserError(
            f"config.cache.capacity is {capacity} but a sequence has {need} tokens; set it to at least {need}, or 0."
        )
    return capacity


def check_ids(cfg: ModelConfig, ids: np.ndarray, field: str) -> None:
    """Raises UserError unless ids are a non-empty integer array within the model's vocabulary."""
    if ids.dtype.kind not in "iu":
        raise UserError(f"{field} are {ids.dtype}; give integer token ids.")
    if not ids.size:
        raise UserError(f"{field} are empty; give at least one token.")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= cfg.vocab_size:
        wrong = low if low < 0 else high
        raise UserError(
            f"{field} hold id {wrong}, outside the model's vocabulary 0..{cfg.vocab_size - 1}; "
            "use the checkpoint's own tokenizer."
        )
