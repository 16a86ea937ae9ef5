"""Writes the script or manifest that makes a kind of machine run an experiment: one file a target.

    name, text = emit(command, "gke", parse_slice("v5p:2x2x4"), Options(image="REGION-docker.pkg.dev/..."))

| target | file | what runs it |
|---|---|---|
| gcloud | gcloud.sh | Cloud TPU VMs: create, install on all workers, run, fetch, delete |
| queued | queued.sh | the same through a queued resource, which waits for capacity |
| xpk | xpk.sh | xpk workload on a GKE cluster that has the slice |
| gke | jobset.yaml | kubectl apply, JobSet controller installed |
| sky | sky.yaml | sky launch: TPU VMs and GPU nodes |
| slurm | slurm.sbatch | sbatch: GPU nodes |

Arguments reach the experiment unchanged: they are quoted once for each reader between here and there (shell,
ssh, Kubernetes, which reads $$ and $(NAME), YAML). YAML is written by the few lines at the end, with every string
quoted, so that no library is needed and no value can turn into a number, a date or a boolean.
"""

import dataclasses
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.common.paths import ROOT
from experiments.launching.command import TPUS, Command, Slice, check_fits, near
from kvattn.errors import UserError

PYTHON = ".venv/bin/python"  # what scripts/setup.sh makes
_FILE_SYSTEMS = {"gs": "gcsfs", "s3": "s3fs"}  # packages behind gs:// and s3:// paths


@dataclasses.dataclass(frozen=True)
class Options:
    """Names on the provider's side; empty = the tool's own default, or an error where a target needs it."""

    name: str = ""  # of the VM, workload or job; empty = made from the command
    zone: str = ""
    project: str = ""
    cluster: str = ""  # xpk
    image: str = ""  # gke, xpk


@dataclasses.dataclass(frozen=True)
class _Target:
    file: str
    write: Callable[[Command, Slice, Options], str]
    tpu: bool
    gpu: bool
    shared_disk: bool  # whether all hosts see the launching machine's working directory


def emit(command: Command, target: str, where: Slice, options: Options) -> tuple[str, str]:
    """(file name, text) for `command` on `where`.

    Raises UserError: unknown target, a slice it does not have, an option it needs, a config path that does not
    travel, a command that does not fit the slice (`launch.check_fits`).
    """
    check_target(target)
    row = TARGETS[target]
    if where.is_tpu and not row.tpu or not where.is_tpu and not row.gpu:
        kind = "TPU" if where.is_tpu else "GPU"
        able = ", ".join(name for name, t in TARGETS.items() if (t.tpu if where.is_tpu else t.gpu))
        raise UserError(f"--target={target} has no {kind}s and --slice={where.name} is {kind}s; take {able}.")
    if where.is_tpu and not TPUS[where.chip].runtime and target in ("gcloud", "queued", "sky"):
        raise UserError(f"--target={target} uses the Cloud TPU API, which has no {where.chip}; take gke or xpk.")
    options = dataclasses.replace(options, name=_name(command, options))
    if not row.shared_disk:
        _check_travels(command)
    hosts = where.chips // 4 if target == "xpk" and where.chips > 1 else where.hosts
    check_fits(command, where.name, devices=where.devices, processes=hosts, shared_disk=row.shared_disk)
    return row.file, row.write(command, where, options)


def check_target(target: str) -> None:
    """Raises UserError unless `target` is a key of TARGETS."""
    if target not in TARGETS:
        raise UserError(f"--target={target} is no target{near(target, TARGETS)}.")


def write(folder: str, file: str, text: str) -> Path:
    """Writes `text` to folder/file, whole or not at all; makes the folder. Raises OSError."""
    path = Path(folder) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _name(command: Command, options: Options) -> str:
    if not options.name:
        made = f"{command.module.removeprefix('experiments.')}-{command.name}".lower()
        return re.sub(r"[^a-z0-9]+", "-", f"kvattn-{made}")[:40].strip("-")
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", options.name):
        raise UserError(f"--name={options.name}: use up to 40 of a-z, 0-9 and -, the first a letter.")
    return options.name


def _check_travels(command: Command) -> None:
    """The repository is what is copied, so a config file must lie in it, named from its root."""
    words = [
        arg.partition("=")[2] or following
        for arg, following in zip(command.args, (*command.args[1:], ""))
        if re.fullmatch(r"--?config(=.*)?", arg, re.DOTALL)
    ]
    for word in words:
        path = word.partition(":")[0]
        if path.startswith("/") or ".." in path.split("/") or not (ROOT / path).is_file():
            raise UserError(f"--config={path} stays behind: only the repository is copied; put it under configs/.")


