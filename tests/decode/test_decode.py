"""Decoding: the loop against a plain forward pass per token, ragged batches, end tokens, a step count per row and the
way back, streaming, what is computed how often, errors."""

import dataclasses
import functools
import io
import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import cache, model
from kvattn.config import CacheConfig, DecodeConfig
from kvattn.decode import generation as decode
from kvattn.errors import UserError
from tests.helpers import tiny
from tests.helpers.tolerances import F32_DECODE, close

FULL, RINGS = CacheConfig(), CacheConfig(kinds=("by_mask",))
PROMPTS = [[5, 17, 2, 44, 9, 30, 1], [23, 8, 51], [7, 60, 3, 3, 12]]
CASES = {"gqa": FULL, "mqa_cla2_pattern": RINGS, "neox": FULL, "window_sinks": RINGS}


@functools.cache
def params_of(name):
    """Random parameters, asymmetric and large enough that greedy text is not constant."""
    cfg = tiny.CASES[name]
    rng = np.random.default_rng(len(name))
    return jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(size=x.shape).astype(np.float32) * 0.15),
        model.init(jax.random.key(7), cfg),
    )


@functools.cache
def greedy_by_forward(name, prompt, count):
    """The oracle: a full forward pass over everything so far for each token, no cache anywhere."""
    cfg, params, ids = tiny.CASES[name], params_of(name), list(prompt)
    run = jax.jit(lambda tokens: model.forward(params, cfg, model.Inputs(tokens=tokens))[0].logits)
    for _ in range(count):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(np.argmax(np.asarray(run(jnp.asarray(padded)))[0, len(ids) - 1])))
    return ids[len(prompt) :]


def generate(name, prompts, *, new=11, store=None, **kw):
    sampling_fields = {k: kw.pop(k) for k in list(kw) if k in {f.name for f in dataclasses.fields(DecodeConfig)}}
    cfg = DecodeConfig(max_new_tokens=new, **sampling_fields)
    return decode.generate(params_of(name), tiny.CASES[name], prompts, cfg, store or CASES[name], **kw)


@pytest.mark.parametrize(
    ("name", "chunk"), [*((name, 3) for name in sorted(CASES)), ("gqa", 512), ("window_sinks", 512)]
)
def test_ragged_greedy_is_forward_per_token(name, chunk):
    want = [greedy_by_forward(name, tuple(prompt), 11) for prompt in PROMPTS]
    assert len({tuple(row) for row in want}) == 3 and max(len(set(row)) for row in want) > 2
    got = generate(name, PROMPTS, prefill_chunk=chunk)
    assert got.tokens == want
    assert got.cache_bytes == cache.nbytes(cache.create(tiny.CASES[name], CASES[name], 3, got.capacity))
    assert got.prefill_seconds > 0 and got.decode_seconds > 0
    assert got.tokens_per_second == pytest.approx(30 / got.decode_seconds)


def test_streaming_hands_over_the_same_tokens_in_order():
    seen = [[], [], []]
    got = generate("gqa", PROMPTS, on_token=lambda row, token: seen[row].append(token))
    assert got.tokens == seen == generate("gqa", PROMPTS).tokens
    assert got.tokens_per_second > 0


def test_end_tokens_stop_rows_one_by_one():
    """Row r stops at its own end token; neighbours go on as if it were not there."""
    free = generate("gqa", PROMPTS).tokens
    end = free[1][4]
    want = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert len(want[1]) <= 5 and any(len(row) == 11 for row in want)
    assert generate("gqa", PROMPTS, eos_ids=(end, 59)).tokens == want
    streamed = []
    got = generate("gqa", PROMPTS, eos_ids=(end, 59), on_token=lambda row, token: streamed.append((row, token)))
    assert got.tokens == want and len(streamed) == sum(map(len, want))


def test_all_rows_done_ends_the_loop():
    """The step counts of the state show that no step was spent after the last row ended."""
    first = generate("gqa", PROMPTS, new=2).tokens
    ends = jnp.asarray([row[1] for row in first], jnp.int32)
    state = decode.generate_jit(*given(), *draws(), ends, jnp.int32(16), chunk=16, width=16)
    assert np.all(np.asarray(state.step) <= 2) and np.all(np.asarray(state.done))
    assert np.all(np.asarray(state.out)[:, 2:] == -1)


