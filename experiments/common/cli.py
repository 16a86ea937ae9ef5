"""The door of every command: flags and config in, one-line errors out.

A command is a module `experiments/NAME.py` (or a package's `__main__.py`) whose main takes the typed, validated config:

    from experiments.common import cli

    def main(cfg: Experiment) -> int | None: ...

    if __name__ == "__main__":
        cli.run(main, "NAME")          # its row of experiments/common/commands.py: default config, shortcuts

`--config=configs/x.py:arg` names the file whose `get_config(arg)` returns a ConfigDict (or an Experiment);
`--config.key.sub=value` overrides one field, `--prompt=...` is short for `--config.decode.prompt=...`. Other
flags are plain absl flags. `--print_config` prints the resolved config, one pasteable override a line.

Bad input of any kind is one line on stderr and exit code 2; Ctrl-C is exit code 130. Anything else that
escapes is a bug of ours and keeps its traceback.
"""

import ast
import dataclasses
import difflib
import errno
import glob
import importlib.util
import logging as stdlib_logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from experiments.common.commands import COMMANDS, Row
from experiments.common.paths import CONFIGS, ROOT
from kvattn import config as config_lib
from kvattn.config.tagged import Tagged
from kvattn.errors import UserError
from sharding import ShardingError

_DISK = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}


class _Tuples(flags.ArgumentParser):
    """`a,b` or `(1, 2)` or `[1, 2]` or one value; an empty string is the empty tuple."""

    def parse(self, argument: Any) -> tuple:
        if not isinstance(argument, str):
            return tuple(argument)
        text = argument.strip()
        if text[:1] in ("(", "["):
            return tuple(ast.literal_eval(text))
        return tuple(_literal(item.strip()) for item in text.split(",") if item.strip())

    def flag_type(self) -> str:
        return "a,b,c"


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


config_flags.register_flag_parser_for_type(tuple, _Tuples())


def run(main: Callable[..., int | None], command: str | Row | None, *, argv: Sequence[str] | None = None) -> None:
    """Parses `argv` (sys.argv), calls `main(cfg)`, or `main()` of a command without a config, and exits the process.

    `command`: a name of `commands.COMMANDS`, or a row as there. Exit codes: what main returns, 2 for bad input, 130 for
    Ctrl-C.
    """
    argv = list(sys.argv if argv is None else argv)
    row = COMMANDS[command] if isinstance(command, str) else command
    config, default, shortcuts = row is not None, row.default if row else "", dict(row.shortcuts if row else {})
    _leave_out_absent()
    # A failed save raises once and is reported once; asyncio would tell of its other tasks at exit.
    stdlib_logging.getLogger("asyncio").setLevel(stdlib_logging.CRITICAL)
    try:
        if any(arg in ("--help", "-h", "-help", "--helpfull") for arg in argv[1:]):
            print(_help(default, config, shortcuts))
            sys.exit(0)
        if not config:
            app.run(lambda _: main(), argv=argv, flags_parser=_parse_plain)
        parsed: list[config_lib.Experiment] = []

        def parser(args: list[str]) -> list[str]:
            cfg, rest = parse(args, default=default, shortcuts=shortcuts)
            parsed.append(cfg)
            return rest

        app.run(lambda _: _main(main, parsed[0]), argv=argv, flags_parser=parser)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        os._exit(141)
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def _leave_out_absent() -> None:
    """Keeps JAX from looking for devices that no device file announces, where libtpu or a CUDA plugin is installed for
    its compiler alone: it would find none, and say so in many lines. JAX_PLATFORMS, when set, decides."""
    if jax.config.jax_platforms:
        return
    files = {"tpu": ("/dev/accel*", "/dev/vfio/[0-9]*"), "cuda": ("/dev/nvidia[0-9]*", "/dev/dxg")}
    plugins = {"tpu": ("libtpu",), "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin")}
    here = {name for name in plugins if any(map(importlib.util.find_spec, plugins[name]))}
    real = {name for name in here if any(map(glob.glob, files[name]))}
    if here - real:
        jax.config.update("jax_platforms", ",".join([*sorted(real), "cpu"]))


def _main(main: Callable[[config_lib.Experiment], int | None], cfg: config_lib.Experiment) -> int | None:
    if flags.FLAGS.print_config:
        print(format_config(cfg))
        return 0
    return main(cfg)


def explain(error: BaseException) -> str | None:
    """One sentence for an error that is the user's to mend (bad input, disk, memory); None for a bug.

    Looks through the chain of causes: a full disk may arrive wrapped by a checkpoint library.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    for e in seen:
        if isinstance(e, (UserError, ShardingError)):
            return _one_line(str(e))
    for e in seen:
        if isinstance(e, OSError) and e.errno in _DISK:
            where = f" ({e.filename})" if e.filename else ""
            return f"{_DISK[e.errno]}{where}; choose another place or free some, and run the same command again."
        if "Unable to initialize backend" in str(e):
            return f"JAX has no such platform here ({_one_line(str(e))[:160]}); unset JAX_PLATFORMS or name another."
        if "No space left on device" in str(e):
            return "no space left on the device; free some and run the same command again to resume."
        if isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e) or "Out of memory" in str(e):
            return (
                "out of memory; lower config.data.batch_size, config.data.seq_len or config.cache.capacity "
                f"({_one_line(str(e))[:160] or type(e).__name__})."
            )
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _parse_plain(argv: list[str]) -> list[str]:
    """Parses argv into the global flags. Raises UserError for unknown or badly typed flags."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(_flag_message(error)) from None
    _no_positional(rest)
    return rest


