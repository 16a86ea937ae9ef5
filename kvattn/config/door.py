"""The door: ml-collections in, frozen dataclasses out.

A config file returns a locked `ConfigDict`; `from_config_dict` re-types it once into the frozen, hashable
dataclasses of this package and validates it. Nothing past this door has to ask whether a combination is legal.

A member of an open set (an attention family, a conversion, a keep-policy) is held as its fields and its tag. A model
also has one key for every field of its layers' families, unset: set, it changes that field in all layers that have it
(`--config.model.n_k_heads=1`).
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any

import ml_collections
from ml_collections import config_dict

from kvattn.config.experiment import Experiment
from kvattn.config.model import Attention, MaskConfig, ModelConfig, RopeConfig, layer_pattern
from kvattn.config.tagged import Tagged
from kvattn.errors import UserError


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """A locked ConfigDict with the fields of a dataclass; the inverse of `from_config_dict`."""
    out = ml_collections.ConfigDict()
    if isinstance(config, Tagged):
        out[config.tag_field] = config.tag
    for field in dataclasses.fields(config):
        out[field.name] = _to_dict(getattr(config, field.name), to_config_dict)
    if isinstance(config, ModelConfig):
        for name, kind in _family_fields(layer.attention for layer in config.layers).items():
            out[name] = config_dict.placeholder(kind)
    out.lock()
    return out


def plain(config: Any) -> Any:
    """A dataclass as nested dicts and tuples with the tags of open sets: what JSON files hold."""
    if not dataclasses.is_dataclass(config):
        return _to_dict(config, plain)
    tag = {config.tag_field: config.tag} if isinstance(config, Tagged) else {}
    return tag | {field.name: _to_dict(getattr(config, field.name), plain) for field in dataclasses.fields(config)}


def _to_dict(value: Any, convert: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return convert(value)
    if isinstance(value, tuple):
        return tuple(_to_dict(item, convert) for item in value)
    return value


def _family_fields(attentions: Iterable[Any]) -> dict[str, type]:
    """Name -> type of the simple fields of these families that no field of ModelConfig has already."""
    own = {f.name for f in dataclasses.fields(ModelConfig)}
    out: dict[str, type] = {}
    for attention in attentions:
        hints = typing.get_type_hints(type(attention))
        for field in dataclasses.fields(attention):
            if field.name not in own and hints[field.name] in (int, float, bool, str):
                out[field.name] = hints[field.name]
    return out


def from_config_dict(config: Any, cls: type = Experiment) -> Any:
    """Re-types a ConfigDict (or mapping) into `cls` and validates it.

    Raises UserError: unknown key (with the nearest valid one), wrong type, or illegal combination.
    """
    typed = _retype(config, cls, "config")
    if cls is Experiment:
        typed = _apply_shortcuts(typed)
    typed.check()
    return typed


def validate(config: Any) -> None:
    """Raises UserError for the first illegal field or combination of a config or one of its parts."""
    config.check()


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
    if dataclasses.is_dataclass(kind) or (isinstance(kind, type) and issubclass(kind, Tagged)):
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
    value = {key: value[key] for key in value.keys()}
    if issubclass(cls, Tagged):
        if cls.tag_field not in value:
            raise UserError(f"{where}.{cls.tag_field} is missing; choose one of {', '.join(sorted(cls.members))}.")
        cls = cls.known(value.pop(cls.tag_field), where)
    if cls is ModelConfig:
        return _retype_model(value, where)
    return _fields(value, cls, where)


def _fields(value: dict[str, Any], cls: type, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in value:
        if key not in names:
            raise UserError(f"{where}.{key} is no field of {cls.__name__}{_nearest(key, names)}.")
    return cls(**{key: _retype(value[key], hints[key], f"{where}.{key}") for key in value})


def _retype_model(value: dict[str, Any], where: str) -> ModelConfig:
    """A model, with what is set of its families' fields in all layers. The form before layers were values (one set of
    heads, `masks` and `ropes` beside it) is read too."""
    old = [name for name in ("variant", "masks", "ropes") if name in value]
    if old and value.get("layers"):
        raise UserError(f"{where}.{old[0]} stands beside {where}.layers, which say it of each layer; leave it out.")
    if old:
        value = _with_layers(value, where)
    own = {f.name for f in dataclasses.fields(ModelConfig)}
    rest = {key: value.pop(key) for key in list(value) if key not in own}
    cfg = _fields(value, ModelConfig, where)
    known = _family_fields(layer.attention for layer in cfg.layers)
    changes = {}
    for key, item in rest.items():
        if key not in known:
            raise UserError(f"{where}.{key} is no field of ModelConfig{_nearest(key, [*own, *known])}.")
        if item is not None:
            changes[key] = _retype(item, known[key], f"{where}.{key}")
    return cfg.replace(**changes) if changes else cfg


def _with_layers(value: dict[str, Any], where: str) -> dict[str, Any]:
    heads = Attention.known(value.pop("variant", "heads"), where)
    names = [f.name for f in dataclasses.fields(heads)]
    fields = {name: value.pop(name) for name in names if name in value}
    masks = _retype(value.pop("masks", ()), tuple[MaskConfig, ...], f"{where}.masks")
    ropes = _retype(value.pop("ropes", ({},)), tuple[RopeConfig | None, ...], f"{where}.ropes")
    n_layers = _retype(value.get("n_layers", ModelConfig.n_layers), int, f"{where}.n_layers")
    return value | {"layers": layer_pattern(_fields(fields, heads, where), masks, ropes, n_layers=n_layers)}