# --- a step count per row, and the way back ------------------------------------------------------------


def given():
    """What `start` takes before the sampler: the prompts above, left-padded, and empty full caches."""
    cfg = tiny.CASES["gqa"]
    return params_of("gqa"), cfg, *decode.pad_prompts(PROMPTS, 7), cache.create(cfg, FULL, 3, 32)


def draws(**fields):
    return (decode.sampling.create(DecodeConfig(**fields), len(PROMPTS)),)


def started(ends=(), **fields):
    """(state after the first token, its `advance` as a function of state and until)."""
    params, cfg, *rest = given()
    (sampler,), eos = draws(**fields), jnp.asarray(ends, jnp.int32)
    state = decode.start_jit(params, cfg, *rest, sampler, eos, chunk=16, width=16)
    return state, lambda state, until: decode.advance_jit(
        params, cfg, state, sampler, eos, jnp.asarray(until, jnp.int32)
    )


def rows_of(state):
    """Tokens of each row; what `out` holds must be as many as `step` says, and nothing after them."""
    out, step = np.asarray(state.out), np.asarray(state.step)
    assert np.array_equal(out >= 0, np.arange(out.shape[1])[None] < step[:, None])
    return [row[:count].tolist() for row, count in zip(out, step, strict=True)]


DRAWS = [{}, {"temperature": 1.5, "top_p": 0.95, "seed": 3}]


@pytest.mark.parametrize("fields", DRAWS, ids=["greedy", "sampled"])
def test_rows_wait_and_go_on(fields):
    """Rows that wait at their own `until` write nothing and later draw the tokens that they would have drawn at once;
    no row's tokens depend on how far its neighbours are."""
    want = generate("gqa", PROMPTS, **fields).tokens
    state, advance = started(**fields)
    for until in ([4, 9, 1], [4, 2, 6], [11, 10, 7], 11):
        before = np.asarray(state.step)
        state = advance(state, until)
        step = np.maximum(before, until)
        assert np.asarray(state.step).tolist() == step.tolist()
        assert rows_of(state) == [row[:count] for row, count in zip(want, step, strict=True)]
        assert np.asarray(state.position).tolist() == [len(p) + n - 1 for p, n in zip(PROMPTS, step, strict=True)]
        assert np.asarray(state.caches[0].length).tolist() == np.asarray(state.position).tolist()
    assert rows_of(state) == want


def test_until_ends_at_the_width_of_out():
    state, advance = started()
    state = advance(state, [99, 3, 99])
    want = generate("gqa", PROMPTS, new=16).tokens
    assert np.asarray(state.step).tolist() == [16, 3, 16]
    assert rows_of(state) == [want[0], want[1][:3], want[2]]


@pytest.mark.parametrize("fields", DRAWS, ids=["greedy", "sampled"])
def test_rewound_rows_draw_the_same_tokens_again(fields):
    """Ten tokens, back to a different count in each row (one beyond what the row has), on by different counts."""
    want = generate("gqa", PROMPTS, **fields).tokens
    state, advance = started(**fields)
    state = advance(state, [10, 10, 8])
    state = jax.jit(decode.rewind)(state, jnp.asarray([3, 1, 9], jnp.int32))
    assert rows_of(state) == [want[0][:3], want[1][:1], want[2][:8]]
    assert np.asarray(state.token).tolist() == [want[0][2], want[1][0], want[2][7]]
    assert np.asarray(state.position).tolist() == [9, 3, 12]
    assert np.asarray(state.caches[0].length).tolist() == [9, 3, 12]
    state = advance(state, [11, 5, 10])
    assert rows_of(state) == [want[0], want[1][:5], want[2][:10]]
    assert rows_of(advance(state, 11)) == want


