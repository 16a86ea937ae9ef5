"""The whole of PaLM 540B in every layout of the paper on 64 v4 chips, decode and prefill, each compiled.

Command:  python -m experiments.sharding_study --config=configs/sharding_layouts.py
Paper:    Efficiently Scaling Transformer Inference, 2211.05102, section 3.
Hardware: 2 CPU cores, 8 GB; no TPU.
Minutes:  5
Expect:   all ten compile and fit 32 GiB; decode: ws_2d best; heads padded 48 -> 64, W 256128 -> 262144
          (experiments/results/sharding_layouts).
"""

from configs import base
from configs.sizes import size
from kvattn import config as c


def get_config():
    cache = c.CacheConfig(dtype="bfloat16")
    ffns = ("ws_1d", "ws_2d", "wg_x", "wg_xy", "wg_xyz")
    study = c.ShardingStudyConfig(
        rows=(c.VariantConfig("palm-540b", model=size("palm-540b"), cache=cache),),
        slices=("v4:4x4x4",),
        phases=("decode", "prefill"),
        layouts=tuple(f"{ffn}/by_batch:xyz" for ffn in ffns),
        meshes=("default",),
        compile="all",
        measure=False,
    )
    return base.experiment(name="sharding_layouts", sharding_study=study)
