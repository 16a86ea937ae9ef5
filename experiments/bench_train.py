"""An uptraining step (float32, next-token loss, clipping, AdamW) against transformers + torch AdamW.

    python -m experiments.bench_train [--checkpoint=smollm2] [--batch=2] [--length=512] [--rounds=5]

Each peer has its own process, so peak memory is its own; they take turns on the same batch of real text.
Writes experiments/results/bench_train.json.
"""

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
    setting, results = comparison.training(
        CHECKPOINT.value,
        TEXT.value,
        batch=BATCH.value,
        length=LENGTH.value,
        learning_rate=RATE.value,
        rounds=ROUNDS.value,
        peer_python=PYTHON.value,
    )
    print(comparison.save("bench_train", setting, results))


if __name__ == "__main__":
    cli.run(main, "bench_train")
