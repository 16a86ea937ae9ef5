"""Perplexity, needle, recall and logits through the cache, against loops over the cacheless model."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import model
from kvattn.config import CacheConfig, DataConfig, EvalConfig, Experiment
from kvattn.data import batches as data
from kvattn.data.tokenizer import ByteTokenizer
from kvattn.errors import UserError
from kvattn.evaluate import perplexity as evaluate
from kvattn.evaluate import scoring, tasks
from tests.helpers import tiny
from tests.helpers.tolerances import BF16_CACHE, EXACT, F32_DECODE, close

CONTEXT, STRIDE = 13, 5
WINDOWED = tiny.config(masks=(tiny.SINKS, tiny.WINDOW), n_layers=2)
FULL = CacheConfig()


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(7).integers(0, 61, 47)


@pytest.fixture(scope="module")
def params():
    return model.init(jax.random.key(3), WINDOWED)


@jax.jit
def plain_logits(params, tokens):
    """[1,T] -> [T,W] without any cache."""
    return model.forward(params, WINDOWED, model.Inputs(tokens))[0].logits[0]


def nll_by_hand(params, ids, context, stride):
    """Oracle: each token's -ln p from one cacheless forward of each window, in float64, token by token."""
    out = np.full(len(ids), np.nan)
    start, done = 0, 1
    while done < len(ids):
        window = ids[start : start + context]
        tokens = np.pad(window, (0, CONTEXT - len(window)))  # behind the window: causality hides it
        logits = np.asarray(plain_logits(params, jnp.asarray(tokens[None], jnp.int32)), np.float64)
        for i in range(max(done, start + 1), start + len(window)):
            row = logits[i - start - 1]
            top = row.max()
            out[i] = top + math.log(sum(math.exp(x - top) for x in row)) - row[ids[i]]
        done = start + len(window)
        start += stride
    return out


@pytest.mark.parametrize("kind", ["full", "ring"])
def test_token_nll_matches_a_loop_without_cache(kind, params, ids):
    """Chunks of 4 in windows of 13, three at a time: nothing divides anything."""
    cache_cfg = CacheConfig(kinds=(kind,))
    got = evaluate.token_nll(
        params, WINDOWED, ids, context=CONTEXT, stride=STRIDE, cache_cfg=cache_cfg, batch=3, chunk=4
    )
    want = nll_by_hand(params, ids, CONTEXT, STRIDE)
    assert np.isnan(got[0])
    assert not np.isnan(got[1:]).any()
    close(got[1:], want[1:], F32_DECODE)
    assert np.abs(want[1:] - math.log(61)).max() > 0.1  # the model does say something


