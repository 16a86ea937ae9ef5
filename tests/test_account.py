"""The ledger: the papers' published numbers, and declared == allocated == compiled for every variant x store."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from kvattn import account, cache, model
from kvattn.attention.heads import heads_model
from kvattn.config import CacheConfig, MaskConfig, ModelConfig
from kvattn.convert.cla import cla_sources
from kvattn.convert.mlkv import mlkv_sources
from kvattn.errors import UserError
from sharding.cost import hardware
from tests.helpers import tiny

BF16 = CacheConfig(dtype="bfloat16")

LLAMA3_8B = heads_model(
    vocab_size=128256,
    d_model=4096,
    n_layers=32,
    n_heads=32,
    n_k_heads=8,
    n_v_heads=8,
    head_dim=128,
    v_head_dim=128,
    d_ff=14336,
    tied_embeddings=False,
)
SMOLLM2 = heads_model(
    vocab_size=49152,
    d_model=576,
    n_layers=30,
    n_heads=9,
    n_k_heads=3,
    n_v_heads=3,
    head_dim=64,
    v_head_dim=64,
    d_ff=1536,
)


def cla_1b(head_dim, n_heads, kv_heads, sources) -> ModelConfig:
    return heads_model(
        d_model=2048,
        n_layers=20,
        d_ff=5472,
        n_heads=n_heads,
        n_k_heads=kv_heads,
        n_v_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        kv_source=sources,
    )


KEEP_ENDS = (0, *(1 + 2 * (i // 2) for i in range(18)), 19)
DENSE_FRONT = (*range(10), *(9,) * 9, 19)
DENSE_BACK = (0, *(1,) * 10, *range(11, 20))  # the ten that read index 1 include layer 1 itself

# arXiv 2405.12981, the 1B design-space table: head width, query heads, KV heads, kv_source, KV layers, bytes/token.
CLA_TABLE = {
    "H128-MHA": (128, 16, 16, (), 20, 163840),
    "H128-GQA4": (128, 16, 4, (), 20, 40960),
    "H128-GQA2": (128, 16, 2, (), 20, 20480),
    "H128-MQA": (128, 16, 1, (), 20, 10240),
    "H64-MQA": (64, 32, 1, (), 20, 5120),
    "H46-MQA": (46, 45, 1, (), 20, 3680),
    "H32-MQA": (32, 64, 1, (), 20, 2560),
    "H512-MQA-CLA2": (512, 4, 1, 2, 10, 20480),
    "H256-MQA-CLA2": (256, 8, 1, 2, 10, 10240),
    "H128-MQA-CLA2": (128, 16, 1, 2, 10, 5120),
    "H90-MQA-CLA2": (90, 22, 1, 2, 10, 3600),
    "H64-MQA-CLA2": (64, 32, 1, 2, 10, 2560),
    "H256-GQA4-CLA2": (256, 8, 4, 2, 10, 40960),
    "H128-GQA4-CLA2": (128, 16, 4, 2, 10, 20480),
    "H128-GQA2-CLA2": (128, 16, 2, 2, 10, 10240),
    "H128-MQA-CLA3": (128, 16, 1, 3, 7, 3584),
    "H128-MQA-CLA4": (128, 16, 1, 4, 5, 2560),
    "H128-MQA-CLA2-KeepEnds": (128, 16, 1, KEEP_ENDS, 11, 5632),
    "H128-MQA-CLA2-DenseFront": (128, 16, 1, DENSE_FRONT, 11, 5632),
    "H128-MQA-CLA2-DenseBack": (128, 16, 1, DENSE_BACK, 11, 5632),
}


@pytest.mark.parametrize("name", CLA_TABLE)
def test_cla_table(name):
    head_dim, n_heads, kv_heads, sharing, layers, expected = CLA_TABLE[name]
    sources = cla_sources(20, sharing) if isinstance(sharing, int) else sharing
    cfg = cla_1b(head_dim, n_heads, kv_heads, sources)
    assert len(cfg.sources) == 20
    assert len(cfg.owners) == layers
    assert account.kv_bytes_per_token(cfg, BF16) == expected
    assert account.cache_bytes(cfg, BF16, 3, 101) == 3 * 101 * expected


def test_cla_3b_table():
    """arXiv 2405.12981, tuned runs at 3B: D = 3072, L = 32."""
    for head_dim, factor, expected in ((128, 1, 16384), (128, 2, 8192), (64, 1, 8192), (64, 2, 4096), (32, 1, 4096)):
        cfg = heads_model(
            n_layers=32,
            n_heads=4,
            n_k_heads=1,
            n_v_heads=1,
            head_dim=head_dim,
            v_head_dim=head_dim,
            kv_source=cla_sources(32, factor),
        )
        assert account.kv_bytes_per_token(cfg, BF16) == expected


def test_published_bytes_per_token():
    assert account.kv_bytes_per_token(LLAMA3_8B, BF16) == 131072
    assert account.kv_bytes_per_token(SMOLLM2, BF16) == 2 * 30 * 3 * 64 * 2
    # DiffQKV: n_k d_k + n_v d_v elements; Sigma-1.5B has 26 layers, 32 query, 4 K, 16 V heads (arXiv 2501.13629).
    sigma = heads_model(n_layers=26, n_heads=32, n_k_heads=4, n_v_heads=16, head_dim=64, v_head_dim=96)
    assert account.kv_bytes_per_token(sigma, BF16) == 26 * (4 * 64 + 16 * 96) * 2
    # MQA: k + v elements per token and layer whatever the number of query heads (arXiv 1911.02150).
    for heads in (1, 7, 16):
        mqa = heads_model(n_layers=6, n_heads=heads, n_k_heads=1, n_v_heads=1, head_dim=128, v_head_dim=128)
        assert account.kv_bytes_per_token(mqa, BF16) == 6 * (128 + 128) * 2
    tied = heads_model(n_layers=5, n_heads=6, n_k_heads=3, n_v_heads=3, tied_kv=True)
    assert account.kv_bytes_per_token(tied, BF16) == 5 * 3 * 16 * 2


def test_mlkv_total_heads():
    """arXiv 2406.09297 on Pythia-160M (12 layers, 12 heads of 64): MLKV-n has n KV heads in the whole model."""
    for owners, heads, total in (
        (12, 12, 144),
        (12, 4, 48),
        (4, 12, 48),
        (12, 1, 12),
        (4, 3, 12),
        (6, 1, 6),
        (1, 1, 1),
    ):
        cfg = heads_model(
            n_layers=12,
            n_heads=12,
            n_k_heads=heads,
            n_v_heads=heads,
            head_dim=64,
            v_head_dim=64,
            kv_source=mlkv_sources(12, owners),
        )
        assert account.kv_bytes_per_token(cfg, BF16) == 2 * total * 64 * 2


# --- declared == allocated == compiled -----------------------------------------------------------------

STORES = {
    "full_f32": CacheConfig(kinds=("full",), dtype="float32"),
    "full_bf16": CacheConfig(kinds=("full",), dtype="bfloat16"),
    "ring_f32": CacheConfig(kinds=("ring",), dtype="float32"),
    "ring_bf16": CacheConfig(kinds=("ring",), dtype="bfloat16"),
    "by_mask_bf16": CacheConfig(kinds=("by_mask",), dtype="bfloat16"),
    "full_int8": CacheConfig(dtype="int8"),
    "by_mask_fp8": CacheConfig(kinds=("by_mask",), dtype="float8_e4m3fn", layout="lanes", multiple=4),
    "full_int4": CacheConfig(dtype="int4", multiple=16),
    "full_int8_channel": CacheConfig(dtype="int8", key_scale="channel", layout="v_lanes"),
    "paged_bf16": CacheConfig(kinds=("paged",), dtype="bfloat16", page_size=16),
    "paged_int4": CacheConfig(kinds=("paged",), dtype="int4", layout="lanes", page_size=16, pages=5),
}
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "float8_e4m3fn": 8, "int4": 4}
PACKED = jax.__version_info__ >= (0, 11)  # older: XLA:CPU holds an int4 in a byte of its own


def by_hand(cfg, store, batch, capacity) -> int:
    """Bytes by the formulas of the sheets, written apart from the library."""
    total = 0
    for layer in range(cfg.n_layers):
        if cfg.kv_source and cfg.kv_source[layer] != layer:
            continue
        readers = [r for r in range(cfg.n_layers) if (cfg.kv_source or tuple(range(cfg.n_layers)))[r] == layer]
        masks, own = [cfg.mask(r) for r in readers], cfg.attention(layer)
        ring = store.kinds[0] in ("ring", "by_mask") and all(m.window for m in masks)
        widest = max(m.window for m in masks) + max(m.sinks for m in masks)
        elements = own.n_k_heads * own.head_dim + (0 if own.tied_kv else own.n_v_heads * own.v_head_dim)
        heads = own.n_k_heads + (0 if own.tied_kv else own.n_v_heads)
        slots = min(capacity, widest) if ring else capacity
        tokens = batch * -(-slots // store.multiple) * store.multiple
        if store.kinds == ("paged",):
            tokens = 16 * (1 + (store.pages or batch * -(-capacity // 16)))
        total += elements * tokens * BITS[store.dtype]
        if store.key_scale == "channel":
            total += 32 * (batch * own.n_k_heads * own.head_dim + tokens * own.n_v_heads)
        elif BITS[store.dtype] < 16:
            total += 32 * tokens * heads
    assert total % 8 == 0
    return total // 8


def test_declared_allocated_compiled():
    """Every tiny model x every store: one number, four ways. Illegal cells raise, and are counted."""
    batch, capacity = 3, 11
    legal = illegal = 0
    for name, cfg in tiny.CASES.items():
        for store_name, store in STORES.items():
            where = f"{name} x {store_name}"
            ring_without_window = store.kinds == ("ring",) and not all(layer.mask.window for layer in cfg.layers)
            no_v = cfg.attention(0).tied_kv and (store.layout == "v_lanes" or store.key_scale == "channel")
            if cfg.scan_layers or ring_without_window or no_v:
                with pytest.raises(UserError):
                    account.cache_bytes(cfg, store, batch, capacity)
                with pytest.raises(UserError):
                    cache.create(cfg, store, batch, capacity)
                illegal += 1
                continue
            declared = account.cache_bytes(cfg, store, batch, capacity)
            caches = cache.create(cfg, store, batch, capacity)
            leaves = jax.tree.leaves([c.leaves for c in caches if c is not None])
            counters = sum(x.nbytes for x in jax.tree.leaves([c.address for c in caches if c is not None]))
            assert declared == by_hand(cfg, store, batch, capacity), where
            assert declared == cache.nbytes(caches), where
            pages = 1 if store.kinds == ("paged",) else 0  # of a row, at this capacity: its table has one entry
            assert counters == 4 * batch * len(cfg.owners) * (1 + pages)
            legal += 1
            if store.dtype == "int4" and not PACKED:
                continue
            assert declared == sum(leaf.on_device_size_in_bytes() for leaf in leaves), where
            compiled = jax.jit(lambda c: jax.tree.map(lambda y: y + y, c), donate_argnums=0).lower(caches).compile()
            assert compiled.memory_analysis().argument_size_in_bytes == declared + counters, where
            assert compiled.memory_analysis().alias_size_in_bytes == declared + counters, where
    assert legal + illegal == len(tiny.CASES) * len(STORES)
    assert illegal >= len(STORES)  # the scanned model, and rings on models without windows


@pytest.mark.parametrize(
    ("name", "store"),
    [
        ("uneven_kv", "by_mask_bf16"),
        ("tied_kv", "by_mask_bf16"),
        ("cla3", "by_mask_bf16"),
        ("mqa_cla2_pattern", "by_mask_bf16"),
        ("uneven_kv", "full_int8_channel"),
        ("mqa_cla2_pattern", "by_mask_fp8"),
        ("tied_kv", "full_int8"),
        ("cla3", "paged_bf16"),
    ],
)
def test_decode_step_compiles_to_the_declared_bytes(name, store):
    """The real decode step: its arguments are the parameters, the caches and one token per row, no byte more,
    and every cache byte is updated in place."""
    cfg, store, batch, capacity = tiny.CASES[name], STORES[store], 2, 13
    params = model.init(jax.random.key(3), cfg)
    caches = cache.create(cfg, store, batch, capacity)

    def step(params, tokens, positions, caches):
        return model.forward(params, cfg, model.Inputs(tokens, positions), caches=caches)

    column = jnp.zeros((batch, 1), jnp.int32)
    lowered = jax.jit(step, donate_argnums=3).lower(params, column, column, caches)
    memory = lowered.compile().memory_analysis()
    kv = account.cache_bytes(cfg, store, batch, capacity)
    kv += 4 * batch * len(cfg.owners) * (2 if store.kinds == ("paged",) else 1)  # lengths, tables of one page a row
    assert memory.argument_size_in_bytes == 4 * account.param_count(cfg) + kv + 2 * column.nbytes
    assert memory.alias_size_in_bytes == kv


def test_bytes_at_a_context_and_longest_context():
    window = tiny.config(masks=(MaskConfig(window=5, sinks=2), MaskConfig()))  # layers 1 and 3 see everything
    ring = CacheConfig(kinds=("by_mask",), dtype="bfloat16")
    element = (3 * 10 + 3 * 14) * 2
    assert account.kv_bytes_per_token(window, ring) == 4 * element
    assert account.kv_bytes_per_token(window, ring, context=100) == (2 * 100 + 2 * 7) * element / 100
    assert account.max_context(window, ring, (2 * 100 + 2 * 7) * element) == 100
    assert account.max_context(window, ring, (2 * 100 + 2 * 7) * element - 1) == 99
    assert account.max_context(window, ring, 0) == 0
    assert account.max_context(tiny.CASES["window"], CacheConfig(kinds=("ring",)), 10**6) is None


def test_bytes_of_codes_and_pages():
    """Llama-3-8B by hand: 64 leaves of 8 heads; int8 8 + 32/128 bits an element, int4 4 + 32/128, fp8 as int8."""
    per_head = {"int8": 128 + 4, "float8_e4m3fn": 128 + 4, "int4": 64 + 4}
    for name, size in per_head.items():
        assert account.kv_bytes_per_token(LLAMA3_8B, CacheConfig(dtype=name)) == 64 * 8 * size
    channel = CacheConfig(dtype="int8", key_scale="channel")
    assert account.kv_bytes_per_token(LLAMA3_8B, channel) == 32 * 8 * (128 + 132)
    assert account.cache_bytes(LLAMA3_8B, channel, 3, 100) == 300 * 32 * 8 * 260 + 3 * 32 * 8 * 128 * 4
    paged = CacheConfig(kinds=("paged",), dtype="bfloat16", page_size=64, pages=100)
    assert account.cache_bytes(LLAMA3_8B, paged, 4, 1000) == 101 * 64 * 131072  # whatever is asked of the pool
    assert account.max_context(LLAMA3_8B, paged, 101 * 64 * 131072, 4) == 25 * 64
    assert account.max_context(LLAMA3_8B, paged, 101 * 64 * 131072 - 1, 4) == 0
    whole = CacheConfig(kinds=("paged",), dtype="bfloat16", page_size=64)
    assert account.max_context(LLAMA3_8B, whole, 101 * 64 * 131072, 4) == 25 * 64
    rounded = CacheConfig(dtype="bfloat16", multiple=128)
    assert account.cache_bytes(LLAMA3_8B, rounded, 2, 129) == 2 * 256 * 131072
    odd = tiny.config(n_layers=1, n_k_heads=1, n_v_heads=1, head_dim=3, v_head_dim=2, n_heads=1, d_model=3)
    assert account.kv_bytes_per_token(odd, CacheConfig(dtype="int4")) == 2.5 + 8


def test_longest_context_of_palm():
    """arXiv 2211.05102, section 3.3: PaLM 540B, 64 chips, 30 % of each chip's 32 GiB for K and V."""
    budget = int(0.3 * 32 * 2**30)
    for head_dim, batch, expected in (
        (128, 128, 1333),
        (128, 512, 333),
        (256, 128, 666),
        (256, 2, 42654),
        (256, 8, 10663),
    ):
        per_chip = heads_model(
            n_layers=118, n_heads=1, n_k_heads=1, n_v_heads=1, head_dim=head_dim, v_head_dim=head_dim
        )
        assert abs(account.max_context(per_chip, BF16, budget, batch) - expected) <= 1


