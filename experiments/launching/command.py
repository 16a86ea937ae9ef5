"""Slices and commands: an experiment's command, checked, and the machines that it fits.

    command = resolve(["experiments.train", "--config=configs/train_tiny.py"])     # validated by the command itself
    name, text = targets.emit(command, "gcloud", parse_slice("v5e:4x4"), targets.Options())
    code = local.run(command, processes=2, devices=4)

`experiments.launching.targets` writes the text for each kind of machine, `experiments.launching.local` starts processes
here. Nothing talks to a cloud: the reader starts the text, or not.
Every target runs one process a host, and the processes find each other through `kvattn.train.processes`.
"""

import dataclasses
import difflib
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from experiments.common.commands import WITH_CONFIG
from experiments.common.paths import ROOT
from kvattn.errors import UserError
from sharding import ShardingError
from sharding.cost import slices
from sharding.cost.slices import Slice

JOINT = ("experiments.train", "experiments.uptrain")  # the commands whose processes work together


@dataclasses.dataclass(frozen=True)
class _Tpu:
    """How Google names a TPU. `counts` is what the number in an accelerator type counts per chip:
    TensorCores (2) or chips (1); `runtime` "" = the Cloud TPU API does not serve it."""

    accelerator: str
    counts: int
    runtime: str
    gke: str


