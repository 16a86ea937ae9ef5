"""The phases of a study: reference, before, after; each makes the record of one row.

reference   the checkpoint as it is: per-token loss on held-out text, through the real cache
before      each row converted: loss, KL to the unconverted model, decoding speed, a sample
after       each row uptrained `train.steps` steps (distilled from the unconverted model where
            train.distill says so), then measured again; rows from scratch are trained and measured
"""

import dataclasses
import shutil
from typing import Any

import jax
import numpy as np

from experiments.study import report as study_report
from experiments.study.progress import Progress
from experiments.study.results import Results, row_dir
from kvattn import account, formats
from kvattn.config import CacheConfig, DecodeConfig, Experiment, StudyConfig, VariantConfig
from kvattn.convert import report as measure
from kvattn.data import batches as data
from kvattn.decode import generation as decode
from kvattn.evaluate import perplexity as evaluate
from kvattn.prepare import Prepared, prepare, prepare_loaded
from kvattn.train import loop as train
from kvattn.train.losses import Teacher
from sharding.cost.hardware import measure_cpu, of_device

KL_TOKENS = 256  # of the held-out text, behind each KL


class Phases:
    """Measures rows; all phases share the checkpoint, the held-out tokens and the machine's roofline."""

    def __init__(self, cfg: Experiment, results: Results, show: Progress):
        self.cfg, self.results, self.show = cfg, results, show
        self.base, tokenizer = None, None
        if cfg.checkpoint.path:
            show.now("reading the checkpoint")
            self.base = formats.load(cfg.checkpoint.path, cfg.checkpoint.dtype)
            tokenizer = self.base.tokenizer
        self.tokenizer = data.tokenizer_for(cfg.data, tokenizer)
        ids = np.asarray(self.tokenizer.encode(evaluate.evaluation_text(cfg)), np.int32)
        self.ids = ids[: cfg.eval.max_tokens] if cfg.eval.max_tokens else ids
        self.chip = of_device(jax.devices()[0]) or measure_cpu()
        self.hidden = None

    def reference(self, _: None) -> dict[str, Any]:
        return {"source": self.base.source, **self._quality("reference", None, self.base, CacheConfig())}

    def before(self, row: VariantConfig) -> dict[str, Any]:
        made = self._convert(row)
        record = {"note": made.note, "exact": made.exact, **self._ledger(made.model, row)}
        if not row.convert and row.cache == CacheConfig():
            reference = self.results.of("reference", None)
            record |= {key: reference[key] for key in ("nll", "stderr", "ppl", "tokens")}
            shutil.copy(self.results.nll_path("reference", None), self.results.nll_path("before", row))
        else:
            record |= self._quality("before", row, made, row.cache)
        return record | {"kl": self._kl(row, made) if row.convert else 0.0} | self._decode(row, made)

    def after(self, row: VariantConfig) -> dict[str, Any]:
        fitted, made = self._train(row)
        tokens = self.cfg.train.steps * self.cfg.data.batch_size * self.cfg.data.seq_len
        record = {
            "steps": fitted.step,
            "train_tokens": tokens,
            "train_loss": fitted.losses[-1] if fitted.losses else None,
            "train_tokens_per_second": None if np.isnan(fitted.tokens_per_second) else fitted.tokens_per_second,
            "peak_memory_bytes": fitted.peak_memory_bytes,
        }
        trained = dataclasses.replace(made, params=fitted.params)
        del fitted, made
        record |= self._ledger(trained.model, row) | self._quality("after", row, trained, row.cache)
        if self.base is not None:
            record["kl"] = self._kl(row, trained)
        return record | self._decode(row, trained)

    def _convert(self, row: VariantConfig) -> Prepared:
        if row.model is not None:
            return prepare(dataclasses.replace(self.cfg, model=row.model), weights=False)
        self.show.now(f"{row.name}: converting")
        return prepare_loaded(dataclasses.replace(self.cfg, convert=row.convert), self.base)

    def _train(self, row: VariantConfig) -> tuple[train.FitResult, Prepared]:
        made, steps = self._convert(row), self.cfg.train.steps
        cfg = dataclasses.replace(
            self.cfg,
            name=f"{self.cfg.name}/{row.name}",
            workdir=str(row_dir(self.cfg, row)),
            convert=row.convert,
            cache=row.cache,
            model=row.model or self.cfg.model,
            study=StudyConfig(),
            variants=(),
            steps=-1,
        )
        teacher = Teacher(self.base.model, self.base.params) if train.wants_teacher(cfg) and self.base else None
        self.show.now(f"{row.name}: compiling the training step")

        def on_step(step: int, values: dict[str, float]) -> None:
            loud = step % self.cfg.train.log_every == 0 or step == steps
            self.show.now(f"{row.name}: training, step {step}/{steps}, loss {values['loss']:.3f}", loud)

        fitted = train.fit(
            cfg,
            params=made.params,
            model=made.model,
            teacher=teacher,
            tokenizer=self.tokenizer,
            workdir=cfg.workdir,
            consume=teacher is not None,  # what the row shares with its teacher is copied, the rest handed over
            verbose=False,
            on_step=on_step,
        )
        if fitted.stopped:
            self.show.say(f"stopped in {row.name} after step {fitted.step}/{steps}; the same command resumes there")
            raise KeyboardInterrupt
        return fitted, dataclasses.replace(made, params=None)

    def _quality(self, phase: str, row: VariantConfig | None, made: Any, store: CacheConfig) -> dict[str, Any]:
        """Loss of the held-out tokens, each scored once, through a cache as `store` says."""
        name = row.name if row else "unconverted"
        e = self.cfg.eval
        self.show.now(f"{name}: evaluating")
        nll = evaluate.token_nll(
            made.params,
            made.model,
            self.ids,
            context=e.context,
            stride=e.stride,
            cache_cfg=store,
            progress=lambda done, total: self.show.now(f"{name}: evaluating, window {done}/{total}"),
        )
        np.save(self.results.nll_path(phase, row), nll)
        return study_report.summary(nll)

    def _kl(self, row: VariantConfig, made: Any) -> float:
        self.show.now(f"{row.name}: KL to the unconverted model")
        tokens = jax.numpy.asarray(self.ids[None, :KL_TOKENS])
        if self.hidden is None:
            self.hidden = measure.reference(self.base, tokens)
        return measure.measure(self.base, made, tokens, cache=row.cache, before_hidden=self.hidden).kl

    def _ledger(self, model: Any, row: VariantConfig) -> dict[str, Any]:
        context, study = self.cfg.eval.context, self.cfg.study
        seen = study.prompt_tokens + study.decode_tokens
        roof = account.roofline_decode(model, row.cache, study.decode_batch, seen, self.chip, weight_bytes_per_param=4)
        return {
            "params": account.param_count(model),
            "kv_bytes_per_token": account.kv_bytes_per_token(model, row.cache),
            "kv_bytes_per_token_at_context": account.kv_bytes_per_token(model, row.cache, context),
            "context": context,
            "roofline_tokens_per_second": study.decode_batch / roof.seconds,
        }

    def _decode(self, row: VariantConfig, made: Any) -> dict[str, Any]:
        """Speed of greedy decoding, and what was written after the first held-out tokens."""
        self.show.now(f"{row.name}: decoding")
        study = self.cfg.study
        prompt = self.ids[: study.prompt_tokens].tolist()
        fields = DecodeConfig(max_new_tokens=study.decode_tokens, prefill_chunk=self.cfg.decode.prefill_chunk)
        prompts = [prompt] * study.decode_batch
        out = decode.generate(made.params, made.model, prompts, fields, row.cache)
        return {
            "tokens_per_second": round(out.tokens_per_second, 2),
            "prefill_seconds": round(out.prefill_seconds, 4),
            "cache_bytes": out.cache_bytes,
            "prompt": self.tokenizer.decode(prompt),
            "text": self.tokenizer.decode(out.tokens[0]),
        }
