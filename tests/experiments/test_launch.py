"""Launching: every emitted file is parsed or run with stand-ins for the tools, and must give back the exact argv.

The stand-ins are small shell scripts on PATH: `gcloud ssh --command` and xpk's container start a shell as the real
ones do, Kubernetes' reading of `$` is written out here, and a stand-in for python writes down what it was given.
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from experiments.common import cli
from experiments.launching import command as launch
from experiments.launching import local as launch_local
from experiments.launching import targets as launch_targets
from kvattn.errors import UserError
from kvattn.train import loop as train
from tests.helpers import runs
from tests.helpers.paths import ROOT
from tests.helpers.tolerances import LOSS_SHARDED, close

# name: (hosts, chips a host, JAX devices, Google's accelerator type, topology label, GKE accelerator label)
TPUS = {
    "v4:2x2x1": (1, 4, 4, "v4-8", "2x2x1", "tpu-v4-podslice"),
    "v4:4x4x4": (16, 4, 64, "v4-128", "4x4x4", "tpu-v4-podslice"),
    "v5e:1x1": (1, 1, 1, "v5litepod-1", "1x1", "tpu-v5-lite-podslice"),
    "v5e:2x4": (1, 8, 8, "v5litepod-8", "2x4", "tpu-v5-lite-podslice"),
    "v5e:4x4": (4, 4, 16, "v5litepod-16", "4x4", "tpu-v5-lite-podslice"),
    "v5p:2x2x4": (4, 4, 16, "v5p-32", "2x2x4", "tpu-v5p-slice"),
    "v6e:16x16": (64, 4, 256, "v6e-256", "16x16", "tpu-v6e-slice"),
    "tpu7x:2x2x2": (2, 4, 16, "tpu7x-16", "2x2x2", "tpu7x"),
}
GPUS = {"H100:8": (1, 8), "H200:3x8": (3, 8), "H100:2x4": (2, 4)}
RUNTIMES = {"v4": "tpu-ubuntu2204-base"} | {
    chip: f"v2-alpha-tpu{name}" for chip, name in {"v5e": "v5-lite", "v5p": "v5", "v6e": "v6e"}.items()
}
CELLS = [
    (target, name)
    for name in (*TPUS, *GPUS)
    for target in (("gcloud", "queued", "xpk", "gke", "sky") if name in TPUS else ("sky", "slurm"))
    if not (target == "xpk" and name == "v5e:1x1")
    and not (target in ("gcloud", "queued", "sky") and name == "tpu7x:2x2x2")
]

HARD = [
    'it\'s a "quoted"  value',
    "$HOME ${PATH} $(id) `id` $$ $1 $(SECRET) $$(SECRET)",
    "*.py ? [a] ~ # ! & | ; < > (x) {a,b} %d",
    "back\\slash \\n \\\\ end\\",
    "",
    " ünï 漢 🙂 ",
    "true",
    "3",
]
HARDER = ["line\nbreak\n\n  and $more", "\ttab\x7f\x1b\r\u2028\u0085"]  # what xpk's own template cannot carry

OPTIONS = launch_targets.Options(name="job-7", zone="zone a", project="p", cluster="c'1", image="reg/img:tag")


def command(where: launch.Slice, values: list[str], workdir: str = "gs://bucket/run one") -> launch.Command:
    args = ["--config=configs/train_tiny.py", *(f"--config.decode.prompt={value}" for value in values), *values]
    return launch.Command("experiments.train", tuple(args), "Tiny_1", workdir, (1, where.devices, 1), where.devices)


def emit(target: str, name: str, values: list[str] = HARD, **fields) -> tuple[launch.Command, str]:
    where = launch.parse_slice(name)
    made = command(where, values, **fields)
    file, text = launch_targets.emit(made, target, where, OPTIONS)
    assert file == launch_targets.TARGETS[target].file
    return made, text


def kubernetes(text: str) -> str:
    """Reads a container's command as the kubelet does: $$ is $, $(NAME) is the variable."""
    return re.sub(r"\$(\$|\(([A-Za-z_]\w*)\))", lambda m: "$" if m[1] == "$" else "EXPANDED", text)


