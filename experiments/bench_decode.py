"""Decoding speed: a real checkpoint in float32 against transformers, or full-size shapes against the memory's speed.

    python -m experiments.bench_decode [--checkpoint=smollm2] [--batches=1,8] [--new=64] [--rounds=5]
    python -m experiments.bench_decode --shapes=llama3_8b,smollm2_1_7b [--batch=32] [--context=8192]   # random weights

Writes experiments/results/bench_decode.json, or bench_decode_shapes.json where there is an accelerator: medians, every
round, the fraction of the memory roofline.
"""

from absl import flags

from configs import sizes
from experiments.bench import comparison
from experiments.bench import decode_shapes as decode_bench
from experiments.common import cli
from experiments.common.paths import RESULTS

CHECKPOINT = flags.DEFINE_string("checkpoint", "smollm2", "any checkpoint that kvattn reads")
TEXT = flags.DEFINE_string("text", "", "a file for the prompts; empty = the held-out plays")
BATCHES = flags.DEFINE_list("batches", ["1", "8"], "batch sizes")
PROMPT = flags.DEFINE_integer("prompt_tokens", 128, "tokens of every prompt")
NEW = flags.DEFINE_integer("new", 64, "tokens to write")
ROUNDS = flags.DEFINE_integer("rounds", 5, "turns of each peer or candidate")
PYTHON = flags.DEFINE_string("peer_python", "", "an interpreter that has torch and transformers")
SHAPES = flags.DEFINE_list("shapes", [], "rows of configs/sizes.py, with random weights in place of a checkpoint")
BATCH = flags.DEFINE_integer("batch", 32, "shapes: sequences")
CONTEXT = flags.DEFINE_integer("context", 8192, "shapes: tokens of each sequence at the end")
LAYERS = flags.DEFINE_integer("layers", 0, "shapes: only so many layers; 0 = all")
CANDIDATES = flags.DEFINE_list("candidates", [], "shapes: KERNEL/STORE[/paged]; empty = all of the platform's")
OUTPUT = flags.DEFINE_string("output", "", "shapes: the JSON, also on a CPU")


def main() -> None:
    if SHAPES.value:
        asked = {"batch": BATCH, "context": CONTEXT, "steps": NEW, "rounds": ROUNDS, "layers": LAYERS}
        decode_bench.run(
            dict(sizes.named(name) for name in SHAPES.value),
            default=str(RESULTS / "bench_decode_shapes.json"),
            output=OUTPUT.value,
            candidates=CANDIDATES.value,
            **{name: flag.value for name, flag in asked.items()},
        )
        return
    setting, results = comparison.decoding(
        CHECKPOINT.value,
        TEXT.value,
        batches=list(map(int, BATCHES.value)),
        prompt_tokens=PROMPT.value,
        new_tokens=NEW.value,
        rounds=ROUNDS.value,
        peer_python=PYTHON.value,
    )
    print(comparison.save("bench_decode", setting, results))


if __name__ == "__main__":
    cli.run(main, "bench_decode")
