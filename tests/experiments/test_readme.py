"""README.md and CONTRIBUTING.md are true: figures, commands, files, and the Python example."""

import contextlib
import io
import re

import pytest

from configs import sizes, variants
from experiments.common.commands import COMMANDS
from kvattn import account, convert
from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")}
BYTES = dict(re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", README, re.MULTILINE))


def converted(name):
    return convert.plan(sizes.SIZES["smollm2-135m"], variants.ROWS[name].convert)


def test_every_row_is_in_the_table_or_named_beside_another():
    assert set(BYTES) <= set(variants.ROWS)
    for name in variants.ROWS:
        assert f"`{name}`" in README


@pytest.mark.parametrize("name", sorted(variants.ROWS))
def test_bytes_column(name):
    if name not in BYTES:
        name = name.split("_")[0]  # mqa_first and mqa_random have mqa's shape
    cfg, store = converted(name), variants.ROWS[name].cache
    assert account.kv_bytes_per_token(cfg, store) == int(BYTES[name])


def test_bytes_a_window_holds():
    said = int(re.search(r"at 1024 tokens\s+`window_sinks` holds (\d+) bytes a token", README)[1])
    held = account.kv_bytes_per_token(converted("window_sinks"), variants.ROWS["window_sinks"].cache, context=1024)
    assert said == int(held)


@pytest.mark.parametrize("document", sorted(TEXTS))
def test_commands_and_files_exist(document):
    text = TEXTS[document]
    for name in re.findall(r"python -m experiments\.(\w+)", text):
        assert name in COMMANDS, name
    for path in re.findall(r"\b(?:configs|tests|kvattn|sharding|notebooks|scripts|constraints)/[\w/.]*\w", text):
        assert "NAME" in path or (ROOT / path).exists(), path
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL)) + " ".join(re.findall(r"`(make [^`]*)`", text))
    assert set(re.findall(r"\bmake ([a-z-]+)", code)) <= verbs


def test_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert "Paris" in printed.getvalue()
