"""Rows of T tokens from documents or from a synthetic task, each addressable by its number.

`PackedRows` lays all documents end to end and cuts the stream every T tokens. A row keeps what the model
needs to stay inside its documents:

    stream        a0 a1 a2 | b0 b1 b2 b3 b4 | c0 ...        T = 4
    row 1: tokens        b1 b2 b3 b4
           targets       b2 b3 b4 c0
           loss_mask      1  1  1  0      the next document's first token is not b's to predict
           segment_ids    1  1  1  1      numbered from 1 within the row
           positions      0  1  2  3      restart at a document's start and at a row's start

Targets overlap the next row by one token, so every transition inside a document is trained on exactly once
an epoch. The stream's last tokens, fewer than a row, are left out.

`RecallRows` draws multi-query associative recall (MQAR) examples: Arora et al., "Zoology", arXiv 2312.04927.
"""

from collections.abc import Sequence

import numpy as np

from kvattn.errors import UserError

Row = dict[str, np.ndarray]


class PackedRows:
    """Documents (int arrays [n]) as rows of T = `seq_len` tokens. Deterministic in the documents' order.

    Raises UserError: all documents together are shorter than T + 1 tokens.
    """

    def __init__(self, documents: Sequence[np.ndarray], seq_len: int):
        self._documents = [d for d in documents if len(d)]
        self._ends = np.cumsum([len(d) for d in self._documents], dtype=np.int64)
        self._seq_len = seq_len
        self.tokens = int(self._ends[-1]) if self._documents else 0
        if self.tokens < seq_len + 1:
            raise UserError(
                f"data.seq_len is {seq_len} but this split holds {self.tokens} tokens, fewer than one sequence and "
                "its target; give more text or a smaller data.seq_len."
            )

    def __len__(self) -> int:
        return (self.tokens - 1) // self._seq_len

    def __repr__(self) -> str:
        return f"PackedRows({len(self)} x {self._seq_len})"

    def __getitem__(self, row: int) -> Row:
        """Row: tokens, targets, segment_ids, positions int32 [T]; loss_mask float32 [T]."""
        start = row * self._seq_len
        ids, owner = self._stream(start, start + self._seq_len + 1)
        new = np.concatenate([[True], owner[1:] != owner[:-1]])[:-1]
        index = np.arange(self._seq_len)
        return {
            "tokens": ids[:-1],
            "targets": ids[1:],
            "segment_ids": np.cumsum(new, dtype=np.int32),
            "positions": (index - np.maximum.accumulate(np.where(new, index, 0))).astype(np.int32),
            "loss_mask": (owner[1:] == owner[:-1]).astype(np.float32),
        }

    def _stream(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and document numbers of stream positions start..stop-1, int32 each."""
        ids, owner = [], []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            document = self._documents[number]
            offset = start - (int(self._ends[number]) - len(document))
            piece = np.asarray(document[offset : offset + stop - start], np.int32)
            ids.append(piece)
            owner.append(np.full(len(piece), number, np.int32))
            start += len(piece)
            number += 1
        return np.concatenate(ids), np.concatenate(owner)


class RecallRows:
    """MQAR examples: N key-value pairs, then each key again at a random distance; answer with its value.

    Row `i` is drawn from (seed, stream, i) alone. Layout, T = `seq_len`, N = `pairs`, W = `vocab`:
    positions 0..2N-1 hold k1 v1 k2 v2 ...; query i is token k_i at position 2N + 2 g_i with the gaps g drawn
    without replacement from 0..(T-2N)/2-1, p(g) ~ (g+1)^(power-1); the label at that same position is v_i and
    nothing else is scored; every other token is uniform over the vocabulary. Keys lie in [1, W/2), values
    in [W/2, W), both without replacement (paper, section 4 and appendix).

    Raises UserError: 4N > T, T odd, or too small a vocabulary for N distinct keys.
    """

    def __init__(self, count: int, seq_len: int, pairs: int, vocab: int, seed: int, stream: int, power: float = 0.01):
        if pairs < 1 or 4 * pairs > seq_len or seq_len % 2:
            raise UserError(
                f"data.mqar_pairs is {pairs} and data.seq_len {seq_len}; recall needs an even length "
                "of at least four tokens a pair."
            )
        if vocab // 2 - 1 < pairs:
            raise UserError(
                f"data.mqar_vocab is {vocab}; {pairs} distinct keys and values need at least {2 * pairs + 2}."
            )
        self._count, self._seq_len, self._pairs, self._vocab = count, seq_len, pairs, vocab
        self._seed = (seed, stream)
        weight = power * (np.arange(1, (seq_len - 2 * pairs) // 2 + 1, dtype=np.float64)) ** (power - 1)
        self._gap_probability = weight / weight.sum()

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"RecallRows({self._count} x {self._seq_len}, {self._pairs} pairs)"

    def __getitem__(self, row: int) -> Row:
        """Row: tokens, targets, segment_ids, positions int32 [T]; loss_mask float32 [T], 1 at queries."""
        rng = np.random.default_rng((*self._seed, row))
        half, pairs = self._vocab // 2, self._pairs
        keys = 1 + rng.choice(half - 1, pairs, replace=False)
        values = half + rng.choice(self._vocab - half, pairs, replace=False)
        gaps = rng.choice(len(self._gap_probability), pairs, replace=False, p=self._gap_probability)
        queries = 2 * pairs + 2 * gaps
        tokens = rng.integers(0, self._vocab, self._seq_len)
        tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        tokens[queries] = keys
        targets, mask = np.zeros(self._seq_len, np.int32), np.zeros(self._seq_len, np.float32)
        targets[queries], mask[queries] = values, 1.0
        return {
            "tokens": tokens.astype(np.int32),
            "targets": targets,
            "segment_ids": np.ones(self._seq_len, np.int32),
            "positions": np.arange(self._seq_len, dtype=np.int32),
            "loss_mask": mask,
        }
