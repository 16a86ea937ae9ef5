"""Uptrains SmolLM2-135M pooled to fewer K/V heads: mean, first or random (Ainslie et al., section 2.1).

Command:  python -m experiments.uptrain --config=configs/uptrain_gqa.py:mean
Paper:    GQA 2305.13245: alpha = 5 % of the original tokens; its order of quality is mean > first > random.
Hardware: 2 CPU cores, 8 GB.
Tokens:   30,720 = 60 steps x 4 x 128.
Minutes:  about 10, estimated from the study's 24 steps.
Expect:   not run, and so few tokens may not show the paper's order. Another command, configs/study_smollm2.py, trains
          the same conversion for 12,288 tokens: perplexity 13,558 to 1,000 (mqa), in experiments/results/study_smollm2.
"""

from configs import base
from kvattn import config as c


def get_config(method: str = "mean"):
    return base.experiment(
        name=f"uptrain_gqa_{method}",
        checkpoint=base.SMOLLM2,
        convert=(c.Conversion.of("gqa", k_heads=1, method=method),),
        data=c.DataConfig(batch_size=4, seq_len=128),
        optimizer=c.OptimizerConfig(learning_rate=3e-4, warmup_steps=6, weight_decay=0.01),
        train=c.TrainConfig(steps=60, log_every=5, checkpoint_every=20, distill=c.DistillConfig(1.0, 1.0, 1.0)),
    )
