"""The paper's measured configurations: PaLM 540B on 64 v4 chips, PaLM 62B on 8 to 32, against its own figures.

Command:  python -m experiments.sharding_study --config=configs/sharding_palm540b.py
Paper:    Efficiently Scaling Transformer Inference, 2211.05102, tables 2 and 3 and section 4 (per-step times).
Hardware: 2 CPU cores, 8 GB; no TPU.
Minutes:  8, on busy cores.
Expect:   the planner's layout is the paper's in all nine, every program compiles and fits; heads padded 48 -> 64 and
          W 256128 -> 262144 on 64 chips (experiments/results/sharding_palm540b).
"""

from configs import base
from configs.sizes import size
from kvattn import config as c

BF16 = c.CacheConfig(dtype="bfloat16")
HEAD, BATCH = "replicated", "by_batch:xyz"  # of one K, V head: split by head means a replica on every chip
TABLE = "2211.05102, tables 2 and 3; decode: the time of 64 tokens / 64"
#        row          slice        phase     batch  weights     ffn      KV     seconds        source
PAPER = (
    ("palm-540b", "v4:4x4x4", "prefill", 1, "int8", "ws_2d", HEAD, 0.29, TABLE),
    ("palm-540b", "v4:4x4x4", "decode", 64, "int8", "ws_2d", BATCH, 0.0285, "2211.05102, per-step time"),
    ("palm-540b", "v4:4x4x4", "decode", 64, "bfloat16", "ws_2d", BATCH, 0.0369, "2211.05102, per-step time"),
    ("palm-540b", "v4:4x4x4", "prefill", 512, "bfloat16", "wg_xyz", BATCH, 85.2, TABLE),
    ("palm-540b", "v4:4x4x4", "decode", 512, "bfloat16", "ws_2d", BATCH, 6.0 / 64, TABLE),
    ("palm-62b", "v4:2x2x4", "prefill", 1, "int8", "ws_2d", HEAD, 0.16, TABLE),
    ("palm-62b", "v4:2x2x4", "decode", 32, "int8", "ws_2d", BATCH, 0.73 / 64, TABLE),
    ("palm-62b", "v4:2x4x4", "prefill", 512, "bfloat16", "wg_xyz", BATCH, 20.2, TABLE),
    ("palm-62b", "v4:2x2x2", "decode", 512, "bfloat16", "ws_2d", BATCH, 5.1 / 64, TABLE),
)


def get_config():
    cells = tuple(
        c.ShardingCellConfig(phase, batch, 2048, 0, row, where, weights, f"{ffn}/{kv}", seconds, source)
        for row, where, phase, batch, weights, ffn, kv, seconds, source in PAPER
    )
    rows = tuple(c.VariantConfig(n, model=size(n), cache=BF16) for n in ("palm-540b", "palm-62b"))
    named = tuple(f"{f}/{kv}" for f in ("ws_1d", "ws_2d", "wg_x", "wg_xy", "wg_xyz") for kv in (HEAD, BATCH))
    study = c.ShardingStudyConfig(rows, slices=(), cells=cells, layouts=named, meshes=("default",))
    return base.experiment(name="sharding_palm540b", sharding_study=study)
