"""An uptraining step (float32, next-token loss, clipping, AdamW) against transformers + torch AdamW.

    python -m experiments.bench_train [--checkpoint=smollm2] [--batch=2] [--length=512] [--rounds=5]

Each peer has its own process, so peak memory is its own; they take turns on the same batch of real text.
Writes experiments/results/bench_train.json.
"""

import tempfile

from absl import flags

from experiments.bench import comparison
from experiments.common import cli

CHECKPOINT = flags.DEFINE_string("checkpoint", "smollm2", "any checkpoint that kvattn reads")
TEXT = flags.DEFINE_string("text", "", "a file to train on; empty = the held-out plays")
BATCH = flags.DEFINE_integer("batch", 2, "sequences per step")
LENGTH = flags.DEFINE_integer("length", 512, "tokens per sequence")
ROUNDS = flags.DEFINE_integer("rounds", 5, "turns of each peer")
RATE = flags.DEFINE_float("learning_rate", 1e-5, "AdamW's")
PYTHON = flags.DEFINE_string("peer_python", "", "an interpreter that has torch and transformers")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = f"{folder}/model"
        exporter = comparison.worker("kvattn_worker")
        exporter.ask(
            "export",
            checkpoint=CHECKPOINT.value,
            directory=directory,
            text=TEXT.value,
            tokens=BATCH.value * (LENGTH.value + 1),
        )
        exporter.close()
        team = comparison.start(PYTHON.value)
        request = {"directory": directory, "batch": BATCH.value, "length": LENGTH.value, "learning_rate": RATE.value}
        about = {peer.name: peer.ask("train_setup", **request)["versions"] for peer in team}
        first = comparison.alternate(team, 1, "train_step_once")
        runs = comparison.alternate(team, ROUNDS.value, "train_step_once")
        for peer in team:
            peer.close()
    results = {}
    for name, answers in runs.items():
        results[name] = comparison.medians(answers, "seconds")
        results[name]["tokens_per_second"] = BATCH.value * LENGTH.value / results[name]["seconds"]
        results[name]["peak_memory_bytes"] = answers[-1]["peak_memory_bytes"]
        results[name]["losses"] = [answer["loss"] for answer in first[name] + answers]
        print(
            f"{name.removesuffix('_worker')}: {results[name]['tokens_per_second']:.1f} tokens/s, peak memory "
            f"{results[name]['peak_memory_bytes'] / 2**20:.0f} MiB, losses "
            f"{' '.join(f'{loss:.4f}' for loss in results[name]['losses'])}"
        )
    if len(results) > 1:
        ours, theirs = results["kvattn_worker"], results["transformers_worker"]
        results["ratio"] = {key: ours[key] / theirs[key] for key in ("tokens_per_second", "peak_memory_bytes")}
        print("kvattn / transformers:", "  ".join(f"{k} {v:.2f}" for k, v in results["ratio"].items()))
    setting = {
        "checkpoint": CHECKPOINT.value,
        "batch": BATCH.value,
        "length": LENGTH.value,
        "dtype": "float32",
        "rounds": ROUNDS.value,
        "peers": about,
    }
    print(comparison.save("bench_train", setting, results))


if __name__ == "__main__":
    cli.run(main, config=False)
