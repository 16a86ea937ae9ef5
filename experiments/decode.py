"""Text from a checkpoint, through the real cache: streamed, then one line of speed and bytes.

python -m experiments.decode --checkpoint=PATH --prompt="The capital of France is" --max_new_tokens=64
python -m experiments.decode --config=configs/decode_smollm2.py:mqa_cla2 --chat --prompt="Why is the sky blue?"
python -m experiments.decode --prompt_file=FILE --json        (--prompt=- reads standard input)
"""

import json
import sys

from absl import flags

from experiments.common import cli, files
from kvattn import account
from kvattn.config import Experiment
from kvattn.data import batches as data
from kvattn.decode import generation as decode
from kvattn.prepare import prepare

JSON = flags.DEFINE_bool("json", False, "print one line of JSON on stdout instead of streaming")
FILE = flags.DEFINE_string("prompt_file", "", "read the prompt from this file")


def main(cfg: Experiment) -> None:
    files.check_checkpoint(cfg, "decode")
    prompt = files.read_prompt(FILE.value, cfg.decode.prompt)
    made = prepare(cfg)
    tokenizer = data.tokenizer_for(cfg.data, made.tokenizer)
    ids = decode.encode_prompt(tokenizer, prompt, cfg.decode.chat)
    say = tokenizer.stream()
    result = decode.generate(
        made.params,
        made.model,
        [ids],
        cfg.decode,
        cfg.cache,
        eos_ids=tokenizer.eos_ids,
        on_token=lambda row, token: None if JSON.value else print(say(token), end="", flush=True),
    )
    speed = {
        "prompt_tokens": len(ids),
        "new_tokens": len(result.tokens[0]),
        "tokens_per_second": round(result.tokens_per_second, 2),
        "prefill_seconds": round(result.prefill_seconds, 4),
        "compile_seconds": round(result.compile_seconds, 2),
        "cache_bytes": result.cache_bytes,
        "kv_bytes_per_token": account.kv_bytes_per_token(made.model, cfg.cache),
    }
    if JSON.value:
        text = tokenizer.decode(result.tokens[0], skip_special=True)
        print(json.dumps({"text": text, "tokens": result.tokens[0], "prompt_ids": ids, **speed}))
        return
    print("\n" + "  ".join(f"{name} {value}" for name, value in speed.items()), file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, "decode")
