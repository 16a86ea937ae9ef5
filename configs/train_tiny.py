"""A byte-level model of 0.2M parameters on Shakespeare: the smoke test of the trainer.

Command:  python -m experiments.train --config=configs/train_tiny.py
Paper:    none.
Hardware: 2 CPU cores, 1 GB.
Tokens:   204,800 = 200 steps x 8 x 128.
Minutes:  0.5.
Expect:   loss from 5.59 (uniform over 258 ids is 5.55) to 2.67 nats per byte, 2.62 on the held-out plays.
"""

from configs import base
from configs.sizes import size
from kvattn import config as c


def get_config():
    return base.experiment(
        name="train_tiny",
        model=size("tiny"),
        data=c.DataConfig(tokenizer="bytes", batch_size=8, seq_len=128),
        optimizer=c.OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        train=c.TrainConfig(steps=200, log_every=20, checkpoint_every=100, eval_every=100),
        eval=c.EvalConfig(context=128, stride=64, max_tokens=8192),
    )
