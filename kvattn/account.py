"""The ledger: parameters, FLOPs and KV bytes of a model before a single array exists.

    >>> llama3_8b = ModelConfig(n_layers=32, n_heads=32, n_k_heads=8, n_v_heads=8, head_dim=128, ...)
    >>> kv_bytes_per_token(llama3_8b, CacheConfig(dtype="bfloat16"))
    131072

Everything derives from two tables: `model.param_specs` (a parameter with a fan_in is a matmul weight) and
`model.leaves` (what a token and a sequence leave in an owner's cache) with the store's slots. The same numbers are
what `cache.create` allocates and what XLA compiles: tests compare all three. FLOPs count matmuls, multiply
and add apart (2 per weight and token); norms, softmax and rotary are left out, as in every published MFU.
"""

import dataclasses
import math
from typing import Any

import jax
from rich.table import Table

from kvattn import cache as caches
from kvattn import model, spec
from kvattn.cache import encode
from kvattn.config import CacheConfig, MaskConfig, ModelConfig
from kvattn.errors import UserError
from sharding.cost.hardware import CHIPS, Chip

PHASES = ("prefill", "decode", "train")


# --- parameters ----------------------------------------------------------------------------------------


def param_count(cfg: ModelConfig) -> int:
    """Scalar parameters of the model."""
    return spec.count(model.param_specs(cfg))


# --- KV bytes ------------------------------------------------------------------------------------------


