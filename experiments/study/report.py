"""Report of a study for people: the table, report.md and pareto.png, made from its records alone."""

import math
import pathlib
import shlex
import sys
from typing import Any

import numpy as np
import rich.table

from experiments.study.plot import draw, number
from kvattn.config import Experiment

COLUMNS = (
    "variant",
    "KV B/token",
    "of base",
    "ppl before",
    "ppl after",
    "loss vs base",
    "KL before",
    "KL after",
    "tokens/s",
    "of roofline",
    "params",
)


def summary(nll: np.ndarray) -> dict[str, Any]:
    """Mean, standard error, perplexity and count of per-token losses (NaN = not scored)."""
    seen = nll[~np.isnan(nll)]
    mean = float(seen.mean())
    stderr = float(seen.std(ddof=1) / math.sqrt(len(seen))) if len(seen) > 1 else 0.0
    return {"nll": mean, "stderr": stderr, "ppl": math.exp(min(mean, 700.0)), "tokens": len(seen)}


def line(phase: str, name: str, record: dict[str, Any]) -> str:
    """A finished phase in one line of the console."""
    out = f"{name:<16} {phase:<9} ppl {number(record['ppl']):>8}"
    if "kv_bytes_per_token_at_context" in record:
        out += f"  {record['kv_bytes_per_token_at_context']:>7.0f} KV B/token"
    if "kl" in record:
        out += f"  KL {record['kl']:6.3f}"
    if "tokens_per_second" in record:
        out += f"  {record['tokens_per_second']:6.1f} tokens/s"
    return out + f"  ({record['seconds']:.0f} s)"


# --- from records to rows ------------------------------------------------------------------------------


def rows_of(cfg: Experiment, records: list[dict[str, Any]], workdir: pathlib.Path) -> list[dict[str, Any]]:
    """One dict a row of the study, in its order: its phases, and `delta`: (mean, standard error) of its loss
    minus the yardstick's on the same tokens. Yardstick: the first unconverted row after the same training,
    else the reference; from scratch the first row. Rows not begun are left out."""
    found = {(r["phase"], r.get("row", "")): r for r in records}
    rows = []
    for row in cfg.study.rows:
        phases = {p: found[p, row.name] for p in ("before", "after") if (p, row.name) in found}
        if phases:
            rows.append({"name": row.name, "plain": not row.convert and row.model is None, **phases})
    control = next((r["name"] for r in rows if r["plain"] or not cfg.checkpoint.path), None)
    for entry in rows:
        last = "after" if "after" in entry else "before"
        ours = _load(cfg, workdir, last, entry["name"])
        theirs = _load(cfg, workdir, last, control) if control else None
        if theirs is None and last == "before":
            theirs = _load(cfg, workdir, "reference")
        entry["last"] = entry[last]
        entry["delta"] = paired(ours, theirs) if entry["name"] != control else None
    return rows


def nll_path(cfg: Experiment, workdir: pathlib.Path, phase: str, row: str) -> pathlib.Path:
    """The file of a phase's per-token losses; after training its name carries the number of steps."""
    suffix = f"-{cfg.train.steps}" if phase == "after" else ""
    return workdir / "nll" / f"{row + '.' if row else ''}{phase}{suffix}.npy"


def _load(cfg: Experiment, workdir: pathlib.Path, phase: str, row: str = "") -> np.ndarray | None:
    path = nll_path(cfg, workdir, phase, row)
    return np.load(path) if path.exists() else None


def paired(ours: np.ndarray | None, theirs: np.ndarray | None) -> tuple[float, float] | None:
    """Mean and standard error of the per-token difference of two losses on the same tokens."""
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return None
    got = summary(ours - theirs)
    return got["nll"], got["stderr"]


def cells(entry: dict[str, Any], widest: float) -> list[str]:
    """The table's cells of one row."""
    last, before, after = entry["last"], entry.get("before", {}), entry.get("after", {})
    size = last["kv_bytes_per_token_at_context"]
    delta = entry["delta"]
    return [
        entry["name"],
        f"{size:,.0f}",
        f"{size / widest:.3f}",
        number(before["ppl"]) if before else "-",
        number(after["ppl"]) if after else "-",
        f"{delta[0]:+.3f} ± {delta[1]:.3f}" if delta else "-",
        f"{before['kl']:.3f}" if "kl" in before else "-",
        f"{after['kl']:.3f}" if "kl" in after else "-",
        f"{last['tokens_per_second']:.1f}",
        f"{last['tokens_per_second'] / last['roofline_tokens_per_second']:.0%}",
        f"{last['params'] / 1e6:.2f} M",
    ]


def _body(rows: list[dict[str, Any]]) -> list[list[str]]:
    widest = max((entry["last"]["kv_bytes_per_token_at_context"] for entry in rows), default=1)
    return [cells(entry, widest) for entry in rows]


# --- outputs -------------------------------------------------------------------------------------------


