"""A model of plain heads as one flat value: what writers of other people's formats ask for, in one place."""

import dataclasses
from typing import Any

from kvattn.attention.heads import Heads, plain_heads
from kvattn.config import MaskConfig, ModelConfig, RopeConfig, shortest
from kvattn.errors import UserError

_MODEL = tuple(field for field in dataclasses.fields(ModelConfig) if field.name != "layers")
# Name -> type of every simple field, those of ModelConfig and those of Heads.
TYPES = {field.name: field.type for field in (*_MODEL, *dataclasses.fields(Heads))}
FIELDS = (*TYPES, "masks", "ropes")


@dataclasses.dataclass(frozen=True)
class Flat:
    """`flat.n_k_heads`, `flat.d_model`, ...: every name in FIELDS is an attribute. `masks` and `ropes`: the shortest
    pattern of each over the layers."""

    cfg: ModelConfig
    heads: Heads
    masks: tuple[MaskConfig, ...]
    ropes: tuple[RopeConfig | None, ...]

    def __getattr__(self, name: str) -> Any:
        if name not in TYPES:
            raise AttributeError(f"{name} is no field of a flat model.")
        return getattr(self.heads if hasattr(self.heads, name) else self.cfg, name)

    @property
    def scale(self) -> float:
        """Of the scores: attn_scale, or H ** -0.5."""
        return self.heads.scale

    @property
    def sources(self) -> tuple[int, ...]:
        return self.cfg.sources

    def mask(self, layer: int) -> MaskConfig:
        return self.cfg.mask(layer)

    def rope(self, layer: int) -> RopeConfig | None:
        return self.cfg.rope(layer)


def flat(cfg: ModelConfig, what: str = "An export") -> Flat:
    """The flat form of `cfg`. Raises UserError for what it cannot say: a family that is no Heads, heads that differ
    between layers, head groups, a layer that reads a memory; `what` begins the sentence."""
    heads = plain_heads(cfg, what)
    for i, layer in enumerate(cfg.every):
        if layer.groups:
            raise UserError(f"{what} takes one mask a layer; layer {i} of this model has {len(layer.groups)} groups.")
        if layer.reads != "self":
            raise UserError(f"{what} takes layers that read their own text; layer {i} of this model reads a memory.")
    masks, ropes = (shortest(getattr(layer, name) for layer in cfg.every) for name in ("mask", "rope"))
    return Flat(cfg, heads, masks, ropes)
