"""frontier.png, context.png and memory.png of a sharding study."""

import pathlib
from typing import Any

from experiments.common import plot_style
from experiments.common.plot_style import COLOURS, GREY, INK, LIMIT, PALE
from experiments.sharding_study.cells import Cell
from kvattn import plan
from kvattn.config import Experiment
from sharding import ShardingError, cost
from sharding.cost.hardware import CHIPS
from sharding.layout import torus_layouts

KV = ("replicated", "by_head:z", "by_head:yz", "by_head:xyz", "by_batch:z", "by_batch:yz", "by_batch:xyz", "by_seq:xyz")
CONTEXTS = tuple(1 << i for i in range(7, 21))
PANELS = 6  # of context.png
BARS = 24  # of memory.png
FAR = 10  # times the best latency: slower rows are left out of frontier.png
GIB = 2**30
DPI = 120


def names(cells: tuple[Cell, ...], lines: dict[str, list[Any]]) -> list[str]:
    """The plots that these lines give."""
    fit = [cell for cell in cells if lines[cell.id]]
    return (["frontier"] if fit else []) + (["context"] if _decodes(fit) else []) + (["memory"] if fit else [])


def draw(cfg: Experiment, cells: tuple[Cell, ...], lines: dict[str, list[Any]], workdir: pathlib.Path) -> None:
    """Draws what `names` says into `workdir`."""
    fit = [cell for cell in cells if lines[cell.id]]
    makers = {"frontier": frontier, "context": context, "memory": memory}
    for name in names(cells, lines):
        makers[name](cfg, fit, lines).savefig(workdir / f"{name}.png")


