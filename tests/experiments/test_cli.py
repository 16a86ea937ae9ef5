"""Commands as a person meets them: flags in, one line and an exit code out."""

import errno
import fnmatch
import os
import subprocess
import sys
import types

import ml_collections
import pytest
from absl import flags

from experiments.common import cli
from kvattn import config
from kvattn.errors import UserError
from tests.helpers.paths import ROOT

COMMAND = '''"""A command that a test runs.

It says what it got.
"""
import errno, sys
from absl import flags
from experiments.common import cli
from experiments.common.commands import Row
from kvattn.errors import UserError

OUT = flags.DEFINE_string("out", "here.npy", "where to write")

def main(cfg):
    print("got", cfg.train.steps, repr(cfg.decode.prompt), OUT.value, cfg.variants)
    if OUT.value == "user":
        raise UserError("decode.prompt is bad;\\n  change it.")
    if OUT.value == "full":
        raise OSError(errno.ENOSPC, "No space left on device", "/there/state")
    if OUT.value == "wrapped":
        try:
            raise OSError(errno.EROFS, "Read-only file system", "/there")
        except OSError as e:
            raise RuntimeError("saving failed") from e
    if OUT.value == "stop":
        raise KeyboardInterrupt
    if OUT.value == "pipe":
        for _ in range(100_000):
            print("a line that nobody reads")
    if OUT.value == "bug":
        raise ZeroDivisionError("ours")
    return 3 if OUT.value == "three" else None

if __name__ == "__main__":
    cli.run(main, Row(sys.argv[0].replace("command.py", "file.py"), {"prompt": "decode.prompt"}))
'''

FILE = """
from kvattn import config as c

def get_config(which=""):
    rows = (c.VariantConfig("base"), c.VariantConfig("mqa", (c.Conversion.of("gqa", k_heads=1),)))
    model = c.ModelConfig(layers=(c.Layer(c.Attention.of("heads")),))
    return c.to_config_dict(c.Experiment(name="x" + which, model=model, study=c.StudyConfig(rows=rows),
                                         convert=(c.Conversion.of("gqa", k_heads=1),)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    (path / "command.py").write_text(COMMAND)
    (path / "file.py").write_text(FILE)
    return path


def command(folder, *args):
    """Runs the test command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(folder / "command.py"), *args], capture_output=True, text=True, cwd=folder, env=env
    )


def parse(folder, *args):
    argv = ["command", f"--config={folder / 'file.py'}", *args]
    return cli.parse(argv, shortcuts={"prompt": "decode.prompt"})[0]


def test_command_runs_with_overrides_shortcuts_and_own_flags(folder):
    done = command(folder, "--config=file.py:q", "--config.steps=7", "--prompt=a b", "--out=k", "--config.variants=mqa")
    assert (done.returncode, done.stdout, done.stderr) == (0, "got 7 'a b' k ('mqa',)\n", "")


@pytest.mark.parametrize(
    ("out", "code", "stderr"),
    [
        ("user", 2, "error: decode.prompt is bad; change it.\n"),
        ("full", 2, "error: no space left on the device (/there/state); "),
        ("wrapped", 2, "error: the file system is read-only (/there); "),
        ("stop", 130, "interrupted\n"),
        ("three", 3, ""),
    ],
)
def test_exit_codes(folder, out, code, stderr):
    done = command(folder, f"--out={out}")
    assert done.returncode == code
    assert done.stderr.startswith(stderr)
    assert done.stderr.count("\n") == (1 if stderr else 0)


