"""Checkpoints of training runs: asynchronous, sharded, atomic, and readable on their own.

    <workdir>/checkpoints/<step>/params, opt_state    arrays (orbax, OCDBT), any sharding in, any sharding out
    <workdir>/checkpoints/<step>/data                 the data iterator's position, JSON, the same for every process
    <workdir>/checkpoints/<step>/meta                 step, model and experiment, JSON
    <workdir>/tokenizer                               the tokenizer of the run, when it has one

A step directory appears under its name only when it is complete, and an older one is deleted only after
that; a kill or a full disk leaves the previous checkpoint as it was. Checkpoints are not compressed:
trained float32 does not compress, and two cores have better things to do.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import shutil
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from kvattn import config as config_lib
from kvattn import model, spec, stacking
from kvattn.config import EXECUTION, Experiment, ModelConfig
from kvattn.data import tokenizer as tokenizer_lib
from kvattn.errors import UserError
from kvattn.train.metrics import writing
from kvattn.train.step import TrainState

FOLDER = "checkpoints"
TOKENIZER = "tokenizer"
FORMAT = 2  # of meta; 1 = one set of heads a model, conversions of one class
READABLE = (1, FORMAT)
WEIGHTS_ONLY = "converted"  # in the meta of a model without a run: what was converted, and how

# Fields that may change between a run and its continuation: they do not change what is computed, or
# (train.steps) they say how far to go.
FREE = (
    "name",
    "workdir",
    "cache",
    "mesh",
    "decode",
    "eval",
    "study",
    "sharding_study",
    "steps",
    "variants",
    "checkpoint.dtype",
    *(f"model.{name}" for name in EXECUTION if name != "scan_layers"),  # scanned weights are stacked otherwise
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.eval_every",
)

_DISK_MARKS = (
    "No space left",
    "Disk quota",
    "File too large",
    "Read-only file system",
    "Permission denied",
    "os_error_code",
)


class Checkpoints:
    """The checkpoints of one workdir; `keep` newest are kept.

    Raises UserError when the workdir cannot be written.
    """

    def __init__(self, workdir: str, keep: int):
        self.workdir = _absolute(workdir)
        self.root = self.workdir / FOLDER
        self._pending: int | None = None
        _silence()
        with writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                probe = self.root / ".writable"
                probe.write_text("")
                probe.unlink()
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
            )
            self._manager = ocp.CheckpointManager(self.root, options=options, item_handlers=_handlers())

    def latest(self) -> int | None:
        """The newest complete step, None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data_state: Any, meta: dict[str, Any]) -> None:
        """Starts to write step `step`; returns when the state's values are safe from donation.

        Raises UserError: no room for it, or the write before this one failed.
        """
        self.wait()
        self._check_room((state.params, state.opt_state))
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(state.params),
            opt_state=ocp.args.PyTreeSave(_as_dict(state.opt_state)),
            data=ocp.args.JsonSave(data_state),
            meta=ocp.args.JsonSave({"format": FORMAT, "step": step, **meta}),
        )
        with _disk_errors(self.root, self.latest()):
            self._pending = step
            self._manager.save(step, args=items, force=True)

    def save_weights(self, params: Any, meta: dict[str, Any]) -> None:
        """Starts to write a model without a run, as step 0. Raises UserError as `save`."""
        self._check_room(params)
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(params),
            meta=ocp.args.JsonSave(json.loads(json.dumps({"format": FORMAT, "step": 0, **meta}))),
        )
        with _disk_errors(self.root, None):
            self._pending = 0
            self._manager.save(0, args=items, force=True)

    def wait(self) -> None:
        """Returns when the last save is complete on disk. Raises UserError when it failed."""
        before = [s for s in self._manager.all_steps() if s != self._pending]
        self._pending = None
        with _disk_errors(self.root, max(before, default=None)):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given as meta, with format and step. Raises UserError for a format not known here."""
        with _reading(self.root / str(step)):
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            return _known(meta, self.root / str(step))

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, Any]:
        """(state, data state) of `step`, every array born on the sharding `abstract` names."""
        opt_state = _as_dict(abstract.opt_state)
        with _reading(self.root / str(step)):
            out = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=_restore_args(abstract.params),
                    opt_state=_restore_args(opt_state),
                    data=ocp.args.JsonRestore(),
                ),
            )
        leaves = jax.tree.leaves(out["opt_state"])
        restored = jax.tree.unflatten(jax.tree.structure(abstract.opt_state), leaves)
        count = jax.device_put(np.int32(step), abstract.step.sharding)
        return TrainState(count, out["params"], restored), out["data"]

    def close(self) -> None:
        """Waits for the last save and lets go of the directory."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _check_room(self, arrays: Any) -> None:
        """Refuses a save that would fill the disk: cheaper and clearer than failing half-way."""
        need = sum(x.nbytes for x in jax.tree.leaves(arrays))
        with contextlib.suppress(OSError):  # a remote file system has no free space to ask for
            free = shutil.disk_usage(self.root).free
            if free < need + (1 << 20):
                kept = self.latest()
                raise UserError(
                    f"config.workdir: {self.root} has {free / 1e6:,.1f} MB free and the next checkpoint needs "
                    f"{need / 1e6:,.1f} MB; free some and run the same command again"
                    + (f" (step {kept} is intact)." if kept is not None else ".")
                )


