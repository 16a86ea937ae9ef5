"""The 1B model of the CLA paper, MQA with K and V shared by pairs of layers, on one GPU.

Command:  python -m experiments.train --config=configs/train_cla_1b.py --config.data.paths='corpus/*.txt'
Paper:    CLA 2405.12981, section 3: 30B tokens of SlimPajama, sequences of 2048, tuned lr 2.25e-3.
Hardware: one GPU of 80 GB. Not run on hardware.
Tokens:   65,536,000 = 1000 steps x 32 x 2048, bytes of the user's text: a 458th of the paper's; --config.train.steps
          sets more.
Minutes:  not run.
Expect:   not run. The paper's validation perplexity, 12.43 (MQA alone: 12.39), is of 30B tokens of another text and of
          a subword tokenizer: this command does not reach it, and per byte it is another figure.
"""

from configs import base
from configs.sizes import size
from kvattn import config as c


def get_config():
    return base.experiment(
        name="train_cla_1b",
        model=size("cla-1b-mqa-cla2", remat="dots"),
        data=c.DataConfig(tokenizer="bytes", source="text_files", paths=("corpus/*.txt",), batch_size=32, seq_len=2048),
        optimizer=c.OptimizerConfig(learning_rate=2.25e-3, warmup_steps=50),
        train=c.TrainConfig(steps=1000, accumulation=4, compute_dtype="bfloat16", log_every=10, checkpoint_every=500),
    )