def test_a_row_that_ended_goes_on_from_before_its_end():
    """Rows 0 and 1 have ended. Taken back to its end token a row is still done; taken back before it, a row draws up to
    that token again."""
    free = generate("gqa", PROMPTS).tokens
    ends = (free[0][8], free[1][6])
    want = [free[0][:9], free[1][:7], free[2]]
    state, advance = started(ends=ends)
    state = advance(state, 11)
    assert rows_of(state) == want and np.asarray(state.done).tolist() == [True, True, False]
    state = decode.rewind(state, jnp.asarray([9, 4, 10], jnp.int32))
    assert rows_of(state) == [want[0], want[1][:4], want[2][:10]]
    assert np.asarray(state.done).tolist() == [True, False, False]
    state = advance(state, 11)
    assert rows_of(state) == want and np.asarray(state.done).tolist() == [True, True, False]


# --- what is computed, and what a keep-policy leaves ----------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_every_token_is_computed_once(monkeypatch, stream):
    """Each row's positions go through the model once, in prefill chunks and in steps, into caches made once."""
    name, seen, made = "gqa", [[], [], []], []
    cfg = dataclasses.replace(tiny.CASES[name], max_length=119 + stream)  # compiled for this test alone
    hidden, create = model.hidden, cache.create

    def watched(params, cfg, inputs, **kw):
        jax.debug.callback(
            lambda where: [seen[r].extend(p[p >= 0].tolist()) for r, p in enumerate(where)], inputs.positions
        )
        return hidden(params, cfg, inputs, **kw)

    monkeypatch.setattr(model, "hidden", watched)
    monkeypatch.setattr(cache, "create", lambda *args: made.append(args) or create(*args))
    got = decode.generate(
        params_of(name),
        cfg,
        PROMPTS,
        DecodeConfig(max_new_tokens=11, prefill_chunk=3),
        FULL,
        on_token=(lambda row, token: None) if stream else None,
    )
    jax.effects_barrier()
    assert [len(row) for row in got.tokens] == [11, 11, 11] and len(made) == 1
    assert [sorted(row) for row in seen] == [list(range(len(prompt) + 10)) for prompt in PROMPTS]


@pytest.mark.parametrize("stream", [False, True])
def test_times_are_those_of_the_run(stream):
    """Compiling, prefill and decoding fit into the call; a caller's `on_token` is none of them."""
    generate("gqa", PROMPTS, new=9)
    took = []
    began = time.perf_counter()

    def slow(row, token):
        took.append(time.sleep(0.01))

    got = generate("gqa", PROMPTS, new=9, on_token=slow if stream else None)
    total = time.perf_counter() - began - 0.01 * len(took)
    assert len(took) == (27 if stream else 0)
    assert got.prefill_seconds > 0 and got.decode_seconds > 0 and got.compile_seconds > 0
    assert got.prefill_seconds + got.decode_seconds + got.compile_seconds < total
    assert generate("gqa", PROMPTS, new=1).decode_seconds == generate("gqa", PROMPTS, new=1).tokens_per_second == 0


def fewer_slots(caches):
    """A `settle` that leaves 24 slots."""
    return jax.tree.map(lambda x: x[:, :, :24] if x.ndim == 4 else x, caches)


def emptied(caches):
    """A `settle` that forgets what it held."""
    return jax.tree.map(lambda x: jnp.zeros_like(x) if x.ndim == 4 else x, caches)


@pytest.mark.parametrize("stream", [False, True])
def test_settled_caches_are_decoded_with(stream):
    """Caches made smaller between prefill and the first step: the same text from fewer bytes, compiled once."""
    plain = generate("gqa", PROMPTS)
    on_token = (lambda row, token: None) if stream else None
    decode._compile.cache_clear()
    for _ in range(2):
        got = generate("gqa", PROMPTS, settle=fewer_slots, on_token=on_token)
        assert got.tokens == plain.tokens and got.capacity == 32
        assert got.prefill_cache_bytes == plain.cache_bytes == plain.prefill_cache_bytes
        assert got.cache_bytes * 32 == plain.cache_bytes * 24
    assert decode._compile.cache_info().misses == 3