def write(cfg: Experiment, records: list[dict[str, Any]], workdir: pathlib.Path) -> rich.table.Table:
    """Writes report.md and pareto.png into `workdir`; returns the table for the console."""
    rows = rows_of(cfg, records, workdir)
    body = _body(rows)
    if rows:
        draw(cfg, rows, _reference(records), workdir / "pareto.png")
    (workdir / "report.md").write_text(markdown(cfg, records, rows, body), encoding="utf-8")
    table = rich.table.Table(title=cfg.name, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in body:
        table.add_row(*row)
    return table


def _reference(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((r for r in records if r["phase"] == "reference"), None)


def markdown(cfg: Experiment, records: list[dict[str, Any]], rows: list[dict[str, Any]], body: list[list[str]]) -> str:
    """report.md: what was done, the table, what its columns mean, what each row wrote."""
    setup, reference = records[0], _reference(records)
    done = sum("after" in row for row in rows)
    minutes = sum(r.get("seconds", 0) for r in records) / 60
    versions = ", ".join(f"{k} {v}" for k, v in setup["versions"].items())
    head = [f"# {cfg.name}", "", _what(cfg, reference), ""]
    head += ["| " + " | ".join(COLUMNS) + " |", "|" + "|".join([" :-- "] + [" --: "] * (len(COLUMNS) - 1)) + "|"]
    head += ["| " + " | ".join(row) + " |" for row in body]
    head += ["", "![quality against KV bytes per token](pareto.png)", "", "## What it means", ""]
    head += [f"- {text}" for text in _meaning(cfg, rows, reference)]
    head += ["", "## What each row is", ""]
    for row in rows:
        note = row.get("before", row["last"]).get("note", "trained from random weights")
        exact = row.get("before", {}).get("exact")
        state = {True: " Exact.", False: " Not exact.", None: ""}[exact]
        head.append(f"- **{row['name']}**: {note}.{state}")
    if rows:
        head += ["", "## What each row writes", "", f"After `{_inline(rows[0]['last']['prompt'])}`, greedy:", ""]
        for row in rows:
            for phase in ("before", "after"):
                if phase in row:
                    head.append(f"- {row['name']}, {phase}: `{_inline(row[phase]['text'])}`")
    head += ["", "## How it was made", "", "```", command(cfg), "```", ""]
    head.append(
        f"{done} of {len(cfg.study.rows)} rows finished, {minutes:.1f} minutes, on {setup['device']} "
        f"({setup['cores']} cores); {versions}. The same command resumes or repeats it."
    )
    return "\n".join(head) + "\n"


def _inline(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def _what(cfg: Experiment, reference: dict[str, Any] | None) -> str:
    tokens = cfg.train.steps * cfg.data.batch_size * cfg.data.seq_len
    steps = f"{cfg.train.steps} steps of {cfg.data.batch_size} x {cfg.data.seq_len} tokens ({tokens:,} tokens)"
    text = cfg.eval.text or f"held-out {cfg.data.source} text"
    scored = f"on {text}, context {cfg.eval.context}, stride {cfg.eval.stride}, through the cache each row decodes with"
    if reference is None:
        return f"Every row is trained from random weights for {steps}, then measured {scored}."
    d = cfg.train.distill
    loss = f"{d.lm_weight:g} x next-token loss + {d.logit_kl:g} x KL + {d.attention_mse:g} x attention MSE"
    return (
        f"Each row is made from {reference['source']}, measured ({reference['tokens']:,} tokens {scored}), trained "
        f"for {steps} with {loss} against the unconverted model, and measured again."
    )


def _meaning(cfg: Experiment, rows: list[dict[str, Any]], reference: dict[str, Any] | None) -> list[str]:
    context = cfg.eval.context
    plain = next((row["name"] for row in rows if row["plain"]), None)
    versus = f"`{plain}` after the same training" if plain else "the unconverted model, untrained"
    if reference is None:
        versus = f"`{rows[0]['name']}`" if rows else "the first row"
    out = [
        f"KV B/token: bytes of K and V held at {context} tokens of context, divided by {context} (rings hold fewer "
        "tokens than they have seen), equal to what is allocated.",
        f"loss vs base: nats per token more than {versus}, last measurement, ± one standard error of the paired "
        "per-token difference. It covers the choice of tokens of this text and treats them as independent; other "
        "texts and training seeds are not in it.",
        "tokens/s: greedy decoding, batch "
        f"{cfg.study.decode_batch}, short context, one run on a machine that may be doing other things; 'of roofline' "
        "divides by the rate at which memory could deliver weights and cache. At this size and context weights are "
        "nearly all the traffic, so smaller caches hardly show here: they show in how many sequences fit.",
    ]
    if reference is not None:
        out.append(
            f"The unconverted model scores perplexity {number(reference['ppl'])} (loss {reference['nll']:.3f} ± "
            f"{reference['stderr']:.3f}); KL is to it, so a row that learns the text's style moves away from it too."
        )
    finished = [row for row in rows if "after" in row and "before" in row and not row["plain"]]
    if finished:
        gains = [row["before"]["nll"] - row["after"]["nll"] for row in finished]
        best = max(range(len(gains)), key=gains.__getitem__)
        out.append(
            f"Training recovered between {min(gains):.2f} and {max(gains):.2f} nats per token, most for "
            f"`{finished[best]['name']}`; these few steps show the beginning of recovery, not its end."
        )
    return out


def command(cfg: Experiment) -> str:
    """The command that made this process, as typed."""
    if pathlib.Path(sys.argv[0]).parent.name != "study":  # python -m gives the package's __main__.py
        return f"experiments.study.run.run(cfg)  # workdir {cfg.workdir}"
    return "python -m experiments.study " + shlex.join(sys.argv[1:])
