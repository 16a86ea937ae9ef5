"""Evaluation through the real cache: strided perplexity, needle retrieval, multi-query recall.

    perplexity  windows of `context` tokens, `stride` apart; each token is scored once, by the window in which
                it has the longest context: exp(mean NLL) +- standard error of the mean NLL
    needle      a pass key at a given depth of a given length of real text (evaluate_tasks.py)
    mqar        key-value recall of models trained from scratch (evaluate_tasks.py)

`run` does what a config's `eval` section asks for and returns one JSON-serialisable dict.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import rich.console
import rich.progress

from kvattn import account
from kvattn.config import CacheConfig, Experiment, ModelConfig
from kvattn.data import batches as data
from kvattn.data import corpora
from kvattn.errors import UserError
from kvattn.evaluate import scoring
from kvattn.evaluate.scoring import Sequences
from kvattn.evaluate.tasks import Needle, NeedleCell, Recall, mqar, needle

__all__ = ["Needle", "NeedleCell", "Perplexity", "Recall", "mqar", "needle", "perplexity", "run", "token_nll"]


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """`nll_mean` in nats per token, `stderr` its standard error over the `tokens` scored, `ppl` = exp(nll_mean)."""

    nll_mean: float
    ppl: float
    stderr: float
    tokens: int
    context: int
    stride: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def perplexity(
    params: Any,
    cfg: ModelConfig,
    ids: Any,
    *,
    context: int,
    stride: int,
    cache_cfg: CacheConfig,
    batch: int = scoring.BATCH,
    chunk: int = scoring.CHUNK,
    progress: scoring.Progress | None = None,
) -> Perplexity:
    """Strided sliding-window perplexity of ids [n]; arguments and errors as `token_nll`."""
    nll = token_nll(
        params,
        cfg,
        ids,
        context=context,
        stride=stride,
        cache_cfg=cache_cfg,
        batch=batch,
        chunk=chunk,
        progress=progress,
    )
    nll = nll[~np.isnan(nll)]
    mean = float(nll.mean())
    stderr = float(nll.std(ddof=1) / math.sqrt(len(nll))) if len(nll) > 1 else 0.0
    ppl = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(mean, ppl, stderr, len(nll), context, stride)


def token_nll(
    params: Any,
    cfg: ModelConfig,
    ids: Any,
    *,
    context: int,
    stride: int,
    cache_cfg: CacheConfig,
    batch: int = scoring.BATCH,
    chunk: int = scoring.CHUNK,
    progress: scoring.Progress | None = None,
) -> np.ndarray:
    """float64 [n]: -ln p(ids[i] | its window so far), NaN where not scored (ids[0] always).

    Window w holds tokens w*stride .. w*stride+context-1, in a cache of its own. The first window scores all
    its tokens but the first, every other one its last `stride` (when stride == context, all but its first);
    the last window may be shorter. Two models' results on the same ids can be subtracted token by token.

    Raises UserError: fewer than 2 ids, context < 2, stride outside 1..context, ids outside the vocabulary, or
    a cache too small for `context` tokens.
    """
    ids = np.asarray(ids)
    if context < 2:
        raise UserError(f"eval.context is {context}; give at least 2 tokens.")
    if not 1 <= stride <= context:
        raise UserError(f"eval.stride is {stride} and eval.context {context}; the stride lies in 1..context.")
    if ids.ndim != 1 or len(ids) < 2:
        raise UserError(f"the text has {ids.size} tokens in shape {ids.shape}; perplexity needs at least 2 in a row.")
    scoring.check_ids(cfg, ids, "the text's tokens")
    sequences, where = windows(ids.astype(np.int32), context, stride)
    scores = scoring.score(params, cfg, sequences, cache_cfg, batch=batch, chunk=chunk, progress=progress)
    out = np.full(len(ids), np.nan)
    out[where[sequences.scored]] = scores.nll[sequences.scored]
    return out


def windows(ids: np.ndarray, context: int, stride: int) -> tuple[Sequences, np.ndarray]:
    """ids [n] as windows [w, context], and for each entry the index in ids of its target."""
    context = min(context, len(ids))
    count = 1 + max(0, -(-(len(ids) - context) // stride))
    column = np.arange(context, dtype=np.int32)
    at = stride * np.arange(count)[:, None] + column  # index in ids of each entry
    real = at < len(ids)
    # The logits of column j predict column j + 1; window w > 0 is asked for its last `stride` columns.
    scored = real & (at + 1 < len(ids)) & (column + 1 < context)
    scored[1:] &= column + 1 >= context - stride
    tokens = np.where(real, ids[np.minimum(at, len(ids) - 1)], 0)
    target = np.minimum(at + 1, len(ids) - 1)
    positions = np.where(real, column, -1).astype(np.int32)
    return Sequences(tokens, positions, ids[target], scored), target


def evaluation_text(cfg: Experiment) -> str:
    """The file `eval.text`, or the held-out part of `data`. Raises UserError: unreadable or empty."""
    text = corpora.read_text(cfg.eval.text, "eval.text") if cfg.eval.text else data.eval_text(cfg.data)
    if not text.strip():
        raise UserError(f"eval.text: {cfg.eval.text} holds no text; give a file that is not empty.")
    return text


def run(
    cfg: Experiment, params: Any, model_cfg: ModelConfig, tokenizer: Any, progress: scoring.Progress | None = None
) -> dict[str, Any]:
    """Everything `cfg.eval` asks for, of `model_cfg` in a cache as `cfg.cache` says -> one flat result.

    data.source 'mqar': recall accuracy on held-out examples. Otherwise perplexity of the text (and bits per
    UTF-8 byte, comparable between tokenizers) and, with `eval.needle_lengths`, needle retrieval.
    """
    if cfg.data.source == "mqar" and not cfg.eval.text:
        recall = mqar(
            params,
            model_cfg,
            seq_len=cfg.data.seq_len,
            pairs=data.recall_pairs(cfg.data),
            vocab=cfg.data.mqar_vocab,
            seed=cfg.data.seed,
            cache_cfg=cfg.cache,
            progress=progress,
        )
        return {"mqar": recall.to_dict()}
    tokenizer = data.tokenizer_for(cfg.data, tokenizer)
    text = evaluation_text(cfg)
    ids = np.asarray(tokenizer.encode(text))
    bytes_per_token = len(text.encode()) / len(ids)
    ids = ids[: cfg.eval.max_tokens] if cfg.eval.max_tokens else ids
    result = perplexity(
        params, model_cfg, ids, context=cfg.eval.context, stride=cfg.eval.stride, cache_cfg=cfg.cache, progress=progress
    )
    out = {**result.to_dict(), "bits_per_byte": result.nll_mean / math.log(2) / bytes_per_token}
    if cfg.eval.needle_lengths:
        found = needle(
            params,
            model_cfg,
            tokenizer,
            text,
            lengths=cfg.eval.needle_lengths,
            depths=cfg.eval.needle_depths,
            cache_cfg=cfg.cache,
            seed=cfg.seed,
            progress=progress,
        )
        out["needle"] = found.to_dict()
    return out


def check_mesh(cfg: Experiment) -> None:
    """Raises UserError for a mesh of several devices: evaluation runs on one."""
    if (cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor) != (1, 1, 1):
        raise UserError("mesh has several devices but evaluation runs on one; leave config.mesh at 1.")


def run_prepared(cfg: Experiment, made: Any) -> dict[str, Any]:
    """`run` of a kvattn.prepare.Prepared with a progress bar on stderr; the result also names the checkpoint, the
    conversions and the cache's bytes per token. Raises UserError: a mesh of several devices, and as `run`."""
    check_mesh(cfg)
    columns = "{task.description} {task.completed}/{task.total}"
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(columns, rich.progress.BarColumn(), console=console, transient=True) as bar:
        task = bar.add_task("evaluated")
        result = run(
            cfg,
            made.params,
            made.model,
            made.tokenizer,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    about = {"checkpoint": made.source, "conversions": made.note, "cache": dataclasses.asdict(cfg.cache)}
    about["kv_bytes_per_token"] = account.kv_bytes_per_token(made.model, cfg.cache)
    return about | result


def describe(result: dict[str, Any]) -> str:
    """A result of `run_prepared` as a few lines of text."""
    lines = [f"{result['checkpoint']} ({result['conversions']}), {result['kv_bytes_per_token']} KV bytes per token"]
    if "ppl" in result:
        lines.append(
            f"perplexity {result['ppl']:.4f}  (nll {result['nll_mean']:.4f} +- {result['stderr']:.4f}, "
            f"{result['bits_per_byte']:.4f} bits per byte, {result['tokens']} tokens, "
            f"context {result['context']}, stride {result['stride']})"
        )
    for cell in result.get("needle", {}).get("cells", ()):
        lines.append(
            f"needle length {cell['length']:6d} depth {cell['depth']:.2f}: accuracy {cell['accuracy']:.2f}, "
            f"answer nll {cell['nll']:.3f} ({cell['count']} keys)"
        )
    if "mqar" in result:
        m = result["mqar"]
        lines.append(
            f"recall accuracy {m['accuracy']:.4f} +- {m['stderr']:.4f} ({m['examples']} examples of {m['pairs']} "
            f"pairs in {m['seq_len']} tokens)"
        )
    return "\n".join(lines)
