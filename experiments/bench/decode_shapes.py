"""Decoding at full size with random weights: tokens/s of each decode kernel and store, beside the memory's speed.

    weights   bfloat16, random;   cache   filled at random up to `context` - `steps` tokens of every sequence
    timed     kvattn.decode.generation.advance over `steps` tokens: one program, the state donated, greedy
    roofline  (weight bytes + cache bytes read) / (bytes per second of a copy, measured in the same run)

Candidates are KERNEL/STORE, or KERNEL/STORE/paged, and take turns; each turn fills its own cache anew, untimed.
"""

import dataclasses
import functools
import gc
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import kernel_rows
from experiments.bench import kernels as kernel_bench
from experiments.bench.kernel_report import NO_RESULT
from experiments.bench.kernel_shapes import STORES, draw
from experiments.common import machine
from experiments.common.journal import write_whole
from kvattn import account, cache, model
from kvattn.attention.step import DECODERS, reason_against
from kvattn.config import CacheConfig, DecodeConfig, ModelConfig
from kvattn.decode import generation as decode
from kvattn.decode import sampling
from kvattn.errors import UserError
from pallas_kernels import BACKENDS, KernelError, Leaf, codes
from sharding.cost.hardware import Chip

BAR = 0.8  # of the roofline, for the 8B shape at batch 32 and 8192 tokens
PAGE = 64


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate on one model, with its caches and lengths."""

    cfg: ModelConfig
    store: CacheConfig
    batch: int
    context: int
    steps: int


def default_candidates() -> list[str]:
    """xla over bf16, and this platform's kernel over every store, over bf16 in pages too."""
    here = [name for name, backend in BACKENDS.items() if backend.platform == jax.default_backend()]
    return [
        "xla/bfloat16",
        *(f"{name}/{store}" for name in here for store in STORES),
        *(f"{name}/bfloat16/paged" for name in here),
    ]


def parse(text: str) -> tuple[str, str, bool]:
    """KERNEL/STORE[/paged] -> (kernel, store, paged). Raises UserError."""
    kernel, _, rest = text.partition("/")
    store, _, paged = rest.partition("/")
    if kernel not in DECODERS or store not in ("float32", *STORES) or paged not in ("", "paged"):
        raise UserError(
            f"--candidates has {text!r}; write KERNEL/STORE or KERNEL/STORE/paged, with a kernel of "
            f"{', '.join(DECODERS)} and a store of float32, {', '.join(STORES)}."
        )
    return kernel, store, bool(paged)


def trial_of(cfg: ModelConfig, candidate: str, batch: int, context: int, steps: int) -> Trial:
    """The candidate in the first layout that its kernel reads. Raises UserError with the reason where there is none."""
    kernel, store, paged = parse(candidate)
    cfg = dataclasses.replace(cfg, decode_kernel=kernel)
    layouts = ("v_lanes", "lanes") if store in codes.LIMITS else ("rows", "lanes")
    reasons = []
    for layout in layouts:
        held = CacheConfig(
            ("paged",) if paged else ("full",), store, decode.bucket(context), layout=layout, page_size=PAGE
        )
        reasons.append(reason_against(cfg, held))
        if reasons[-1] is None:
            return Trial(cfg, held, batch, context, steps)
    raise UserError(f"{candidate} cannot serve this model: {reasons[0]}")


def abstract_caches(trial: Trial) -> tuple[Any, ...]:
    return cache.specs(trial.cfg, trial.store, trial.batch, trial.store.capacity)


def filled_caches(trial: Trial, seed: int = 0) -> tuple[Any, ...]:
    """Caches that hold `context` - `steps` random tokens a sequence; pages in the pool's order."""
    key = jax.random.key(seed, impl="rbg")

    def fill(leaf: Leaf, number: int) -> Leaf:
        scale = None if leaf.scale is None else leaf.scale.shape
        values, scales = draw(jax.random.fold_in(key, number), leaf.values.shape, scale, leaf.dtype.name)
        return Leaf(values, scales, leaf.lanes)

    out = []
    for layer, c in enumerate(abstract_caches(trial)):
        if c is None:
            out.append(None)
            continue
        leaves = {name: fill(leaf, 2 * layer + i) for i, (name, leaf) in enumerate(c.leaves.items())}
        address = c.address.replace(length=jnp.full((trial.batch,), trial.context - trial.steps, jnp.int32))
        if isinstance(address, cache.Paged):
            pages = 1 + jnp.arange(address.table.size, dtype=jnp.int32)
            address = address.replace(table=pages.reshape(address.table.shape))
        out.append(c.replace(leaves=leaves, address=address))
    return tuple(out)


