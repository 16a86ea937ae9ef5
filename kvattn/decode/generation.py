"""Autoregressive decoding: chunked prefill, one-token steps, and the loop that ties them, in one jit.

    start    prompt [B,T] -> caches filled, first token drawn             (chunks of `prefill_chunk` tokens)
    advance  while some row lives and step < until: one token per row     (lax.while_loop, sampling inside)
    generate = start, then advance, compiled as ONE program; streaming calls the same two piece by piece.

Prompts of different lengths share a batch by left padding: real tokens keep their own positions 0, 1, ...,
padding has position -1. Caches are addressed by position, so padding is never written and wastes no slot.
A row that has drawn an end token goes on with position -1: nothing is written for it any more.

Caches are donated and updated in place. tests/decode/test_hlo.py asserts that the compiled programs hold no copy of
a cache and alias every cache byte to the output.

Shapes come from a few static buckets (`bucket`), the number of new tokens is a traced value, and sampling
parameters are arrays: another prompt or temperature does not compile again.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kvattn import cache, model
from kvattn.config import CacheConfig, DecodeConfig, ModelConfig
from kvattn.decode import sampling
from kvattn.errors import UserError

STREAM_STEPS = 4  # tokens between two looks of the host in the streaming path


@flax.struct.dataclass
class State:
    """What the loop carries. `token` [B] is the last token drawn, `position` [B] its position (-1: the row is
    done), `step` the number of tokens drawn, `out` [B,n] those tokens (-1 = none)."""

    token: jax.Array
    position: jax.Array
    step: jax.Array
    out: jax.Array
    caches: Any


@dataclasses.dataclass(frozen=True)
class Generated:
    """`tokens` per prompt, the end token included where one was drawn. `prefill_seconds` runs to the first
    token, `decode_seconds` over the rest; `tokens_per_second` = all later tokens of all rows / decode_seconds
    (0 when there were none). Compilation is in `compile_seconds` and nowhere else."""

    tokens: list[list[int]]
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float
    cache_bytes: int
    capacity: int
    compile_seconds: float


def decode_step(params: Any, cfg: ModelConfig, token: jax.Array, positions: jax.Array, caches: Any):
    """One token per row: token[B], positions[B] i32 (-1 = row is done) -> (logits[B,W] f32, caches)."""
    inputs = model.Inputs(tokens=token[:, None], positions=positions[:, None])
    outputs, caches = model.forward(params, cfg, inputs, caches=caches)
    return outputs.logits[:, 0], caches


def prefill(
    params: Any,
    cfg: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    caches: Any,
    chunk: int = 0,
    fresh: bool = True,
):
    """Fills the caches with a prompt, `chunk` tokens at a time (0 = all at once).

    tokens[B,T]; positions[B,T] with -1 for padding on either side, or lengths[B] for right-padded rows.
    `fresh`: the caches are empty, so the first chunk needs to look at itself only.
    Returns (logits[B,W] f32 at each row's last real token, caches).
    """
    batch, width = tokens.shape
    if positions.ndim == 1:
        slots = jnp.arange(width, dtype=jnp.int32)[None, :]
        positions = jnp.where(slots < positions[:, None], slots, -1)
    chunk = min(chunk, width) if chunk > 0 else width
    count = -(-width // chunk)
    tokens, positions = _pad_left(tokens, count * chunk, 0), _pad_left(positions, count * chunk, -1)

    def one(start, carry, is_fresh):
        last, best, caches = carry
        part = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        where = jax.lax.dynamic_slice_in_dim(positions, start, chunk, axis=1)
        inputs = model.Inputs(tokens=part, positions=where, fresh=is_fresh)
        hidden, caches, _ = model.hidden(params, cfg, inputs, caches=caches)
        column = jnp.argmax(where, axis=1)
        newest = jnp.max(where, axis=1)
        found = jnp.take_along_axis(hidden, column[:, None, None], axis=1)[:, 0]
        last = jnp.where((newest > best)[:, None], found.astype(last.dtype), last)
        return last, jnp.maximum(newest, best), caches

    carry = (jnp.zeros((batch, cfg.d_model), jnp.float32), jnp.full((batch,), -1, jnp.int32), caches)
    carry = one(0, carry, fresh)
    if count > 1:
        carry = jax.lax.fori_loop(1, count, lambda i, carry: one(i * chunk, carry, False), carry)
    last, _, caches = carry
    return model.unembed(params, cfg, last[:, None, :])[:, 0], caches


def _pad_left(x: jax.Array, width: int, value: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (width - x.shape[1], 0)), constant_values=value)


def start(params, cfg, tokens, positions, caches, sampler, eos, *, chunk: int, width: int) -> State:
    """Prefill and the first token. tokens, positions [B,T] as in `prefill`; eos [E] i32; width: n of `out`."""
    logits, caches = prefill(params, cfg, tokens, positions, caches, chunk)
    token = sampling.sample(logits, sampler, jnp.int32(0))
    out = jnp.full((tokens.shape[0], width), -1, jnp.int32).at[:, 0].set(token)
    position = jnp.where(_ends(token, eos), -1, jnp.max(positions, axis=1) + 1)
    return State(token=token, position=position, step=jnp.int32(1), out=out, caches=caches)


def advance(params, cfg, state: State, sampler, eos, until) -> State:
    """Draws tokens until `until` (traced i32) have been drawn or every row is done."""

    def alive(state):
        return (state.step < until) & jnp.any(state.position >= 0)

    def body(state):
        logits, caches = decode_step(params, cfg, state.token, state.position, state.caches)
        token = sampling.sample(logits, sampler, state.step)
        done = state.position < 0
        written = jnp.where(done, -1, token)
        out = jax.lax.dynamic_update_slice_in_dim(state.out, written[:, None], state.step, axis=1)
        position = jnp.where(done | _ends(token, eos), -1, state.position + 1)
        token = jnp.where(done, state.token, token)
        return State(token=token, position=position, step=state.step + 1, out=out, caches=caches)

    return jax.lax.while_loop(alive, body, state)


def _ends(token: jax.Array, eos: jax.Array) -> jax.Array:
    return jnp.any(token[:, None] == eos[None, :], axis=1)


def generate_in_one(params, cfg, tokens, positions, caches, sampler, eos, until, *, chunk: int, width: int):
    """`start` then `advance`: prompt to `until` tokens in one program -> State; its caches alias `caches`."""
    state = start(params, cfg, tokens, positions, caches, sampler, eos, chunk=chunk, width=width)
    return advance(params, cfg, state, sampler, eos, until)


generate_jit = jax.jit(generate_in_one, static_argnames=("cfg", "chunk", "width"), donate_argnames="caches")
start_jit = jax.jit(start, static_argnames=("cfg", "chunk", "width"), donate_argnames="caches")
advance_jit = jax.jit(advance, static_argnames="cfg", donate_argnames="state")
decode_step_jit = jax.jit(decode_step, static_argnames="cfg", donate_argnames="caches")


def generate(
    params: Any,
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    decode_cfg: DecodeConfig,
    cache_cfg: CacheConfig,
    *,
    eos_ids: Sequence[int] = (),
    seeds: Sequence[int] | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> Generated:
    """Continues a batch of prompts by up to `decode_cfg.max_new_tokens` tokens each.

    Without `on_token` everything is one compiled program, and `prefill_seconds` comes from runs of that same
    program stopped after one token. With `on_token(row, token)` tokens are handed over as they come,
    STREAM_STEPS steps at a time; the tokens are the same. `seeds`: see sampling.create.

    A paged cache gets all its pages up front: those of each prompt and its max_new_tokens.

    Raises UserError: no or empty prompt, ids outside the vocabulary, a prompt that with its new tokens does
    not fit `cache_cfg.capacity`, too few `cache_cfg.pages` (paged.OutOfPages, before anything is computed), or a
    sampling field out of range.
    """
    check_prompts(cfg, prompts)
    batch, new = len(prompts), decode_cfg.max_new_tokens
    if new < 1:
        raise UserError(f"config.decode.max_new_tokens is {new}; it must be at least 1.")
    sampler = sampling.create(decode_cfg, batch, seeds)
    longest = max(len(prompt) for prompt in prompts)
    capacity = plan_capacity(cfg, cache_cfg, longest, new)
    chunk = decode_cfg.prefill_chunk or bucket(longest)
    tokens, positions = pad_prompts(prompts, prompt_bucket(longest, chunk))
    eos = jnp.asarray(np.asarray(sorted(eos_ids), np.int32))
    job = _Job(
        params=params,
        cfg=cfg,
        prompt=(tokens, positions),
        draw=(sampler, eos),
        static=(("chunk", chunk), ("width", bucket(new))),
        new=new,
        caches=lambda: cache.create(cfg, cache_cfg, batch, capacity, [len(prompt) + new - 1 for prompt in prompts]),
    )
    nbytes = cache.nbytes(jax.eval_shape(job.caches))
    out, times = _stream(job, on_token) if on_token else _whole(job)
    rows = [[int(t) for t in row if t >= 0] for row in out]
    later = sum(len(row) for row in rows) - batch
    return Generated(
        tokens=rows,
        prefill_seconds=times["prefill"],
        decode_seconds=times["decode"],
        tokens_per_second=later / times["decode"] if later else 0.0,
        cache_bytes=nbytes,
        capacity=capacity,
        compile_seconds=times["compile"],
    )


@dataclasses.dataclass(frozen=True)
class _Job:
    """What both paths of `generate` run; `caches()` makes empty ones, as every run donates its own."""

    params: Any
    cfg: ModelConfig
    prompt: tuple
    draw: tuple
    static: tuple
    new: int
    caches: Callable[[], Any]


def _whole(job: _Job) -> tuple[np.ndarray, dict[str, float]]:
    """One program. Prefill is timed by stopping it after one token (the first of two such runs warms up), the
    rest by difference, which for a handful of tokens of a tiny model is noise: it is never taken below 1 %."""
    began = time.perf_counter()
    until = jnp.int32(job.new)
    rest = (*job.prompt, job.caches(), *job.draw, until)
    program = _compiled(generate_jit, job.params, job.cfg, rest, job.static)
    times = {"compile": time.perf_counter() - began, "decode": 0.0}

    def run(until):
        caches = jax.block_until_ready(job.caches())
        began = time.perf_counter()
        out = program(job.params, *job.prompt, caches, *job.draw, jnp.int32(until)).out.block_until_ready()
        return np.asarray(out), time.perf_counter() - began

    out, times["prefill"] = run(1)
    if job.new > 1:
        _, times["prefill"] = run(1)
        out, seconds = run(job.new)
        times["decode"] = max(seconds - times["prefill"], seconds / 100)
    return out, times


def _stream(job: _Job, on_token: Callable[[int, int], None]) -> tuple[np.ndarray, dict[str, float]]:
    """`start`, then `advance` by STREAM_STEPS tokens at a time, handing tokens over in between."""
    began = time.perf_counter()
    rest = (*job.prompt, job.caches(), *job.draw)
    first = _compiled(start_jit, job.params, job.cfg, rest, job.static)
    more = None
    if job.new > 1:
        more = _compiled(advance_jit, job.params, job.cfg, (first.out_info, *job.draw, jnp.int32(0)), ())
    times = {"compile": time.perf_counter() - began, "decode": 0.0}
    began = time.perf_counter()
    state = first(job.params, *rest)
    seen, out = 0, np.asarray(state.out)
    times["prefill"] = time.perf_counter() - began
    while True:
        step, alive = int(state.step), bool(np.any(np.asarray(state.position) >= 0))
        for column in range(seen, step):
            for row in np.flatnonzero(out[:, column] >= 0):
                on_token(int(row), int(out[row, column]))
        seen = step
        if not alive or step >= job.new:
            return out, times
        began = time.perf_counter()
        until = jnp.int32(min(step + STREAM_STEPS, job.new))
        state = more(job.params, state, *job.draw, until)
        out = np.asarray(state.out)
        times["decode"] += time.perf_counter() - began


def _compiled(program: Any, params: Any, cfg: ModelConfig, rest: tuple, static: tuple):
    """`program` compiled for these shapes, from a small memo; it is called without `cfg` and statics."""
    leaves, treedef = jax.tree.flatten((params, rest))
    return _compile(program, cfg, static, treedef, tuple(_abstract(leaf) for leaf in leaves))


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


@functools.lru_cache(maxsize=16)
def _compile(program, cfg, static, treedef, avals):
    params, rest = jax.tree.unflatten(treedef, avals)
    return program.lower(params, cfg, *rest, **dict(static)).compile()


def bucket(n: int) -> int:
    """The static size n is rounded up to: 16, 32, ..., 256, then multiples of 256."""
    size = 16
    while size < n and size < 256:
        size *= 2
    return size if n <= size else -(-n // 256) * 256


def prompt_bucket(longest: int, chunk: int) -> int:
    """Padded prompt length: a bucket below one chunk, then whole chunks."""
    return min(bucket(longest), chunk) if longest <= chunk else -(-longest // chunk) * chunk


def plan_capacity(cfg: ModelConfig, cache_cfg: CacheConfig, longest: int, new: int) -> int:
    """Tokens per sequence to allocate: `cache_cfg.capacity`, or a bucket that fits prompt and new tokens.

    The last token drawn is never written. Raises UserError when a fixed capacity cannot hold the rest in the
    layers that keep every token (ring layers hold any length).
    """
    need = longest + new - 1
    if not cache_cfg.capacity:
        return bucket(need)
    layouts = [cache.layout(cfg, cache_cfg, owner, cache_cfg.capacity) for owner in cfg.owners]
    keeps_all = any(ring == 0 for _, ring, _ in layouts)
    if keeps_all and longest > cache_cfg.capacity:
        raise UserError(
            f"the prompt has {longest} tokens and config.cache.capacity is {cache_cfg.capacity}; "
            f"shorten the prompt or set config.cache.capacity to at least {need}."
        )
    if keeps_all and need > cache_cfg.capacity:
        raise UserError(
            f"the prompt's {longest} tokens and config.decode.max_new_tokens={new} need "
            f"config.cache.capacity of at least {need}, and it is {cache_cfg.capacity}."
        )
    return cache_cfg.capacity


def pad_prompts(prompts: Sequence[Sequence[int]], width: int) -> tuple[jax.Array, jax.Array]:
    """Left-padded tokens[B,width] and positions[B,width] (-1 = padding), i32."""
    tokens = np.zeros((len(prompts), width), np.int32)
    positions = np.full((len(prompts), width), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        positions[row, width - len(prompt) :] = np.arange(len(prompt))
    return jnp.asarray(tokens), jnp.asarray(positions)


def check_prompts(cfg: ModelConfig, prompts: Sequence[Sequence[int]]) -> None:
    """Raises UserError for no prompt, an empty prompt, or an id outside [0, W)."""
    if not prompts:
        raise UserError("there is no prompt; give at least one.")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {row} is empty; give at least one token.")
        bad = next((token for token in prompt if not 0 <= int(token) < cfg.vocab_size), None)
        if bad is not None:
            last = cfg.vocab_size - 1
            raise UserError(f"prompt {row} has token id {bad}; the model's ids are 0 to {last}.")


# --- text ----------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: Any, text: str, chat: bool) -> list[int]:
    """Ids of a prompt; with `chat`, of one user turn in the checkpoint's own chat template.

    Raises UserError for an empty prompt, or `chat` with a checkpoint that has no template.
    """
    if not text:
        raise UserError("the prompt is empty; give it some text.")
    if not chat:
        return tokenizer.encode(text)
    return tokenizer.encode(tokenizer.apply_chat([{"role": "user", "content": text}]), add_bos=False)
