"""The decoder as a value: a pattern of layers, each an attention family with its own fields, a mask and a rotation.

    Layer(Heads(n_heads=32, n_k_heads=8, ...), MaskConfig(window=4096), RopeConfig(theta=5e5))
    ModelConfig(n_layers=32, layers=(local, local, full))      # layer l is layers[l % 3]

`Attention` is the root of all families: a family is a frozen dataclass and its functions in one file of
kvattn/attention/, found by its name. Nothing about heads or latents stands in `ModelConfig`.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from kvattn.config.check import at_least, choice, need
from kvattn.config.tagged import Tagged
from kvattn.errors import UserError

ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one layer, half-split ("NeoX") pairing: dim i pairs with i + R/2.

    `dim` is R, the number of leading head dims that rotate (0 = all H). Frequencies are
    `theta ** (-2 i / R)`, then scaled: `linear` divides by `factor`; `llama3` and `yarn` interpolate per
    frequency from `original_length` tokens; yarn also multiplies cos and sin by `attention_factor`
    (0 = the paper's 0.1 ln(factor) + 1).
    """

    theta: float = 10000.0
    dim: int = 0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True
    original_length: int = 0

    def check(self, where: str = "rope") -> None:
        """Raises UserError for a field out of its range."""
        need(self.dim % 2 == 0 and self.dim >= 0, f"{where}.dim is {self.dim}; it must be even, or 0 for all.")
        need(self.theta > 0, f"{where}.theta is {self.theta}; it must be positive.")
        choice(self.scaling, ROPE_SCALINGS, f"{where}.scaling")
        need(self.factor > 0, f"{where}.factor is {self.factor}; it must be positive.")
        need(
            self.scaling in ("none", "linear") or self.original_length > 0,
            f"{where}.original_length is {self.original_length}; {self.scaling} scaling needs the original context "
            "length.",
        )


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """Axis C for one layer. `kind` causal: a query at position p sees key position s <= p with p - s < window
    (0 = unlimited), or s < sinks (attention-sink tokens, arXiv 2309.17453); full: every token sees every other."""

    window: int = 0
    sinks: int = 0
    kind: str = "causal"

    def check(self, where: str = "mask") -> None:
        """Raises UserError: a negative size, sinks or a full view beside what contradicts them."""
        choice(self.kind, ("causal", "full"), f"{where}.kind")
        need(self.window >= 0, f"{where}.window is {self.window}; use 0 for unlimited or a positive size.")
        need(self.sinks >= 0, f"{where}.sinks is {self.sinks}; it must not be negative.")
        need(
            not self.sinks or self.window > 0,
            f"{where}.sinks is {self.sinks} without a window; every token is visible already, set a window.",
        )
        need(
            self.kind == "causal" or not self.window,
            f"{where}.window is {self.window} with kind {self.kind!r}; a window needs kind causal.",
        )


@dataclasses.dataclass(frozen=True)
class HeadGroup:
    """Consecutive K/V heads of a layer that see alike: `heads` of them, with a mask of their own. An owner whose layer
    has groups holds one cache a group, concatenated over heads."""

    heads: int = 1
    mask: MaskConfig = MaskConfig()


class Attention(Tagged, root="name"):
    """Root of every attention family's config; kvattn.attention.family.Family says what a family must provide."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a layer's attention is, sees and rotates by (None: no rotation). `groups`: head groups with masks of their
    own, in the order of the K/V heads; () = one mask for all. `reads`: self, or memory, what an encoder left for this
    decoder (Inputs.memory): its K and V are written once and only read after that."""

    attention: Attention
    mask: MaskConfig = MaskConfig()
    rope: RopeConfig | None = RopeConfig()
    groups: tuple[HeadGroup, ...] = ()
    reads: str = "self"  # self | memory

    def check(self, where: str) -> None:
        """Raises UserError: an illegal mask or rotation, a memory that is not seen whole."""
        self.mask.check(f"{where}.mask")
        if self.rope is not None:
            self.rope.check(f"{where}.rope")
        for j, group in enumerate(self.groups):
            at_least(group, f"{where}.groups[{j}]", heads=1)
            group.mask.check(f"{where}.groups[{j}].mask")
        choice(self.reads, ("self", "memory"), f"{where}.reads")
        need(
            self.reads == "self" or (self.mask.kind == "full" and not self.groups),
            f"{where}.reads is 'memory' with mask {self.mask.kind!r}; a memory has no order beside the text, set "
            "mask.kind "
            "to full and no groups.",
        )


# How a model is computed, not what it is: config.model sets these for any checkpoint; export and resume ignore them.
EXECUTION = ("kernel", "decode_kernel", "scan_layers", "remat")