def state_of(trial: Trial, caches: Any) -> decode.State:
    """A state that is about to draw `steps` tokens after the first."""
    return decode.State(
        token=jnp.arange(trial.batch, dtype=jnp.int32),
        position=jnp.full((trial.batch,), trial.context - trial.steps, jnp.int32),
        step=jnp.ones((trial.batch,), jnp.int32),
        done=jnp.zeros((trial.batch,), bool),
        out=jnp.full((trial.batch, trial.steps + 1), -1, jnp.int32),
        caches=caches,
    )


@functools.cache
def _draws(batch: int) -> tuple[Any, jax.Array]:
    """Greedy, and no end token."""
    return sampling.create(DecodeConfig(), batch), jnp.zeros((0,), jnp.int32)


def compiled(trial: Trial, params: Any) -> Any:
    """program(params, state, sampler, eos, until) -> State, for this trial's shapes."""
    state = jax.eval_shape(functools.partial(state_of, trial), abstract_caches(trial))
    return decode.advance_jit.lower(params, trial.cfg, state, *_draws(trial.batch), jnp.int32(0)).compile()


def turn(trial: Trial, program: Any, params: Any) -> tuple[float, jax.Array]:
    """(seconds of `steps` tokens, tokens [B,steps+1])."""
    state = jax.block_until_ready(state_of(trial, filled_caches(trial)))
    began = time.perf_counter()
    state = jax.block_until_ready(program(params, state, *_draws(trial.batch), jnp.int32(trial.steps + 1)))
    return time.perf_counter() - began, state.out