# --- meta ----------------------------------------------------------------------------------------------


def make_meta(cfg: Experiment, model_config: ModelConfig) -> dict[str, Any]:
    """The JSON that goes beside a state: the model as trained and the experiment that trained it."""
    experiment = config_lib.plain(dataclasses.replace(cfg, model=model_config))
    return json.loads(json.dumps({"model": experiment["model"], "experiment": experiment}))


def _known(meta: dict[str, Any], where: Any) -> dict[str, Any]:
    """`meta`, of a format in READABLE. Raises UserError for another."""
    if meta.get("format") not in READABLE:
        raise UserError(
            f"{where} has checkpoint format {meta.get('format')}, this version reads "
            f"{' and '.join(map(str, READABLE))}; use the version that wrote it or another checkpoint or workdir."
        )
    return meta


def check_same(saved: dict[str, Any], now: dict[str, Any], where: Any) -> None:
    """Raises UserError naming the first field in which a checkpoint's meta differs from this run's, an unknown format,
    a model without a run, an old meta that has no form in this version."""
    if WEIGHTS_ONLY in _known(saved, where):
        raise UserError(
            f"{where} holds a model, no run to go on with; name it in config.checkpoint.path and use a new "
            "config.workdir."
        )
    old, new = (_flat(_comparable(meta["experiment"], where)) for meta in (saved, now))
    for name in sorted(old.keys() | new.keys()):
        if any(name == free or name.startswith(free + ".") for free in FREE):
            continue
        if old.get(name) != new.get(name):
            raise UserError(
                f"{where} was written with config.{name}={old.get(name)!r} and this run has {new.get(name)!r}; "
                "use a new config.workdir or the old value."
            )


def _comparable(experiment: dict[str, Any], where: Any) -> dict[str, Any]:
    """An experiment of either format in the form of this version, without its free parts. Raises UserError where the
    old form has no new one."""
    kept = {name: value for name, value in experiment.items() if name not in FREE}
    try:
        kept["convert"] = [_conversion(step) for step in kept.get("convert", ())]
        typed = config_lib.from_config_dict(kept, Experiment)
    except UserError as error:
        raise UserError(
            f"{where} was written by another version and its experiment cannot be compared with this run's "
            f"({str(error).rstrip('.')}); "
            "resume with the version that wrote it, or use a new config.workdir with config.checkpoint.path set to "
            "this checkpoint."
        ) from error
    layers = config_lib.shortest(typed.model.every) if typed.model.layers else ()
    typed = dataclasses.replace(typed, model=dataclasses.replace(typed.model, layers=layers))
    return json.loads(json.dumps(config_lib.plain(typed)))


