"""Decode kernels beside XLA, cuDNN, torch and others, and beside the memory's measured speed.

    python -m experiments.bench_kernels [--sweep=default]    # about 8 minutes on an H200; goes on where it stopped
    python -m experiments.bench_kernels --sweep=bars         # the shapes of the project's bars, and a table of them
    python -m experiments.bench_kernels --plot               # plots of the JSON that is there, nothing measured

Writes experiments/results/bench_kernels.json, made of bench_kernels.jsonl (a line a row), and its plots; on a CPU only
--sweep=quick runs, and is no result.
"""

import importlib.util
import pathlib

from absl import flags

from experiments.bench import comparison, kernel_plot, kernel_report
from experiments.bench import kernels as kernel_bench
from experiments.bench.kernel_shapes import SWEEPS
from experiments.common import cli
from experiments.common.paths import RESULTS

SWEEP = flags.DEFINE_string("sweep", "", f"{' | '.join(SWEEPS)}; empty = default, or quick on a CPU")
ROUNDS = flags.DEFINE_integer("rounds", 7, "turns of each candidate")
OUTPUT = flags.DEFINE_string("output", "", "the JSON; empty = experiments/results/bench_kernels.json")
SECONDS = flags.DEFINE_float("seconds", 0, "begin no further row after so long; 0 = measure them all")
ONLY = flags.DEFINE_string("only", "", "only rows whose name has this, e.g. int8 or 'GQA-8 N32'")
PYTHON = flags.DEFINE_string("peer_python", "", "an interpreter that has torch; empty = this one")
TORCH = flags.DEFINE_bool("torch", True, "measure torch's candidates where torch is")
PLOT = flags.DEFINE_bool("plot", False, "draw the plots of the JSON and measure nothing")
DEFAULT = RESULTS / "bench_kernels.json"


def torch() -> kernel_bench.Torch:
    if not TORCH.value:
        return kernel_bench.Torch(None, "left out by --notorch")
    if not PYTHON.value and importlib.util.find_spec("torch") is None:
        return kernel_bench.Torch(None, "torch is not installed here; --peer_python names an interpreter that has it")
    return kernel_bench.Torch(comparison.worker("torch_attention_worker", PYTHON.value))


def main() -> int:
    path = pathlib.Path(OUTPUT.value or DEFAULT)
    if PLOT.value:
        print("\n".join(map(str, kernel_plot.draw(kernel_report.read(path), path))))
        return 0
    team = torch()
    asked = {flag.name: flag.value for flag in (OUTPUT, ROUNDS, SECONDS, ONLY)}
    record = kernel_bench.run(SWEEP.value, default=str(DEFAULT), torch=team, **asked)
    team.close()
    if SWEEP.value == "bars":
        print(kernel_report.bars_table(record))
    if OUTPUT.value or record["accelerator"]:
        print("\n".join(map(str, kernel_plot.draw(record, path))))
    return 1 if record["errors"] or any(map(kernel_report.failed, record["rows"].values())) else 0


if __name__ == "__main__":
    cli.run(main, "bench_kernels")