@pytest.mark.parametrize(
    ("length", "context", "stride"), [(47, 13, 13), (7, 13, 5), (14, 13, 1), (13, 13, 5), (2, 2, 1), (31, 13, 12)]
)
def test_other_strides_and_tails(length, context, stride, params, ids):
    ids = ids[:length]
    got = evaluate.token_nll(params, WINDOWED, ids, context=context, stride=stride, cache_cfg=FULL, batch=3, chunk=4)
    want = nll_by_hand(params, ids, context, stride)
    assert (np.isnan(got) == np.isnan(want)).all()
    seen = ~np.isnan(want)
    close(got[seen], want[seen], F32_DECODE)
    assert seen.sum() == length - (-(-length // stride) if stride == context else 1)


def test_windows_by_hand():
    sequences, target = evaluate.windows(np.arange(10, 21, dtype=np.int32), 5, 2)
    assert sequences.tokens.tolist() == [
        [10, 11, 12, 13, 14],
        [12, 13, 14, 15, 16],
        [14, 15, 16, 17, 18],
        [16, 17, 18, 19, 20],
    ]
    assert sequences.scored.astype(int).tolist() == [[1, 1, 1, 1, 0]] + [[0, 0, 1, 1, 0]] * 3
    assert sequences.targets[sequences.scored].tolist() == list(range(11, 21))
    assert target[sequences.scored].tolist() == list(range(1, 11))


def test_the_stores_rounding_counts(params, ids):
    """bfloat16 K and V change the figure, slightly: the cache is read, not imagined."""
    kwargs = {"context": CONTEXT, "stride": STRIDE, "batch": 3, "chunk": 4}
    exact = evaluate.token_nll(params, WINDOWED, ids, cache_cfg=FULL, **kwargs)[1:]
    rounded = evaluate.token_nll(params, WINDOWED, ids, cache_cfg=CacheConfig(dtype="bfloat16"), **kwargs)[1:]
    close(rounded, exact, BF16_CACHE)
    assert np.abs(rounded - exact).max() > 1e-5


def test_batch_and_chunk_do_not_matter(params, ids, monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS", 3 * 61)  # one or two columns unembedded at a time
    results = [
        evaluate.token_nll(
            params, WINDOWED, ids, context=CONTEXT, stride=STRIDE, cache_cfg=FULL, batch=batch, chunk=chunk
        )[1:]
        for batch, chunk in ((3, 4), (50, 400))
    ]
    close(results[0], results[1], F32_DECODE)


def test_perplexity_summary(params, ids):
    seen = []
    kwargs = {"context": CONTEXT, "stride": STRIDE, "cache_cfg": FULL, "batch": 3, "chunk": 4}
    result = evaluate.perplexity(params, WINDOWED, ids, **kwargs, progress=lambda *x: seen.append(x))
    nll = evaluate.token_nll(params, WINDOWED, ids, **kwargs)[1:]
    assert result.tokens == 46
    assert result.nll_mean == pytest.approx(nll.sum() / 46)
    assert result.ppl == pytest.approx(math.exp(result.nll_mean))
    assert result.stderr == pytest.approx(math.sqrt(((nll - nll.mean()) ** 2).sum() / 45 / 46))
    assert json.loads(json.dumps(result.to_dict()))["context"] == CONTEXT
    assert seen == [(3, 8), (6, 8), (8, 8)]


def test_a_model_that_knows_nothing_scores_ln_of_the_vocabulary(params, ids):
    nothing = jax.tree.map(jnp.zeros_like, params)
    result = evaluate.perplexity(
        nothing, WINDOWED, ids, context=CONTEXT, stride=STRIDE, cache_cfg=FULL, batch=3, chunk=4
    )
    assert result.ppl == pytest.approx(61, rel=1e-5)
    assert result.stderr == pytest.approx(0, abs=1e-6)


def test_a_diverged_model_is_an_error_and_not_a_number(params, ids):
    broken = params | {"final_norm": {"scale": params["final_norm"]["scale"].at[3].set(jnp.nan)}}
    with pytest.raises(UserError, match="NaN"):
        evaluate.perplexity(broken, WINDOWED, ids, context=CONTEXT, stride=STRIDE, cache_cfg=FULL, batch=3, chunk=4)


def test_logits_prefill_and_decode_match_the_forward(params, ids):
    tokens = ids[:22].reshape(2, 11)
    want = np.stack([plain_logits(params, jnp.asarray(row[None], jnp.int32)) for row in tokens])
    for mode, kind in (("prefill", "full"), ("prefill", "ring"), ("decode", "ring")):
        got = scoring.logits(params, WINDOWED, tokens, mode=mode, cache_cfg=CacheConfig(kinds=(kind,)), chunk=4)
        assert got.dtype == np.float32
        close(got, want, F32_DECODE, f"{mode} {kind}")


BAD = {
    "context": ({"context": 1, "stride": 1}, "eval.context is 1"),
    "stride": ({"context": 13, "stride": 14}, "eval.stride is 14"),
    "no stride": ({"context": 13, "stride": 0}, "eval.stride is 0"),
    "one token": ({"ids": np.array([3])}, "at least 2"),
    "no token": ({"ids": np.array([], np.int64)}, "at least 2"),
    "batch of ids": ({"ids": np.ones((2, 9), np.int64)}, "at least 2"),
    "float ids": ({"ids": np.linspace(0, 1, 9)}, "integer token ids"),
    "big id": ({"ids": np.array([1, 61, 2])}, "id 61, outside"),
    "negative id": ({"ids": np.array([1, -1, 2])}, "id -1, outside"),
    "capacity": ({"cache_cfg": CacheConfig(capacity=12)}, "config.cache.capacity is 12"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_perplexity_input(case, params, ids):
    change, message = BAD[case]
    arguments = {"ids": ids, "context": CONTEXT, "stride": STRIDE, "cache_cfg": FULL} | change
    with pytest.raises(UserError, match=message) as error:
        evaluate.perplexity(params, WINDOWED, arguments.pop("ids"), **arguments)
    assert "\n" not in str(error.value)


# --- needle -------------------------------------------------------------------------------------------

BYTES = ByteTokenizer()
HAY = "".join(f"line {i} of some long and rather dull text\n" for i in range(60))
BYTE_MODEL = dataclasses.replace(WINDOWED, vocab_size=BYTES.vocab_size)


class Solver:
    """Stands in for the model: answers from the prompt's own text, wrong in chosen rows."""

    def __init__(self, wrong=lambda row, depth: False):
        self.prompts, self.wrong = [], wrong

    def score(self, params, cfg, sequences, cache_cfg, **kwargs):
        correct = np.zeros(sequences.tokens.shape, bool)
        for i, (tokens, scored) in enumerate(zip(sequences.tokens, sequences.scored, strict=True)):
            text = BYTES.decode(tokens)
            self.prompts.append(text)
            prompt, answer = BYTES.decode(tokens[: np.flatnonzero(scored)[0] + 1]), sequences.targets[i][scored]
            said = prompt.split("The pass key is ")[1][:5]
            correct[i, scored] = answer == BYTES.encode(f" {said}")
            if self.wrong(i, prompt):
                correct[i, np.flatnonzero(scored)[-1]] = False
        nll = np.where(sequences.scored, np.where(correct, 0.25, 2.0), 0.0)
        return scoring.Scores(nll.astype(np.float32), correct)


def find(monkeypatch, solver, **changes):
    monkeypatch.setattr(tasks.scoring, "score", solver.score)
    arguments = {"lengths": (211, 307), "depths": (0.0, 0.5, 1.0), "cache_cfg": FULL, "repeats": 3} | changes
    return evaluate.needle(None, BYTE_MODEL, BYTES, HAY, **arguments)


def test_needle_prompts_are_what_they_say(monkeypatch):
    solver = Solver()
    result = find(monkeypatch, solver)
    assert result.accuracy == result.worst == 1.0
    assert result.nll == pytest.approx(6 * 0.25)
    assert [(c.length, c.depth, c.count) for c in result.cells] == [
        (length, depth, 3) for length in (211, 307) for depth in (0.0, 0.5, 1.0)
    ]
    keys = [p[-5:] for p in solver.prompts]
    assert len(set(keys)) == 6
    assert keys[0:3] == keys[3:6] == keys[6:9] != keys[9:12]  # depths differ in the depth alone
    for i, text in enumerate(solver.prompts):
        length, depth = (211, 307)[i // 9], (0.0, 0.5, 1.0)[i // 3 % 3]
        assert len(text) == length
        assert text.count(text[-5:]) == 3
        before, rest = text.split(tasks.STATEMENT, 1)
        after = rest.split(tasks.FULL_STOP, 1)[1].removesuffix(tasks.QUESTION + text[-6:])
        assert before.removesuffix("\n") + "\n" in "\n" + HAY or depth == 1.0 or not before
        assert (before + after) in HAY
        room = len(before) + len(after)
        assert abs(len(before) - depth * room) <= 45  # to within a line


def test_one_wrong_digit_is_a_miss(monkeypatch):
    result = find(monkeypatch, Solver(wrong=lambda row, prompt: row == 4))
    assert [c.accuracy for c in result.cells] == pytest.approx([1, 2 / 3, 1, 1, 2 / 3, 1])
    assert result.accuracy == pytest.approx(8 / 9)
    assert result.worst == pytest.approx(2 / 3)
    assert result.cells[1].nll == pytest.approx((17 * 0.25 + 2.0) / 3)
    assert json.loads(json.dumps(result.to_dict()))["cells"][1]["accuracy"] == pytest.approx(2 / 3)


def test_needle_through_a_real_model():
    """A model of zeros gives every answer token the same chance."""
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), BYTE_MODEL))
    result = evaluate.needle(
        params, BYTE_MODEL, BYTES, HAY, lengths=(173,), depths=(0.3,), cache_cfg=FULL, repeats=2, chunk=64
    )
    assert result.accuracy == 0.0
    assert result.nll == pytest.approx(6 * math.log(258), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": (90,)}, "eval.needle_lengths has 90"),
        ({"lengths": (9999,)}, "fewer than eval.needle_lengths"),
        ({"lengths": ()}, "is empty"),
        ({"depths": (0.5, 1.5)}, "between 0 and 1"),
    ],
)
def test_bad_needle_input(change, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        find(monkeypatch, Solver(), **change)


# --- recall -------------------------------------------------------------------------------------------


def test_recall_is_scored_at_the_queries_only(monkeypatch):
    """A dictionary answers everything; with every third example wrong in one query, accuracy says so."""

    def solve(params, cfg, sequences, cache_cfg, **kwargs):
        correct = np.zeros(sequences.tokens.shape, bool)
        for i, tokens in enumerate(sequences.tokens):
            table = dict(zip(tokens[0:10:2].tolist(), tokens[1:10:2].tolist(), strict=True))
            for j in np.flatnonzero(sequences.scored[i]):
                correct[i, j] = table[int(tokens[j])] == sequences.targets[i, j]
            if i % 3 == 0:
                correct[i, np.flatnonzero(sequences.scored[i])[2]] = False
        return scoring.Scores(np.where(sequences.scored, 0.5, 0.0), correct)

    monkeypatch.setattr(tasks.scoring, "score", solve)
    result = evaluate.mqar(None, WINDOWED, seq_len=36, pairs=5, vocab=59, cache_cfg=FULL, examples=21)
    each = np.where(np.arange(21) % 3 == 0, 0.8, 1.0)
    assert result.accuracy == pytest.approx(each.mean())
    assert result.stderr == pytest.approx(each.std(ddof=1) / math.sqrt(21))
    assert result.nll == pytest.approx(0.5)


def test_recall_through_a_real_model(params):
    chance = evaluate.mqar(params, WINDOWED, seq_len=20, pairs=2, vocab=61, cache_cfg=FULL, examples=40, chunk=16)
    assert chance.accuracy < 0.2
    assert 2.0 < chance.nll < 12.0
    with pytest.raises(UserError, match="data.mqar_vocab is 99"):
        evaluate.mqar(params, WINDOWED, seq_len=20, pairs=2, vocab=99, cache_cfg=FULL)


def test_recall_evaluates_rows_that_training_never_draws(monkeypatch):
    seen = []

    def score(params, cfg, sequences, cache_cfg, **kwargs):
        seen.extend(row.tobytes() for row in sequences.tokens)
        return scoring.Scores(np.zeros(sequences.tokens.shape), np.zeros(sequences.tokens.shape, bool))

    monkeypatch.setattr(tasks.scoring, "score", score)
    evaluate.mqar(None, WINDOWED, seq_len=20, pairs=2, vocab=61, cache_cfg=FULL, examples=50)
    config = DataConfig(source="mqar", seq_len=20, mqar_pairs=2, mqar_vocab=61, batch_size=50)
    rows = {split: data.rows_of(config, None, split)[0] for split in ("train", "eval")}
    assert seen == [rows["eval"][i]["tokens"].tobytes() for i in range(50)]
    assert set(seen).isdisjoint(rows["train"][i]["tokens"].tobytes() for i in range(50))


# --- run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_params():
    return model.init(jax.random.key(5), BYTE_MODEL)


def test_run_reads_the_text_the_config_names(tmp_path, byte_params):
    (tmp_path / "text.txt").write_text(HAY + "ä\n", encoding="utf-8")
    settings = EvalConfig(text=str(tmp_path / "text.txt"), context=64, stride=32, max_tokens=211)
    cfg = Experiment(eval=settings, data=DataConfig(tokenizer="bytes"))
    result = evaluate.run(cfg, byte_params, BYTE_MODEL, None)
    assert result["tokens"] == 210
    assert result["bits_per_byte"] == pytest.approx(result["nll_mean"] / math.log(2))  # a token is a byte
    direct = evaluate.perplexity(
        byte_params, BYTE_MODEL, np.frombuffer(HAY.encode(), np.uint8)[:211], context=64, stride=32, cache_cfg=FULL
    )
    close(result["nll_mean"], direct.nll_mean, EXACT)
    with_needle = dataclasses.replace(settings, needle_lengths=(173,), needle_depths=(0.3,), max_tokens=99)
    found = evaluate.run(dataclasses.replace(cfg, eval=with_needle), byte_params, BYTE_MODEL, None)
    assert found["needle"]["cells"][0]["length"] == 173
    json.dumps(found)


def test_run_recall(params):
    recall = DataConfig(source="mqar", seq_len=20, mqar_pairs=2, mqar_vocab=61)
    result = evaluate.run(Experiment(data=recall), params, WINDOWED, None)
    assert result["mqar"]["examples"] == 512


@pytest.mark.parametrize(("content", "message"), [("", "holds no text"), (None, "cannot be read"), (b"\xff", "UTF-8")])
def test_bad_text_file(content, message, tmp_path, byte_params):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    cfg = Experiment(eval=EvalConfig(text=str(path)), data=DataConfig(tokenizer="bytes"))
    with pytest.raises(UserError, match=message):
        evaluate.run(cfg, byte_params, BYTE_MODEL, None)
