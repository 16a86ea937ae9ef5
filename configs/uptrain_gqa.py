"""Uptrains SmolLM2-135M pooled to fewer K/V heads: mean, first or random (Ainslie et al., section 2.1).

Command:  python -m experiments.uptrain --config=configs/uptrain_gqa.py:mean
Paper:    GQA 2305.13245; alpha = 5 % of the original tokens there, some ten thousand tokens here.
Hardware: 2 CPU cores, 8 GB.
Minutes:  about 10 for 60 steps, estimated from the study's 24.
Expect:   the paper's order of quality, mean > first > random; here mean falls from perplexity 13,558 to 1,000 in the
          24 steps of the study (experiments/results/study_smollm2).
"""

from configs import base
from kvattn import config as c


def get_config(method: str = "mean"):
    return base.experiment(
        name=f"uptrain_gqa_{method}",
        checkpoint=base.SMOLLM2,
        convert=(c.ConvertConfig(kind="gqa", k_heads=1, method=method),),
        data=c.DataConfig(batch_size=4, seq_len=128),
        optimizer=c.OptimizerConfig(learning_rate=3e-4, warmup_steps=6, weight_decay=0.01),
        train=c.TrainConfig(steps=60, log_every=5, checkpoint_every=20, distill=c.DistillConfig(1.0, 1.0, 1.0)),
    )
