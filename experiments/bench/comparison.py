"""Benchmarks against peers: each in a process of its own, taking turns on an otherwise idle machine.

A worker (experiments/bench/peers/NAME.py) is a child process that answers (experiments/common/child.py). The driver
asks peer after peer, round after round, in changing order, so that a machine that slows down slows both, and waits for
each answer before it asks the next.
"""

import importlib.util
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any

from experiments.common import machine
from experiments.common.child import Child
from experiments.common.journal import write_whole
from experiments.common.paths import RESULTS


def worker(name: str, python: str = "") -> Child:
    """The worker experiments/bench/peers/NAME.py, of the interpreter `python` (this one)."""
    return Child(f"experiments.bench.peers.{name}", python or sys.executable)


def start(peer_python: str = "") -> list[Child]:
    """kvattn, and transformers where this interpreter (or `peer_python`) has it."""
    peers = [worker("kvattn_worker")]
    if peer_python or (importlib.util.find_spec("transformers") and importlib.util.find_spec("torch")):
        peers.append(worker("transformers_worker", peer_python))
    else:
        print("torch and transformers are not installed here: kvattn is measured alone (make bench installs them)")
    return peers


def alternate(peers: list[Child], rounds: int, op: str, **request: Any) -> dict[str, list[dict[str, Any]]]:
    """`rounds` answers of every peer to the same request, taking turns, the order turned around every round."""
    answers: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in peers}
    for number in range(rounds):
        for peer in peers if number % 2 == 0 else reversed(peers):
            answers[peer.name].append(peer.ask(op, **request))
    return answers


def decoding(
    checkpoint: str,
    text: str,
    *,
    batches: list[int],
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    peer_python: str = "",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(setting, results) of decoding by every peer on the same weights and prompts; prints a line a batch size."""
    results, team = {}, start(peer_python)
    with tempfile.TemporaryDirectory() as folder:
        directory, need = f"{folder}/model", prompt_tokens * max(batches)
        made = team[0].ask("export", checkpoint=checkpoint, directory=directory, text=text, tokens=need)
        about = {team[0].name: made["versions"]}
        about |= {peer.name: peer.ask("load", checkpoint=directory)["versions"] for peer in team[1:]}
        for batch in batches:
            results[f"batch {batch}"] = _one_batch(team, rounds, batch, prompt_tokens, new_tokens, directory)
        for peer in team:
            peer.close()
    lengths = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    setting = {"checkpoint": checkpoint, "dtype": "float32", **lengths, "rounds": rounds, "peers": about}
    return setting, results


def _one_batch(team: list[Child], rounds: int, batch: int, prompt: int, new: int, directory: str) -> dict[str, Any]:
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


def training(
    checkpoint: str, text: str, *, batch: int, length: int, learning_rate: float, rounds: int, peer_python: str = ""
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(setting, results) of training steps by every peer on the same weights and batch; prints a line a peer."""
    with tempfile.TemporaryDirectory() as folder:
        directory, need = f"{folder}/model", batch * (length + 1)
        exporter = worker("kvattn_worker")
        exporter.ask("export", checkpoint=checkpoint, directory=directory, text=text, tokens=need)
        exporter.close()
        team = start(peer_python)
        request = {"directory": directory, "batch": batch, "length": length, "learning_rate": learning_rate}
        about = {peer.name: peer.ask("train_setup", **request)["versions"] for peer in team}
        first = alternate(team, 1, "train_step_once")
        runs = alternate(team, rounds, "train_step_once")
        for peer in team:
            peer.close()
    results = {}
    for name, answers in runs.items():
        entry = results[name] = medians(answers, "seconds")
        entry["tokens_per_second"] = batch * length / entry["seconds"]
        entry["peak_memory_bytes"] = answers[-1]["peak_memory_bytes"]
        entry["losses"] = [answer["loss"] for answer in first[name] + answers]
        print(
            f"{name.removesuffix('_worker')}: {entry['tokens_per_second']:.1f} tokens/s, peak memory "
            f"{entry['peak_memory_bytes'] / 2**20:.0f} MiB, losses {' '.join(f'{x:.4f}' for x in entry['losses'])}"
        )
    if len(results) > 1:
        ours, theirs = results["kvattn_worker"], results["transformers_worker"]
        results["ratio"] = {key: ours[key] / theirs[key] for key in ("tokens_per_second", "peak_memory_bytes")}
        print("kvattn / transformers:", "  ".join(f"{k} {v:.2f}" for k, v in results["ratio"].items()))
    sizes = {"batch": batch, "length": length}
    setting = {"checkpoint": checkpoint, **sizes, "dtype": "float32", "rounds": rounds, "peers": about}
    return setting, results


def medians(answers: list[dict[str, Any]], *keys: str) -> dict[str, Any]:
    """{key: median, key_all: [every round]} of numeric answers."""
    out: dict[str, Any] = {}
    for key in keys:
        values = [answer[key] for answer in answers]
        out |= {key: statistics.median(values), f"{key}_all": values}
    return out


def save(name: str, setting: dict[str, Any], results: dict[str, Any]) -> pathlib.Path:
    """Writes experiments/results/NAME.json: what was measured, when, where, with what, by which command."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    record = {
        "benchmark": name,
        "command": " ".join(["python", "-m", f"experiments.{name}", *sys.argv[1:]]),
        **machine.describe(),
        "load_average_at_end": load,
        "setting": setting,
        "results": results,
    }
    return write_whole(RESULTS / f"{name}.json", record)
