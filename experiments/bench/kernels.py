"""Decode kernels beside their peers and beside the memory's measured speed.

    copy        a jitted in-place negate of a large array: bytes read and written per second, the limit here
    row         one shape: bytes of the cache, and of each candidate the time, bytes/s and fraction of the copy
    candidates  ours (pallas_kernels.BACKENDS), xla, cudnn and tokamax in this process; torch's in a worker

Candidates take turns, round after round, in changing order, on the same inputs (the worker draws its own: its arrays
are torch's). Each is checked against a float32 result first: a wrong one is an error in the row, not a figure. A time
is that of one call in a loop of calls in one program, where nothing can be hoisted: every call waits for the last.
"""

import dataclasses
import functools
import gc
import math
import os
import pathlib
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import kernel_report as report
from experiments.bench.kernel_candidates import Call, candidates, query_dtype, truth
from experiments.bench.kernel_rows import Rows
from experiments.bench.kernel_shapes import Shape, cache_bytes, inputs, sweep
from experiments.common import machine
from experiments.common.child import Child, ChildError
from kvattn.errors import UserError
from pallas_kernels import BACKENDS, KV, KernelError

WRONG = 2e-2  # |out - float32| / |float32|: probabilities rounded to bf16 give about 3e-3
MEASURE_SECONDS = {"cpu": 1e-4, "gpu": 25e-3, "tpu": 25e-3}  # at the copy's speed; a slower candidate takes longer
COPY_BYTES = {"cpu": 64 << 20, "gpu": 2 << 30, "tpu": 1 << 30}
COPY_ROUNDS = 9
UNROLL = 4


# --- what is timed ----------------------------------------------------------------------------------------------


