"""Metrics: a two-method writer protocol, JSON lines, TensorBoard, and the lines people paste.

`metrics.jsonl` has one object a step, in step order, without duplicates: a resumed run first drops what
it is about to write again. Losses are written so that they read back to the same float32.
"""

import json
import math
import os
import resource
import sys
from typing import Any, Protocol

import jax
from etils import epath

from kvattn.errors import UserError

JSONL = "metrics.jsonl"


class Writer(Protocol):
    """Where a record goes. `write` takes plain Python numbers; `flush` returns once they are on disk."""

    def write(self, step: int, values: dict[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends `{"step": step, **values}` to `<workdir>/metrics.jsonl`.

    `resume_step` is the last step that is kept: later records, and a last line torn by a kill, are dropped.
    Raises UserError when the file cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike, resume_step: int):
        self.path = epath.Path(workdir) / JSONL
        kept = [r for r in read_jsonl(self.path) if r["step"] <= resume_step]
        with writing(self.path):
            partial = self.path.parent / (JSONL + ".partial")
            partial.write_text("".join(json.dumps(r) + "\n" for r in kept))
            partial.replace(self.path)
            self._file = self.path.open("a")

    def write(self, step: int, values: dict[str, Any]) -> None:
        with writing(self.path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")

    def flush(self) -> None:
        with writing(self.path):
            self._file.flush()
            if hasattr(self._file, "fileno"):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        with writing(self.path):
            self._file.close()


class TensorBoard:
    """Scalars for TensorBoard in `<workdir>/tensorboard`; records after `resume_step` are purged."""

    def __init__(self, workdir: str | os.PathLike, resume_step: int):
        from tensorboardX import SummaryWriter  # slow import, needed by training alone

        directory = epath.Path(workdir) / "tensorboard"
        with writing(directory):
            purge = resume_step + 1 if resume_step else None
            self._writer = SummaryWriter(os.fspath(directory), purge_step=purge)

    def write(self, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Writers:
    """Several writers as one."""

    def __init__(self, *writers: Writer):
        self.writers = writers

    def write(self, step: int, values: dict[str, Any]) -> None:
        for writer in self.writers:
            writer.write(step, values)

    def flush(self) -> None:
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


class writing:
    """Context: an OSError while writing `path` becomes a UserError naming the path and the reason."""

    def __init__(self, path: Any):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, traceback) -> bool:
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise UserError(
                f"config.workdir: cannot write {self.path} ({reason}); free space or name a directory you may write to."
            ) from error
        return False


def read_jsonl(path: Any) -> list[dict[str, Any]]:
    """Records of a metrics file in order; [] when there is none. A torn last line is left out."""
    path = epath.Path(path)
    if not path.exists():
        return []
    out = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) - 1:
                break
            raise UserError(f"{path} line {number + 1} is no JSON; repair it or name another workdir.") from error
    return out


def peak_memory_bytes() -> int:
    """Most bytes in use so far on the first local device; where the device does not say (CPU), the
    process's peak resident size."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def console_line(step: int, steps: int, values: dict[str, float]) -> str:
    """One pasteable line: `step 20/100  loss 3.2154  lr 3.0e-04  gnorm 0.91  412 tok/s  mfu 38.1%  ...`.

    `mfu` is `-` where the device's peak is not known.
    """
    parts = [f"step {step}/{steps}", f"loss {values['loss']:.4f}"]
    shown = {name: values[name] for name in ("ce", "kl", "attention_mse") if name in values}
    parts += [f"{name} {value:.4f}" for name, value in shown.items() if value != values["loss"]]
    parts += [f"lr {values['learning_rate']:.2e}", f"gnorm {values['grad_norm']:.2f}"]
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tok/s")
    mfu = values.get("mfu")
    parts.append("mfu -" if mfu is None else f"mfu {100 * mfu:.1f}%")
    if "memory_bytes" in values:
        parts.append(f"mem {values['memory_bytes'] / 2**30:.2f} GiB")
    if "eval_loss" in values:
        parts.append(f"eval {values['eval_loss']:.4f}")
    if "left_seconds" in values:
        parts.append(f"left {_clock(values['left_seconds'])}")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
