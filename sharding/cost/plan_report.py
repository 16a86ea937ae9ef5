"""A plan: what was asked, what was tried and what fits; its tables on the terminal and the rows of its JSON."""

import dataclasses
import math
from typing import Any

from rich.table import Table

from sharding.cost.hardware import Chip
from sharding.cost.prediction import OVERLAPS, Prediction
from sharding.layout.rules import ShardingError
from sharding.layout.torus_layouts import Layout


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One layout on one mesh (X, Y, Z). `prediction` is None, and `reason` says why, where the layout cannot be;
    a pass that is too large or too slow has both. `n_heads`: query heads, padded with zeros where need be."""

    layout: Layout
    mesh: tuple[int, int, int]
    n_heads: int
    prediction: Prediction | None
    reason: str = ""
    overlap: str = "full"

    @property
    def seconds(self) -> float:
        """Predicted seconds of the pass under the plan's overlap."""
        return self.prediction.step_seconds(self.overlap) if self.prediction else math.inf


@dataclasses.dataclass(frozen=True)
class Request:
    """What a plan was asked for: one pass of `batch` sequences x `tokens` tokens ending at `context`, on `chips` of
    `chip`. `latency` in seconds, 0 = any."""

    chip: Chip
    chips: int
    batch: int
    context: int
    phase: str
    tokens: int
    weights: str = "bfloat16"
    kv: str = ""
    latency: float = 0.0
    overlap: str = "full"
    links: str = "all"
    pad_heads: bool = True


@dataclasses.dataclass(frozen=True)
class Plan:
    """`feasible`: each layout that fits, once, on its best mesh, in order of predicted time (equal to six digits: less
    memory, then less time on the links). `candidates`: every layout on every mesh. `changes`, when nothing is
    feasible: the smallest change of each kind that makes something fit."""

    request: Request
    n_heads: int
    feasible: tuple[Candidate, ...]
    candidates: tuple[Candidate, ...]
    changes: tuple[str, ...] = ()

    @property
    def infeasible(self) -> tuple[Candidate, ...]:
        """Candidates that cannot be, or are too large or too slow; each has a reason."""
        return tuple(c for c in self.candidates if c.reason)

    @property
    def best(self) -> Candidate:
        """The fastest candidate. Raises ShardingError, with the nearest change, when nothing fits."""
        if not self.feasible:
            raise ShardingError(self.verdict().replace("No", "no", 1))
        return self.feasible[0]

    def table(self, rows: int = 12) -> Table:
        """The first `rows` feasible candidates."""
        return table(self, rows)

    def refused(self, rows: int = 12) -> Table:
        """Layouts that are feasible on no mesh, with a reason each."""
        return refused(self, rows)

    def verdict(self) -> str:
        """One sentence: the best candidate, or what would fit."""
        return verdict(self)

    def as_dict(self, rows: int = 12) -> dict[str, Any]:
        """For JSON: the request, the first rows, the changes."""
        return as_dict(self, rows)


# --- what it looks like --------------------------------------------------------------------------------


def as_dict(p: Plan, rows: int) -> dict[str, Any]:
    """The request, the first `rows` feasible candidates, how many are not, and the changes."""
    _check(rows)
    asked = {f: getattr(p.request, f) for f in p.request.__dataclass_fields__ if f != "chip"}
    return {
        "request": {"chip": p.request.chip.name, **asked},
        "feasible": [row(c) for c in p.feasible[:rows]],
        "infeasible": len(p.infeasible),
        "changes": list(p.changes),
    }


def _check(rows: int) -> None:
    if rows < 1:
        raise ShardingError(f"rows is {rows}; it must be at least 1.")


