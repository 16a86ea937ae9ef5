"""Loading a checkpoint: seconds, and peak memory against the float32 weights, each time in a new process.

    python -m experiments.bench_load [--checkpoint=smollm2] [--rounds=3]

Writes experiments/results/bench_load.json.
"""

from absl import flags

from experiments.bench import comparison
from experiments.common import cli

CHECKPOINT = flags.DEFINE_string("checkpoint", "smollm2", "any checkpoint that kvattn reads")
ROUNDS = flags.DEFINE_integer("rounds", 3, "new processes")


def main() -> None:
    answers = []
    for _ in range(ROUNDS.value):
        peer = comparison.worker("kvattn_worker")
        answers.append(peer.ask("load", checkpoint=CHECKPOINT.value))
        peer.close()
    results = comparison.medians(answers, "seconds", "peak_memory_bytes")
    results["weight_bytes"] = answers[0]["weight_bytes"]
    results["peak_of_weights"] = results["peak_memory_bytes"] / results["weight_bytes"]
    print(
        f"{CHECKPOINT.value}: {results['seconds']:.2f} s, peak memory {results['peak_memory_bytes'] / 2**20:.0f} MiB "
        f"= {results['peak_of_weights']:.2f} x the weights as loaded ({results['weight_bytes'] / 2**20:.0f} MiB)"
    )
    setting = {"checkpoint": CHECKPOINT.value, "rounds": ROUNDS.value, "versions": answers[0]["versions"]}
    print(comparison.save("bench_load", setting, results))


if __name__ == "__main__":
    cli.run(main, "bench_load")
