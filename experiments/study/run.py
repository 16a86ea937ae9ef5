"""The study: what each attention variant costs in quality and saves in cache bytes and decode time.

    reference   the checkpoint as it is: per-token loss on held-out text, through the real cache
    before      each row converted: loss, KL to the unconverted model, decoding speed, a sample
    after       each row uptrained `train.steps` steps (distilled from the unconverted model where
                train.distill says so), then measured again; rows from scratch are trained and measured

Every `before` comes first, so all rows show up early. A finished phase is one line of results.jsonl and, with
it, a fresh report.md and pareto.png; a killed study goes on after its last line, and inside a training after
its last checkpoint. Per-token losses are kept in nll/, so differences between rows are paired: same tokens.
"""

import dataclasses
import gc
import json
import os
import pathlib
import platform
import shutil
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import rich.console

from experiments.study import report as study_report
from kvattn import account, convert, formats
from kvattn.config import CacheConfig, DecodeConfig, Experiment, StudyConfig, VariantConfig, executed
from kvattn.convert import report as measure
from kvattn.data import batches as data
from kvattn.decode import generation as decode
from kvattn.errors import UserError
from kvattn.evaluate import perplexity as evaluate
from kvattn.train import loop as train
from kvattn.train.losses import Teacher
from sharding.cost.hardware import measure_cpu, of_device

KL_TOKENS = 256  # of the held-out text, behind each KL
# Fields that change no figure: a study may go on with other values, or with rows added.
_FREE = (
    "workdir",
    "name",
    "variants",
    "steps",
    "study.rows",
    "study.keep_models",
    "sharding_study",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.steps",
)


def run(cfg: Experiment) -> list[dict[str, Any]]:
    """Runs or resumes the study in `cfg.workdir`; returns the records of results.jsonl.

    Raises UserError: no rows or workdir, a row with neither checkpoint nor model, a workdir of another
    config (naming the field), and whatever loading, converting, training or evaluating raises. A signal
    during training ends in KeyboardInterrupt with everything finished on disk.
    """
    _check(cfg)
    journal, show = Journal(cfg), Show()
    todo = [(phase, row) for phase, row in _phases(cfg) if not journal.has(phase, row)]
    if todo:
        lab = _Lab(cfg, journal, show)
        for phase, row in todo:
            began = time.perf_counter()
            record = {"reference": lab.reference, "before": lab.before, "after": lab.after}[phase](row)
            record |= {"seconds": round(time.perf_counter() - began, 1), "date": time.strftime("%Y-%m-%d %H:%M:%S")}
            journal.add(phase, row, record)
            show.done(phase, row, record)
            study_report.write(cfg, journal.records, journal.workdir)
            _tidy(cfg, journal)
            gc.collect()  # a finished training's step and state, before the next one needs the room
    _tidy(cfg, journal)
    table = study_report.write(cfg, journal.records, journal.workdir)
    show.finish(table, journal)
    return journal.records


def _tidy(cfg: Experiment, journal: "Journal") -> None:
    """Drops the checkpoints (weights and optimizer state, three times the model) of rows that are finished."""
    for phase, row in _phases(cfg):
        if phase == "after" and journal.has(phase, row) and not cfg.study.keep_models:
            shutil.rmtree(_row_dir(cfg, row) / "checkpoints", ignore_errors=True)


def _check(cfg: Experiment) -> None:
    if not cfg.study.rows:
        raise UserError("config.study.rows is (); a study needs rows, for example configs/study_smollm2.py.")
    if not cfg.workdir:
        raise UserError("config.workdir is empty; name the folder for results.jsonl, report.md and pareto.png.")
    for row in cfg.study.rows:
        if row.model is None and not cfg.checkpoint.path:
            raise UserError(
                f"study row {row.name!r} has no model and config.checkpoint.path is empty; set one of them."
            )
        if row.model is not None and cfg.checkpoint.path:
            raise UserError(
                f"study row {row.name!r} has its own model beside config.checkpoint.path={cfg.checkpoint.path!r}; "
                "rows are either converted or from scratch, so empty the path or drop the model."
            )