def kv_bytes_per_token_per_layer(cfg: ModelConfig, cache: CacheConfig) -> tuple[int | float, ...]:
    """Bytes that one token of one sequence writes in each layer: sum over leaves of heads x (dim x bits / 8, and 4 of a
    scale where it has one of its own); 0 for layers that read another's cache, or a memory. What belongs to a sequence
    (states, keys' channel scales) is in `sequence_bytes_per_layer`."""
    out: list[int | float] = []
    for layer, leaves in enumerate(model.leaves(cfg)):
        own = caches.token_leaves(leaves or {}).values() if cfg.layer(layer).reads == "self" else ()
        bits = sum(encode.token_bits(cache, leaf) for leaf in own)
        out.append(bits / 8 if bits % 8 else bits // 8)
    return tuple(out)


def sequence_bytes_per_layer(cfg: ModelConfig, cache: CacheConfig) -> tuple[int, ...]:
    """Bytes that each layer keeps once per sequence, whatever its length: states, keys' channel scales."""
    return tuple(
        sum(encode.sequence_bits(cache, leaf) for leaf in (leaves or {}).values()) // 8 for leaves in model.leaves(cfg)
    )


def kv_bytes_per_token(cfg: ModelConfig, cache: CacheConfig, context: int = 0) -> int | float:
    """Bytes that one token writes, over all layers: 2 L_kv K H b for a plain model.

    With `context` > 0: bytes held at that many tokens, divided by them, which is less where a ring has
    turned. Raises UserError for a negative context.
    """
    if context < 0:
        raise UserError(f"context is {context}; it must be a number of tokens, or 0 for the bytes one token writes.")
    if context:
        return cache_bytes(cfg, cache, 1, context) / context
    return sum(kv_bytes_per_token_per_layer(cfg, cache))


def cache_bytes(cfg: ModelConfig, cache: CacheConfig, batch: int, capacity: int) -> int:
    """Bytes of K and V allocated for `batch` sequences of up to `capacity` tokens: a full store has `capacity`
    slots, a ring min(capacity, window + sinks), both rounded up to `cache.multiple`; a paged store has its pool, page 0
    included. Scales count; the int32 `length` per row and owner and page tables (4 bytes a page and row) do not.

    Raises UserError: batch or capacity below 1, a store that does not fit the masks.
    """
    _positive(batch=batch, capacity=capacity)
    caches.check_store(cfg, cache)  # raises where the store does not fit the model
    once = sequence_bytes_per_layer(cfg, cache)
    return sum(
        math.ceil(bits * slots / 8) for owner in cfg.owners for bits, slots in _held(cfg, cache, owner, batch, capacity)
    ) + batch * sum(once)


def _held(cfg: ModelConfig, cache: CacheConfig, owner: int, batch: int, capacity: int) -> list[tuple[int, int]]:
    """(bits of a token, slots) of each leaf of an owner's cache, by head group where it has some."""
    leaves, value = caches.token_leaves(cfg.attention(owner).leaves(cfg)).values(), cfg.layer(owner)
    bits = [encode.token_bits(cache, leaf) for leaf in leaves]
    if value.reads == "memory":
        return [(b, batch * cache.memory) for b in bits]
    if value.groups:
        heads = sum(group.heads for group in value.groups)
        slots = [
            group.heads * batch * caches.slots_for(cache, owner, [group.mask], capacity)[0] for group in value.groups
        ]
        return [(b // heads, s) for b in bits for s in slots]
    slots = batch * caches.layout(cfg, cache, owner, capacity)[0]
    if caches.is_paged(cache, owner):
        slots = (1 + caches.pool_pages(cache, batch, capacity)) * cache.page_size
    if cache.kept_pages and caches.kind_of(cache, owner) == "kept":
        return [(b // leaf.shape[0], cache.page_size + slots * leaf.shape[0]) for b, leaf in zip(bits, leaves)]
    return [(b, slots) for b in bits]


def max_context(cfg: ModelConfig, cache: CacheConfig, memory_bytes: int, batch: int = 1) -> int | None:
    """Tokens per sequence whose K and V fit in `memory_bytes`; None when every layer is a ring that fits, so
    that the length is unlimited. 0 when not even one token fits. A pool of a fixed number of pages is shared evenly.
    Raises UserError for a batch below 1."""
    _positive(batch=batch)
    longest = 1 << 40
    if cache.pages:
        shared = cache.pages // batch * cache.page_size
        if shared == 0 or cache_bytes(cfg, cache, batch, shared) <= memory_bytes:
            return shared
        longest = shared
    if cache_bytes(cfg, cache, batch, longest) <= memory_bytes:
        return None
    low, high = 0, longest  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cache_bytes(cfg, cache, batch, middle) <= memory_bytes else (low, middle)
    return low


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")


# --- FLOPs ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Flops:
    """Matmul FLOPs per token: projections (q, k, v, o), attention (scores and weighted sum), mlp, unembed."""

    projections: float
    attention: float
    mlp: float
    unembed: float

    @property
    def total(self) -> float:
        return self.projections + self.attention + self.mlp + self.unembed


def flops(cfg: ModelConfig, context: int, phase: str, *, visible: bool = False) -> Flops:
    """FLOPs per token, by part.

    decode   one token that sees `context` tokens, itself included
    prefill  mean over a prompt of `context` tokens, logits for its last token only
    train    forward and backward (three times the forward) of sequences of `context` tokens

    Attention costs 2 N (H + V) per key seen. In prefill and train every query is charged for all `context`
    keys, the square that MFU figures count (4 N T H per token and layer, arXiv 2510.01817) or, in a windowed
    layer, for its full window + sinks; `visible=True` charges only the pairs that the causal mask leaves.
    Recomputation (remat) is not counted. Raises UserError: unknown phase, context below 1.
    """
    if phase not in PHASES:
        raise UserError(f"phase is {phase!r}; choose one of {', '.join(PHASES)}.")
    _positive(context=context)
    specs = model.param_specs(cfg)
    times = 3 if phase == "train" else 1
    logits = 1 / context if phase == "prefill" else 1
    attention = sum(
        cfg.attention(layer).flops(cfg, _keys_seen(cfg.mask(layer), context, phase, visible))
        for layer in range(cfg.n_layers)
    )
    return Flops(
        projections=times * _matmul_flops([layer.get("attn", {}) for layer in specs["layers"]]),
        attention=times * attention,
        mlp=times * _matmul_flops([layer["mlp"] for layer in specs["layers"]]),
        unembed=times * 2 * cfg.vocab_size * cfg.d_model * logits,
    )


def flops_per_token(cfg: ModelConfig, context: int, phase: str, *, visible: bool = False) -> float:
    """The total of `flops`."""
    return flops(cfg, context, phase, visible=visible).total


def _matmul_flops(specs: Any) -> int:
    leaves = jax.tree.leaves(specs, is_leaf=spec.is_spec)
    return 2 * sum(leaf.size for leaf in leaves if leaf.fan_in)


def _keys_seen(mask: MaskConfig, context: int, phase: str, visible: bool) -> float:
    """Keys per query: for the last of `context` tokens, or (prefill/train with `visible`) the mean over all."""
    width = min(mask.window + mask.sinks, context) if mask.window else context
    if phase == "decode" or not visible:
        return width
    ramp = width * (width + 1) // 2  # queries 0 .. width-1 see 1 .. width keys
    return (ramp + (context - width) * width) / context


# --- roofline ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bound of one decode step on one chip: the larger of compute and memory time, in seconds."""

    seconds: float
    compute_seconds: float
    memory_seconds: float
    weight_bytes: float
    kv_bytes: float
    flops: float


def roofline_decode(
    cfg: ModelConfig, cache: CacheConfig, batch: int, context: int, chip: str | Chip, weight_bytes_per_param: float = 2
) -> Roofline:
    """Roofline of one decode step: `batch` sequences, each seeing `context` tokens (arXiv 2211.05102, sec. 2).

    Memory traffic = every weight once (of an untied embedding table only the batch's rows) + for each layer
    the K and V it sees. A layer that reads another's cache reads it again, so cross-layer sharing saves
    capacity, not traffic (arXiv 2405.12981, section 2.3). `chip` is a row of sharding.cost.hardware.CHIPS or its
    name; whether the cache fits its memory is not asked here.

    Raises UserError: unknown chip, batch or context below 1.
    """
    _positive(batch=batch, context=context)
    if isinstance(chip, str) and chip not in CHIPS:
        raise UserError(f"chip is {chip!r}; choose one of {', '.join(CHIPS)}, or pass a Chip.")
    row = CHIPS[chip] if isinstance(chip, str) else chip
    weights = param_count(cfg)
    if not cfg.tied_embeddings:
        weights -= (cfg.vocab_size - min(batch, cfg.vocab_size)) * cfg.d_model
    per_layer = kv_bytes_per_token_per_layer(cfg, cache)
    kv = batch * sum(
        per_layer[cfg.sources[layer]] * _keys_seen(cfg.mask(layer), context, "decode", False)
        for layer in range(cfg.n_layers)
    )
    work = batch * flops_per_token(cfg, context, "decode")
    compute = work / row.peak_flops
    memory = (weights * weight_bytes_per_param + kv) / row.hbm_bandwidth
    return Roofline(max(compute, memory), compute, memory, weights * weight_bytes_per_param, kv, work)


def roofline_decode_seconds(
    cfg: ModelConfig, cache: CacheConfig, batch: int, context: int, chip: str | Chip, weight_bytes_per_param: float = 2
) -> float:
    """Seconds of one decode step by `roofline_decode`."""
    return roofline_decode(cfg, cache, batch, context, chip, weight_bytes_per_param).seconds


# --- the table -----------------------------------------------------------------------------------------


def ledger_table(cfg: ModelConfig, cache: CacheConfig, context: int = 0) -> Table:
    """A rich table: one row per run of layers that are alike, and totals. `context` (0 = cfg.max_length) is
    the length at which the bytes held and the FLOPs are given."""
    context = context or cfg.max_length
    cfg = dataclasses.replace(cfg, scan_layers=False)  # a scanned model decodes unscanned: the same ledger
    table = Table(title=f"KV ledger, {cache.dtype}, {context} tokens", title_justify="left")
    for name in ("layers", "K, V from", "attention", "sees", "store"):
        table.add_column(name)
    for name in ("parameters", "bytes/token", f"bytes at {context}"):
        table.add_column(name, justify="right")
    rows = [_ledger_row(cfg, cache, layer, context) for layer in range(cfg.n_layers)]
    start = 0
    for layer in range(1, cfg.n_layers + 1):
        if layer == cfg.n_layers or rows[layer] != rows[start]:
            span = str(start) if layer == start + 1 else f"{start}-{layer - 1}"
            table.add_row(span, *rows[start])
            start = layer
    per_token = kv_bytes_per_token(cfg, cache)
    held = cache_bytes(cfg, cache, 1, context)
    table.add_section()
    owners = f"{len(cfg.owners)} owners of {cfg.n_layers}"
    table.add_row("all", owners, "", "", "", f"{param_count(cfg):,}", f"{per_token:,}", f"{held:,}")
    work = ", ".join(f"{phase} {flops_per_token(cfg, context, phase):.3g}" for phase in PHASES)
    table.caption = f"FLOPs per token: {work}; `parameters` of the last row includes the embedding."
    return table


def _ledger_row(cfg: ModelConfig, cache: CacheConfig, layer: int, context: int) -> tuple[str, ...]:
    owner, mask = cfg.sources[layer], cfg.mask(layer)
    per_token = kv_bytes_per_token_per_layer(cfg, cache)[layer]
    own = layer in cfg.owners
    store, held = "-", 0
    if own:
        ring = caches.layout(cfg, cache, owner, context)[1]
        kind = caches.kind_of(cache, owner)
        store = "groups" if cfg.layer(owner).groups else "ring" if ring else "full" if kind == "by_mask" else kind
        held = sum(math.ceil(bits * slots / 8) for bits, slots in _held(cfg, cache, owner, 1, context))
        held += sequence_bytes_per_layer(cfg, cache)[layer]
    return (
        "own" if owner == layer else f"layer {owner}",
        cfg.attention(layer).describe(),
        f"last {mask.window} + first {mask.sinks}" if mask.window else "all",
        store,
        f"{spec.count(model.layer_specs(cfg, layer)):,}",
        f"{per_token:,}",
        f"{held:,}",
    )