# --- parameters and FLOPs ------------------------------------------------------------------------------


def test_param_count(tiny_case):
    _, cfg = tiny_case
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), cfg))
    assert account.param_count(cfg) == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_published_param_counts():
    assert account.param_count(SMOLLM2) == 134_515_008  # the number in the checkpoint's own card and file
    assert account.param_count(LLAMA3_8B) == 8_030_261_248
    for layers, d, f, heads, billions in ((32, 4096, 16384, 16, 8.63), (64, 8192, 32768, 32, 62.5)):
        palm = heads_model(
            vocab_size=256128,
            d_model=d,
            n_layers=layers,
            d_ff=f,
            n_heads=heads,
            n_k_heads=1,
            n_v_heads=1,
            head_dim=256,
            v_head_dim=256,
            residual="parallel_palm",
        )
        assert abs(account.param_count(palm) / 1e9 - billions) < 0.01 * billions


def dot_flops(jaxpr) -> int:
    """2 x multiply-adds of every dot_general in a jaxpr, calls included."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[i] for i in contract)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * dot_flops(inner)
    return total


def test_flops_equal_the_matmuls_of_the_traced_model(tiny_case):
    """Oracle: the dot_generals of the model itself. The reference attention computes the whole square, so the
    windowed models are charged as if they saw everything."""
    _, cfg = tiny_case
    batch, length = 2, 7
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), cfg))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    forward = jax.make_jaxpr(lambda p, t: model.forward(p, cfg, model.Inputs(t))[0].logits)(abstract, tokens)
    unmasked = cfg.replace(masks=(MaskConfig(),), scan_layers=False)
    charged = account.flops_per_token(unmasked, length, "train") / 3
    assert dot_flops(forward.jaxpr) == batch * length * charged

    if cfg.scan_layers:
        return
    context = 11
    caches = cache.specs(cfg, CacheConfig(), batch, context)

    def step(params, token, caches):
        inputs = model.Inputs(token, jnp.full((batch, 1), context - 1, jnp.int32))
        return model.forward(params, cfg, inputs, caches=caches)[0].logits

    token = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    decode = jax.make_jaxpr(step)(abstract, token, caches)
    assert dot_flops(decode.jaxpr) == batch * account.flops_per_token(unmasked, context, "decode")

    prefill = jax.make_jaxpr(lambda p, t: model.forward(p, cfg, model.Inputs(t, last_only=True))[0].logits)(
        abstract, tokens
    )
    charged = batch * length * account.flops_per_token(unmasked, length, "prefill")
    np.testing.assert_allclose(dot_flops(prefill.jaxpr), charged, rtol=1e-12)


def test_attention_flops_follow_the_query_heads():
    """SQA, arXiv 2510.01817: 4 B Hq N^2 dh per layer, ratio to MHA = Hq / H exactly, in every phase."""
    sizes = dict(d_model=256, n_layers=8, head_dim=16, v_head_dim=16)
    mha = heads_model(n_heads=16, n_k_heads=16, n_v_heads=16, **sizes)
    sqa = heads_model(n_heads=4, n_k_heads=1, n_v_heads=1, **sizes)
    n = 1024
    assert n * account.flops(mha, n, "train").attention == 3 * 8 * 4 * 16 * n**2 * 16
    for phase in account.PHASES:
        ratio = account.flops(sqa, n, phase).attention / account.flops(mha, n, phase).attention
        assert ratio == 4 / 16
        gqa = heads_model(n_heads=16, n_k_heads=2, n_v_heads=2, **sizes)
        assert account.flops(gqa, n, phase).attention == account.flops(mha, n, phase).attention


def test_attention_flops_follow_the_mask():
    """Brute force over the mask's own pairs."""
    context = 13
    for mask in (MaskConfig(), MaskConfig(window=5), MaskConfig(window=5, sinks=2), MaskConfig(window=40)):
        cfg = tiny.config(n_layers=1, masks=(mask,))
        q, k = np.arange(context)[:, None], np.arange(context)[None, :]
        seen = (k <= q) & ((q - k < mask.window) | (k < mask.sinks) if mask.window else True)
        heads = cfg.attention(0)
        per_key = 2 * heads.n_heads * (heads.head_dim + heads.v_head_dim)
        decode = account.flops(cfg, context, "decode").attention
        assert decode == per_key * seen[-1].sum()
        for phase, times in (("prefill", 1), ("train", 3)):
            got = account.flops(cfg, context, phase, visible=True).attention
            np.testing.assert_allclose(got, times * per_key * seen.sum() / context, rtol=1e-12)