def roofline(trial: Trial, bandwidth: float) -> account.Roofline:
    """Of the mean step: weights once, K and V of as many tokens as a sequence holds half way."""
    chip = Chip("measured", float("inf"), 0, bandwidth, 0, 1, "a copy")
    return account.roofline_decode(trial.cfg, trial.store, trial.batch, trial.context - trial.steps // 2, chip)


def measure(
    cfg: ModelConfig, candidates: list[str], bandwidth: float, batch: int, context: int, steps: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """candidate -> {tokens_per_second (median, _all), step_seconds, of_roofline, weight_bytes, kv_bytes, ...}, or
    {refused} or {error}."""
    params = jax.block_until_ready(model.init(jax.random.key(0), cfg, jnp.bfloat16))
    entries: dict[str, dict[str, Any]] = {}
    trials, tokens = {}, {}
    for name in candidates:
        try:
            trial = trial_of(cfg, name, batch, context, steps)
            began = time.perf_counter()
            program = compiled(trial, params)
            entries[name] = {"compile_seconds": time.perf_counter() - began, "layout": trial.store.layout}
            tokens[name] = turn(trial, program, params)[1][:, 1]
            trials[name] = (trial, program)
        except (UserError, KernelError) as error:
            entries[name] = {"refused": str(error)}
        except Exception as error:  # whatever a compiler or a full memory raises is this candidate's result
            entries[name] = {"error": kernel_bench.one_line(error)}
    turns = {name: lambda made=made: turn(*made, params)[0] for name, made in trials.items()}
    for name, seconds in kernel_bench.alternate(turns, rounds, entries).items():
        roof, median = roofline(trials[name][0], bandwidth), statistics.median(seconds)
        entries[name] |= {
            "tokens_per_second": batch * steps / median,
            "tokens_per_second_all": [batch * steps / s for s in seconds],
            "step_seconds": median / steps,
            "of_roofline": roof.memory_seconds * steps / median,
            "weight_bytes": roof.weight_bytes,
            "kv_bytes": roof.kv_bytes,
        }
        same = tokens.get("/".join(["xla", *name.split("/")[1:]]))
        if same is not None and not name.startswith("xla"):
            entries[name]["first_tokens_as_xla"] = float((same == tokens[name]).mean())
    return entries


def lines(name: str, setting: dict[str, Any], entries: dict[str, dict[str, Any]]) -> str:
    """The printed text of one model."""
    out = [f"\n{name}, {setting['layers']} layers, batch {setting['batch']}, context {setting['context']}"]
    for candidate, entry in entries.items():
        if "tokens_per_second" not in entry or "error" in entry:
            what = "error" if "error" in entry else "refused"
            out.append(f"  {candidate:28} {what}: {entry.get(what)}")
            continue
        same = entry.get("first_tokens_as_xla")
        out.append(
            f"  {candidate:28} {entry['tokens_per_second']:10.1f} tokens/s  {entry['step_seconds'] * 1e3:8.2f} "
            f"ms a step  {entry['of_roofline']:6.1%} of the roofline of {entry['weight_bytes'] / 1e9:.2f} + "
            f"{entry['kv_bytes'] / 1e9:.2f} GB"
        )
        out[-1] += "" if same is None else f"  {same:.0%} of first tokens as xla's"
    return "\n".join(out)


def run(
    shapes: dict[str, ModelConfig],
    *,
    default: str,
    output: str = "",
    candidates: list[str] = (),
    batch: int = 32,
    context: int = 8192,
    steps: int = 64,
    rounds: int = 5,
    layers: int = 0,
) -> dict[str, Any]:
    """Measures every shape, prints and (on an accelerator, or where `output` says so) writes; returns the record.
    `layers` > 0: only so many of them. Raises UserError for numbers that fit nothing."""
    if not 0 < steps < context or batch < 1 or rounds < 1 or layers < 0:
        raise UserError(
            f"--new={steps} --context={context} --batch={batch} --rounds={rounds} --layers={layers}; give "
            "fewer new tokens than the context has, and at least one row and round."
        )
    here = jax.default_backend()
    wanted = list(candidates) or default_candidates()
    for name in wanted:
        parse(name)
    if output and here == "cpu" and pathlib.Path(output).resolve() == pathlib.Path(default).resolve():
        raise UserError(f"--output is {output}, which holds figures of accelerators, and this is a cpu; name another.")
    path = pathlib.Path(output or default) if output or here != "cpu" else None
    copy = kernel_bench.measure_copy(kernel_bench.COPY_BYTES[here], kernel_bench.MEASURE_SECONDS[here])
    record = {
        "benchmark": "bench_decode_shapes",
        "date": machine.now(),
        "command": " ".join(["python", "-m", "experiments.bench_decode", *sys.argv[1:]]),
        **machine.accelerator(),
        "versions": kernel_rows.versions(),
        "copy": copy,
        "results": {},
    }
    print("" if record["accelerator"] else f"{NO_RESULT}; this checks that the command runs")
    print(f"{record['device_kind']}: copy {copy['bytes_per_second'] / 1e9:.0f} GB/s read and written", flush=True)
    for name, cfg in shapes.items():
        cfg = dataclasses.replace(cfg, n_layers=layers or cfg.n_layers)
        setting = {"batch": batch, "context": context, "steps": steps, "rounds": rounds, "layers": cfg.n_layers}
        entries = measure(cfg, wanted, copy["bytes_per_second"], batch, context, steps, rounds)
        record["results"][name] = {"setting": setting, "candidates": entries}
        print(lines(name, setting, entries), flush=True)
        if path:
            write_whole(path, record)
        gc.collect()
    print(f"\n{bar(record)}" + (f"\nwritten to {path}" if path else f"\nnothing written, {NO_RESULT}"))
    return record


def bar(record: dict[str, Any]) -> str:
    """The project's bar on the 8B shape, as a sentence."""
    found = record["results"].get("llama3-8b", {"setting": {}, "candidates": {}})
    setting = {key: found["setting"].get(key) for key in ("batch", "context", "layers")}
    best = {f"{name}/bfloat16": found["candidates"].get(f"{name}/bfloat16", {}) for name in BACKENDS}
    best = {name: e["of_roofline"] for name, e in best.items() if "of_roofline" in e and "error" not in e}
    text = f"bar: llama3-8b, batch 32, context 8192, bf16, at least {BAR:.0%} of the roofline"
    if not best or setting != {"batch": 32, "context": 8192, "layers": 32}:
        return f"{text}: not measured"
    name = max(best, key=best.get)
    return f"{text}: {name} {best[name]:.1%}, {'met' if best[name] >= BAR else 'NOT MET'}"
