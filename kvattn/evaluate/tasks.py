"""Retrieval tasks: a pass key in a haystack of real text, and multi-query associative recall.

Both are scored by teacher forcing through the cache. An answer counts as retrieved when every one of its
tokens is the most likely one after the true ones before it, which is the same as greedy decoding writing
exactly that answer.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvattn.config import CacheConfig, ModelConfig
from kvattn.data import packing
from kvattn.errors import UserError
from kvattn.evaluate import scoring
from kvattn.evaluate.scoring import Sequences

STATEMENT = "\nThe pass key is"
REMINDER = ". Remember it. The pass key is"
FULL_STOP = ".\n"
QUESTION = "\nWhat is the pass key? The pass key is"
DIGITS = 5


@dataclasses.dataclass(frozen=True)
class NeedleCell:
    """One length (tokens, all included) and depth (0 = start): `accuracy` over `count` keys, `nll` in nats per
    answer (sum over its tokens, mean over keys)."""

    length: int
    depth: float
    accuracy: float
    nll: float
    count: int


@dataclasses.dataclass(frozen=True)
class Needle:
    """`accuracy` over all cells, the `worst` cell's accuracy, mean answer `nll`, and the `cells`."""

    accuracy: float
    worst: float
    nll: float
    cells: tuple[NeedleCell, ...]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"cells": [dataclasses.asdict(cell) for cell in self.cells]}


def needle(
    params: Any,
    cfg: ModelConfig,
    tokenizer: Any,
    haystack: str,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    cache_cfg: CacheConfig,
    repeats: int = 4,
    seed: int = 0,
    batch: int = scoring.BATCH,
    chunk: int = scoring.CHUNK,
    progress: scoring.Progress | None = None,
) -> Needle:
    """Pass-key retrieval: exact match of a random 5-digit key stated twice at `depth` of `length` tokens of text.

    Each cell asks for `repeats` keys, each in another stretch of the haystack; the cells of one length share
    keys and stretches, so that they differ in the depth alone. `progress(done, rows)` starts anew per length.

    Raises UserError: no length or depth, a depth outside [0, 1], a length that leaves no room for text, a
    haystack shorter than the longest length, or what `scoring.score` raises.
    """
    if not lengths or not depths:
        raise UserError("eval.needle_lengths or eval.needle_depths is empty; give at least one of each.")
    if not all(0.0 <= depth <= 1.0 for depth in depths):
        raise UserError(f"eval.needle_depths is {tuple(depths)}; depths lie between 0 and 1.")
    lines = [tokenizer.encode(line, add_bos=False) for line in haystack.splitlines(keepends=True)]
    cells = []
    for length in lengths:
        made = [
            _needle_row(tokenizer, lines, length, depth, np.random.default_rng((seed, length, i)))
            for depth in depths
            for i in range(repeats)
        ]
        sequences = Sequences(*(np.stack(x) for x in zip(*made, strict=True)))
        scores = scoring.score(params, cfg, sequences, cache_cfg, batch=batch, chunk=chunk, progress=progress)
        hit = (scores.correct | ~sequences.scored).all(1).reshape(len(depths), repeats)
        nll = scores.nll.sum(1, dtype=np.float64).reshape(len(depths), repeats)
        cells += [
            NeedleCell(length, depth, float(h.mean()), float(n.mean()), repeats)
            for depth, h, n in zip(depths, hit, nll, strict=True)
        ]
    accuracy = [cell.accuracy for cell in cells]
    nll_mean = float(np.mean([cell.nll for cell in cells]))
    return Needle(float(np.mean(accuracy)), min(accuracy), nll_mean, tuple(cells))


def _needle_row(tokenizer: Any, lines: list, length: int, depth: float, rng: np.random.Generator) -> Sequences:
    """One prompt of exactly `length` tokens, answer included, as Sequences of shape [length].

    [BOS] text-before, needle, text-after, question, answer. The needle stands at a line's end, so `depth` is
    kept to within a line. Pieces are encoded apart: the key has the same tokens wherever it stands.
    """
    encode = lambda text: tokenizer.encode(text, add_bos=False)  # noqa: E731
    key = encode(" " + "".join(str(d) for d in rng.integers(0, 10, DIGITS)))
    pin = encode(STATEMENT) + key + encode(REMINDER) + key + encode(FULL_STOP)
    question = encode(QUESTION)
    bos = [tokenizer.bos_id] if tokenizer.add_bos else []
    room = length - len(bos) - len(pin) - len(question) - len(key)
    if room < 1:
        raise UserError(f"eval.needle_lengths has {length}; the key and its question alone take {length - room}.")
    before, after = _hay(lines, room, depth, rng)
    ids = np.asarray([*bos, *before, *pin, *after, *question, *key], np.int32)
    scored = np.zeros(length, bool)
    scored[length - len(key) - 1 : length - 1] = True
    return Sequences(ids, np.arange(length, dtype=np.int32), np.roll(ids, -1), scored)


def _hay(lines: list, room: int, depth: float, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """`room` tokens of consecutive lines from a random start, cut in two at the line end nearest to `depth`."""
    sizes = np.asarray([len(line) for line in lines])
    left = np.cumsum(sizes[::-1])[::-1]  # tokens from each line to the end
    starts = np.flatnonzero(left >= room)
    if not len(starts):
        total = int(left[0]) if len(left) else 0
        raise UserError(f"the text has {total} tokens, fewer than eval.needle_lengths asks for; give a longer text.")
    first = int(rng.choice(starts))
    ends = np.concatenate([[0], np.cumsum(sizes[first:])])
    stop = int(np.searchsorted(ends, room))
    hay = [token for line in lines[first : first + stop] for token in line][:room]
    ends = np.append(ends[:stop], room)
    cut = int(ends[np.argmin(np.abs(ends - depth * room))])
    return hay[:cut], hay[cut:]


@dataclasses.dataclass(frozen=True)
class Recall:
    """`accuracy` of the most likely value over all queries, its `stderr` over examples, `nll` nats per query."""

    accuracy: float
    stderr: float
    nll: float
    examples: int
    pairs: int
    seq_len: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def mqar(
    params: Any,
    cfg: ModelConfig,
    *,
    seq_len: int,
    pairs: int,
    vocab: int,
    cache_cfg: CacheConfig,
    examples: int = 512,
    seed: int = 0,
    batch: int = 32,
    chunk: int = scoring.CHUNK,
    progress: scoring.Progress | None = None,
) -> Recall:
    """Recall accuracy on held-out MQAR examples (packing.RecallRows, the stream that training never draws).

    Raises UserError: a task vocabulary larger than the model's, or a length too short for the pairs.
    """
    if vocab > cfg.vocab_size:
        raise UserError(
            f"data.mqar_vocab is {vocab} but model.vocab_size is {cfg.vocab_size}; lower the first or raise the second."
        )
    source = packing.RecallRows(examples, seq_len, pairs, vocab, seed, stream=1)
    rows = [source[i] for i in range(examples)]
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    scored = stacked["loss_mask"] > 0
    sequences = Sequences(stacked["tokens"], stacked["positions"], stacked["targets"], scored)
    scores = scoring.score(params, cfg, sequences, cache_cfg, batch=batch, chunk=chunk, progress=progress)
    each = scores.correct.sum(1) / pairs
    stderr = float(each.std(ddof=1) / math.sqrt(examples)) if examples > 1 else 0.0
    nll = float(scores.nll.sum(dtype=np.float64) / scored.sum())
    return Recall(float(each.mean()), stderr, nll, examples, pairs, seq_len)
