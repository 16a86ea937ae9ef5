r"""Starts an experiment somewhere else: prints (or writes) the script or manifest, or runs local processes.

    python -m experiments.launch --target=gcloud --slice=v5e:4x4 -- experiments.train --config=configs/train_tiny.py \
        --config.mesh.fsdp=16 --config.data.batch_size=16 --config.workdir=gs://BUCKET/tiny
    python -m experiments.launch --target=slurm --slice=H100:2x8 --out=jobs -- experiments.train ...
    python -m experiments.launch --run=local --processes=2 --devices=4 -- experiments.train --config.mesh.data=8 ...

What follows `--` (or starts at `experiments.`) is the command as you would type it after `python -m`; it is
checked, config and all, before anything is written. Targets: gcloud, queued, xpk, gke, sky (TPU), sky, slurm (GPU).
Nothing is sent to a cloud.
"""

import sys
from pathlib import Path

from absl import flags

from experiments.common import cli
from experiments.launching import command as launch
from experiments.launching import local as launch_local
from experiments.launching import targets as launch_targets
from kvattn.errors import UserError

RUN = flags.DEFINE_string("run", "print", "print the script or manifest (--out: write it) | local: start processes")
TARGET = flags.DEFINE_string("target", "", " | ".join(launch_targets.TARGETS))
SLICE = flags.DEFINE_string("slice", "", "v5e:4x4, v4:2x2x4, v5p:.., v6e:.., tpu7x:..; H100:8, H200:4x8 (nodes x GPUs)")
OUT = flags.DEFINE_string("out", "", "directory to write the file into, instead of standard output")
PROCESSES = flags.DEFINE_integer("processes", 1, "with --run=local: processes")
DEVICES = flags.DEFINE_integer("devices", 1, "with --run=local: fake CPU devices of each process")
NAMES = {
    "name": "of the VM, workload or job",
    "zone": "of the provider",
    "project": "of the provider",
    "cluster": "with --target=xpk: the GKE cluster",
    "image": "with --target=gke or xpk: a container image of this repository",
}
OPTIONS = {name: flags.DEFINE_string(name, "", text) for name, text in NAMES.items()}


def main(words: list[str]) -> int:
    if RUN.value == "local":
        if TARGET.value or SLICE.value or OUT.value:
            raise UserError("--run=local takes --processes and --devices; leave out --target, --slice and --out.")
        return launch_local.run(launch.resolve(words), processes=PROCESSES.value, devices=DEVICES.value)
    if RUN.value != "print":
        raise UserError(f"--run={RUN.value}; it takes print or local.")
    launch_targets.check_target(TARGET.value)
    where = launch.parse_slice(SLICE.value)
    if OUT.value and Path(OUT.value).exists() and not Path(OUT.value).is_dir():
        raise UserError(f"--out={OUT.value} is a file; name a directory.")
    options = launch_targets.Options(**{name: flag.value for name, flag in OPTIONS.items()})
    file, text = launch_targets.emit(launch.resolve(words), TARGET.value, where, options)
    print(launch_targets.write(OUT.value, file, text) if OUT.value else text, end="\n" if OUT.value else "")
    return 0


if __name__ == "__main__":
    own, rest = launch.split(sys.argv)
    cli.run(lambda: main(rest), "launch", argv=own)