# Fields of a conversion in format 1, one class for all kinds, with their defaults.
_OLD_CONVERSION = {"k_heads": 0, "v_heads": 0, "method": "mean", "factor": 0, "owners": 0}
_OLD_CONVERSION |= {"window": 0, "sinks": 0, "keep_every": 0}


def _conversion(step: dict[str, Any]) -> dict[str, Any]:
    """A conversion of either format with what its kind reads: format 1 has every field of every kind, at its default
    where the kind has no use for it."""
    if not _OLD_CONVERSION.keys() <= step.keys():
        return step
    return {name: value for name, value in step.items() if value != _OLD_CONVERSION.get(name)}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value; of a list of dicts, `name[i]`."""
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        named = {f"{prefix}[{i}]": item for i, item in enumerate(tree)}
    elif isinstance(tree, dict):
        named = {f"{prefix}.{key}" if prefix else key: value for key, value in tree.items()}
    else:
        return {prefix: tree}
    return {name: leaf for key, value in named.items() for name, leaf in _flat(value, key).items()}


# --- reading without a run -----------------------------------------------------------------------------


def _absolute(path: Any) -> epath.Path:
    """A local path made absolute, as orbax wants it; a gs:// or s3:// path as it is."""
    return epath.Path(path if "://" in str(path) else os.path.abspath(path))


def find_step(path: Any) -> epath.Path:
    """The step directory that `path` means: itself, or the newest under a workdir or its checkpoints folder.

    Raises UserError when there is none.
    """
    path = _absolute(path)
    if (path / "meta").is_dir() and (path / "params").is_dir():
        return path
    for folder in (path / FOLDER, path):
        if folder.is_dir():
            steps = [p for p in folder.iterdir() if p.name.isdigit() and (p / "params").is_dir()]
            if steps:
                return max(steps, key=lambda p: int(p.name))
    raise UserError(
        f"{path} holds no kvattn checkpoint; give a workdir that has {FOLDER}/<step>, or such a step directory."
    )


def newest(workdir: Any) -> epath.Path | None:
    """The newest step directory of a workdir, None where it has none."""
    folder = _absolute(workdir) / FOLDER
    if not folder.is_dir():
        return None
    steps = [p for p in folder.iterdir() if p.name.isdigit() and (p / "params").is_dir()]
    return max(steps, key=lambda p: int(p.name), default=None)


def load_model(path: Any, dtype: str = "float32") -> tuple[ModelConfig, Any, Any]:
    """(model config, params in `dtype` on the first device, Tokenizer or None) of a workdir or step directory.

    Scanned layers come back unstacked, as decoding wants them. Raises UserError: no checkpoint there, a
    damaged one, a format not known here.
    """
    folder = find_step(path)
    _silence()
    with _reading(folder):
        cfg = _model_of(folder)
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            spec.abstract(model.param_specs(cfg), jnp.dtype(dtype)),
        )
        with ocp.Checkpointer(_array_handler()) as reader:
            params = reader.restore(folder / "params", args=_restore_args(abstract))
    if cfg.scan_layers:
        params = stacking.unstack_layers(params, cfg)
        cfg = dataclasses.replace(cfg, scan_layers=False)
    return cfg, params, load_tokenizer(folder.parent.parent)


def load_config(path: Any) -> tuple[ModelConfig, Any]:
    """(model config, Tokenizer or None) of a workdir or step directory, without its weights. Raises UserError as
    `load_model`."""
    folder = find_step(path)
    with _reading(folder):
        cfg = _model_of(folder)
    return cfg, load_tokenizer(folder.parent.parent)


def _model_of(folder: epath.Path) -> ModelConfig:
    meta = _known(json.loads((folder / "meta" / "metadata").read_text()), folder)
    return config_lib.from_config_dict(meta["model"], ModelConfig)