def test_start_settles_before_the_first_step():
    """In one call or by itself, with caches that a step then reads: a `settle` that empties them changes the text."""
    eos = jnp.zeros((0,), jnp.int32)
    run = jax.jit(decode.start, static_argnames=("cfg", "chunk", "width", "settle"))
    state = run(*given(), *draws(), eos, chunk=16, width=16, settle=fewer_slots)
    assert cache.nbytes(state.caches) * 32 == cache.nbytes(given()[-1]) * 24
    params, cfg = given()[:2]
    want = generate("gqa", PROMPTS).tokens
    assert rows_of(decode.advance(params, cfg, state, *draws(), eos, jnp.int32(11))) == want

    got = generate("gqa", PROMPTS, settle=emptied).tokens
    assert [row[0] for row in got] == [row[0] for row in want] and got != want


def test_samples_do_not_depend_on_the_batch():
    """With its seed, a sampled row is the same alone, in another order, and beside other prompts."""
    draw = {"temperature": 1.5, "top_p": 0.95, "top_k": 40}
    together = generate("gqa", PROMPTS, seeds=[3, 4, 5], **draw).tokens
    assert together == generate("gqa", PROMPTS, seed=3, **draw).tokens
    for row in range(3):
        assert generate("gqa", [PROMPTS[row]], seed=3 + row, **draw).tokens == [together[row]]
    swapped = generate("gqa", [PROMPTS[2], PROMPTS[0]], seeds=[5, 3], **draw).tokens
    assert swapped == [together[2], together[0]]
    assert together != generate("gqa", PROMPTS, seed=99, **draw).tokens
    greedy = [greedy_by_forward("gqa", tuple(prompt), 11) for prompt in PROMPTS]
    assert together != greedy and generate("gqa", PROMPTS, temperature=9.0, top_k=1).tokens == greedy


@pytest.mark.parametrize("side", ["left", "right"])
def test_prefill_of_ragged_rows_either_side(side):
    cfg, params = tiny.CASES["mqa_cla2_pattern"], params_of("mqa_cla2_pattern")
    tokens, positions = decode.pad_prompts(PROMPTS, 7)
    if side == "right":
        tokens = jnp.asarray([prompt + [0] * (7 - len(prompt)) for prompt in PROMPTS], jnp.int32)
        positions = jnp.asarray([len(prompt) for prompt in PROMPTS], jnp.int32)
    run = jax.jit(decode.prefill, static_argnames=("cfg", "chunk"))
    logits, caches = run(params, cfg, tokens, positions, cache.create(cfg, RINGS, 3, 32), chunk=3)
    for row, prompt in enumerate(PROMPTS):
        alone = model.forward(params, cfg, model.Inputs(tokens=jnp.asarray([prompt], jnp.int32)))[0].logits
        close(logits[row], alone[0, -1], F32_DECODE, f"row {row}")
    assert np.asarray(caches[0].length).tolist() == [7, 3, 5]


def test_static_buckets_do_not_recompile():
    decode._compile.cache_clear()
    for prompt, new, temperature in (([1, 2, 3], 9, 0.4), ([4] * 5, 8, 0.8), ([9], 12, 1.2)):
        generate("gqa", [prompt], new=new, temperature=temperature)
    assert decode._compile.cache_info().misses == 2  # start and advance
    generate("gqa", [[1] * 17], new=8, temperature=0.4)
    assert decode._compile.cache_info().misses == 4


def test_buckets():
    assert [decode.bucket(n) for n in (1, 16, 17, 200, 256, 257, 512, 513)] == [16, 16, 32, 256, 256, 512, 512, 768]
    assert [decode.prompt_bucket(n, 100) for n in (3, 90, 100, 101, 250)] == [16, 100, 100, 200, 300]


@pytest.mark.parametrize(
    ("prompts", "fields", "store", "message"),
    [
        ([], {}, FULL, "^there is no prompt; give at least one.$"),
        ([[1, 2], []], {}, FULL, "prompt 1 is empty"),
        ([[1, 61]], {}, FULL, "token id 61; the model's ids are 0 to 60"),
        ([[-1]], {}, FULL, "token id -1"),
        ([[1] * 9], {}, CacheConfig(capacity=8), "the prompt has 9 tokens and cache.capacity is 8"),
        ([[1] * 5], {"max_new_tokens": 5}, CacheConfig(capacity=8), "at least 9"),
        ([[1]], {"max_new_tokens": 0}, FULL, "^decode.max_new_tokens is 0"),
        ([[1]], {"top_p": 1.5}, FULL, "top_p is 1.5"),
    ],
)
def test_bad_input_is_named(prompts, fields, store, message):
    with pytest.raises(UserError, match=message):
        decode.generate(params_of("gqa"), tiny.CASES["gqa"], prompts, DecodeConfig(**fields), store)


