"""Training and uptraining: the loop around the step. One call, resumable by the same call.

    result = fit(cfg, workdir=...)                                   # from scratch
    result = fit(cfg, params=p, model=m, teacher=Teacher(m0, p0), tokenizer=t, workdir=...)
    result = fit_prepared(cfg, made)                                 # what kvattn.prepare.for_training(cfg) made

The workdir holds `checkpoints/`, `metrics.jsonl`, `tensorboard/` and `tokenizer/`. A run that finds a
checkpoint of the same config there goes on from it; the steps it repeats are repeated bit for bit, because
the state, the data position and the step count are all that a step depends on.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from kvattn import account
from kvattn.config import Experiment, ModelConfig
from kvattn.data import batches as data
from kvattn.data.tokenizer import check_matches
from kvattn.errors import UserError
from kvattn.train import checkpoint, metrics
from kvattn.train import startup_tables as tables
from kvattn.train import step as train_step
from kvattn.train.losses import Teacher
from sharding import ShardingError, make_mesh
from sharding.cost.hardware import of_device

EVAL_BATCHES = 8  # held-out batches behind each eval_loss


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What a run leaves. `losses[i]` is the loss of step i + 1, resumed steps included; `step` counts the
    updates in `params`; `stopped` says that a signal ended the run early; tokens_per_second is the mean after
    compilation, nan for a run of fewer than two steps."""

    params: Any
    model: ModelConfig
    step: int
    losses: tuple[float, ...]
    stopped: bool
    tokens_per_second: float
    seconds: float
    peak_memory_bytes: int
    workdir: str


def fit_prepared(cfg: Experiment, made: Any, **options: Any) -> FitResult:
    """`fit` of a kvattn.prepare.Prepared in cfg.workdir, its parameters handed over (`consume`). Raises as `fit`."""
    return fit(
        cfg,
        params=made.params,
        model=made.model,
        teacher=made.teacher,
        tokenizer=made.tokenizer,
        workdir=cfg.workdir,
        consume=True,
        **options,
    )


def wants_teacher(cfg: Experiment) -> bool:
    """Whether the loss has a distillation term."""
    return cfg.train.distill.needs_teacher