def save_model(workdir: Any, cfg: ModelConfig, params: Any, tokenizer: Any, about: dict[str, Any]) -> None:
    """Writes a model without a run as checkpoint 0 of `workdir`, which `load_model` opens; `about` goes into its meta.
    Raises UserError: a workdir that holds a checkpoint already, or cannot be written."""
    if (held := newest(workdir)) is not None:
        raise UserError(f"{workdir} holds checkpoint {held.name} already; save to a new folder.")
    saver = Checkpoints(str(workdir), keep=1)
    try:
        save_tokenizer(workdir, tokenizer)
        saver.save_weights(params, {"model": config_lib.plain(cfg), WEIGHTS_ONLY: about})
    finally:
        saver.close()


def load_tokenizer(workdir: Any) -> Any:
    """The tokenizer saved in a workdir, None when it has none."""
    folder = epath.Path(workdir) / TOKENIZER
    if not folder.is_dir():
        return None
    return tokenizer_lib.from_directory(folder)


def save_tokenizer(workdir: Any, tokenizer: Any) -> None:
    """Writes `tokenizer` into the workdir, once. Raises UserError when it cannot be written."""
    folder = epath.Path(workdir) / TOKENIZER
    if tokenizer is None or folder.is_dir() or jax.process_index() != 0:
        return
    partial = epath.Path(workdir) / (TOKENIZER + ".partial")
    with writing(folder):
        if partial.exists():
            partial.rmtree()
        partial.mkdir(parents=True)
        tokenizer.save(partial)
        partial.rename(folder)


# --- orbax ---------------------------------------------------------------------------------------------


def _array_handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_compression=False)


def _handlers() -> dict[str, Any]:
    return {
        "params": _array_handler(),
        "opt_state": _array_handler(),
        "data": ocp.JsonCheckpointHandler(),
        "meta": ocp.JsonCheckpointHandler(),
    }


def _restore_args(abstract: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))


def _as_dict(opt_state: Any) -> dict[str, Any]:
    """The optimizer state's leaves by path: no file then depends on optax's classes."""
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    width = len(str(len(leaves)))
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return {f"{i:0{width}}.{name}": leaf for i, (name, (_, leaf)) in enumerate(zip(names, leaves, strict=True))}


@functools.cache
def _silence() -> None:
    """Keeps the storage library's own reports of an error off the terminal, for the rest of the process: the
    error itself is raised to us and told in one sentence. Its threads report on long after, hence for good."""
    hook = sys.unraisablehook

    def report(unraisable: Any) -> None:
        # Writes that end after another one failed call back into an event loop that is gone: no news in it.
        if not (isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(unraisable.exc_value)):
            hook(unraisable)

    sys.unraisablehook = report
    logging.getLogger("absl").addFilter(_not_orbax)
    # Fragments queued behind the failed one are dropped unwritten when the process ends.
    warnings.filterwarnings("ignore", r"coroutine '[^']*async_serialize[^']*' was never awaited", RuntimeWarning)


def _not_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


@contextlib.contextmanager
def _disk_errors(root: epath.Path, kept: int | None):
    """A failed write becomes a UserError that says which checkpoint is intact."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = str(error)
        if not isinstance(error, OSError) and not any(mark in text for mark in _DISK_MARKS):
            raise
        reason = next((mark for mark in _DISK_MARKS[:-1] if mark in text), None) or text.splitlines()[0][:200]
        intact = f"step {kept} is intact" if kept is not None else "no earlier checkpoint exists"
        raise UserError(
            f"config.workdir: a checkpoint could not be written to {root} ({reason}); free space or repair the "
            f"directory and run the same command again ({intact})."
        ) from error


@contextlib.contextmanager
def _reading(folder: epath.Path):
    """Whatever a damaged checkpoint raises becomes a UserError naming the directory."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        first = " ".join(str(error).split())[:160]
        raise UserError(
            f"checkpoint {folder} cannot be read ({type(error).__name__}: {first}); delete that directory to fall "
            "back to the one before it."
        ) from error
