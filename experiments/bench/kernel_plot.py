"""Plots of a record of experiments/bench/kernels.py, beside its JSON: NAME_fraction.png and NAME_speed.png."""

import pathlib
from typing import Any

from experiments.bench.kernel_report import BANDWIDTH, NO_RESULT, ours, timed, under_l2
from experiments.bench.kernel_shapes import STORES, Shape
from experiments.common import plot_style
from experiments.common.plot_style import COLOURS, GREY, INK, PALE

TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100)
MARKS = {"contiguous": "o", "latent": "D", "paged": "s", "ragged": "^"}


def draw(record: dict[str, Any], path: pathlib.Path) -> list[pathlib.Path]:
    """Draws both into the folder of `path`; returns the files."""
    files = []
    for name, maker in (("fraction", fraction), ("speed", speed)):
        file = path.with_name(f"{path.stem}_{name}.png")
        maker(record).savefig(file)
        files.append(file)
    return files


def _axes(record: dict[str, Any], title: str):
    figure, ((axes,),) = plot_style.figure(9.6, 5.6)
    note = "" if record["accelerator"] else f"   ({NO_RESULT})"
    plot_style.title(axes, f"{title}      {record['device_kind']}, {record['date'][:10]}{note}", 11)
    axes.set_xscale("log")
    axes.set_xlabel("bytes of cache that a step reads (log scale)")
    plot_style.plain(axes)
    return figure, axes


def _form(shape: Shape) -> str:
    return "ragged" if shape.ragged else "paged" if shape.page else "latent" if shape.view else "contiguous"


def points(record: dict[str, Any]) -> list[tuple[Shape, dict[str, Any], dict[str, Any]]]:
    """(shape, row, figures) of our kernel, or of xla where no kernel of ours was timed in any row."""
    rows = [(Shape(**row["shape"]), row) for row in record["rows"].values()]
    if any(row["ours"] for _, row in rows):
        return [(shape, row, ours(row)) for shape, row in rows if row["ours"]]
    return [(shape, row, row["kernels"]["xla"]) for shape, row in rows if timed(row["kernels"].get("xla", {}))]


def fraction(record: dict[str, Any]):
    """Fraction of the copy's bandwidth against bytes: colour = store, mark = form, hollow = under twice the L2."""
    found = points(record)
    who = "xla" if not any(row["ours"] for _, row, _ in found) else found[0][1]["ours"]
    figure, axes = _axes(record, f"{who}: fraction of the copy's bandwidth")
    for y, style in ((1.0, "-"), (BANDWIDTH, (0, (4, 3)))):
        axes.axhline(y, color=PALE, lw=1.2, ls=style, zorder=1)
    for shape, row, entry in found:
        colour = COLOURS[STORES.index(shape.store)]
        hollow = under_l2(row, record["l2_bytes"])
        axes.plot(
            row["cache_bytes"],
            entry["fraction"],
            MARKS[_form(shape)],
            ms=7,
            mec=colour,
            mew=1.5,
            mfc="white" if hollow else colour,
            zorder=3,
        )
    axes.set_ylim(0, max([1.1, *(min(entry["fraction"], 2.0) * 1.05 for _, _, entry in found)]))
    axes.set_ylabel("bytes of cache per second over the copy's bytes per second")
    stores = [store for store in STORES if any(shape.store == store for shape, _, _ in found)]
    forms = [form for form in MARKS if any(_form(shape) == form for shape, _, _ in found)]
    for store in stores:
        axes.plot([], [], "o", ms=7, color=COLOURS[STORES.index(store)], label=store)
    for form in forms:
        axes.plot([], [], MARKS[form], ms=7, color=GREY, label=form)
    if any(under_l2(row, record["l2_bytes"]) for _, row, _ in found):
        axes.plot([], [], "o", ms=7, mec=GREY, mfc="white", label="under twice the L2")
    if found:
        axes.legend(frameon=False, fontsize=9, ncols=2)
    return figure


def speed(record: dict[str, Any]):
    """Our speed over each peer's on the same row, log scale: above 1 ours is faster."""
    figure, axes = _axes(record, "our kernel's speed over each peer's")
    axes.set_yscale("log")
    axes.axhline(1.0, color=INK, lw=1, zorder=2)
    rows = [row for row in record["rows"].values() if row["speed_over"]]
    peers = list(dict.fromkeys(peer for row in rows for peer in row["speed_over"]))
    for i, peer in enumerate(peers):
        at = [(row["cache_bytes"], row["speed_over"][peer]) for row in rows if peer in row["speed_over"]]
        axes.plot(*zip(*at, strict=True), "o", ms=6, color=COLOURS[i % len(COLOURS)], alpha=0.85, label=peer, zorder=3)
    values = [value for row in rows for value in row["speed_over"].values()]
    low, high = min([0.5, *values]) / 1.2, max([2.0, *values]) * 1.2
    ticks = [t for t in TICKS if low <= t <= high]
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylabel("times as fast (above 1: ours is faster)")
    if peers:
        axes.legend(frameon=False, fontsize=9, ncols=2)
    else:
        axes.text(0.5, 0.5, "no row has both our kernel and a peer", color=GREY, ha="center", transform=axes.transAxes)
    return figure
