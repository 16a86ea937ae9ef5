"""scripts/setup.sh picks the right Python, without installing anything: fake interpreters that answer one line."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

TOOLS = ("bash", "dirname", "ls", "sort", "cat")


@pytest.fixture
def machine(tmp_path):
    """A PATH with the tools the script needs and no Python, and an empty pyenv."""
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    (tmp_path / "pyenv" / "versions").mkdir(parents=True)
    return tmp_path


def python(path: Path, version: str) -> str:
    """A fake interpreter: prints its version whatever it is asked, or fails where `version` is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\n" if version else "#!/bin/sh\nexit 127\n")
    path.chmod(0o755)
    return str(path)


def pick(machine, **env):
    env = {"PATH": str(machine / "bin"), "PYENV_ROOT": str(machine / "pyenv"), "HOME": str(machine), **env}
    command = [str(ROOT / "scripts" / "setup.sh"), "--pick"]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def picked(machine, **env):
    done = pick(machine, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_312_comes_before_313_and_311(machine):
    python(machine / "bin/python3.11", "3.11")
    assert picked(machine).endswith("bin/python3.11")
    python(machine / "bin/python3.13", "3.13")
    assert picked(machine).endswith("bin/python3.13")
    python(machine / "bin/python3.12", "3.12")
    assert picked(machine).endswith("bin/python3.12")


def test_pyenv_comes_after_path_and_its_newest_patch_first(machine):
    python(machine / "pyenv/versions/3.12.1/bin/python", "3.12")
    python(machine / "pyenv/versions/3.12.10/bin/python", "3.12")
    assert "/3.12.10/" in picked(machine)
    on_path = python(machine / "bin/python3.12", "3.12")
    assert picked(machine) == on_path


def test_pyenv_312_comes_before_313_on_path(machine):
    python(machine / "bin/python3.13", "3.13")
    python(machine / "pyenv/versions/3.12.4/bin/python", "3.12")
    assert "/3.12.4/" in picked(machine)


def test_a_shim_that_does_not_run_is_passed_over(machine):
    python(machine / "bin/python3.12", "")
    python(machine / "pyenv/versions/3.12.4/bin/python", "3.12")
    assert "/3.12.4/" in picked(machine)


def test_plain_python3_serves_when_it_is_a_fitting_version(machine):
    python(machine / "bin/python3", "3.13")
    assert picked(machine).endswith("bin/python3")


@pytest.mark.parametrize("found", ["", "3.10", "3.14"])
def test_no_fitting_python_is_a_clear_message(machine, found):
    if found:
        python(machine / "bin/python3", found)
    done = pick(machine)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("setup: error: no Python found. Looked for 3.12 3.13 3.11 on PATH and under ")
    assert done.stderr.count("\n") == 1


def test_python_overrides_by_version_or_path(machine):
    python(machine / "bin/python3.12", "3.12")
    other = python(machine / "elsewhere/python", "3.11")
    python(machine / "pyenv/versions/3.11.9/bin/python", "3.11")
    assert picked(machine, PYTHON=other) == other
    assert "/3.11.9/" in picked(machine, PYTHON="3.11")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("3.9", "PYTHON=3.9; this needs one of: 3.12 3.13 3.11."),
        ("3.13", "PYTHON=3.13: no Python 3.13"),
        ("/nowhere/python", "PYTHON=/nowhere/python does not run"),
        ("old", "PYTHON=old is Python 3.10; this needs one of"),
    ],
)
def test_bad_overrides_are_refused(machine, value, message):
    python(machine / "bin/python3.12", "3.12")
    python(machine / "bin/old", "3.10")
    done = pick(machine, PYTHON=value)
    assert done.returncode == 2
    assert message in done.stderr


def test_peers_ask_for_311_alone(machine):
    python(machine / "bin/python3.12", "3.12")
    assert pick(machine, VERSIONS="3.11").returncode == 2
    python(machine / "bin/python3.11", "3.11")
    assert picked(machine, VERSIONS="3.11").endswith("python3.11")


def test_every_verb_does_its_own_setup():
    """Each verb that runs Python first makes its environment, directly or through `setup`."""
    text = (ROOT / "Makefile").read_text()
    rules = dict(re.findall(r"^([a-z-]+):(.*(?:\n\t.*)*)", text, re.MULTILINE))
    for verb in ("setup", "study", "study-scratch", "test", "test-peers", "bench", "lint"):
        assert "scripts/setup.sh" in rules[verb] or rules[verb].strip().startswith("setup"), verb


def test_constraints_pin_the_tested_jax_and_every_requirement():
    sets = {"py311-jax0.10.2": "0.10.2", "py312-jax0.11.2": "0.11.2"}
    required = re.findall(r'^ +"([A-Za-z_-]+)(?:\[\w+\])?>=', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert len(required) > 20
    for name, jax_version in sets.items():
        lines = (ROOT / "constraints" / f"{name}.txt").read_text().splitlines()
        pins = dict(line.lower().replace("_", "-").split("==") for line in lines if line[:1] != "#")
        assert pins["jax"] == pins["jaxlib"] == jax_version
        assert not {r.lower().replace("_", "-") for r in required} - set(pins)