def _no_positional(rest: Sequence[str]) -> None:
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is no flag; flags are written --name=value.")


def _flag_message(error: Exception, shortcuts: Sequence[str] = ()) -> str:
    text = _one_line(str(error))
    match = re.match(r"Unknown command line flag '([^']*)'", text)
    if match:
        return f"--{match[1]} is no flag of this command{_near(match[1], [*flags.FLAGS, *shortcuts])}; see --help."
    return text


def _near(name: str, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.4)
    return f" (nearest valid: {near[0]})" if near else ""


def parse(
    argv: Sequence[str], *, default: str = "", shortcuts: Mapping[str, str] | None = None
) -> tuple[config_lib.Experiment, list[str]]:
    """argv (with the program's name first) -> (validated Experiment, what is left of argv).

    Raises UserError: no or unreadable config file, unknown field or flag, wrong type, illegal combination.
    """
    path, rest = _take_config_path(_expand_shortcuts(argv, dict(shortcuts or {})), default)
    loaded = load_config_file(path)
    if "print_config" not in flags.FLAGS:
        flags.DEFINE_bool("print_config", False, "print the resolved config and stop")
    values = flags.FlagValues()  # the command's flags and, in this call alone, the config's
    values.append_flag_values(flags.FLAGS)
    _check_overrides(rest, loaded)
    config_flags.DEFINE_config_dict("config", loaded, "", values, sys_argv=rest)
    try:
        rest = values(rest)
    except flags.Error as error:
        raise UserError(_flag_message(error, list(shortcuts or ()))) from None
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        raise UserError(_one_line(str(error))) from None
    _no_positional(rest)
    flags.FLAGS.mark_as_parsed()
    return config_lib.from_config_dict(values.config), rest


def _expand_shortcuts(argv: Sequence[str], shortcuts: dict[str, str]) -> list[str]:
    """--prompt=x -> --config.decode.prompt=x."""
    out = list(argv[:1])
    for arg in argv[1:]:
        match = re.match(r"--?(no)?([A-Za-z_0-9]+)(=.*)?$", arg, re.DOTALL)
        if match and match[2] in shortcuts:
            arg = f"--{match[1] or ''}config.{shortcuts[match[2]]}{match[3] or ''}"
        out.append(arg)
    return out


def _take_config_path(argv: list[str], default: str) -> tuple[str, list[str]]:
    """The last value of --config, and argv without it."""
    path, rest, i = default, [], 0
    while i < len(argv):
        match = re.match(r"--?config(=(.*))?$", argv[i], re.DOTALL)
        if match is None:
            rest.append(argv[i])
        elif match[1]:
            path = match[2]
        else:
            i += 1
            if i == len(argv):
                raise UserError("--config has no value; write --config=configs/study_smollm2.py.")
            path = argv[i]
        i += 1
    if not path:
        raise UserError(f"--config is missing; write --config=configs/X.py, X one of {', '.join(config_names())}.")
    return path, rest


def config_names() -> list[str]:
    """Names of the shipped experiment files."""
    has_it = re.compile(r"^def get_config\(", re.MULTILINE)
    return sorted(p.stem for p in CONFIGS.glob("*.py") if has_it.search(p.read_text(encoding="utf-8")))


def load_config_file(spec: str) -> ml_collections.ConfigDict:
    """Runs `get_config(arg)` of the file in `spec` = path[:arg]; returns a locked ConfigDict.

    A relative path is looked up in the working directory, then beside the package. Raises UserError: no such
    file, a file that does not run (with its line), or one whose get_config returns something else.
    """
    name, colon, arg = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        path = ROOT / name
    if not path.is_file():
        raise UserError(f"--config={name}: no such file{_near(Path(name).stem, config_names())}.")
    module_spec = importlib.util.spec_from_file_location(f"kvattn_config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={name} is no Python file; a config is a .py file with get_config().")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={name} has no get_config(); a config file returns its ConfigDict from it.")
        loaded = module.get_config(*([arg] if colon else []))
    except UserError:
        raise
    except Exception as error:
        raise UserError(_file_error(name, path, error)) from error
    if isinstance(loaded, config_lib.Experiment):
        loaded = config_lib.to_config_dict(loaded)
    if not isinstance(loaded, ml_collections.ConfigDict):
        raise UserError(f"--config={name}: get_config() returned {type(loaded).__name__}, not a ConfigDict.")
    return loaded.lock()


def _file_error(name: str, path: Path, error: Exception) -> str:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    line = error.lineno if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
    where = f" line {line}" if line else ""
    return f"--config={name}{where}: {type(error).__name__}: {error}"


