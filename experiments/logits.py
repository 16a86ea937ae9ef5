"""Logits of a checkpoint for given token ids, read through the cache, for comparison from outside.

    python -m experiments.logits --checkpoint=PATH --tokens=ids.npy --out=logits.npy --mode=prefill|decode

ids.npy holds integers [T] or [B,T]; logits.npy gets float32 [T,W] or [B,T,W], entry t after tokens 0..t.
`prefill` appends up to 512 tokens at a time to the cache, `decode` one at a time. Weights, cache and sums are
float32.
"""

from absl import flags

from experiments.common import cli, files
from kvattn import formats
from kvattn.config import CacheConfig
from kvattn.evaluate import scoring

CHECKPOINT = flags.DEFINE_string("checkpoint", "smollm2", "smollm2, a directory or a .gguf file")
TOKENS = flags.DEFINE_string("tokens", "", "NumPy file of integer token ids [T] or [B,T]")
OUT = flags.DEFINE_string("out", "logits.npy", "NumPy file to write")
MODE = flags.DEFINE_enum("mode", "prefill", ["prefill", "decode"], "prefill | decode")


def main() -> None:
    tokens = files.read_tokens(TOKENS.value)
    files.check_writable(OUT.value)
    loaded = formats.load(CHECKPOINT.value, "float32")
    batch = tokens if tokens.ndim == 2 else tokens[None]
    logits = scoring.logits(loaded.params, loaded.model, batch, mode=MODE.value, cache_cfg=CacheConfig())
    files.write_array(OUT.value, logits if tokens.ndim == 2 else logits[0])
    print(f"{OUT.value}: logits of {tokens.shape} tokens, {MODE.value}, from {loaded.source}")


if __name__ == "__main__":
    cli.run(main, "logits")