def chained(call: Call, calls: int) -> Callable[..., tuple[jax.Array, ...]]:
    """(q, kv, positions) -> the last UNROLL of `calls` results (a multiple of it), each made after the one before it.

    The number of turns is static: with one that is not, a GPU waits for the host at every turn. UNROLL calls share what
    a turn of the loop costs. Nothing may be hoisted or merged, so a call's inputs depend on the last result; and every
    result of a turn is carried on, so that none is made in part."""

    def run(q, kv, positions):
        like = jax.eval_shape(call, q, kv, positions)

        def body(_, outs):
            made = [outs[-1]]
            for _ in range(UNROLL):
                made.append(call(*after(made[-1], q, kv, positions)))
            return tuple(made[1:])

        return jax.lax.fori_loop(0, calls // UNROLL, body, (jnp.zeros(like.shape, like.dtype),) * UNROLL)

    return run


def after(out: jax.Array, q: jax.Array, kv: Any, positions: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
    """The inputs again, equal bit by bit but known only when `out` is, by one number of it, so that it becomes part of
    what reads them. The barrier keeps conversions of K and V in the loop on a GPU, where they would be a peer's; other
    compilers may lift them. A peer's own form of K and V and their length are handed on as they are."""
    one = out[0, 0, 0, 0].astype(jnp.float32)
    q = (q.astype(jnp.float32) + 1e-30 * one).astype(q.dtype)
    if not isinstance(kv, KV):
        return q, kv, positions
    zero = (one > 1e30).astype(jnp.int32)
    k, v, _ = jax.lax.optimization_barrier((kv.k, kv.v, zero))
    return q, dataclasses.replace(kv, k=k, v=v, length=kv.length + zero), positions + zero


def measure_copy(size: int, seconds: float, rounds: int = COPY_ROUNDS) -> dict[str, Any]:
    """{bytes_per_second: median, all: every round, array_bytes}: -x in place, read and write counted."""
    x, turns = jnp.ones((size // 4,), jnp.float32), max(2, math.ceil(seconds / (2 * size / 4e12)))
    if jax.default_backend() == "cpu":
        turns = 2
    negate = jax.jit(lambda x: jax.lax.fori_loop(0, turns, lambda _, y: -y, x), donate_argnums=0)
    x = jax.block_until_ready(negate(x))
    speeds = []
    for _ in range(rounds):
        began = time.perf_counter()
        x = jax.block_until_ready(negate(x))
        speeds.append(2 * size * turns / (time.perf_counter() - began))
    return {"bytes_per_second": statistics.median(speeds), "all": speeds, "array_bytes": size}


def launches(hlo: str) -> float | None:
    """Kernels and copies that one call starts on a GPU: those of the loop's body over UNROLL; None without a loop."""
    if jax.default_backend() != "gpu":
        return None
    body = re.search(r"while\(.*body=%?([\w.-]+)", hlo)
    if body is None:
        return None
    text = re.search(rf"^%?{re.escape(body[1])} .*?^}}", hlo, re.MULTILINE | re.DOTALL)
    return len(re.findall(r" (?:fusion|custom-call|copy|copy-start|sort)\(", text[0])) / UNROLL if text else None


# --- one row ----------------------------------------------------------------------------------------------------


class Torch:
    """torch's candidates in a worker (bench/peers/torch_attention_worker.py). `child` None: there is none, for the
    reason `why`."""

    def __init__(self, child: Child | None, why: str = ""):
        self.child, self.why = child, why

    def about(self) -> dict[str, Any]:
        """{versions, l2_bytes, missing: name -> why}; {missing: {"torch": why}} where it cannot work at all."""
        if self.child is None:
            return {"versions": {}, "missing": {"torch": self.why}}
        try:
            answer = self.child.ask("about")
        except ChildError as error:
            answer = {"versions": {}, "missing": {"torch": f"torch's worker ended: {error}"}}
        if "torch" in answer["missing"]:
            self.close()
            self.child, self.why = None, answer["missing"]["torch"]
        return answer

    def prepare(self, shape: Shape, calls: int) -> dict[str, dict[str, Any]]:
        """Entries of its candidates for this shape, checked by the worker against float32 on its own inputs."""
        if self.child is None:
            return {"torch": {"refused": self.why}}
        request = dataclasses.asdict(shape) | {"lengths": shape.lengths.tolist(), "scale": shape.scale}
        try:
            return self.child.ask("prepare", shape=request, calls=calls, wrong=WRONG)
        except ChildError as error:
            return {"torch": {"error": f"torch's worker ended: {error}"}}

    def turn(self, name: str) -> float:
        """Seconds of one call."""
        return self.child.ask("turn", name=name)["seconds"]

    def close(self) -> None:
        if self.child is not None:
            self.child.close()


def check(out: jax.Array, want: jax.Array) -> dict[str, Any]:
    """{max_error, relative_error} of a result against the float32 one, and `error` where it is wrong."""
    difference = out.astype(jnp.float32) - want
    entry: dict[str, Any] = {
        "max_error": float(jnp.abs(difference).max()),
        "relative_error": float(jnp.linalg.norm(difference.ravel()) / jnp.linalg.norm(want.ravel())),
    }
    if not entry["relative_error"] <= WRONG:  # NaN too
        entry["error"] = f"wrong: |out - float32| / |float32| is {entry['relative_error']:.2g}, above {WRONG:g}"
    return entry


def measure_row(shape: Shape, limit: float, rounds: int, torch: Torch) -> dict[str, Any]:
    """The row of one shape; `limit`: the copy's bytes per second."""
    q, kv, positions, options = inputs(shape, query_dtype(shape))
    size, held = cache_bytes(kv), {}
    calls = calls_of(size, limit)
    want = truth(q, kv, positions, options)
    entries: dict[str, dict[str, Any]] = {}
    turns: dict[str, Callable[[], float]] = {}
    for name, candidate in candidates(shape, q, kv, options).items():
        if isinstance(candidate, str):
            entries[name] = {"refused": candidate}
            continue
        try:
            if candidate.prepare not in held:
                held[candidate.prepare] = jax.block_until_ready(candidate.prepare(kv))
            args = (q, held[candidate.prepare], positions)
            program = jax.jit(chained(candidate.call, calls)).lower(*args).compile()
            entries[name] = check(program(*args)[-1], want) | {"launches": launches(program.as_text())}
            turns[name] = functools.partial(_turn, program, args, calls)
        except KernelError as error:
            entries[name] = {"refused": str(error)}
        except Exception as error:  # whatever a compiler or driver raises is this candidate's result
            entries[name] = {"error": one_line(error)}
    theirs = torch.prepare(shape, calls)
    entries |= theirs
    turns |= {name: functools.partial(torch.turn, name) for name in theirs}
    times = alternate(
        {name: turn for name, turn in turns.items() if not {"error", "refused"} & set(entries[name])}, rounds, entries
    )
    for name, seconds in times.items():
        entries[name] |= figures(seconds, size, shape.batch, limit)
    return {
        "shape": dataclasses.asdict(shape),
        "query_dtype": q.dtype.name,
        "cache_bytes": size,
        "calls": calls,
        "copy_bytes_per_second": limit,
        "date": machine.now(),
        "kernels": entries,
        **report.against(entries, list(BACKENDS)),
    }


def calls_of(size: int, limit: float) -> int:
    """Calls of one measurement, a multiple of UNROLL: MEASURE_SECONDS of them at the copy's speed and 3 us a call."""
    seconds = MEASURE_SECONDS[jax.default_backend()]
    return UNROLL * min(max(math.ceil(seconds / (size / limit + 3e-6) / UNROLL), 1), 500)


def _turn(program: Any, args: tuple, calls: int) -> float:
    began = time.perf_counter()
    jax.block_until_ready(program(*args))
    return (time.perf_counter() - began) / calls


def alternate(
    turns: dict[str, Callable[[], float]], rounds: int, entries: dict[str, dict[str, Any]]
) -> dict[str, list[float]]:
    """Seconds of every round of every candidate, in turns, the order turned around every round; one that fails is left
    out, with the reason in `entries`."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        for name in list(times) if number % 2 == 0 else list(reversed(times)):
            try:
                times[name].append(turns[name]())
            except Exception as error:
                entries[name]["error"] = one_line(error)
                del times[name]
    return times


def figures(seconds: list[float], size: int, batch: int, limit: float) -> dict[str, Any]:
    """Figures of one candidate in a row."""
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "min": min(seconds),
        "max": max(seconds),
        "all": seconds,
        "bytes_per_second": size / median,
        "fraction": size / median / limit,
        "tokens_per_second": batch / median,
    }


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


# --- a run ------------------------------------------------------------------------------------------------------


def choose_sweep(name: str, default: str) -> tuple[list[Shape], pathlib.Path | None]:
    """(shapes, `default` as the output where figures are results). Raises UserError for a sweep that needs an
    accelerator on a machine without."""
    cpu = jax.default_backend() == "cpu"
    name = name or ("quick" if cpu else "default")
    shapes = sweep(name)
    if cpu and name != "quick":
        raise UserError(
            f"--sweep={name} needs a GPU or TPU and this is a cpu; use --sweep=quick, which checks the "
            "command and measures nothing."
        )
    return shapes, None if cpu else pathlib.Path(default)


def run(
    sweep_name: str,
    *,
    default: str,
    output: str = "",
    rounds: int = 7,
    seconds: float = 0,
    only: str = "",
    torch: Torch,
) -> dict[str, Any]:
    """Measures the rows of a sweep that `output` does not have yet, for at most `seconds` (0 = all of them), printing
    and writing each as it comes; returns the record. Raises UserError for flags that fit nothing here."""
    if torch.child is not None:  # room for the worker's arrays; JAX reads this when it first sees the device
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
    shapes, path = choose_sweep(sweep_name, default)
    shapes = [shape for shape in shapes if only in shape.name]
    if rounds < 1 or not shapes:
        raise UserError(f"--rounds is {rounds} and --only is {only!r}; give at least 1, and part of a row name.")
    here = jax.default_backend()
    if here == "cpu":
        torch = Torch(None, "not asked on a cpu")
    if output and here == "cpu" and pathlib.Path(output).resolve() == pathlib.Path(default).resolve():
        raise UserError(f"--output is {output}, which holds figures of accelerators, and this is a cpu; name another.")
    path = pathlib.Path(output) if output else path
    began, about = time.monotonic(), torch.about()
    rows = Rows(path, about)
    record = rows.record
    record["copy"] = measure_copy(COPY_BYTES[here], MEASURE_SECONDS[here])
    print(report.head(record), flush=True)
    left = [shape for shape in shapes if shape.name not in record["rows"]]
    for shape in left:
        if seconds and time.monotonic() - began > seconds:
            break
        try:
            row = measure_row(shape, record["copy"]["bytes_per_second"], rounds, torch)
        except Exception as error:  # mostly memory: the other rows are still worth having
            record["errors"][shape.name] = one_line(error)
            print(f"\n{shape.name}   error: {one_line(error)}", flush=True)
            continue
        rows.add(shape.name, row)
        print(report.lines(shape.name, row, record["l2_bytes"]), flush=True)
        jax.clear_caches()
        gc.collect()
    todo = [shape.name for shape in shapes if shape.name not in record["rows"]]
    print(report.tail(len(shapes) - len(left), len(left) - len(todo), len(todo), path), flush=True)
    return record
