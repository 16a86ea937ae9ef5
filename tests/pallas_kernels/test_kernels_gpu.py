"""Decode over bf16 and f16 caches on Hopper: what the shared suite leaves out, and what the compiler says.

The loops of reference.py are the oracle, in the interpreter, at sizes the suite has no room for: more tiles than fit in
flight, several tiles of query rows, rows without keys. The compiler's report (no GPU needed) is of real sizes:
registers, spills, shared memory, and that nothing of the cache's size is moved.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import KV, KernelError, Leaf, Options, decode_attention, gpu, problem, reference, why_not
from pallas_kernels.contract import NEGATIVE
from pallas_kernels.gpu import aot, dense, latent, schedule
from tests.helpers import kernel_cases
from tests.helpers.kernel_cases import Case
from tests.helpers.tolerances import F32_OP, KERNEL_BF16, KERNEL_STATS, close

needs_gpu_jax = pytest.mark.skipif(not gpu.AVAILABLE, reason="Mosaic GPU kernels need JAX 0.11 or later")

LATENT = dict(heads=16, k_heads=1, v_heads=1, key_dim=576, value_dim=512, view=True)
CASES = {
    "many_tiles": Case(slots=1024, lengths=(1024, 900, 5), heads=4, k_heads=1, v_heads=1),
    "many_tiles_64": Case(slots=1024, lengths=(1024, 900, 5), heads=3, k_heads=1, v_heads=1, key_dim=64, value_dim=64),
    "pages_of_128": Case(slots=1024, page=128, lengths=(1000, 130, 1), heads=4, k_heads=1, v_heads=1),
    "window_far": Case(
        slots=1024, window=130, sinks=70, lengths=(1024, 900, 70), tokens=3, heads=4, k_heads=1, v_heads=1
    ),
    "no_keys": Case(lengths=(0, 256, 0), padded_row=False),
    "rows_130": Case(heads=65, k_heads=1, v_heads=1, tokens=2, lengths=(250, 2)),
    "rows_130_splits": Case(heads=65, k_heads=1, v_heads=1, tokens=2, lengths=(250, 2), splits=2),
    "width_256_64": Case(key_dim=256, value_dim=64, slots=512, lengths=(512, 100), heads=4, k_heads=1, v_heads=1),
    "latent_long": Case(**LATENT, slots=512, lengths=(512, 400, 1)),
    "latent_window": Case(**LATENT, window=100, sinks=5, slots=512, lengths=(512, 90), soft_cap=3.0),
    "latent_rows_80": Case(**LATENT | dict(heads=80), lengths=(200, 64)),
    "latent_splits": Case(**LATENT, lengths=(256, 70), splits=3),
    "width_128_256": Case(key_dim=128, value_dim=256, slots=512, lengths=(512, 100), heads=4, k_heads=1, v_heads=1),
    "view_384": Case(heads=4, k_heads=1, v_heads=1, key_dim=384, value_dim=384, view=True, lengths=(256, 70)),
    "tied": Case(heads=6, k_heads=2, v_heads=2, view=True, start=256, lengths=(500, 257, 3)),
}


@needs_gpu_jax
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_the_loops_at_larger_sizes(name):
    q, kv, positions, options = kernel_cases.build(CASES[name])
    want = reference.decode_attention(q, kv, positions, options)
    run = functools.partial(decode_attention, options=options, backend="mosaic_gpu", interpret=True)
    got = jax.jit(run)(q, kv, positions)
    close(got.out, want.out, KERNEL_BF16, f"{name} out")
    close(got.max, want.max, KERNEL_STATS, f"{name} max")
    close(got.sum, want.sum, KERNEL_STATS, f"{name} sum")


# --- which worker takes what --------------------------------------------------------------------------------------

COUNTS = {
    "uneven": ([5, 0, 17, 1], 3, 7),
    "equal": ([8, 8, 8], 2, 6),
    "one_row": ([9], 1, 4),
    "few_steps": ([1, 1], 1, 5),
    "none": ([0, 0], 2, 3),
    "zeros_at_the_ends": ([0, 3, 0, 0, 4, 0], 2, 5),
    "more_workers": ([2, 3], 1, 132),
}


def _walk(work, count, groups):
    """(row, step, slot) of all that the workers of a table take, worker by worker."""
    for worker, (first, last, low, high) in enumerate(np.asarray(work)):
        for row in range(first, last + 1):
            begin = low if row == first else 0
            end = high if row == last else count[row // groups]
            yield [(row, step, row + worker) for step in range(begin, end)]


MANY = {"many": ([3, 0, 2] * 24, 2, 7), "many_empty": ([0] * 65 + [2], 3, 5), "none_of_many": ([0] * 70, 1, 3)}


@pytest.mark.parametrize("name", COUNTS | MANY)
def test_even_shares_take_every_step_once(name):
    count, groups, workers = (COUNTS | MANY)[name]
    work = schedule.even(jnp.asarray(count, jnp.int32), groups, workers)
    items = list(_walk(work, count, groups))
    taken = [(row, step) for item in items for row, step, _ in item]
    assert sorted(taken) == [(b * groups + j, s) for b, n in enumerate(count) for j in range(groups) for s in range(n)]
    slots = [item[0][2] for item in items if item]
    assert len(set(slots)) == len(slots) and all(0 <= s < schedule.slots(len(count) * groups, workers) for s in slots)
    loads = [sum(len(item) for item in _walk(work[w : w + 1], count, groups)) for w in range(workers)]
    assert max(loads) - min(loads) <= 1
    earlier, total = schedule.before(jnp.asarray(count, jnp.int32))
    for row in range(len(count) * groups):
        b, j = divmod(row, groups)
        first, held = schedule.slots_of(b, j, jnp.int32(count[b]), earlier[b], total[b], groups, workers)
        assert [int(first) + i for i in range(held)] == [item[0][2] for item in items if item and item[0][0] == row]


@pytest.mark.parametrize("splits", [1, 3])
def test_splits_take_every_step_once(splits):
    count, groups = [5, 0, 17, 1], 2
    items = list(_walk(schedule.split(jnp.asarray(count, jnp.int32), groups, splits), count, groups))
    taken = [(row, step) for item in items for row, step, _ in item]
    assert sorted(taken) == [(b * groups + j, s) for b, n in enumerate(count) for j in range(groups) for s in range(n)]
    low = np.asarray(schedule.split(jnp.asarray(count, jnp.int32), groups, splits))[:, schedule.ROW]
    assert [int(x) for x in low] == [row for row in range(len(count) * groups) for _ in range(splits)]


@needs_gpu_jax
@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("turns,width", [(1, 128), (2, 64)])
def test_merged_slots_equal_one_softmax(name, turns, width, rng):
    """Each step is one key, a worker's are dealt to its turns; NaN lies in the slots that no worker wrote."""
    count, groups, workers = COUNTS[name]
    rows = len(count) * groups
    score = rng.normal(size=(rows, max(max(count), 1))).astype(np.float32) * 5 - 30
    value = rng.normal(size=(*score.shape, width)).astype(np.float32)
    slots = schedule.slots(rows, workers)
    acc = np.full((turns, slots, 1, 8, width), np.nan, np.float32)
    top, total = np.full((2, turns, slots, 1, 64), np.nan, np.float32)
    for item in filter(None, _walk(schedule.even(jnp.asarray(count, jnp.int32), groups, workers), count, groups)):
        for turn in range(turns):
            steps = [(row, step) for row, step, _ in item[turn::turns]]
            at, s = (turn, item[0][2], 0, 0), np.array([score[step] for step in steps])
            weight = np.exp2(s - s.max(initial=NEGATIVE))
            v = np.array([value[step] for step in steps]).reshape(-1, width)
            top[at], total[at], acc[at] = s.max(initial=NEGATIVE), weight.sum(), weight @ v
    table = jnp.stack([jnp.asarray(count, jnp.int32), *schedule.before(jnp.asarray(count, jnp.int32))], axis=1)

    def where(table, b, j):
        return schedule.slots_of(b, j, table[b, 0], table[b, 1], table[b, 2], groups, workers)

    got = schedule.merge(
        jnp.asarray(acc), jnp.asarray(top), jnp.asarray(total), table, where, (len(count), 1, groups, groups), True
    )
    for row in range(rows):
        b, j = divmod(row, groups)
        n = count[b]
        weight = np.exp2(score[row, :n] - score[row, :n].max(initial=NEGATIVE))
        want = weight @ value[row, :n] / weight.sum() if n else np.zeros(width)
        close(got.out[b, 0, j], want, F32_OP, f"row {row}")
        close(got.sum[b, 0, j], weight.sum(), F32_OP, f"sum of row {row}")
        close(got.max[b, 0, j], score[row, :n].max() * np.log(2) if n else NEGATIVE, F32_OP, f"max of row {row}")