def _check_overrides(argv: Sequence[str], loaded: ml_collections.ConfigDict) -> None:
    """Every --config.a.b names a field and its value fits. Raises UserError with the nearest valid name."""
    for i, arg in enumerate(argv):
        match = re.match(r"--?(no)?config\.([^=]+)(=(.*))?$", arg, re.DOTALL)
        if match is None:
            continue
        holder, where = loaded, "config"
        for part in re.findall(r"[^.\[\]]+|\[[^\]]*\]", match[2]):
            holder, where = _step(holder, part, where)
        if isinstance(holder, ml_collections.ConfigDict):
            inside = ", ".join(holder.keys())
            raise UserError(f"{where} is a group of fields; set one of {where}.{{{inside}}}.")
        if isinstance(holder, bool):
            _check_bool(where, match)
            continue
        value = match[4] if match[3] else (argv[i + 1] if i + 1 < len(argv) else None)
        if value is None:
            raise UserError(f"--{where} has no value; it takes {_takes(holder)}.")
        _check_value(where, holder, value)


def _step(holder: Any, part: str, where: str) -> tuple[Any, str]:
    """One step of a field's path: `.name` or `[index]`."""
    if part.startswith("["):
        if not isinstance(holder, tuple):
            raise UserError(f"{where} is {holder!r}, not a tuple; {part} does not apply.")
        if not re.fullmatch(r"\[\d+\]", part) or int(part[1:-1]) >= len(holder):
            raise UserError(f"{where}{part}: {where} has {len(holder)} entries, [0] the first.")
        return holder[int(part[1:-1])], where + part
    if not isinstance(holder, ml_collections.ConfigDict):
        raise UserError(f"{where} is {holder!r}; it has no field {part!r}.")
    if part not in holder:
        raise UserError(f"{where}.{part} is no field{_near(part, list(holder.keys()))}; see --print_config.")
    unset = holder[part] is None and holder.get_type(part) in (bool, int, float, str)
    return holder.get_type(part)() if unset else holder[part], f"{where}.{part}"


def _takes(value: Any) -> str:
    return "a tuple such as 1,2" if isinstance(value, tuple) else type(value).__name__


def _check_value(where: str, now: Any, text: str) -> None:
    try:
        if isinstance(now, tuple):
            _Tuples().parse(text)
        elif now is not None and not isinstance(now, str):
            type(now)(text)
    except (ValueError, SyntaxError, TypeError):
        raise UserError(f"{where} is {text!r}; it takes {_takes(now)}.") from None


def _check_bool(where: str, match: re.Match) -> None:
    """--config.x, --noconfig.x and --config.x=true|false|1|0."""
    text = (match[4] or "").lower() if match[3] else "true"
    if text not in ("true", "false", "t", "f", "1", "0") or (match[1] and match[3]):
        raise UserError(f"{where} is {match[4]!r}; it takes true or false.")


def format_config(cfg: Any, prefix: str = "--config") -> str:
    """Every field of a config, one `--config.a.b=value` a line; each can be pasted as an override.

    Fields that are None have no line, and an entry that a pattern has is set, not added: an override does
    not lengthen a tuple of groups.
    """
    if dataclasses.is_dataclass(cfg):
        fields = [(f".{f.name}", getattr(cfg, f.name)) for f in dataclasses.fields(cfg)]
        if isinstance(cfg, Tagged):
            fields = [(f".{cfg.tag_field}", cfg.tag), *fields]
        return "\n".join(format_config(value, prefix + name) for name, value in fields if value is not None)
    if isinstance(cfg, tuple) and any(dataclasses.is_dataclass(item) for item in cfg):
        items = ((f"{prefix}[{i}]", item) for i, item in enumerate(cfg) if item is not None)
        return "\n".join(format_config(item, name) for name, item in items)
    text = str(cfg)
    if isinstance(cfg, tuple):
        text = ",".join(str(item) for item in cfg)
    quoted = f"'{text}'" if re.search(r"[\s()'\"*?$;&|<>]", text) else text
    return f"{prefix}={quoted}"


def _help(default: str, config: bool, shortcuts: Mapping[str, str]) -> str:
    """The command's own docstring, then its flags."""
    module = sys.modules["__main__"]
    parts = [(getattr(module, "__doc__", None) or "").strip()]
    own = flags.FLAGS.flags_by_module_dict().get(sys.argv[0], [])
    lines = [f"  --{flag.name}={flag.default}  {flag.help}" for flag in own]
    if config:
        files = ", ".join(config_names())
        lines += [
            f"  --config=FILE[:arg]  config file{f', default {default}' if default else ''}; in configs/: {files}",
            "  --config.KEY=VALUE   overrides one field, e.g. --config.train.steps=5; tuples are a,b,c",
            "  --print_config       prints the resolved config, one override a line, and stops",
        ]
        lines += [f"  --{name}=VALUE  short for --config.{field}" for name, field in shortcuts.items()]
    return "\n\n".join([p for p in parts if p] + ["Flags:\n" + "\n".join(lines)])


logging.set_verbosity(logging.WARNING)