def frontier(cfg: Experiment, cells: list[Cell], lines: dict[str, list[Any]]):
    """Cost against latency, a panel per phase: the best row of each cell, joined over batches; every other row pale;
    what the compiler and the paper say."""
    phases = list(dict.fromkeys(cell.phase for cell in cells))
    figure, panels = plot_style.figure(6.4 * len(phases) + 1, 5.2, 1, len(phases), dpi=DPI)
    for axes, phase in zip(panels[0], phases, strict=True):
        plot_style.plain(axes)
        groups: dict[tuple, list] = {}
        for cell in (c for c in cells if c.phase == phase):
            group = (cell.variant, cell.slice, cell.context, cell.weights)
            groups.setdefault(group, []).append(cell)
            limit = FAR * _latency(cfg, lines[cell.id][0])
            rest = [line for line in lines[cell.id][1:] if _latency(cfg, line) < limit]
            axes.plot([_latency(cfg, r) for r in rest], [_cost(cfg, r) for r in rest], ".", ms=2, color=PALE, zorder=1)
        for i, (group, members) in enumerate(groups.items()):
            _frontier_of(cfg, axes, group, members, lines, COLOURS[i % len(COLOURS)], "osv^"[i // len(COLOURS) % 4])
        axes.plot([], [], "D", ms=5, mfc="white", mec=INK, label="compiled + modelled interconnect")
        if any(line.paper for c in cells for line in lines[c.id]):
            axes.plot([], [], "*", ms=11, color=INK, label="paper, measured")
        _log_ticks(axes)
        axes.set_xlabel(f"ms per {'step' if phase == 'decode' else 'prefill'} (log)")
        axes.set_ylabel("chip-milliseconds per token (log, lower is cheaper)")
        title = f"{phase}: best layout of each batch, predicted (overlap {cfg.sharding_study.rank!r})"
        plot_style.title(axes, title)
        axes.legend(fontsize=7, frameon=False)
    return figure


def _log_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)


def _latency(cfg: Experiment, line: Any) -> float:
    return 1e3 * line.predicted["seconds"][cfg.sharding_study.rank]


def _cost(cfg: Experiment, line: Any) -> float:
    return _latency(cfg, line) * line.cell.chips / (line.cell.batch * line.cell.tokens)


def _frontier_of(cfg: Experiment, axes: Any, group: tuple, members: list[Cell], lines, colour: str, mark: str):
    members = sorted(members, key=lambda c: c.batch * c.tokens)
    best = [lines[cell.id][0] for cell in members]
    xs, ys = [_latency(cfg, b) for b in best], [_cost(cfg, b) for b in best]
    variant, where, length, weights = group
    axes.plot(xs, ys, mark + "-", ms=5, lw=1.2, color=colour, label=f"{variant} {where} S{length} {weights}", zorder=3)
    for cell, x, y in zip(members, xs, ys, strict=True):
        axes.annotate(f"B{cell.batch}", (x, y), fontsize=7, color=colour, xytext=(4, 4), textcoords="offset points")
        for line in lines[cell.id]:
            per = cell.chips / (cell.batch * cell.tokens)
            if line.compiled and "failure" not in line.compiled:
                t = 1e3 * line.compiled["total_seconds"]
                axes.plot(t, t * per, "D", ms=5, mfc="white", mec=colour, zorder=4)
            if line.paper:
                axes.plot(1e3 * line.paper, 1e3 * line.paper * per, "*", ms=11, color=colour, zorder=5)


def _decodes(cells: list[Cell]) -> list[Cell]:
    """One decode cell per variant and slice: the largest batch."""
    found: dict[tuple, Any] = {}
    for cell in sorted((c for c in cells if c.phase == "decode"), key=lambda c: c.batch):
        found[cell.variant, cell.slice] = cell
    return list(found.values())[:PANELS]


def context(cfg: Experiment, cells: list[Cell], lines: dict[str, list[Any]]):
    """Predicted step time against context, a line per KV layout, under the FFN layout and mesh of the cell's best row;
    a line ends where the memory does. Diamonds: the compiler, of any layout it was asked for."""
    chosen = _decodes(cells)
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, panels = plot_style.figure(5.2 * columns + 0.6, 4.2 * rows, rows, columns, dpi=DPI)
    for axes in panels.flat[len(chosen) :]:
        axes.set_visible(False)
    for axes, cell in zip(panels.flat, chosen):
        plot_style.plain(axes)
        best = lines[cell.id][0].predicted
        ffn, mesh = best["layout"].partition("/")[0], tuple(best["mesh"])
        for names_, xs, ys in _merged(context_lines(cell, ffn, mesh, cfg.sharding_study.rank)):
            colour, last = COLOURS[KV.index(names_[0])], [1e3 * y for y in ys]
            axes.plot(xs, last, "o-", ms=3, lw=1.3, label=", ".join(names_), color=colour)
            axes.plot(xs[-1:], last[-1:], "|", ms=12, color=colour)
        for other in (c for c in cells if (c.variant, c.slice, c.batch, c.phase) == (*_key(cell), "decode")):
            for line in lines[other.id]:
                if line.compiled and "failure" not in line.compiled:
                    kv = line.predicted["layout"].partition("/")[2]
                    axes.plot(
                        other.context,
                        1e3 * line.compiled["total_seconds"],
                        "D",
                        ms=6,
                        mfc="white",
                        zorder=4,
                        mec=COLOURS[KV.index(kv)] if kv in KV else GREY,
                    )
        axes.plot([], [], "D", ms=6, mfc="white", mec=GREY, label="compiled + modelled interconnect")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(_short)
            axis.set_minor_formatter(_short if axis is axes.yaxis else "")
        axes.tick_params(which="both", labelsize=8)
        axes.set_xlabel("context, tokens (log; a line ends where memory does)")
        axes.set_ylabel("ms per decode step (log)")
        where = f"{cell.variant} {cell.slice} B{cell.batch} {cell.weights}: {ffn} on {'x'.join(map(str, mesh))}"
        plot_style.title(axes, where, 9)
        axes.legend(fontsize=7, frameon=False)
    return figure


def _short(value: float, _: int) -> str:
    """128, 2k, 1M; milliseconds as they are."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if value >= unit and value % unit == 0:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _merged(found: list[tuple[str, list, list]]) -> list[tuple[list[str], list, list]]:
    """Lines within 2 % of each other as one, with all their names."""
    out: list[tuple[list[str], list, list]] = []
    for name, xs, ys in found:
        same = (o for o in out if o[1] == xs and all(abs(a - b) <= 0.02 * b for a, b in zip(ys, o[2], strict=True)))
        twin = next(same, None)
        if twin:
            twin[0].append(name)
        else:
            out.append(([name], xs, ys))
    return out


def _key(cell: Cell) -> tuple:
    return cell.variant, cell.slice, cell.batch


def context_lines(cell: Cell, ffn: str, mesh: tuple[int, int, int], overlap: str) -> list[tuple[str, list, list]]:
    """(KV layout, contexts that fit, predicted seconds of a decode step) for every KV layout that the cell allows."""
    work, out = plan.workload(cell.padded[0], cell.row.cache, weights=cell.weights), []
    for kv in KV:
        xs, ys = [], []
        for length in CONTEXTS:
            try:
                p = cost.predict(
                    work,
                    torus_layouts.parse(f"{ffn}/{kv}"),
                    mesh,
                    cell.chip,
                    phase="decode",
                    batch=cell.batch,
                    tokens=1,
                    context=length,
                )
                cost.check_memory(p)
            except ShardingError:
                break
            xs.append(length)
            ys.append(p.step_seconds(overlap))
        if xs:
            out.append((kv, xs, ys))
    return out


def memory(cfg: Experiment, cells: list[Cell], lines: dict[str, list[Any]]):
    """Bytes per chip of each cell's best row: predicted weights, cache and activations, and beside it what the TPU
    compiler plans; the line is the chip's memory."""
    shown = cells[:BARS]
    figure, ((axes,),) = plot_style.figure(9.5, 1.6 + 0.5 * len(shown), dpi=DPI)
    plot_style.plain(axes)
    parts = ("weights", "cache", "activations")
    for i, cell in enumerate(shown):
        line = lines[cell.id][0]
        left = 0.0
        for part, colour in zip(parts, COLOURS, strict=False):
            size = line.predicted["memory_bytes"][part] / GIB
            axes.barh(i - 0.2, size, 0.36, left=left, color=colour, label=part if i == 0 else None)
            left += size
        done = line.compiled if line.compiled and "failure" not in line.compiled else None
        if done:
            plan_ = done["memory"]
            held, rest = plan_["arguments"] / GIB, (plan_["total"] - plan_["arguments"]) / GIB
            axes.barh(i + 0.2, held, 0.36, color=GREY)
            axes.barh(i + 0.2, rest, 0.36, left=held, color=PALE)
        limit = CHIPS[cell.chip].hbm_bytes / GIB
        axes.plot([limit, limit], [i - 0.42, i + 0.42], color=LIMIT, lw=1.6)
        largest = max(left, done["memory"]["total"] / GIB if done else 0)
        axes.annotate(
            f"{largest:.3g} of {limit:.3g}",
            (largest, i),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=7,
            va="center",
            color=INK,
        )
    axes.barh([0], [0], color=GREY, label="compiled: weights and cache")
    axes.barh([0], [0], color=PALE, label="compiled: temporaries and code")
    axes.plot([], [], color=LIMIT, label="memory of the chip")
    axes.set_yticks(range(len(shown)), [f"{c.id}\n{lines[c.id][0].predicted['layout']}" for c in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("GiB per chip; upper bar predicted, lower bar the TPU compiler")
    plot_style.title(axes, f"{cfg.name}: memory of each question's best layout")
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -1.0 / (len(shown) + 1)), ncols=3)
    return figure
