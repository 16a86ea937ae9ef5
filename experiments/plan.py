"""Which layout for a model on a slice, and what a pass will cost: predicted, nothing is compiled or run.

    python -m experiments.plan --size=palm-540b --slice=v4:4x4x4 --batch=64 --context=2048 --weights=int8
    python -m experiments.plan --size=llama3-70b --slice=v5e:8x8 --batch=32 --context=32768 --kv=int8
    python -m experiments.plan --size=palm-62b --chip=v4 --chips=32 --phase=prefill --batch=512 --context=2048 --json

Every layout (ws_1d, ws_2d, wg_x, wg_xy, wg_xyz, with K and V by_head, by_batch, by_seq or replicated) is tried on every
factorisation of the chips. "overlap" is the largest of compute, HBM and links time, "in turn" their sum (2211.05102).
"""

import json

from absl import flags
from rich.console import Console

from configs.sizes import size
from experiments.common import cli
from experiments.launching.command import parse_slice
from kvattn import plan
from kvattn.config import CacheConfig

SIZE = flags.DEFINE_string("size", "palm-540b", "row of configs/sizes.py")
SLICE = flags.DEFINE_string("slice", "", "v4:4x4x4, v5e:8x8, H200:8, ...; instead of --chip and --chips")
CHIP = flags.DEFINE_string("chip", "v4", "row of sharding/cost/hardware.py")
CHIPS = flags.DEFINE_integer("chips", 64, "number of chips")
ASKED = (  # by the names that kvattn.plan gives them
    flags.DEFINE_integer("batch", 64, "sequences of the pass"),
    flags.DEFINE_integer("context", 2048, "tokens per sequence when the pass ends"),
    flags.DEFINE_string("phase", "decode", "prefill | decode"),
    flags.DEFINE_integer("tokens", 0, "new tokens per sequence; 0 = the context in prefill, 1 in decode"),
    flags.DEFINE_string("weights", "bfloat16", "bfloat16 | int8"),
    flags.DEFINE_string("kv", "bfloat16", "cache type: float32 | bfloat16 | fp8 | int8 | int4"),
    flags.DEFINE_string("overlap", "full", "sort by: full | memory (collectives block) | none (all in turn)"),
    flags.DEFINE_string("links", "all", "bandwidth of a collective: all | axes (of its torus axes only)"),
    flags.DEFINE_bool("pad_heads", True, "pad query heads with zero heads where a layout does not divide them"),
)
LATENCY = flags.DEFINE_float("latency_ms", 0.0, "longest pass allowed, in milliseconds; 0 = any")
MESH = flags.DEFINE_string("mesh", "", "only this mesh, XxYxZ; empty = every factorisation")
LAYOUT = flags.DEFINE_list("layouts", [], "only these layouts, e.g. ws_2d/by_batch:xyz,ws_2d/replicated")
ROWS = flags.DEFINE_integer("rows", 12, "rows to show")
JSON = flags.DEFINE_bool("json", False, "print the plan as one line of JSON on stdout")


def main() -> int:
    where = parse_slice(SLICE.value) if SLICE.value else None
    chip, chips = (where.chip, where.chips) if where else (CHIP.value, CHIPS.value)
    asked = {flag.name: flag.value for flag in ASKED} | {"chip": chip, "chips": chips, "latency": LATENCY.value / 1e3}
    layouts, meshes = plan.parse_layouts(LAYOUT.value), plan.parse_mesh(MESH.value)
    found = plan.plan(size(SIZE.value), CacheConfig(dtype="bfloat16"), layouts=layouts, meshes=meshes, **asked)
    if JSON.value:
        print(json.dumps(found.as_dict(ROWS.value)))
    else:
        console = Console(width=None if Console().is_terminal else 120)
        console.print(found.table(ROWS.value) if found.feasible else found.refused(ROWS.value // 2 + 1))
        console.print(found.verdict())
    return 0 if found.feasible else 1


if __name__ == "__main__":
    cli.run(main, "plan")