def fit(
    cfg: Experiment,
    *,
    params: Any = None,
    model: ModelConfig | None = None,
    teacher: Teacher | tuple[ModelConfig, Any] | None = None,
    tokenizer: Any = None,
    workdir: str | None = None,
    consume: bool = False,
    verbose: bool = True,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> FitResult:
    """Trains `cfg.train.steps` steps of `model` (default cfg.model) from `params` (default random, seed
    cfg.seed), or goes on from the newest checkpoint in `workdir` (empty or None: nothing is written).

    `params` are copied unless `consume`. `teacher` is used when cfg.train.distill has weights for it.
    `verbose` prints tables and a line every cfg.train.log_every steps; `on_step(step, record)` gets every
    record. SIGTERM and SIGINT end the run after the current step with a checkpoint (`FitResult.stopped`).

    Raises UserError: a mesh, corpus, tokenizer, teacher or parameters that do not fit; a checkpoint of another
    config; a loss that is not finite; a workdir that cannot be written. Checkpoints stay intact in each case.
    """
    return _Run(cfg, params, model, teacher, tokenizer, workdir, consume, verbose, on_step).go()


class _Run:
    """One call of `fit`: set-up, loop, tidy-up."""

    def __init__(self, cfg, params, model, teacher, tokenizer, workdir, consume, verbose, on_step):
        self.cfg, self.model = cfg, model or cfg.model
        self.teacher = Teacher(*teacher) if teacher is not None and wants_teacher(cfg) else None
        self.workdir, self.on_step = workdir or "", on_step
        self.verbose = verbose and jax.process_index() == 0
        check_teacher(cfg, self.model, self.teacher)
        self.tokenizer = _tokenizer(cfg, self.model, tokenizer)
        try:
            mesh = make_mesh(cfg.mesh)
        except ShardingError as error:
            raise UserError(f"config.mesh: {error}") from error
        self.layout = train_step.make_layout(self.model, cfg.optimizer, cfg.train.steps, mesh)
        micro = cfg.data.batch_size // cfg.train.accumulation
        if cfg.data.batch_size % cfg.train.accumulation or micro % self.layout.batch_shards:
            raise UserError(
                f"config.data.batch_size is {cfg.data.batch_size}; make it a multiple of train.accumulation x "
                f"mesh.data x mesh.fsdp = {cfg.train.accumulation} x {self.layout.batch_shards}."
            )
        self.share = train_step.data_share(self.layout, micro)
        self.batches = self._iterator("train")
        self.saver = checkpoint.Checkpoints(self.workdir, cfg.train.keep) if self.workdir else None
        self.meta = checkpoint.make_meta(cfg, self.model)
        with _closing(self.saver, on_success=False):
            self.start = self._resume_step()
            self.state = self._restore() if self.start is not None else self._fresh(params, consume)
            del params
            self.start = self.start or 0
            self.teacher_params = self._place_teacher()
            self.step = train_step.make_step(
                self.layout, cfg.train, teacher=self.teacher.model if self.teacher else None
            )
            self.evaluate = train_step.make_eval_step(self.layout, cfg.train) if cfg.train.eval_every else None
            self.recorder = _Recorder(self)

    # --- set-up

    def _iterator(self, split: str):
        index, count = self.share
        accumulation = self.cfg.train.accumulation if split == "train" else 1
        return data.make_iterator(
            self.cfg.data,
            self.tokenizer,
            split=split,
            process_index=index,
            process_count=count,
            accumulation=accumulation,
        )

    def _resume_step(self) -> int | None:
        if self.saver is None:
            return None
        latest = self.saver.latest()
        if latest is not None:
            checkpoint.check_same(self.saver.meta(latest), self.meta, self.saver.root / str(latest))
        else:
            checkpoint.save_tokenizer(self.workdir, self.tokenizer)
        return latest

    def _restore(self) -> train_step.TrainState:
        state, data_state = self.saver.restore(self.start, self.layout.abstract)
        self.batches.set_state(data_state)
        return state

    def _fresh(self, params: Any, consume: bool) -> train_step.TrainState:
        if params is None and self.cfg.checkpoint.path:
            raise UserError(
                f"config.checkpoint.path is {self.cfg.checkpoint.path!r} but no parameters were given and the workdir "
                "has no checkpoint to go on from; prepare them with weights."
            )
        if params is None:
            return train_step.init_state(self.layout, self.cfg.seed)
        keep = self.teacher.params if self.teacher else ()
        return train_step.state_from(self.layout, params, consume=consume, keep=keep)

    def _place_teacher(self) -> Any:
        if self.teacher is None:
            return None
        train_step.check_params(self.teacher.params, self.teacher.model)
        dtype = jnp.dtype(self.cfg.train.compute_dtype)
        placed = train_step.place(self.teacher.params, self.layout.params_of(self.teacher.model), dtype, copy=False)
        self.teacher = Teacher(self.teacher.model, None)
        return placed

    # --- loop

    def go(self) -> FitResult:
        train, stop = self.cfg.train, _Stop()
        began, done = time.perf_counter(), self.start
        if self.verbose:
            tables.show(self.layout, cfg=self.cfg, start=self.start, workdir=self.workdir, teacher=self.teacher)
        with _closing(self.saver), _closing(self.recorder), stop.listening():
            while done < train.steps and not stop.agreed():
                self.state, values = self.step(self.state, self.teacher_params, self._next_batch())
                done += 1
                extra = {}
                if self.evaluate is not None and (done % train.eval_every == 0 or done == train.steps):
                    extra = {"eval_loss": self._eval_loss()}
                self.recorder.add(done, values, extra)
                if self.saver is not None and done % train.checkpoint_every == 0 and done < train.steps:
                    self._save(done)
            self.recorder.drain()
            if self.saver is not None and self.saver.latest() != done:
                self._save(done)
        stopped = done < train.steps
        if self.verbose:
            self._say_end(done, stopped)
        return FitResult(
            params=self.state.params,
            model=self.model,
            step=done,
            losses=tuple(self.recorder.losses),
            stopped=stopped,
            tokens_per_second=self.recorder.mean_rate(),
            seconds=time.perf_counter() - began,
            peak_memory_bytes=metrics.peak_memory_bytes(),
            workdir=self.workdir,
        )

    def _say_end(self, done: int, stopped: bool) -> None:
        steps, losses = self.cfg.train.steps, self.recorder.losses
        where = f"saved in {self.workdir}" if self.workdir else "no workdir, nothing saved"
        if stopped:
            resume = "; the same command resumes" if self.workdir else ""
            print(f"stopped by a signal after step {done}/{steps}: {where}{resume}", flush=True)
        elif losses:
            print(f"done: step {done}/{steps}, loss {losses[0]:.4f} -> {losses[-1]:.4f}, {where}", flush=True)

    def _next_batch(self) -> dict[str, jax.Array]:
        rows = [next(self.batches) for _ in range(self.cfg.train.accumulation)]
        return train_step.global_batch(self.layout, rows, self.share)

    def _save(self, done: int) -> None:
        """Everything up to `done` is on disk, and finite, before the checkpoint that would skip it."""
        self.recorder.drain()
        self.recorder.writers.flush()
        self.saver.save(done, self.state, self.batches.get_state(), self.meta)

    def _eval_loss(self) -> float:
        """Mean next-token loss (nats) over the first EVAL_BATCHES held-out batches."""
        self.recorder.drain()
        with self.recorder.clock.paused():
            batches, total, count = self._iterator("eval"), 0.0, 0.0
            for _ in range(EVAL_BATCHES):
                batch = train_step.global_batch(self.layout, [next(batches)], self.share)
                ce, tokens = jax.device_get(self.evaluate(self.state.params, batch))
                total, count = total + float(ce), count + float(tokens)
        return total / max(count, 1.0)


def check_teacher(cfg: Experiment, student: ModelConfig, teacher: Teacher | None) -> None:
    """Raises UserError when the loss needs a teacher that is not there or does not fit the student."""
    distil = cfg.train.distill
    if not wants_teacher(cfg):
        return
    if teacher is None:
        raise UserError(
            "config.train.distill has a teacher's weights but there is no teacher; name config.checkpoint.path or set "
            "logit_kl and attention_mse to 0."
        )
    if teacher.model.vocab_size != student.vocab_size:
        raise UserError(
            f"the teacher has {teacher.model.vocab_size} tokens and the student {student.vocab_size} "
            "(model.vocab_size); distil between models of one vocabulary."
        )
    if not distil.attention_mse:
        return
    ours, theirs = (student.n_layers, student.d_model), (teacher.model.n_layers, teacher.model.d_model)
    if ours != theirs:
        raise UserError(
            f"config.train.distill.attention_mse compares layer by layer but the teacher has (n_layers, d_model) = "
            f"{theirs} and the student {ours}; set it to 0."
        )
    if student.scan_layers or teacher.model.scan_layers:
        raise UserError("config.train.distill.attention_mse needs unrolled layers; set model.scan_layers to False.")


def _tokenizer(cfg: Experiment, model: ModelConfig, tokenizer: Any) -> Any:
    if cfg.data.source == "mqar":
        if cfg.data.mqar_vocab > model.vocab_size:
            raise UserError(
                f"config.data.mqar_vocab is {cfg.data.mqar_vocab} but model.vocab_size is {model.vocab_size}; "
                "lower it or widen the model."
            )
        return None
    tokenizer = data.tokenizer_for(cfg.data, tokenizer)
    check_matches(tokenizer, model)
    return tokenizer


# --- signals -------------------------------------------------------------------------------------------


class _Stop:
    """SIGTERM and SIGINT set a flag that the loop reads between steps; a second signal acts at once."""

    def __init__(self):
        self.requested = False

    @contextlib.contextmanager
    def listening(self):
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _request(self, number, frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all processes answer alike."""
        if jax.process_count() == 1:
            return self.requested
        return bool(np.any(multihost_utils.process_allgather(np.int32(self.requested))))


@contextlib.contextmanager
def _closing(thing: Any, on_success: bool = True):
    """Closes `thing` on the way out; an error that is already on its way wins over one from closing."""
    try:
        yield
    except BaseException:
        if thing is not None:
            with contextlib.suppress(Exception):
                thing.close()
        raise
    if thing is not None and on_success:
        thing.close()


# --- records -------------------------------------------------------------------------------------------


class _Clock:
    """Seconds since start, with pauses."""

    def __init__(self):
        self._offset = 0.0

    def now(self) -> float:
        return time.perf_counter() - self._offset

    @contextlib.contextmanager
    def paused(self):
        began = time.perf_counter()
        yield
        self._offset += time.perf_counter() - began


class _Recorder:
    """Turns device metrics into records. It stays one step behind the device, so that reading a loss never
    waits for the step that was just dispatched."""

    def __init__(self, fit: _Run):
        self.fit, self.clock, self.pending = fit, _Clock(), None
        cfg = fit.cfg
        self.writers, self.losses = metrics.Writers(), []
        if fit.workdir and jax.process_index() == 0:
            lines = metrics.JsonLines(fit.workdir, fit.start)
            self.losses = [record["loss"] for record in metrics.read_jsonl(lines.path)]
            self.writers = metrics.Writers(lines, metrics.TensorBoard(fit.workdir, fit.start))
        self.tokens_per_step = cfg.data.batch_size * cfg.data.seq_len
        self.flops_per_token = account.flops_per_token(fit.model, cfg.data.seq_len, "train")
        if fit.teacher is not None:
            self.flops_per_token += account.flops_per_token(fit.teacher.model, cfg.data.seq_len, "train") / 3
        self.peak_flops = _peak_flops(fit.layout.mesh)
        # (step, time) of the first finished step, of the last log line, and of the last step
        self.first = self.last = self.end = None

    def add(self, step: int, values: dict[str, jax.Array], extra: dict[str, float]) -> None:
        """Takes the metrics of `step` (still being computed) and settles those of the step before."""
        self.drain()
        self.pending = (step, values, extra)

    def drain(self) -> None:
        """Settles what is pending: waits for it, writes it, prints it. Raises UserError for a loss not finite."""
        if self.pending is None:
            return
        (step, values, extra), self.pending = self.pending, None
        record = {name: float(value) for name, value in jax.device_get(values).items()} | extra
        now = self.clock.now()
        self._check_finite(step, record)
        train = self.fit.cfg.train
        if self.first is None:
            self.first = self.last = (step, now)
        logged = step % train.log_every == 0 or step in (self.first[0], train.steps)
        if logged:
            record |= self._rates(step, now)
        self.end = (step, now)
        self.losses.append(record["loss"])
        self.writers.write(step, record)
        if logged and self.fit.verbose:
            print(metrics.console_line(step, train.steps, record), flush=True)
        if self.fit.on_step is not None:
            self.fit.on_step(step, record)

    def _rates(self, step: int, now: float) -> dict[str, float]:
        out: dict[str, float] = {"memory_bytes": metrics.peak_memory_bytes()}
        if step > self.last[0]:
            seconds_per_step = (now - self.last[1]) / (step - self.last[0])
            out["tokens_per_second"] = self.tokens_per_step / seconds_per_step
            out["left_seconds"] = seconds_per_step * (self.fit.cfg.train.steps - step)
            if self.peak_flops is not None:
                out["mfu"] = out["tokens_per_second"] * self.flops_per_token / self.peak_flops
        self.last = (step, now)
        return out

    def _check_finite(self, step: int, record: dict[str, float]) -> None:
        bad = next((n for n in ("loss", "grad_norm") if not math.isfinite(record[n])), None)
        if bad is None:
            return
        kept = self.fit.saver.latest() if self.fit.saver else None
        where = f"the checkpoint of step {kept} is intact" if kept is not None else "there is no checkpoint yet"
        raise UserError(
            f"{bad} is {record[bad]} at step {step} ({where}); lower optimizer.learning_rate or raise "
            "optimizer.warmup_steps, in a new config.workdir."
        )

    def mean_rate(self) -> float:
        """Tokens per second from the end of the first step to the end of the last."""
        if self.first is None or self.end[0] == self.first[0]:
            return math.nan
        return self.tokens_per_step * (self.end[0] - self.first[0]) / (self.end[1] - self.first[1])

    def close(self) -> None:
        self.writers.close()


def _peak_flops(mesh: jax.sharding.Mesh) -> float | None:
    """bf16 FLOP/s of all devices of the mesh; None where the chip table does not know them (a CPU)."""
    chip = of_device(mesh.devices.flat[0])
    return chip.peak_flops / chip.devices_per_chip * mesh.size if chip else None