_CHOICES = {
    "norm": ("rmsnorm", "layernorm"),
    "norm_placement": ("pre", "post", "both"),
    "residual": ("serial", "parallel_palm", "parallel_neox", "ladder"),
    "mlp": ("swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh"),
    "remat": ("none", "dots", "full"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder. `layers` is a pattern: layer l is layers[l % len(layers)]; () means the checkpoint's."""

    # sizes
    vocab_size: int = 256  # W
    d_model: int = 64  # D
    n_layers: int = 2  # L
    d_ff: int = 256  # F
    max_length: int = 2048  # longest context the checkpoint was trained for; informative
    # axes A, C: what each layer is and sees; axis B: sharing
    layers: tuple[Layer, ...] = ()
    kv_source: tuple[int, ...] = ()  # owner of layer l's K, V; () = every layer its own
    kv_norm: bool = False  # CLA's separate norm in front of the owner's K/V projection
    # block
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # Gemma: scale is (1 + w)
    norm_placement: str = "pre"  # pre | post (OLMo 2) | both (Gemma 2/3)
    residual: str = "serial"  # serial | parallel_palm (one norm) | parallel_neox (two norms) | ladder
    mlp: str = "swiglu"  # swiglu | geglu | geglu_tanh | gelu | gelu_tanh
    mlp_bias: bool = False
    # ends
    tied_embeddings: bool = True
    embed_scale: float = 1.0  # Gemma: sqrt(D)
    logit_soft_cap: float = 0.0
    # execution
    kernel: str = "xla"  # axis E, a pass's own tokens (training, first prefill): xla | cudnn | splash | tokamax
    decode_kernel: str = "xla"  # axis E, up to 16 tokens over a cache: xla | mosaic_tpu | mosaic_gpu
    scan_layers: bool = False
    remat: str = "none"  # none | dots | full

    @property
    def sources(self) -> tuple[int, ...]:
        """kv_source with the default written out: sources[l] is the owner of layer l."""
        return self.kv_source or tuple(range(self.n_layers))

    @property
    def owners(self) -> tuple[int, ...]:
        """Layers that leave something in a cache of their own, in order."""
        return tuple(l for l, owner in enumerate(self.sources) if l == owner and self.attention(l).leaves(self))

    def readers(self, owner: int) -> tuple[int, ...]:
        """Layers that attend to what `owner` left, itself included."""
        return tuple(layer for layer, o in enumerate(self.sources) if o == owner)

    def layer(self, layer: int) -> Layer:
        """The value of layer `layer`. Raises UserError for a model without layers."""
        if not self.layers:
            raise UserError("model.layers is (); name the layers, or a checkpoint that has them (checkpoint.path).")
        return self.layers[layer % len(self.layers)]

    def attention(self, layer: int) -> Any:
        """The family of a layer (kvattn.attention.family.Family)."""
        return self.layer(layer).attention

    def mask(self, layer: int) -> MaskConfig:
        return self.layer(layer).mask

    def rope(self, layer: int) -> RopeConfig | None:
        return self.layer(layer).rope

    @property
    def every(self) -> tuple[Layer, ...]:
        """Each layer's value, in order."""
        return tuple(self.layer(layer) for layer in range(self.n_layers))

    def replace(self, **changes: Any) -> "ModelConfig":
        """The config with fields changed: the model's own; `masks`, `ropes`, `attentions`, patterns over layers; and,
        in all layers whose family has it, any field of a family. Raises TypeError for a name that none has."""
        own = {f.name for f in dataclasses.fields(self)}
        made = dataclasses.replace(self, **{name: value for name, value in changes.items() if name in own})
        rest = {name: value for name, value in changes.items() if name not in own}
        patterns = {name: tuple(rest.pop(name)) for name in ("attentions", "masks", "ropes") if name in rest}
        if not patterns and not rest:
            return made
        layers = made.every
        if patterns:
            layers = tuple(
                Layer(
                    _entry(patterns.get("attentions"), i, layer.attention),
                    _entry(patterns.get("masks"), i, layer.mask),
                    _entry(patterns.get("ropes"), i, layer.rope),
                    () if "masks" in patterns else layer.groups,
                    layer.reads,
                )
                for i, layer in enumerate(layers)
            )
        for name, value in rest.items():
            if not any(hasattr(layer.attention, name) for layer in layers):
                raise TypeError(f"{name} is no field of ModelConfig, nor of the attention of any layer.")
            layers = tuple(
                dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, **{name: value}))
                if _has_field(layer.attention, name)
                else layer
                for layer in layers
            )
        return dataclasses.replace(made, layers=shortest(layers))

    def check(self) -> None:
        """Raises UserError for the first illegal field. A model without layers is a checkpoint's: only what is set of
        how it is computed is looked at."""
        for name, valid in _CHOICES.items():
            choice(getattr(self, name), valid, f"model.{name}")
        if not self.layers:
            return
        at_least(self, "model", vocab_size=1, d_model=1, n_layers=1, d_ff=1)
        need(
            self.residual in ("serial", "ladder") or self.norm_placement == "pre",
            f"model.norm_placement is {self.norm_placement!r} with residual {self.residual!r}; parallel blocks take "
            "pre.",
        )
        need(
            not self.norm_offset or self.norm == "rmsnorm",
            f"model.norm_offset is {self.norm_offset} with norm {self.norm!r}; it applies to rmsnorm only.",
        )
        for name in ("logit_soft_cap", "embed_scale", "norm_eps"):
            need(getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}; it must not be negative.")
        need(
            len(self.layers) <= self.n_layers,
            f"model.layers has {len(self.layers)} entries; a pattern has at most n_layers = {self.n_layers}.",
        )
        for i, layer in enumerate(self.layers):
            layer.check(f"model.layers[{i}]")
            layer.attention.check(self, layer, f"model.layers[{i}]")
        self._check_sharing()
        if self.scan_layers:
            period(self)

    def _check_sharing(self) -> None:
        if not self.kv_source:
            return
        need(
            len(self.kv_source) == self.n_layers,
            f"model.kv_source has {len(self.kv_source)} entries; it needs one per layer, {self.n_layers}.",
        )
        for layer, owner in enumerate(self.kv_source):
            need(0 <= owner <= layer, f"model.kv_source[{layer}] is {owner}; a layer reads itself or an earlier layer.")
            need(
                self.kv_source[owner] == owner,
                f"model.kv_source[{layer}] is {owner}, which owns nothing (it reads {self.kv_source[owner]}); "
                f"point it at {self.kv_source[owner]}.",
            )
            if owner == layer:
                continue
            reason = self.attention(layer).cannot_read(self, self.attention(owner))
            need(reason is None, f"model.kv_source[{layer}] is {owner}, but {reason}.")
            need(
                self.rope(layer) == self.rope(owner),
                f"model.kv_source[{layer}] is {owner} but their ropes differ; shared keys are rotated once, so give "
                "both layers one rope.",
            )
            need(
                self.layer(layer).reads == self.layer(owner).reads,
                f"model.kv_source[{layer}] is {owner}, and one of them reads a memory; both read self, or both the "
                "memory.",
            )
            need(
                self.layer(layer).groups == self.layer(owner).groups == (),
                f"model.kv_source[{layer}] is {owner}, and one of them has head groups; a layer with groups shares "
                "nothing.",
            )


