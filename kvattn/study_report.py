"""What a study leaves for a reader: the table, report.md and pareto.png."""

import os
import pathlib
from typing import Any

import rich.table

from kvattn.config import Experiment

# The decode roofline of the report: one v5e chip, bf16 weights and cache, 16 sequences of 8192 tokens.
ROOFLINE_CHIP, ROOFLINE_BATCH, ROOFLINE_CONTEXT = "v5e", 16, 8192

HEADINGS = (
    "variant", "KV bytes/token", "cache", "params", "ppl before", "KL before", "ppl after", "nll vs first",
    "decode tok/s", "v5e ms/step",
)  # fmt: skip


def summary(line: dict[str, Any]) -> str:
    """One finished phase as one line for the terminal."""
    text = f"{line['row']} {line['phase']}: "
    if line["phase"] == "decode":
        text += f"{line['decode_tokens_per_second']:.1f} tokens/s, cache {line['cache_bytes'] / 1e6:.2f} MB"
    else:
        text += f"perplexity {line['ppl']:.3f} (nll {line['nll']:.4f} +- {line['stderr']:.4f}, {line['tokens']} tokens)"
    if "kl" in line:
        text += f", KL {line['kl']:.3f} nats"
    if "bytes_per_token" in line:
        text += f", {line['bytes_per_token']} KV bytes/token"
    if line.get("train_tokens_per_second"):
        text += f", trained at {line['train_tokens_per_second']:.0f} tokens/s"
    return f"{text} ({line['seconds']:.0f} s)"


def _sizes(record: dict[str, Any]) -> dict[str, Any]:
    for phase in ("before", "after"):
        if record[phase] and "bytes_per_token" in record[phase]:
            return record[phase]
    return {}


