"""Cells of a sharding study: each one question of variant, slice, phase, batch, context, tokens and weights."""

import dataclasses
import json
from typing import Any

from experiments.launching import command as launch
from experiments.sharding_study import program as program_lib
from kvattn import model as model_lib
from kvattn import plan, spec
from kvattn.config import Experiment, ModelConfig, VariantConfig, plain
from kvattn.errors import UserError
from sharding import cost
from sharding.layout import torus_layouts


@dataclasses.dataclass(frozen=True)
class Cell:
    """One question, with the padded model it is asked of. `paper` is None or (layout, seconds, source)."""

    variant: str
    slice: str
    phase: str
    batch: int
    context: int
    tokens: int
    weights: str
    row: VariantConfig = dataclasses.field(repr=False)
    paper: tuple[str, float, str] | None = None

    @property
    def id(self) -> str:
        """The cell in a few words; rows of the journal are found by it."""
        return f"{self.variant} {self.slice} {self.question}"

    @property
    def question(self) -> str:
        """The id without variant and slice."""
        new = f" T{self.tokens}" if self.phase == "prefill" else ""
        held = f" S{self.context}" if self.tokens != self.context else ""
        weights = {"bfloat16": "bf16"}.get(self.weights, self.weights)
        return f"{self.phase} B{self.batch}{new}{held} {weights}"

    @property
    def chip(self) -> str:
        return launch.parse_slice(self.slice).chip

    @property
    def chips(self) -> int:
        return launch.parse_slice(self.slice).chips

    @property
    def padded(self) -> tuple[ModelConfig, tuple[str, ...]]:
        return program_lib.padded(self.row.model, self.chips)

    @property
    def counted_params(self) -> int:
        """N of the 2N FLOPs per token in MFU: without padding."""
        return spec.count(model_lib.param_specs(dataclasses.replace(self.row.model, scan_layers=False)))

    def arguments(self, layout: str, overlap: str) -> dict[str, Any]:
        """Keyword arguments of `program.program`."""
        arguments = {
            "model": plain(self.row.model),
            "cache": plain(self.row.cache),
            "layout": layout,
            "phase": self.phase,
            "batch": self.batch,
            "context": self.context,
            "tokens": self.tokens if self.phase == "prefill" else 0,
            "weights": self.weights,
            "overlap": overlap,
        }
        return json.loads(json.dumps(arguments))

    def predict(self, layout: str, mesh: tuple[int, int, int]) -> cost.Prediction:
        """The cost model on the padded model; `counted_params` without the padding."""
        work = plan.workload(self.padded[0], self.row.cache, weights=self.weights)
        p = cost.predict(
            work,
            torus_layouts.parse(layout),
            tuple(mesh),
            self.chip,
            phase=self.phase,
            batch=self.batch,
            tokens=self.tokens,
            context=self.context,
        )
        return dataclasses.replace(p, counted_params=self.counted_params)


def cells_of(cfg: Experiment) -> tuple[Cell, ...]:
    """The cells of the study: the product, then `cells`; the same question is asked once.

    Raises UserError: a cell that names no row, slices that do not exist, nothing asked.
    """
    s = cfg.sharding_study
    rows = s.rows or (VariantConfig(name=cfg.name or "model", cache=cfg.cache),)
    rows = {r.name: r if r.model is not None else dataclasses.replace(r, model=cfg.model) for r in rows}
    found: dict[str, Cell] = {}

    def add(row, where, phase, batch, context, tokens, weights, paper=None):
        tokens = 1 if phase == "decode" else tokens or context
        if tokens > context:
            raise UserError(f"sharding_study.tokens has {tokens}, above a context of {context}; lower it.")
        cell = Cell(row.name, where, phase, batch, context, tokens, weights, row, paper)
        if paper or cell.id not in found:
            found[cell.id] = cell

    for row in rows.values():
        for where in s.slices:
            for phase, batch, context in ((p, b, c) for p in s.phases for b in s.batches for c in s.contexts):
                for tokens in (s.tokens or (0,)) if phase == "prefill" else (0,):
                    for weights in s.weights:
                        add(row, where, phase, batch, context, tokens, weights)
    for one in s.cells:
        if one.variant and one.variant not in rows:
            if cfg.variants:  # the row was deselected
                continue
            raise UserError(f"sharding_study.cells names row {one.variant!r}; rows are {', '.join(rows)}.")
        paper = (one.paper_layout, one.paper_seconds, one.paper_source) if one.paper_seconds else None
        for row in [rows[one.variant]] if one.variant else rows.values():
            for where in [one.slice] if one.slice else s.slices:
                for weights in [one.weights] if one.weights else s.weights:
                    add(row, where, one.phase, one.batch, one.context, one.tokens, weights, paper)
    if not found:
        raise UserError("config.sharding_study asks nothing; give slices, batches, contexts and phases, or cells.")
    for cell in found.values():
        _chip(cell)
    return tuple(found.values())


def _chip(cell: Cell) -> str:
    try:
        return cell.chip
    except UserError as error:
        raise UserError(str(error).replace("--slice=", "sharding_study.slices has ")) from None


def meshes_of(cfg: Experiment, chips: int) -> list[tuple[int, int, int]] | None:
    """Meshes to try on `chips` chips; None = every factorisation."""
    out = []
    for text in cfg.sharding_study.meshes:
        out += [plan.default_mesh(chips)] if text == "default" else plan.parse_mesh(text)
    return out or None


def check_meshes(cfg: Experiment, cells: tuple[Cell, ...]) -> None:
    """Raises UserError for a layout that does not exist or a mesh that is not its slice's chips."""
    plan.parse_layouts(cfg.sharding_study.layouts)
    for where in {cell.slice: cell for cell in cells}.values():
        for x, y, z in meshes_of(cfg, where.chips) or ():
            if x * y * z != where.chips:
                raise UserError(
                    f"sharding_study.meshes has {x}x{y}x{z} = {x * y * z} chips but {where.slice} has {where.chips}; "
                    f"make the product {where.chips}, or write default."
                )
