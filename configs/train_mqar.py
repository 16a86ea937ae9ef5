"""Multi-query associative recall: can the variant look up a value it saw once? `:VARIANT` is mha | mqa | cla2.

Command:  python -m experiments.train --config=configs/train_mqar.py:mha
Paper:    Zoology 2312.04927, section 4: attention solves the task at every width once trained.
Hardware: 2 CPU cores, 2 GB.
Tokens:   6,144,000 = 1500 steps x 64 x 64.
Minutes:  about 5, estimated.
Expect:   not run to its end; a run stopped at step 414 had loss 6.25 at step 1, 4.74 at step 100, 3.62 at step 200 and
          2.9 to 3.2 at the end (uniform over the 256 values is 5.55). :mqa and :cla2 are not run.
"""

from configs import base
from configs.sizes import size
from kvattn import config as c

SHAPES = {
    "mha": {"n_k_heads": 4, "n_v_heads": 4},
    "mqa": {"n_k_heads": 1, "n_v_heads": 1},
    "cla2": {"n_k_heads": 4, "n_v_heads": 4, "kv_source": (0, 0, 2, 2)},
}


def get_config(variant: str = "mha"):
    return base.experiment(
        name=f"train_mqar_{variant}",
        model=size("tiny", vocab_size=512, **SHAPES[variant]),
        data=c.DataConfig(source="mqar", batch_size=64, seq_len=64, mqar_vocab=512),
        optimizer=c.OptimizerConfig(learning_rate=3e-3, warmup_steps=50, schedule="constant"),
        train=c.TrainConfig(steps=1500, log_every=100, checkpoint_every=500, eval_every=500),
    )
