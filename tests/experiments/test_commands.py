"""The house of the commands: the table names every main; mains are short; imports stand at the top; no library error
speaks of flags."""

import ast
import dataclasses
import importlib
import re
import types

import pytest

from experiments.common import cli
from experiments.common.commands import COMMANDS, WITH_CONFIG
from experiments.launching import command as launch
from kvattn.config import Experiment
from tests.helpers.paths import ROOT

HOUSE = ROOT / "experiments"
FILES = sorted(HOUSE.rglob("*.py"))
OURS = {"kvattn", "sharding", "pallas_kernels", "configs", "experiments", "tests"}


def mains():
    """NAME -> file of every `python -m experiments.NAME`."""
    modules = {p.stem: p for p in HOUSE.glob("*.py") if p.stem != "__init__"}
    return modules | {p.parent.name: p for p in HOUSE.glob("*/__main__.py")}


def calls(tree, name):
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == name]


def test_the_table_names_every_main():
    assert set(COMMANDS) == set(mains())
    assert launch.commands() == [f"experiments.{name}" for name in WITH_CONFIG]
    assert {"study", "sharding_study"} <= set(WITH_CONFIG), "packages are launched too"


@pytest.mark.parametrize("name", mains())
def test_a_main_is_short_and_runs_its_own_row(name):
    text = mains()[name].read_text()
    (call,) = calls(ast.parse(text), "cli.run")
    assert ast.literal_eval(call.args[1]) == name
    assert len(text.splitlines()) <= 60


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_default_configs_load_and_shortcuts_are_fields(name):
    row = COMMANDS[name]
    cfg = cli.parse([name], default=row.default, shortcuts=row.shortcuts)[0]
    assert isinstance(cfg, Experiment)
    for flag, path in row.shortcuts.items():
        holder = cfg
        for part in path.split("."):
            assert part in {f.name for f in dataclasses.fields(holder)}, f"--{flag} is short for no field"
            holder = getattr(holder, part)


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_files_are_short_and_import_the_house_at_their_top(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 450
    tree = ast.parse(text)
    inner = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) and n not in tree.body]
    for node in inner:
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        assert not {n.partition(".")[0] for n in names} & OURS, f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("library", ["kvattn", "pallas_kernels", "sharding"])
def test_library_errors_do_not_speak_of_flags(library):
    """Fields and values are named; the command that has a flag for them adds it."""
    for file in (ROOT / library).rglob("*.py"):
        for node in (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Raise) and n.exc):
            words = "".join(n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))
            said = re.findall(r"(?<![\w-])--[a-z][\w]*", words.replace("--no-deps", ""))
            assert not said, f"{file.relative_to(ROOT)}:{node.lineno} says {said}"


@pytest.mark.parametrize("file", [f for f in FILES if f.stem != "transformers_worker"], ids=lambda p: p.stem)
def test_names_read_from_our_modules_exist(file):
    """`module.name` of every module of ours that a file imports: a room that moved names leaves none behind."""
    tree, modules = ast.parse(file.read_text()), {}
    for node in (n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module.partition(".")[0] in OURS):
        home = importlib.import_module(node.module)
        for alias in node.names:
            value = getattr(home, alias.name, None) or importlib.import_module(f"{node.module}.{alias.name}")
            if isinstance(value, types.ModuleType):
                modules[alias.asname or alias.name] = value
    reads = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    for node in reads:
        if node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"line {node.lineno}: {ast.unparse(node)}"
