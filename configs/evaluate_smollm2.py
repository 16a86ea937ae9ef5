"""Perplexity of the held-out plays and needle retrieval of SmolLM2-135M, through the real cache.

Command:  python -m experiments.evaluate --config=configs/evaluate_smollm2.py
          --config=configs/evaluate_smollm2.py:window_sinks evaluates a row of configs/variants.py.
Paper:    passkey retrieval 2305.16300.
Hardware: 2 CPU cores, 4 GB.
Minutes:  about 4, estimated.
Expect:   perplexity about 26 on the held-out plays (26.03 on the first 4,095 tokens, in
          experiments/results/study_smollm2); no needle score is recorded. Caches, first 2,048 tokens, CPU, by
          :base_int8 --config.eval.max_tokens=2048 and so on: float32 24.730, bfloat16 24.731, int8 24.737 (paged, the
          same), fp8 24.859, int4 31.990, int4 with keys per channel 27.509 (int8 so: 24.778).
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