def test_sharing_saves_its_projections_only():
    cfg, shared = tiny.config(), tiny.config(kv_source=(0, 0, 2, 2))
    saved = account.flops_per_token(cfg, 9, "decode") - account.flops_per_token(shared, 9, "decode")
    assert saved == 2 * 2 * 28 * (3 * 10 + 3 * 14)


# --- chips and roofline --------------------------------------------------------------------------------


def test_roofline_by_hand():
    """Llama-3-8B, bf16, batch 1, 8192 tokens on v5e: all weights but the embedding table, and 1 GiB of K and V."""
    roof = account.roofline_decode(LLAMA3_8B, BF16, 1, 8192, "v5e")
    weights = (8_030_261_248 - 128255 * 4096) * 2
    assert (roof.weight_bytes, roof.kv_bytes) == (weights, 131072 * 8192)
    np.testing.assert_allclose(roof.seconds, (weights + 2**30) / 819e9, rtol=1e-12)
    assert roof.seconds == account.roofline_decode_seconds(LLAMA3_8B, BF16, 1, 8192, "v5e")
    big = account.roofline_decode(LLAMA3_8B, BF16, 4096, 1, "v5e")  # a large batch is bound by compute
    assert big.seconds == big.compute_seconds > big.memory_seconds
    np.testing.assert_allclose(big.compute_seconds, 4096 * account.flops_per_token(LLAMA3_8B, 1, "decode") / 197e12)


