"""Llama-3-70B's shape with GQA-8, MQA and CLA2 on 64 chips of v5e, v5p and v6e, each question's best layout compiled.

Command:  python -m experiments.sharding_study --config=configs/sharding_llama3_70b.py
Papers:   GQA 2305.13245, MQA 1911.02150, CLA 2405.12981; layouts 2211.05102.
Hardware: 2 CPU cores, 8 GB; no TPU.
Minutes:  7, on busy cores.
Expect:   predicted: MQA's cache an eighth of GQA-8's and a decode step about half; CLA2 halves the cache a chip holds,
          not what a step reads of it (every layer reads its owner's), so its step is as long as GQA-8's.
"""

from configs import base
from configs.sizes import size
from kvattn import config as c

BF16 = c.CacheConfig(dtype="bfloat16")
SHAPES = {
    "gqa8": {},
    "mqa": {"n_k_heads": 1, "n_v_heads": 1},
    "gqa8_cla2": {"kv_source": tuple(l - l % 2 for l in range(80))},
}


def get_config():
    rows = tuple(c.VariantConfig(n, model=size("llama3-70b", **f), cache=BF16) for n, f in SHAPES.items())
    study = c.ShardingStudyConfig(
        rows=rows, slices=("v5e:8x8", "v5p:4x4x4", "v6e:8x8"), batches=(64,), contexts=(8192,), phases=("decode",)
    )
    return base.experiment(name="sharding_llama3_70b", sharding_study=study)
