"""Hugging Face checkpoint directories: config.json + safetensors, without torch or transformers.

    cfg, params, tokenizer = read(directory)
    write(directory, cfg, params, tokenizer)

Architectures are the table in architectures.py. A key or tensor that would change the computation and that kvattn
does not express is refused by name; so is an export that transformers could not compute exactly.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvattn import model, spec, stacking
from kvattn.config import ModelConfig
from kvattn.data import tokenizer as tokenizer_lib
from kvattn.errors import UserError
from kvattn.formats import safetensors_io as st
from kvattn.formats.architectures import (
    ARCHITECTURES,
    BUFFERS,
    VISION,
    Architecture,
    read_config,
    tensor_rows,
    write_config,
)
from kvattn.formats.config_rules import canonical
from kvattn.formats.flat import FIELDS, Flat, flat
from kvattn.formats.tensor_names import TRANSFORMS

MAX_CONFIG_BYTES = 4 << 20
SHARD_BYTES = 5 << 30
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": st.DTYPES["BF16"]}


# --- reading -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Load:
    """One tensor to read and the parameters it fills."""

    entry: st.Entry
    paths: tuple[tuple, ...]
    shapes: tuple[tuple[int, ...], ...]
    transform: str


def read(directory: str | os.PathLike, dtype: str = "float32") -> tuple[ModelConfig, dict[str, Any], Any]:
    """The model, its parameters (in `dtype`: float32 or bfloat16) and its tokenizer (None where the directory
    has no tokenizer.json).

    Every name and shape is checked before the first weight is read; then tensors are read one at a time, so the
    peak is the parameters plus one tensor. Raises UserError: no such directory, unknown or inexpressible
    config.json, missing, unused or misshapen tensors, NaN or infinite weights, damaged files.
    """
    directory = pathlib.Path(directory)
    if dtype not in _DTYPES:
        raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(_DTYPES)}.")
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json; give a Hugging Face checkpoint directory.")
    arch, cfg = read_config(st.read_json(directory / "config.json", MAX_CONFIG_BYTES))
    plan = _plan(arch, cfg, st.open_directory(directory))
    tokenizer = tokenizer_lib.from_directory(directory) if (directory / "tokenizer.json").exists() else None
    if tokenizer is not None:
        tokenizer_lib.check_matches(tokenizer, cfg)
    params: dict[tuple, jax.Array] = {}
    for load in plan:
        parts = TRANSFORMS[load.transform].unpack(st.read(load.entry), load.shapes)
        for path, part in zip(load.paths, parts):
            params[path] = jnp.asarray(np.ascontiguousarray(part.astype(_DTYPES[dtype], copy=False)))
    return cfg, _assemble(cfg, params), tokenizer


def _flat_specs(cfg: ModelConfig) -> dict[tuple, spec.ParamSpec]:
    """Path (dict keys and layer numbers) -> ParamSpec."""
    flat, _ = jax.tree_util.tree_flatten_with_path(model.param_specs(cfg), is_leaf=spec.is_spec)
    return {_path(path): leaf for path, leaf in flat}


def _path(path) -> tuple:
    return tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path)


def _assemble(cfg: ModelConfig, params: dict[tuple, Any]) -> dict[str, Any]:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: params[_path(path)], model.param_specs(cfg), is_leaf=spec.is_spec
    )


def _plan(arch: Architecture, cfg: ModelConfig, files: dict[str, st.Entry]) -> list[_Load]:
    """Which tensor fills which parameter; UserError unless they match one to one, shapes included."""
    entries = {_text_name(name): entry for name, entry in files.items() if not name.startswith(VISION)}
    specs, plan, used = _flat_specs(cfg), [], set()
    for names, paths, transform in tensor_rows(arch, cfg.n_layers):
        if paths[0] not in specs:
            continue
        present = [name for name in names if name in entries]
        if len(present) != 1:
            count = "are both there" if present else "is missing"
            raise UserError(
                f"tensor {' and '.join(present) or names[0]} {count}; config.json ({arch.model_type}, "
                f"{cfg.n_layers} layers) needs exactly one of it."
            )
        entry, shapes = entries[present[0]], tuple(specs[path].shape for path in paths)
        want = TRANSFORMS[transform].shape(shapes)
        if entry.shape != want:
            raise UserError(f"{entry.file}: tensor {entry.name} has shape {entry.shape}; config.json makes it {want}.")
        plan.append(_Load(entry, paths, shapes, transform))
        used.add(present[0])
    _check_unused({name: entry for name, entry in entries.items() if name not in used}, arch, cfg, plan)
    return plan


def _text_name(name: str) -> str:
    """gemma3's text tensors under their plain names: transformers 4 and 5 nest them differently."""
    for prefix, plain in (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
    ):
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def _check_unused(left: dict[str, st.Entry], arch: Architecture, cfg: ModelConfig, plan: list[_Load]) -> None:
    """Accepts known buffers and, with tied embeddings, an output matrix equal to the embedding."""
    heads = next(row.names for row in arch.model_rows if row.paths[0][0] == "unembed")
    extra = []
    for name, entry in left.items():
        if name in heads and cfg.tied_embeddings:
            table = next(load.entry for load in plan if load.paths[0] == ("embed", "table"))
            if entry.shape != table.shape or not np.array_equal(st.read(entry), st.read(table)):
                raise UserError(
                    f"{entry.file}: tie_word_embeddings is true but {name} differs from the embedding; "
                    "set it to false in config.json."
                )
        elif not name.endswith(BUFFERS):
            extra.append(name)
    if extra:
        raise UserError(
            f"tensor {extra[0][:200]} ({len(extra)} in all) has no place in {arch.model_type} with "
            "this config.json; kvattn would ignore it, so it is refused."
        )


