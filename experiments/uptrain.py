"""Converts a checkpoint to another attention variant and trains it back, distilled from the original.

    python -m experiments.uptrain --config=configs/uptrain_gqa.py:mean
    python -m experiments.uptrain --config=configs/uptrain_cla.py --config.checkpoint.path=DIR_OR_GGUF

Resumes and stops as experiments.train does.
"""

from experiments.common import cli
from experiments.train import main

if __name__ == "__main__":
    cli.run(main, "uptrain")
