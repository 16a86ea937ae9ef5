"""Uptrains SmolLM2-135M with K and V shared by groups of layers; `:3` is CLA3.

Command:  python -m experiments.uptrain --config=configs/uptrain_cla.py:2
Paper:    CLA 2405.12981 (trained from scratch there; converting is ours, after the MLKV recipe).
Hardware: 2 CPU cores, 8 GB.
Minutes:  about 10 for 60 steps, estimated from the study's 24.
Expect:   perplexity 20,861 (CLA2) and 27,411 (CLA3) after conversion, 1,314 and 1,188 after the 24 steps of the study
          (experiments/results/study_smollm2).
"""

from configs import base
from kvattn import config as c


def get_config(factor: str = "2"):
    return base.experiment(
        name=f"uptrain_cla{factor}",
        checkpoint=base.SMOLLM2,
        convert=(c.ConvertConfig(kind="cla", factor=int(factor)),),
        data=c.DataConfig(batch_size=4, seq_len=128),
        optimizer=c.OptimizerConfig(learning_rate=3e-4, warmup_steps=6, weight_decay=0.01),
        train=c.TrainConfig(steps=60, log_every=5, checkpoint_every=20, distill=c.DistillConfig(1.0, 1.0, 1.0)),
    )
