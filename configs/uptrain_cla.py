"""Uptrains SmolLM2-135M with K and V shared by groups of layers; `:3` is CLA3.

Command:  python -m experiments.uptrain --config=configs/uptrain_cla.py:2
Paper:    CLA 2405.12981 (trained from scratch there; converting is ours, after the MLKV recipe).
Hardware: 2 CPU cores, 8 GB.
Tokens:   30,720 = 60 steps x 4 x 128.
Minutes:  about 10, estimated from the study's 24 steps.
Expect:   not run. Another command, configs/study_smollm2.py, trains the same conversion for 12,288 tokens: perplexity
          20,861 to 1,314 (cla2), 27,411 to 1,188 (cla3), in experiments/results/study_smollm2.
"""

from configs import base
from kvattn import config as c


def get_config(factor: str = "2"):
    return base.experiment(
        name=f"uptrain_cla{factor}",
        checkpoint=base.SMOLLM2,
        convert=(c.Conversion.of("cla", factor=int(factor)),),
        data=c.DataConfig(batch_size=4, seq_len=128),
        optimizer=c.OptimizerConfig(learning_rate=3e-4, warmup_steps=6, weight_decay=0.01),
        train=c.TrainConfig(steps=60, log_every=5, checkpoint_every=20, distill=c.DistillConfig(1.0, 1.0, 1.0)),
    )
