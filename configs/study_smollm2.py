"""Attention variants of SmolLM2-135M compared: cost in quality, savings in cache bytes and decode time.

Command:  python -m experiments.study --config=configs/study_smollm2.py   (make study)
          --config.steps=200 --config.variants=base,mqa,mqa_cla2 widen or narrow it; the same command resumes.
          --config=configs/study_smollm2.py:wide takes every row of configs/variants.py.
Papers:   GQA 2305.13245, CLA 2405.12981, MLKV 2406.09297, StreamingLLM 2309.17453.
Hardware: 2 CPU cores, 12 GB.
Tokens:   12,288 = 24 steps x 4 x 128, of every row.
Minutes:  21.5; first rows within 3.
Expect:   perplexity before and after: base 26 and 25, window_sinks 27 and 26; mqa, cla2, cla3, mlkv and mqa_cla2
          13,000 to 28,000 and 900 to 1,400 (experiments/results/study_smollm2). Bytes a token writes (f32), exact:
          46080, 15360, 23040, 15360, 5120, 7680, 46080.
"""

from configs import base, variants
from kvattn import config as c

DEFAULT = ("base", "mqa", "cla2", "cla3", "mlkv", "mqa_cla2", "window_sinks")


def get_config(which: str = ""):
    names = tuple(variants.ROWS) if which == "wide" else tuple(which.split("+")) if which else DEFAULT
    return base.experiment(
        name="study_smollm2" + (f"_{which}" if which else ""),
        checkpoint=base.SMOLLM2,
        data=c.DataConfig(batch_size=4, seq_len=128),
        optimizer=c.OptimizerConfig(learning_rate=3e-4, warmup_steps=4, weight_decay=0.01),
        train=c.TrainConfig(steps=24, log_every=4, checkpoint_every=12, distill=c.DistillConfig(1.0, 1.0, 1.0)),
        eval=c.EvalConfig(context=512, stride=256, max_tokens=4096),
        study=c.StudyConfig(rows=variants.rows(*names), decode_tokens=32),
    )