def cells(record: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """The row of the table; an em dash for what has not been run."""
    sizes, base = _sizes(record), _sizes(first)
    before, after, made = record["before"], record["after"], record["decode"]
    out = [record["row"]]
    if sizes:
        share = sizes["bytes_at_context"] / base["bytes_at_context"] if base else float("nan")
        out += [f"{sizes['bytes_per_token']:g}", f"{share:.3f}x", f"{sizes['params'] / 1e6:.1f} M"]
    else:
        out += ["—"] * 3
    out.append(f"{before['ppl']:.2f}" if before else "—")
    out.append(f"{before['kl']:.3f}" if before else "—")
    out.append(f"{after['ppl']:.2f}" if after else "—")
    last = after or before
    out.append(f"{last['gap']:+.3f} ± {last['gap_stderr']:.3f}" if last and "gap" in last else "—")
    out.append(f"{made['decode_tokens_per_second']:.1f}" if made else "—")
    out.append(f"{sizes['roofline_seconds'] * 1e3:.3f}" if sizes else "—")
    return out


def table(records: list[dict[str, Any]]) -> rich.table.Table:
    """The table for the terminal."""
    out = rich.table.Table(title="quality, bytes, time")
    for i, heading in enumerate(HEADINGS):
        out.add_column(heading, justify="right" if i else "left")
    for record in records:
        out.add_row(*cells(record, records[0]))
    return out


def write(folder: pathlib.Path, cfg: Experiment, records: list[dict[str, Any]]) -> None:
    """report.md and, once two rows have a quality, pareto.png; each replaced as a whole."""
    _replace(folder / "report.md", _markdown(cfg, records).encode())
    if sum(bool(_sizes(r)) for r in records) >= 2:
        picture(folder / "pareto.png", records, cfg.train.steps)


def _markdown(cfg: Experiment, records: list[dict[str, Any]]) -> str:
    source = cfg.checkpoint.path or "small models from scratch"
    lines = [
        f"# {cfg.name}: what each attention variant costs and saves",
        "",
        f"Source: {source}. Quality: perplexity of {_tokens(records)} held-out tokens through each variant's own "
        f"cache, windows of {cfg.eval.context} tokens, stride {cfg.eval.stride}. Training: {cfg.train.steps} steps of "
        f"{cfg.data.batch_size} x {cfg.data.seq_len} tokens, the same batches for every row.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "|".join("---" if i == 0 else "---:" for i in range(len(HEADINGS))) + "|",
    ]
    lines += ["| " + " | ".join(cells(record, records[0])) + " |" for record in records]
    lines += [
        "",
        "- **KV bytes/token**: what one token leaves in the cache, all layers. **cache**: bytes held for "
        f"{ROOFLINE_CONTEXT} tokens, relative to the first row (a ring stops growing).",
        "- **ppl before / after**: after the conversion, and after the training steps. **KL before**: nats per token "
        "from the unconverted model's predictions.",
        "- **nll vs first**: mean loss difference to the first row in nats per token, paired by token, ± one standard "
        "error.",
        f"- **decode tok/s**: this machine, batch {cfg.study.decode_batch}, {cfg.study.decode_tokens} tokens after a "
        f"prompt of {cfg.study.prompt_tokens}. **v5e ms/step**: roofline of one decode step on one v5e chip, "
        f"bf16, batch {ROOFLINE_BATCH}, context {ROOFLINE_CONTEXT} (predicted, not run).",
        "- Sharing across layers saves capacity, not traffic: every reader reads its owner's cache again.",
        "",
        "![quality against bytes](pareto.png)",
        "",
        "## Text",
        "",
    ]
    for record in records:
        if record["decode"]:
            lines += [f"**{record['row']}**: {_quoted(record['decode']['text'])}", ""]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def _tokens(records: list[dict[str, Any]]) -> int:
    counts = [r[p]["tokens"] for r in records for p in ("before", "after") if r[p]]
    return max(counts, default=0)


def picture(path: pathlib.Path, records: list[dict[str, Any]], steps: int) -> None:
    """Perplexity against cache bytes, before (hollow) to after (filled), both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlabel=f"KV cache bytes per token at {ROOFLINE_CONTEXT} tokens",
             ylabel="perplexity of held-out text (lower is better)")  # fmt: skip
    points = []
    for i, record in enumerate(records):
        sizes = _sizes(record)
        if not sizes:
            continue
        x, colour = sizes["bytes_at_context"] / ROOFLINE_CONTEXT, f"C{i % 10}"
        before, after = record["before"], record["after"]
        last = after or before
        if before and after:
            axes.annotate("", (x, after["ppl"]), (x, before["ppl"]),
                          arrowprops={"arrowstyle": "->", "color": colour, "alpha": 0.5})  # fmt: skip
        if before:
            axes.plot(x, before["ppl"], "o", mfc="white", mec=colour, ms=7)
        if after:
            axes.plot(x, after["ppl"], "o", color=colour, ms=9)
        points.append((x, last["ppl"], record["row"], colour))
    front = _front(points)
    axes.plot([p[0] for p in front], [p[1] for p in front], "--", color="0.6", lw=1, zorder=0, label="best so far")
    axes.plot([], [], "o", mfc="white", mec="0.3", label="converted")
    axes.plot([], [], "o", color="0.3", label=f"after {steps} training steps")
    _label(axes, points)
    ticks = sorted({p[0] for p in points})
    axes.set_xticks(ticks, [f"{t:,.0f}" for t in ticks], rotation=30, ha="right")
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_major_locator(_log_ticks())
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=150)
    os.replace(partial, path)


def _log_ticks():
    from matplotlib.ticker import LogLocator

    return LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=12)


def _front(points: list[tuple]) -> list[tuple]:
    """Points that no other beats in both bytes and perplexity, by bytes."""
    best, out = float("inf"), []
    for point in sorted(points, key=lambda p: (p[0], p[1])):
        if point[1] < best:
            best = point[1]
            out.append(point)
    return out


def _label(axes: Any, points: list[tuple]) -> None:
    """Names beside the points; neighbours at the same place take turns above and below."""
    placed: list[tuple[float, float]] = []
    for x, y, name, colour in sorted(points, key=lambda p: (p[0], -p[1])):
        near = sum(abs(x / a - 1) < 0.35 and abs(y / b - 1) < 0.12 for a, b in placed)
        offset = ((9, 5), (9, -13), (-9, 9), (-9, -17))[min(near, 3)]
        align = "left" if offset[0] > 0 else "right"
        axes.annotate(name, (x, y), offset, textcoords="offset points", color=colour, ha=align, fontweight="bold")
        placed.append((x, y))


def _replace(path: pathlib.Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
