"""Training and evaluation batches: corpus -> tokens (once) -> packed rows -> grain -> [b, T] batches.

    corpora.split -> documents -> cached token ids -> packing.PackedRows -> shuffle, repeat -> rows of this
    process -> batch

The order is a function of `data.seed` and the row count alone. With P processes and A accumulation steps an
optimizer step reads A batches of batch_size / A rows; process p holds the p-th of the P contiguous parts of
each, so concatenating the processes' batches gives the single process's batch, row for row. The iterator's
state is one JSON-serialisable position that every process shares: setting it resumes bit-exactly, and
O(1) in the number of batches read.
"""

import contextlib
import os
import pathlib
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import logging

from kvattn.config import DataConfig
from kvattn.data import corpora, packing
from kvattn.data.tokenizer import ByteTokenizer, Tokenizer
from kvattn.errors import UserError

Batch = dict[str, np.ndarray]

RECALL_ROWS = {"train": 100_000, "eval": 3_000}  # MQAR examples (Zoology: 100K to train on, 3K to test on)
SHARD_CHARACTERS = 1_000_000  # text tokenised and cached at a time
_LINE_START = re.compile(r"(?<=\n)(?=\S)")
_FORMAT = "tokens-1"  # part of the cache key: raise it when the layout of a cache file changes