def row(c: Candidate) -> dict[str, Any]:
    """One candidate; seconds by overlap assumption, bytes per chip."""
    p = c.prediction
    return {
        "layout": c.layout.name,
        "mesh": list(c.mesh),
        "n_heads": c.n_heads,
        "seconds": {name: p.step_seconds(name) for name in OVERLAPS},
        "compute_seconds": p.compute_seconds,
        "hbm_seconds": p.hbm_seconds,
        "interconnect_seconds": p.interconnect_seconds,
        "hbm_bytes": dict(p.hbm_bytes),
        "interconnect_bytes": p.interconnect_bytes,
        "memory_bytes": {"weights": p.weight_memory, "cache": p.cache_memory, "activations": p.activation_memory},
        "mfu": p.mfu(c.overlap),
        "chip_seconds_per_token": p.chip_seconds_per_token(c.overlap),
    }


def table(p: Plan, rows: int) -> Table:
    """The first `rows` feasible candidates: times in milliseconds, memory per chip."""
    _check(rows)
    ask = p.request
    title = f"{ask.phase}, {ask.chips} {ask.chip.name}, batch {ask.batch} x {ask.tokens} tokens, context {ask.context}"
    out = Table(title=title, title_justify="left", caption_justify="left")
    for name in ("layout", "mesh"):
        out.add_column(name, no_wrap=True)
    for name in ("overlap", "in turn", "compute", "HBM", "links", "GiB", "MFU", "chip-s"):
        out.add_column(name, justify="right", no_wrap=True)
    shown = p.feasible[:rows]
    for c in shown:
        one = c.prediction
        seconds = (
            one.step_seconds("full"),
            one.step_seconds("none"),
            one.compute_seconds,
            one.hbm_seconds,
            one.interconnect_seconds,
        )
        out.add_row(
            c.layout.name + (f" N={c.n_heads}" if c.n_heads != p.n_heads else ""),
            "x".join(map(str, c.mesh)),
            *(ms(s) for s in seconds),
            f"{one.memory_bytes / 2**30:.1f}",
            f"{100 * one.mfu(c.overlap):.1f}%",
            f"{one.chip_seconds_per_token(c.overlap):.3g}",
        )
    padded = any(c.n_heads != p.n_heads for c in shown)
    out.caption = (
        f"Milliseconds; {ask.weights} weights; sorted by overlap {ask.overlap!r}; {len(p.feasible)} layouts fit"
        + (f"; N: query heads, padded from {p.n_heads}" if padded else "")
    )
    return out


def refused(p: Plan, rows: int) -> Table:
    """Layouts that are feasible on no mesh, nearest misses first, with the reason of their nearest mesh."""
    _check(rows)
    out = Table(title="Layouts that fit on no mesh, the nearest first", title_justify="left")
    out.add_column("layout", no_wrap=True)
    out.add_column("why not")
    fine = {c.layout for c in p.feasible}
    reasons: dict[Layout, str] = {}
    for c in sorted(p.infeasible, key=miss):
        if c.layout not in fine:
            reasons.setdefault(c.layout, c.reason)
    for layout, reason in list(reasons.items())[:rows]:
        out.add_row(layout.name, reason)
    return out


def miss(c: Candidate) -> tuple:
    """Sort key: too slow, then too large, then impossible."""
    if c.prediction is None:
        return 2, 0
    large = c.prediction.memory_bytes > c.prediction.chip.hbm_bytes
    return (1, c.prediction.memory_bytes) if large else (0, c.seconds)


def verdict(p: Plan) -> str:
    """One sentence: the best candidate, or why there is none and what would fit."""
    if not p.feasible:
        changes = f"What would fit: {', or '.join(p.changes)}." if p.changes else "No single change was found."
        return f"No layout fits. {changes}"
    c = p.feasible[0]
    fast, slow = (ms(c.prediction.step_seconds(overlap)) for overlap in ("full", "none"))
    return f"Best: {c.layout.name} on a mesh of {'x'.join(map(str, c.mesh))}, {fast} to {slow} ms a pass."


def ms(seconds: float) -> str:
    """Milliseconds to four digits."""
    return f"{seconds * 1e3:.4g}"
