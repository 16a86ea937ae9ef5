"""Facts: what each layer of a model sees in calibration text, as streamed statistics, never as whole activations.

    facts = gather(params, cfg, batches, ("inputs", "keys"))
    facts.moment(3, "keys")                    # [K,H,H] float64: the mean over tokens of k k^T, head by head
    facts.save(folder / "facts.npz")

| name | second moment, uncentred | of |
|---|---|---|
| inputs | [D,D] | what the attention reads |
| kv_inputs | [D,D] | what K and V are made from: `inputs`, but for a model with kv_norm; owners |
| queries | [N,H,H] | each query head; families with one softmax |
| keys | [K,H,H] | each key head; owners |
| values | [M,V,V] | each value head; owners |

Queries and keys are taken before rotation, after q/k norms: a family is handed no rotation tables (`Where`), and one
that rotates by these, as all here do, leaves its heads unrotated; a family that rotates in another way gives them
rotated. A family that leaves several keys or values gives each a name of its own, `keys/LEAF`. A layer without
attention has no facts, one that reads a memory none of its keys and values.

Sums of one batch are float32 products at the highest precision, added up in float64 on the host.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from kvattn import cache, model
from kvattn.attention import Softmax
from kvattn.attention.segments import Where
from kvattn.config import EXECUTION, ModelConfig, plain
from kvattn.errors import UserError
from kvattn.model import Inputs

NAMES = ("inputs", "kv_inputs", "queries", "keys", "values")
_ROLES = {"keys": ("key", "both"), "values": ("value", "both")}


@dataclasses.dataclass(frozen=True)
class Facts:
    """`moments[layer]`: name -> second moment over `tokens` tokens, float64. `sources`: name -> hash or value of every
    input that they depend on."""

    tokens: int
    moments: tuple[Mapping[str, np.ndarray], ...]
    sources: Mapping[str, str]

    def moment(self, layer: int, name: str) -> np.ndarray:
        """Raises UserError where the layer has no such fact."""
        if name not in self.moments[layer]:
            have = ", ".join(self.moments[layer]) or "none"
            raise UserError(f"layer {layer} has no fact {name!r} (it has {have}); gather it, or convert another model.")
        return self.moments[layer][name]

    def save(self, path: str | os.PathLike) -> None:
        """One .npz file, whole or not at all. Raises UserError where it cannot be written."""
        arrays = {f"{layer}/{name}": x for layer, moments in enumerate(self.moments) for name, x in moments.items()}
        about = {"tokens": self.tokens, "layers": len(self.moments), "sources": dict(self.sources)}
        whole, path = io.BytesIO(), epath.Path(path)
        np.savez(whole, about=np.asarray(json.dumps(about)), **arrays)
        partial = path.with_name(f"{path.name}.partial")
        try:
            partial.write_bytes(whole.getbuffer())
            partial.replace(path)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror or error}); choose another folder.") from error


def load(path: str | os.PathLike) -> Facts:
    """What `Facts.save` wrote. Raises UserError: missing, or no such file."""
    try:
        with np.load(io.BytesIO(epath.Path(path).read_bytes()), allow_pickle=False) as file:
            about = json.loads(str(file["about"]))
            moments: tuple[dict[str, np.ndarray], ...] = tuple({} for _ in range(about["layers"]))
            for key in file.files:
                if key != "about":
                    layer, _, name = key.partition("/")
                    moments[int(layer)][name] = file[key]
        return Facts(about["tokens"], moments, about["sources"])
    except (OSError, ValueError, KeyError, EOFError, IndexError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds no facts ({type(error).__name__}); gather them again.") from error


def check_fit(facts: Facts, cfg: ModelConfig, wants: Sequence[str]) -> None:
    """Raises UserError for facts of another model, or without one of `wants`."""
    if facts.sources.get("model") != _hash_model(cfg):
        raise UserError("the facts are of another model than the one to convert; gather them again.")
    for name in wants:
        if not any(_is(name, key) for moments in facts.moments for key in moments):
            raise UserError(f"the facts have no {name!r}; gather them with wants={tuple(wants)!r}.")


def gather(
    params: Any,
    cfg: ModelConfig,
    batches: Iterable[Inputs | np.ndarray | jax.Array],
    wants: Sequence[str],
    *,
    sources: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Facts:
    """Second moments of `wants` over the tokens of `batches`, each Inputs or tokens[B,T]; positions -1 are padding and
    left out. `sources`: what is to be noted beside the hashes of model, params and tokens (a path, a seed);
    `progress(tokens)` is told how many tokens are done after each batch. One program a batch shape.

    Raises UserError: an unknown name, scanned layers, no token at all.
    """
    for name in wants:
        if name not in NAMES:
            raise UserError(f"facts have no {name!r}; choose from {', '.join(NAMES)}.")
    tokens, text, totals = 0, hashlib.sha256(), None
    for batch in batches:
        batch = batch if isinstance(batch, Inputs) else Inputs(jnp.asarray(batch, jnp.int32))
        for array in (batch.tokens, batch.positions, batch.segment_ids):
            text.update(repr(None if array is None else array.shape).encode())
            text.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
        count, sums = jax.device_get(_moments(params, cfg, batch, tuple(wants)))
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
        tokens += int(count)
        if progress is not None:
            progress(tokens)
    if not tokens:
        raise UserError("the calibration batches hold no token; give text, with positions of -1 for padding alone.")
    moments = jax.tree.map(lambda x: x / tokens, totals)
    noted = {"model": _hash_model(cfg), "params": _hash_params(params), "tokens": text.hexdigest()}
    return Facts(tokens, tuple(moments), {**(sources or {}), **noted})


def _is(name: str, key: str) -> bool:
    return key == name or key.startswith(f"{name}/")


def _hash_model(cfg: ModelConfig) -> str:
    fields = {name: value for name, value in plain(cfg).items() if name not in EXECUTION and name != "layers"}
    layers = [plain(layer) for layer in cfg.every]
    return hashlib.sha256(json.dumps([fields, layers], sort_keys=True).encode()).hexdigest()


def _hash_params(params: Any) -> str:
    """Of every leaf with its path, dtype and shape; a gigabyte takes a second."""
    out = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        host = np.asarray(leaf)
        out.update(f"{jax.tree_util.keystr(path)} {host.dtype} {host.shape}".encode())
        out.update(np.ascontiguousarray(host).reshape(-1).view(np.uint8).data)
    return out.hexdigest()


class _Unrotated(dict):
    """Rotation tables of no rotation, whatever is asked for."""

    def __missing__(self, key: Any) -> None:
        return None


@functools.partial(jax.jit, static_argnums=(1, 3))
def _moments(params: Any, cfg: ModelConfig, batch: Inputs, wants: tuple[str, ...]) -> tuple[jax.Array, tuple]:
    """(how many real tokens, a layer {name: sum over them of x x^T}) of one batch."""
    if batch.positions is None:
        at = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None], batch.tokens.shape)
        batch = batch.replace(positions=at)
    collected = model.hidden(params, cfg, batch, collect=("inputs", "kv_inputs"))[2]
    where = model.where_of(cfg, batch.positions, batch.segment_ids, True)
    where = dataclasses.replace(where, q_tables=_Unrotated(), k_tables=_Unrotated())
    real = batch.positions >= 0
    sums = tuple(
        {
            name: _second_moment(x, real)
            for name, x in _seen(params["layers"][layer].get("attn", {}), cfg, layer, h, h_kv, where, wants).items()
        }
        for layer, (h, h_kv) in enumerate(zip(collected["inputs"], collected["kv_inputs"], strict=True))
    )
    return real.sum(), sums


def _seen(
    params: Any, cfg: ModelConfig, layer: int, h: jax.Array, h_kv: jax.Array, where: Where, wants: tuple[str, ...]
) -> dict[str, jax.Array]:
    """name -> [B,heads,T,dim] (or [B,T,D]) of what `wants` names and this layer has."""
    family, out = cfg.attention(layer), {}
    if not params:
        return out
    owner = cfg.sources[layer] == layer and cfg.layer(layer).reads == "self"
    if "inputs" in wants:
        out["inputs"] = h
    if "kv_inputs" in wants and owner:
        out["kv_inputs"] = h_kv
    if "queries" in wants and isinstance(family, Softmax):
        out["queries"] = family.queries(params, cfg, layer, h, where).swapaxes(1, 2)
    if owner and any(name in wants for name in _ROLES):
        leaves = family.leaves(cfg)
        states = {
            name: jnp.zeros((h.shape[0], *leaf.shape), leaf.dtype or jnp.float32)
            for name, leaf in cache.states(leaves).items()
        }
        entries = family.entries(params, cfg, layer, h_kv, where, states).entries
        for fact, roles in _ROLES.items():
            mine = [name for name in entries if fact in wants and leaves[name].role in roles]
            out |= {fact if len(mine) == 1 else f"{fact}/{name}": entries[name] for name in mine}
    return out


def _second_moment(x: jax.Array, real: jax.Array) -> jax.Array:
    """x[B,heads,T,dim] -> [heads,dim,dim], x[B,T,D] -> [D,D]: the sum of x x^T over the tokens of real[B,T]."""
    x = jnp.where(real[:, None, :, None] if x.ndim == 4 else real[:, :, None], x.astype(jnp.float32), 0)
    product = "bnti,bntj->nij" if x.ndim == 4 else "bti,btj->ij"
    return jnp.einsum(product, x, x, precision=jax.lax.Precision.HIGHEST)
