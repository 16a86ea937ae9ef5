"""The study: every variant of one checkpoint (or several small models from scratch), measured the same way.

    before   convert, then perplexity through the variant's own cache, and KL to the unconverted model
    after    (up)train `train.steps` steps on the same batches as every other row, then perplexity again
    decode   continue a held-out prompt: tokens per second, cache bytes, the text

Each finished phase of a row is one line of `results.jsonl`; a run that finds the line skips the phase, so
the same command resumes after a kill, and more rows or other step counts extend a study. Per-token losses
are kept in `nll/`, so that differences between rows have paired standard errors.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

from kvattn import account, convert, data, decode, evaluate, formats, model, spec, study_report, train
from kvattn.config import Experiment, StudyConfig, VariantConfig, validate
from kvattn.convert import report as conversion
from kvattn.errors import UserError
from kvattn.legality import check_model_cache
from kvattn.losses import Teacher
from kvattn.metrics import read_jsonl

KL_TOKENS = 512  # held-out tokens behind the KL of a conversion
# Fields that may differ between two runs in one workdir: they change how much is done, not what a line means.
FREE = ("name", "workdir", "steps", "variants", "convert", "train.steps", "train.log_every", "train.keep",
        "train.checkpoint_every", "study.keep_models", "study.rows")  # fmt: skip


@dataclasses.dataclass
class _Subject:
    """What rows are made from and measured on: the checkpoint (None from scratch), its tokenizer, the text."""

    loaded: Any
    tokenizer: Any
    ids: np.ndarray
    reference: Any = None  # hidden states of the unconverted model on the KL text, computed once


def run(cfg: Experiment) -> list[dict[str, Any]]:
    """Runs or resumes the study in `cfg.workdir`; returns one merged record per row, in the rows' order.

    Leaves results.jsonl, report.md, pareto.png and nll/*.npy there. Raises UserError: no rows, no workdir, a
    workdir of another study (naming the field), and what loading, converting, training and decoding raise.
    """
    if not cfg.study.rows:
        raise UserError("config.study.rows is (); give at least one row, for example configs/study_smollm2.py.")
    if not cfg.workdir:
        raise UserError("config.workdir is empty; name a folder for the results.")
    return _Study(cfg).run()


class _Study:
    def __init__(self, cfg: Experiment):
        self.cfg, self.dir = cfg, pathlib.Path(cfg.workdir)
        self.console = rich.console.Console()
        self.began = time.perf_counter()
        (self.dir / "nll").mkdir(parents=True, exist_ok=True)
        _check_same_study(self.dir / "study.json", cfg)
        self.lines = read_jsonl(self.dir / "results.jsonl")
        self.subject = self._subject()
        for row in cfg.study.rows:  # every mistake in a row shows before the first minute is spent
            check_model_cache(self._planned(row), row.cache)

    def run(self) -> list[dict[str, Any]]:
        rows = self.cfg.study.rows
        self._say(f"study of {len(rows)} variants in {self.dir}: {', '.join(row.name for row in rows)}")
        for index, row in enumerate(rows):
            if row.model is None:
                self._phase(index, row, "before", self._before)
        for index, row in enumerate(rows):
            self._rest(index, row)
        records = [self._merged(row) for row in rows]
        study_report.write(self.dir, self.cfg, records)
        self.console.print(study_report.table(records))
        self._say(f"report: {self.dir / 'report.md'}, picture: {self.dir / 'pareto.png'}")
        return records

    # --- phases

    def _rest(self, index: int, row: VariantConfig) -> None:
        """Training, the second evaluation and decoding share the trained weights, so they run together."""
        wanted = ("after", "decode") if self.cfg.train.steps else ("decode",)
        if all(self._done(row.name, phase) for phase in wanted):
            return
        cfg, params = self._built(row)
        if self.cfg.train.steps:
            cfg, params, trained = self._train(index, row, cfg, params)
            self._phase(index, row, "after", lambda row: {**self._quality(row, cfg, params, "after"), **trained})
        self._phase(index, row, "decode", lambda row: self._decode(row, cfg, params))
        study_report.write(self.dir, self.cfg, [self._merged(r) for r in self.cfg.study.rows])
        if not self.cfg.study.keep_models:
            shutil.rmtree(self._training_dir(row), ignore_errors=True)

    def _phase(self, index: int, row: VariantConfig, phase: str, work) -> None:
        if self._done(row.name, phase):
            return
        start = time.perf_counter()
        found = work(row)
        line = {"row": row.name, "phase": phase, "steps": self._steps(phase), **found}
        line["seconds"] = round(time.perf_counter() - start, 2)
        self.lines.append(line)
        _append(self.dir / "results.jsonl", line)
        self._say(f"[{index + 1}/{len(self.cfg.study.rows)}] {study_report.summary(line)}")

    def _before(self, row: VariantConfig) -> dict[str, Any]:
        cfg, params = self._built(row)
        found = self._quality(row, cfg, params, "before")
        loaded = self.subject.loaded
        ids = jnp.asarray(self.subject.ids[:KL_TOKENS][None], jnp.int32)
        if self.subject.reference is None:
            self.subject.reference = conversion.reference(loaded, ids)
        after = convert.Converted(cfg, params, False, "")
        kl = conversion.measure(loaded, after, ids, cache=row.cache, before_hidden=self.subject.reference).kl
        return {**found, "kl": kl, **self._sizes(row, cfg)}

    def _quality(self, row: VariantConfig, cfg: Any, params: Any, phase: str) -> dict[str, Any]:
        """Perplexity through the row's cache; the per-token losses go to nll/."""
        options = self.cfg.eval
        with self._bar(f"{row.name}: perplexity {phase}") as update:
            nll = evaluate.token_nll(
                params, cfg, self.subject.ids, context=options.context, stride=options.stride, cache_cfg=row.cache,
                progress=update,
            )  # fmt: skip
        _write_array(self._nll_file(row.name, phase), nll)
        scored = nll[~np.isnan(nll)]
        mean, stderr = float(scored.mean()), float(scored.std(ddof=1) / math.sqrt(len(scored)))
        return {"nll": mean, "stderr": stderr, "ppl": math.exp(min(mean, 700.0)), "tokens": len(scored)}

    def _train(self, index: int, row: VariantConfig, cfg: Any, params: Any):
        """Trains the row on the shared batches; resumes from its own checkpoint."""
        steps, loaded = self.cfg.train.steps, self.subject.loaded
        shared = {"name": "", "variants": (), "steps": -1, "study": StudyConfig()}
        options = dataclasses.replace(self.cfg, convert=row.convert, **shared)
        if loaded is None:
            options = dataclasses.replace(options, train=_no_teacher(options.train))
        taught = loaded is not None and train.wants_teacher(options)
        teacher = Teacher(loaded.model, loaded.params) if taught else None
        with self._bar(f"{row.name}: training") as update:
            result = train.fit(
                options, params=params, model=cfg, teacher=teacher, tokenizer=self.subject.tokenizer,
                workdir=str(self._training_dir(row)), verbose=False,
                on_step=lambda step, record: update(step, steps),
            )  # fmt: skip
        if result.stopped:
            self._say(f"stopped by a signal in {row.name} after step {result.step}; the same command resumes")
            raise KeyboardInterrupt
        rate = result.tokens_per_second
        return result.model, result.params, {
            "train_loss": [round(x, 5) for x in result.losses],
            "train_tokens": steps * self.cfg.data.batch_size * self.cfg.data.seq_len,
            "train_tokens_per_second": None if math.isnan(rate) else rate,
            **({} if row.model is None else self._sizes(row, cfg)),
        }  # fmt: skip

    def _decode(self, row: VariantConfig, cfg: Any, params: Any) -> dict[str, Any]:
        options = self.cfg.study
        prompt = [int(i) for i in self.subject.ids[: options.prompt_tokens]]
        settings = dataclasses.replace(self.cfg.decode, max_new_tokens=options.decode_tokens)
        with self._bar(f"{row.name}: decoding") as update:
            update(0, 1)
            made = decode.generate(params, cfg, [prompt] * options.decode_batch, settings, row.cache)
        return {
            "decode_tokens_per_second": made.tokens_per_second,
            "prefill_seconds": made.prefill_seconds,
            "cache_bytes": made.cache_bytes,
            "text": self.subject.tokenizer.decode(made.tokens[0]),
        }

    def _sizes(self, row: VariantConfig, cfg: Any) -> dict[str, Any]:
        context, batch = study_report.ROOFLINE_CONTEXT, study_report.ROOFLINE_BATCH
        bf16 = dataclasses.replace(row.cache, dtype="bfloat16")
        seconds = account.roofline_decode_seconds(cfg, bf16, batch, context, study_report.ROOFLINE_CHIP)
        return {
            "params": account.param_count(cfg),
            "bytes_per_token": account.kv_bytes_per_token(cfg, row.cache),
            "bytes_at_context": account.cache_bytes(cfg, row.cache, 1, context),
            "roofline_seconds": seconds,
        }

    # --- what rows are made of

    def _subject(self) -> _Subject:
        loaded = None
        if self.cfg.checkpoint.path:
            self._say(f"loading {self.cfg.checkpoint.path}")
            loaded = formats.load(self.cfg.checkpoint.path, self.cfg.checkpoint.dtype)
        elif any(row.model is None for row in self.cfg.study.rows):
            raise UserError("config.checkpoint.path is empty but study.rows has rows without a model; name the "
                            "checkpoint they are converted from.")
        tokenizer = data.tokenizer_for(self.cfg.data, loaded.tokenizer if loaded else None)
        ids = np.asarray(tokenizer.encode(evaluate.evaluation_text(self.cfg)), np.int32)
        if self.cfg.eval.max_tokens:
            ids = ids[: self.cfg.eval.max_tokens]
        return _Subject(loaded, tokenizer, ids)

    def _planned(self, row: VariantConfig) -> Any:
        if row.model is not None:
            return row.model
        return convert.plan(self.subject.loaded.model, row.convert)

    def _built(self, row: VariantConfig) -> tuple[Any, Any]:
        """(config, parameters) of a row before training."""
        key = jax.random.key(self.cfg.seed)
        if row.model is not None:
            validate(row.model)
            return row.model, spec.init(key, model.param_specs(row.model))
        loaded = self.subject.loaded
        made = convert.convert_all(loaded.params, loaded.model, row.convert, rng=key)
        return made.model, made.params

    # --- bookkeeping

    def _steps(self, phase: str) -> int:
        return 0 if phase == "before" else self.cfg.train.steps

    def _find(self, name: str, phase: str) -> dict[str, Any] | None:
        steps = self._steps(phase)
        found = [x for x in self.lines if (x["row"], x["phase"], x["steps"]) == (name, phase, steps)]
        return found[-1] if found else None

    def _done(self, name: str, phase: str) -> bool:
        return self._find(name, phase) is not None

    def _merged(self, row: VariantConfig) -> dict[str, Any]:
        """One record per row: name, before, after, decode, and differences to the first row, paired by token."""
        phases = {phase: self._find(row.name, phase) for phase in ("before", "after", "decode")}
        first = self.cfg.study.rows[0].name
        for phase in ("before", "after"):
            mine, base = self._nll_file(row.name, phase), self._nll_file(first, phase)
            if phases[phase] and mine.exists() and base.exists():
                gap = np.load(mine) - np.load(base)
                gap = gap[~np.isnan(gap)]
                error = float(gap.std(ddof=1) / math.sqrt(len(gap)))
                phases[phase] = {**phases[phase], "gap": float(gap.mean()), "gap_stderr": error}
        return {"row": row.name, **phases}

    def _nll_file(self, name: str, phase: str) -> pathlib.Path:
        return self.dir / "nll" / f"{name}-{phase}-{self._steps(phase)}.npy"

    def _training_dir(self, row: VariantConfig) -> pathlib.Path:
        return self.dir / "rows" / f"{row.name}-{self.cfg.train.steps}"

    def _say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.perf_counter() - self.began), 60)
        self.console.print(f"{minutes:02d}:{seconds:02d} {text}", highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def _bar(self, what: str):
        """A transient progress bar; yields update(done, total)."""
        columns = ("{task.description}", rich.progress.BarColumn(), "{task.completed}/{task.total}",
                   rich.progress.TimeElapsedColumn())  # fmt: skip
        with rich.progress.Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def _no_teacher(options: Any) -> Any:
    """Training options of a row from scratch: the language-model loss alone."""
    return dataclasses.replace(options, distill=dataclasses.replace(options.distill, logit_kl=0.0, attention_mse=0.0))


def _append(path: pathlib.Path, line: dict[str, Any]) -> None:
    """One whole line on disk, or none."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _write_array(path: pathlib.Path, array: np.ndarray) -> None:
    partial = path.with_suffix(".partial.npy")
    np.save(partial, array)
    os.replace(partial, path)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    out: dict[str, Any] = {}
    for name, sub in tree.items():
        out |= _flat(sub, f"{prefix}.{name}" if prefix else name)
    return out


def _check_same_study(path: pathlib.Path, cfg: Experiment) -> None:
    """Refuses a workdir of another study, naming the first field that differs; remembers new rows.

    Raises UserError.
    """
    now = json.loads(json.dumps(dataclasses.asdict(cfg)))
    rows = {row["name"]: row for row in now["study"].pop("rows")}
    fields = {k: v for k, v in _flat(now).items() if k not in FREE}
    if path.exists():
        old = json.loads(path.read_text())
        for name in sorted(old["fields"].keys() | fields.keys()):
            if old["fields"].get(name) != fields.get(name):
                raise UserError(f"{path.parent} holds a study with config.{name}={old['fields'].get(name)!r} and this "
                                f"one has {fields.get(name)!r}; use a new config.workdir or the old value.")
        for name, row in rows.items():
            if old["rows"].get(name, row) != row:
                raise UserError(f"{path.parent} holds another row named {name!r}; rename the row or use a new "
                                "config.workdir.")
        rows = {**old["rows"], **rows}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"fields": fields, "rows": rows}, indent=1))
    os.replace(partial, path)