def _entry(pattern: tuple | None, index: int, old: Any) -> Any:
    return old if pattern is None else pattern[index % len(pattern)]


def _has_field(attention: Any, name: str) -> bool:
    return name in {f.name for f in dataclasses.fields(attention)}


def shortest(pattern: Iterable[Any]) -> tuple[Any, ...]:
    """The shortest prefix that, repeated, gives `pattern` (entry i is prefix[i % len])."""
    pattern = tuple(pattern)
    for size in range(1, len(pattern)):
        if all(x == pattern[i % size] for i, x in enumerate(pattern)):
            return pattern[:size]
    return pattern


def layer_pattern(
    attention: Attention,
    masks: Iterable[MaskConfig] = (),
    ropes: Iterable[RopeConfig | None] = (RopeConfig(),),
    *,
    n_layers: int = 0,
) -> tuple[Layer, ...]:
    """Layers of one family with a pattern of masks and one of rotations, each repeating by itself; not more of them
    than `n_layers` (0 = until both patterns end together)."""
    masks, ropes = tuple(masks) or (MaskConfig(),), tuple(ropes)
    count = math.lcm(len(masks), len(ropes))
    if n_layers:
        count = min(count, max(n_layers, len(masks), len(ropes)))
    return shortest(Layer(attention, masks[i % len(masks)], ropes[i % len(ropes)]) for i in range(count))


def period(cfg: ModelConfig) -> int:
    """Layers per step of a scan over layers: layer values and sharing groups must repeat with it, at least twice.

    Raises UserError when no period works (for example sharing across the whole depth).
    """
    base, sources = len(shortest(cfg.layers)), cfg.sources
    for size in range(base, cfg.n_layers // 2 + 1, base):
        repeats = all(sources[i] - (i - i % size) == sources[i % size] for i in range(cfg.n_layers))
        if cfg.n_layers % size == 0 and repeats:
            return size
    raise UserError(
        "model.scan_layers is True but layers and kv_source have no common period that repeats over n_layers = "
        f"{cfg.n_layers}; set scan_layers to False."
    )


def executed(model: ModelConfig, like: ModelConfig) -> ModelConfig:
    """`model` (of a checkpoint) with the execution fields of `like` (config.model), layers in a loop. Raises UserError
    where they are illegal; whether a kernel can serve the model is the dispatcher's to say."""
    fields = {name: getattr(like, name) for name in EXECUTION if name != "scan_layers"}
    model = dataclasses.replace(model, **fields)
    model.check()
    return model