# Accelerator types and shapes: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; runtime versions:
# docs.cloud.google.com/tpu/docs/runtimes (which also says that the Cloud TPU API does not serve tpu7x); node labels:
# xpk's src/xpk/core/system_characteristics.py.
TPUS = {
    "v4": _Tpu("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice"),
    "v5e": _Tpu("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": _Tpu("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": _Tpu("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
    "tpu7x": _Tpu("tpu7x", 2, "", "tpu7x"),
}
_SHAPES_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


@dataclasses.dataclass(frozen=True)
class Rented(Slice):
    """A slice that can be rented."""

    @property
    def accelerator(self) -> str:
        """Google's accelerator type: v5litepod-16; v4-64 counts TensorCores."""
        return f"{TPUS[self.chip].accelerator}-{self.chips * TPUS[self.chip].counts}"


def parse_slice(text: str) -> Rented:
    """`v4:2x2x4`, `v5e:4x4`, ... or GPUs: `H100:8` (one node), `H200:4x8` (nodes x GPUs a node).

    Raises UserError for an unknown chip, or a shape that cannot be rented.
    """
    chip, _, shape = text.partition(":")
    known = {name.lower(): name for name in (*slices.TPUS, *slices.GPUS)}
    if chip.lower() not in known:
        raise UserError(f"--slice={text} names no chip{near(chip, known.values())}; write one as v5e:4x4 or H200:2x8.")
    try:
        found = slices.parse_slice(f"{known[chip.lower()]}:{shape}")
    except ShardingError as error:
        raise UserError(f"--slice={text}: {error}") from None
    if found.is_tpu:
        _check_rentable(text, found)
    return Rented(found.chip, found.shape, found.hosts, found.per_host)


def _check_rentable(text: str, found: Slice) -> None:
    chip, shape, most = found.chip, found.shape, found.row.max_chips
    if len(shape) == 2:
        if shape not in _SHAPES_2D:
            shapes = ", ".join("x".join(map(str, s)) for s in _SHAPES_2D)
            raise UserError(f"--slice={text} is no {chip} slice; its shapes are {shapes}.")
        return
    small = shape in _SMALL_3D or (chip == "tpu7x" and shape == (1, 1, 1))
    regular = list(shape) == sorted(shape) and all(side % 4 == 0 for side in shape)
    if not small and not (regular and found.chips <= most):
        raise UserError(
            f"--slice={text} is no {chip} slice; its shapes are 2x2x1, 2x2x2, 2x2x4, 2x4x4 and AxBxC of multiples of "
            f"4 in rising order, up to {most} chips."
        )


def near(name: str, valid: Iterable[str]) -> str:
    """The nearest of the valid names, or all of them, as a parenthesis for an error message."""
    valid = list(valid)
    found = difflib.get_close_matches(name, valid, n=1, cutoff=0.4)
    return f" (nearest valid: {found[0]})" if found else f" (valid: {', '.join(valid)})"


# --- the command ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Command:
    """An experiment's module and arguments, and what a launcher must know of its config."""

    module: str
    args: tuple[str, ...]
    name: str  # config.name
    workdir: str
    mesh: tuple[int, int, int]  # data, fsdp, tensor
    rows: int  # sequences of one micro-batch, data.batch_size / train.accumulation

    def argv(self, python: str) -> list[str]:
        return [python, "-m", self.module, *self.args]


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """argv -> (the launcher's own arguments, the command's words), parted by the first `--`, or, where there is
    none, in front of the first word `experiments.X`."""
    words = list(argv)
    if "--" in words:
        cut = words.index("--")
        return words[:cut], words[cut + 1 :]
    cut = next((i for i, word in enumerate(words) if i and word.startswith("experiments.")), len(words))
    return words[:cut], words[cut:]


def commands() -> list[str]:
    """The experiments that take a config, as modules."""
    return [f"experiments.{name}" for name in WITH_CONFIG]


def resolve(words: Sequence[str]) -> Command:
    """Checks `[python -m] experiments.X FLAGS...` by running it with --print_config, its own door.

    Raises UserError: no such experiment, or what the command itself says of its flags and config.
    """
    words = list(words)
    if words[1:2] == ["-m"] and re.fullmatch(r"(.*/)?python[\d.]*", words[0]):
        words = words[2:]
    if not words:
        raise UserError("no command; write it after --, as in: -- experiments.train --config=configs/train_tiny.py.")
    module, args = words[0], tuple(words[1:])
    if module not in commands():
        raise UserError(f"{module!r} is no experiment with a config{near(module, commands())}.")
    line = [sys.executable, "-m", module, *args, "--print_config"]
    done = subprocess.run(line, env=environment(JAX_PLATFORMS="cpu"), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{module}: {lines[-1].removeprefix('error: ')}")
    found = {name: _field(done.stdout, name) for name in ("mesh.data", "data.batch_size", "train.accumulation")}
    if None in found.values():
        raise UserError(f"{module} with these arguments prints text and runs nothing; leave out --help and the like.")
    mesh = tuple(int(_field(done.stdout, f"mesh.{axis}")) for axis in ("data", "fsdp", "tensor"))
    rows = int(found["data.batch_size"]) // int(found["train.accumulation"])
    return Command(module, args, _field(done.stdout, "name") or "", _field(done.stdout, "workdir") or "", mesh, rows)


def _field(printed: str, name: str) -> str | None:
    """A field's value in what --print_config printed."""
    match = re.search(rf"^--config\.{re.escape(name)}=(.*)$", printed, re.MULTILINE)
    return match and re.sub(r"^'(.*)'$", r"\1", match[1])


def environment(**more: str) -> dict[str, str]:
    """This process's environment, with the experiments importable from any directory, and `more`."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | more


def check_fits(command: Command, where: str, *, devices: int, processes: int, shared_disk: bool) -> None:
    """Raises UserError where `command` could not use `devices` devices in `processes` processes.

    Several processes need a command of JOINT, a mesh of all devices, and a workdir that all of them see.
    """
    if command.module not in JOINT:
        if processes > 1:
            raise UserError(
                f"{where} has {processes} processes and {command.module} runs in one; take a slice of one host, or "
                f"{' or '.join(JOINT)}."
            )
        return
    used, needs = math.prod(command.mesh), []
    if used > devices or (processes > 1 and used != devices):
        shape = " x ".join(f"{name}={size}" for name, size in zip(("data", "fsdp", "tensor"), command.mesh))
        needs.append(f"config.mesh is {shape}, make its product {devices} (--config.mesh.fsdp={devices})")
    if processes > 1 and not shared_disk and "://" not in command.workdir:
        needs.append(
            f"config.workdir is {command.workdir!r} on each host's own disk, name one that all see "
            "(--config.workdir=gs://BUCKET/NAME)"
        )
    if needs:
        raise UserError(f"{where} has {devices} devices in {processes} processes: {'; '.join(needs)}.")
    shards = command.mesh[0] * command.mesh[1]
    if command.rows % shards:
        raise UserError(
            f"config.data.batch_size / train.accumulation is {command.rows}; make it a multiple of mesh.data x "
            f"mesh.fsdp = {shards}."
        )
