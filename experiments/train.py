"""Trains a model from scratch, or a checkpoint as it is, on any mesh.

    python -m experiments.train --config=configs/train_tiny.py
    python -m experiments.train --config=configs/train_tiny.py --config.train.steps=400 --config.mesh.data=2

The same command resumes where the last checkpoint in the workdir is; SIGTERM and Ctrl-C save one and exit
with code 0. Several processes: set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in each, or
KVATTN_DISTRIBUTED=1 where jax finds them by itself; experiments.launch does either.
"""

from experiments.common import cli
from kvattn import prepare
from kvattn.config import Experiment
from kvattn.errors import UserError
from kvattn.train import loop as train
from kvattn.train.processes import join_processes


def main(cfg: Experiment) -> int:
    if not cfg.workdir:
        raise UserError("config.workdir is empty; name the directory for checkpoints and metrics.")
    join_processes()
    train.fit_prepared(cfg, prepare.for_training(cfg))
    return 0


if __name__ == "__main__":
    cli.run(main, "train")