# --- what is refused ----------------------------------------------------------------------------------------------


@needs_gpu_jax
@pytest.mark.parametrize(
    "change,words",
    [
        (dict(dtype="float32"), "q, K and V are float32"),
        (dict(slots=96, lengths=(90,)), "96 slots are not a multiple of 64"),
        (dict(page=32), "pages hold 32 tokens"),
        (dict(key_dim=96), "head dims are 96 and 128"),
        (dict(heads=513, k_heads=1, v_heads=1), "513 query rows share a K head; at most 512"),
        (dict(LATENT, key_dim=640), "K has head dim 640"),
        (dict(LATENT, value_dim=448), "V is the first 448 columns"),
    ],
)
def test_what_the_kernels_cannot_serve_raises(change, words):
    q, kv, positions, options = kernel_cases.build(Case(**change))
    with pytest.raises(KernelError, match=f"kernel mosaic_gpu cannot serve this: {words}.*xla can"):
        decode_attention(q, kv, positions, options, backend="mosaic_gpu", interpret=True)


def test_before_jax_0_11_everything_is_refused(monkeypatch):
    monkeypatch.setattr(gpu, "AVAILABLE", False)
    q, kv, _, options = kernel_cases.build(Case())
    assert "need JAX 0.11 or later" in why_not("mosaic_gpu", problem(q, kv, options))


