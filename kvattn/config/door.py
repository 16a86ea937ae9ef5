"""The door: ml-collections in, frozen dataclasses out.

A config file returns a locked `ConfigDict`; `from_config_dict` re-types it once into the frozen, hashable
dataclasses of schema.py and validates it. Nothing past this door has to ask whether a combination is legal.
"""

import dataclasses
import difflib
import types
import typing
from typing import Any

import ml_collections

from kvattn.config import legality
from kvattn.config.schema import Experiment
from kvattn.errors import UserError


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """A locked ConfigDict with the fields of a dataclass; the inverse of `from_config_dict`."""
    out = ml_collections.ConfigDict()
    for field in dataclasses.fields(config):
        out[field.name] = _to_plain(getattr(config, field.name))
    out.lock()
    return out


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_config_dict(value)
    if isinstance(value, tuple):
        return tuple(_to_plain(item) for item in value)
    return value


def from_config_dict(config: Any, cls: type = Experiment) -> Any:
    """Re-types a ConfigDict (or mapping) into `cls` and validates it.

    Raises UserError: unknown key (with the nearest valid one), wrong type, or illegal combination.
    """
    typed = _retype(config, cls, "config")
    if cls is Experiment:
        typed = _apply_shortcuts(typed)
    validate(typed)
    return typed


def _apply_shortcuts(config: Experiment) -> Experiment:
    if config.steps >= 0:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=config.steps))
    if config.variants:
        part = "study" if config.study.rows else "sharding_study"
        study = getattr(config, part)
        names = [row.name for row in study.rows]
        for name in config.variants:
            if name not in names:
                raise UserError(f"config.variants has {name!r}{_nearest(name, names)}; rows are {', '.join(names)}.")
        rows = tuple(row for row in study.rows if row.name in config.variants)
        config = dataclasses.replace(config, **{part: dataclasses.replace(study, rows=rows)})
    return config


def _nearest(name: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    return f" (nearest valid: {near[0]})" if near else ""


def _retype(value: Any, kind: Any, where: str) -> Any:
    """Converts `value` to the annotated type `kind`, naming `where` in every error."""
    if dataclasses.is_dataclass(kind):
        return _retype_dataclass(value, kind, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} is {value!r}; it takes a tuple.")
        return tuple(_retype(item, args[0], f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _retype(value, next(a for a in args if a is not type(None)), where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"{where} is {value!r} ({type(value).__name__}); it takes {kind.__name__}.")
    return value


def _retype_dataclass(value: Any, cls: type, where: str) -> Any:
    if isinstance(value, cls):
        return value
    if not hasattr(value, "keys"):
        raise UserError(f"{where} is {value!r}; it takes the fields of {cls.__name__}.")
    hints = typing.get_type_hints(cls)
    for key in value.keys():
        if key not in hints:
            raise UserError(f"{where}.{key} is no field of {cls.__name__}{_nearest(key, list(hints))}.")
    return cls(**{key: _retype(value[key], hints[key], f"{where}.{key}") for key in value.keys()})


def validate(config: Any) -> None:
    """Raises UserError for the first illegal combination in `config`, an Experiment or one of its parts."""
    legality.check(config)