def test_capacity_is_exact_and_rings_take_any_length():
    """4 + 5 tokens fit 8 slots (the last is never written); a ring of 5 + 2 slots takes prompts beyond it."""
    short = generate("gqa", [[3, 1, 4, 1]], new=5, store=CacheConfig(capacity=8))
    assert short.tokens == [greedy_by_forward("gqa", (3, 1, 4, 1), 11)[:5]] and short.capacity == 8
    prompt = tuple(range(2, 22))
    long = generate("window_sinks", [list(prompt)], store=CacheConfig(kinds=("ring",), capacity=9), prefill_chunk=4)
    assert long.tokens == [greedy_by_forward("window_sinks", prompt, 11)]


# --- the command ---------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys):
    """`python -m experiments.decode ARGS` in this process, on a tiny byte-level checkpoint: (exit code, out, err)."""
    from experiments import decode as program
    from experiments.common import cli
    from kvattn import formats
    from kvattn.data.tokenizer import ByteTokenizer

    cfg = tiny.config(vocab_size=258, n_layers=2)
    loaded = formats.Loaded(cfg, model.init(jax.random.key(1), cfg), ByteTokenizer(), source="tiny")
    monkeypatch.setattr(formats, "load", lambda path, dtype: loaded)

    def run(*args):
        with pytest.raises(SystemExit) as stop:
            cli.run(program.main, "decode", argv=["x", *args])
        for flag in (program.JSON, program.FILE):
            flag._flagvalues[flag.name].unparse()
        return (stop.value.code or 0, *capsys.readouterr())

    run.loaded = loaded
    return run


def test_the_command_streams_and_reports(command, tmp_path, monkeypatch):
    ids = command.loaded.tokenizer.encode("To be")
    want = decode.generate(command.loaded.params, command.loaded.model, [ids], DecodeConfig(max_new_tokens=9), FULL)
    code, out, _ = command("--prompt=To be", "--max_new_tokens=9", "--json")
    result = json.loads(out)
    assert code == 0 and result["tokens"] == want.tokens[0] and result["prompt_ids"] == ids
    assert result["tokens_per_second"] > 0 and result["prefill_seconds"] > 0
    assert result["cache_bytes"] == want.cache_bytes and result["new_tokens"] == 9
    (tmp_path / "p.txt").write_text("To be")
    monkeypatch.setattr(sys, "stdin", io.StringIO("To be"))
    for args in (("--prompt=To be",), (f"--prompt_file={tmp_path}/p.txt",), ("--prompt=-",)):
        code, out, err = command(*args, "--max_new_tokens=9")
        # A character that the last token leaves unfinished is never printed.
        assert code == 0 and out[:-1] and result["text"].startswith(out[:-1])
        assert len(result["text"]) - len(out[:-1]) <= 3
        assert len(err.strip().splitlines()) == 1 and "tokens_per_second" in err and "cache_bytes" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--prompt=",), "the prompt is empty; give one with --prompt"),
        (("--prompt=x", "--max_new_tokens=0"), "max_new_tokens is 0"),
        (("--prompt=x", "--max_new_token=3"), "max_new_tokens"),
        (("--prompt=" + "x" * 30, "--config.cache.capacity=20"), "the prompt has 30 tokens"),
        (("--prompt=x", "--chat"), "template"),
        (("--prompt=x", "--checkpoint="), "checkpoint.path is empty"),
        (("--prompt_file=/nowhere/p.txt",), "/nowhere/p.txt"),
    ],
)
def test_the_command_refuses_in_one_line(command, args, message):
    code, out, err = command(*args)
    assert code == 2 and not out and len(err.strip().splitlines()) == 1 and message in err
