"""Report of a sharding study for people: report.md, the plots and the console table, from its records alone."""

import dataclasses
import pathlib
from typing import Any

import rich.table

from experiments.sharding_study import plot as sharding_study_plot
from experiments.sharding_study.answers import measured_key
from experiments.sharding_study.cells import Cell
from kvattn.config import Experiment

TOP = 8  # predicted rows shown of a cell
REFUSED = 12  # reasons shown for which layouts do not fit
GIB = 2**30
COLUMNS = (
    "question",
    "layout",
    "mesh",
    "predicted ms",
    "GiB",
    "MFU",
    "chip-s/token",
    "compiled ms",
    "GiB",
    "MFU",
    "doctor",
    "measured",
    "paper ms",
)
_CONSOLE = (0, 1, 2, 3, 4, 7, 8, 10, 11, 12)  # of COLUMNS
_HOW = """\
A pass is one decode step of the whole batch, or one prefill. Milliseconds and GiB per chip; MFU counts 2N FLOPs per
token of the model without padding, N with its embedding: a prefill, which makes logits of its last token only, may
therefore exceed 100 %.

- **predicted**: the cost model, from all of compute, HBM and interconnect overlapping to all of them in turn.
- **compiled**: the real TPU compiler's estimate of compute and HBM time (its cycles at the clock that makes its large
  copy and large matmul take their data-sheet time), at least the HBM time of the cost model, plus its interconnect
  time, in turn: the compiler gives asynchronous copies and collectives no cycles. `GiB` is the compiler's own memory
  plan; `doctor` is warnings + notes.
- **measured**: {measured}.
- **paper**: published measurements.
"""


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of a cell with all its answers; each is a record or None."""

    cell: Cell
    predicted: dict[str, Any]
    compiled: dict[str, Any] | None
    measured: dict[str, Any] | None
    paper: float | None

    @property
    def cells(self) -> tuple[str, ...]:
        """The texts of COLUMNS."""
        p, c = self.predicted, self.compiled
        question = self.cell.id + (f" ({', '.join(p['padded'])})" if p["padded"] else "")
        out = [question, p["layout"], "x".join(map(str, p["mesh"]))]
        out += [
            f"{ms(p['seconds']['full'])} - {ms(p['seconds']['none'])}",
            gib(sum(p["memory_bytes"].values())),
            percent(p["mfu"]),
            f"{p['chip_seconds_per_token']:.3g}",
        ]
        if c is None:
            out += ["-"] * 4
        elif "failure" in c:
            out += [f"failed: {c['failure_kind']}", gib(c["needed_bytes"]) if c.get("needed_bytes") else "-", "-", "-"]
        else:
            found = c["findings"]
            out += [
                ms(c["total_seconds"]),
                gib(c["memory"]["total"]),
                percent(c["mfu"]),
                f"{found.get('warning', 0)}+{found.get('note', 0)}",
            ]
        return (*out, measured_text(self.measured), ms(self.paper) if self.paper else "-")


def lines_of(cells: tuple[Cell, ...], records: list[dict[str, Any]], cfg: Experiment) -> dict[str, list[Line]]:
    """Of every planned cell its rows that fit, best first. Measurements of a cut go to all rows with that cut."""
    predicted: dict[str, list[dict[str, Any]]] = {}
    for r in records:
        if r["kind"] == "predicted" and not r["reason"]:
            predicted.setdefault(r["cell"], []).append(r)
    compiled = {(r["cell"], r["layout"], tuple(r["mesh"])): r for r in records if r["kind"] == "compiled"}
    measured = {r["key"]: r for r in records if r["kind"] == "measured"}
    out: dict[str, list[Line]] = {}
    for cell in cells:
        rows = predicted.get(cell.id, [])
        first = next((i for i, r in enumerate(rows) if cell.paper and r["layout"] == cell.paper[0]), None)
        out[cell.id] = []
        for i, r in enumerate(rows):
            done = compiled.get((cell.id, r["layout"], tuple(r["mesh"])))
            shown = i < TOP or i == first or done
            ran = measured.get(measured_key(cfg, cell, r)) if measured and shown else None
            out[cell.id].append(Line(cell, r, done, ran, cell.paper[1] if i == first else None))
    return out


def summary_lines(cells: tuple[Cell, ...], lines: dict[str, list[Line]]) -> list[Line]:
    """The best row of each cell, and rows that the paper measured or that were compiled."""
    return [line for cell in cells for i, line in enumerate(lines[cell.id]) if i == 0 or line.compiled or line.paper]


def write(
    cfg: Experiment, cells: tuple[Cell, ...], records: list[dict[str, Any]], workdir: pathlib.Path, plots: bool = True
) -> rich.table.Table:
    """Writes report.md and, with `plots`, the PNGs; returns the console table."""
    lines = lines_of(cells, records, cfg)
    if plots:
        sharding_study_plot.draw(cfg, cells, lines, workdir)
    (workdir / "report.md").write_text(_report(cfg, cells, lines, records, plots), encoding="utf-8")
    return _table(cfg, cells, lines, records)


def _table(cfg: Experiment, cells, lines, records) -> rich.table.Table:
    out = rich.table.Table(title=cfg.name, title_justify="left", caption_justify="left")
    for i, name in enumerate(COLUMNS[j] for j in _CONSOLE):
        out.add_column(name, justify="left" if i < 2 else "right", overflow="fold", no_wrap=i > 0)
    last, said = None, []
    groups = list(dict.fromkeys((cell.variant, cell.slice) for cell in cells))
    for cell in sorted(cells, key=lambda c: groups.index((c.variant, c.slice))):
        group = cell.variant, cell.slice
        if group != last:
            out.add_section()
            out.add_row(f"[bold]{cell.variant} {cell.slice}[/bold]")
            if cell.padded[1]:
                said.append(f"\n{cell.variant} {cell.slice} is padded: {', '.join(cell.padded[1])}.")
        last = group
        for line in summary_lines((cell,), lines):
            texts = line.cells
            out.add_row("  " + cell.question, *(texts[j] for j in _CONSOLE[1:]))
        planned = _planned(records, cell)
        if planned and not lines[cell.id]:
            out.add_row("  " + cell.question, "none fits")
            said.append(f"\n{cell.id}: {_nearest(records, cell)} {planned['verdict']}")
    out.caption = (
        f"Milliseconds a pass and GiB a chip. Predicted: all overlapped - all in turn. Compiled: the TPU "
        f"compiler plus modelled interconnect; doctor: warnings + notes. Measured: {_measured_how(records)}."
        + "".join(said)
    )
    return out


def _nearest(records, cell) -> str:
    """Why the layout nearest to fitting does not."""
    refused = (r["reason"] for r in records if r["kind"] == "predicted" and r["cell"] == cell.id)
    return next(refused, "")


def _planned(records, cell) -> dict[str, Any] | None:
    return next((r for r in records if r["kind"] == "planned" and r["cell"] == cell.id), None)


def _measured_how(records: list[dict[str, Any]]) -> str:
    kinds = sorted({r["what"] for r in records if r["kind"] == "measured" and "what" in r})
    if not kinds:
        return "nothing"
    if all(kind.startswith("cut") for kind in kinds):
        return (
            "a small cut of the model on fake CPU devices, not the slice: its time only says that the layout runs, "
            "the last number how far its logits are from the unsharded model's, relatively"
        )
    return "the true program on " + ", ".join(kind for kind in kinds if not kind.startswith("cut"))


# --- report.md -----------------------------------------------------------------------------------------


def _report(cfg: Experiment, cells, lines, records, plots: bool) -> str:
    setup = next(r for r in records if r["kind"] == "setup")
    versions = ", ".join(f"{k} {v}" for k, v in setup["versions"].items())
    out = [
        f"# Sharding study: {cfg.name}",
        "",
        f"Made on {setup['device']}, {versions}.",
        "",
        _HOW.format(measured=_measured_how(records)),
    ]
    out += _markdown([line.cells for line in summary_lines(cells, lines)])
    if plots:
        out += ["", *(f"![{name}]({name}.png)" for name in sharding_study_plot.names(cells, lines))]
    failures = [r for r in records if r["kind"] in ("compiled", "measured") and "failure" in r]
    if failures:
        out += ["", "## Failures", ""]
        out += [f"- {r['kind']} {r['cell']} `{r['layout']}` {_mesh(r)}: {r['failure']}" for r in failures]
    for cell in cells:
        out += _section(cfg, cell, lines[cell.id], records)
    return "\n".join(out) + "\n"


def _markdown(rows: list[tuple[str, ...]]) -> list[str]:
    out = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * 3 + " ---: |" * (len(COLUMNS) - 3)]
    return out + ["| " + " | ".join(row) + " |" for row in rows]


def _section(cfg: Experiment, cell, lines: list[Line], records) -> list[str]:
    planned = _planned(records, cell)
    if planned is None:
        return []
    out = [
        "",
        f"## {cell.id}",
        "",
        f"{planned['verdict']} {planned['tried']} layouts on meshes tried, "
        f"{planned['fit']} rows fit; sorted by overlap {cfg.sharding_study.rank!r}.",
    ]
    if cell.paper:
        out += [f"The paper: `{cell.paper[0]}`, {ms(cell.paper[1])} ms ({cell.paper[2]})."]
    shown = [line for i, line in enumerate(lines) if i < TOP or line.compiled or line.paper]
    if shown:
        out += ["", *_markdown([(cell.phase, *line.cells[1:]) for line in shown])]
    refused = [r for r in records if r["kind"] == "predicted" and r["cell"] == cell.id and r["reason"]]
    if refused:
        out += ["", f"{len(refused)} layouts fit on no mesh; by reason, the nearest first:", ""]
        out += _refused(refused)
    for line in lines:
        if line.compiled and line.compiled.get("first_findings"):
            out += ["", f"The doctor on `{line.predicted['layout']}`, the first of its findings:", ""]
            out += [f"- {text}" for text in line.compiled["first_findings"]]
    return out


def _refused(records: list[dict[str, Any]]) -> list[str]:
    """A line per reason, said of its first layout, with the layouts that share it."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for r in records:
        groups.setdefault(r["reason"].replace(r["layout"], ""), []).append(r)
    out = []
    for members in list(groups.values())[:REFUSED]:
        first, rest = members[0], [f"`{r['layout']}`" for r in members[1:]]
        also = f" So are {', '.join(rest)}." if rest else ""
        out.append(f"- `{first['layout']}` on {_mesh(first)}: {first['reason']}{also}")
    left = len(groups) - REFUSED
    return out + ([f"- {left} more reasons in results.jsonl"] if left > 0 else [])


# --- texts ---------------------------------------------------------------------------------------------


def measured_text(record: dict[str, Any] | None) -> str:
    """A measurement in a table's cell."""
    if record is None:
        return "-"
    if "failure" in record:
        return "failed"
    if "worst" in record:
        return f"cut: {record['milliseconds']:.3g} ms, {record['worst']:.0e}"
    return f"{record['milliseconds']:.4g} ms"


def ms(seconds: float) -> str:
    """Milliseconds to three digits."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def gib(size: float) -> str:
    """GiB with one decimal, two below one."""
    return f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.2f}"


def percent(value: float) -> str:
    """A fraction as a percentage."""
    return f"{100 * value:.3g}%"


def _mesh(record: dict[str, Any]) -> str:
    return "x".join(map(str, record["mesh"]))