# --- pieces --------------------------------------------------------------------------------------------


def _headline(command: Command, where: Slice, hosts: int) -> str:
    return f"# {command.module} on {where.name}: {where.chips} chips, {hosts} host{'s' * (hosts > 1)}."


def _extra_pip(command: Command) -> str:
    package = _FILE_SYSTEMS.get(command.workdir.partition("://")[0]) if "://" in command.workdir else None
    return f"EXTRA_PIP={package} " if package else ""


def _install(command: Command, extra: str) -> str:
    """Lines that make .venv on a fresh machine; uv brings a Python that is new enough."""
    return (
        "command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh\n"
        'export PATH="$HOME/.local/bin:$PATH"\n'
        "uv python install 3.12\n"
        f'{_extra_pip(command)}PYTHON="$(uv python find 3.12)" scripts/setup.sh .venv {extra}\n'
    )


def _line(command: Command, joined: bool, python: str = PYTHON) -> str:
    """The experiment as one shell command; `joined` = jax finds the other processes by itself."""
    return ("KVATTN_DISTRIBUTED=1 " if joined else "") + shlex.join(command.argv(python))


def _flags(options: Options) -> str:
    given = {"zone": options.zone, "project": options.project}
    return "".join(f" --{key}={shlex.quote(value)}" for key, value in given.items() if value)


# --- Cloud TPU VMs -------------------------------------------------------------------------------------


def _gcloud(command: Command, where: Slice, options: Options) -> str:
    vm, flags = "gcloud compute tpus tpu-vm", _flags(options)
    create = f"  {vm} create {options.name}{flags} {_tpu_flags(where)} --version={TPUS[where.chip].runtime}\n"
    delete = f"  {vm} delete {options.name}{flags} --quiet\n"
    return _tpu_script("gcloud.sh", command, where, options, create, delete)


def _queued(command: Command, where: Slice, options: Options) -> str:
    queue, name, flags = "gcloud compute tpus queued-resources", options.name, _flags(options)
    create = (
        f"  {queue} create {name} --node-id={name}{flags} {_tpu_flags(where)} "
        f"--runtime-version={TPUS[where.chip].runtime}\n"
        "  local state=\n"
        '  while [ "$state" != ACTIVE ]; do\n'
        f"    state=$({queue} describe {name}{flags} --format='value(state.state)')\n"
        '    case "$state" in\n'
        "      ACTIVE) ;;\n"
        '      FAILED | SUSPENDED) echo "queued resource: $state" >&2; return 1 ;;\n'
        "      *) sleep 30 ;;\n"
        "    esac\n"
        "  done\n"
    )
    delete = f"  {queue} delete {name}{flags} --force --quiet\n"
    return _tpu_script("queued.sh", command, where, options, create, delete)


def _tpu_flags(where: Slice) -> str:
    if where.is_default_shape:
        return f"--accelerator-type={where.accelerator}"
    return f"--type={TPUS[where.chip].accelerator} --topology={where.topology}"


def _tpu_script(file: str, command: Command, where: Slice, options: Options, create: str, delete: str) -> str:
    """One function a step; without arguments the script creates, installs and runs."""
    vm, name, flags = "gcloud compute tpus tpu-vm", options.name, _flags(options)
    install = "set -e\nmkdir -p kvattn\ntar -xzf kvattn.tgz -C kvattn\ncd kvattn\n" + _install(command, "tpu")
    run = f"cd kvattn && {_line(command, where.hosts > 1)}"
    source = command.workdir if command.workdir.startswith("/") else f"kvattn/{command.workdir}"
    fetch = f"  {vm} scp --recurse {shlex.quote(f'{name}:{source}')} . --worker=0{flags}\n"
    if "://" in command.workdir or not command.workdir:
        fetch = "  echo 'nothing to fetch: the workdir is not on the TPU VM' >&2\n"
    return (
        "#!/usr/bin/env bash\n"
        f"{_headline(command, where, where.hosts)}\n"
        f"#   bash {file}          create, setup, run (from the repository's root)\n"
        f"#   bash {file} STEP...  some of: create setup run fetch delete; `run` again resumes\n"
        f"# The TPU is paid for until: bash {file} delete\n"
        "set -euo pipefail\n\n"
        f"create() {{\n{create}}}\n\n"
        "setup() { # the working tree, without what git ignores\n"
        "  local archive; archive=$(mktemp -d)/kvattn.tgz\n"
        '  git ls-files -z --cached --others --exclude-standard | tar --null -czf "$archive" -T -\n'
        f'  {vm} scp "$archive" {name}: --worker=all{flags}\n'
        f"  {vm} ssh {name} --worker=all{flags} --command={shlex.quote(install)}\n"
        "}\n\n"
        f"run() {{\n  {vm} ssh {name} --worker=all{flags} --command={shlex.quote(run)}\n}}\n\n"
        f"fetch() {{\n{fetch}}}\n\n"
        f"delete() {{\n{delete}}}\n\n"
        "[ $# -gt 0 ] || set -- create setup run\n"
        'for step in "$@"; do\n'
        '  case "$step" in\n'
        '    create | setup | run | fetch | delete) "$step" ;;\n'
        '    *) echo "no step $step; steps are create setup run fetch delete" >&2; exit 2 ;;\n'
        "  esac\n"
        "done\n"
    )


