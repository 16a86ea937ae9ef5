"""The TPU decode kernels beyond the shared suite: pipelines of several blocks and rows, pages of codes, plans; and all
of them compiled ahead of time at real sizes for five generations, with the VMEM they take and no copy of a cache.

The last part compiles in a child (sharding.compiler.aot) with the installed libtpu; no TPU is needed.
"""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import layout as layouts
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import KV, KernelError, Leaf, Options, decode_attention, problem, reference, tpu
from pallas_kernels.tpu import tuning
from sharding.compiler import hlo
from sharding.compiler.aot import CompiledReport, Compiler
from tests.helpers import kernel_cases
from tests.helpers.kernel_cases import Case
from tests.helpers.tolerances import EXACT, KERNEL_BF16, KERNEL_F16, KERNEL_STATS, close

MODES = {
    mode: pltpu.InterpretParams(dma_execution_mode=mode, uninitialized_memory="nan") for mode in ("on_wait", "eager")
}


@pytest.fixture(params=MODES)
def mode(request):
    return MODES[request.param]


def build(case: Case):
    q, kv, positions, options = kernel_cases.build(case)
    return q, kv, positions, options, problem(q, kv, options)


def check(case: Case, mode, tolerance=KERNEL_BF16, **plan) -> None:
    """The kernel under a changed plan equals the loops."""
    q, kv, positions, options, p = build(case)
    plan = dataclasses.replace(tuning.choose(p), **plan)
    assert tpu.supports(p) is None
    got = jax.jit(lambda q, kv, positions: tpu.run(q, kv, positions, p, mode, plan))(q, kv, positions)
    want = reference.decode_attention(q, kv, positions, options)
    close(got.out, want.out, tolerance, "out")
    close(got.max, want.max, KERNEL_STATS, "max")
    close(got.sum, want.sum, KERNEL_STATS, "sum")


# --- pipelines ----------------------------------------------------------------------------------------------------

LONG = Case(slots=640, lengths=(640, 130, 0, 257), heads=4)


PIPELINES = {
    "one_piece_two_buffers": (LONG, dict(pieces=1, sub=128, buffers=2)),
    "two_pieces_three_buffers": (LONG, dict(pieces=2, sub=128)),
    "four_buffers": (LONG, dict(pieces=2, sub=256, buffers=4)),
    "one_core": (LONG, dict(pieces=1, sub=128, cores=1)),
    "empty_rows": (dataclasses.replace(LONG, lengths=(0, 300, 0, 0, 513, 130, 0, 0)), dict(pieces=1, sub=128)),
    "all_empty": (dataclasses.replace(LONG, lengths=(0, 0)), dict(pieces=1, sub=128)),
    "splits": (dataclasses.replace(LONG, splits=2), dict(pieces=2, sub=256)),
    "window_and_sinks": (dataclasses.replace(LONG, window=200, sinks=130), dict(pieces=2, sub=256)),
    "window_of_tokens": (dataclasses.replace(LONG, window=200, sinks=3, tokens=3, splits=2), dict(pieces=1, sub=128)),
    "pages": (dataclasses.replace(LONG, page=128), dict(pieces=2, sub=128, buffers=2)),
    "int8": (dataclasses.replace(LONG, store="int8", v_lanes=True), dict(pieces=2, sub=256)),
}
STORES = {
    "paged_int8": Case(store="int8", v_lanes=True, page=128),
    "paged_int4": Case(store="int4", v_lanes=True, page=128),
    "paged_fp8": Case(store="float8_e4m3fn", page=128),
    "paged_int8_of_64": Case(store="int8", page=64),
    "paged_int8_window": Case(store="int8", page=64, window=70, sinks=5, lengths=(256, 230, 40)),
    "fp8_bf16": Case(store="float8_e4m3fn", v_lanes=True),
    "int4_rows": Case(store="int4"),
    "v_lanes": Case(v_lanes=True),
    "short_rows": Case(lengths=(77, 1)),
    "latent_lanes": Case(
        heads=16, k_heads=1, v_heads=1, key_dim=576, value_dim=512, view=True, k_lanes=True, lengths=(256, 131)
    ),
    "heads_in_shares": Case(heads=16, k_heads=16, v_heads=16, lengths=(256, 131)),
    "heads_in_shares_int8": Case(heads=32, k_heads=16, v_heads=16, store="int8", v_lanes=True, lengths=(256, 131)),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_blocks_and_rows_in_any_number(name, mode):
    case, plan = PIPELINES[name]
    check(case, mode, **plan)


@pytest.mark.parametrize("name", STORES)
def test_stores_beyond_the_suite(name, mode):
    check(STORES[name], mode)


def test_float32(mode):
    check(Case(dtype="float32", heads=4), mode, tolerance=KERNEL_F16)


def test_the_default_plan_of_a_single_row_uses_two_cores():
    p = build(Case(lengths=(900,), slots=8192, heads=8, k_heads=8, v_heads=8))[-1]
    assert (tuning.choose(p).splits, tuning.choose(p).cores) == (2, 2)


def test_unused_table_entries_are_never_read(mode):
    q, kv, positions, options, p = build(Case(page=64, lengths=(256, 77, 1)))
    table = np.array(kv.table)
    table[1, 2:], table[2, 1:] = 10**6, -5  # beyond ceil(77 / 64) and ceil(1 / 64) pages
    other = dataclasses.replace(kv, table=jnp.asarray(table))
    run = jax.jit(lambda kv: tpu.run(q, kv, positions, p, mode))
    close(run(other).out, run(kv).out, EXACT, "out")


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(slots=200, lengths=(200,)), "200 slots are no multiple of 128"),
        (dict(page=16), "a page of 16 tokens is one copy"),
        (dict(page=64, v_lanes=True), "pages of 64 tokens along lanes"),
        (dict(dtype="float16"), "held in float16"),
        (dict(heads=256, k_heads=1, v_heads=1, tokens=16, key_dim=256, value_dim=256, lengths=(256,)), "bytes of VMEM"),
    ],
)
def test_refusals_name_the_limit(change, words):
    q, kv, positions, options = kernel_cases.build(Case(**change))
    with pytest.raises(KernelError, match=f"{words}.*xla can"):
        decode_attention(q, kv, positions, options, backend="mosaic_tpu", interpret=True)


