"""Benchmarks against peers: each in a process of its own, taking turns on an otherwise idle machine.

A worker (`python -m experiments.bench.peers.NAME`) answers one JSON line per JSON line. The driver asks peer after
peer, round after round, in changing order, so that a machine that slows down slows both, and waits for each
answer before it asks the next.
"""

import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

RESULTS = pathlib.Path(__file__).parents[2] / "results"
MARK = "@answer "


class Peer:
    """A worker process. `ask(op, **request)` returns its answer; a worker that dies raises RuntimeError."""

    def __init__(self, name: str, python: str = sys.executable):
        self.name = name
        self.process = subprocess.Popen(
            [python, "-m", f"experiments.bench.peers.{name}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=RESULTS.parents[1],
        )

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps({"op": op, **request}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        raise RuntimeError(f"{self.name} ended with code {self.process.wait()} during {op}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def serve(ops: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """A worker's loop: answers requests from stdin until it closes."""
    for line in sys.stdin:
        request = json.loads(line)
        answer = ops[request.pop("op")](**request)
        print(MARK + json.dumps(answer), flush=True)


def start(peer_python: str = "") -> list[Peer]:
    """kvattn, and transformers where this interpreter (or `peer_python`) has it."""
    peers = [Peer("kvattn_worker")]
    if peer_python or (importlib.util.find_spec("transformers") and importlib.util.find_spec("torch")):
        peers.append(Peer("transformers_worker", peer_python or sys.executable))
    else:
        print("torch and transformers are not installed here: kvattn is measured alone (make bench installs them)")
    return peers


def alternate(peers: list[Peer], rounds: int, op: str, **request: Any) -> dict[str, list[dict[str, Any]]]:
    """`rounds` answers of every peer to the same request, taking turns, the order turned around every round."""
    answers: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in peers}
    for number in range(rounds):
        for peer in peers if number % 2 == 0 else reversed(peers):
            answers[peer.name].append(peer.ask(op, **request))
    return answers


def compare_decode(team: list[Peer], rounds: int, batch: int, prompt: int, new: int, directory: str) -> dict[str, Any]:
    """Decoding speed of every peer on the same prompts, in turns, with kvattn's fraction of the memory roofline; prints
    a line."""
    request = {"batch": batch, "prompt_tokens": prompt, "new": new, "directory": directory}
    warm = alternate(team, 1, "generate", **request)
    same = len({str(answers[0]["tokens"]) for answers in warm.values()}) == 1
    runs = alternate(team, rounds, "generate", **request)
    keys = ("tokens_per_second", "prefill_tokens_per_second")
    entry: dict[str, Any] = {name: medians(a, *keys) for name, a in runs.items()}
    roof = team[0].ask("roofline", batch=batch, context=prompt + new // 2)
    speeds = {name: entry[name]["tokens_per_second"] for name in runs}
    entry["kvattn_of_roofline"] = speeds["kvattn_worker"] / roof["tokens_per_second"]
    entry |= {"roofline": roof, "same_tokens": same if len(team) > 1 else None}
    if len(team) > 1:
        entry["ratio"] = speeds["kvattn_worker"] / speeds["transformers_worker"]
    line = "  ".join(f"{name.removesuffix('_worker')} {speed:.1f} tokens/s" for name, speed in speeds.items())
    print(
        f"batch {batch}: {line}  ratio {entry.get('ratio', float('nan')):.2f}  same tokens {same}  "
        f"{entry['kvattn_of_roofline']:.0%} of the memory roofline",
        flush=True,
    )
    return entry


def medians(answers: list[dict[str, Any]], *keys: str) -> dict[str, Any]:
    """{key: median, key_all: [every round]} of numeric answers."""
    out: dict[str, Any] = {}
    for key in keys:
        values = [answer[key] for answer in answers]
        out |= {key: statistics.median(values), f"{key}_all": values}
    return out


def held_out() -> str:
    """Real text: the held-out plays."""
    from kvattn.config import DataConfig
    from kvattn.data import batches as data

    return data.eval_text(DataConfig())


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def save(name: str, setting: dict[str, Any], results: dict[str, Any]) -> pathlib.Path:
    """Writes experiments/results/NAME.json: what was measured, when, where, with what, by which command."""
    from experiments.study.run import machine  # imports jax, which a peer's process must not

    RESULTS.mkdir(exist_ok=True)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    record = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(["python", "-m", f"experiments.{name}", *sys.argv[1:]]),
        **machine(),
        "load_average_at_end": load,
        "setting": setting,
        "results": results,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
