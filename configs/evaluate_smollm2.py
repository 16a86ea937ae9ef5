"""Perplexity of the held-out plays and needle retrieval of SmolLM2-135M, through the real cache.

Command:  python -m experiments.evaluate --config=configs/evaluate_smollm2.py
          --config=configs/evaluate_smollm2.py:window_sinks evaluates a row of configs/variants.py.
Paper:    passkey retrieval 2305.16300.
Hardware: 2 CPU cores, 4 GB.
Minutes:  about 4, estimated.
Expect:   perplexity about 26 on the held-out plays (26.03 on the first 4,095 tokens, in
          experiments/results/study_smollm2); no needle score is recorded.
"""

from configs import base, variants
from kvattn import config as c


def get_config(row: str = "base"):
    (variant,) = variants.rows(row)
    return base.experiment(
        name=f"evaluate_smollm2_{row}",
        checkpoint=base.SMOLLM2,
        convert=variant.convert,
        cache=variant.cache,
        eval=c.EvalConfig(context=512, stride=256, max_tokens=16384, needle_lengths=(256, 512)),
    )
