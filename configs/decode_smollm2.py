"""Text from SmolLM2-135M, or from any readable checkpoint or converted variant of it.

Command:  python -m experiments.decode --prompt="The capital of France is"
          --config=configs/decode_smollm2.py:mqa_cla2 decodes a row of configs/variants.py.
Paper:    none.
Hardware: 2 CPU cores, 3 GB.
Minutes:  under 1.
Expect:   greedy text equal to Hugging Face transformers' on the same GGUF for 64 tokens, as
          tests_peers/test_transformers.py asserts.
"""

from configs import base, variants
from kvattn import config as c


def get_config(row: str = "base"):
    (variant,) = variants.rows(row)
    return base.experiment(
        name=f"decode_smollm2_{row}",
        checkpoint=base.SMOLLM2,
        convert=variant.convert,
        cache=variant.cache,
        decode=c.DecodeConfig(prompt="The capital of France is", max_new_tokens=64),
    )