class Machine:
    """A folder with stand-ins for the tools on PATH; each appends its arguments to NAME.log."""

    def __init__(self, folder: Path):
        self.home, self.bin = folder / "home", folder / "bin"
        self.bin.mkdir(parents=True)
        record = 'printf "%s\\0" "$@" >>"$LOGS/$(basename "$0").log"; printf "\\1\\0" >>"$LOGS/$(basename "$0").log"\n'
        for tool in ("gcloud", "xpk", "git", "tar", "srun"):
            self.script(self.bin / tool, record + TOOLS.get(tool, ""))
        for place in (self.home / "kvattn", self.home):
            self.script(place / ".venv/bin/python", record + 'env >"$LOGS/env"\n')

    @staticmethod
    def script(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/usr/bin/env bash\n" + text)
        path.chmod(0o755)

    def run(self, text: str, *args: str, **env: str) -> str:
        variables = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.home), "LOGS": str(self.bin.parent)}
        line = ["bash", "-c", text, "file", *args]
        done = subprocess.run(line, cwd=self.home, env=variables | env, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def calls(self, tool: str) -> list[list[str]]:
        file = self.bin.parent / f"{tool}.log"
        text = file.read_bytes().decode() if file.exists() else ""  # read_text would mend line ends
        return [call.split("\0")[:-1] for call in text.split("\1\0")[:-1]]

    def environment(self) -> str:
        return (self.bin.parent / "env").read_text()


TOOLS = {  # ssh hands its command line to the login shell; srun starts its words as they are
    "gcloud": 'for a in "$@"; do case "$a" in --command=cd*) cd "$HOME"; exec bash -c "${a#--command=}" ;; esac; done\n'
    'case "$*" in *describe*) echo ACTIVE ;; esac\n',
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"\n',
}


# --- slices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TPUS)
def test_tpu_slices(name):
    where = launch.parse_slice(name)
    hosts, per_host, devices, accelerator, topology, _ = TPUS[name]
    assert (where.hosts, where.per_host, where.devices, where.topology) == (hosts, per_host, devices, topology)
    assert where.accelerator == accelerator and where.is_tpu and where.is_default_shape and where.name == name


@pytest.mark.parametrize("name", GPUS)
def test_gpu_slices(name):
    where = launch.parse_slice(name.lower())
    assert (where.hosts, where.per_host) == GPUS[name] and where.devices == where.hosts * where.per_host
    assert not where.is_tpu


@pytest.mark.parametrize(
    "text",
    [
        "",
        "v9:2x2",
        "v5e",
        "v5e:",
        "v5e:4x",
        "v5e:2x8",
        "v5e:4x4x4",
        "v4:4x4",
        "v4:4x2x2",
        "v4:8x8x4",
        "v4:4x4x6",
        "v4:16x16x20",
        "tpu7x:1x1x2",
        "H100:16",
        "H100:1x2x4",
        "H100:0",
        "H100:08",
        "v5e:4x4 x",
    ],
)
def test_what_is_no_slice(text):
    with pytest.raises(UserError, match=r"--slice=") as error:
        launch.parse_slice(text)
    assert "\n" not in str(error.value)


def test_a_shape_that_is_not_the_default_is_asked_for_by_name():
    assert not launch.parse_slice("v4:4x4x32").is_default_shape  # v4-1024 is 8x8x8
    _, text = emit("gcloud", "v4:4x4x32", [])
    assert "--type=v4 --topology=4x4x32" in text and "--accelerator-type" not in text
    with pytest.raises(UserError, match="cannot ask for the shape"):
        emit("sky", "v4:4x4x32", [])


# --- every file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "name"), CELLS)
def test_scripts_are_bash_and_manifests_are_yaml(target, name):
    _, text = emit(target, name)
    if target in ("gke", "sky"):
        assert isinstance(yaml.safe_load(text), dict)
    else:
        done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("target", ["gcloud", "queued"])
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x4", "v5e:4x4", "v5p:2x2x4", "v6e:16x16"])
def test_cloud_tpu_vm(target, name, tmp_path):
    made, text = emit(target, name, HARD + HARDER)
    machine, row = Machine(tmp_path), TPUS[name]
    machine.run(text)
    create, *rest = machine.calls("gcloud")
    version = ("--version=" if target == "gcloud" else "--runtime-version=") + RUNTIMES[name.partition(":")[0]]
    assert {"create", "job-7", f"--accelerator-type={row[3]}", version, "--zone=zone a", "--project=p"} <= set(create)
    assert create[2] == ("tpu-vm" if target == "gcloud" else "queued-resources")
    verbs = [call[3] for call in rest]
    assert verbs == (["scp", "ssh", "ssh"] if target == "gcloud" else ["describe", "scp", "ssh", "ssh"])
    assert all("--worker=all" in call for call in rest if call[3] != "describe")
    assert machine.calls("python") == [made.argv("python")[1:]]
    assert ("KVATTN_DISTRIBUTED=1" in machine.environment()) == (row[0] > 1)
    machine.run(text, "delete")
    assert machine.calls("gcloud")[-1][2:5] == [create[2], "delete", "job-7"]
    with pytest.raises(AssertionError, match="no step dance"):
        machine.run(text, "dance")


def test_results_on_the_vm_can_be_fetched(tmp_path):
    _, text = emit("gcloud", "v5e:2x4", [], workdir="work dirs/it's")
    machine = Machine(tmp_path)
    machine.run(text, "fetch")
    assert machine.calls("gcloud")[0][3:7] == ["scp", "--recurse", "job-7:kvattn/work dirs/it's", "."]


@pytest.mark.parametrize("name", ["v4:4x4x4", "v5e:2x4", "tpu7x:2x2x2"])
def test_xpk(name, tmp_path):
    made, text = emit("xpk", name)
    machine, row = Machine(tmp_path), TPUS[name]
    machine.run(text)
    [call] = machine.calls("xpk")
    assert call[:2] == ["workload", "create"] and f"--tpu-type={row[3]}" in call and "--num-slices=1" in call
    assert {"--cluster=c'1", "--workload=job-7", "--docker-image=reg/img:tag"} <= set(call)
    inner = next(a for a in call if a.startswith("--command=")).removeprefix("--command=")
    assert "\n" not in inner
    machine.run(f"({kubernetes(inner)}) & PID=$!; wait $PID", SECRET="s")
    assert machine.calls("python") == [made.argv("python")[1:]]
    joined = row[2] > 4  # xpk's machines have 4 chips, so its 2x4 has two hosts
    assert ("KVATTN_DISTRIBUTED=1" in machine.environment()) == joined


@pytest.mark.parametrize("name", TPUS)
def test_jobset(name):
    made, text = emit("gke", name, HARD + HARDER)
    hosts, per_host, _, _, topology, label = TPUS[name]
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"], jobset["metadata"]["name"]) == (
        "jobset.x-k8s.io/v1alpha2",
        "JobSet",
        "job-7",
    )
    assert jobset["spec"]["network"] == {"enableDNSHostnames": True, "subdomain": "job-7"}
    [job] = jobset["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (hosts, hosts, 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    [container] = pod["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": per_host}
    assert container["image"] == "reg/img:tag"
    assert [kubernetes(word) for word in container["command"]] == made.argv(".venv/bin/python")
    wanted = [{"name": "KVATTN_DISTRIBUTED", "value": "1"}] if hosts > 1 else None
    assert container.get("env") == wanted


@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x4", *GPUS])
def test_sky(name, tmp_path):
    made, text = emit("sky", name, HARD + HARDER)
    task = yaml.safe_load(text)
    assert (task["name"], task["workdir"], task["resources"]["zone"]) == ("job-7", ".", "zone a")
    if name in TPUS:
        assert task["resources"]["accelerators"] == f"tpu-{TPUS[name][3]}" and task["num_nodes"] == 1
        version = RUNTIMES[name.partition(":")[0]]
        assert task["resources"]["accelerator_args"] == {"runtime_version": version}
    else:
        hosts, per_host = GPUS[name]
        assert task["resources"]["accelerators"] == f"{name.partition(':')[0]}:{per_host}"
        assert task["num_nodes"] == hosts
    assert f".venv {'tpu' if name in TPUS else 'gpu'}\n" in task["setup"] and "EXTRA_PIP=gcsfs" in task["setup"]
    assert subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=False).returncode == 0
    machine = Machine(tmp_path)
    machine.run(task["run"], SKYPILOT_NODE_IPS="10.0.0.7\n10.0.0.8", SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1")
    assert machine.calls("python") == [made.argv("python")[1:]]
    several = name in GPUS and GPUS[name][0] > 1
    told = {"JAX_COORDINATOR_ADDRESS=10.0.0.7:8476", "JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=1"}
    assert (told <= set(machine.environment().splitlines())) == several


@pytest.mark.parametrize("name", GPUS)
def test_slurm(name, tmp_path):
    made, text = emit("slurm", name, HARD + HARDER, workdir="on/a/shared/disk")
    hosts, per_host = GPUS[name]
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    sbatch = {line for line in lines[:first] if line.startswith("#SBATCH ")}
    wanted = [f"nodes={hosts}", "ntasks-per-node=1", f"gpus-per-node={per_host}", "job-name=job-7"]
    assert {f"#SBATCH --{option}" for option in wanted} <= sbatch and lines[0] == "#!/usr/bin/env bash"
    machine = Machine(tmp_path)
    machine.run(text)
    assert machine.calls("python") == [made.argv("python")[1:]]
    ids = f"JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(per_host)))}"
    assert ({ids, "KVATTN_DISTRIBUTED=1"} <= set(machine.environment().splitlines())) == (hosts > 1)


def test_the_config_that_arrives_is_the_config_that_was_given(tmp_path):
    """From the arguments in the file, through the same door, the same typed config."""
    given = [
        "--config=configs/train_tiny.py",
        "--config.mesh.fsdp=16",
        "--config.data.batch_size=32",
        "--config.data.paths=a b/*.txt,c$HOME.txt",
        f"--config.decode.prompt={HARD[0]} {HARD[1]}",
        "--config.workdir=gs://bucket/x",
    ]
    resolved = launch.resolve(["python3", "-m", "experiments.train", *given])
    assert resolved == launch.Command("experiments.train", tuple(given), "train_tiny", "gs://bucket/x", (1, 16, 1), 32)
    _, text = launch_targets.emit(resolved, "gcloud", launch.parse_slice("v5e:4x4"), launch_targets.Options())
    machine = Machine(tmp_path)
    machine.run(text)
    [argv] = machine.calls("python")
    assert cli.parse(["train", *argv[2:]])[0] == cli.parse(["train", *given])[0]
    assert machine.calls("gcloud")[0][4] == "kvattn-train-train-tiny"


@pytest.mark.parametrize(
    "value",
    [
        *HARD,
        *HARDER,
        "a\nb\n",
        "a\n\n",
        "\n",
        " lead\n",
        "x: y\n- z\n#\n",
        "é\n",
        "t \n",
        "a\r\nb\n",
        "x\x85y\n",
        "\tt\n",
    ],
)
def test_yaml_gives_strings_back(value):
    tree = {"a": [{"b": value, "c": [value, True, 3]}, value], "d": {"e": value}}
    assert yaml.safe_load(launch_targets.to_yaml(tree)) == tree


# --- bad input -----------------------------------------------------------------------------------------


def refused(match: str, target: str, name: str, options=OPTIONS, **fields):
    where = launch.parse_slice(name)
    made = command(where, [])
    made = launch.Command(**({f: getattr(made, f) for f in made.__dataclass_fields__} | fields))
    with pytest.raises(UserError, match=match) as error:
        launch_targets.emit(made, target, where, options)
    assert "\n" not in str(error.value)


def test_combinations_that_cannot_run():
    refused("nearest valid: slurm", "slum", "H100:8")
    refused("has no TPUs", "slurm", "v5e:4x4")
    for target in ("gcloud", "queued", "xpk", "gke"):
        refused("has no GPUs", target, "H100:8")
    for target in ("gcloud", "queued", "sky"):
        refused("Cloud TPU API", target, "tpu7x:2x2x2")
    refused("--cluster is empty", "xpk", "v5e:4x4", launch_targets.Options())
    refused("--image is empty", "gke", "v5e:4x4", launch_targets.Options())
    refused("--name=Job", "gke", "v5e:4x4", launch_targets.Options(name="Job"))
    refused("start at v5e:2x4", "xpk", "v5e:1x1")
    refused("line break", "xpk", "v5e:4x4", args=("a\nb",))
    for path in ("/etc/x.py", "../x.py", "configs/none.py:arg"):
        refused("stays behind", "gke", "v5e:4x4", args=("--config", path))
        refused("stays behind", "gke", "v5e:4x4", args=(f"--config={path}",))
    refused("experiments.decode runs in one", "gke", "v5e:4x4", module="experiments.decode")
    refused("make its product 16 .*config.workdir is 'w'", "gke", "v5e:4x4", mesh=(2, 4, 1), workdir="w")
    refused("make its product 8", "gke", "v5e:2x4", mesh=(16, 1, 1))
    refused("multiple of mesh.data x mesh.fsdp = 16", "gke", "v5e:4x4", rows=24)
    launch_targets.emit(
        command(launch.parse_slice("v5e:2x4"), [], workdir="w"), "gke", launch.parse_slice("v5e:2x4"), OPTIONS
    )


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "no command"),
        (["experiments.trian"], "nearest valid: experiments.train"),
        (["experiments.launch"], "no experiment with a config"),
        (["os"], "no experiment with a config"),
        (
            ["experiments.train", "--config=configs/nope.py"],
            "experiments.train: --config=configs/nope.py: no such file",
        ),
        (["experiments.train", "--config.model.n_k_heads=3"], "experiments.train: .*n_k_heads"),
        (["experiments.train", "--help"], "prints text and runs nothing"),
    ],
)
def test_commands_that_do_not_resolve(words, match):
    with pytest.raises(UserError, match=match) as error:
        launch.resolve(words)
    assert "\n" not in str(error.value)


