"""Autoregressive decoding: chunked prefill, one-token steps, and the loop that ties them, in two compiled programs.

    start     prompt [B,T] -> caches filled (and settled), first token drawn     (chunks of `prefill_chunk` tokens)
    advance   while a row may draw: one token per such row, at its own step      (lax.while_loop, sampling inside)
    rewind    takes rows back to fewer tokens
    generate  runs `start`, then `advance` to the end, or a few tokens at a time when they are streamed

Prompts of different lengths share a batch by left padding: real tokens keep their own positions 0, 1, ...,
padding has position -1. Caches are addressed by position, so padding is never written and wastes no slot.
A row that may not draw (it has drawn its end token, or as many tokens as it was asked for) passes position -1:
nothing is written for it.

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

STREAM_STEPS = 4  # tokens between two looks of the host while it streams


Settle = Callable[[tuple], tuple]  # caches after prefill -> caches to decode with, perhaps of fewer slots; traced


@flax.struct.dataclass
class State:
    """Where each row stands. `token` [B] is the last token drawn, `position` [B] its position, `step` [B] the number of
    tokens drawn, `done` [B] whether the last is an end token, `out` [B,n] the tokens (-1 = none). The caches hold the
    tokens before `token`: `position` of them."""

    token: jax.Array
    position: jax.Array
    step: jax.Array
    done: jax.Array
    out: jax.Array
    caches: Any


@dataclasses.dataclass(frozen=True)
class Generated:
    """`tokens` per prompt, the end token included where one was drawn. `prefill_seconds` runs until the first token is
    drawn and the caches are settled, `decode_seconds` over the rest, without the caller's `on_token`;
    `tokens_per_second` = all later tokens of all rows / decode_seconds (0 when there were none). Compilation is in
    `compile_seconds` and nowhere else. `cache_bytes` are held while decoding, `prefill_cache_bytes` before `settle`."""

    tokens: list[list[int]]
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float
    cache_bytes: int
    prefill_cache_bytes: int
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
    empty: bool = True,
):
    """Fills the caches with a prompt, `chunk` tokens at a time (0 = all at once).

    tokens[B,T]; positions[B,T] with -1 for padding on either side, or lengths[B] for right-padded rows.
    `empty`: the caches hold nothing, so the first chunk needs to look at itself only.
    Returns (logits[B,W] f32 at each row's last real token, caches).
    """
    batch, width = tokens.shape
    if positions.ndim == 1:
        slots = jnp.arange(width, dtype=jnp.int32)[None, :]
        positions = jnp.where(slots < positions[:, None], slots, -1)
    chunk = min(chunk, width) if chunk > 0 else width
    count = -(-width // chunk)
    tokens, positions = _pad_left(tokens, count * chunk, 0), _pad_left(positions, count * chunk, -1)

    def one(start, carry, is_empty):
        last, best, caches = carry
        part = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        where = jax.lax.dynamic_slice_in_dim(positions, start, chunk, axis=1)
        inputs = model.Inputs(tokens=part, positions=where, empty=is_empty)
        hidden, caches, _ = model.hidden(params, cfg, inputs, caches=caches)
        column = jnp.argmax(where, axis=1)
        newest = jnp.max(where, axis=1)
        found = jnp.take_along_axis(hidden, column[:, None, None], axis=1)[:, 0]
        last = jnp.where((newest > best)[:, None], found.astype(last.dtype), last)
        return last, jnp.maximum(newest, best), caches

    carry = (jnp.zeros((batch, cfg.d_model), jnp.float32), jnp.full((batch,), -1, jnp.int32), caches)
    carry = one(0, carry, empty)
    if count > 1:
        carry = jax.lax.fori_loop(1, count, lambda i, carry: one(i * chunk, carry, False), carry)
    last, _, caches = carry
    return model.unembed(params, cfg, last[:, None, :])[:, 0], caches


def _pad_left(x: jax.Array, width: int, value: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (width - x.shape[1], 0)), constant_values=value)


def start(
    params, cfg, tokens, positions, caches, sampler, eos, *, chunk: int, width: int, settle: Settle | None = None
) -> State:
    """Prefills, settles the caches and draws the first token. tokens, positions [B,T] as in `prefill`; eos [E] i32;
    width: n of `out`; settle: None leaves the caches as they are."""
    logits, caches = prefill(params, cfg, tokens, positions, caches, chunk)
    token = sampling.sample(logits, sampler, jnp.int32(0))
    state = State(
        token=token,
        position=jnp.max(positions, axis=1) + 1,
        step=jnp.ones_like(token),
        done=_ends(token, eos),
        out=jnp.full((tokens.shape[0], width), -1, jnp.int32).at[:, 0].set(token),
        caches=caches,
    )
    return settled(state, settle) if settle else state


def settled(state: State, settle: Settle) -> State:
    """The state with the caches that `settle` makes of its own."""
    return state.replace(caches=settle(state.caches))


def advance(params, cfg, state: State, sampler, eos, until) -> State:
    """Draws tokens until each row has drawn `until` (traced i32, scalar or [B]; at most n of `out`) or an end token.

    A row at its `until` waits; it goes on as if it had never waited when a later call raises its `until`.
    """
    until = jnp.minimum(jnp.broadcast_to(until, state.step.shape), state.out.shape[1])
    columns = jnp.arange(state.out.shape[1], dtype=jnp.int32)[None, :]

    def draws(state):
        return ~state.done & (state.step < until)

    def body(state):
        here = draws(state)
        logits, caches = decode_step(params, cfg, state.token, jnp.where(here, state.position, -1), state.caches)
        token = jnp.where(here, sampling.sample(logits, sampler, state.step), state.token)
        written = here[:, None] & (columns == state.step[:, None])
        one = here.astype(jnp.int32)
        return State(
            token=token,
            position=state.position + one,
            step=state.step + one,
            done=state.done | (here & _ends(token, eos)),
            out=jnp.where(written, token[:, None], state.out),
            caches=caches,
        )

    return jax.lax.while_loop(lambda state: jnp.any(draws(state)), body, state)


def rewind(state: State, steps: jax.Array) -> State:
    """Takes each row back to the moment when it had drawn `steps` [B] i32 tokens.

    A row that has drawn fewer stays as it is; every row keeps its first token, which came from the prompt's logits.
    Raises UserError for caches that cannot give up tokens (see cache.truncate).
    """
    steps = jnp.clip(steps, 1, state.step)
    position = state.position - (state.step - steps)
    columns = jnp.arange(state.out.shape[1], dtype=jnp.int32)[None, :]
    return State(
        token=jnp.take_along_axis(state.out, steps[:, None] - 1, axis=1)[:, 0],
        position=position,
        step=steps,
        done=state.done & (steps == state.step),
        out=jnp.where(columns < steps[:, None], state.out, -1),
        caches=cache.truncate(state.caches, position),
    )


def _ends(token: jax.Array, eos: jax.Array) -> jax.Array:
    return jnp.any(token[:, None] == eos[None, :], axis=1)


def generate_in_one(params, cfg, tokens, positions, caches, sampler, eos, until, *, chunk: int, width: int):
    """Runs `start`, then `advance`: prompt to `until` tokens in one program -> State; its caches alias `caches`."""
    state = start(params, cfg, tokens, positions, caches, sampler, eos, chunk=chunk, width=width)
    return advance(params, cfg, state, sampler, eos, until)


generate_jit = jax.jit(generate_in_one, static_argnames=("cfg", "chunk", "width"), donate_argnames="caches")
start_jit = jax.jit(start, static_argnames=("cfg", "chunk", "width", "settle"), donate_argnames="caches")
settled_jit = jax.jit(settled, static_argnames="settle")
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
    settle: Settle | None = None,
) -> Generated:
    """Continues a batch of prompts by up to `decode_cfg.max_new_tokens` tokens each.

    `on_token(row, token)` is handed the tokens as they come, STREAM_STEPS steps at a time; without it the host looks
    once, at the end. Either way each token is computed once, and the tokens are the same. `seeds`: see
    sampling.create. `settle` turns the caches of the prompt into those to decode with (give the same function again
    to compile once).

    A paged cache gets all its pages up front: those of each prompt and its max_new_tokens.

    Raises UserError: no or empty prompt, ids outside the vocabulary, a prompt that with its new tokens does
    not fit `cache_cfg.capacity`, too few `cache_cfg.pages` (paged.OutOfPages, before anything is computed), or a
    sampling field out of range.
    """
    check_prompts(cfg, prompts)
    batch, new = len(prompts), decode_cfg.max_new_tokens
    if new < 1:
        raise UserError(f"decode.max_new_tokens is {new}; it must be at least 1.")
    sampler = sampling.create(decode_cfg, batch, seeds)
    longest = max(len(prompt) for prompt in prompts)
    capacity = plan_capacity(cfg, cache_cfg, longest, new)
    chunk = decode_cfg.prefill_chunk or bucket(longest)
    padded = pad_prompts(prompts, prompt_bucket(longest, chunk))
    draw = (sampler, jnp.asarray(np.asarray(sorted(eos_ids), np.int32)))
    caches = model.create_caches(cfg, cache_cfg, batch, capacity, [len(prompt) + new - 1 for prompt in prompts])
    prefill_cache_bytes = cache.nbytes(caches)
    begin, go_on, compile_seconds = _programs(params, cfg, (*padded, caches, *draw), chunk, new, settle)

    state, prefill_seconds = _timed(begin, params, *padded, caches, *draw)
    cache_bytes = cache.nbytes(state.caches)
    seen, decode_seconds = 0, 0.0
    while True:
        out, drawn = np.asarray(state.out), int(np.max(state.step))
        if on_token:
            _hand_over(out[:, seen:drawn], on_token)
        if drawn >= new or np.all(state.done):
            break
        seen, until = drawn, min(drawn + STREAM_STEPS, new) if on_token else new
        state, seconds = _timed(go_on, params, state, *draw, jnp.int32(until))
        decode_seconds += seconds
    rows = [[int(t) for t in row if t >= 0] for row in out]
    later = sum(len(row) for row in rows) - batch
    return Generated(
        tokens=rows,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode_seconds,
        tokens_per_second=later / decode_seconds if later else 0.0,
        cache_bytes=cache_bytes,
        prefill_cache_bytes=prefill_cache_bytes,
        capacity=capacity,
        compile_seconds=compile_seconds,
    )


def _programs(
    params: Any, cfg: ModelConfig, given: tuple, chunk: int, new: int, settle: Settle | None
) -> tuple[Callable[..., State], Callable[..., State] | None, float]:
    """Compiles (start, advance, seconds it took) for `given`, what `start` takes after cfg; no advance for one token.

    `settle` is a program of its own: caches that change their size in `start` could not be donated to it.
    """
    began = time.perf_counter()
    first = _compiled(start_jit, params, cfg, *given, chunk=chunk, width=bucket(new))
    fit = _compiled(settled_jit, first.out_info, settle=settle) if settle else None
    more, held = None, (fit or first).out_info
    if new > 1:
        more = _compiled(advance_jit, params, cfg, held, *given[3:], jnp.int32(0))

    def begin(*args):
        return fit(first(*args)) if fit else first(*args)

    return begin, more, time.perf_counter() - began


def _timed(program: Callable[..., State], *args: Any) -> tuple[State, float]:
    """(the state that `program` makes of `args`, seconds until it was there)."""
    jax.block_until_ready(args)
    began = time.perf_counter()
    state = jax.block_until_ready(program(*args))
    return state, time.perf_counter() - began


def _hand_over(out: np.ndarray, on_token: Callable[[int, int], None]) -> None:
    """Calls on_token(row, token) for the tokens of out[B,n], column by column."""
    for column in range(out.shape[1]):
        for row in np.flatnonzero(out[:, column] >= 0):
            on_token(int(row), int(out[row, column]))


def _compiled(program: Any, *args: Any, **static: Any) -> Any:
    """Compiles `program` for the shapes of `args`, from a small memo; it is called without `cfg` and statics."""
    leaves, treedef = jax.tree.flatten(args)
    return _compile(program, treedef, tuple(_abstract(leaf) for leaf in leaves), tuple(static.items()))


def _abstract(x: Any) -> Any:
    """An array's shape, dtype and sharding; anything else (a config) as it is."""
    if not hasattr(x, "shape"):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


@functools.lru_cache(maxsize=16)
def _compile(program, treedef, avals, static):
    return program.lower(*jax.tree.unflatten(treedef, avals), **dict(static)).compile()


def bucket(n: int) -> int:
    """Rounds n up to a static size: 16, 32, ..., 256, then multiples of 256."""
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
            f"the prompt has {longest} tokens and cache.capacity is {cache_cfg.capacity}; "
            f"shorten the prompt or set cache.capacity to at least {need}."
        )
    if keeps_all and need > cache_cfg.capacity:
        raise UserError(
            f"the prompt's {longest} tokens and decode.max_new_tokens={new} need "
            f"cache.capacity of at least {need}, and it is {cache_cfg.capacity}."
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
        raise UserError("decode.prompt is empty; give the prompt's text.")
    if not chat:
        return tokenizer.encode(text)
    return tokenizer.encode(tokenizer.apply_chat([{"role": "user", "content": text}]), add_bos=False)