# --- GKE -----------------------------------------------------------------------------------------------


def _kubernetes(text: str) -> str:
    """Kubernetes reads $$ as $ and $(NAME) as a variable in a container's command."""
    return text.replace("$", "$$")


def _xpk(command: Command, where: Slice, options: Options) -> str:
    """xpk puts the command into a YAML block of its own and has 4-chip machines only."""
    if not options.cluster:
        raise UserError("--cluster is empty; --target=xpk needs the cluster's name, --cluster=NAME.")
    if where.chip == "v5e" and where.chips < 8:
        raise UserError(f"xpk has no {where.name}; its v5e slices start at v5e:2x4, or take --target=gke.")
    if any("\n" in arg for arg in command.args):
        raise UserError("an argument has a line break, which xpk cannot carry; take --target=gke.")
    hosts = max(where.chips // 4, 1)
    kind = where.accelerator if where.is_default_shape else f"{TPUS[where.chip].accelerator}-{where.topology}"
    line = _line(command, hosts > 1)
    if options.image:
        source = f"--docker-image={shlex.quote(options.image)}"
    else:
        source = "--base-docker-image=python:3.12 --script-dir=."
        line = f"{_extra_pip(command)}scripts/setup.sh .venv tpu && {line}"
    cluster = f"--cluster={shlex.quote(options.cluster)} --workload={options.name}{_flags(options)}"
    return (
        "#!/usr/bin/env bash\n"
        f"{_headline(command, where, hosts)}\n"
        "#   bash xpk.sh          create the workload (from the repository's root)\n"
        "#   bash xpk.sh delete   delete it\n"
        "set -euo pipefail\n"
        'case "${1:-create}" in\n'
        f"  create) xpk workload create {cluster} --tpu-type={kind} --num-slices=1 {source} \\\n"
        f"    --command={shlex.quote(_kubernetes(line))} ;;\n"
        f"  delete) xpk workload delete {cluster} ;;\n"
        '  *) echo "no step $1; steps are create delete" >&2; exit 2 ;;\n'
        "esac\n"
    )


def _gke(command: Command, where: Slice, options: Options) -> str:
    if not options.image:
        raise UserError("--image is empty; --target=gke needs a container image of this repository, --image=NAME.")
    limits = {"google.com/tpu": where.per_host}
    container: dict[str, Any] = {
        "name": "kvattn",
        "image": options.image,
        "command": [_kubernetes(word) for word in command.argv(PYTHON)],
        "ports": [{"containerPort": 8471}, {"containerPort": 8476}],  # libtpu, jax.distributed
        "resources": {"requests": limits, "limits": limits},
    }
    if where.hosts > 1:
        container["env"] = [{"name": "KVATTN_DISTRIBUTED", "value": "1"}]
    pod = {
        "restartPolicy": "Never",
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": TPUS[where.chip].gke,
            "cloud.google.com/gke-tpu-topology": where.topology,
        },
        "containers": [container],
    }
    job = {"parallelism": where.hosts, "completions": where.hosts, "backoffLimit": 0, "template": {"spec": pod}}
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": options.name},
            "failurePolicy": {"maxRestarts": 3 if "://" in command.workdir else 0},
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": job}}],
        },
    }
    return (
        f"{_headline(command, where, where.hosts)}\n"
        "# kubectl apply -f jobset.yaml; the cluster has the JobSet controller and a node pool of this slice.\n"
        "# The image holds this repository with its environment, for instance by this Dockerfile:\n"
        "#   FROM python:3.12\n"
        "#   WORKDIR /kvattn\n"
        "#   COPY . .\n"
        f"#   RUN {_extra_pip(command)}scripts/setup.sh .venv tpu\n"
    ) + to_yaml(manifest)


# --- SkyPilot and Slurm --------------------------------------------------------------------------------