def test_packages_are_commands_too():
    made = launch.resolve(["experiments.study", "--config=configs/study_scratch.py", "--config.train.steps=2"])
    assert (made.module, made.name, made.workdir) == ("experiments.study", "study_scratch", "workdirs/study_scratch")


def test_where_the_command_starts():
    assert launch.split(["x", "--out=a", "--", "python", "-m", "e", "--", "b"]) == (
        ["x", "--out=a"],
        ["python", "-m", "e", "--", "b"],
    )
    assert launch.split(["experiments.x", "--out=a", "experiments.e", "--b"]) == (
        ["experiments.x", "--out=a"],
        ["experiments.e", "--b"],
    )
    assert launch.split(["x", "--out=a"]) == (["x", "--out=a"], [])


TINY = ["experiments.train", "--config=configs/train_tiny.py"]


def launcher(*args: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.launch", *args],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_the_command_prints_or_writes_and_says_what_is_wrong(tmp_path):
    """Good and bad lines at once, since each is a second of imports."""
    slurm = ["--target=slurm", "--slice=H100:8"]
    lines = {
        "print": [*slurm, "--", *TINY],
        "write": [*slurm, f"--out={tmp_path}/new/dir", "--", *TINY],
        "file": [*slurm, f"--out={tmp_path}/file", "--", *TINY],
        "config": [*slurm, f"--out={tmp_path}/unmade", "--", *TINY, "--config.train.stepz=1"],
        "target": ["--target=gclout", "--slice=H100:8", f"--out={tmp_path}/unmade", "--", *TINY],
        "both": ["--run=local", "--target=gke", "--", *TINY],
        "zero": ["--run=local", "--processes=0", "--", *TINY],
    }
    (tmp_path / "file").write_text("mine")
    started = {name: launcher(*line) for name, line in lines.items()}
    ended = {name: (*p.communicate(timeout=100), p.returncode) for name, p in started.items()}
    wrong = {
        "file": "is a file",
        "config": "train.stepz is no field",
        "target": "nearest valid: gcloud",
        "both": "leave out --target",
        "zero": "--processes=0; it takes 1",
    }
    for name, text in wrong.items():
        out, err, code = ended[name]
        assert (out, code) == ("", 2) and text in err and err.count("\n") == 1 and err.startswith("error: "), name
    out, err, code = ended["print"]
    assert (code, err) == (0, "") and out.startswith("#!/usr/bin/env bash\n")
    assert shlex.split(out.splitlines()[-1])[3:] == [".venv/bin/python", "-m", *TINY]
    assert ended["write"] == (f"{tmp_path}/new/dir/slurm.sbatch\n", "", 0)
    assert (tmp_path / "new/dir/slurm.sbatch").read_text() == out
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["dir", "file", "new", "slurm.sbatch"]
    assert (tmp_path / "file").read_text() == "mine"


# --- local processes -----------------------------------------------------------------------------------

FIELDS = {"data__batch_size": 16, "optimizer__schedule": "constant", "train__checkpoint_every": 2000}
TEAM = ["--run=local", "--processes=2", "--devices=4", "--"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return runs.write_corpus(tmp_path_factory.mktemp("corpus"))


def team(corpus, workdir, steps):
    line = runs.arguments(corpus, workdir=workdir, train__steps=steps, mesh__data=2, mesh__fsdp=4, **FIELDS)
    return launcher(*TEAM, "experiments.train", *line)


def test_two_local_processes_train_as_one(corpus, tmp_path):
    running = team(corpus, tmp_path / "two", 4)
    train.fit(runs.experiment(corpus, train__steps=4, **FIELDS), workdir=str(tmp_path / "one"), verbose=False)
    out, err = running.communicate(timeout=200)
    assert running.returncode == 0, out + err
    assert all(line.startswith(("[0] ", "[1] ")) for line in out.splitlines())
    assert re.search(r"^\[0\] step 4/4", out, re.MULTILINE) and not re.search(r"^\[1\] step", out, re.MULTILINE)
    curves = [[[r["step"], r["loss"], r["grad_norm"]] for r in runs.records(tmp_path / d)] for d in ("two", "one")]
    assert len(curves[0]) == 4
    close(*curves, LOSS_SHARDED)


SRUN = """while [[ "$1" == --* ]]; do shift; done
export SLURM_JOB_ID=5 SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_LOCALID=0
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" | sed 's/^/second: /'
wait $first
"""


def test_a_slurm_script_joins_its_nodes(corpus, tmp_path):
    """The emitted script with a stand-in for srun and 4 fake CPU devices for a node's GPUs; jax finds the rest."""
    fields = {"train__steps": 3, "mesh__data": 8, "workdir": tmp_path / "run"} | FIELDS
    made = launch.resolve(["experiments.train", *runs.arguments(corpus, **fields)])
    _, text = launch_targets.emit(made, "slurm", launch.parse_slice("H100:2x4"), launch_targets.Options())
    machine = Machine(tmp_path / "machine")
    machine.script(machine.bin / "srun", SRUN)
    machine.script(machine.home / ".venv/bin/python", f'exec {sys.executable} "$@"\n')
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    env |= {"JAX_COORDINATOR_PORT": port, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    out = machine.run(text, **env)
    assert re.search(r"^step 3/3", out, re.MULTILINE) and "second: step" not in out
    assert [r["step"] for r in runs.records(tmp_path / "run")] == [1, 2, 3]


def test_joining_where_there_is_nothing_to_join(tmp_path):
    code, _, err = runs.finish(runs.launch([TINY[1], f"--config.workdir={tmp_path}/run"], KVATTN_DISTRIBUTED="1"))
    assert code == 2 and "jax cannot join the other processes" in err and "JAX_COORDINATOR_ADDRESS" in err
    assert not (tmp_path / "run").exists()


def until(process: subprocess.Popen, start: str) -> None:
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError(process.stderr.read())


def children(process: subprocess.Popen) -> dict[int, int]:
    """JAX_PROCESS_ID -> pid of the experiments that the launcher started."""
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    texts = {int(pid): Path(f"/proc/{pid}/environ").read_text() for pid in pids}
    return {int(re.search(r"JAX_PROCESS_ID=(\d+)", text)[1]): pid for pid, text in texts.items()}


def gone(pids) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_one_killed_process_stops_all(corpus, tmp_path):
    running = team(corpus, tmp_path / "run", 100_000)
    until(running, "[0] step 2/")
    pids = children(running)
    assert sorted(pids) == [0, 1]
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    _, err = running.communicate(timeout=100)
    assert running.returncode == 128 + 9 and "process 1 was killed by signal 9; stopping the others" in err
    assert gone(pids.values()) and time.monotonic() - began < 40


def test_a_signal_to_the_launcher_saves_and_stops_all(corpus, tmp_path):
    running = team(corpus, tmp_path / "run", 100_000)
    until(running, "[0] step 2/")
    pids = children(running)
    running.terminate()
    out, err = running.communicate(timeout=100)
    assert running.returncode == 0, out + err
    assert "[0] stopped by a signal after step" in out and gone(pids.values())
    assert runs.steps(tmp_path / "run") == [runs.records(tmp_path / "run")[-1]["step"]]


def test_an_exit_code_comes_back_and_a_bad_layout_is_refused(tmp_path):
    bad = launch.Command("experiments.train", (TINY[1], "--config.workdir="), "", "", (1, 1, 1), 8)
    with contextlib.redirect_stderr(open(tmp_path / "err", "w")) as err:
        code = launch_local.run(bad, processes=1, devices=1)
    err.close()
    assert code == 2 and (tmp_path / "err").read_text().startswith("[0] error: config.workdir is empty")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    for processes, devices, match in ((2, 4, "make its product 8"), (0, 1, "--processes=0"), (1, -1, "--devices=-1")):
        with pytest.raises(UserError, match=match):
            launch_local.run(bad, processes=processes, devices=devices)
