"""Lays a model out on a slice in every way: predicted | compiled by the TPU compiler | measured | paper.

    python -m experiments.sharding_study                                    # PaLM 8B on v4:2x2x2 and v5e:4x4
    python -m experiments.sharding_study --config=configs/sharding_palm540b.py --compile=none
    python -m experiments.sharding_study --slices=v5e:8x8 --batches=1,64 --contexts=131072 --variants=gqa8

The same command goes on where it was stopped. --compile=none needs no libtpu. Results: results.jsonl, report.md,
frontier.png, context.png and memory.png in --workdir.
"""

from experiments.common import cli
from experiments.sharding_study import run as sharding_study
from kvattn.config import Experiment


def main(cfg: Experiment) -> None:
    sharding_study.run(cfg)


if __name__ == "__main__":
    cli.run(main, "sharding_study")
