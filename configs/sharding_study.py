"""Every layout of PaLM 8B on 8 v4 and 16 v5e chips: predicted, the best one of each question compiled.

Command:  python -m experiments.sharding_study   (--compile=none predicts only; the same command resumes)
Paper:    Efficiently Scaling Transformer Inference, 2211.05102, sections 2 to 5.
Hardware: 2 CPU cores, 4 GB; no TPU.
Minutes:  6, on busy cores.
Expect:   predicted best of all eight decode questions: ws_2d/by_batch:xyz; of both prefills: wg_xyz/by_batch:xyz.
"""

from configs import base
from configs.sizes import size
from kvattn import config as c


def get_config():
    model = size("palm-8b")
    return base.experiment(
        name="sharding_study",
        sharding_study=c.ShardingStudyConfig(
            rows=(c.VariantConfig("palm-8b", model=model, cache=c.CacheConfig(dtype="bfloat16")),),
            slices=("v4:2x2x2", "v5e:4x4"),
            batches=(16, 128),
            contexts=(2048, 8192),
            cells=(c.ShardingCellConfig(phase="prefill", batch=16, context=2048),),
        ),
    )