def test_a_page_table_beyond_scalar_memory_is_refused():
    p = dataclasses.replace(build(Case(page=64))[-1], batch=512, slots=64 * 1024)
    assert "scalar memory" in tpu.supports(p)


# --- compiled ahead of time ----------------------------------------------------------------------------------------

SLICES = {"v4": "v4:1x1x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}


@dataclasses.dataclass(frozen=True)
class Real:
    """A problem at real size. `rows_in_lanes`: XLA's own layout of such a cache is along lanes, so that rows are asked
    for with layouts left to the compiler."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    store: str = ""
    k_lanes: bool = False
    v_lanes: bool = False
    view: int = 0
    page: int = 0
    tokens: int = 1
    window: int = 0
    sinks: int = 0
    ring: int = 0
    soft_cap: float = 0.0
    dtype: str = "bfloat16"
    rows_in_lanes: bool = False
    batch: int = 8
    slots: int = 8192


REAL = {
    "gqa8": Real(),
    "mqa_256": Real(heads=8, kv_heads=1, dim=256),
    "mha": Real(kv_heads=32),
    "lanes_64": Real(dim=64, k_lanes=True, v_lanes=True),
    "rows_64": Real(dim=64, rows_in_lanes=True),
    "int8": Real(store="int8", v_lanes=True),
    "int8_lanes": Real(store="int8", k_lanes=True, v_lanes=True),
    "int8_mha": Real(store="int8", kv_heads=32),
    "int4": Real(store="int4", v_lanes=True),
    "fp8": Real(store="float8_e4m3fn", v_lanes=True),
    "latent": Real(heads=16, kv_heads=1, dim=576, view=512, rows_in_lanes=True),
    "latent_lanes": Real(heads=16, kv_heads=1, dim=576, view=512, k_lanes=True),
    "paged_128": Real(page=128),
    "paged_int8": Real(page=128, store="int8", v_lanes=True),
    "paged_latent": Real(page=128, heads=16, kv_heads=1, dim=576, view=512, k_lanes=True),
    "tokens_4": Real(tokens=4),
    "window_sinks": Real(window=1024, sinks=4, soft_cap=30.0),
    "ring": Real(ring=4096, window=4096, sinks=4, slots=4224),
    "float32": Real(dtype="float32"),
    "one_row_128k": Real(batch=1, slots=131072),
}


def operands(real: Real):
    """(q, kv, positions, Options) as shapes."""
    shape = jax.ShapeDtypeStruct
    lead = (real.batch * real.slots // real.page + 8,) if real.page else (real.batch,)
    held = real.page or real.slots

    def leaf(lanes: bool) -> Leaf:
        tile = (real.dim, held) if lanes else (held, real.dim)
        scale = shape((*lead, real.kv_heads, held), jnp.float32) if real.store else None
        return Leaf(shape((*lead, real.kv_heads, *tile), real.store or real.dtype), scale, lanes)

    table = shape((real.batch, real.slots // real.page), jnp.int32) if real.page else None
    kv = KV(
        leaf(real.k_lanes),
        None if real.view else leaf(real.v_lanes),
        shape((real.batch,), jnp.int32),
        table,
        None,
        real.view,
        real.ring,
        real.sinks if real.ring else 0,
    )
    options = Options(real.dim**-0.5, real.window, real.sinks, real.soft_cap)
    return (
        shape((real.batch, real.tokens, real.heads, real.dim), real.dtype),
        kv,
        shape((real.batch, real.tokens), jnp.int32),
        options,
    )


@dataclasses.dataclass
class Program:
    """What a target of sharding.compiler.aot returns: `fn` on every device, all of it whole there."""

    mesh: object
    fn: object
    args: tuple
    formats: tuple
    donate: tuple = ()

    def lower(self, free_layouts: bool = False):
        fn = jax.shard_map(self.fn, mesh=self.mesh, in_specs=P(), out_specs=P(), check_vma=False)
        return jax.jit(fn, in_shardings=self.formats, donate_argnums=self.donate).lower(*self.args)


def attend(mesh, name: str, as_laid_out: bool = False) -> Program:
    """One call of the kernel. `as_laid_out`: every operand in XLA's own layout."""
    q, kv, positions, options = operands(REAL[name])
    whole = NamedSharding(mesh, P())
    free = layouts.Format(layouts.Layout.AUTO, whole) if REAL[name].rows_in_lanes and not as_laid_out else whole
    formats = (whole, jax.tree.map(lambda x: free if len(x.shape) == 4 else whole, kv), whole)

    def fn(q, kv, positions):
        return decode_attention(q, kv, positions, options, backend="mosaic_tpu")

    return Program(mesh, fn, (q, kv, positions), formats)


def loop(mesh, name: str, steps: int) -> Program:
    """`steps` times: one token written into a donated cache, then attention over it."""
    q, kv, positions, options = operands(REAL[name])
    whole = NamedSharding(mesh, P())

    def put(leaf: Leaf, x, at):
        zero, shape = jnp.int32(0), list(leaf.values.shape)
        shape[3 if leaf.lanes else 2] = 1
        where = (zero, zero, zero, at) if leaf.lanes else (zero, zero, at, zero)
        new = jnp.full(shape, x, jnp.float32).astype(leaf.values.dtype)
        return dataclasses.replace(leaf, values=jax.lax.dynamic_update_slice(leaf.values, new, where))

    def fn(q, kv, positions):
        def step(i, carry):
            q, kv = carry
            at = kv.length[0]
            kv = dataclasses.replace(
                kv, k=put(kv.k, q[0, 0, 0, 0], at), v=put(kv.v, q[0, 0, 0, 1], at), length=kv.length + 1
            )
            part = decode_attention(q, kv, jnp.broadcast_to(at, positions.shape), options, backend="mosaic_tpu")
            return part.out.astype(q.dtype), kv

        return jax.lax.fori_loop(0, steps, step, (q, kv))

    return Program(mesh, fn, (q, kv, positions), (whole, jax.tree.map(lambda _: whole, kv), whole), donate=(1,))


@pytest.fixture(scope="module")
def compiler():
    with Compiler(timeout=120) as running:
        yield running


def compiled(compiler, target: str, kwargs: dict, generation: str, path) -> tuple[CompiledReport, hlo.Module]:
    mesh = (2, 1, 1) if generation == "tpu7x" else (1, 1, 1)
    answer = compiler.compile(
        f"tests.pallas_kernels.test_kernels_tpu:{target}", kwargs, SLICES[generation], mesh, hlo_path=str(path)
    )
    assert isinstance(answer, CompiledReport), answer
    return answer, hlo.parse(path.read_text())


def moved(module: hlo.Module, shapes: set[tuple[str, tuple[int, ...]]]) -> list[str]:
    """Operations that make an array of one of these (dtype, dims), other than in place."""
    free = ("parameter", "bitcast", "get-tuple-element", "tuple", "while", "dynamic-update-slice")
    found = []
    for computation in module.computations.values():
        for i in computation.instructions.values():
            made = any((a.dtype, a.dims) in shapes for a in i.arrays)
            if not made or i.op in free or "with_memory_space_constraint" in i.op_name:
                continue
            root = module.computations[i.attribute("calls")].root.op if i.op == "fusion" else ""
            if root != "dynamic-update-slice":
                found.append(f"{i.op} {i.name} {i.arrays[0]}")
    return found


def cache_shapes(name: str) -> set[tuple[str, tuple[int, ...]]]:
    short = {"bfloat16": "bf16", "float32": "f32", "int8": "s8", "int4": "s4", "float8_e4m3fn": "f8e4m3fn"}
    kv = operands(REAL[name])[1]
    leaves = [leaf for leaf in (kv.k, kv.v) if leaf is not None]
    return {(short[x.dtype.name], x.shape) for leaf in leaves for x in jax.tree.leaves(leaf)}


def kernel_config(module: hlo.Module) -> dict:
    """The backend_config of the one Pallas call."""
    everything = [i for computation in module.computations.values() for i in computation.instructions.values()]
    calls = [i for i in everything if "tpu_custom_call" in i.attributes]
    assert len(calls) == 1, [i.name for i in calls]
    text = calls[0].attributes
    return json.JSONDecoder().raw_decode(text[text.index("backend_config=") + len("backend_config=") :])[0]


@pytest.mark.parametrize("generation", SLICES)
def test_compiles_within_vmem_and_without_a_copy_of_a_cache(generation, compiler, tmp_path, record_property):
    for name in REAL if generation != "v4" else ("gqa8", "int8", "latent_lanes"):  # v4: the same core as v5p's
        report, module = compiled(compiler, "attend", {"name": name}, generation, tmp_path / "hlo")
        q, kv, _, options = operands(REAL[name])
        p = problem(q, kv, options)
        assert not moved(module, cache_shapes(name)), (generation, name)
        config = kernel_config(module)
        vmem = sum(int(c["size"]) for c in config["used_scoped_memory_configs"])
        planned = tuning.vmem_bytes(p)
        assert vmem <= planned <= tuning.VMEM_BUDGET < tuning.VMEM_CAPACITY[generation], (name, vmem, planned)
        assert vmem >= tuning.BUFFERS * tuning.choose(p).block * tuning.token_bytes(p, 1, 1), name
        assert int(config["custom_call_config"]["cost_estimate"]["bytes_accessed"]) == tuning.cache_bytes(p)
        record_property(name, f"{vmem} of {planned} bytes, {report.compile_seconds:.2f} s")
        print(generation, name, vmem, planned, round(report.compile_seconds, 2), report.memory.temporaries)


@pytest.mark.parametrize("generation", ["v5e", "tpu7x"])
@pytest.mark.parametrize("name", ["gqa8", "int8", "lanes_64"])
def test_a_loop_of_steps_holds_no_copy_of_the_cache(generation, name, compiler, tmp_path):
    report, module = compiled(compiler, "loop", {"name": name, "steps": 8}, generation, tmp_path / "hlo")
    big = {(dtype, dims) for dtype, dims in cache_shapes(name) if len(dims) == 4}
    assert not moved(module, big)
    cache = 2 * math.prod(next(iter(big))[1]) * tuning.bits(REAL[name].store or REAL[name].dtype) // 8
    assert report.memory.aliased >= cache
    assert report.memory.temporaries < cache // 8


def test_the_copy_check_sees_a_copy(compiler, tmp_path):
    """Rows of 64 in XLA's own layout, which is along lanes: both caches are copied, and `moved` says so."""
    _, module = compiled(compiler, "attend", {"name": "rows_64", "as_laid_out": True}, "v5e", tmp_path / "hlo")
    assert len([m for m in moved(module, cache_shapes("rows_64")) if m.startswith("copy")]) == 2


def test_the_table_of_block_sizes_in_the_docstring():
    """What tuning.py tells of keys in a block."""
    rows = [
        ("gqa8", 512),
        ("mqa_256", 2048),
        ("lanes_64", 1024),
        ("rows_64", 512),
        ("int8", 1024),
        ("int4", 1536),
        ("latent", 1536),
    ]
    for name, keys in rows:
        q, kv, _, options = operands(REAL[name])
        assert tuning.choose(problem(q, kv, options)).block == keys, name
    assert re.search(r"16\s+128\s+8\s+512\s+8\s+128\s+8\s+1024", tuning.__doc__)