def test_a_bug_keeps_its_traceback(folder):
    done = command(folder, "--out=bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError: ours" in done.stderr


def test_a_reader_that_leaves_ends_the_command_quietly(folder):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = f"{sys.executable} {folder / 'command.py'} --out=pipe | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=folder, env=env)
    assert (done.returncode, done.stderr) == (141, "")
    assert done.stdout.startswith("got ")


def test_bad_flag_is_one_line_from_a_real_process(folder):
    done = command(folder, "--config.train.stepps=7")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: config.train.stepps is no field (nearest valid: steps); see --print_config.\n"


def test_print_config_can_be_pasted_back(folder):
    done = command(folder, "--config.steps=7", "--config.model.layers[0].mask.window=9", "--print_config")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert "--config.train.steps=7" in lines
    assert "--config.model.layers[0].mask.window=9" in lines
    assert "--config.study.rows[1].convert[0].kind=gqa" in lines
    want = parse(folder, "--config.steps=7", "--config.model.layers[0].mask.window=9")
    assert parse(folder, *[line.replace("'", "") for line in lines]) == want


def test_help_tells_doc_flags_and_shortcuts(folder):
    done = command(folder, "--help")
    assert done.returncode == 0
    for part in ("A command that a test runs.", "--out=here.npy", "--prompt=VALUE", "study_smollm2", "--print_config"):
        assert part in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.sed=1"], "config.sed is no field (nearest valid: seed)"),
        (["--config.train.steps=abc"], "config.train.steps is 'abc'; it takes int."),
        (["--config.train.steps=1.5"], "config.train.steps is '1.5'; it takes int."),
        (["--config.optimizer.learning_rate=fast"], "config.optimizer.learning_rate is 'fast'; it takes float."),
        (["--config.model.tied_kv=maybe"], "config.model.tied_kv is 'maybe'; it takes true or false."),
        (["--config.train=4"], "config.train is a group of fields; set one of config.train.{accumulation"),
        (["--config.seed"], "config.seed has no value; it takes int."),
        (["--config.seed.x=1"], "config.seed is 0; it has no field 'x'."),
        (["--config.convert[3].k_heads=3"], "config.convert[3]: config.convert has 1 entries"),
        (["--config.convert.k_heads=3"], "config.convert is"),
        (["--config.variants=mqq"], "config.variants has 'mqq' (nearest valid: mqa); rows are base, mqa."),
        (["--config.cache.kinds=fool"], "cache.kinds is 'fool'"),
        (["--config.model.n_heads=5"], "model.n_k_heads is 4; it must divide model.n_heads = 5."),
        (["--config.cache.kinds=(1,"], "config.cache.kinds is '(1,'; it takes a tuple such as 1,2."),
        (["--ou=1"], "--ou is no flag of this command"),
        (["more"], "'more' is no flag"),
        (["--config=nowhere.py"], "--config=nowhere.py: no such file"),
        (["--config=study_smol.py"], "no such file (nearest valid: study_smollm2)"),
        (["--config"], "--config has no value"),
    ],
)
def test_bad_arguments_name_the_field_and_the_fix(folder, args, message):
    with pytest.raises(UserError) as error:
        parse(folder, *args)
    assert message in str(error.value)
    assert "\n" not in cli.explain(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config():\n    return 1 +\n", "line 2: SyntaxError"),
        ("x = 1\ndef get_config():\n    return 1 / 0\n", "line 3: ZeroDivisionError: division by zero"),
        ("x = 1\n", "has no get_config()"),
        ("def get_config():\n    return None\n", "returned NoneType, not a ConfigDict"),
        ("import nowhere_at_all\n", "line 1: ModuleNotFoundError"),
        ("from kvattn import config\ndef get_config():\n    return config.Experiment(sed=1)\n", "line 3: TypeError"),
        (
            "from kvattn.config import *\ndef get_config():\n    c = to_config_dict(Experiment())\n"
            "    c.train.stepps = 1\n    return c\n",
            "line 4: AttributeError",
        ),
    ],
)
def test_bad_config_files_name_file_and_line(tmp_path, text, message):
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        cli.load_config_file(str(file))
    assert str(file) in str(error.value)
    assert message in str(error.value)


def test_missing_config_lists_what_there_is():
    with pytest.raises(UserError, match="--config is missing.*study_smollm2"):
        cli.parse(["command"])