# --- what the compiler says ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Real:
    """A decode step of a real model: shapes of q and of the cache, options."""

    batch: int = 8
    slots: int = 8192
    heads: int = 32
    k_heads: int = 8
    key_dim: int = 128
    value_dim: int = 128
    tokens: int = 1
    page: int = 0
    dtype: str = "bfloat16"
    view: bool = False
    ring: int = 0
    options: Options = Options(128**-0.5)

    def arguments(self):
        """(q, kv, positions) of jax.ShapeDtypeStruct."""

        def leaf(dim):
            rows = (
                (self.batch * self.slots // self.page, self.k_heads, self.page)
                if self.page
                else (self.batch, self.k_heads, self.slots)
            )
            return Leaf(aot.abstract(*rows, dim, dtype=self.dtype))

        table = aot.abstract(self.batch, self.slots // self.page, dtype="int32") if self.page else None
        v, length = None if self.view else leaf(self.value_dim), aot.abstract(self.batch, dtype="int32")
        kv = KV(
            leaf(self.key_dim),
            v,
            length,
            table,
            None,
            self.value_dim if self.view else 0,
            self.ring,
            4 if self.ring else 0,
        )
        q = aot.abstract(self.batch, self.tokens, self.heads, self.key_dim, dtype=self.dtype)
        return q, kv, aot.abstract(self.batch, self.tokens, dtype="int32")


LLAMA3_8B = Real()
MLA = Real(k_heads=1, key_dim=576, value_dim=512, view=True)
REAL = {
    "gqa": LLAMA3_8B,
    "gqa_batch_32": Real(batch=32),
    "gqa_batch_64": Real(batch=64, slots=2048),
    "gqa_batch_1": Real(batch=1, slots=131072),
    "gqa_f16": Real(dtype="float16"),
    "tokens_4": Real(tokens=4),
    "window_sinks": Real(options=Options(0.1, window=4096, sinks=4)),
    "ring": Real(slots=1024, ring=1000, options=Options(0.1, window=1000, sinks=4)),
    "soft_cap": Real(options=Options(0.1, soft_cap=50.0)),
    "splits": Real(options=Options(0.1, splits=4)),
    "paged_64": Real(page=64),
    "paged_128": Real(page=128),
    "mqa_256": Real(heads=8, k_heads=1, key_dim=256, value_dim=256),
    "width_64": Real(heads=32, k_heads=8, key_dim=64, value_dim=64),
    "widths_128_256": Real(value_dim=256),
    "rows_128": Real(heads=128, k_heads=1),
    "latent_16": dataclasses.replace(MLA, heads=16),
    "latent_64": dataclasses.replace(MLA, heads=64),
    "latent_128": dataclasses.replace(MLA, heads=128),
    "latent_paged": dataclasses.replace(MLA, heads=64, page=64),
    "latent_tokens": dataclasses.replace(MLA, heads=16, tokens=4),
    "latent_window": dataclasses.replace(MLA, heads=64, options=Options(0.1, window=1000, sinks=4)),
    "tied": Real(view=True),
}


def _launches(hlo):
    """What one call starts on the GPU besides the first kernel: all of the entry computation but what moves nothing."""
    entry = re.search(r"^ENTRY .*?^}", hlo, re.MULTILINE | re.DOTALL)[0]
    ops = re.findall(r"^\s+(?:ROOT )?%[\w.-]+ = (?:\(.*?\)|\S+) ([\w-]+)\(", entry, re.MULTILINE)
    assert ops.count("custom-call") == 2
    return len([op for op in ops if op not in ("parameter", "constant", "bitcast", "get-tuple-element", "tuple")]) - 1


@needs_gpu_jax
@pytest.mark.parametrize("name", REAL)
def test_compiled_for_an_h200_nothing_spills_and_no_cache_is_moved(name):
    case = REAL[name]
    q, kv, positions = case.arguments()
    p = problem(q, kv, case.options)
    plan = (latent if case.view else dense).plan_of(p, kv, False)
    threads = 128 * ((latent.HALVES if case.view else plan.turns) + 1)
    report = aot.compile_report(
        lambda *args: decode_attention(*args, case.options, backend="mosaic_gpu"), q, kv, positions
    )
    assert len(report.kernels) == 2  # the second merges
    assert report.spill_bytes == 0 and report.kernels[0].stack_bytes == 0
    assert report.registers * threads <= aot.REGISTERS
    assert report.shared_bytes <= aot.SHARED_BLOCK and report.ctas_a_core(threads) >= 1
    tile = 2 * 64 * (case.key_dim + (0 if case.view else case.value_dim))
    assert plan.stages * tile >= 128 * 1024 - (case.view and 64 * 1024)  # bytes in flight a core
    cache = kv.k.values.size
    assert report.moved(min(cache, case.batch * case.slots * case.key_dim)) == []
    partials = 4 * plan.turns * plan.slots * plan.tiles * plan.out_rows * case.value_dim
    padded = 2 * case.batch * p.groups * 64 * plan.tiles * case.key_dim
    assert report.temp_bytes <= padded + 1.25 * partials + 2**20, (report.temp_bytes, padded, partials)
    assert _launches(report.hlo_text) <= 6  # besides the kernel's own; each costs microseconds


@needs_gpu_jax
def test_a_step_that_writes_and_reads_donated_caches_copies_nothing():
    """Two layers: the new token of each sequence goes into its own donated arrays, then the kernel reads them."""
    case, layers = LLAMA3_8B, 2
    q, kv, positions = case.arguments()
    cache = [(kv.k.values, kv.v.values)] * layers

    def step(cache, q, length):
        held = []
        for k, v in cache:
            new = q[:, 0, :: case.heads // case.k_heads, None]  # [B,K,1,H]
            k, v = (
                jax.vmap(lambda x, row, at: lax.dynamic_update_slice(x, row, (0, at, 0)))(x, new, length)
                for x in (k, v)
            )
            now = KV(Leaf(k), Leaf(v), length + 1)
            part = decode_attention(q, now, length[:, None], case.options, backend="mosaic_gpu")
            q = part.out.astype(q.dtype)
            held.append((k, v))
        return held, q

    report = aot.compile_report(step, cache, q, kv.length, donate_argnums=(0,))
    assert report.alias_bytes == layers * 2 * 2 * kv.k.values.size
    assert report.temp_bytes < 2**24
    moved = [line for line in report.moved(kv.k.values.size) if line.split()[0] in ("copy", "transpose", "copy-start")]
    assert moved == []


PRINTED = """\
Resources(smem_scratch_bytes=65530, tmem_scratch_cols=0, barrier_counts=Counter({Barrier(arrival_count=1, \
num_barriers=4, orders_tensor_core=False): 2, Barrier(arrival_count=2, num_barriers=1, x=False): 3}), x={})
Resources(smem_scratch_bytes=1024, tmem_scratch_cols=0, barrier_counts=Counter(), scoped_gmem_semaphores={})
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for first_mosaic_gpu_kernel
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 8 bytes cumulative stack size, 1 bytes smem
ptxas info    : Compile time = 326.707 ms
ptxas info    : Compiling entry function 'second_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for second_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 2 barriers, 1 bytes smem
"""


def test_what_ptxas_prints_is_read():
    first, second = aot.parse(PRINTED)
    shared = 65536 + 8 * (2 * 4 + 3)
    assert first == aot.Kernel("first_mosaic_gpu_kernel", 168, 28, 8, shared)
    assert second == aot.Kernel("second_mosaic_gpu_kernel", 40, 0, 0, shared)
    assert first.ctas_a_core(384) == 1 and second.ctas_a_core(256) == 3
    assert aot.parse("") == ()


@needs_gpu_jax
def test_a_program_without_a_kernel_is_no_report():
    with pytest.raises(KernelError, match="no Mosaic GPU kernel"):
        aot.compile_report(lambda x: x + 1, aot.abstract(8, dtype="float32"))