def _phases(cfg: Experiment) -> list[tuple[str, VariantConfig | None]]:
    rows, scratch = cfg.study.rows, not cfg.checkpoint.path
    out: list[tuple[str, VariantConfig | None]] = [] if scratch else [("reference", None)]
    out += [] if scratch else [("before", row) for row in rows]
    return out + ([("after", row) for row in rows] if cfg.train.steps or scratch else [])


def _row_dir(cfg: Experiment, row: VariantConfig) -> pathlib.Path:
    return pathlib.Path(cfg.workdir) / "rows" / f"{row.name}-{cfg.train.steps}"


# --- the journal ---------------------------------------------------------------------------------------


class Journal:
    """results.jsonl: a first line with the shared config, then one line per finished phase of a row."""

    def __init__(self, cfg: Experiment):
        self.workdir, self.cfg = pathlib.Path(cfg.workdir), cfg
        self.path = self.workdir / "results.jsonl"
        self.workdir.mkdir(parents=True, exist_ok=True)
        (self.workdir / "nll").mkdir(exist_ok=True)
        everything = self._read()
        # An `after` line belongs to one number of steps; a run with another number measures its rows again.
        self.records = [r for r in everything if r.get("steps", cfg.train.steps) == cfg.train.steps]
        shared = _plain({k: v for k, v in flatten(dataclasses.asdict(cfg)).items() if not k.startswith(_FREE)})
        if self.records:
            self._check_same(shared)
        else:
            self._write({"phase": "setup", "config": shared, **machine()})

    def has(self, phase: str, row: VariantConfig | None) -> bool:
        return self.find(phase, row) is not None

    def find(self, phase: str, row: VariantConfig | None) -> dict[str, Any] | None:
        name = row.name if row else ""
        return next((r for r in self.records if r["phase"] == phase and r.get("row", "") == name), None)

    def add(self, phase: str, row: VariantConfig | None, record: dict[str, Any]) -> None:
        about = {"row": row.name, "config": _plain(flatten(dataclasses.asdict(row)))} if row else {}
        self._write({"phase": phase, **about, **record})

    def nll_path(self, phase: str, row: VariantConfig | None) -> pathlib.Path:
        return study_report.nll_path(self.cfg, self.workdir, phase, row.name if row else "")

    def _write(self, record: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        self.records.append(record)

    def _read(self) -> list[dict[str, Any]]:
        """The finished lines; a last line cut short by a kill is taken off the file."""
        if not self.path.exists():
            return []
        whole = self.path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        if len(kept) < len(whole):
            os.truncate(self.path, len(kept))
        try:
            return [json.loads(line) for line in kept.decode().splitlines()]
        except ValueError:
            raise UserError(f"{self.path} is not a study's results; use another config.workdir.") from None

    def _check_same(self, shared: dict[str, Any]) -> None:
        pairs = [("config.", self.records[0].get("config", {}), shared)]
        rows = {row.name: _plain(flatten(dataclasses.asdict(row))) for row in self.cfg.study.rows}
        pairs += [
            (f"config.study.rows[{r['row']}].", r["config"], rows[r["row"]])
            for r in self.records[1:]
            if r.get("row") in rows
        ]
        refuse_changes(self.path, pairs)


def refuse_changes(path: Any, pairs: Iterable[tuple[str, dict[str, Any], dict[str, Any]]]) -> None:
    """Raises UserError for the first key in which a journal's settings differ from this run's; pairs of
    (where the key stands, the journal's, this run's)."""
    for where, old, new in pairs:
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise UserError(
                    f"{path} was made with {where}{key}={old.get(key)!r} and this run has {new.get(key)!r}; "
                    "set it back, or start in another config.workdir."
                )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{'train': {'steps': 3}} -> {'train.steps': 3}; tuples of groups are indexed, plain tuples kept."""
    if isinstance(tree, (list, tuple)) and any(isinstance(item, dict) for item in tree):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {prefix: tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def _plain(flat: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(flat))


def machine() -> dict[str, Any]:
    """Where and with what a study runs."""
    device = jax.devices()[0]
    name = _cpu_name() if device.platform == "cpu" else device.device_kind
    versions = {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__}
    return {"device": f"{jax.device_count()} x {name}", "cores": os.cpu_count(), "versions": versions}


def _cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "cpu"


# --- the phases ----------------------------------------------------------------------------------------


class _Lab:
    """What the phases share: the checkpoint, the held-out tokens, the machine's roofline."""

    def __init__(self, cfg: Experiment, journal: Journal, show: "Show"):
        self.cfg, self.journal, self.show = cfg, journal, show
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
            reference = self.journal.find("reference", None)
            record |= {key: reference[key] for key in ("nll", "stderr", "ppl", "tokens")}
            shutil.copy(self.journal.nll_path("reference", None), self.journal.nll_path("before", row))
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

    def _convert(self, row: VariantConfig) -> convert.Converted:
        if row.model is not None:
            return convert.Converted(row.model, None, True, "from scratch")
        self.show.now(f"{row.name}: converting")
        rng = jax.random.fold_in(jax.random.key(self.cfg.seed), 1)
        made = convert.convert_all(self.base.params, self.base.model, row.convert, rng=rng)
        return dataclasses.replace(made, model=executed(made.model, self.cfg.model))

    def _train(self, row: VariantConfig) -> tuple[train.FitResult, convert.Converted]:
        made, steps = self._convert(row), self.cfg.train.steps
        cfg = dataclasses.replace(
            self.cfg,
            name=f"{self.cfg.name}/{row.name}",
            workdir=str(_row_dir(self.cfg, row)),
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
        np.save(self.journal.nll_path(phase, row), nll)
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
        # Handing tokens over step by step times prefill and decoding apart, not by difference.
        out = decode.generate(made.params, made.model, prompts, fields, row.cache, on_token=lambda row, token: None)
        return {
            "tokens_per_second": round(out.tokens_per_second, 2),
            "prefill_seconds": round(out.prefill_seconds, 4),
            "cache_bytes": out.cache_bytes,
            "prompt": self.tokenizer.decode(prompt),
            "text": self.tokenizer.decode(out.tokens[0]),
        }


# --- live progress -------------------------------------------------------------------------------------


class Show:
    """A spinner with what runs now on a terminal; elsewhere a line now and then. Finished phases always print."""

    def __init__(self):
        self.console = rich.console.Console(highlight=False)
        self.began = time.perf_counter()
        self.status = self.console.status("starting")
        self.status.start()

    def now(self, text: str, loud: bool = False) -> None:
        self.status.update(text)
        if loud and not self.console.is_terminal:
            self.say(text)

    def say(self, text: str) -> None:
        seconds = int(time.perf_counter() - self.began)
        self.console.print(f"[{seconds // 60:3d}:{seconds % 60:02d}] {text}", markup=False, soft_wrap=True)

    def done(self, phase: str, row: VariantConfig | None, record: dict[str, Any]) -> None:
        self.say(study_report.line(phase, row.name if row else "unconverted", record))

    def finish(self, table: Any, journal: Journal) -> None:
        self.status.stop()
        # The table needs some 140 columns; where there are fewer, whole lines that wrap beat cells cut short.
        rich.console.Console(width=max(self.console.width, 144)).print(table)
        seconds = sum(record.get("seconds", 0) for record in journal.records)
        self.console.print(
            f"{seconds / 60:.1f} minutes in all; {journal.workdir}/report.md, pareto.png, results.jsonl", soft_wrap=True
        )
