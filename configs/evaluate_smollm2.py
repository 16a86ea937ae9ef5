"""Perplexity of the held-out plays and needle retrieval of SmolLM2-135M, through the real cache.

Command:  python -m experiments.evaluate --config=configs/evaluate_smollm2.py
          --config=configs/evaluate_smollm2.py:window_sinks evaluates a row of configs/variants.py.
Paper:    passkey retrieval 2305.16300.
Hardware: 2 CPU cores, 4 GB.
Minutes:  about 4, estimated.
Expect:   not run on its 16,384 tokens and needles. The first 4,095 tokens, of configs/study_smollm2.py: perplexity
          26.03 (experiments/results/study_smollm2). With --config.eval.max_tokens=2048 and :base 24.730, :base_bf16
          24.731, :base_int8 24.737 (in pages too), :base_fp8 24.859, :base_int4 31.990, :base_int4_channel 27.509;
          int8 with keys per channel 24.778.
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
