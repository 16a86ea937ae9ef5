r"""A file that a killed command goes on from: one finished answer a line, nothing ever rewritten.

    journal = Journal("w/results.jsonl", "a study's results")
    journal.begin({"phase": "setup", "config": flat(cfg), **machine.describe()}, lambda first: [...])
    if journal.find(phase="before", row="mqa") is None:
        journal.add({"phase": "before", "row": "mqa", "nll": 3.2})

    line 1    {"format": 1, settings that all answers share}
    line 2..  an answer each, on disk (fsync) before the command goes on

A line cut by a kill is taken off the file. A run with other settings is refused, naming the field. A file of another
version is refused too: one without a format, of another format, or with settings that this version does not have.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kvattn.errors import UserError

FORMAT = 1
Pair = tuple[str, dict[str, Any], dict[str, Any]]  # (where the settings stand, the file's, this run's)


class Journal:
    """Finished answers of one command: `records` is the file, line by line. `path` None keeps them in memory.

    `what` and `elsewhere` are words of its error sentences: what the file holds, and what to name anew to leave it.
    Raises UserError: the file is something else, or of another version.
    """

    def __init__(self, path: str | os.PathLike | None, what: str, elsewhere: str = "config.workdir"):
        self.path = None if path is None else pathlib.Path(path)
        self.what, self.elsewhere = what, elsewhere
        self.records: list[dict[str, Any]] = self._read()

    def begin(self, setup: dict[str, Any], pairs: Callable[[], Iterable[Pair]] = lambda: ()) -> None:
        """Writes `setup` as the first line of a new file; in an old one compares the `pairs` of settings.

        Raises UserError naming the first setting that differs.
        """
        if not self.records:
            self.add({"format": FORMAT, **setup})
            return
        for where, old, new in pairs():
            self._refuse_changes(where, old, new)

    def find(self, **fields: Any) -> dict[str, Any] | None:
        """The first record with these fields."""
        return next((r for r in self.records if all(r.get(k) == v for k, v in fields.items())), None)

    def add(self, *records: dict[str, Any]) -> None:
        """Appends; when this returns the lines are on disk."""
        lines = [json.dumps(record) for record in records]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write("".join(line + "\n" for line in lines))
                handle.flush()
                os.fsync(handle.fileno())
        self.records += [json.loads(line) for line in lines]

    def drop_last(self, count: int) -> None:
        """Takes the last `count` records off the file: answers that a kill left without the rest of theirs."""
        if count and self.path is not None:
            lines = self.path.read_bytes().splitlines(keepends=True)
            os.truncate(self.path, sum(map(len, lines[:-count])))
        del self.records[len(self.records) - count :]

    def _read(self) -> list[dict[str, Any]]:
        """The whole lines; a last one without its end is taken off the file."""
        if self.path is None or not self.path.exists():
            return []
        whole = self.path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        try:
            records = [json.loads(line) for line in kept.splitlines()]
            old = bool(records) and "format" not in records[0] and "setup" in records[0].values()
            known = not records or old or isinstance(records[0]["format"], int)
        except (ValueError, KeyError, TypeError, AttributeError):
            known = False
        if not known:
            raise UserError(f"{self.path} is not {self.what}; use another {self.elsewhere}.")
        if records and records[0].get("format") != FORMAT:
            had = f"format {records[0]['format']}" if "format" in records[0] else "no format"
            raise self._other_version(f"it has {had} and this version writes format {FORMAT}")
        if len(kept) < len(whole):
            os.truncate(self.path, len(kept))
        return records

    def _other_version(self, why: str) -> UserError:
        return UserError(
            f"{self.path} was written by another version of kvattn ({why}); use another {self.elsewhere}, or go on "
            "with the version that wrote it."
        )

    def _refuse_changes(self, where: str, old: dict[str, Any], new: dict[str, Any]) -> None:
        for key in sorted(old.keys() | new.keys()):
            if key not in new and not _related(key, new):
                raise self._other_version(f"it has {where}{key}, which this version does not")
            if key not in old and not _related(key, old):
                raise self._other_version(f"it lacks {where}{key}")
            if old.get(key) != new.get(key):
                raise UserError(
                    f"{self.path} was made with {where}{key}={old.get(key)!r} and this run has {new.get(key)!r}; "
                    f"set it back, or start in another {self.elsewhere}."
                )


def _related(key: str, keys: Iterable[str]) -> bool:
    """`key`, indices aside, is one of `keys`, or above or below one: then a value changed, not the fields."""
    name = _without_indices(key)
    others = map(_without_indices, keys)
    return any(o == name or o.startswith(name + ".") or name.startswith(o + ".") for o in others)


def _without_indices(key: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", "", key)


def flat(tree: Any, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """{'train': {'steps': 3}} -> {'train.steps': 3}, as JSON reads it back; tuples of groups are indexed, plain tuples
    kept. Fields whose name begins with one of `leave_out` are missing."""
    found = {k: v for k, v in _flatten(tree, "").items() if not k.startswith(tuple(leave_out))}
    return json.loads(json.dumps(found))


def _flatten(tree: Any, prefix: str) -> dict[str, Any]:
    if isinstance(tree, (list, tuple)) and any(isinstance(item, dict) for item in tree):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {prefix: tree}
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def write_whole(path: str | os.PathLike, record: dict[str, Any]) -> pathlib.Path:
    """Writes `record` as a JSON file all at once: a command that is stopped leaves the file before it, or this one."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with open(part, "w", encoding="utf-8") as handle:
        handle.write(json.dumps(record, indent=1) + "\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, path)
    return path
