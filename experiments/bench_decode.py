"""Decoding speed, float32, against transformers: both take turns on the same prompts.

    python -m experiments.bench_decode [--checkpoint=smollm2] [--batches=1,8] [--new=64] [--rounds=5]

Writes experiments/results/bench_decode.json: medians, every round, the fraction of the memory roofline.
"""

import tempfile

from absl import flags

from experiments import peers
from kvattn import cli

CHECKPOINT = flags.DEFINE_string("checkpoint", "smollm2", "any checkpoint that kvattn reads")
TEXT = flags.DEFINE_string("text", "", "a file for the prompts; empty = the held-out plays")
BATCHES = flags.DEFINE_list("batches", ["1", "8"], "batch sizes")
PROMPT = flags.DEFINE_integer("prompt_tokens", 128, "tokens of every prompt")
NEW = flags.DEFINE_integer("new", 64, "tokens to write")
ROUNDS = flags.DEFINE_integer("rounds", 5, "turns of each peer")
PYTHON = flags.DEFINE_string("peer_python", "", "an interpreter that has torch and transformers")


def main() -> None:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = f"{folder}/model"
        team = peers.start(PYTHON.value)
        need = PROMPT.value * max(map(int, BATCHES.value))
        about = {"kvattn_worker": team[0].ask("export", checkpoint=CHECKPOINT.value, directory=directory,
                                              text=TEXT.value, tokens=need)["versions"]}  # fmt: skip
        about |= {peer.name: peer.ask("load", checkpoint=directory)["versions"] for peer in team[1:]}
        for batch in map(int, BATCHES.value):
            request = {"batch": batch, "prompt_tokens": PROMPT.value, "new": NEW.value, "directory": directory}
            warm = peers.alternate(team, 1, "generate", **request)
            same = len({str(answers[0]["tokens"]) for answers in warm.values()}) == 1
            runs = peers.alternate(team, ROUNDS.value, "generate", **request)
            keys = ("tokens_per_second", "prefill_tokens_per_second")
            results[f"batch {batch}"] = entry = {name: peers.medians(a, *keys) for name, a in runs.items()}
            roof = team[0].ask("roofline", batch=batch, context=PROMPT.value + NEW.value // 2)
            speeds = {name: entry[name]["tokens_per_second"] for name in runs}
            entry["kvattn_of_roofline"] = speeds["kvattn_worker"] / roof["tokens_per_second"]
            entry |= {"roofline": roof, "same_tokens": same if len(team) > 1 else None}
            if len(team) > 1:
                entry["ratio"] = speeds["kvattn_worker"] / speeds["transformers_worker"]
            line = "  ".join(f"{name.removesuffix('_worker')} {speed:.1f} tokens/s" for name, speed in speeds.items())
            print(f"batch {batch}: {line}  ratio {entry.get('ratio', float('nan')):.2f}  same tokens {same}  "
                  f"{entry['kvattn_of_roofline']:.0%} of the memory roofline", flush=True)  # fmt: skip
        for peer in team:
            peer.close()
    setting = {"checkpoint": CHECKPOINT.value, "dtype": "float32", "prompt_tokens": PROMPT.value,
               "new_tokens": NEW.value, "rounds": ROUNDS.value, "peers": about}  # fmt: skip
    print(peers.save("bench_decode", setting, results))


if __name__ == "__main__":
    cli.run(main, config=False)
