"""MHA, GQA, MQA and CLA2-MQA of one small shape, trained from scratch on equal tokens.

Command:  python -m experiments.study --config=configs/study_scratch.py   (make study-scratch)
Papers:   MQA 1911.02150 (the MLP widened by what K and V lose), GQA 2305.13245, CLA 2405.12981.
Hardware: 2 CPU cores, 4 GB.
Tokens:   819,200 = 400 steps x 8 x 256, of every row.
Minutes:  about 20, estimated.
Expect:   not run to its end. Bytes a token writes (f32), exact: 9216, 3072, 1536, 768, with equal parameters. At 1B
          the CLA paper's perplexities are nearly level: 13.15 MHA, 13.36 GQA4, 13.54 MQA, 13.60 MQA-CLA2; those are
          not this command's.
"""

from configs import base
from configs.sizes import size
from kvattn import config as c

PAIRS = tuple(l - l % 2 for l in range(6))


def _row(name: str, kv_heads: int, d_ff: int, **fields) -> c.VariantConfig:
    model = size("small", n_k_heads=kv_heads, n_v_heads=kv_heads, d_ff=d_ff, **fields)
    return c.VariantConfig(name=name, model=model)


def get_config():
    rows = (
        _row("mha", 6, 512),
        _row("gqa", 2, 597),
        _row("mqa", 1, 619),
        _row("mqa_cla2", 1, 629, kv_source=PAIRS, kv_norm=True),
    )
    return base.experiment(
        name="study_scratch",
        data=c.DataConfig(tokenizer="bytes", batch_size=8, seq_len=256),
        optimizer=c.OptimizerConfig(learning_rate=2e-3, warmup_steps=30),
        train=c.TrainConfig(steps=400, log_every=20, checkpoint_every=100),
        eval=c.EvalConfig(context=256, stride=128, max_tokens=16384),
        study=c.StudyConfig(rows=rows, decode_tokens=64),
    )