def make_iterator(
    config: DataConfig,
    tokenizer: Tokenizer | None,
    *,
    split: str = "train",
    process_index: int | None = None,
    process_count: int | None = None,
    accumulation: int = 1,
    cache_dir: str | os.PathLike | None = None,
) -> "BatchIterator":
    """An endless iterator of this process's batches, each with b = batch_size / (processes x accumulation).

    Batch: tokens, targets, segment_ids, positions int32 [b, T]; loss_mask float32 [b, T] (see `packing`).
    The train split is reshuffled every epoch; the eval split comes in order, epoch after epoch.
    `tokenizer` is not used by source 'mqar', nor when `config.tokenizer` is 'bytes' (then bytes are tokens).
    `process_index`, `process_count` default to jax's. `cache_dir` holds tokenised documents; the default
    is $XDG_CACHE_HOME/kvattn (or ~/.cache/kvattn).

    Raises UserError: an indivisible batch, an unreadable or empty corpus, less than one sequence of text.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if not 0 <= index < count:
        raise ValueError(f"process_index {index} is outside 0..{count - 1}")
    if config.seq_len < 1:
        raise UserError(f"data.seq_len is {config.seq_len}; give at least 1 token.")
    if not 0 <= config.seed < 2**32:
        raise UserError(f"data.seed is {config.seed}; give a number from 0 to 2**32 - 1.")
    if config.batch_size < 1 or config.batch_size % (count * accumulation):
        raise UserError(
            f"data.batch_size is {config.batch_size}; make it a multiple of processes x train.accumulation = "
            f"{count} x {accumulation}."
        )
    rows, content = rows_of(config, tokenizer, split, cache_dir)
    dataset = grain.MapDataset.source(rows)
    if split == "train":
        dataset = dataset.shuffle(seed=config.seed)
    dataset = _ProcessRows(dataset.repeat(), config.batch_size // accumulation, index, count)
    dataset = dataset.batch(config.batch_size // (accumulation * count), drop_remainder=True)
    order = (content, split, config.seq_len, config.batch_size, config.seed, accumulation)
    return BatchIterator(dataset, corpora.hash_key(*order)[:16])


def rows_of(
    config: DataConfig, tokenizer: Tokenizer | None, split: str = "train", cache_dir: str | os.PathLike | None = None
) -> tuple[packing.PackedRows | packing.RecallRows, str]:
    """One epoch of `split` as addressable rows, and a fingerprint of what they are made of."""
    if split not in corpora.SPLITS:
        raise ValueError(f"split is {split!r}; it is one of {corpora.SPLITS}")
    if config.source == "mqar":
        pairs = recall_pairs(config)
        stream = corpora.SPLITS.index(split)
        made = (RECALL_ROWS[split], config.seq_len, pairs, config.mqar_vocab, config.seed, stream)
        return packing.RecallRows(*made), corpora.hash_key("mqar", *made)
    tokenizer = tokenizer_for(config, tokenizer)
    documents = corpora.split(config)[split]
    # Packing neighbours are a matter of chance, not of the alphabet: the order is by hash.
    documents = sorted(documents, key=lambda d: corpora.hash_key("order", config.seed, d.key))
    ids = tokenize(documents, tokenizer, cache_dir)
    content = corpora.hash_key(tokenizer.fingerprint, *(d.digest for d in documents))
    return packing.PackedRows(ids, config.seq_len), content


def recall_pairs(config: DataConfig) -> int:
    """Key-value pairs of an MQAR example: `mqar_pairs`, or one for every 16 tokens (Zoology's (64, 4) to (256, 16))."""
    return config.mqar_pairs or max(config.seq_len // 16, 1)


def tokenizer_for(config: DataConfig, tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer `config.tokenizer` asks for: the checkpoint's, as given, or bytes.

    Raises UserError: the checkpoint's is asked for and there is none, or the name is unknown.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer != "checkpoint":
        raise UserError(f"data.tokenizer is {config.tokenizer!r}; set it to 'checkpoint' or 'bytes'.")
    if tokenizer is None:
        raise UserError("data.tokenizer is 'checkpoint' but none gives one; set data.tokenizer='bytes'.")
    return tokenizer


def eval_text(config: DataConfig) -> str:
    """The held-out documents of a text corpus as one string, in order of key.

    Raises UserError: as `corpora.split`.
    """
    return "\n\n".join(document.text.strip("\n") for document in corpora.split(config)["eval"]) + "\n"


class BatchIterator(Iterator[Batch]):
    """An endless grain iterator whose state also tells what data it belongs to."""

    def __init__(self, dataset: grain.MapDataset, fingerprint: str):
        in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        self._iterator = iter(dataset.to_iter_dataset(in_this_thread))
        self.fingerprint = fingerprint

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """JSON-serialisable; equal on every process after the same number of batches."""
        return {"fingerprint": self.fingerprint, "grain": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batch that was last read when `get_state` gave `state`.

        Raises UserError: the state is of other data (corpus, tokenizer, data.* fields or accumulation).
        """
        if state.get("fingerprint") != self.fingerprint:
            raise UserError(
                "the checkpoint's data position belongs to other data; restore the same corpus, tokenizer, "
                "data.* fields and train.accumulation, or start in a new workdir."
            )
        self._iterator.set_state(state["grain"])


class _ProcessRows(grain.MapDataset):
    """The rows of process `index` of `count`: part `index` of every `global_batch` rows of the parent."""

    def __init__(self, parent: grain.MapDataset, global_batch: int, index: int, count: int):
        super().__init__(parent)
        self._global, self._local, self._index = global_batch, global_batch // count, index

    def __len__(self) -> int:
        return len(self._parent) // self._global * self._local

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._local)
        return self._parent[batch * self._global + self._index * self._local + row]


# --- tokenised documents, cached --------------------------------------------------------------------


class _Piece(NamedTuple):
    """A part of one document: the whole of it, or about SHARD_CHARACTERS of its lines."""

    key: str
    text: str
    first: bool
    last: bool


def tokenize(
    documents: Sequence[corpora.Document], tokenizer: Tokenizer, cache_dir: str | os.PathLike | None = None
) -> list[np.ndarray]:
    """Token ids int32 [n] of each document, with the tokenizer's own BOS rule and its first EOS at the end.

    About a megabyte of text is tokenised at a time (longer documents in pieces cut at line ends); each such
    shard is written atomically under a name that hashes its text and the tokenizer, so a killed run goes on
    where it was and nothing is tokenised twice. When the default directory cannot be written the ids
    stay in memory and a warning is logged.

    Raises UserError: `cache_dir` was given and cannot be written.
    """
    folder = pathlib.Path(cache_dir) if cache_dir is not None else _default_cache_dir()
    ids: dict[str, list[np.ndarray]] = {document.key: [] for document in documents}
    pieces = (piece for d in sorted(documents, key=lambda d: d.key) for piece in _pieces(d))
    for shard in _shards(pieces):
        key = corpora.hash_key(_FORMAT, tokenizer.fingerprint, *(p[1:] for p in shard))
        path = folder / f"{key[:32]}.npy"
        arrays = _read_shard(path, len(shard), tokenizer.vocab_size)
        if arrays is None:
            logging.info("tokenising %d pieces of text", len(shard))
            arrays = [_encode(piece, tokenizer) for piece in shard]
            _write_shard(path, arrays, required=cache_dir is not None)
        for piece, array in zip(shard, arrays, strict=True):
            ids[piece.key].append(array)
    return [np.concatenate(a) if len(a) > 1 else a[0] for a in (ids[d.key] for d in documents)]


def _encode(piece: _Piece, tokenizer: Tokenizer) -> np.ndarray:
    ids = tokenizer.encode(piece.text, None if piece.first else False)
    end = tokenizer.eos_ids[:1] if piece.last else ()
    return np.asarray([*ids, *end], np.int32)


def _pieces(document: corpora.Document) -> Iterator[_Piece]:
    """The document in pieces that end after SHARD_CHARACTERS at the next line end before a word."""
    text, start = document.text, 0
    while True:
        match = _LINE_START.search(text, start + SHARD_CHARACTERS)
        stop = match.start() if match else len(text)
        yield _Piece(document.key, text[start:stop], start == 0, stop == len(text))
        if stop == len(text):
            return
        start = stop


def _shards(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Consecutive pieces in groups of about SHARD_CHARACTERS."""
    shard: list[_Piece] = []
    size = 0
    for piece in pieces:
        shard.append(piece)
        size += len(piece.text)
        if size >= SHARD_CHARACTERS:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _default_cache_dir() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(root) / "kvattn" / "tokens"


def _read_shard(path: pathlib.Path, count: int, vocab_size: int) -> list[np.ndarray] | None:
    """The pieces of a cache file (memory-mapped), None when it is not there or not whole.

    Layout, int32: the documents' lengths [count], then their ids.
    """
    try:
        flat = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    lengths = np.asarray(flat[:count], np.int64)
    whole = flat.dtype == np.int32 and flat.ndim == 1 and len(lengths) == count and lengths.min() >= 0
    if not whole or count + lengths.sum() != len(flat):
        return None
    if len(flat) > count and not 0 <= flat[count:].min() <= flat[count:].max() < vocab_size:
        return None
    return np.split(flat[count:], np.cumsum(lengths)[:-1])


def _write_shard(path: pathlib.Path, pieces: list[np.ndarray], *, required: bool) -> None:
    """Writes a cache file under a temporary name, then renames it."""
    lengths = np.asarray([len(piece) for piece in pieces], np.int32)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            np.save(f, np.concatenate([lengths, *pieces]))
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if required:
            raise UserError(
                f"tokenised text cannot be written to {path.parent} ({e.strerror}); make room or choose another folder."
            ) from e
        logging.warning("tokenised text is not cached: %s cannot be written (%s)", path.parent, e.strerror)
