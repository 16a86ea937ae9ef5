"""How the code is cut: no import of ours hides in a function, the root of kvattn stays small, files stay readable."""

import ast

import pytest

from tests.helpers.paths import ROOT

OURS = ("kvattn", "sharding", "pallas_kernels", "configs", "experiments")
FILES = sorted(path for name in OURS for path in (ROOT / name).rglob("*.py"))
LINES = 450


def local_imports(tree):
    """Imports of our own packages inside functions."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            for node in ast.walk(function):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                yield from (name for name in names if name.split(".")[0] in OURS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_of_ours_hides_in_a_function_and_no_file_is_too_long(path):
    text = path.read_text(encoding="utf-8")
    assert list(local_imports(ast.parse(text))) == []
    assert text.count("\n") <= LINES


def test_the_check_sees_a_hidden_import():
    hidden = "def f():\n    from kvattn import model\n    import json\n    return model"
    assert list(local_imports(ast.parse(hidden))) == ["kvattn"]


def test_the_root_of_kvattn_holds_about_a_dozen_modules():
    assert len([p for p in (ROOT / "kvattn").glob("*.py") if p.name != "__init__.py"]) <= 14
