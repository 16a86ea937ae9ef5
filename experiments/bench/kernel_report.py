"""Report of a record of experiments/bench/kernels.py: its lines on the terminal, and the project's bars."""

import json
import pathlib
from typing import Any

from experiments.bench.kernel_shapes import Shape
from kvattn.errors import UserError

LARGE = 0.5e9  # bytes of cache from which the bandwidth bars hold
BANDWIDTH, LATENT, LONG = 0.9, 0.85, 1.3
FASTER = {"int8": 1.7, "float8_e4m3fn": 1.7, "int4": 2.8}  # tokens/s over the bf16 kernel's
RIVALS = ("cudnn", "torch")  # names begin so
NO_RESULT = "not a result: no accelerator"


def read(path: pathlib.Path) -> dict[str, Any]:
    """A record from its file. Raises UserError if it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["benchmark"] == "bench_kernels" and isinstance(record["rows"], dict):
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is no record of bench_kernels; name another file or move this one away.")


def timed(entry: dict[str, Any]) -> bool:
    """Has this candidate a figure? One that failed half way has none, whatever it left."""
    return "seconds" in entry and "error" not in entry


def ours(row: dict[str, Any]) -> dict[str, Any] | None:
    """Figures of our kernel in a row."""
    return row["kernels"][row["ours"]] if row["ours"] else None


def failed(row: dict[str, Any]) -> bool:
    """Did our kernel, or the reference, end in an error here?"""
    return any("error" in row["kernels"].get(name, {}) for name in ("mosaic_gpu", "mosaic_tpu", "xla"))


def against(entries: dict[str, dict[str, Any]], kernels: list[str]) -> dict[str, Any]:
    """{ours: name of our kernel that was timed or None, speed_over: peer -> its seconds over ours}."""
    mine = next((name for name in kernels if timed(entries.get(name, {}))), None)
    speed = {}
    if mine:
        speed = {
            name: entry["seconds"] / entries[mine]["seconds"]
            for name, entry in entries.items()
            if name not in kernels and timed(entry)
        }
    return {"ours": mine, "speed_over": speed}


def under_l2(row: dict[str, Any], l2_bytes: int) -> bool:
    """May part of the cache have stayed in the L2 between calls?"""
    return row["cache_bytes"] < 2 * l2_bytes


# --- lines ------------------------------------------------------------------------------------------------------


def head(record: dict[str, Any]) -> str:
    copy = record["copy"]
    lines = [] if record["accelerator"] else [f"{NO_RESULT}; this checks that the command runs"]
    lines.append(
        f"{record['device_kind']}: copy {copy['bytes_per_second'] / 1e9:.0f} GB/s read and written "
        f"({min(copy['all']) / 1e9:.0f} to {max(copy['all']) / 1e9:.0f}), array of "
        f"{copy['array_bytes'] / 2**30:.3g} GiB"
    )
    lines.append("  ".join(f"{name} {version}" for name, version in record["versions"].items()))
    lines += [f"missing: {name}: {why}" for name, why in record["missing"].items()]
    return "\n".join(lines)


def lines(name: str, row: dict[str, Any], l2_bytes: int) -> str:
    """A row: its name and bytes, and a line a candidate."""
    small = "   under twice the L2: faster than memory is possible" if under_l2(row, l2_bytes) else ""
    out = [f"\n{name}   {row['cache_bytes'] / 1e6:,.1f} MB   {row['calls']} calls{small}"]
    for kernel, entry in row["kernels"].items():
        if not timed(entry):
            what = "error" if "error" in entry else "refused"
            out.append(f"  {kernel:20} {what}: {entry.get(what)}")
            continue
        over = row["speed_over"].get(kernel)
        note = f"   ours is {over:.2f}x as fast" if over else ""
        note += f"   {entry['launches']:.0f} launches" if entry.get("launches") else ""
        note += f"   ({entry['note']})" if "note" in entry else ""
        out.append(
            f"  {kernel:20} {entry['seconds'] * 1e6:10.1f} us ({entry['min'] * 1e6:.1f} to "
            f"{entry['max'] * 1e6:.1f})  {entry['bytes_per_second'] / 1e9:7.0f} GB/s  "
            f"{entry['fraction']:6.1%} of copy  error {entry['relative_error']:.1e}{note}"
        )
    return "\n".join(out)


def tail(kept: int, done: int, left: int, path: pathlib.Path | None) -> str:
    """The last line of a run."""
    more = f", {left} left: run the same command again" if left else ""
    where = f"written to {path}" if path else f"nothing written, {NO_RESULT}"
    return f"\n{done} rows measured, {kept} kept from before{more}; {where}"


# --- bars -------------------------------------------------------------------------------------------------------


def bars(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar on every row it speaks of: {bar, row, figure, limit, met}; met None = not measured."""
    rows = {name: (Shape(**row["shape"]), row) for name, row in record["rows"].items()}
    out = []
    for name, (shape, row) in rows.items():
        if shape.page or shape.ragged:
            continue
        plain = shape.store == "bfloat16" and not shape.view and shape.kind != "MHA"
        large, fraction = row["cache_bytes"] >= LARGE, (ours(row) or {}).get("fraction")
        if plain and large and shape.kind in ("GQA-8", "MQA"):
            out.append(_bar("fraction of the copy", name, fraction, BANDWIDTH))
        long = shape.batch == 1 and shape.context >= 131072
        if plain and (large or long):
            out += _rivals(name, row)
        if shape.view and large and 16 <= shape.heads <= 64:
            out.append(_bar("latent: fraction of the copy", name, fraction, LATENT))
        if plain and long:
            out.append(_bar("batch 1: time over the limit", name, 1 / fraction if fraction else None, LONG, most=True))
        if shape.store in FASTER and not shape.view:
            out += _faster(name, shape, row, rows)
    return out