def test_overrides_reach_every_kind_of_field(folder):
    args = ["--config.model.layers[0].mask.window=4", "--config.convert[0].method=first", "--config.steps", "-1"]
    args += ["--noconfig.model.tied_embeddings", "--config.optimizer.learning_rate=1", "--config.data.paths=a*.txt,b"]
    args += ["--config.eval.needle_depths=(0.5,)", "--config.decode.prompt=", "--config.model.kv_source=0,0"]
    cfg = parse(folder, *args)
    assert cfg.model.layers[0].mask.window == 4
    assert cfg.convert[0].method == "first"
    assert cfg.train.steps == config.TrainConfig().steps
    assert cfg.model.tied_embeddings is False
    assert cfg.optimizer.learning_rate == 1.0
    assert isinstance(cfg.optimizer.learning_rate, float)
    assert cfg.data.paths == ("a*.txt", "b")
    assert cfg.eval.needle_depths == (0.5,)
    assert cfg.decode.prompt == ""
    assert cfg.model.kv_source == (0, 0)


def test_the_last_override_wins_and_prompt_keeps_its_text(folder):
    cfg = parse(folder, "--config.seed=1", "--prompt=x=1, --y 'z'\nnew", "--config.seed=2")
    assert cfg.seed == 2
    assert cfg.decode.prompt == "x=1, --y 'z'\nnew"


def test_a_loaded_file_is_locked(folder):
    loaded = cli.load_config_file(str(folder / "file.py"))
    assert isinstance(loaded, ml_collections.ConfigDict)
    with pytest.raises(AttributeError):
        loaded.train.stepps = 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_disk_errors_are_explained_through_wrappers(code):
    outer = ValueError("async save failed")
    outer.__cause__ = OSError(code, os.strerror(code), "/w/state")
    assert "/w/state" in cli.explain(outer)


def test_memory_errors_are_explained_and_bugs_are_not():
    assert "out of memory" in cli.explain(MemoryError())
    assert "out of memory" in cli.explain(RuntimeError("RESOURCE_EXHAUSTED: allocating 1TB"))
    assert "JAX_PLATFORMS" in cli.explain(RuntimeError("Unable to initialize backend 'tpu': no"))
    assert "no space left" in cli.explain(RuntimeError("write: No space left on device [path]"))
    assert cli.explain(KeyError("k")) is None
    assert cli.explain(FileNotFoundError(errno.ENOENT, "no such file")) is None


def test_parsing_leaves_the_global_flags_as_they_were(folder):
    before = set(flags.FLAGS)
    assert parse(folder, "--config.seed=1").seed == 1
    assert set(flags.FLAGS) - before <= {"print_config"}
    assert parse(folder).seed == 0


TPU, GPU = "libtpu", "jax_cuda13_plugin"


@pytest.mark.parametrize(
    "platforms,packages,files,chosen",
    [
        (None, (TPU,), (), "cpu"),
        (None, (TPU,), ("/dev/accel0",), None),
        ("tpu", (TPU,), (), None),
        (None, (), (), None),
        (None, (TPU, GPU), (), "cpu"),
        (None, (TPU, GPU), ("/dev/nvidia0",), "cuda,cpu"),
        (None, (GPU,), (), "cpu"),
    ],
)
def test_devices_are_not_looked_for_where_only_their_compiler_is(monkeypatch, platforms, packages, files, chosen):
    """A plugin without its device: JAX is told so; a device file or the user's JAX_PLATFORMS decides otherwise."""
    told = {}
    config = types.SimpleNamespace(jax_platforms=platforms, update=told.__setitem__)
    monkeypatch.setattr(cli, "jax", types.SimpleNamespace(config=config))
    monkeypatch.setattr(cli.glob, "glob", lambda pattern: [f for f in files if fnmatch.fnmatch(f, pattern)])
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: object() if name in packages else None)
    cli._leave_out_absent()
    assert told.get("jax_platforms") == chosen