def test_sharing_saves_capacity_not_traffic():
    """arXiv 2405.12981: every layer re-reads the shared cache; a window reads only what it sees."""
    base, shared = tiny.config(), tiny.config(kv_source=(0, 0, 2, 2))
    read = {name: account.roofline_decode(c, BF16, 2, 50, "H200").kv_bytes for name, c in (("b", base), ("s", shared))}
    assert read["b"] == read["s"] == 2 * 50 * account.kv_bytes_per_token(base, BF16)
    windowed = tiny.config(masks=(MaskConfig(window=5, sinks=2),))
    assert account.roofline_decode(windowed, BF16, 2, 50, "H200").kv_bytes == read["b"] * 7 / 50


def test_chip_table():
    assert set(hardware.CHIPS) == {"v4", "v5e", "v5p", "v6e", "tpu7x", "H100", "H200"}
    for name, chip in hardware.CHIPS.items():
        assert chip.name == name
        assert "http" in chip.source
        assert 100e12 < chip.peak_flops < 3000e12
        assert 100 < chip.peak_flops / chip.hbm_bandwidth < 600  # FLOPs per byte at the ridge of each of them
        assert 16e9 <= chip.hbm_bytes <= 192 * 2**30
        assert 100e9 < chip.interconnect_bandwidth < chip.hbm_bandwidth
    assert hardware.of_device(jax.devices("cpu")[0]) is None


