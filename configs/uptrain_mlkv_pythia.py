"""Uptrains Pythia-160M to MLKV with the paper's recipe; the argument is owners x heads, `6x1` is MLKV-6.

Command:  python -m experiments.uptrain --config=configs/uptrain_mlkv_pythia.py:6x1 \
              --config.checkpoint.path=DIR --config.data.paths='corpus/*.txt'
          DIR is a Hugging Face directory of EleutherAI/pythia-160m-deduped.
Paper:    MLKV 2406.09297: 5 % of the deduplicated Pile, lr 6e-4 cosine, AdamW 0.9/0.95, decay 0.01.
Hardware: one GPU of 24 GB for the paper's 2.46M rows of 2048 tokens (22 h on 2 A100 there). Not run on hardware.
Tokens:   5,038,080,000 = 102500 steps x 24 x 2048.
Minutes:  not run.
Expect:   not run. It prints losses; the paper's zero-shot averages after such a training, of another harness: base
          52.79, MQA-12 49.43, MLKV-6 49.06, MLKV-1 41.12.
"""

from configs import base
from kvattn import config as c


def get_config(shape: str = "6x1"):
    owners, heads = (int(n) for n in shape.split("x"))
    return base.experiment(
        name=f"uptrain_mlkv_{shape}",
        checkpoint=c.CheckpointConfig(path="pythia-160m-deduped"),
        convert=(c.Conversion.of("mlkv", owners=owners, k_heads=heads, method="running"),),
        data=c.DataConfig(source="text_files", paths=("corpus/*.txt",), batch_size=24, seq_len=2048),
        optimizer=c.OptimizerConfig(learning_rate=6e-4, warmup_steps=20000, weight_decay=0.01),
        train=c.TrainConfig(steps=102500, compute_dtype="bfloat16", log_every=50, checkpoint_every=1000),
    )
