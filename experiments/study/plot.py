"""pareto.png: loss against KV bytes per token, an arrow from before to after training for every row."""

import pathlib
from typing import Any

import numpy as np

from experiments.common import plot_style
from experiments.common.plot_style import COLOURS, GREY, PALE
from kvattn.config import Experiment


def draw(cfg: Experiment, rows: list[dict[str, Any]], reference: dict[str, Any] | None, path: pathlib.Path) -> None:
    """Draws `rows` (study_report.rows_of) into `path`; x is logarithmic, y is nats per token."""
    figure, ((axes,),) = plot_style.figure(9.6, 6.0)
    sizes = _dodge([row["last"]["kv_bytes_per_token_at_context"] for row in rows])
    axes.set_xscale("log")
    axes.set_xlim(min(sizes) / 1.7, max(sizes) * 1.7)
    values = [row[p]["nll"] for row in rows for p in ("before", "after") if p in row]
    values += [reference["nll"]] if reference else []
    spread = max(max(values) - min(values), 0.1)
    axes.set_ylim(min(values) - 0.12 * spread, max(values) + 0.12 * spread)
    if reference:
        axes.axhline(reference["nll"], color=PALE, lw=1.2, zorder=0)
        axes.annotate(
            f"unconverted, ppl {np.exp(reference['nll']):.3g}",
            (0.008, reference["nll"]),
            color=GREY,
            fontsize=9,
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="left",
            va="bottom",
        )
    points = [_mark(axes, row, x, COLOURS[i % len(COLOURS)]) for i, (row, x) in enumerate(zip(rows, sizes))]
    _frontier(axes, points)
    _decorate(cfg, axes, rows)
    figure.canvas.draw()
    _label(figure, axes, rows, points)
    figure.savefig(path)


def _dodge(sizes: list[float]) -> list[float]:
    """Equal sizes side by side, 7 % apart, so that their arrows can be told apart."""
    out = []
    for i, size in enumerate(sizes):
        twins = [j for j, other in enumerate(sizes) if abs(np.log(other / size)) < 0.02]
        out.append(size * 1.07 ** (twins.index(i) - (len(twins) - 1) / 2))
    return out


def _mark(axes: Any, row: dict[str, Any], x: float, colour: str) -> tuple[float, float, str]:
    """Hollow marker before, filled after with its standard error, an arrow between; returns the label's anchor."""
    before, after = row.get("before"), row.get("after")
    if before:
        axes.plot(x, before["nll"], "o", ms=7, mfc="white", mec=colour, mew=1.6, zorder=3)
    if before and after:
        axes.annotate(
            "",
            (x, after["nll"]),
            (x, before["nll"]),
            zorder=2,
            arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.6, "shrinkA": 5, "shrinkB": 5, "alpha": 0.75},
        )
    if after:
        axes.errorbar(x, after["nll"], yerr=after["stderr"], fmt="o", ms=8, color=colour, capsize=3, lw=1.2, zorder=4)
    return x, (after or before)["nll"], colour


def _frontier(axes: Any, points: list[tuple[float, float, str]]) -> None:
    """A thin stair through the rows that no other row beats on both axes."""
    best, stair = np.inf, []
    for x, y, _ in sorted(points):
        if y < best:
            best = y
            stair.append((x, y))
    if len(stair) > 1:
        xs, ys = zip(*stair)
        axes.step(xs, ys, where="post", color=PALE, lw=1, ls=(0, (4, 3)), zorder=1)


def _decorate(cfg: Experiment, axes: Any, rows: list[dict[str, Any]]) -> None:
    ticks = sorted({round(row["last"]["kv_bytes_per_token_at_context"]) for row in rows})
    ticks = [t for i, t in enumerate(ticks) if i == 0 or t / ticks[i - 1] > 1.06]
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(f"KV bytes per token at {cfg.eval.context} tokens (log scale, equal values side by side)")
    axes.set_ylabel("loss on held-out text, nats per token (lower is better)")
    right = axes.secondary_yaxis("right", functions=(lambda y: y, lambda y: y))
    right.set_ylabel("perplexity")
    low, high = axes.get_ylim()
    marks = [m for m in _round_numbers() if low <= np.log(m) <= high]
    while len(marks) > 9:
        marks = marks[::2]
    right.set_yticks([np.log(m) for m in marks], [f"{m:,.0f}" if m >= 10 else f"{m:g}" for m in marks])
    tokens = cfg.train.steps * cfg.data.batch_size * cfg.data.seq_len
    both = any("before" in row for row in rows)
    how = "○ converted   ● then trained on" if both else "● trained from scratch on"
    plot_style.title(axes, f"{cfg.name}      {how} {tokens:,} tokens", 11)
    plot_style.plain(axes, "y")
    right.spines["right"].set_visible(False)


def _round_numbers() -> list[float]:
    return [m * 10.0**e for e in range(0, 9) for m in (1, 1.5, 2, 3, 5, 7)]


def _label(figure: Any, axes: Any, rows: list[dict[str, Any]], points: list[tuple[float, float, str]]) -> None:
    """Names beside their points, each in the first of a ring of places where it covers no mark and no other name."""
    from matplotlib.transforms import Bbox

    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    taken = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
    for row, (x, _, _) in zip(rows, points):
        spots = [axes.transData.transform((x, row[p]["nll"])) for p in ("before", "after") if p in row]
        taken += [Bbox.from_bounds(sx - 7 * scale, sy - 7 * scale, 14 * scale, 14 * scale) for sx, sy in spots]
        if len(spots) == 2:
            (sx, a), (_, b) = spots
            taken.append(Bbox.from_extents(sx - 3 * scale, min(a, b), sx + 3 * scale, max(a, b)))
    frame = axes.get_window_extent(renderer)
    for row, (x, y, colour) in zip(rows, points):
        text = axes.annotate(
            f"{row['name']}\nppl {number(np.exp(min(y, 700)))}",
            (x, y),
            fontsize=9.5,
            color=colour,
            linespacing=1.15,
            textcoords="offset points",
            xytext=(10, 0),
            ha="left",
            va="center",
            zorder=5,
            bbox={"fc": "white", "ec": "none", "alpha": 0.85, "pad": 0.5},
        )
        best = None
        for dx, dy, ha in _places():
            text.set(position=(dx, dy), ha=ha)
            text.update_positions(renderer)
            box = text.get_window_extent(renderer).padded(2 * scale)
            cost = sum(_overlap(box, other) for other in taken)
            cost += 0 if frame.containsx(box.x0) and frame.containsx(box.x1) else 1e6
            cost += 0 if frame.containsy(box.y0) and frame.containsy(box.y1) else 1e6
            if best is None or cost < best[0]:
                best = (cost, (dx, dy), ha, box)
            if cost == 0:
                break
        text.set(position=best[1], ha=best[2])
        taken.append(best[3])


def _places() -> list[tuple[float, float, str]]:
    """Offsets in points, nearest first: right, left, above, below, then further out."""
    out = []
    for reach in (10, 16, 24, 34, 46, 60):
        for rise in (0, 12, -12, 22, -22, 34, -34):
            out += [(reach, rise, "left"), (-reach, rise, "right")]
        out += [(0, reach + 10, "center"), (0, -reach - 10, "center")]
    return out


def _overlap(a: Any, b: Any) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return width * height if width > 0 and height > 0 else 0.0


def number(value: float) -> str:
    """Four significant digits, readable at any size."""
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