def test_device_kinds():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    for kind, name in (("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU7x", "tpu7x"), ("NVIDIA H200", "H200")):
        assert hardware.of_device(Device(kind)).name == name
    for kind in ("NVIDIA GH200 480GB", "NVIDIA H100 PCIe", "NVIDIA H200 NVL"):
        assert hardware.of_device(Device(kind)) is None


def test_measured_cpu():
    chip = hardware.measure_cpu(n=64, repeats=1)
    assert chip.source.startswith("measured")
    assert 1e8 < chip.peak_flops < 1e14
    assert 1e8 < chip.hbm_bandwidth < 1e13
    assert account.roofline_decode_seconds(SMOLLM2, BF16, 1, 64, chip) > 0


# --- the table and bad input ---------------------------------------------------------------------------


def test_ledger_table():
    console = Console(record=True, width=160)
    console.print(account.ledger_table(tiny.CASES["mqa_cla2_pattern"], CacheConfig(kinds=("by_mask",)), 50))
    text = console.export_text()
    cfg = tiny.CASES["mqa_cla2_pattern"]
    per_layer = (10 + 14) * 4
    for expected in (
        "2 owners of 4",
        "layer 0",
        "last 5 + first 2",
        f"{account.param_count(cfg):,}",
        f"{2 * per_layer:,}",
        f"{(7 + 50) * per_layer:,}",
    ):
        assert expected in text
    assert "ring" in text
    assert "full" in text
    console.print(account.ledger_table(tiny.CASES["scan"], CacheConfig(), 50))  # a training run's opening table
    assert "4 owners of 4" in console.export_text()


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: account.flops_per_token(tiny.BASE, 5, "training"), ("training", "prefill")),
        (lambda: account.flops_per_token(tiny.BASE, 0, "train"), ("context", "0")),
        (lambda: account.cache_bytes(tiny.BASE, CacheConfig(), 0, 5), ("batch", "0")),
        (lambda: account.cache_bytes(tiny.BASE, CacheConfig(), 1, -5), ("capacity", "-5")),
        (lambda: account.kv_bytes_per_token(tiny.BASE, CacheConfig(), -1), ("context", "-1")),
        (lambda: account.roofline_decode_seconds(tiny.BASE, CacheConfig(), 1, 5, "v3"), ("v3", "v5e")),
    ],
)
def test_bad_input_is_one_sentence(call, names):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(name in message for name in names)