# --- writing -------------------------------------------------------------------------------------------


def write(
    directory: str | os.PathLike,
    cfg: ModelConfig,
    params: dict[str, Any],
    tokenizer: Any = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes a directory that transformers loads and computes exactly; returns its `model_type`.

    K and V heads of different numbers are repeated to a common one, absent biases are written as zeros where an
    architecture wants them: both leave the function as it is. Weights keep their dtype; more than
    `shard_bytes` of them are split into shards with an index. The directory appears at once, complete, or not
    at all. Raises UserError: not expressible (naming the field), a directory that exists and is not empty,
    parameters of another config, disk full or not writable.
    """
    directory = pathlib.Path(directory)
    if cfg.scan_layers:
        params = stacking.unstack_layers(params, cfg)
        cfg = dataclasses.replace(cfg, scan_layers=False)
    arch, target = choose(cfg)
    _check_params(cfg, params)
    biases = {path: leaf for path, leaf in _layer_specs(target).items() if path[-1].endswith("_bias")}
    layers = tuple(_plain_layer(layer, flat(cfg), flat(target).n_k_heads, biases) for layer in params["layers"])
    config = write_config(arch, target) | _token_ids(tokenizer, target)
    names = {str(np.dtype(leaf.dtype)) for leaf in jax.tree.leaves(params)}
    if not names <= set(_DTYPES) or len(names) > 1:
        raise UserError(f"the parameters are {', '.join(sorted(names))}; write all as float32 or bfloat16.")
    config["torch_dtype"] = config["dtype"] = names.pop()
    tensors = list(_pending(arch, target, {**params, "layers": layers}))
    part = directory.parent / f".{directory.name}.{os.getpid()}.part"
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UserError(f"{directory} exists and is not empty; choose another directory.")
        part.mkdir(parents=True)
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (part / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        st.write(part, tensors, shard_bytes)
        if tokenizer is not None:
            tokenizer.save(part)
        os.replace(part, directory)
    except OSError as error:
        raise UserError(f"{directory} could not be written ({error.strerror}); nothing was left there.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return arch.model_type


def choose(cfg: ModelConfig) -> tuple[Architecture, ModelConfig]:
    """The architecture that computes `cfg` exactly, and the equivalent config it is written as.

    Tried in order: as it is, then with biases of zero, then with K and V repeated to all N heads; the first that
    survives writing and reading unchanged. Raises UserError naming the field that none expresses.
    """
    view = flat(cfg, "A Hugging Face export")
    _refuse(view)
    common = math.lcm(view.n_k_heads, view.n_v_heads)
    absent = [name for name in ("qkv_bias", "o_bias", "mlp_bias") if not getattr(view, name)]
    nearest: tuple[int, str, Any, Any, str] | None = None
    for heads, count in itertools.product(dict.fromkeys((common, view.n_heads)), range(len(absent) + 1)):
        for added in itertools.combinations(absent, count):
            target = canonical(
                cfg.replace(n_k_heads=heads, n_v_heads=heads, tied_kv=False, **dict.fromkeys(added, True))
            )
            want = flat(target)
            for arch in ARCHITECTURES.values():
                try:
                    _, read_back = read_config(write_config(arch, target))
                except UserError:
                    continue
                if read_back == target:
                    return arch, target
                back = flat(read_back)
                wrong = [name for name in FIELDS if getattr(back, name) != getattr(want, name)]
                if nearest is None or len(wrong) < nearest[0]:
                    field = wrong[0]
                    nearest = (len(wrong), field, getattr(want, field), getattr(back, field), arch.model_type)
    if nearest is None:
        raise UserError("No Hugging Face architecture known here can hold this model's sizes; export another model.")
    _, field, ours, theirs, kind = nearest
    raise UserError(
        f"model.{field} is {ours!r}, which no Hugging Face architecture known here expresses with the "
        f"rest of this model ({kind}, the nearest, has {theirs!r}); change it or keep a kvattn checkpoint."
    )


def _refuse(cfg: Flat) -> None:
    """The refusals that deserve their own reason."""
    shared = [layer for layer, owner in enumerate(cfg.sources) if owner != layer]
    reason = None
    if shared:
        reason = (
            f"model.kv_source makes layer {shared[0]} read layer {cfg.sources[shared[0]]}'s K and V; Hugging "
            "Face models compute K and V of every layer from its own input, so no weights give the same function"
        )
    elif cfg.kv_norm:
        reason = "model.kv_norm is True; Hugging Face models have one norm in front of Q, K and V"
    elif any(mask.sinks for mask in cfg.masks):
        reason = f"model.masks has sinks in {cfg.masks}; Hugging Face windows have none in the architectures known here"
    elif any(rope is None for rope in cfg.ropes):
        reason = "model.ropes has None (no rotation); the Hugging Face architectures known here rotate every layer"
    elif cfg.v_head_dim != cfg.head_dim:
        reason = (
            f"model.v_head_dim is {cfg.v_head_dim} and head_dim {cfg.head_dim}; Hugging Face models have one "
            "width for K and V"
        )
    elif cfg.tied_kv and cfg.qk_norm != "none":
        reason = f"model.tied_kv uses normalised keys (qk_norm {cfg.qk_norm!r}) as values, which no V projection gives"
    if reason:
        raise UserError(f"{reason}; keep a kvattn checkpoint instead.")


def _check_params(cfg: ModelConfig, params: dict[str, Any]) -> None:
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    have = {_path(path): tuple(leaf.shape) for path, leaf in flat}
    want = {path: leaf.shape for path, leaf in _flat_specs(cfg).items()}
    for path in sorted(have.keys() ^ want.keys(), key=str):
        state = "missing" if path in want else "not of this config"
        raise UserError(f"parameter {'.'.join(map(str, path))} is {state}; give the parameters of the config.")
    for path, shape in want.items():
        if have[path] != shape:
            raise UserError(f"parameter {'.'.join(map(str, path))} has shape {have[path]}; the config has {shape}.")


def _plain_layer(
    layer: dict[str, Any], cfg: Flat, kv_heads: int, biases: dict[tuple, spec.ParamSpec]
) -> dict[str, Any]:
    """One layer's parameters as they are written: V written out, K and V repeated to `kv_heads`, absent `biases`
    zero."""
    attn, mlp = dict(layer["attn"]), dict(layer["mlp"])
    if cfg.tied_kv:
        attn |= {"v": attn["k"]} | ({"v_bias": attn["k_bias"]} if cfg.qkv_bias else {})
    for name, heads in (("k", cfg.n_k_heads), ("v", cfg.n_v_heads)):
        times = kv_heads // heads
        if times > 1:
            attn[name] = jnp.repeat(attn[name], times, axis=1)
            if cfg.qkv_bias:
                attn[f"{name}_bias"] = jnp.repeat(attn[f"{name}_bias"], times, axis=0)
            if name == "k" and cfg.qk_norm == "full":
                attn["k_norm"] = {"scale": jnp.repeat(attn["k_norm"]["scale"], times, axis=0)}
    out = {**layer, "attn": attn, "mlp": mlp}
    for path, leaf in biases.items():
        group = functools.reduce(dict.__getitem__, path[:-1], out)
        if path[-1] not in group:
            group[path[-1]] = jnp.zeros(leaf.shape, attn["q"].dtype)
    return out


def _layer_specs(cfg: ModelConfig) -> dict[tuple, spec.ParamSpec]:
    flat, _ = jax.tree_util.tree_flatten_with_path(model.layer_specs(cfg, 0), is_leaf=spec.is_spec)
    return {_path(path): leaf for path, leaf in flat}


def _pending(arch: Architecture, cfg: ModelConfig, params: dict[str, Any]) -> Iterator[st.Pending]:
    """The tensors to write, each fetched and laid out when its turn comes."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    leaves = {_path(path): leaf for path, leaf in flat}
    for names, paths, transform in tensor_rows(arch, cfg.n_layers):
        if paths[0] not in leaves:
            continue
        parts = tuple(leaves[path] for path in paths)
        shape = TRANSFORMS[transform].shape(tuple(part.shape for part in parts))
        make = functools.partial(_make, transform, parts)
        yield st.Pending(names[0], shape, np.dtype(parts[0].dtype), make)


def _make(transform: str, parts: tuple[jax.Array, ...]) -> np.ndarray:
    return TRANSFORMS[transform].pack(tuple(np.asarray(jax.device_get(part)) for part in parts))


def _token_ids(tokenizer: Any, cfg: ModelConfig) -> dict[str, Any]:
    """bos, eos and pad of config.json: the tokenizer's, or null so that no default of transformers applies."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    tokenizer_lib.check_matches(tokenizer, cfg)
    eos = list(tokenizer.eos_ids)
    eos_value = eos[0] if len(eos) == 1 else eos or None
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos_value, "pad_token_id": None}
