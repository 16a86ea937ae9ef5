"""The one door from an experiment to a model that runs: load, convert, set execution. Every command comes through here.

    made = prepare(cfg)                    # decode, evaluate: weights and all
    made = for_training(cfg)               # what train.fit takes; a run that goes on loads no weights
    save(made, folder)                     # formats.load(folder) opens it like any checkpoint

The rng rule: random weights of a model come from key(cfg.seed), whatever a conversion draws from fold_in(key(cfg.seed),
1), folded again with the number of the step; calibration text is read in the order of cfg.seed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from kvattn import convert, formats, model
from kvattn.attention import gate
from kvattn.config import Conversion, Experiment, ModelConfig, executed, plain
from kvattn.convert import Context, Facts
from kvattn.data import batches as data
from kvattn.data.tokenizer import check_matches
from kvattn.errors import UserError
from kvattn.model import Inputs
from kvattn.train import checkpoint
from kvattn.train.losses import Teacher
from kvattn.train.metrics import writing

FACTS = "facts"  # folder beside a converted model: <step>.npz of each conversion that wanted some


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model as its experiment wants it. `params` is None where none are to be loaded; the teacher is the unconverted
    checkpoint, where cfg.train.distill has one. `note` and `exact`: of the conversions `steps`; `facts`: what each of
    them was told. `source`: where the weights come from, for reports."""

    model: ModelConfig
    params: Any
    tokenizer: Any
    source: str
    note: str = "unconverted"
    exact: bool = True
    steps: tuple[Conversion, ...] = ()
    facts: tuple[Facts | None, ...] = ()
    teacher_model: ModelConfig | None = None
    teacher_params: Any = None

    @property
    def teacher(self) -> Teacher | None:
        return None if self.teacher_model is None else Teacher(self.teacher_model, self.teacher_params)


def prepare(cfg: Experiment, *, weights: bool = True) -> Prepared:
    """Loads cfg.checkpoint (random weights of cfg.model where its path is empty), converts it by cfg.convert and sets
    how it is computed by cfg.model. `weights` False is for what needs none: a model from scratch that trainers draw for
    themselves, a run that goes on from the checkpoint in cfg.workdir, whose model is read there; a teacher is loaded in
    either case.

    Raises UserError: an unreadable checkpoint, an impossible conversion, one without a checkpoint, a kernel that cannot
    serve the model, without weights no checkpoint in the workdir.
    """
    if not cfg.checkpoint.path:
        return _from_scratch(cfg, weights)
    if not weights:
        return _going_on(cfg)
    return prepare_loaded(cfg, formats.load(cfg.checkpoint.path, cfg.checkpoint.dtype))


def prepare_loaded(cfg: Experiment, loaded: formats.Loaded) -> Prepared:
    """`prepare` of a checkpoint that is in memory already: several variants are made from it. Raises as `prepare`."""
    _served(convert.plan(loaded.model, cfg.convert), cfg)  # refused before anything is converted
    context = Context(jax.random.fold_in(jax.random.key(cfg.seed), 1), None, _calibration(cfg, loaded))
    made = convert.convert_all(loaded.params, loaded.model, cfg.convert, context)
    facts = tuple(f and dataclasses.replace(f, sources={**_about(cfg, loaded), **f.sources}) for f in made.facts)
    out = Prepared(
        _served(made.model, cfg),
        made.params,
        loaded.tokenizer,
        loaded.source,
        made.note,
        made.exact,
        cfg.convert,
        facts,
    )
    return _with_teacher(out, loaded) if cfg.train.distill.needs_teacher else out


def for_training(cfg: Experiment) -> Prepared:
    """What train.fit takes: without weights where there is nothing to convert or cfg.workdir has the run's own."""
    going_on = bool(cfg.workdir) and checkpoint.newest(cfg.workdir) is not None
    return prepare(cfg, weights=bool(cfg.checkpoint.path) and not going_on)


def save(made: Prepared, folder: Any) -> None:
    """Writes model, weights, tokenizer and facts so that formats.load, hence checkpoint.path, opens `folder`; whole or
    not at all. Raises UserError: no weights, a folder that holds a checkpoint already or cannot be written."""
    if made.params is None:
        raise UserError("there are no weights to save; prepare the model with weights=True.")
    about = {"source": made.source, "note": made.note, "exact": made.exact, "convert": plain(made.steps)}
    if checkpoint.newest(folder) is None:
        for step, facts in enumerate(made.facts):
            if facts is not None:
                with writing(epath.Path(folder) / FACTS):
                    (epath.Path(folder) / FACTS).mkdir(parents=True, exist_ok=True)
                facts.save(epath.Path(folder) / FACTS / f"{step}.npz")
    checkpoint.save_model(folder, made.model, made.params, made.tokenizer, about)


def _from_scratch(cfg: Experiment, weights: bool) -> Prepared:
    if cfg.convert:
        raise UserError("config.convert has steps but config.checkpoint.path is empty; name the checkpoint.")
    if not cfg.model.layers:
        raise UserError("config.model has no layers and config.checkpoint.path is empty; give one of them.")
    gate(cfg.model)
    params = model.init(jax.random.key(cfg.seed), cfg.model) if weights else None
    return Prepared(cfg.model, params, None, f"random weights of seed {cfg.seed}", "from scratch")


def _going_on(cfg: Experiment) -> Prepared:
    """The model and tokenizer of the run in the workdir, which holds its weights."""
    own, tokenizer = checkpoint.load_config(cfg.workdir)
    out = Prepared(_served(own, cfg), None, tokenizer, str(cfg.workdir), "as it was converted", False, cfg.convert)
    if not cfg.train.distill.needs_teacher:
        return out
    return _with_teacher(out, formats.load(cfg.checkpoint.path, cfg.checkpoint.dtype))


def _with_teacher(made: Prepared, loaded: formats.Loaded) -> Prepared:
    return dataclasses.replace(made, teacher_model=loaded.model, teacher_params=loaded.params)


def _served(cfg: ModelConfig, experiment: Experiment) -> ModelConfig:
    """`cfg` computed as the experiment says, once its kernels can serve it."""
    cfg = executed(cfg, experiment.model)
    gate(cfg)
    return cfg


def _calibration(cfg: Experiment, loaded: formats.Loaded) -> tuple[Inputs, ...]:
    """Batches of cfg.data's training text, in the order of cfg.seed, enough for every step that wants facts."""
    wanted = max((step.calibration_tokens for step in cfg.convert if step.wants), default=0)
    if not wanted:
        return ()
    rows = max(1, min(cfg.data.batch_size, wanted // cfg.data.seq_len))
    fields = dataclasses.replace(cfg.data, seed=cfg.seed, batch_size=rows)
    tokenizer = None
    if cfg.data.source != "mqar":
        tokenizer = data.tokenizer_for(cfg.data, loaded.tokenizer)
        check_matches(tokenizer, loaded.model)
    rows_of_text = data.make_iterator(fields, tokenizer, process_index=0, process_count=1)  # every process, the same
    batches = (next(rows_of_text) for _ in range(-(-wanted // (rows * cfg.data.seq_len))))
    names = ("tokens", "positions", "segment_ids")
    return tuple(Inputs(**{name: jnp.asarray(batch[name]) for name in names}) for batch in batches)


def _about(cfg: Experiment, loaded: formats.Loaded) -> dict[str, str]:
    return {"checkpoint": loaded.source, "seed": str(cfg.seed), "data": repr(plain(cfg.data))}