def _bar(bar: str, row: str, figure: float | None, limit: float, most: bool = False) -> dict[str, Any]:
    met = None if figure is None else figure <= limit if most else figure >= limit
    return {"bar": bar, "row": row, "figure": figure, "limit": limit, "most": most, "met": met}


def _rivals(name: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """Against the fastest of cuDNN's and of torch's candidates; not measured where none ran."""
    out = []
    for rival in RIVALS:
        speeds = {peer: s for peer, s in row["speed_over"].items() if peer.startswith(rival)}
        peer = min(speeds, key=speeds.get, default=rival)
        out.append(_bar(f"speed over {peer}", name, speeds.get(peer), 1.0))
    return out


def _faster(name: str, shape: Shape, row: dict[str, Any], rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens/s over those of the bf16 row of the same shape, where there is one."""
    for other, same in rows.values():
        if other.store == "bfloat16" and _but_store(other) == _but_store(shape):
            mine, base = ours(row), ours(same)
            figure = base["seconds"] / mine["seconds"] if mine and base else None
            return [_bar(f"{shape.store}: tokens/s over bf16", name, figure, FASTER[shape.store])]
    return []


def _but_store(shape: Shape) -> dict[str, Any]:
    return {key: value for key, value in vars(shape).items() if key != "store"}


def bars_table(record: dict[str, Any]) -> str:
    """The bars as text: bar, row, figure, limit, met or not."""
    found = bars(record)
    if not found:
        return "no row that a bar speaks of"
    out = [f"{'bar':32} {'figure':>9} {'limit':>8}  {'':12}  row"]
    for bar in found:
        figure = "-" if bar["figure"] is None else f"{bar['figure']:.3f}"
        verdict = {None: "not measured", True: "met", False: "NOT MET"}[bar["met"]]
        sign = "<=" if bar["most"] else ">="
        out.append(f"{bar['bar']:32} {figure:>9} {sign + format(bar['limit'], 'g'):>8}  {verdict:12}  {bar['row']}")
    met = [bar["met"] for bar in found]
    out.append(f"{met.count(True)} met, {met.count(False)} not met, {met.count(None)} not measured")
    return "\n".join(out)
