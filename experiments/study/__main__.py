"""Compares attention variants of one checkpoint, or of small models from scratch: quality, bytes, time.

    python -m experiments.study --config=configs/study_smollm2.py
    python -m experiments.study --config=configs/study_smollm2.py --config.steps=200 --config.variants=base,mqa
    python -m experiments.study --config=configs/study_scratch.py

The same command resumes. The workdir gets results.jsonl, report.md and pareto.png.
"""

from experiments.common import cli
from experiments.study import run as study
from kvattn.config import Experiment


def main(cfg: Experiment) -> None:
    study.run(cfg)


if __name__ == "__main__":
    cli.run(main, "study")
