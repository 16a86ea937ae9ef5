"""The journal of resumable commands: what is on disk, what a kill leaves, what is refused."""

import json
import os

import pytest

from experiments.common import journal as journal_lib
from experiments.common.journal import FORMAT, Journal, flat, write_whole
from kvattn.errors import UserError


def begun(path, config, **fields):
    made = Journal(path, "a test's results", **fields)
    made.begin({"phase": "setup", "config": config}, lambda: [("config.", made.records[0]["config"], config)])
    return made


def test_lines_are_on_disk_when_add_returns_and_come_back(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(journal_lib.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    made = begun(tmp_path / "new" / "r.jsonl", {"a": 1})
    made.add({"row": "x", "sizes": (1, 2)}, {"row": "y"})
    assert synced[-1] == (tmp_path / "new/r.jsonl").stat().st_size and len(synced) == 2
    again = begun(tmp_path / "new" / "r.jsonl", {"a": 1})
    assert again.records == made.records and again.records[0]["format"] == FORMAT
    assert again.find(row="x")["sizes"] == [1, 2] and again.find(row="z") is None


def test_a_line_cut_by_a_kill_is_taken_off_and_whole_lines_stay(tmp_path):
    path = tmp_path / "r.jsonl"
    begun(path, {}).add({"row": "x"}, {"row": "y"})
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        assert len(Journal(path, "a test's results").records) == kept
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:kept])
    path.write_bytes(whole)
    made = Journal(path, "a test's results")
    made.drop_last(1)
    assert (
        [r.get("row") for r in made.records]
        == [None, "x"]
        == [json.loads(line).get("row") for line in path.read_text().splitlines()]
    )


@pytest.mark.parametrize("text", ["not json\n", "[1]\n", "3\n", '{"phase": 1}\n', '{"format": "new"}\n', "\xff\n"])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "r.jsonl"
    path.write_bytes(text.encode("latin-1") + b"half a li")
    with pytest.raises(UserError, match="r.jsonl is not a test's results; use another --output"):
        Journal(path, "a test's results", "--output")
    assert path.read_bytes() == text.encode("latin-1") + b"half a li"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ({"a.b": 1}, {"a.b": 2}, r"made with config\.a\.b=1 and this run has 2; set it back, or start in another here"),
        ({"a": []}, {"a.0.kind": "x"}, r"made with config\.a=\[\] and this run has None"),
        ({"a.0.kind": "x"}, {"a.0.kind": "x", "a.1.kind": "y"}, r"config\.a\.1\.kind=None and this run has 'y'"),
        (
            {"a": 1, "gone": 2},
            {"a": 1},
            r"another version of kvattn \(it has config\.gone, which this version does not",
        ),
        (
            {"a": 1},
            {"a": 1, "a_new": 2},
            r"another version of kvattn \(it lacks config\.a_new\); use another here, or go",
        ),
    ],
)
def test_changed_settings_name_the_field_and_unknown_ones_the_version(tmp_path, old, new, message):
    begun(tmp_path / "r.jsonl", old)
    with pytest.raises(UserError, match=message) as error:
        begun(tmp_path / "r.jsonl", new, elsewhere="here")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("first", "message"),
    [({"phase": "setup"}, "it has no format and"), ({"format": FORMAT + 1}, f"it has format {FORMAT + 1} and this")],
)
def test_other_formats_say_what_to_do(tmp_path, first, message):
    (tmp_path / "r.jsonl").write_text(json.dumps(first) + "\n")
    with pytest.raises(
        UserError, match=f"{message}.*; use another config.workdir, or go on with the version that wrote"
    ):
        Journal(tmp_path / "r.jsonl", "a test's results")


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = begun(None, {})
    made.add({"row": "x"})
    made.drop_last(1)
    assert len(made.records) == 1 and not list(tmp_path.iterdir())


def test_flat_settings():
    tree = {"a": {"b": (1, 2), "c": ({"d": 1}, {"d": None})}, "free": {"x": 1}}
    assert flat(tree, leave_out=("free",)) == {"a.b": [1, 2], "a.c.0.d": 1, "a.c.1.d": None}


def test_a_record_is_written_whole_or_not_at_all(tmp_path):
    write_whole(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_whole(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}
