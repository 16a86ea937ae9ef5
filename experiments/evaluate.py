"""Evaluates a checkpoint through the real cache: perplexity, and needle or recall where the config asks.

python -m experiments.evaluate --checkpoint=PATH --text=FILE --context=512 --stride=256 --json
python -m experiments.evaluate --config=configs/evaluate_smollm2.py:window_sinks
"""

import json

from absl import flags

from experiments.common import cli, files
from kvattn.config import Experiment
from kvattn.evaluate import perplexity as evaluate
from kvattn.prepare import prepare

JSON = flags.DEFINE_bool("json", False, "print the result as one line of JSON on stdout")


def main(cfg: Experiment) -> None:
    files.check_checkpoint(cfg, "evaluate")
    evaluate.check_mesh(cfg)
    result = evaluate.run_prepared(cfg, prepare(cfg))
    print(json.dumps(result) if JSON.value else evaluate.describe(result))


if __name__ == "__main__":
    cli.run(main, "evaluate")
