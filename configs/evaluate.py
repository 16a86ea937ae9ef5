"""Perplexity of any readable checkpoint on any text, through the real cache; `:ROW` is a row of configs/variants.py.

Command:  python -m experiments.evaluate --checkpoint=smollm2 --text=FILE --context=512 --stride=256
Paper:    none; windows slide by `stride` and score each token once, with at least context - stride of context.
Hardware: 2 CPU cores, 4 GB.
Minutes:  1 for each 4000 tokens of SmolLM2-135M at context 512, stride 256.
Expect:   perplexity 37.0 where FILE is the first 30,000 bytes of Hamlet (9,035 tokens scored).
"""

from configs import base, variants
from kvattn import config as c


def get_config(row: str = "base"):
    (variant,) = variants.rows(row)
    return base.experiment(
        name=f"evaluate_{row}",
        checkpoint=base.SMOLLM2,
        convert=variant.convert,
        cache=variant.cache,
        eval=c.EvalConfig(context=512, stride=256),
    )