def _sky(command: Command, where: Slice, options: Options) -> str:
    if where.is_tpu and not where.is_default_shape:
        raise UserError(f"SkyPilot cannot ask for the shape {where.name}; take --target=gcloud.")
    joined = where.hosts > 1
    if where.is_tpu:  # a slice is one node to SkyPilot, which runs setup and run on each of its hosts
        tpu = TPUS[where.chip]
        resources = {"accelerators": f"tpu-{where.accelerator}", "accelerator_args": {"runtime_version": tpu.runtime}}
        run, nodes = _line(command, joined), 1
    else:
        resources = {"accelerators": f"{where.chip}:{where.per_host}"}
        nodes, run = where.hosts, _line(command, False)
        if joined:
            run = (
                'export JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):8476"\n'
                'export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"\n' + run
            )
    if options.zone:
        resources["zone"] = options.zone
    task = {
        "name": options.name,
        "resources": resources,
        "num_nodes": nodes,
        "workdir": ".",
        "setup": "set -e\n" + _install(command, "tpu" if where.is_tpu else "gpu"),
        "run": run + "\n",
    }
    use = f"# sky launch -c {options.name} sky.yaml; sky down {options.name}\n"
    return f"{_headline(command, where, where.hosts)}\n{use}" + to_yaml(task)


def _slurm(command: Command, where: Slice, options: Options) -> str:
    """One task a node with all its GPUs; jax finds nodes and ranks in Slurm's variables."""
    joined = where.hosts > 1
    join = (
        "# Without this jax would give each task the one GPU of its local rank.\n"
        f"export JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(where.per_host)))}\n"
    )
    return (
        "#!/usr/bin/env bash\n"
        f"#SBATCH --job-name={options.name}\n"
        f"#SBATCH --nodes={where.hosts}\n"
        "#SBATCH --ntasks-per-node=1\n"
        f"#SBATCH --gpus-per-node={where.per_host}\n"
        "#SBATCH --signal=TERM@120\n"
        f"#SBATCH --output={options.name}-%j.log\n"
        f"{_headline(command, where, where.hosts)}\n"
        "# sbatch slurm.sbatch from the repository's root, on a disk that all nodes see; partition, account and time\n"
        "# are the site's: sbatch --partition=... --time=... slurm.sbatch. Once before, where there is a network:\n"
        f"# {_extra_pip(command)}scripts/setup.sh .venv gpu\n"
        "set -euo pipefail\n"
        f"{join if joined else ''}"
        f"{'export KVATTN_DISTRIBUTED=1' + chr(10) if joined else ''}"
        f"srun --cpu-bind=none --kill-on-bad-exit=1 {shlex.join(command.argv(PYTHON))}\n"
    )


TARGETS = {
    "gcloud": _Target("gcloud.sh", _gcloud, tpu=True, gpu=False, shared_disk=False),
    "queued": _Target("queued.sh", _queued, tpu=True, gpu=False, shared_disk=False),
    "xpk": _Target("xpk.sh", _xpk, tpu=True, gpu=False, shared_disk=False),
    "gke": _Target("jobset.yaml", _gke, tpu=True, gpu=False, shared_disk=False),
    "sky": _Target("sky.yaml", _sky, tpu=True, gpu=True, shared_disk=False),
    "slurm": _Target("slurm.sbatch", _slurm, tpu=False, gpu=True, shared_disk=True),
}


# --- YAML ----------------------------------------------------------------------------------------------


def to_yaml(value: Any, indent: str = "") -> str:
    """Block-style YAML of dicts, lists, strings, booleans and integers; keys are plain words."""
    if isinstance(value, dict):
        return "".join(f"{indent}{key}:{_inline_or_block(item, indent)}" for key, item in value.items())
    lines = []
    for item in value:
        if isinstance(item, (dict, list)):
            inner = to_yaml(item, indent + "  ")
            lines.append(f"{indent}- {inner[len(indent) + 2 :]}")
        else:
            lines.append(f"{indent}- {_scalar(item)}\n")
    return "".join(lines)


def _inline_or_block(item: Any, indent: str) -> str:
    if isinstance(item, (dict, list)):
        return "\n" + to_yaml(item, indent + "  ")
    if isinstance(item, str) and item.endswith("\n") and not re.search(r"[^\x20-\x7e\n]|\n\n\Z|\A[ \n]", item):
        return " |\n" + "".join(f"{indent}  {line}\n" if line else "\n" for line in item[:-1].split("\n"))
    return f" {_scalar(item)}\n"


def _scalar(item: Any) -> str:
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, int):
        return str(item)
    plain = item.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[^\x20-\x7e]", lambda m: f"\\U{ord(m[0]):08x}", plain) + '"'
